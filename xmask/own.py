"""Your own photos and dots as samples: a folder of images, beside each one a CSV of its dots."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from xmask.data.annotations import clip_points
from xmask.data.images import read_image
from xmask.data.sample import Sample

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
