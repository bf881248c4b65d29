"""From network output to points and an exclusive label map: paper section on pseudo-masks.

Energy of pixel u for head i:

    E_i(u) = |f(u) - f(p_i)| + lambda * |u - p_i|^2 / r_i^2

A pixel goes to the head with the lowest energy among those whose exclusion circle holds it, if
that energy is below theta. Pseudo-labels and predictions are the same functions with other
numbers. Every head is visited, on the sparse incidence list of `xmask.nnec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xmask.nnec import exclusion_radii, incidence, lowest_wins, split_coincident, to_tensor

# A lone head's radius in decoding, as a share of the shorter side (paper).
LONE_RADIUS = 0.25
# Density gate of pseudo-masks (paper): sigmoid(logit) in [0.1, 0.5] takes the whole circle.
GATE = (0.1, 0.5)
# Pairs whose features are gathered at once: a few MB, which stays in cache (ours, measured).
_PAIRS_AT_ONCE = 1 << 15


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

    features = upsample(embedding, stride)[:, :height, :width]
    density = None
    if density_gate:
        density = upsample(torch.sigmoid(logits)[None], stride)[0, :height, :width]
    labels = instance_map(
        features, points, threshold=threshold, geometry_weight=geometry_weight, sigma=sigma,
        density=density)
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
            "pass one image at a time")
    shape = tuple(embedding.shape[-2:])
    features = smooth(full_precision(embedding.detach()), sigma)
    points = to_tensor(points)[0].detach().to(features.device)
    radii = exclusion_radii(points, shape, lone=LONE_RADIUS)
    head, pixel = incidence(points, radii, shape)
    kept = split_coincident(points, head, pixel, shape)
    if not bool(kept.all()):
        head, pixel = head[kept], pixel[kept]

    points = points.double().reshape(-1, 2)
    centres = sample_at(features, points)
    flat = flat_features(features)
    energy = torch.empty(len(head), dtype=flat.dtype, device=flat.device)
    for start in range(0, len(head), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        owner, where = head[part], pixel[part]
        distance = torch.linalg.vector_norm(
            flat.index_select(0, where) - centres.index_select(0, owner), dim=1)
        dx = where % shape[1] - points[owner, 0]
        dy = torch.div(where, shape[1], rounding_mode="floor") - points[owner, 1]
        spread = (dx * dx + dy * dy) / radii[owner].square()
        energy[part] = distance + geometry_weight * spread.to(flat.dtype)
    if density is None:
        return lowest_wins(energy, head, pixel, shape, threshold)
    gate = density.reshape(-1)[pixel]
    claims = torch.where(gate > GATE[1], energy < threshold, gate >= GATE[0])
    return lowest_wins(energy[claims], head[claims], pixel[claims], shape)


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


def smooth(embedding: torch.Tensor, sigma: float | None, kernel: int = 7) -> torch.Tensor:
    """Gaussian smoothing of (..., D, H, W), normalised, with reflected borders.

    sigma: pixels; None or 0 returns the input. kernel: odd width in pixels (paper: 7). A side
    too short to reflect (<= kernel // 2 pixels) repeats its border instead. Vectors are not
    brought back to unit length afterwards.
    """
    if not sigma:
        return embedding
    reach = kernel // 2
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offset / sigma) ** 2)
    weights = (weights / weights.sum()).to(embedding)
    depth, height, width = embedding.shape[-3:]
    # Channels last: several times faster for so thin a kernel, and what `flat_features` reads.
    x = embedding.reshape(-1, depth, height, width)
    x = x.contiguous(memory_format=torch.channels_last)
    column = weights.view(1, 1, kernel, 1).expand(depth, 1, kernel, 1)
    row = weights.view(1, 1, 1, kernel).expand(depth, 1, 1, kernel)
    with _no_autocast(embedding):
        x = F.conv2d(_extend(x, 2, reach), column, groups=depth)
        x = F.conv2d(_extend(x, 3, reach), row, groups=depth)
    return x.reshape(embedding.shape) if embedding.ndim != 3 else x[0]


def sample_at(features: torch.Tensor, points: Any) -> torch.Tensor:
    """Bilinear samples (N, D) of features (D, H, W) at points (N, 2) (x, y).

    Differentiable in the features. A point outside the map reads the nearest place of its border.
    """
    _, height, width = features.shape
    points = to_tensor(points)[0].detach().to(features.device)
    flat = flat_features(features)
    points = points.to(features.dtype).reshape(-1, 2)
    x = points[:, 0].clamp(0, width - 1)
    y = points[:, 1].clamp(0, height - 1)
    left = x.floor().clamp(max=max(width - 2, 0))
    top = y.floor().clamp(max=max(height - 2, 0))
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    corner = top.long() * width + left.long()
    right = 1 if width > 1 else 0
    down = width if height > 1 else 0
    upper = flat[corner] * (1 - fx) + flat[corner + right] * fx
    lower = flat[corner + down] * (1 - fx) + flat[corner + down + right] * fx
    return upper * (1 - fy) + lower * fy


def flat_features(features: torch.Tensor) -> torch.Tensor:
    """(D, H, W) -> (H * W, D): one row per pixel. No copy after `smooth` or `upsample`."""
    return features.permute(1, 2, 0).reshape(-1, features.shape[0])


def upsample(maps: torch.Tensor, factor: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear upsampling of (D, h, w) by an integer factor or to a size (H, W).

    The centre of cell c lands at factor * c + (factor - 1) / 2, where its head is.
    """
    size = factor if isinstance(factor, tuple) else (
        maps.shape[-2] * factor, maps.shape[-1] * factor)
    with _no_autocast(maps):
        maps = full_precision(maps)[None].contiguous(memory_format=torch.channels_last)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]


def full_precision(value: torch.Tensor) -> torch.Tensor:
    """float32 of what autocast left in half precision; float64 stays."""
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
