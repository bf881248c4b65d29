"""Colours that colour-blind readers can tell apart, and instances painted over an image.

Nothing here needs matplotlib: `xmask predict` paints without it.
"""

from __future__ import annotations

import numpy as np
from skimage.segmentation import find_boundaries

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW = (  # Okabe and Ito, 2008
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#7F7F7F"
#: Colours of instances, (7, 3) float RGB from 0 to 255, used in turn.
INSTANCES = np.array([list(bytes.fromhex(colour[1:])) for colour in (
    BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)], dtype=np.float64)


def overlay(image: np.ndarray, label_map: np.ndarray, points: np.ndarray | None = None, *,
            opacity: float = 0.4) -> np.ndarray:
    """Paint instances, their contours and their head points over an image.

    image: (H, W, 3) uint8. label_map: (H, W) int, 0 background. points: (N, 2) float (x, y)
    pixels, drawn as white dots with a black rim. Returns a new (H, W, 3) uint8 array. Colours
    repeat after seven instances; contours keep neighbours of one colour apart.
    Raises ValueError if the image is of another type or the label map of another size.
    """
    image, label_map = np.asarray(image), np.asarray(label_map)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    if label_map.shape != image.shape[:2]:
        raise ValueError(f"label_map is {label_map.shape}, but the image is {image.shape[:2]}")
    painted = image.copy()
    edge = find_boundaries(label_map, mode="inner", background=0)
    turn = np.where(label_map > 0, (label_map - 1) % len(INSTANCES), -1)
    for k, colour in enumerate(INSTANCES):  # one after another: a large image needs less memory
        inside = turn == k
        painted[inside] = ((1 - opacity) * image[inside] + opacity * colour).round()
        painted[inside & edge] = colour
    if points is not None:
        mark(painted, points)
    return painted


def mark(image: np.ndarray, points: np.ndarray) -> None:
    """Draw points (N, 2), float (x, y) pixels, into an image (H, W, 3) uint8, see `overlay`."""
    for radius, value in ((1, 0), (0, 255)):
        for x, y in np.rint(points).astype(int):
            image[max(y - radius, 0):max(y + radius + 1, 0),
                  max(x - radius, 0):max(x + radius + 1, 0)] = value
