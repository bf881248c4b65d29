"""Images of any size in pieces: the same result as in one piece, in memory that does not grow.

Three facts make the seams disappear. An output cell sees the image through a window that ends
less than `MARGIN` px from it, so a piece with that margin computes its inner cells exactly. The
mask head is told where the piece lies in the whole image. And points and their exclusion circles
are found on the logits of the whole image, a sixteenth of its pixels, so a head on a seam is one
cell like any other; only the assignment of pixels, which is local, is done window by window.

What grows with the image is the image itself, its label map, and 4.25 bytes a pixel for logits
and a 16-channel embedding at stride 4; the network's activations and the list of (head, pixel)
pairs stay those of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from xmask import decode, energy, model, nnec
from xmask.config import Decoding
from xmask.data.transforms import to_tensor
from xmask.features import sample_at, smooth, upsample

# px around a piece that its cells may see. The receptive field reaches 138 px beyond a cell: 106
# through the encoder and the bilinear upsampling, 32 through four 3x3 convolutions at stride 8.
MARGIN = 160
TILE = 1024  # px, side of a piece without its margin (ours: 0.4 GB for the slim network)
_HALO = 4  # px: half of the 7 px smoothing, and one for bilinear sampling


@torch.inference_mode()
def network_maps(network: nn.Module, image: np.ndarray, *, tile: int = TILE
                 ) -> tuple[Tensor, Tensor]:
    """Logits (h, w) and embedding (D, h, w) at stride 4 of an image, float32, on the network's
    device; they cover the image padded to a multiple of 32 px.

    image: (H, W, 3) uint8. tile: px, a multiple of 32. An image that is no larger than one piece
    with its margins is one piece.
    """
    device = next(network.parameters()).device
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    height, width = (-(-side // model.MULTIPLE) * model.MULTIPLE for side in image.shape[:2])
    grid = model.coordinates(height // 8, width // 8, device)
    logits = embedding = None
    for top, bottom in _spans(height, tile, MARGIN):
        for left, right in _spans(width, tile, MARGIN):
            y0, y1 = max(top - MARGIN, 0), min(bottom + MARGIN, height)
            x0, x1 = max(left - MARGIN, 0), min(right + MARGIN, width)
            piece = model.pad_to_multiple(to_tensor(image[y0:y1, x0:x1])[None]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                output = network(piece.contiguous(memory_format=torch.channels_last),
                                 grid=grid[:, y0 // 8:y1 // 8, x0 // 8:x1 // 8])
            if logits is None:
                cells = height // model.STRIDE, width // model.STRIDE
                logits = torch.empty(cells, device=device)
                embedding = torch.empty((output.embedding.shape[1], *cells), device=device)
            into = _cells(top, bottom), _cells(left, right)
            out = _cells(top - y0, bottom - y0), _cells(left - x0, right - x0)
            logits[into] = output.logits[0].float()[out]
            embedding[(slice(None), *into)] = output.embedding[0].float()[(slice(None), *out)]
    return logits, embedding


@torch.inference_mode()
def decode_maps(logits: Tensor, embedding: Tensor, shape: tuple[int, int], decoding: Decoding, *,
                tile: int = TILE) -> decode.Prediction:
    """What `decode.predict` gives, to rounding, window by window.

    logits, embedding: as from `network_maps`. shape: (H, W) of the image. tile: px, side of a
    window.
    """
    height, width = shape
    stride = model.STRIDE
    windows = [(y0, y1, x0, x1) for y0, y1 in _spans(height, tile, MARGIN)
               for x0, x1 in _spans(width, tile, MARGIN)]
    if len(windows) == 1:
        return decode.predict(
            logits, embedding, shape, stride=stride, point_threshold=decoding.point_threshold,
            threshold=decoding.theta, geometry_weight=decoding.geometry_weight,
            sigma=decoding.sigma, density_gate=decoding.density_gate)
    seen = logits[: -(-height // stride), : -(-width // stride)]
    points, scores = decode.points_from_logits(
        seen, stride=stride, threshold=decoding.point_threshold)
    points = torch.minimum(points, points.new_tensor([width - 1, height - 1])).double()
    radii = nnec.exclusion_radii(points, shape, lone=decode.LONE_RADIUS)
    centres = embedding.new_empty((len(points), len(embedding)))
    for y0, y1, x0, x1 in windows:
        here = torch.nonzero((points[:, 0] >= x0) & (points[:, 0] < x1)
                             & (points[:, 1] >= y0) & (points[:, 1] < y1)).squeeze(1)
        if not len(here):
            continue
        features, top, left = _features(embedding, shape, (y0, y1, x0, x1), decoding.sigma)
        centres[here] = sample_at(features, points[here] - points.new_tensor([left, top]))
    labels = np.zeros(shape, np.int32)
    for y0, y1, x0, x1 in windows:
        near = torch.nonzero(
            (points[:, 0] + radii >= x0) & (points[:, 0] - radii <= x1 - 1)
            & (points[:, 1] + radii >= y0) & (points[:, 1] - radii <= y1 - 1)).squeeze(1)
        if not len(near):
            continue
        features, top, left = _features(embedding, shape, (y0, y1, x0, x1), decoding.sigma)
        density = None
        if decoding.density_gate:
            density = _upsampled(torch.sigmoid(seen)[None], (y0, y1, x0, x1))[0]
        window = energy.assign(
            features[:, y0 - top:y1 - top, x0 - left:x1 - left], centres[near],
            points[near] - points.new_tensor([x0, y0]), radii[near],
            threshold=decoding.theta, geometry_weight=decoding.geometry_weight, density=density)
        names = torch.cat([near.new_zeros(1), near + 1]).to(torch.int32)
        labels[y0:y1, x0:x1] = names[window.long()].cpu().numpy()
    return decode.Prediction(points.float().cpu().numpy(), scores.cpu().numpy(), labels)


def _features(embedding: Tensor, shape: tuple[int, int], window: tuple[int, int, int, int],
              sigma: float) -> tuple[Tensor, int, int]:
    """Smoothed features (D, h, w) of a window and a pixel or more around it, and the (row,
    column) of the image at which they begin."""
    y0, y1, x0, x1 = window
    top, bottom = max(y0 - _HALO, 0), min(y1 + _HALO, shape[0])
    left, right = max(x0 - _HALO, 0), min(x1 + _HALO, shape[1])
    return smooth(_upsampled(embedding, (top, bottom, left, right)), sigma), top, left


def _upsampled(maps: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The window (y0, y1, x0, x1), px, of `xmask.features.upsample` of all of `maps` (D, h, w)."""
    stride = model.STRIDE
    y0, y1, x0, x1 = window
    top, left = max(y0 // stride - 1, 0), max(x0 // stride - 1, 0)
    part = maps[:, top:-(-y1 // stride) + 1, left:-(-x1 // stride) + 1]
    return upsample(part, stride)[
        :, y0 - top * stride:y1 - top * stride, x0 - left * stride:x1 - left * stride]


def _spans(length: int, tile: int, margin: int) -> Iterator[tuple[int, int]]:
    """Equal parts of 0..length, cut at multiples of 32; one part if length <= tile + 2 margin."""
    parts = 1 if length <= tile + 2 * margin else -(-length // tile)
    step = -(-length // (parts * model.MULTIPLE)) * model.MULTIPLE
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _cells(start: int, stop: int) -> slice:
    return slice(start // model.STRIDE, stop // model.STRIDE)
