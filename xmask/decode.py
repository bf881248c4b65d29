"""From network output to points and an exclusive label map: paper section on pseudo-masks.

Energy of pixel u for head i:

    E_i(u) = |f(u) - f(p_i)| + lambda * |u - p_i|^2 / r_i^2

A pixel goes to the head with the lowest energy among those whose exclusion circle holds it, if
that energy is below theta. Pseudo-labels and predictions are the same functions with other
numbers. Every head is visited, on the sparse incidence list of `xmask.nnec`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xmask.config import Decoding, Evaluation
from xmask.features import feature_bands, full_precision, smooth_at, upsample
from xmask.nnec import equal_radii, exclusion_radii, lowest_wins, point_tensor, row_spans

LONE_RADIUS = 0.25  # a lone head's radius in decoding, as a share of the shorter side (paper)
GATE = (0.1, 0.5)  # density gate (paper): sigmoid(logit) in between takes the whole circle


@dataclass(frozen=True)
class Prediction:
    """Heads and masks of one image.

    points: (N, 2) float32 (x, y) px, all points that take part in masks. scores: (N,) float32,
    their probabilities. instances: (H, W) int32 label map, value k belongs to points[k - 1].
    counted: (N,) bool, True where the point is a counted head; the others keep their masks.
    low, high: interval of the count where the model is calibrated, else None."""

    points: np.ndarray
    scores: np.ndarray
    instances: np.ndarray
    counted: np.ndarray
    low: int | None = None
    high: int | None = None

    @property
    def heads(self) -> np.ndarray:
        """(K, 2) float32 (x, y) px: the counted points."""
        return self.points[self.counted]

    @property
    def count(self) -> int:
        """The number of counted heads."""
        return int(self.counted.sum())


@torch.no_grad()
def predict(logits: torch.Tensor, embedding: torch.Tensor, shape: tuple[int, int],
            decoding: Evaluation, *, stride: int = 4) -> Prediction:
    """Points, scores, counted heads and label map of one image.

    logits: (h, w); embedding: (D, h, w); cell (0, 0) of both covers the top-left `stride` pixels
    of the image. They may reach beyond `shape`, the image's (H, W), where it was padded at the
    right and bottom: cells that hold padding only are dropped.
    decoding: a configuration's section `evaluation`. Points of at least `point_threshold` take
        part in masks (paper: 0.1); of these, points are counted whose logit is above that of
        `count_threshold` (paper: 0.5, so logit > 0). `peaks`: only cells of `peaks` are points.
        `theta`, `geometry_weight`, `sigma`, `nnec`: of `instance_maps`; `density_gate`: gate by the
        sigmoid of the logits, see `density` there.
    Raises ValueError if the maps do not cover the image."""
    height, width = shape
    if logits.shape[-2] * stride < height or logits.shape[-1] * stride < width:
        raise ValueError(
            f"logits: {tuple(logits.shape)} cells of stride {stride} do not cover an image of "
            f"{height} x {width}; pad the image to a multiple of the stride before the network")
    if embedding.shape[-2:] != logits.shape[-2:]:
        raise ValueError(
            f"embedding: {tuple(embedding.shape[-2:])} cells but logits have "
            f"{tuple(logits.shape)}; both must come from the same image")
    logits = full_precision(logits.detach())[:-(-height // stride), :-(-width // stride)]
    cells = candidates(logits, decoding)
    chosen = _above(cells, decoding.point_threshold)
    counted = cells[chosen] > torch.logit(torch.tensor(decoding.count_threshold).double()).item()
    points, scores = points_from_logits(cells, stride=stride, threshold=decoding.point_threshold)
    # The centre of a cell cut by the border may lie outside: bring the head back in.
    border = torch.tensor([width - 1, height - 1], device=points.device, dtype=points.dtype)
    points = torch.minimum(points, border)

    density = None
    if decoding.density_gate:
        density = upsample(torch.sigmoid(logits)[None], stride)[:, :height, :width]
    labels = instance_maps(
        embedding[None], [points], stride=stride, shape=shape, threshold=decoding.theta,
        geometry_weight=decoding.geometry_weight, sigma=decoding.sigma, density=density,
        nnec=decoding.nnec)[0]
    return Prediction(points.float().cpu().numpy(), scores.float().cpu().numpy(),
                      labels.cpu().numpy(), counted.cpu().numpy())


@torch.no_grad()
def instance_map(embedding: torch.Tensor, points: Any, *, threshold: float = 1.1,
                 geometry_weight: float = 0.8, sigma: float | None = 3.0,
                 density: torch.Tensor | None = None) -> torch.Tensor:
    """Exclusive label map of an embedding at image resolution.

    embedding: (D, H, W) tensor. points: (N, 2) tensor or array, (x, y) pixels.
    threshold: theta. geometry_weight: lambda. sigma: px, of the 7 x 7 Gaussian that smooths the
        embedding first; None or 0 for none. (The defaults are the paper's for evaluation.)
    density: (H, W) sigmoid of the logits, upsampled, for the density gate (paper): pixels in
        [0.1, 0.5] go to a head by their circle alone, above 0.5 by energy < theta, below 0.1 to
        nobody; the lowest energy still decides between heads. None for no gate.
    Returns (H, W) int32 on the embedding's device: 0 background, k the instance of points[k-1].
    Raises ValueError if the embedding is not (D, H, W) or points are not finite (N, 2)."""
    if embedding.ndim != 3:
        raise ValueError(
            f"embedding: expected (D, H, W), found shape {tuple(embedding.shape)}; "
            "pass one image at a time, or a batch to instance_maps")
    return instance_maps(
        embedding[None], [points], threshold=threshold, geometry_weight=geometry_weight,
        sigma=sigma, density=None if density is None else density[None])[0]


@torch.no_grad()
def instance_maps(embedding: torch.Tensor, points: Sequence[Any], *, stride: int = 1,
                  shape: tuple[int, int] | None = None, threshold: float = 1.1,
                  geometry_weight: float = 0.8, sigma: float | None = 3.0,
                  density: torch.Tensor | None = None, nnec: bool = True) -> torch.Tensor:
    """`instance_map` of a batch, all heads of all images on one incidence list.

    embedding: (B, D, h, w), a cell of which covers `stride` pixels of images of `shape` (H, W);
    None: all of stride * (h, w). Pixels are assigned a band of rows at a time, see
    `features.feature_bands`: of what grows with the image, only the result is as large as it.
    points: B arrays or tensors (N, 2). density: (B, H, W) or None. nnec: False gives the heads of
        an image one circle for all in place of theirs, `nnec.equal_radii` (an ablation).
    Returns (B, H, W) int32; label k of image b is points[b][k - 1]."""
    embedding = full_precision(embedding.detach())
    count = len(embedding)
    height, width = shape or tuple(stride * side for side in embedding.shape[-2:])
    points, image, first = stack_points(points, embedding.device)
    radii = exclusion_radii(points, (height, width), lone=LONE_RADIUS, image=image)
    if not nnec:
        radii = equal_radii(radii, (height, width), image, count)
    spans = row_spans(points, radii, (height, width), image=image)
    # The images are one tall one. Sorted by row, then by head, a band's spans are one stretch.
    row = spans.row + (image * height).index_select(0, spans.head)
    head, row, left, right = spans._replace(row=row).select(torch.argsort(row, stable=True))
    x, y = points.unbind(1)
    centre = x.index_select(0, head)
    dy = row - (y + image * height).index_select(0, head)
    dy2 = dy * dy
    scale = (geometry_weight / radii.square()).index_select(0, head)
    length = right - left + 1
    start = torch.cumsum(length, 0) - length  # of each span in the list of its pixels
    lines = torch.arange(count * height + 1, device=row.device)
    spans_above = torch.searchsorted(row, lines)
    pairs_above = F.pad(torch.cumsum(length, 0), (1, 0)).index_select(0, spans_above).tolist()
    spans_above = spans_above.tolist()

    centres = smooth_at(embedding, points, image, stride, (height, width), sigma)
    # the label of span k of an image's heads stands at k + 1, nobody's at 0
    label = torch.cat([head.new_zeros(1), head - first.index_select(0, image[head]) + 1]).int()
    labels = torch.empty((count * height, width), dtype=torch.int32, device=embedding.device)
    for images, top, bottom, flat in feature_bands(embedding, stride, (height, width), sigma):
        begin = images.start * height + top
        end = (images.stop - 1) * height + bottom
        part = slice(spans_above[begin], spans_above[end])
        pairs = pairs_above[end] - pairs_above[begin]
        span = torch.repeat_interleave(length[part], output_size=pairs)
        # The column of pair k is column0[its span] + k.
        column0 = left[part] - (start[part] - pairs_above[begin])
        pixel0 = column0 + (row[part] - begin) * width
        index = torch.arange(pairs, device=row.device)
        pixel = pixel0.index_select(0, span).add_(index)
        delta = flat.index_select(0, pixel)
        delta -= centres.index_select(0, head[part]).index_select(0, span)
        dx = (column0 - centre[part]).index_select(0, span).add_(index)
        spread = dx.mul_(dx).add_(dy2[part].index_select(0, span))
        spread *= scale[part].index_select(0, span)
        energy = torch.linalg.vector_norm(delta, dim=1) + spread.to(delta.dtype)
        span += part.start
        below = threshold
        if density is not None:
            gate = density.reshape(-1)[begin * width:end * width].index_select(0, pixel)
            claims = torch.where(gate > GATE[1], energy < threshold, gate >= GATE[0])
            energy, span, pixel = energy[claims], span[claims], pixel[claims]
            below = math.inf
        # In one row the spans are in the order of their heads: of equal energies the lowest wins
        won = lowest_wins(energy, span, pixel, (end - begin, width), below)
        labels[begin:end] = label.index_select(0, won.flatten()).view(-1, width)
    return labels.view(count, height, width)


def stack_points(points: Sequence[Any], device: torch.device
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The heads of a batch as one list: (points (N, 2) float64, image (N,) int64, first (B,)
    int64, the number of heads before each image), on the device."""
    parts = [point_tensor(p)[0].to(device) for p in points]
    sizes = torch.tensor([len(part) for part in parts])
    image = torch.repeat_interleave(torch.arange(len(parts)), sizes).to(device)
    return torch.cat(parts), image, (torch.cumsum(sizes, 0) - sizes).to(device)


def points_from_logits(logits: torch.Tensor, *, stride: int = 4, threshold: float = 0.5
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells that are heads: (points (N, 2) float32 (x, y), scores (N,) float32), row by row.

    logits: (h, w). A cell is a head if sigmoid(logit) >= threshold; from 0.5 on also logit > 0,
    so that at 0.5 the number of points is the paper's count, cells with a logit above zero.
    Its place is the centre of the cell, stride * cell + (stride - 1) / 2."""
    logits = full_precision(logits.detach())
    row, column = torch.nonzero(_above(logits, threshold), as_tuple=True)
    points = torch.stack([column, row], dim=1).float() * stride + (stride - 1) / 2
    return points, torch.sigmoid(logits[row, column]).float()


def candidates(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Logits (..., h, w) of the cells that may be heads; -inf elsewhere if `decoding.peaks`."""
    return peaks(logits) if decoding.peaks else logits


def peaks(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., h, w), -inf where one of the eight neighbours is higher, or as high and earlier
    row by row: no two cells left are neighbours (ours; common for maps of heads).

    Pixel shuffle gives each of the four cells of a feature channels of its own, and P2R chooses the
    cell with the highest logit, so that networks come to use one or two of the four. In dense
    crowds they then mark both for one head; see docs/evidence.md."""
    height, width = logits.shape[-2:]
    padded = F.pad(logits, (1, 1, 1, 1), value=-math.inf)
    around = [padded[..., y:y + height, x:x + width] for y in range(3) for x in range(3)]
    earlier, later = (torch.stack(part).amax(0) for part in (around[:4], around[5:]))
    return logits.masked_fill((logits <= earlier) | (logits < later), -math.inf)


def _above(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """(h, w) bool: the cells that are points."""
    chosen = (torch.sigmoid(logits) >= threshold) & (logits > -math.inf)
    return chosen & (logits > 0) if threshold >= 0.5 else chosen
