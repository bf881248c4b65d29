"""From an image of any size to its heads, count and masks (paper section on evaluation): the
`Predictor` that `xmask.load()` gives and evaluation both do what `predict_image` does.

Large images go through the network in pieces, with the same result as whole: a cell sees the
image through a window, so a piece with that margin computes its inner cells exactly, and the mask
head is told where the piece lies. Points and masks come from the maps of the whole image, so a
head on a seam is like any other. What grows with the image is itself, its label map, and 4.25
bytes a pixel for logits and a 16-channel embedding at stride 4."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from xmask import config as configuration
from xmask import decode, model
from xmask.calibration import Calibration, spread
from xmask.data.images import read_image, resize_image, resize_labels
from xmask.data.transforms import to_tensor

MIN_SIDE = 8  # px: an image less wide or high than two output cells holds no head (ours)
TILE, TILE_ACCELERATOR = 1024, 2048  # px, least side of a piece without its margin (ours)


def predict_image(network: nn.Module, image: np.ndarray, decoding: configuration.Evaluation, *,
                  calibration: Calibration | None = None, tile: int | None = None
                  ) -> decode.Prediction:
    """Points, scores, counted heads and label map of one image, at its own resolution.

    network: an `xmask.model.XMask` in evaluation mode. image: (H, W, 3) uint8 RGB. decoding:
    section `evaluation`; the image is resized by its `scale` first, and all is brought back last.
    calibration: gives the count its interval; its threshold is in `decoding`. tile: `network_maps`.
    """
    shape, image = image.shape[:2], scaled(image, decoding.scale)
    logits, embedding = network_maps(network, image, tile=tile)
    found = decode.predict(logits, embedding, image.shape[:2], decoding, stride=model.STRIDE)
    if calibration is not None:
        cells = decode.candidates(torch.from_numpy(own_cells(logits, image)), decoding)
        low, high = calibration.interval(found.count, spread(cells.numpy()))
        found = replace(found, low=low, high=high)
    return brought_back(found, shape)


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """An image (H, W, 3) with its sides times `scale`, at least 1 px; itself if that is 1."""
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    return image if (height, width) == image.shape[:2] else resize_image(image, (height, width))


def own_cells(logits: Tensor, image: np.ndarray) -> np.ndarray:
    """Logits (h, w) of the cells that hold pixels of the image (H, W, 3), not padding only."""
    height, width = image.shape[:2]
    return logits[:-(-height // model.STRIDE), :-(-width // model.STRIDE)].float().cpu().numpy()


@torch.inference_mode()
def network_maps(network: nn.Module, image: np.ndarray, *, tile: int | None = None
                 ) -> tuple[Tensor, Tensor]:
    """Logits (h, w) and embedding (D, h, w) at stride 4 of an image, float32, on the network's
    device; they cover the image padded to a multiple of 32 px.

    image: (H, W, 3) uint8. tile: px, a multiple of 32, side of the pieces without their margins;
    an image that is no larger than one piece with its margins is one piece. None: `TILE`, on an
    accelerator `TILE_ACCELERATOR`, and at least four margins. It changes memory, not the result."""
    if tile is not None and (tile < model.MULTIPLE or tile % model.MULTIPLE):
        raise ValueError(f"tile: {tile} is not a positive multiple of {model.MULTIPLE} px")
    device = next(network.parameters()).device
    height, width = (-(-side // model.MULTIPLE) * model.MULTIPLE for side in image.shape[:2])
    smallest = TILE if device.type == "cpu" else TILE_ACCELERATOR
    margin = reach(network) if max(height, width) > (tile or smallest) else 0
    tile = max(height, width) if margin > _FARTHEST else tile or max(smallest, 4 * margin)
    grid = model.coordinates(height // 8, width // 8, device)
    logits = embedding = None
    for top, bottom in _spans(height, tile, margin):
        for left, right in _spans(width, tile, margin):
            y0, y1 = max(top - margin, 0), min(bottom + margin, height)
            x0, x1 = max(left - margin, 0), min(right + margin, width)
            piece = model.pad_to_multiple(to_tensor(image[y0:y1, x0:x1])[None]).to(device)
            output = network(piece.contiguous(memory_format=torch.channels_last),
                             grid=grid[:, y0 // 8:y1 // 8, x0 // 8:x1 // 8])
            if logits is None or embedding is None:
                cells = height // model.STRIDE, width // model.STRIDE
                logits = torch.empty(cells, device=device)
                embedding = torch.empty((output.embedding.shape[1], *cells), device=device)
            into = _cells(top, bottom), _cells(left, right)
            out = _cells(top - y0, bottom - y0), _cells(left - x0, right - x0)
            logits[into] = output.logits[0][out]
            embedding[(slice(None), *into)] = output.embedding[0][(slice(None), *out)]
    return logits, embedding


_FARTHEST = 1024  # px
_REACH: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def reach(network: nn.Module) -> int:
    """How far from an output cell, px, a pixel may change it: a multiple of 32 (160 for VGG16-BN,
    512 for EfficientNet-Lite0), or more than 1,024 where a cell sees the whole image, which then is
    one piece. Found once for a network, by where NaN in one block of a strip comes out."""
    if network not in _REACH:
        block, half = model.MULTIPLE, _FARTHEST + model.MULTIPLE
        strip = torch.zeros(1, 3, block, 2 * half + block, device=next(network.parameters()).device)
        strip[..., half:half + block] = torch.nan
        output = network(strip)
        reached = output.logits[0].isnan().any(0) | output.embedding[0].isnan().any(0).any(0)
        cell = torch.nonzero(reached).squeeze(1) * model.STRIDE
        far = max(half - int(cell.min()), int(cell.max()) + model.STRIDE - half - block)
        _REACH[network] = -(-far // block) * block
    return _REACH[network]


def _spans(length: int, tile: int, margin: int) -> Iterator[tuple[int, int]]:
    """Equal parts of 0..length, cut at multiples of 32; one part if length <= tile + 2 margin."""
    parts = 1 if length <= tile + 2 * margin else -(-length // tile)
    step = -(-length // (parts * model.MULTIPLE)) * model.MULTIPLE
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _cells(start: int, stop: int) -> slice:
    return slice(start // model.STRIDE, stop // model.STRIDE)


class Predictor:
    """A trained network on a device. `xmask.load` makes one; call `predict` as often as wanted.

    network: the `xmask.model.XMask`, in evaluation mode. config: the `Config` of its training.
    record: what it is, JSON-ready (see `xmask.tools.models.load`). calibration: of its counts, or
    None. decoding: what is used, `config.evaluation`, calibrated, unless changed."""

    def __init__(self, network: nn.Module, config: configuration.Config, record: dict,
                 calibration: Calibration | None = None):
        self.network, self.config, self.record = network, config, record
        self.calibration = calibration
        self.decoding = calibration.applied(config.evaluation) if calibration else config.evaluation

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def predict(self, image: np.ndarray | str | os.PathLike, *, max_side: int | None = None,
                tile: int | None = None, name: str = "image") -> decode.Prediction:
        """Points, scores, counted heads and masks of one image, at its own size, whatever that is.

        image: (H, W, 3) uint8 RGB, or the path of an image file (`xmask.data.images.read_image`).
        max_side: px; a larger image is computed at this longer side, and points and masks are
            brought back to its own size. None: never. Heads should look about as large as in the
            training images, and those of a close-up do not.
        tile: px, see `network_maps`. name: what errors call an array.
        Raises FileNotFoundError or ValueError, naming the file, for what is no such image."""
        if isinstance(image, (str, os.PathLike)):
            name = str(image)
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"{name}: {width} x {height} px; the smaller side must have at least "
                             f"{MIN_SIDE} px to hold a head")
        check_side(max_side)
        if max_side is not None and max_side < max(height, width):
            small = scaled(pixels, max_side / max(height, width))
            found = self.predict(small, tile=tile, name=f"{name}, resized")
            return brought_back(found, (height, width))
        known = self.calibration  # its interval is one around the count at its threshold
        if known is not None and known.threshold != self.decoding.count_threshold:
            known = None
        return predict_image(self.network, pixels, self.decoding, calibration=known, tile=tile)

    def maps(self, image: np.ndarray | str | os.PathLike, *, tile: int | None = None
             ) -> tuple[Tensor, Tensor]:
        """What the network says of the image as it is, not `scaled`: logits (h, w) and embedding
        (D, h, w), float32, a cell for 4 x 4 px; they cover it padded to a multiple of 32 px."""
        return network_maps(self.network, _pixels(image), tile=tile)

    def __repr__(self) -> str:
        r = self.record
        return (f"<xmask.Predictor {r['backbone']} ({r['initialisation']} start), trained on "
                f"{r['trained_on']['text']}, sha256 {r['sha256'][:12]}, on {self.device}>")


def check_side(max_side: int | None) -> None:
    """Raises ValueError for a longer side, px, that is too short to hold a head; None is fine."""
    if max_side is not None and max_side < model.MULTIPLE:
        raise ValueError(f"max_side (--max-side): {max_side} px; give at least {model.MULTIPLE}, "
                         "or leave it out for full size")


def brought_back(found: decode.Prediction, shape: tuple[int, int]) -> decode.Prediction:
    """A prediction on a resized image, in the pixels of the image of `shape` (H, W)."""
    if found.instances.shape == shape:
        return found
    # pixel centres: position p of n pixels is (p + 0.5) * N / n - 0.5 of N
    factor = np.array(shape[::-1]) / found.instances.shape[::-1]
    points = np.clip((found.points + 0.5) * factor - 0.5, 0, np.array(shape[::-1]) - 1)
    return decode.Prediction(points.astype(np.float32), found.scores,
                             resize_labels(found.instances, shape), found.counted, found.low,
                             found.high)


def _pixels(image: np.ndarray | str | os.PathLike) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB or the path of an image file, found "
                         f"shape {pixels.shape} of {pixels.dtype}")
    return pixels
