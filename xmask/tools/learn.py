"""Your own photos and dots: a folder of images, beside some of them a CSV of dots, to a model.

The same steps as the study's: EDP-SAM masks of the dotted photos, then the three-phase training
with all the others as unlabelled images. The result is a run folder that `xmask.load` takes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from xmask import config, edp_sam, files, predict, provenance, segmenters
from xmask.config import Config
from xmask.data.annotations import clip_points
from xmask.data.images import read_image
from xmask.data.sample import Sample
from xmask.trainer import Trainer

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")


def read_folder(folder: str | os.PathLike) -> tuple[list[Sample], list[Sample]]:
    """Photos of a folder: (those with dots, those without), each in the order of their names.

    An image `a.jpg` has dots if `a.csv` lies beside it: a table with columns x and y in pixels,
    origin at the centre of the top-left pixel, one line a head (no line: an empty scene). Dots
    outside the image are moved to its border, and the sample's `repairs` say how many.
    Raises FileNotFoundError for a folder without images; ValueError, naming the file, for a
    table without these columns, with text in them, or without an image.
    """
    folder = Path(folder)
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{folder}: no image in this folder ({', '.join(SUFFIXES)})")
    stray = sorted({p.stem for p in folder.glob("*.csv")} - {p.stem for p in images})
    if stray:
        raise ValueError(f"{folder / stray[0]}.csv: no image of this name beside it; rename one of "
                         "the two, or move the table elsewhere")
    dotted, bare = [], []
    for path in images:
        image, table = read_image(path), path.with_suffix(".csv")
        if table.is_file():
            points, repairs = clip_points(_dots(table), image.shape[:2])
            dotted.append(Sample(image, points, name=path.stem, repairs=repairs))
        else:
            bare.append(Sample(image, np.zeros((0, 2), np.float32), name=path.stem))
    return dotted, bare


def configure(overrides: dict[str, object] | None = None, *, seed: int = 1) -> Config:
    """The configuration of a training on own photos: that of profile `photo`, slim network.

    overrides: fields by dotted name. The configuration names no dataset of the study.
    """
    return config.preset("photo", "synthetic", 100, seed=seed, overrides=overrides)


def learn(dotted: Sequence[Sample], bare: Sequence[Sample], out: str | os.PathLike,
          settings: Config, *, segmenter: str = "bundled", start: bool = True,
          progress: bool = True) -> Path:
    """Train on photos with dots and photos without; return the run folder `out`.

    dotted, bare: as of `read_folder`. settings: as of `configure`. segmenter: "bundled",
    "classical" (faster), or a SAM checkpoint. start: begin with the weights of the model of the
    package, which was trained on synthetic crowds, instead of at random; the network must be its
    slim one.
    `out` gets config.json, history.csv, model.safetensors, and masks/, a label map per dotted
    photo. Interrupted, the same call goes on; finished, `xmask.load(out)` loads it.
    Raises ValueError without a dot.
    """
    if not sum(len(one.points) for one in dotted):
        raise ValueError("no dots: training needs at least one photo with a CSV of x,y beside it")
    out = Path(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = segmenters.open_segmenter(segmenter, str(device))
    masked = []
    for one in dotted:
        masks, _ = edp_sam.generate_masks(one.image, one.points, opened)
        files.write_png(out / "masks" / f"{one.name}.png", masks.astype(np.uint16))
        masked.append(replace(one, instances=masks))
    checksum = provenance.digest(*([one.name, hashlib.sha256(
        one.image.tobytes() + one.points.tobytes()).hexdigest()] for one in (*dotted, *bare)))
    trainer = Trainer(settings, masked, bare, out, device=device, progress=progress,
                      fingerprint=provenance.digest(checksum, opened.describe(), start))
    initialisation = trainer.initialisation
    if start:
        shipped = predict.load(device="cpu")
        for network in (trainer.student, trainer.teacher):
            network.load_state_dict(shipped.network.state_dict())
        initialisation = f"weights of the package (sha256 {shipped.record['sha256'][:12]})"
    files.write_json(out / "config.json", {
        "profile": settings.profile, "dataset": "own", "percent": settings.percent,
        "seed": settings.seed, "variant": settings.variant, "synthetic": False,
        "backbone": {"name": settings.network.backbone, "initialisation": initialisation},
        "selection": settings.selection, "segmenter": opened.describe(),
        "versions": provenance.versions(), "device": device.type,
        "data": {"checksum": checksum, "labelled": [one.name for one in dotted],
                 "unlabelled": len(bare)},
        "config": settings.to_dict()})
    trainer.fit()
    return out


def _dots(path: Path) -> np.ndarray:
    """(N, 2) float64 of the columns x and y."""
    try:
        table = pd.read_csv(path)
        points = table[["x", "y"]].to_numpy(np.float64)
    except (KeyError, ValueError, pd.errors.ParserError) as error:  # EmptyDataError is a ValueError
        raise ValueError(f"{path}: {error}. Give a table with a line 'x,y' first and then one line "
                         "a head, numbers in pixels") from None
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: line {int((~np.isfinite(points)).any(1).argmax()) + 2} lacks x "
                         "or y; complete or delete it")
    return points
