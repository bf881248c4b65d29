"""Which parts of an image a segmenter sees enlarged, so that small heads are large enough.

Part of EDP-SAM; the paper does not describe it, this is our reading. The Segment Anything
Model loses objects of a few pixels of its input. Every head therefore asks for a crop in which
it spans `HEAD_CELLS` cells of the model's masks or more; a small head in a large image gets
fewer where `max_zoom` or `MOST_ENLARGED` ends the enlarging. Crops come in octaves of size, lie on
a grid that overlaps by two fifths, and exist only where heads ask for them: where a crowd is
dense and distant there are many small ones, where it is near the whole image will do. Every
head is decided in the crop of its octave in which it is most central.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

HEAD_CELLS = 7.0  # a head's diameter in mask cells that is wanted, and less than twice that
STRIDE = 0.6  # of a crop's side, from one crop to the next: no head nearer than 0.2 to an edge
MOST_ENLARGED = 8.0  # pixels of the model's input per pixel of the image


@dataclass(frozen=True)
class View:
    """A crop of the image; pixels of the image."""

    top: int
    left: int
    height: int
    width: int


def plan_crops(
    centre: np.ndarray, radius: np.ndarray, shape: tuple[int, int], *, cells: int, side: int,
    max_zoom: float,
) -> tuple[list[View], np.ndarray]:
    """The crops that heads ask for, and the crop of every head.

    centre: (B, 2) float, (x, y) pixels. radius: (B,) float, px, about the size of each head.
    shape: (H, W) of the image. cells: of a side of the model's masks; side: px of its input.
    max_zoom: crops are no smaller than the image's longer side over this.
    Returns (crops, (B,) index into them). A crop on a short image is as high (wide) as that.
    """
    height, width = shape
    long_side = max(height, width)
    wanted = long_side * HEAD_CELLS / (cells * 2 * np.maximum(radius, 1e-6))
    largest = max(min(max_zoom, long_side * MOST_ENLARGED / side), 1.0)
    octave = np.ceil(np.log2(np.maximum(wanted, 1.0))).clip(0, math.floor(math.log2(largest)))
    views: list[View] = []
    view_of = np.zeros(len(centre), dtype=np.int64)
    for one in np.unique(octave):
        crop = math.ceil(long_side / 2**one)
        members = np.flatnonzero(octave == one)
        top, tall = crop_starts(centre[members, 1], height, crop)
        left, wide = crop_starts(centre[members, 0], width, crop)
        corners, number = np.unique(np.stack([top, left], axis=1), axis=0, return_inverse=True)
        view_of[members] = len(views) + number.reshape(-1)
        views += [View(int(t), int(x), tall, wide) for t, x in corners]
    return views, view_of


def crop_starts(centre: np.ndarray, length: int, side: int) -> tuple[np.ndarray, int]:
    """Along one axis: where the crop whose middle is nearest to each centre starts; its length.

    centre: (N,) px. length, side: px, of the image and of a crop. Returns ((N,) int px, px).
    """
    side = min(side, length)
    steps = math.ceil((length - side) / (STRIDE * side))
    spacing = (length - side) / max(steps, 1)
    nearest = np.rint((centre - side / 2 + 0.5) / max(spacing, 1e-9)).clip(0, steps)
    return np.rint(nearest * spacing).astype(int), side
