"""The three losses of the method, each for one image: paper section on training objectives.

- `p2r_loss`: point-to-region counting (P2R), binary cross-entropy with one positive cell a head.
- `exclusivity_loss`: pull together the pixels of an instance and push away everything else,
  inside each head's exclusion circle only.
- `mask_constraint`: instance masks as a prior for counting; with `point_mask_consistency`, which
  the authors compute on integers and which is differentiable here.

Cells are those of the network's output: cell c has its centre at stride * c + (stride - 1) / 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

from xmask.decode import flat_features, full_precision, sample_at, smooth, upsample
from xmask.nnec import exclusion_radii, incidence, to_tensor

# P2R (paper): distance weighs 8 in the cost of a cell; an empty image counts half.
DISTANCE_COST = 8.0
EMPTY_WEIGHT = 0.5
# Exclusivity (paper): others are pushed beyond tau + 4 * margin.
PUSH_MARGINS = 4.0
# Cells may lie at exactly equal distance of up to this many points in regular layouts, such as
# the corners of a square; the lowest index then owns the cell (ours).
_TIES = 4


def p2r_loss(
    logits: torch.Tensor,
    points: Any,
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Point-to-region loss of one image, a scalar.

    logits: (h, w). points: (N, 2) array or tensor, (x, y) pixels. stride: pixels per cell.
    max_distance, min_radius: a cell belongs to its nearest point if closer than max_distance
        pixels; the region's radius, the largest such distance, is clipped to
        [min_radius, max_distance] (paper: 96 and 8).
    weight: (h, w) factor per cell, 0 under a cut-out; None for 1 everywhere.
    The target is 1 in the cheapest cell of each region, at cost 8 * distance / radius - logit,
    and 0 elsewhere; the loss is binary cross-entropy with weight target + 1, averaged over all
    cells. An image without points has an all-zero target and weight 0.5.

    A point that owns no cell, because another one is nearer to all of them or at the same place,
    joins the region that owns its nearest cell; a region of k points has its k cheapest cells as
    targets, so that every head is counted (ours; annotations hold exact duplicates).
    """
    logits = full_precision(logits)
    points = to_tensor(points)[0].detach().reshape(-1, 2)
    target = p2r_target(logits, points, stride, max_distance=max_distance, min_radius=min_radius)
    cell_weight = target + 1 if len(points) else torch.full_like(target, EMPTY_WEIGHT)
    if weight is not None:
        cell_weight = cell_weight * weight.to(cell_weight)
    return F.binary_cross_entropy_with_logits(logits, target, weight=cell_weight)


@torch.no_grad()
def p2r_target(
    logits: torch.Tensor,
    points: Any,
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
) -> torch.Tensor:
    """The 0/1 target (h, w) of `p2r_loss`: as many ones as there are points, room permitting."""
    logits = full_precision(logits.detach())
    points = to_tensor(points)[0].detach().reshape(-1, 2).to(logits.device)
    target = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
    owner, distance = p2r_assign(points, tuple(logits.shape), stride, max_distance)
    cell = torch.nonzero(owner >= 0).squeeze(1)
    if len(cell) == 0:
        return target.reshape(logits.shape)
    region, distance = owner[cell], distance[cell].to(logits.dtype)

    count = len(points)
    cells_owned = torch.bincount(region, minlength=count)
    heads = _heads_per_region(points, owner, cells_owned, tuple(logits.shape), stride)
    radius = torch.zeros(count, dtype=logits.dtype, device=logits.device)
    radius.scatter_reduce_(0, region, distance, "amax")
    radius.clamp_(min_radius, max_distance)
    cost = DISTANCE_COST * distance / radius[region] - logits.reshape(-1)[cell]

    # Rank of each cell in its region, by cost: two stable sorts.
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(region[order], stable=True)]
    region = region[order]
    start = torch.cumsum(cells_owned, 0) - cells_owned
    rank = torch.arange(len(region), device=region.device) - start[region]
    target[cell[order[rank < heads[region]]]] = 1
    return target.reshape(logits.shape)


def p2r_assign(
    points: Any, cells_shape: tuple[int, int], stride: int, max_distance: float = 96.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest point of every cell, if closer than max_distance.

    points: (N, 2), (x, y) pixels. cells_shape: (h, w).
    Returns (owner (h*w,) int64, -1 for none; distance (h*w,) float64 pixels, inf for none), on
    the points' device. Of points at exactly the same distance the lowest index owns the cell.
    """
    points = to_tensor(points)[0].detach().reshape(-1, 2)
    device = points.device
    rows, columns = cells_shape
    owner = np.full(rows * columns, -1, dtype=np.int64)
    distance = np.full(rows * columns, np.inf)
    if len(points):
        place, first = np.unique(points.double().cpu().numpy(), axis=0, return_index=True)
        x, y = np.meshgrid(np.arange(columns), np.arange(rows))
        centres = np.stack([x.ravel(), y.ravel()], axis=1) * stride + (stride - 1) / 2
        ties = min(_TIES, len(place))
        near, index = cKDTree(place).query(
            centres, k=list(range(1, ties + 1)), distance_upper_bound=max_distance)
        candidate = np.append(first, len(points))[index]  # a missing neighbour has index N
        candidate[near > near[:, :1]] = len(points)
        reached = near[:, 0] < max_distance
        owner[reached] = candidate[reached].min(axis=1)
        distance[reached] = near[reached, 0]
    return torch.from_numpy(owner).to(device), torch.from_numpy(distance).to(device)


def exclusivity_loss(
    embedding: torch.Tensor,
    points: Any,
    label_map: Any,
    *,
    tau: float = 0.6,
    margin: float = 0.1,
    sigma: float | None = 1.5,
    ignore: Any = None,
    differentiable_centers: bool = True,
    nnec: bool = True,
) -> torch.Tensor:
    """Exclusivity loss of one image, a scalar.

    embedding: (D, H, W), or coarser (D, h, w) and then upsampled bilinearly to the label map.
    points: (M, 2), (x, y) pixels, the predicted heads; all of them shape the circles.
    label_map: (H, W) int, 0 background, k an instance.
    tau, margin, sigma: paper, 0.6, 0.1 and 1.5 px (7 x 7 Gaussian; None for no smoothing).
    ignore: (H, W) bool, pixels left out of both means; None for none.
    differentiable_centers: False reads the centre feature at the rounded point and without
        gradient (ablation "without center sampling").
    nnec: False gives every head the same circle, of twice the median exclusion radius (ablation
        "without NNEC"; the release's alternative, the whole image for every head, is not sparse).

    For each point on an instance (label at the rounded position), with d the distance in
    embedding space between pixel and centre, inside the point's circle: the mean of
    relu(d - (tau - margin)) over the pixels of the instance plus the mean of
    relu((tau + 4 * margin) - d) over all others; averaged over those points. Without any such
    point the loss is 0 and has a graph.
    """
    embedding = full_precision(embedding)
    device = embedding.device
    labels = _labels(label_map, device)
    height, width = labels.shape
    points = to_tensor(points)[0].detach().to(device).double().reshape(-1, 2)

    label, flat_position = _label_at(labels, points)
    chosen = torch.nonzero(label > 0).squeeze(1)
    if len(chosen) == 0:
        return embedding[:0].sum()
    radii = exclusion_radii(points, (height, width))
    if not nnec:
        radii = torch.full_like(radii, min(2 * float(radii.median()), min(height, width) / 2))
    head, pixel = incidence(points[chosen], radii[chosen], (height, width))
    if ignore is not None:
        seen = ~to_tensor(ignore)[0].to(device).reshape(-1)[pixel]
        head, pixel = head[seen], pixel[seen]
    same = labels.reshape(-1)[pixel] == label[chosen][head]

    if embedding.shape[-2:] != labels.shape:
        embedding = upsample(embedding, (height, width))
    features = smooth(embedding, sigma)
    flat = flat_features(features)
    if differentiable_centers:
        centres = sample_at(features, points[chosen])
    else:
        centres = flat[flat_position[chosen]].detach()
    # The norm has gradient zero, not NaN, where a pixel is its own centre.
    distance = torch.linalg.vector_norm(
        flat.index_select(0, pixel) - centres.index_select(0, head), dim=1)
    cost = torch.where(
        same,
        torch.relu(distance - (tau - margin)),
        torch.relu((tau + PUSH_MARGINS * margin) - distance))

    # Mean per region, regions 2i (pull) and 2i + 1 (push) of head i, as one weighted sum.
    region = 2 * head + (~same).long()
    size = torch.bincount(region, minlength=2 * len(chosen))
    return (cost / size[region].to(cost.dtype)).sum() / len(chosen)


def mask_constraint(
    logits: torch.Tensor,
    label_map: Any,
    confident_points: Any = None,
    *,
    stride: int = 4,
    background: float = 0.0,
    foreground: float = 0.0,
    one_point: float = 0.0,
) -> torch.Tensor:
    """Instance-mask prior for counting, a scalar: the weighted sum of three terms.

    logits: (h, w). label_map: (H, W) int. confident_points: (K, 2), (x, y) pixels; then only
        instances that hold one of them count for foreground and one_point. None: all count.
    background, foreground, one_point: weights of the terms; a weight of 0 leaves a term out.

    R is the relu of the logits upsampled bilinearly to the masks and rescaled to the total that
    the relu has over the cells.
    - background: mean of R over the pixels outside all masks.
    - foreground: mean over instances of |sum of R over the instance - 1|.
    - one_point: mean over instances of |positive cells with their centre in the instance - 1|.
      The count is exact; its gradient is that of the sigmoids (straight-through, ours: the
      authors' term has no gradient).
    A term without pixels or instances is 0.
    """
    logits = full_precision(logits)
    labels = _labels(label_map, logits.device)
    total = logits[:0].sum()
    counted = _counted_instances(labels, confident_points)

    if background or foreground:
        coarse = torch.relu(logits)
        fine = torch.relu(upsample(logits[None], tuple(labels.shape))[0])
        mass = fine.sum()
        if bool(mass > 0):
            fine = fine * (coarse.sum() / mass)
        outside = labels == 0
        if background and bool(outside.any()):
            total = total + background * fine[outside].mean()
        if foreground and bool(counted.any()):
            inside = _sum_per_label(fine.reshape(-1), labels.reshape(-1), len(counted))
            total = total + foreground * (inside[counted] - 1).abs().mean()
    if one_point and bool(counted.any()):
        soft = torch.sigmoid(logits).reshape(-1)
        hard = (logits.reshape(-1) > 0).to(soft.dtype)
        number = _sum_per_label(
            hard + soft - soft.detach(), _cell_labels(labels, logits.shape, stride), len(counted))
        total = total + one_point * (number[counted] - 1).abs().mean()
    return total


def point_mask_consistency(
    logits: torch.Tensor, label_map: Any, *, stride: int = 4, ignore: Any = None
) -> torch.Tensor:
    """Every point on an instance, every instance with a point: a scalar, differentiable.

    logits: (h, w). label_map: (H, W) int. ignore: (H, W) bool, cells centred there do not count.
    The mean sigmoid of the positive cells that lie on no instance, plus the mean over instances
    of 1 - the largest sigmoid of the instance's cells. Instances too small to hold the centre of
    a cell are left out; a part without cells or instances is 0. (The authors count mismatches
    on integers, which has no gradient; this is our differentiable form.)
    """
    logits = full_precision(logits)
    labels = _labels(label_map, logits.device)
    cell_label = _cell_labels(labels, logits.shape, stride)
    score = torch.sigmoid(logits).reshape(-1)
    if ignore is not None:
        ignored = _labels(ignore, logits.device)
        seen = torch.nonzero(_cell_labels(ignored, logits.shape, stride) == 0).squeeze(1)
        cell_label, score = cell_label[seen], score[seen]
    total = logits[:0].sum()
    stray = score[(cell_label == 0) & (score > 0.5)]
    if len(stray):
        total = total + stray.mean()
    peak = torch.zeros(int(labels.max()) + 1 if labels.numel() else 1,
                       dtype=score.dtype, device=score.device)
    peak = peak.scatter_reduce(0, cell_label, score, "amax")
    present = torch.bincount(cell_label, minlength=len(peak)) > 0
    present[0] = False
    if bool(present.any()):
        total = total + (1 - peak[present]).mean()
    return total


def _heads_per_region(
    points: torch.Tensor,
    owner: torch.Tensor,
    cells_owned: torch.Tensor,
    cells_shape: tuple[int, int],
    stride: int,
) -> torch.Tensor:
    """(N,) number of heads that region i answers for: its own, and those that own no cell."""
    heads = (cells_owned > 0).long()
    homeless = torch.nonzero(cells_owned == 0).squeeze(1)
    if len(homeless):
        rows, columns = cells_shape
        cell = torch.floor((points[homeless].double() - (stride - 1) / 2) / stride + 0.5).long()
        host = owner[cell[:, 1].clamp(0, rows - 1) * columns + cell[:, 0].clamp(0, columns - 1)]
        host = host[host >= 0]  # a point farther than max_distance from every cell has none
        heads.index_add_(0, host, torch.ones_like(host))
    return heads


def _counted_instances(labels: torch.Tensor, confident_points: Any) -> torch.Tensor:
    """(max label + 1,) bool: instances in the map that hold a confident point (None: all)."""
    flat = labels.reshape(-1)
    present = torch.bincount(flat, minlength=1) > 0
    present[0] = False
    if confident_points is not None:
        points = to_tensor(confident_points)[0].detach().to(labels.device).double()
        hit, _ = _label_at(labels, points.reshape(-1, 2))
        present &= torch.bincount(hit, minlength=len(present)) > 0
    return present


def _labels(label_map: Any, device: torch.device) -> torch.Tensor:
    """The label map as an int64 tensor on the device."""
    if not isinstance(label_map, torch.Tensor):
        label_map = torch.from_numpy(np.asarray(label_map).astype(np.int64))
    return label_map.to(device).long()


def _label_at(labels: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Label and flat index of the pixel that holds each point; label 0 outside the map."""
    height, width = labels.shape
    pixel = torch.floor(points + 0.5).long()
    x, y = pixel[:, 0], pixel[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return torch.where(inside, labels.reshape(-1)[index], torch.zeros_like(index)), index


def _cell_labels(labels: torch.Tensor, cells_shape: torch.Size, stride: int) -> torch.Tensor:
    """(h*w,) label of the pixel that holds the centre of each cell; 0 beyond the map."""
    rows, columns = cells_shape
    y = torch.arange(rows, device=labels.device).double() * stride + (stride - 1) / 2
    x = torch.arange(columns, device=labels.device).double() * stride + (stride - 1) / 2
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    return _label_at(labels, centres)[0]


def _sum_per_label(value: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sums of `value` by label; a label beyond counts nowhere."""
    return torch.zeros(count, dtype=value.dtype, device=value.device).index_add(0, label, value)
