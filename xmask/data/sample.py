"""A sample: one image with its heads, the value that every step of the study starts from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a crowd, with its annotation brought into the image.

    image: (H, W, 3) uint8, RGB.
    points: (N, 2) float32, `(x, y)` in pixels of `image`, origin at the centre of the top-left
        pixel, so `0 <= x <= W - 1` and `0 <= y <= H - 1`; (0, 2) for an image without heads.
    instances: (H, W) int32 label map, 0 background and k the person of `points[k - 1]`; None
        where the data set has no masks.
    name: the image's name in its data set, such as "IMG_12".
    boxes: (N, 2) float32, width and height of each head box in pixels of `image`; None where
        the data set has no boxes.
    repairs: how often each repair was needed, by name ("clipped": points moved to the border,
        "duplicates": points at exactly the place of an earlier one, which are kept,
        "exif_rotated": 1 if the image was turned upright, "exif_ignored": 1 if it was left as
        stored, because only so do its points fit; "grey", "16_bit_grey", "palette", or another
        colour mode such as "cmyk": 1 if RGB was made of it). A repair not needed is not listed.
    """

    image: np.ndarray
    points: np.ndarray
    instances: np.ndarray | None = None
    name: str = ""
    boxes: np.ndarray | None = None
    repairs: dict[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[:2]
