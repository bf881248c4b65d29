"""The energy of the decoding, pair by pair (paper section on pseudo-masks), for pieces of an image.

    E_i(u) = |f(u) - f(p_i)| + lambda * |u - p_i|^2 / r_i^2

`xmask.decode` computes it for whole images. Here its two terms are apart, for an incidence list of
any kind: the explorer keeps them and moves lambda, tiling assigns the pixels of one window.
"""

from __future__ import annotations

import torch

from xmask import decode, nnec
from xmask.features import flat_features

_PAIRS_AT_ONCE = 1 << 15  # pairs whose features are gathered at once: a few MB


def pair_terms(
    features: torch.Tensor,
    centres: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    head: torch.Tensor,
    pixel: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """|f(u) - f(p_i)| and |u - p_i|^2 / r_i^2 for every pair, each (M,).

    features: (D, H, W), smoothed; centres: (N, D), theirs at the heads; points: (N, 2) (x, y),
    which may lie outside of this H x W piece of an image; radii: (N,) px; head, pixel: (M,)
    int64, an incidence list.
    """
    flat, width = flat_features(features), features.shape[-1]
    points = points.double().reshape(-1, 2)
    distance = torch.empty(len(head), dtype=flat.dtype, device=flat.device)
    spread = torch.empty_like(distance)
    for start in range(0, len(head), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        owner, where = head[part], pixel[part]
        distance[part] = torch.linalg.vector_norm(
            flat.index_select(0, where) - centres.index_select(0, owner), dim=1)
        dx = where % width - points[owner, 0]
        dy = torch.div(where, width, rounding_mode="floor") - points[owner, 1]
        spread[part] = ((dx * dx + dy * dy) / radii[owner].square()).to(flat.dtype)
    return distance, spread


def assign(
    features: torch.Tensor,
    centres: torch.Tensor,
    points: torch.Tensor,
    radii: torch.Tensor,
    *,
    threshold: float,
    geometry_weight: float,
    density: torch.Tensor | None = None,
) -> torch.Tensor:
    """(H, W) int32 label map of a piece of an image, as `decode.instance_map` makes it of a whole.

    Arguments as in `pair_terms`; density: (H, W) as in `decode.instance_map`. The heads must be
    at different places, as predicted ones always are.
    """
    shape = tuple(features.shape[-2:])
    head, pixel = nnec.incidence(points, radii, shape)
    distance, spread = pair_terms(features, centres, points, radii, head, pixel)
    energy = distance.add_(spread, alpha=geometry_weight)
    if density is None:
        return nnec.lowest_wins(energy, head, pixel, shape, threshold)
    gate = density.reshape(-1)[pixel]
    claims = torch.where(gate > decode.GATE[1], energy < threshold, gate >= decode.GATE[0])
    return nnec.lowest_wins(energy[claims], head[claims], pixel[claims], shape)
