"""The folder that `xmask masks` leaves: the masks of `xmask.data.masks`, as COCO too, and a picture
of the least sure ones, so that a person checks the right twenty (ours).

An image's confidence is the mean score of its heads; heads without a mask of their own count 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from xmask import files
from xmask.data import masks
from xmask.segmenters import Segmenter
from xmask.tools import coco
from xmask.tools.overlay import overlay

_log = logging.getLogger("xmask")
WORST, COLUMNS = 20, 4
TILE, LINE = (360, 270), 30  # (width, height) of a picture, and of the text above it, px


def make(dataset: Sequence, indices: list[int], segmenter: Segmenter, out: str | os.PathLike, *,
         shard: str = "", overwrite: bool = False, kept: Iterable[Path] = (), **options: Any
         ) -> tuple[list[str], masks.MasksFailed | None]:
    """Masks of the images `indices`, coco.json and worst.png, which has the least sure ones.

    shard, options: as of `masks.mask_dataset`. kept: as of `files.OutputFolder`. Of shards, the
    last one to come to its end writes the two files. Returns what to tell about it, line by line,
    and the error to end with if some images got no masks.
    Raises ValueError, without overwrite, for a folder with results of `xmask predict`.
    """
    failure, written, out = None, [], Path(out)
    names = [dataset.ids[i] for i in masks.part_of(indices, shard)]
    with files.OutputFolder(out, overwrite=overwrite, shard=shard, kept=kept) as folder:
        if not overwrite:
            coco.check_folder(folder, "model.json", "results of `xmask predict`")
        try:
            masks.mask_dataset(dataset, indices, segmenter, out, shard=shard,
                               other="replace" if overwrite else "refuse",
                               overwrite=overwrite, **options)
        except masks.MasksFailed as error:
            failure = error
        with folder.alone():
            done = masks.file_names(out, dataset)
            if not shard or all(dataset.ids[i] in done for i in indices):
                written = [coco.write(out, done, out / "coco.json"),
                           write_worst(dataset, out, out / "worst.png")]
    told = [masks.summary(out, names), *map(str, filter(None, (out / "manifest.json", *written)))]
    return told, failure


def confidence(folder: str | os.PathLike) -> pd.DataFrame:
    """Images of a folder of masks, the least confident first: image, confidence, heads, failed.

    Reads the tables of the images that the manifest lists; images without heads are left out.
    failed: heads that got a disc, because no candidate was good enough.
    """
    rows = []
    for name in sorted(masks.read_manifest(folder)["images"]):
        table = pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False)
        if len(table):
            failed = (table["source"] == "disc") | (table["area"] == 0)
            rows.append({"image": name, "confidence": table["score"].where(~failed, 0).mean(),
                         "heads": len(table), "failed": int(failed.sum())})
    table = pd.DataFrame(rows, columns=["image", "confidence", "heads", "failed"])
    return table.sort_values(["confidence", "image"], ignore_index=True)


def write_worst(dataset: Any, folder: str | os.PathLike, path: str | os.PathLike) -> Path | None:
    """The twenty least confident images with their masks as one PNG; None if there are none.

    dataset: the one the masks were made of. It shows photographs: mind their licence.
    """
    worst = confidence(folder)
    worst = worst[worst["image"].isin(dataset.ids)].head(WORST)
    if not len(worst):
        return None
    width, height = TILE
    lines = -(-len(worst) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(worst)), lines * (height + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, row in enumerate(worst.itertuples()):
        try:
            sample = dataset[dataset.ids.index(row.image)]
            tile = Image.fromarray(overlay(sample.image, masks.read_masks(folder, row.image)))
        except (OSError, ValueError) as error:  # it broke after its masks were made
            _log.warning("left out of %s: %s", path, error)
            tile = Image.new("RGB", TILE, "grey")
        tile.thumbnail(TILE)
        left, top = k % COLUMNS * width, k // COLUMNS * (height + LINE)
        draw.text((left + 4, top + 9), f"{row.image}: confidence {row.confidence:.2f}, "
                  f"{row.heads} heads, {row.failed} discs", fill="black")
        sheet.paste(tile, (left, top + LINE))
    files.write_png(path, np.asarray(sheet))
    return Path(path)
