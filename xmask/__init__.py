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
    """A model ready to predict, see `xmask.tools.models.load`: the one of the package, the one of
    drawn crowds ("drawn"), or the one in a file or run folder."""
    from xmask.tools.models import load as load_  # here, so that `import xmask` stays light

    return load_(weights, device)
