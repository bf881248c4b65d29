"""Upsampling, Gaussian smoothing and bilinear sampling of feature maps: paper section on the
discriminative mask objective, used by losses and decoding alike.

Upsampling and smoothing are linear and separable: `_taps` and `_blocks` write one axis of
both as the few cells, with their weights, that a value comes from."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from xmask.nnec import point_tensor

# Bytes of a band of features: in cache, and too small to ask the system for fresh pages (measured).
_BAND = 1 << 21
_ACCELERATOR_BAND = 1 << 28  # the same on an accelerator, where few and large steps are fast
_ROWS = 1 << 26  # bytes of cells stretched to the width of the image at once
_KERNEL = 7  # px, width of the Gaussian (paper)
_SIDE = 64  # px, of a block in `upsample_smooth` (ours, measured)


def upsample(maps: torch.Tensor, factor: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear upsampling of (D, h, w) or (B, D, h, w) by an integer factor or to a size (H, W).

    The centre of cell c lands at factor * c + (factor - 1) / 2, where its head is."""
    size = factor if isinstance(factor, tuple) else (
        maps.shape[-2] * factor, maps.shape[-1] * factor)
    with _no_autocast(maps):
        batch = full_precision(maps).reshape(-1, *maps.shape[-3:])
        batch = batch.contiguous(memory_format=torch.channels_last)
        batch = F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
        return batch if maps.ndim == 4 else batch[0]


def smooth(embedding: torch.Tensor, sigma: float | None) -> torch.Tensor:
    """7 x 7 Gaussian smoothing (paper) of (..., D, H, W), normalised, with reflected borders.

    sigma: pixels; None or 0 returns the input. A side of 3 pixels or less repeats its border
    instead. Vectors are not brought back to unit length."""
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


def upsample_smooth(maps: torch.Tensor, shape: tuple[int, int], sigma: float | None
                    ) -> torch.Tensor:
    """`smooth(upsample(maps, shape), sigma)` of (B, D, h, w) at once: (B, D, H, W).

    Each axis is one small matrix, in blocks along its diagonal: for crops of 128 and 256 px at
    stride 4, with the gradient, less than a quarter of the time of interpolation and convolution
    (measured). Where nothing is upsampled and images are large, `smooth` is faster."""
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


def sample_at(features: torch.Tensor, points: Any, image: torch.Tensor | None = None
              ) -> torch.Tensor:
    """Bilinear samples (N, D) of features (D, H, W) at points (N, 2) (x, y).

    Of a batch (B, D, H, W), `image` (N,) int64 says where each point lies. Differentiable in the
    features. A point outside the map reads the nearest place of its border. Raises ValueError if
    points are not finite (N, 2)."""
    height, width = features.shape[-2:]
    flat = flat_features(features)
    points = point_tensor(points)[0].to(features.device, features.dtype)
    x = points[:, 0].clamp(0, width - 1)
    y = points[:, 1].clamp(0, height - 1)
    left = x.floor().clamp(max=max(width - 2, 0))
    top = y.floor().clamp(max=max(height - 2, 0))
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    corner = top.long() * width + left.long()
    if image is not None:
        corner = corner + image * (height * width)
    right, down = int(width > 1), width * int(height > 1)

    def along_row(index: torch.Tensor) -> torch.Tensor:
        return flat.index_select(0, index) * (1 - fx) + flat.index_select(0, index + right) * fx

    return along_row(corner) * (1 - fy) + along_row(corner + down) * fy


def flat_features(features: torch.Tensor) -> torch.Tensor:
    """(..., D, H, W) -> (pixels, D): one row per pixel. No copy after `smooth` or `upsample`."""
    return features.movedim(-3, -1).reshape(-1, features.shape[-3])


def full_precision(value: torch.Tensor) -> torch.Tensor:
    """float32 of a tensor of any shape that autocast left in half precision; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def smooth_at(embedding: torch.Tensor, points: torch.Tensor, image: torch.Tensor, stride: int,
              shape: tuple[int, int], sigma: float | None) -> torch.Tensor:
    """(N, D): `sample_at` of `smooth` after `upsample` of (B, D, h, w) by `stride` to images of
    `shape`, from the few cells that have a say. points: (N, 2) float64 (x, y) px; image: (N,)."""
    columns, across = _taps(points[:, 0], embedding.shape[3], stride, shape[1], sigma)
    rows, down = _taps(points[:, 1], embedding.shape[2], stride, shape[0], sigma)
    cells = embedding[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    weight = (down[:, :, None] * across[:, None]).to(cells.dtype)
    return (cells * weight[..., None]).sum((1, 2))


def feature_bands(embedding: torch.Tensor, stride: int, shape: tuple[int, int],
                  sigma: float | None) -> Iterator[tuple[slice, int, int, torch.Tensor]]:
    """`smooth` after `upsample` of (B, D, h, w) to images of `shape`, in bands of rows.

    Yields (images, top, bottom, features (pixels, D)): a few rows of one image on a CPU; on an
    accelerator as many rows as 256 MB hold, or all images where these hold them whole."""
    count, depth, cells, _ = embedding.shape
    height, width = shape
    line, together = max(4 * depth * width, 1), 1  # bytes of a row; images in a band
    if embedding.device.type == "cpu":
        tall = min(max(_BAND // line, 8), 64)
    else:
        tall = max(_ACCELERATOR_BAND // line, 8)
        together = max(count, 1) if count * height <= tall else 1
    bands = _blocks(cells, stride, height, sigma, tall)
    several = max(stride * _ROWS // (line * tall), 1)  # bands whose rows are stretched at once
    for first in range(0, count, together):
        images = slice(first, first + together)
        for start in range(0, len(bands), several):
            part = bands[start:start + several]
            low, high = part[0][2], max(base + weight.shape[1] for *_, base, weight in part)
            rows = _smooth_rows(embedding[images, :, low:high], stride, width, sigma).flatten(2)
            for top, bottom, base, weight in part:
                with _no_autocast(rows):
                    band = torch.matmul(
                        weight.to(rows), rows[:, base - low:base - low + weight.shape[1]])
                yield images, top, bottom, band.view(-1, depth)


def _smooth_rows(embedding: torch.Tensor, stride: int, width: int, sigma: float | None
                 ) -> torch.Tensor:
    """(B, h, W, D) from (B, D, h, w): upsampled and smoothed along the rows only."""
    count, depth, down, across = embedding.shape
    cells = embedding.permute(0, 2, 3, 1).contiguous().transpose(1, 2).contiguous()
    out = cells.new_empty((count, down, width, depth))
    with _no_autocast(cells):
        for start, stop, base, weight in _blocks(across, stride, width, sigma, 32):
            part = cells[:, base:base + weight.shape[1]].flatten(2)
            part = torch.matmul(weight.to(cells), part).view(count, -1, down, depth)
            out[:, :, start:stop] = part.transpose(1, 2)
    return out


@functools.lru_cache(maxsize=32)
def _blocks(cells: int, stride: float, length: int, sigma: float | None, size: int
            ) -> list[tuple[int, int, int, torch.Tensor]]:
    """One axis of upsampling and smoothing, which is linear, as small matrices.

    (start, stop, base, weight (stop - start, K)): output pixels start..stop are weight times the
    K cells from base on. Together, a band along the diagonal of a length x cells matrix."""
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


def _taps(position: torch.Tensor, cells: int, stride: float, length: int, sigma: float | None
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """One axis of `smooth_at`: cells (N, T) int64 and their weights (N, T) float64.

    A value is a mean of two pixels, each a Gaussian mean of seven, each a mean of two cells; the
    weights of these few cells are added up."""
    position = position.clamp(0, length - 1)
    below = position.floor().clamp(max=max(length - 2, 0))
    part = (position - below)[:, None]
    reach = _KERNEL // 2 if sigma else 0
    kernel = (_gaussian(sigma) if sigma else torch.ones(1, dtype=torch.float64)).to(position)
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


def _gaussian(sigma: float) -> torch.Tensor:
    """(7,) float64 weights that add up to 1."""
    offset = torch.arange(-(_KERNEL // 2), _KERNEL // 2 + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weights / weights.sum()


def _blur(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Convolve (B, D, H, W) with `window`, its borders reflected.

    One pass with zeros beyond the border, which is wrong in thin strips along it; those are
    computed anew. That costs less than copying the image into a wider one."""
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


def _extend(x: torch.Tensor, dim: int, reach: int) -> torch.Tensor:
    """Pad dimension `dim` of x by `reach` on both sides, reflected or, if too short, repeated.

    Slices and a concatenation, because the gradient of the library's reflection padding is not
    deterministic on CUDA."""
    length = x.shape[dim]
    if length > reach:
        before, after = (x.narrow(dim, at, reach).flip(dim) for at in (1, length - 1 - reach))
    else:
        repeat = [reach if d == dim else -1 for d in range(x.ndim)]
        before, after = (x.narrow(dim, at, 1).expand(repeat) for at in (0, length - 1))
    return torch.cat([before, x, after], dim=dim)


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)
