"""Your own photos and dots: a folder of images, beside some of them a CSV of dots, to a model.

The same steps as the study's: EDP-SAM masks of the dotted photos, then the three-phase training
with all photos as unlabelled images. The result is a run folder that `xmask.load` takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from xmask import config, files, provenance, segmenters
from xmask.config import Config
from xmask.data.masks import mask_dataset
from xmask.data.own_photos import OwnPhotos, read_folder
from xmask.data.sample import Sample
from xmask.data.training_images import BareImages, Kept, MaskedImages
from xmask.study import training
from xmask.tools import models
from xmask.trainer import Trainer

__all__ = ["configure", "learn", "read_folder"]
_log = logging.getLogger("xmask")
_CACHE = 256 << 20  # bytes of photos kept in memory


def configure(overrides: dict[str, object] | None = None, *, seed: int = 1) -> Config:
    """The configuration of a training on own photos: that of profile `photo`, slim network.

    overrides: fields by dotted name. The configuration names no dataset of the study.
    """
    return config.preset("photo", "synthetic", 100, seed=seed, overrides=overrides)


def learn(dotted: OwnPhotos, bare: OwnPhotos, out: str | os.PathLike, settings: Config, *,
          segmenter: str = "bundled", start: bool = True, overwrite: bool = False,
          progress: bool = True) -> Path:
    """Train on photos with dots and photos without; return the run folder `out`.

    dotted, bare: as of `read_folder`. settings: as of `configure`. segmenter: "bundled",
    "classical" (faster), or a SAM checkpoint. start: begin with the weights of the model of the
    package, which was trained on synthetic crowds, instead of at random; the network must be its
    slim one. overwrite: as of `files.OutputFolder`, which `out` is.
    `out` gets config.json, history.csv, model.safetensors, and masks/, a label map per dotted
    photo. Interrupted, the same call goes on; finished, it does nothing, and `xmask.load(out)`
    loads the model. A photo that cannot be read is named and left out.
    Raises ValueError without a dot, and for a network that cannot take the start.
    """
    if not len(dotted) or not dotted.counts().sum():
        raise ValueError("no dots: training needs at least one photo with a CSV of x,y beside it")
    with files.OutputFolder(out, overwrite=overwrite) as folder:
        return _learn(dotted, bare, folder, settings, segmenter, start, progress)


def _learn(dotted: OwnPhotos, bare: OwnPhotos, folder: files.OutputFolder, settings: Config,
           segmenter: str, start: bool, progress: bool) -> Path:
    out = folder.path
    model, record = out / "model.safetensors", out / "config.json"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = segmenters.describe(segmenter)
    shipped = models.load(device="cpu") if start else None
    initialisation = (f"weights of the package (sha256 {shipped.record['sha256'][:12]})"
                      if shipped else "")
    checksum = provenance.digest(dotted.checksum(), bare.checksum())
    fingerprint = provenance.fingerprint(
        ("xmask.study.training", "xmask.data.masks", "xmask.data.own_photos"), checksum, described,
        initialisation, settings.to_dict(), device.type)
    if folder.is_intact(model) and folder.is_intact(record) and (
            files.read_json(record).get("fingerprint") == fingerprint):
        return out  # finished before
    (dotted, damaged), (bare, more) = dotted.sound(), bare.sound()
    for message in damaged + more:
        _log.warning("left out: %s", message)
    if not len(dotted):
        raise ValueError("no photo with dots can be read; see above")
    opened = segmenters.open_segmenter(segmenter, device)
    masks = mask_dataset(dotted, range(len(dotted)), opened, out / "masks", progress=progress,
                         depends={"code": provenance.code("xmask.edp_sam")})
    labelled = MaskedImages(dotted, list(range(len(dotted))), masks, dotted.ids)
    trainer = Trainer(settings, Kept(labelled, _CACHE),
                      BareImages(Kept(_Both(dotted, bare), _CACHE)), device=device)
    if shipped:
        try:
            for network in (trainer.student, trainer.teacher):
                network.load_state_dict(shipped.network.state_dict())
        except RuntimeError:
            raise ValueError("network (--set network...): the model of the package, which training "
                             "starts from, has another network; leave these fields as they are"
                             ) from None
        trainer.initialisation = initialisation
    folder.remove(model)  # of other photos or settings: it must not stand beside a new record
    files.write_json(record, {
        "profile": settings.profile, "dataset": "own", "percent": settings.percent,
        "seed": settings.seed, "variant": settings.variant, "synthetic": False,
        "backbone": {"name": settings.network.backbone,
                     "initialisation": trainer.initialisation},
        "start": shipped.record["sha256"] if shipped else None,
        "selection": settings.selection, "segmenter": described,
        "versions": provenance.versions(), "device": device.type,
        "data": {"checksum": checksum, "labelled": dotted.ids, "unlabelled": len(bare),
                 "left_out": damaged + more},
        "fingerprint": fingerprint, "config": settings.to_dict()})
    training.fit(trainer, out, progress=progress, fingerprint=fingerprint)
    return out


class _Both(Sequence):
    """The photos of one sequence, then those of another."""

    def __init__(self, first: Sequence[Sample], second: Sequence[Sample]):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, position: int) -> Sample:
        if position < len(self.first):
            return self.first[position]
        return self.second[position - len(self.first)]
