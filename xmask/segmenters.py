"""Promptable segmenters behind one protocol: the "S" of EDP-SAM (paper section on EDP-SAM).

A segmenter looks at an image once and then answers prompts. It is asked for logits at a list of
(head, pixel) incidences and never makes a full image per head: memory follows the number of
incidences, which is O(H*W) however many heads there are. The Segment Anything Model is in
`xmask.segmenting.sam_segmenter`; `xmask.segmenting.classical` needs no weights;
docs/add_a_segmenter.md adds another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

POSITIVE, NEGATIVE, PADDING = 1, 0, -1  # labels of prompt points, as in SAM


@dataclass(frozen=True)
class Prompts:
    """One prompt per head, B heads, in pixels of the image (origin at the top-left pixel's centre).

    points: (B, K, 2) float, (x, y). labels: (B, K) int, 1 on the object, 0 off it, -1 padding.
    boxes: (B, 4) float x0, y0, x1, y1, or None.
    multimask: three candidate masks for an ambiguous prompt (True) or the single best (False).
    sizes: (B,) float px, about the radius of each object, or None; a segmenter may use it to
        decide how closely to look, and takes the incidences' extent for it where it is None.
    """

    points: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray | None = None
    multimask: bool = True
    sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, each = self.labels.shape if self.labels.ndim == 2 else (-1, -1)
        if self.points.shape != (count, each, 2):
            raise ValueError(
                f"prompts: points {self.points.shape} and labels {self.labels.shape} do not "
                "match; expected (B, K, 2) and (B, K)")
        for name, value, each in (("boxes", self.boxes, (4,)), ("sizes", self.sizes, ())):
            if value is not None and value.shape != (count, *each):
                raise ValueError(f"prompts: {name} {value.shape} do not match {count} heads; "
                                 f"expected (B,{' 4' if each else ''})")

    def __len__(self) -> int:
        return len(self.labels)


class Segmenter(Protocol):
    """What EDP-SAM asks of a segmenter.

    crops_by_size: whether what it sees of a head depends on `Prompts.sizes`, so that a better
    size is worth a second look.
    """

    name: str
    crops_by_size: bool

    def describe(self) -> dict[str, Any]:
        """What is needed to know which segmenter made a mask: kind, weights' sha256, settings."""
        ...

    def set_image(self, image: np.ndarray) -> None:
        """Look at an image: (H, W, 3) uint8, RGB. Everything that is not per head happens here."""

    def predict(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidate masks of B heads, read at the incidences only.

        head, pixel: (M,) int64, sorted by head; head in 0..B-1 is the row of the prompts, pixel
        the flat index y * W + x.
        Returns (logits (C, M) float32, positive on the object; scores (B, C) float32, the
        segmenter's own estimate of the masks' IoU, 0..1). C is 3 with multimask, else 1.
        """
        ...


def open_segmenter(name: str, device: str | torch.device = "cpu") -> Segmenter:
    """A segmenter from the command line's words: "bundled", "classical", the name of a published
    SAM ("vit_b", "vit_l", "vit_h"; `xmask.segmenting.checkpoints`), or a checkpoint's path.

    device: where a network runs, as torch names it.
    Raises FileNotFoundError if there is no such file and ValueError if it is not a SAM.
    """
    from xmask.segmenting.classical import ClassicalSegmenter
    from xmask.segmenting.sam_segmenter import SamSegmenter

    if name == "classical":
        return ClassicalSegmenter()
    if name == "bundled":
        return SamSegmenter.bundled(device)
    return SamSegmenter(name, device=device)


def describe(name: str) -> dict[str, Any]:
    """What `open_segmenter(name).describe()` says, without building a network: of a file, its
    checksum and the kind of model in it. Raises the errors of `open_segmenter`, except for
    weights that only look like a SAM's.
    """
    if name == "classical":
        return open_segmenter(name).describe()
    from xmask.segmenting import sam_segmenter

    return sam_segmenter.describe(name)


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless the image is (H, W, 3) uint8 with at least one pixel."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected uint8 (H, W, 3) RGB, found {image.dtype} {image.shape}; convert "
            "it, for example with PIL.Image.open(path).convert('RGB')")
