"""XMask: masks for every person of a crowd from dots, counting and segmenting from few labels.

A companion to "Exclusivity-Guided Mask Learning for Semi-Supervised Crowd Instance Segmentation
and Counting" (arXiv 2603.16241). The modules here are the method, in the order in which data flows:
`nnec` (exclusion circles), `segmenters` and `edp_sam` (dots to masks), `model`, `features`,
`losses`, `trainer` (learning), `decode` (network output to points and masks), `metrics`, and
`predict`, one's own photos: `xmask.load().predict("photo.jpg")`. Readers are in `data`, drawn
crowds in `synthetic`, the study's steps, tables and figures in `study`.
"""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("xmask")  # made from git when the package is installed
except importlib.metadata.PackageNotFoundError:  # a folder of sources that was never installed
    __version__ = "0+unknown"


def load(weights=None, device=None):
    """A model ready to predict, an `xmask.predict.Predictor`: `load().predict("photo.jpg").count`.

    weights: None for the package's model of photographs; "drawn" for its one of drawn crowds; the
    path of a file of `xmask export`, or of a run folder. device: "cpu", "cuda", ...; None takes
    CUDA where there is one. Raises FileNotFoundError or ValueError, naming file and remedy. More:
    `xmask.tools.models.load`.
    """
    from xmask.tools.models import load as load_  # here, so that `import xmask` stays light

    return load_(weights, device)
