"""The three losses of the method, for one image and for a batch: paper section on objectives.

- `p2r_loss`: point-to-region counting (P2R), binary cross-entropy with one positive cell a head.
- `exclusivity_loss`: pull together the pixels of an instance and push away everything else,
  inside each head's exclusion circle only.
- `mask_constraint`: instance masks as a prior for counting; with `point_mask_consistency`, which
  the authors compute on integers and which is differentiable here.

Cells are those of the network's output: cell c has its centre at stride * c + (stride - 1) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xmask.decode import stack_points
from xmask.features import (
    flat_features, full_precision, sample_at, smooth, upsample, upsample_smooth,
)
from xmask.nnec import exclusion_radii, incidence_rows, to_tensor

# P2R (paper): distance weighs 8 in the cost of a cell; an empty image counts half.
DISTANCE_COST = 8.0
EMPTY_WEIGHT = 0.5
# Exclusivity (paper): others are pushed beyond tau + 4 * margin.
PUSH_MARGINS = 4.0


def p2r_loss(
    logits: torch.Tensor,
    points: Any,
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
    distance_cost: float = DISTANCE_COST,
    empty_weight: float = EMPTY_WEIGHT,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Point-to-region loss of one image, a scalar.

    logits: (h, w). points: (N, 2) array or tensor, (x, y) pixels. stride: pixels per cell.
    max_distance, min_radius: a cell belongs to its nearest point if closer than max_distance
        pixels; the region's radius, the largest such distance, is clipped to
        [min_radius, max_distance] (paper: 96 and 8).
    weight: (h, w) factor per cell, 0 under a cut-out; None for 1 everywhere.
    The target is 1 in the cheapest cell of each region, at cost distance_cost * distance / radius
    - logit (paper: 8), and 0 elsewhere; the loss is binary cross-entropy with weight target + 1,
    averaged over all cells. An image without points has an all-zero target and weight
    empty_weight (paper: 0.5).

    A point that owns no cell, because another one is nearer to all of them or at the same place,
    joins the region that owns its nearest cell; a region of k points has its k cheapest cells as
    targets, so that every head is counted (ours; annotations hold exact duplicates).
    """
    return p2r_losses(
        logits[None], [points], stride, max_distance=max_distance, min_radius=min_radius,
        distance_cost=distance_cost, empty_weight=empty_weight,
        weight=None if weight is None else weight[None])[0]


def p2r_losses(
    logits: torch.Tensor,
    points: Sequence[Any],
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
    distance_cost: float = DISTANCE_COST,
    empty_weight: float = EMPTY_WEIGHT,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`p2r_loss` of a batch: logits (B, h, w), B sets of points, weight (B, h, w) -> (B,)."""
    logits = full_precision(logits)
    target = p2r_targets(logits, points, stride, max_distance=max_distance, min_radius=min_radius,
                         distance_cost=distance_cost)
    empty = torch.tensor([len(p) == 0 for p in points]).to(logits.device).view(-1, 1, 1)
    cell_weight = torch.where(empty, empty_weight, target + 1)
    if weight is not None:
        cell_weight = cell_weight * weight.to(cell_weight)
    cost = F.binary_cross_entropy_with_logits(
        logits, target, weight=cell_weight, reduction="none")
    return cost.mean((1, 2))


def p2r_target(
    logits: torch.Tensor,
    points: Any,
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
) -> torch.Tensor:
    """The 0/1 target (h, w) of `p2r_loss`: as many ones as there are points, room permitting."""
    return p2r_targets(logits[None], [points], stride, max_distance=max_distance,
                       min_radius=min_radius)[0]


@torch.no_grad()
def p2r_targets(
    logits: torch.Tensor,
    points: Sequence[Any],
    stride: int,
    *,
    max_distance: float = 96.0,
    min_radius: float = 8.0,
    distance_cost: float = DISTANCE_COST,
) -> torch.Tensor:
    """`p2r_target` of a batch, (B, h, w)."""
    logits = full_precision(logits.detach())
    shape = tuple(logits.shape[1:])
    points, image, _ = stack_points(points, logits.device)
    target = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
    owner, distance = _nearest_heads(points, image, len(logits), shape, stride, max_distance)
    cell = torch.nonzero(owner >= 0).squeeze(1)
    if len(cell) == 0:
        return target.reshape(logits.shape)
    region, distance = owner[cell], distance[cell].to(logits.dtype)

    count = len(points)
    cells_owned = torch.bincount(region, minlength=count)
    heads = _heads_per_region(points, image, owner, cells_owned, shape, stride)
    radius = torch.zeros(count, dtype=logits.dtype, device=logits.device)
    radius.scatter_reduce_(0, region, distance, "amax")
    radius.clamp_(min_radius, max_distance)
    cost = distance_cost * distance / radius[region] - logits.reshape(-1)[cell]

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
    points = to_tensor(points)[0]
    points, image, _ = stack_points([points], points.device)
    return _nearest_heads(points, image, 1, cells_shape, stride, max_distance)


def _nearest_heads(
    points: torch.Tensor, image: torch.Tensor, images: int, cells_shape: tuple[int, int],
    stride: int, max_distance: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`p2r_assign` for the cells of a batch: owner and distance (images * h * w,).

    Squares of cells are quartered along both sides again and again, each with a list of the
    points that may be nearest to one of its cells: those not farther from its nearest side than
    some point is from its farthest corner. The lists of all squares stand in one, so that a step
    is a few gathers and one scatter-min whatever the heads, on a CPU as on an accelerator, and
    exact.
    """
    rows, columns = cells_shape
    levels = 1
    while 4**levels < max(rows, columns):
        levels += 1
    device = points.device
    x, y = points.unbind(1)
    point = torch.arange(len(points), device=device)
    where, top, left = image, torch.zeros_like(image), torch.zeros_like(image)  # of each pair
    step = torch.arange(16, device=device)[:, None]
    for level in range(levels - 1, -1, -1):
        side = 4**level
        point, where = point.repeat(16), where.repeat(16)
        top = (top + side * (step // 4)).flatten()
        left = (left + side * (step % 4)).flatten()
        kept = torch.nonzero((top < rows) & (left < columns)).squeeze(1)
        point, where, top, left = (v.index_select(0, kept) for v in (point, where, top, left))
        px, py = x.index_select(0, point), y.index_select(0, point)
        # middle of the square's cells, and half the way from its first to its last
        half_x = (columns - 1 - left).clamp(max=side - 1).double() * (stride / 2)
        half_y = (rows - 1 - top).clamp(max=side - 1).double() * (stride / 2)
        away_x = (px - (left * stride + (stride - 1) / 2 + half_x)).abs()
        away_y = (py - (top * stride + (stride - 1) / 2 + half_y)).abs()
        near = (away_x - half_x).clamp(min=0).square() + (away_y - half_y).clamp(min=0).square()
        far = (away_x + half_x).square() + (away_y + half_y).square()
        across = -(-columns // side)
        down = -(-rows // side)
        square = (where * down + (top >> 2 * level)) * across + (left >> 2 * level)
        best = torch.full((images * down * across,), math.inf, dtype=far.dtype, device=device)
        best.scatter_reduce_(0, square, far, "amin")
        # a hair's breadth more than exact: rounding must not lose the nearest point
        limit = best.index_select(0, square) * (1 + 1e-12) if level else best.index_select(0, square)
        kept = torch.nonzero((near <= limit) & (near < max_distance**2 * (1 + 1e-12))).squeeze(1)
        point, where, top, left = (v.index_select(0, kept) for v in (point, where, top, left))
    # Squares of one cell: near and far are one number, and only equal distances are left.
    distance = torch.sqrt(best)
    owner = torch.full((images * rows * columns,), len(points), dtype=torch.int64, device=device)
    owner.scatter_reduce_(0, (where * rows + top) * columns + left, point, "amin")
    none = (owner == len(points)) | ~(distance < max_distance)
    return owner.masked_fill(none, -1), distance.masked_fill(none, math.inf)


def exclusivity_loss(
    embedding: torch.Tensor,
    points: Any,
    label_map: Any,
    *,
    tau: float = 0.6,
    margin: float = 0.1,
    push_margins: float = PUSH_MARGINS,
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
    push_margins: others are pushed beyond tau + push_margins * margin (paper: 4).
    ignore: (H, W) bool, pixels left out of both means; None for none.
    differentiable_centers: False reads the centre feature at the rounded point and without
        gradient (ablation "without center sampling").
    nnec: False gives every head the same circle, of twice the median exclusion radius (ablation
        "without NNEC"; the release's alternative, the whole image for every head, is not sparse).

    For each point on an instance (label at the rounded position), with d the distance in
    embedding space between pixel and centre, inside the point's circle: the mean of
    relu(d - (tau - margin)) over the pixels of the instance plus the mean of
    relu((tau + push_margins * margin) - d) over all others; averaged over those points. Without
    any such point the loss is 0 and has a graph.
    """
    return exclusivity_losses(
        embedding[None], [points], _labels(label_map, embedding.device)[None], tau=tau,
        margin=margin, push_margins=push_margins, sigma=sigma,
        differentiable_centers=differentiable_centers, nnec=nnec,
        ignore=None if ignore is None else to_tensor(ignore)[0][None])[0]


def exclusivity_losses(
    embedding: torch.Tensor,
    points: Sequence[Any],
    label_maps: torch.Tensor,
    *,
    tau: float = 0.6,
    margin: float = 0.1,
    push_margins: float = PUSH_MARGINS,
    sigma: float | None = 1.5,
    ignore: torch.Tensor | None = None,
    differentiable_centers: bool = True,
    nnec: bool = True,
) -> torch.Tensor:
    """`exclusivity_loss` of a batch, all heads of all images on one incidence list.

    embedding: (B, D, h, w). points: B sets. label_maps: (B, H, W) int. ignore: (B, H, W) bool.
    Returns (B,); an image without a head on an instance gives 0.
    """
    embedding = full_precision(embedding)
    device = embedding.device
    labels = label_maps.to(device).long()
    count, height, width = labels.shape
    if count > 1 and _one_at_a_time(device):
        return torch.cat([
            exclusivity_losses(
                embedding[i:i + 1], points[i:i + 1], labels[i:i + 1], tau=tau, margin=margin,
                push_margins=push_margins, sigma=sigma,
                ignore=None if ignore is None else ignore[i:i + 1],
                differentiable_centers=differentiable_centers, nnec=nnec)
            for i in range(count)])
    points, image, _ = stack_points(points, device)

    label, position = _label_at(labels, points, image)
    chosen = torch.nonzero(label > 0).squeeze(1)
    if len(chosen) == 0:
        return embedding.flatten(1)[:, :0].sum(1)
    radii = exclusion_radii(points, (height, width), image=image)
    if not nnec:
        side = min(height, width) / 2
        crowds = radii.split(torch.bincount(image, minlength=count).tolist())
        typical = torch.stack([r.median() if len(r) else r.new_zeros(()) for r in crowds])
        radii = (2 * typical).clamp(max=side)[image]
    points, image, label = points[chosen], image[chosen], label[chosen]
    head, row, column = incidence_rows(points, radii[chosen], (height, width))
    pixel = ((image * height).index_select(0, head) + row) * width + column
    if ignore is not None:
        seen = ~ignore.to(device).reshape(-1).index_select(0, pixel)
        head, pixel = head[seen], pixel[seen]
    same = labels.reshape(-1).index_select(0, pixel) == label.index_select(0, head)

    if embedding.shape[-2:] == labels.shape[1:]:
        features = smooth(embedding, sigma)
    else:
        features = upsample_smooth(embedding, (height, width), sigma)
    flat = flat_features(features)
    if differentiable_centers:
        centres = sample_at(features, points, image)
    else:
        centres = flat[position[chosen]].detach()
    # The norm has gradient zero, not NaN, where a pixel is its own centre.
    distance = torch.linalg.vector_norm(
        flat.index_select(0, pixel) - centres.index_select(0, head), dim=1)
    cost = torch.where(
        same,
        torch.relu(distance - (tau - margin)),
        torch.relu((tau + push_margins * margin) - distance))

    # Mean per region, regions 2i (pull) and 2i + 1 (push) of head i, then over an image's heads.
    region = 2 * head + (~same).long()
    size = torch.bincount(region, minlength=2 * len(chosen)).clamp(min=1)
    mean = _sum_per_label(cost, region, 2 * len(chosen)) / size
    heads = torch.bincount(image, minlength=count).clamp(min=1)
    return _sum_per_label(mean.view(-1, 2).sum(1), image, count) / heads


def _one_at_a_time(device: torch.device) -> bool:
    """Whether the exclusivity loss goes image by image: on a CPU one image's features stay in
    cache, a batch's do not and take 1.6 times as long (16 crops of 256 px, measured)."""
    return device.type == "cpu"


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

    R is the relu of the logits, upsampled bilinearly to the masks and rescaled to the total that
    it has over the cells (the relu comes first, our reading: after the upsampling, a head that
    one cell alone marks would be drowned by its negative neighbours).
    - background: mean of R over the pixels outside all masks.
    - foreground: mean over instances of |sum of R over the instance - 1|.
    - one_point: mean over instances of |positive cells with their centre in the instance - 1|.
      The count is exact; its gradient is that of the sigmoids (straight-through, ours: the
      authors' term has no gradient).
    A term without pixels or instances is 0.
    """
    return mask_constraints(
        logits[None], _labels(label_map, logits.device)[None],
        None if confident_points is None else [confident_points], stride=stride,
        background=background, foreground=foreground, one_point=one_point)[0]


def mask_constraints(
    logits: torch.Tensor,
    label_maps: torch.Tensor,
    confident_points: Sequence[Any] | None = None,
    *,
    stride: int = 4,
    background: float = 0.0,
    foreground: float = 0.0,
    one_point: float = 0.0,
) -> torch.Tensor:
    """`mask_constraint` of a batch: logits (B, h, w), label_maps (B, H, W) int -> (B,)."""
    logits = full_precision(logits)
    labels = label_maps.to(logits.device).long()
    count, cells = len(labels), tuple(logits.shape[1:])
    total = logits.flatten(1)[:, :0].sum(1)
    # instance k of image b is number b * most + k, k = 0 its background
    most = int(labels.max()) + 1 if labels.numel() else 1
    numbers = labels + (torch.arange(count, device=labels.device) * most).view(-1, 1, 1)
    counted = _counted_instances(labels, numbers, confident_points, count * most)
    instances = counted.view(count, most).sum(1)

    def over_instances(value: torch.Tensor) -> torch.Tensor:
        """Mean over the counted instances of each image; 0 without any."""
        value = torch.where(counted, value, 0).view(count, most).sum(1)
        return value / instances.clamp(min=1)

    if background or foreground:
        coarse = torch.relu(logits)
        fine = upsample(coarse[:, None], tuple(labels.shape[1:]))[:, 0]
        mass = fine.sum((1, 2))
        some = mass > 0
        rescale = torch.where(some, coarse.sum((1, 2)) / torch.where(some, mass, 1), 1)
        fine = fine * rescale.view(-1, 1, 1)
        outside = labels == 0
        if background:
            pixels = outside.sum((1, 2)).clamp(min=1)
            total = total + background * (torch.where(outside, fine, 0).sum((1, 2)) / pixels)
        if foreground:
            inside = _sum_per_label(fine.reshape(-1), numbers.reshape(-1), len(counted))
            total = total + foreground * over_instances((inside - 1).abs())
    if one_point:
        soft = torch.sigmoid(logits).reshape(-1)
        hard = (logits.reshape(-1) > 0).to(soft.dtype)
        through = soft - soft.detach()  # exactly 0: a count of 1 stays 1, and its gradient 0
        of_cell = _cell_labels(labels, cells, stride)
        of_cell = of_cell + most * _image_of_cells(count, cells, labels.device)
        number = _sum_per_label(hard + through, of_cell, len(counted))
        total = total + one_point * over_instances((number - 1).abs())
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
    return point_mask_consistencies(
        logits[None], _labels(label_map, logits.device)[None], stride=stride,
        ignore=None if ignore is None else to_tensor(ignore)[0][None])[0]


def point_mask_consistencies(
    logits: torch.Tensor, label_maps: torch.Tensor, *, stride: int = 4,
    ignore: torch.Tensor | None = None,
) -> torch.Tensor:
    """`point_mask_consistency` of a batch: logits (B, h, w), label_maps (B, H, W), ignore
    (B, H, W) bool or None -> (B,)."""
    logits = full_precision(logits)
    labels = label_maps.to(logits.device).long()
    count, cells = len(labels), tuple(logits.shape[1:])
    label = _cell_labels(labels, cells, stride)
    image = _image_of_cells(count, cells, labels.device)
    score = torch.sigmoid(logits).reshape(-1)
    if ignore is not None:
        ignored = _cell_labels(ignore.to(logits.device).long(), cells, stride)
        seen = torch.nonzero(ignored == 0).squeeze(1)
        label, image, score = label[seen], image[seen], score[seen]
    stray = (label == 0) & (score > 0.5)
    strays = _sum_per_label(torch.where(stray, score, 0), image, count)
    total = strays / _sum_per_label(stray.to(score.dtype), image, count).clamp(min=1)

    most = int(labels.max()) + 1 if labels.numel() else 1
    number = image * most + label
    peak = torch.zeros(count * most, dtype=score.dtype, device=score.device)
    peak = peak.scatter_reduce(0, number, score, "amax").view(count, most)
    present = (torch.bincount(number, minlength=count * most) > 0).view(count, most)[:, 1:]
    missing = torch.where(present, 1 - peak[:, 1:], 0).sum(1)
    return total + missing / present.sum(1).clamp(min=1)


def _heads_per_region(
    points: torch.Tensor,
    image: torch.Tensor,
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
        row = image[homeless] * rows + cell[:, 1].clamp(0, rows - 1)
        host = owner[row * columns + cell[:, 0].clamp(0, columns - 1)]
        host = host[host >= 0]  # a point farther than max_distance from every cell has none
        heads.index_add_(0, host, torch.ones_like(host))
    return heads


def _counted_instances(
    labels: torch.Tensor, numbers: torch.Tensor, confident_points: Sequence[Any] | None, most: int
) -> torch.Tensor:
    """(most,) bool: numbers of instances in the maps that hold a confident point (None: all)."""
    present = torch.zeros(most, dtype=torch.bool, device=labels.device)
    if confident_points is None:
        present[numbers[labels > 0]] = True
        return present
    points, image, _ = stack_points(confident_points, labels.device)
    hit, position = _label_at(labels, points, image)
    present[numbers.reshape(-1)[position[hit > 0]]] = True
    return present


def _labels(label_map: Any, device: torch.device) -> torch.Tensor:
    """The label map as an int64 tensor on the device."""
    if not isinstance(label_map, torch.Tensor):
        label_map = torch.from_numpy(np.asarray(label_map).astype(np.int64))
    return label_map.to(device).long()


def _label_at(
    labels: torch.Tensor, points: torch.Tensor, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label and flat index, in maps (B, H, W), of the pixel that holds each point of an image;
    label 0 outside the map."""
    height, width = labels.shape[1:]
    pixel = torch.floor(points + 0.5).long()
    x, y = pixel[:, 0], pixel[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    return torch.where(inside, labels.reshape(-1)[index], torch.zeros_like(index)), index


def _cell_labels(labels: torch.Tensor, cells: tuple[int, int], stride: int) -> torch.Tensor:
    """(B*h*w,) label of the pixel that holds the centre of each cell; 0 beyond the map."""
    height, width = labels.shape[1:]

    def pixel(number: int) -> torch.Tensor:
        centre = torch.arange(number, device=labels.device).double() * stride + (stride - 1) / 2
        return torch.floor(centre + 0.5).long()

    y, x = pixel(cells[0]), pixel(cells[1])
    taken = labels[:, y.clamp(max=height - 1)][:, :, x.clamp(max=width - 1)]
    return torch.where((y < height)[:, None] & (x < width), taken, 0).reshape(-1)


def _image_of_cells(count: int, cells: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(B*h*w,) image of every cell of a batch."""
    return torch.arange(count, device=device).repeat_interleave(cells[0] * cells[1])


def _sum_per_label(value: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sums of `value` by label; a label beyond counts nowhere."""
    return torch.zeros(count, dtype=value.dtype, device=value.device).index_add(0, label, value)
