"""Your own photos and dots: a folder of images, beside some of them a CSV of dots, to a model.

The same steps as the study's: EDP-SAM masks of the dotted photos, then the three-phase training
with all photos as unlabelled images. The result is a run folder that `xmask.load` takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from xmask import config, files, metrics, model, provenance, segmenters
from xmask.calibration import Calibration
from xmask.config import Config
from xmask.data.masks import mask_dataset
from xmask.data.own_photos import OwnPhotos, read_folder
from xmask.data.sample import Sample
from xmask.data.splits import stratified
from xmask.data.training_images import BareImages, Kept, MaskedImages
from xmask.decode import Prediction
from xmask.predict import Predictor, predict_image
from xmask.presets import LEARN
from xmask.study import evaluate as evaluation
from xmask.study import training
from xmask.tools import models
from xmask.trainer import Trainer

__all__ = ["compare", "configure", "held_out", "learn", "read_folder"]
_log = logging.getLogger("xmask")
_NEAR = 8.0  # px: a head found so close to a dot is the same
_CACHE = 256 << 20  # bytes of photos kept in memory


def configure(overrides: dict[str, object] | None = None, *, seed: int = 1) -> Config:
    """The configuration of a training on own photos: that of profile `photo`, shorter.

    overrides: fields by dotted name.
    """
    return config.override(config.preset("photo", "own", 100, seed=seed),
                           LEARN | (overrides or {}))


def learn(dotted: OwnPhotos, bare: OwnPhotos, out: str | os.PathLike, settings: Config, *,
          segmenter: str = "bundled", overwrite: bool = False, progress: bool = True) -> Path:
    """Train the package's model for photographs on photos with dots and photos without; return the
    run folder `out`.

    dotted, bare: as of `read_folder`. settings: as of `configure`; the network must be the model's.
    segmenter: "bundled", "classical" (faster), or a SAM checkpoint. overwrite: as of
    `files.OutputFolder`, which `out` is.
    `out` gets config.json, history.csv, model.safetensors, and masks/, a label map per dotted
    photo. Where enough photos have dots (`held_out`), some are kept from training: they calibrate
    the counts, and report.json says what learning changed on them, see `compare`. Interrupted, the
    same call goes on; finished, it does nothing, and `xmask.load(out)` loads the model. One of
    other photos or settings is kept in the folder `earlier-1` of `out`, which loads, too. A photo
    that cannot be read is named and left out.
    Raises ValueError without a dot, for a network that cannot take the start, and, unless
    `overwrite`, rather than lose masks of other photos or another segmenter.
    """
    if not len(dotted) or not dotted.counts().sum():
        raise ValueError("no dots: training needs at least one photo with dots beside it. For "
                         "a.jpg write a.csv: the line x,y first, then one line a head, in pixels")
    with files.OutputFolder(out, overwrite=overwrite,
                            kept=[*dotted.files, *bare.files]) as folder:
        return _learn(dotted, bare, folder, settings, segmenter, overwrite, progress)


def held_out(dotted: OwnPhotos, share: float) -> list[int]:
    """Which dotted photos calibrate and measure instead of training: that share of them, of sparse
    and dense ones alike, at least 3; none if fewer than 10 have dots."""
    if share == 0 or len(dotted) < 10:
        return []
    percent = 100 * max(share, 3 / len(dotted))
    return stratified(dotted.counts(), percent, seed=2024)


def _learn(dotted: OwnPhotos, bare: OwnPhotos, folder: files.OutputFolder, settings: Config,
           segmenter: str, overwrite: bool, progress: bool) -> Path:
    out = folder.path
    weights, record, report = (out / n for n in ("model.safetensors", "config.json", "report.json"))
    shipped = models.load()
    device, described = shipped.device, segmenters.describe(segmenter)
    initialisation = f"weights of the package (sha256 {shipped.record['sha256'][:12]})"
    checksum = provenance.digest(dotted.checksum(), bare.checksum())
    fingerprint = provenance.fingerprint(
        ("xmask.study.training", "xmask.study.evaluate", "xmask.data.masks",
         "xmask.data.own_photos"),
        checksum, described, initialisation, settings.to_dict(), device.type)
    unfinished = (out / "checkpoint.pt").exists()  # it goes last, after calibration and report
    same = (folder.is_intact(record)
            and files.read_json(record).get("fingerprint") == fingerprint)
    if same and not unfinished and folder.is_intact(weights):
        return out  # finished before
    for needed in (weights, out / "checkpoint.pt"):
        if not folder.is_listed(needed):
            folder.make_way(needed)  # the user's own is named now, not when training has ended
    _check_start(settings, shipped)
    (dotted, damaged), (bare, more) = dotted.sound(), bare.sound()
    for message in damaged + more:
        _log.warning("left out: %s", message)
    if not len(dotted):
        raise ValueError("no photo with dots can be read; see above")
    measured = held_out(dotted, settings.calibration.held_out)
    learnt = [i for i in range(len(dotted)) if i not in measured]
    opened = segmenters.open_segmenter(segmenter, device)
    masks = mask_dataset(dotted, learnt, opened, out / "masks", progress=progress,
                         depends={"code": provenance.code("xmask.edp_sam")},
                         other="replace" if overwrite else "refuse")
    labelled = MaskedImages(dotted, learnt, masks, dotted.ids)
    everything = ConcatDataset([Subset(dotted, learnt), bare])
    trainer = Trainer(settings, Kept(labelled, _CACHE), BareImages(Kept(everything, _CACHE)),
                      device=device)
    for network in (trainer.student, trainer.teacher):
        network.load_state_dict(shipped.network.state_dict())
    trainer.initialisation = initialisation
    # what is of other photos or settings is not to stand beside a new record
    if not same and any(map(folder.is_intact, (weights, report))):
        folder.keep_earlier(weights.name, report.name, "history.csv", record.name)
    if not folder.is_intact(weights):
        folder.remove(weights)
    written = {
        **evaluation.identity(settings, synthetic=False),
        "backbone": {"name": settings.network.backbone, "initialisation": initialisation},
        "start": shipped.record["sha256"], "segmenter": described,
        "versions": provenance.versions(), "device": device.type,
        "precision": trainer.precision,
        "data": {"checksum": checksum, "labelled": [dotted.ids[i] for i in learnt],
                 "held_out": [dotted.ids[i] for i in measured], "unlabelled": len(bare),
                 "left_out": damaged + more},
        "calibration": None, "fingerprint": fingerprint, "config": settings.to_dict()}
    files.write_json(record, written)

    def finish(network: torch.nn.Module) -> None:
        found, said = compare(shipped, network, Subset(dotted, measured), settings,
                              progress=progress)
        files.write_json(record, written | {"calibration": found.to_dict()})
        files.write_json(report, said)

    training.fit(trainer, out, progress=progress, fingerprint=fingerprint,
                 finish=finish if measured else None)
    return out


def _check_start(settings: Config, shipped: Predictor) -> None:
    """Raises ValueError, before masks are made, for a network that cannot be built or started."""
    network = model.build(settings.network)[0]
    try:
        network.load_state_dict(shipped.network.state_dict())
    except RuntimeError:
        raise ValueError("network (--set network...): the model of the package, which training "
                         "starts from, has another network; leave these fields as they are"
                         ) from None


def compare(before: Predictor, network: torch.nn.Module, photos: Sequence[Sample],
            settings: Config, *, progress: bool = True) -> tuple[Calibration, dict]:
    """What learning changed, on photos with dots that it did not see.

    before: the model it started from. network: the one it led to. photos: three or
    more. Returns the calibration of the network by all of these photos, and the report: for
    `before` (as it is) and `after` (each photo by the calibration of the others) `mae`, `bias`
    (mean of count - dots), `precision` and `recall` of heads within 8 px, and `coverage`, the
    share of photos whose number of dots lies in the interval, None where there is no interval.
    """
    seen = evaluation.look(network, photos, settings.evaluation, progress=progress)
    found = evaluation.calibrate(seen, settings)
    after, earlier = [], []
    for number, sample in enumerate(photos):
        others = evaluation.calibrate(seen[:number] + seen[number + 1:], settings)
        after.append((sample, predict_image(network, sample.image,
                                            others.applied(settings.evaluation),
                                            calibration=others)))
        earlier.append((sample, before.predict(sample.image)))
    return found, {"photos": len(after), "dots": sum(len(sample.points) for sample, _ in after),
                   "before": _measures(earlier), "after": _measures(after)}


def in_words(report: dict) -> str:
    """The report of `compare` for the terminal."""
    lines = [f"On {report['photos']} photos with {report['dots']} dots that were held out:"]
    for name in ("before", "after"):
        m = report[name]
        covered = "" if m["coverage"] is None else f", {m['coverage']:.0%} inside the interval"
        lines.append(f"  {name:6} count wrong by {m['mae']:.1f} on average "
                     f"({models.cancelled(m['bias'], 1)}), precision {m['precision']:.2f}, "
                     f"recall {m['recall']:.2f}{covered}")
    return "\n".join(lines)


def _measures(pairs: list[tuple[Sample, Prediction]]) -> dict[str, float | None]:
    error = [found.count - len(sample.points) for sample, found in pairs]
    places = metrics.localization_total(
        metrics.localization(found.heads, sample.points, _NEAR) for sample, found in pairs)
    inside = [found.low <= len(sample.points) <= found.high
              for sample, found in pairs if found.low is not None and found.high is not None]
    return {"mae": float(np.mean(np.abs(error))), "bias": float(np.mean(error)),
            "precision": places["precision"], "recall": places["recall"],
            "coverage": float(np.mean(inside)) if inside else None}
