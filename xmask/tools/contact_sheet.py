"""The worst images at a glance, so that a person checks the right twenty (ours).

An image's confidence is the mean score of its heads; heads without a mask of their own count 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from xmask import files

WORST, COLUMNS = 20, 4
TILE, LINE = (360, 270), 30  # (width, height) of a picture, and of the text above it, px


def confidence(folder: str | os.PathLike) -> pd.DataFrame:
    """Images of a folder of masks, the least confident first: image, confidence, heads, failed.

    Reads the tables of the images that the manifest lists; images without heads are left out.
    failed: heads that got a disc, because no candidate was good enough.
    """
    from xmask.data.masks import masked

    rows = []
    for path in (Path(folder) / f"{name}.csv" for name in sorted(masked(folder))):
        table = pd.read_csv(path, keep_default_na=False)
        if len(table):
            failed = (table["source"] == "disc") | (table["area"] == 0)
            rows.append({"image": path.stem, "confidence": table["score"].where(~failed, 0).mean(),
                         "heads": len(table), "failed": int(failed.sum())})
    table = pd.DataFrame(rows, columns=["image", "confidence", "heads", "failed"])
    return table.sort_values(["confidence", "image"], ignore_index=True)


def write(dataset: Any, folder: str | os.PathLike, path: str | os.PathLike) -> Path | None:
    """The twenty least confident images with their masks as one PNG; None if there are none.

    dataset: the one the masks were made of. It shows photographs: mind their licence.
    """
    from xmask.data.masks import read_masks
    from xmask.tools.overlay import overlay

    worst = confidence(folder)
    worst = worst[worst["image"].isin(dataset.ids)].head(WORST)
    if not len(worst):
        return None
    width, height = TILE
    lines = -(-len(worst) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(worst)), lines * (height + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, row in enumerate(worst.itertuples()):
        sample = dataset[dataset.ids.index(row.image)]
        tile = Image.fromarray(overlay(sample.image, read_masks(folder, row.image)))
        tile.thumbnail(TILE)
        left, top = k % COLUMNS * width, k // COLUMNS * (height + LINE)
        draw.text((left + 4, top + 9), f"{row.image}: confidence {row.confidence:.2f}, "
                  f"{row.heads} heads, {row.failed} discs", fill="black")
        sheet.paste(tile, (left, top + LINE))
    files.write_png(path, np.asarray(sheet))
    return Path(path)
