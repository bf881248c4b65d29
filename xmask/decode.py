"""From network output to points and an exclusive label map: paper section on pseudo-masks.

Energy of pixel u for head i:

    E_i(u) = |f(u) - f(p_i)| + lambda * |u - p_i|^2 / r_i^2

A pixel goes to the head with the lowest energy among those whose exclusion circle holds it, if
that energy is below theta. Pseudo-labels and predictions are the same functions with other
numbers. Every head is visited, on the sparse incidence list of `xmask.nnec`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xmask.nnec import (
    exclusion_radii, incidence_spans, lowest_wins, split_spans, to_tensor,
)

# A lone head's radius in decoding, as a share of the shorter side (paper).
LONE_RADIUS = 0.25
# Density gate of pseudo-masks (paper): sigmoid(logit) in [0.1, 0.5] takes the whole circle.
GATE = (0.1, 0.5)
# Bytes of a band of features: what is made of it, too, stays in cache and below the size from
# which the C library asks the system for fresh pages (ours, measured).
_BAND = 1 << 21
_KERNEL = 7  # px, width of the Gaussian (paper)
_SIDE = 64  # px, of a block in `upsample_smooth` (ours, measured)


@dataclass(frozen=True)
class Prediction:
    """Heads of one image. points: (N, 2) float32 (x, y); scores: (N,) float32 in 0..1;
    instances: (H, W) int32 label map, value k belongs to points[k - 1]."""

    points: np.ndarray
    scores: np.ndarray
    instances: np.ndarray

    @property
    def count(self) -> int:
        """The number of heads."""
        return len(self.points)


@torch.no_grad()
def predict(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    shape: tuple[int, int],
    *,
    stride: int = 4,
    point_threshold: float = 0.5,
    threshold: float = 1.1,
    geometry_weight: float = 0.8,
    sigma: float | None = 3.0,
    density_gate: bool = False,
) -> Prediction:
    """Points, scores and label map of one image.

    logits: (h, w); embedding: (D, h, w); cell (0, 0) of both covers the top-left `stride` pixels
    of the image. They may reach beyond `shape`, the image's (H, W), where it was padded at the
    right and bottom: cells that hold padding only are dropped.
    point_threshold: a cell whose sigmoid reaches it is a head (paper: 0.5, that is logit > 0, for
        counting; 0.1 for pseudo-labels).
    threshold, geometry_weight, sigma: theta, lambda and smoothing of `instance_map`.
    density_gate: True gates by the sigmoid of the logits, see `density` of `instance_map`.
    Raises ValueError if the maps do not cover the image.
    """
    height, width = shape
    if logits.shape[-2] * stride < height or logits.shape[-1] * stride < width:
        raise ValueError(
            f"logits: {tuple(logits.shape)} cells of stride {stride} do not cover an image of "
            f"{height} x {width}; pad the image to a multiple of the stride before the network")
    if embedding.shape[-2:] != logits.shape[-2:]:
        raise ValueError(
            f"embedding: {tuple(embedding.shape[-2:])} cells but logits have "
            f"{tuple(logits.shape)}; both must come from the same image")
    rows, columns = -(-height // stride), -(-width // stride)
    logits = full_precision(logits)[:rows, :columns]
    points, scores = points_from_logits(logits, stride=stride, threshold=point_threshold)
    # The centre of a cell cut by the border may lie outside: bring the head back in.
    border = torch.tensor([width - 1, height - 1], device=points.device, dtype=points.dtype)
    points = torch.minimum(points, border)

    density = None
    if density_gate:
        density = upsample(torch.sigmoid(logits)[None], stride)[:, :height, :width]
    labels = instance_maps(
        embedding[None], [points], stride=stride, shape=shape, threshold=threshold,
        geometry_weight=geometry_weight, sigma=sigma, density=density)[0]
    return Prediction(
        points.float().cpu().numpy(), scores.float().cpu().numpy(), labels.cpu().numpy())


@torch.no_grad()
def instance_map(
    embedding: torch.Tensor,
    points: Any,
    *,
    threshold: float = 1.1,
    geometry_weight: float = 0.8,
    sigma: float | None = 3.0,
    density: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exclusive label map of an embedding at image resolution.

    embedding: (D, H, W) tensor. points: (N, 2) tensor or array, (x, y) pixels.
    threshold: theta; geometry_weight: lambda (paper: 1.1 and 0.8 in evaluation, 0.8 and 0.6 in
        training). sigma: width in pixels of the 7 x 7 Gaussian that smooths the embedding first
        (paper: 3 in evaluation, 1.5 in training); None or 0 for none.
    density: (H, W) sigmoid of the logits, upsampled, for the paper's optional density gate: pixels
        in [0.1, 0.5] go to a head by their circle alone, above 0.5 by energy < theta, below 0.1
        to nobody; the lowest energy still decides between heads. None for no gate.
    Returns (H, W) int32 on the embedding's device: 0 background, k the instance of points[k-1].
    Raises ValueError if the embedding is not (D, H, W) or points are not finite (N, 2).
    """
    if embedding.ndim != 3:
        raise ValueError(
            f"embedding: expected (D, H, W), found shape {tuple(embedding.shape)}; "
            "pass one image at a time, or a batch to instance_maps")
    return instance_maps(
        embedding[None], [points], threshold=threshold, geometry_weight=geometry_weight,
        sigma=sigma, density=None if density is None else density[None])[0]


@torch.no_grad()
def instance_maps(
    embedding: torch.Tensor,
    points: Sequence[Any],
    *,
    stride: int = 1,
    shape: tuple[int, int] | None = None,
    threshold: float = 1.1,
    geometry_weight: float = 0.8,
    sigma: float | None = 3.0,
    density: torch.Tensor | None = None,
) -> torch.Tensor:
    """`instance_map` of a batch, all heads of all images on one incidence list.

    embedding: (B, D, h, w), a cell of which covers `stride` pixels of images of `shape` (H, W);
    None: all of stride * (h, w). Both upsampling, as by `upsample`, and smoothing are linear and
    separable: along the rows they are done once, on h rows, and along the columns a band of
    rows at a time, so that features at image resolution never stand in memory as a whole.
    points: B arrays or tensors (N, 2). density: (B, H, W) or None.
    Returns (B, H, W) int32; label k of image b is points[b][k - 1].
    """
    embedding = full_precision(embedding.detach())
    count = len(embedding)
    height, width = shape or tuple(stride * side for side in embedding.shape[-2:])
    points, image, first = stack_points(points, embedding.device)
    radii = exclusion_radii(points, (height, width), lone=LONE_RADIUS, image=image)
    spans = split_spans(
        points, *incidence_spans(points, radii, (height, width)), (height, width), image=image)
    head, row, left, right = _by_row(spans, image * height)  # the images are one tall one
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

    cells = embedding.permute(0, 2, 3, 1).contiguous().transpose(1, 2).contiguous()
    centres = _smooth_at(cells, points, image, stride, (height, width), sigma)
    wide = _stretch(cells, stride, width, sigma)
    won = torch.empty((count * height, width), dtype=torch.int32, device=embedding.device)
    for images, top, bottom, flat in _bands(wide, stride, height, sigma):
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
        won[begin:end] = lowest_wins(energy, span, pixel, (end - begin, width), below)
    # the label of span k of an image's heads stands at k + 1, nobody's at 0
    label = torch.cat([head.new_zeros(1), head - first.index_select(0, image[head]) + 1]).int()
    return label.index_select(0, won.flatten()).view(count, height, width)


def _by_row(spans: tuple[torch.Tensor, ...], above: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Spans (head, row, first, last) sorted by row, to which `above[head]` is added, then by head:
    those of a band of rows are one stretch of the list."""
    head, row, *ends = spans
    row = row + above.index_select(0, head)
    order = torch.argsort(row, stable=True)
    return tuple(value.index_select(0, order) for value in (head, row, *ends))


def _stretch(
    cells: torch.Tensor, stride: int, width: int, sigma: float | None
) -> torch.Tensor:
    """(B, h, W, D) from (B, w, h, D): upsampled and smoothed along the rows only."""
    count, across, down, depth = cells.shape
    out = cells.new_empty((count, down, width, depth))
    with _no_autocast(cells):
        for start, stop, base, weight in _blocks(across, stride, width, sigma, 32):
            part = cells[:, base:base + weight.shape[1]].flatten(2)
            part = torch.matmul(weight.to(cells), part).view(count, -1, down, depth)
            out[:, :, start:stop] = part.transpose(1, 2)
    return out


def _bands(wide: torch.Tensor, stride: int, height: int, sigma: float | None):
    """`_stretch` along the columns: (images, top, bottom, features (pixels, D)) of band after
    band, a few rows of one image on a CPU, everything at once on an accelerator."""
    count, cells, width, depth = wide.shape
    on_cpu = wide.device.type == "cpu"
    tall = min(max(_BAND // (4 * depth * width), 8), 64) if on_cpu else height
    parts = [slice(i, i + 1) for i in range(count)] if on_cpu else [slice(0, count)]
    for images in parts:
        rows = wide[images].flatten(2)
        for top, bottom, base, weight in _blocks(cells, stride, height, sigma, tall):
            with _no_autocast(wide):
                band = torch.matmul(weight.to(wide), rows[:, base:base + weight.shape[1]])
            yield images, top, bottom, band.view(-1, depth)


@functools.lru_cache(maxsize=32)
def _blocks(
    cells: int, stride: float, length: int, sigma: float | None, size: int
) -> list[tuple[int, int, int, torch.Tensor]]:
    """One axis of upsampling and smoothing, which is linear, as small matrices.

    (start, stop, base, weight (stop - start, K)): output pixels start..stop are weight times the
    K cells from base on. Together, a band along the diagonal of a length x cells matrix.
    """
    taken, weight = _taps(torch.arange(length).double(), cells, stride, length, sigma)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        part = taken[start:stop]
        base = int(part.min())
        matrix = torch.zeros(stop - start, int(part.max()) - base + 1, dtype=torch.float64)
        matrix.scatter_add_(1, part - base, weight[start:stop])
        blocks.append((start, stop, base, matrix))
    return blocks


def _smooth_at(
    cells: torch.Tensor, points: torch.Tensor, image: torch.Tensor, stride: int,
    shape: tuple[int, int], sigma: float | None,
) -> torch.Tensor:
    """(N, D): `sample_at` of `smooth` after `upsample`, from the few cells (of (B, w, h, D)) that
    have a say."""
    columns, across = _taps(points[:, 0], cells.shape[1], stride, shape[1], sigma)
    rows, down = _taps(points[:, 1], cells.shape[2], stride, shape[0], sigma)
    at = (image[:, None] * cells.shape[1] + columns)[:, None] * cells.shape[2] + rows[:, :, None]
    weight = (down[:, :, None] * across[:, None]).to(cells.dtype)
    return F.embedding_bag(
        at.flatten(1), cells.flatten(0, 2), mode="sum", per_sample_weights=weight.flatten(1))


def _taps(
    position: torch.Tensor, cells: int, stride: float, length: int, sigma: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One axis of `_smooth_at`: cells (N, T) int64 and their weights (N, T) float64.

    A value at a position is a mean of two pixels, each a Gaussian mean of seven, each a mean of
    two cells; the weights of the few cells that this comes to are added up.
    """
    position = position.clamp(0, length - 1)
    below = position.floor().clamp(max=max(length - 2, 0))
    part = (position - below)[:, None]
    reach = _KERNEL // 2 if sigma else 0
    kernel = _gaussian(sigma) if sigma else torch.ones(1, dtype=torch.float64)
    kernel = kernel.to(position)
    nothing = kernel.new_zeros(1)
    weight = (1 - part) * torch.cat([kernel, nothing]) + part * torch.cat([nothing, kernel])
    offset = torch.arange(-reach, reach + 2, device=position.device)
    pixel = _inside(below.long()[:, None] + offset, length)
    place = ((pixel + 0.5) / stride - 0.5).clamp(min=0)
    lower = place.floor().long().clamp(max=cells - 1)
    upper = (lower + 1).clamp(max=cells - 1)
    share = place - lower
    taken = torch.cat([lower, upper], 1)
    base = taken.amin(1, keepdim=True)
    most = 2 * reach + 2 if stride == 1 else math.ceil((2 * reach + 1) / stride) + 2
    added = torch.zeros((len(position), most), dtype=torch.float64, device=position.device)
    added.scatter_add_(1, (taken - base).clamp(max=most - 1),
                       torch.cat([weight * (1 - share), weight * share], 1))
    return (base + torch.arange(most, device=position.device)).clamp(max=cells - 1), added


def _inside(index: torch.Tensor, length: int) -> torch.Tensor:
    """Indices beyond 0..length-1 reflected at the ends, or, on a side too short, repeated."""
    if length > _KERNEL // 2:
        index = index.abs()
        index = (length - 1) - ((length - 1) - index).abs()
    return index.clamp(0, length - 1)


def stack_points(
    points: Sequence[Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The heads of a batch as one list: (points (N, 2) float64, image (N,) int64, first (B,)
    int64, the number of heads before each image), on the device."""
    parts = [to_tensor(p)[0].detach().to(device).double().reshape(-1, 2) for p in points]
    sizes = torch.tensor([len(part) for part in parts])
    image = torch.repeat_interleave(torch.arange(len(parts)), sizes).to(device)
    return torch.cat(parts), image, (torch.cumsum(sizes, 0) - sizes).to(device)


def points_from_logits(
    logits: torch.Tensor, *, stride: int = 4, threshold: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells that are heads: (points (N, 2) float32 (x, y), scores (N,) float32), row by row.

    logits: (h, w). A cell is a head if sigmoid(logit) >= threshold; from 0.5 on also logit > 0,
    so that at 0.5 the number of points is the paper's count, cells with a logit above zero.
    Its place is the centre of the cell, stride * cell + (stride - 1) / 2.
    """
    logits = full_precision(logits.detach())
    scores = torch.sigmoid(logits)
    chosen = scores >= threshold
    if threshold >= 0.5:
        chosen &= logits > 0
    row, column = torch.nonzero(chosen, as_tuple=True)
    points = torch.stack([column, row], dim=1).float() * stride + (stride - 1) / 2
    return points, scores[row, column].float()


def smooth(embedding: torch.Tensor, sigma: float | None) -> torch.Tensor:
    """7 x 7 Gaussian smoothing (paper) of (..., D, H, W), normalised, with reflected borders.

    sigma: pixels; None or 0 returns the input. A side too short to reflect (<= 3 pixels)
    repeats its border instead. Vectors are not brought back to unit length afterwards.
    """
    if not sigma:
        return embedding
    depth, height, width = embedding.shape[-3:]
    window = _gaussian(sigma).to(embedding)
    window = torch.outer(window, window).expand(depth, 1, _KERNEL, _KERNEL)
    # Channels last: several times faster for so thin a kernel, and what `flat_features` reads.
    x = embedding.reshape(-1, depth, height, width)
    x = x.contiguous(memory_format=torch.channels_last)
    with _no_autocast(embedding):
        x = _blur(x, window)
    return x.reshape(embedding.shape) if embedding.ndim != 3 else x[0]


def _gaussian(sigma: float) -> torch.Tensor:
    """(7,) float64 weights that add up to 1."""
    offset = torch.arange(-(_KERNEL // 2), _KERNEL // 2 + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weights / weights.sum()


def _blur(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Convolve (B, D, H, W) with `window`, its borders reflected.

    One pass over the image with zeros beyond the border, which is wrong in thin strips along it;
    those are computed anew. That costs less than copying the image into a wider one.
    """
    reach = _KERNEL // 2

    def exact(part: torch.Tensor) -> torch.Tensor:
        return F.conv2d(_extend(_extend(part, 2, reach), 3, reach), window, groups=x.shape[1])

    if min(x.shape[2:]) < 4 * reach:
        return exact(x)
    out = F.conv2d(x, window, groups=x.shape[1], padding=reach)
    for dim in (2, 3):
        for start, keep in ((0, 0), (x.shape[dim] - 2 * reach, reach)):
            strip = exact(x.narrow(dim, start, 2 * reach)).narrow(dim, keep, reach)
            out.narrow(dim, start + keep, reach).copy_(strip)
    return out


def sample_at(
    features: torch.Tensor, points: Any, image: torch.Tensor | None = None
) -> torch.Tensor:
    """Bilinear samples (N, D) of features (D, H, W) at points (N, 2) (x, y).

    Of a batch (B, D, H, W), `image` (N,) int64 says where each point lies. Differentiable in the
    features. A point outside the map reads the nearest place of its border.
    """
    height, width = features.shape[-2:]
    points = to_tensor(points)[0].detach().to(features.device)
    flat = flat_features(features)
    points = points.to(features.dtype).reshape(-1, 2)
    x = points[:, 0].clamp(0, width - 1)
    y = points[:, 1].clamp(0, height - 1)
    left = x.floor().clamp(max=max(width - 2, 0))
    top = y.floor().clamp(max=max(height - 2, 0))
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    corner = top.long() * width + left.long()
    if image is not None:
        corner = corner + image * (height * width)
    right = 1 if width > 1 else 0
    down = width if height > 1 else 0

    def at(index: torch.Tensor) -> torch.Tensor:
        return flat.index_select(0, index)

    upper = at(corner) * (1 - fx) + at(corner + right) * fx
    lower = at(corner + down) * (1 - fx) + at(corner + down + right) * fx
    return upper * (1 - fy) + lower * fy


def flat_features(features: torch.Tensor) -> torch.Tensor:
    """(..., D, H, W) -> (pixels, D): one row per pixel. No copy after `smooth` or `upsample`."""
    return features.movedim(-3, -1).reshape(-1, features.shape[-3])


def upsample(maps: torch.Tensor, factor: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear upsampling of (D, h, w) or (B, D, h, w) by an integer factor or to a size (H, W).

    The centre of cell c lands at factor * c + (factor - 1) / 2, where its head is.
    """
    size = factor if isinstance(factor, tuple) else (
        maps.shape[-2] * factor, maps.shape[-1] * factor)
    with _no_autocast(maps):
        batch = full_precision(maps).reshape(-1, *maps.shape[-3:])
        batch = batch.contiguous(memory_format=torch.channels_last)
        batch = F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
        return batch if maps.ndim == 4 else batch[0]


def upsample_smooth(
    maps: torch.Tensor, shape: tuple[int, int], sigma: float | None
) -> torch.Tensor:
    """`smooth(upsample(maps, shape), sigma)` of (B, D, h, w) at once: (B, D, H, W).

    Both are linear and separable, so each axis is one small matrix, in blocks along its diagonal:
    for crops of 128 and 256 px at stride 4, with the gradient, less than a quarter of the time of
    interpolation and convolution (measured). Where nothing is upsampled and images are large, `smooth`
    is faster. Differentiable in the maps.
    """
    x = full_precision(maps).permute(0, 2, 3, 1)
    with _no_autocast(maps):
        for axis, length in ((1, shape[0]), (2, shape[1])):
            cells = x.shape[axis]
            blocks = _blocks(cells, length / cells, length, sigma or None, _SIDE)
            kept = x.shape[axis + 1:]
            x = torch.cat([
                torch.matmul(weight.to(x), x.narrow(axis, base, weight.shape[1]).flatten(axis + 1))
                for _, _, base, weight in blocks
            ], dim=axis).unflatten(axis + 1, kept)
    return x.permute(0, 3, 1, 2)


def full_precision(value: torch.Tensor) -> torch.Tensor:
    """float32 of a tensor of any shape that autocast left in half precision; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def _extend(x: torch.Tensor, dim: int, reach: int) -> torch.Tensor:
    """Pad dimension `dim` of x by `reach` on both sides, reflected or, if too short, repeated.

    Slices and a concatenation, because the gradient of the library's reflection padding is not
    deterministic on CUDA.
    """
    length = x.shape[dim]
    if length > reach:
        before = x.narrow(dim, 1, reach).flip(dim)
        after = x.narrow(dim, length - 1 - reach, reach).flip(dim)
    else:
        repeat = [reach if d == dim else -1 for d in range(x.ndim)]
        before = x.narrow(dim, 0, 1).expand(repeat)
        after = x.narrow(dim, length - 1, 1).expand(repeat)
    return torch.cat([before, x, after], dim=dim)


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)
