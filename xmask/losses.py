"""The three losses of the method, for one image and for a batch: paper section on objectives.

- `p2r_loss`: point-to-region counting (P2R), binary cross-entropy with one positive cell a head.
- `exclusivity_loss`: in each head's exclusion circle, pull its pixels together, push others away.
- `mask_constraint`: instance masks as a prior for counting; and `point_mask_consistency`.

Each has a form for one image and one for a batch. That of a batch takes the section `loss` of the
configuration, that of one image the section's fields by keyword; what is not given has its
published value, which for the constraint's weights is 0. Cells are those of the network's output:
cell c has its centre at stride * c + (stride - 1) / 2.

A crop also shows parts of persons whose dot lies outside it; their labels are above the number of
dots. Nobody demands a head of them: see `mask_constraint` and `point_mask_consistency`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xmask import features
from xmask.config import Loss
from xmask.decode import stack_points
from xmask.nnec import equal_radii, exclusion_radii, ranks, row_spans, to_tensor

_PAPER = Loss()


def p2r_loss(logits: torch.Tensor, points: Any, stride: int, *,
             weight: torch.Tensor | None = None, **section: Any) -> torch.Tensor:
    """Point-to-region loss of one image, a scalar.

    logits: (h, w). points: (N, 2) array or tensor, (x, y) pixels. stride: pixels per cell.
    weight: (h, w) factor per cell, 0 under a cut-out; None for 1 everywhere.
    section: fields of `config.Loss`. A cell belongs to its nearest point if closer than
        `max_distance` pixels; the region's radius, the largest such distance, is clipped to
        [`min_radius`, `max_distance`] (paper: 8 and 96).
    The target is 1 in the cheapest cell of each region, at cost `distance_cost` * distance /
    radius - logit (paper: 8), and 0 elsewhere; the loss is binary cross-entropy with weight
    target + 1, averaged over all cells. Without points the target is all zero, the weight
    `empty_weight`.

    A point that owns no cell, because another one is nearer to all of them or at the same place,
    joins the region that owns its nearest cell; a region of k points has its k cheapest cells as
    targets, so that every head is counted (ours; annotations hold exact duplicates)."""
    return p2r_losses(logits[None], [points], stride, _fields(section), weight=_one(weight))[0]


def p2r_losses(logits: torch.Tensor, points: Sequence[Any], stride: int, section: Loss = _PAPER,
               *, weight: torch.Tensor | None = None) -> torch.Tensor:
    """`p2r_loss` of a batch: logits (B, h, w), B sets of points, weight (B, h, w) -> (B,)."""
    logits = features.full_precision(logits)
    target = p2r_targets(logits, points, stride, section)
    empty = torch.tensor([len(p) == 0 for p in points]).to(logits.device).view(-1, 1, 1)
    cell_weight = torch.where(empty, section.empty_weight, target + 1)
    if weight is not None:
        cell_weight = cell_weight * weight.to(cell_weight)
    return F.binary_cross_entropy_with_logits(
        logits, target, weight=cell_weight, reduction="none").mean((1, 2))


def p2r_target(logits: torch.Tensor, points: Any, stride: int, **section: Any) -> torch.Tensor:
    """The 0/1 target (h, w) of `p2r_loss`: as many ones as there are points, room permitting."""
    return p2r_targets(logits[None], [points], stride, _fields(section))[0]


@torch.no_grad()
def expected_heads(logits: torch.Tensor) -> int:
    """How many heads the logits, of any shape, expect (ours): the sum of sigmoid(logit - log 2).

    P2R weighs a head twice, so a cell that is one with probability q learns the logit of q plus
    log 2. Cells above 0.5 can be more, and a student of these still more."""
    logits = features.full_precision(logits.detach())
    return int(torch.sigmoid(logits - math.log(2)).sum().round())


@torch.no_grad()
def expected_threshold(logits: torch.Tensor, cells: torch.Tensor | None = None) -> float:
    """The probability above which there are as many cells as the logits expect heads (ours).

    logits: of any shape. cells: those of them that may be heads, the others -inf; None: all.
    Returns 1 where none is expected, and 0 where there are fewer cells than heads."""
    cells = features.full_precision((logits if cells is None else cells).detach()).flatten()
    heads = expected_heads(logits)
    return torch.sigmoid(cells.topk(heads).values[-1]).item() if heads else 1.0


def p2r_targets(logits: torch.Tensor, points: Sequence[Any], stride: int, section: Loss = _PAPER
                ) -> torch.Tensor:
    """`p2r_target` of a batch, (B, h, w)."""
    logits = features.full_precision(logits.detach())
    shape = tuple(logits.shape[1:])
    points, image, _ = stack_points(points, logits.device)
    target = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
    owner, distance = _nearest_heads(
        points, image, len(logits), shape, stride, section.max_distance)
    cell = torch.nonzero(owner >= 0).squeeze(1)
    if len(cell) == 0:
        return target.reshape(logits.shape)
    region, distance = owner[cell], distance[cell].to(logits.dtype)

    count = len(points)
    cells_owned = torch.bincount(region, minlength=count)
    heads = _heads_per_region(points, image, owner, cells_owned, shape, stride)
    radius = torch.zeros(count, dtype=logits.dtype, device=logits.device)
    radius.scatter_reduce_(0, region, distance, "amax")
    radius.clamp_(section.min_radius, section.max_distance)
    cost = section.distance_cost * distance / radius[region] - logits.reshape(-1)[cell]

    order, rank = ranks(region, cost, cells_owned)
    target[cell[order[rank < heads[region[order]]]]] = 1
    return target.reshape(logits.shape)


def p2r_assign(points: Any, cells_shape: tuple[int, int], stride: int, max_distance: float = 96.0
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest point of every cell, if closer than max_distance.

    points: (N, 2), (x, y) pixels. cells_shape: (h, w). Returns owner (h*w,) int64, -1 for none,
    and distance (h*w,) float64 px, inf for none. Of points equally far the lowest index owns."""
    points, image, _ = stack_points([points], to_tensor(points)[0].device)
    return _nearest_heads(points, image, 1, cells_shape, stride, max_distance)


def _nearest_heads(points: torch.Tensor, image: torch.Tensor, images: int,
                   cells_shape: tuple[int, int], stride: int, max_distance: float
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """`p2r_assign` for the cells of a batch: owner and distance (images * h * w,).

    Squares of cells are quartered along both sides again and again, each with a list of the
    points that may be nearest to one of its cells: those not farther from its nearest side than
    some point is from its farthest corner. The lists of all squares stand in one: a step is a
    few gathers and one scatter-min whatever the heads."""
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
        across, down = -(-columns // side), -(-rows // side)
        square = (where * down + (top >> 2 * level)) * across + (left >> 2 * level)
        best = torch.full((images * down * across,), math.inf, dtype=far.dtype, device=device)
        best.scatter_reduce_(0, square, far, "amin")
        # a hair's breadth more than exact: rounding must not lose the nearest point
        limit = best.index_select(0, square) * (1 + 1e-12 if level else 1)
        kept = torch.nonzero((near <= limit) & (near < max_distance**2 * (1 + 1e-12))).squeeze(1)
        point, where, top, left = (v.index_select(0, kept) for v in (point, where, top, left))
    # Squares of one cell: near and far are one number, and only equal distances are left.
    distance = torch.sqrt(best)
    owner = torch.full((images * rows * columns,), len(points), dtype=torch.int64, device=device)
    owner.scatter_reduce_(0, (where * rows + top) * columns + left, point, "amin")
    none = (owner == len(points)) | ~(distance < max_distance)
    return owner.masked_fill(none, -1), distance.masked_fill(none, math.inf)


def exclusivity_loss(embedding: torch.Tensor, points: Any, label_map: Any, *, ignore: Any = None,
                     **section: Any) -> torch.Tensor:
    """Exclusivity loss of one image, a scalar.

    embedding: (D, H, W), or coarser (D, h, w) and then upsampled bilinearly to the label map.
    points: (M, 2), (x, y) pixels, the predicted heads; all of them shape the circles.
    label_map: (H, W) int, 0 background, k an instance.
    ignore: (H, W) bool, pixels left out of both means; None for none.
    section: fields of `config.Loss`: `tau`, `margin`, `push_margins` and `sigma` (paper: 0.6, 0.1,
        4, and 1.5 px of a 7 x 7 Gaussian; None or 0 for no smoothing);
        `differentiable_centers`: False reads the centre feature at the rounded point and without
        gradient (ablation "without center sampling");
        `nnec`: False gives every head the same circle, `nnec.equal_radii` (ablation "without
        NNEC").

    For each point on an instance (label at the rounded position), with d the distance in
    embedding space between pixel and centre, inside the point's circle: the mean of
    relu(d - (tau - margin)) over the pixels of the instance plus the mean of
    relu((tau + push_margins * margin) - d) over all others; averaged over those points. Without
    any such point the loss is 0 and has a graph. The pixels of a person cut by a crop are others
    like those of any person: whose they are is known, also without the dot.
    Raises ValueError for points that are not finite (N, 2), and for a label map or `ignore` that
    does not fit the embedding."""
    return exclusivity_losses(
        embedding[None], [points], _one(label_map), _fields(section), _one(ignore))[0]


def exclusivity_losses(embedding: torch.Tensor, points: Sequence[Any], label_maps: torch.Tensor,
                       section: Loss = _PAPER, ignore: torch.Tensor | None = None) -> torch.Tensor:
    """`exclusivity_loss` of a batch, all heads of all images on one incidence list.

    embedding: (B, D, h, w). points: B sets. label_maps: (B, H, W) int. ignore: (B, H, W) bool.
    Returns (B,)."""
    embedding = features.full_precision(embedding)
    device = embedding.device
    factor = max(label_maps.shape[-1] // embedding.shape[-1], 1)
    labels = _fitting("label_map", label_maps, embedding, factor).long()
    if ignore is not None:
        ignore = _fitting("ignore", ignore, embedding, factor).bool()
    count, height, width = labels.shape
    if count > 1 and _one_at_a_time(device):
        return torch.cat([
            exclusivity_losses(embedding[i:i + 1], points[i:i + 1], labels[i:i + 1], section,
                               None if ignore is None else ignore[i:i + 1])
            for i in range(count)])
    points, image, _ = stack_points(points, device)

    inside, position = _pixel_of(points, image, (height, width))
    label = torch.where(inside, labels.reshape(-1)[position], 0)
    chosen = torch.nonzero(label > 0).squeeze(1)
    if len(chosen) == 0:
        return embedding.flatten(1)[:, :0].sum(1)
    radii = exclusion_radii(points, (height, width), image=image)
    if not section.nnec:
        radii = equal_radii(radii, (height, width), image, count)
    points, image, label = points[chosen], image[chosen], label[chosen]
    head, row, column = row_spans(points, radii[chosen], (height, width), split=False).pixels()
    pixel = ((image * height).index_select(0, head) + row) * width + column
    if ignore is not None:
        seen = ~ignore.reshape(-1).index_select(0, pixel)
        head, pixel = head[seen], pixel[seen]
    same = labels.reshape(-1).index_select(0, pixel) == label.index_select(0, head)

    if embedding.shape[-2:] == labels.shape[1:]:
        fine = features.smooth(embedding, section.sigma)
    else:
        fine = features.upsample_smooth(embedding, (height, width), section.sigma)
    flat = features.flat_features(fine)
    if section.differentiable_centers:
        centres = features.sample_at(fine, points, image)
    else:
        centres = flat[position[chosen]].detach()
    # The norm has gradient zero, not NaN, where a pixel is its own centre.
    distance = torch.linalg.vector_norm(
        flat.index_select(0, pixel) - centres.index_select(0, head), dim=1)
    near, far = section.tau - section.margin, section.tau + section.push_margins * section.margin
    cost = torch.where(same, torch.relu(distance - near), torch.relu(far - distance))

    # Mean per region, regions 2i (pull) and 2i + 1 (push) of head i, then over an image's heads.
    region = 2 * head + (~same).long()
    size = torch.bincount(region, minlength=2 * len(chosen)).clamp(min=1)
    mean = _sum_per_label(cost, region, 2 * len(chosen)) / size
    heads = torch.bincount(image, minlength=count).clamp(min=1)
    return _sum_per_label(mean.view(-1, 2).sum(1), image, count) / heads


def _one_at_a_time(device: torch.device) -> bool:
    """On a CPU, where one image's features stay in cache; a batch's do not, and take 1.6 times as
    long (16 crops of 256 px, measured)."""
    return device.type == "cpu"


def mask_constraint(logits: torch.Tensor, label_map: Any, confident_points: Any = None, *,
                    stride: int = 4, visible: Any = None, **section: Any) -> torch.Tensor:
    """Instance-mask prior for counting, a scalar: the weighted sum of three terms.

    logits: (h, w). label_map: (stride * h, stride * w) int. confident_points: (K, 2), (x, y)
        pixels; an instance counts if one of them, rounded to a pixel, lies on it. None: all count.
        The pixels of an instance that does not count are neither its own nor background: of a
        person cut by a crop nothing is asked, and a pseudo-mask that nobody vouches for is not
        evidence that there is no head.
    visible: (stride * h, stride * w) bool, False under a cut-out; None: all visible. Hidden
        pixels are not background, and a point on one does not count: P2R asks for no head there,
        and the network could only guess. An instance whose point is visible counts whole, with
        its hidden pixels, as in the authors' release (which counts hidden points too).
    section: fields of `config.Loss`: the weights `background`, `foreground` and `one_point` of
        the terms, 0 unless given; a weight of 0 leaves a term out.

    R is the relu of the logits, upsampled bilinearly to the masks and divided by stride**2, so
    that it keeps its total (the relu comes first, our reading: after the upsampling, a head that
    one cell alone marks would be drowned by its negative neighbours).
    - background: mean of R over the visible pixels outside all masks.
    - foreground: mean over instances of |sum of R over the instance - 1|.
    - one_point: mean over instances of |positive cells with their centre in the instance - 1|.
      The count is exact; its gradient is that of the sigmoids (straight-through, ours: the
      authors' term has no gradient).
    A term without pixels or instances is 0. Raises ValueError for points that are not finite
    (K, 2), and for a label map or `visible` of another shape."""
    dots = None if confident_points is None else [confident_points]
    return mask_constraints(logits[None], _one(label_map), dots, _fields(section), stride=stride,
                            visible=_one(visible))[0]


def mask_constraints(logits: torch.Tensor, label_maps: torch.Tensor,
                     confident_points: Sequence[Any] | None = None, section: Loss = _PAPER, *,
                     stride: int = 4, visible: torch.Tensor | None = None) -> torch.Tensor:
    """`mask_constraint` of a batch: logits (B, h, w), label_maps (B, H, W) int, B sets of points,
    visible (B, H, W) bool -> (B,)."""
    logits = features.full_precision(logits)
    labels = _fitting("label_map", label_maps, logits, stride).long()
    hidden = None if visible is None else ~_fitting("visible", visible, logits, stride).bool()
    count, cells = len(labels), tuple(logits.shape[1:])
    total = logits.flatten(1)[:, :0].sum(1)
    numbers, most = _numbered(labels)
    counted = _counted_instances(numbers, most, confident_points, hidden)
    instances = counted.sum(1).clamp(min=1)

    def over_instances(value: torch.Tensor) -> torch.Tensor:
        """Mean over the counted instances of each image; 0 without any."""
        return torch.where(counted, value.view(count, most), 0).sum(1) / instances

    if section.background or section.foreground:
        fine = features.upsample(torch.relu(logits)[:, None], stride)[:, 0] / stride**2
        if section.background:
            outside = labels == 0 if hidden is None else (labels == 0) & ~hidden
            pixels = outside.sum((1, 2)).clamp(min=1)
            mean = torch.where(outside, fine, 0).sum((1, 2)) / pixels
            total = total + section.background * mean
        if section.foreground:
            inside = _sum_per_label(fine.reshape(-1), numbers.reshape(-1), count * most)
            total = total + section.foreground * over_instances((inside - 1).abs())
    if section.one_point:
        soft = torch.sigmoid(logits).reshape(-1)
        hard = (logits.reshape(-1) > 0).to(soft.dtype)
        through = soft - soft.detach()  # exactly 0: a count of 1 stays 1, and its gradient 0
        number = _sum_per_label(hard + through, _at_cells(numbers, cells, stride), count * most)
        total = total + section.one_point * over_instances((number - 1).abs())
    return total


def point_mask_consistency(logits: torch.Tensor, label_map: Any, points: Any = None, *,
                           stride: int = 4, ignore: Any = None) -> torch.Tensor:
    """Every point on an instance, every instance with a point: a scalar, differentiable.

    logits: (h, w). label_map: (stride * h, stride * w) int. points: (K, 2), (x, y) pixels; an
    instance counts if one of them, rounded to a pixel, lies on it: a person cut by a crop needs
    no point. None: all count. ignore: (stride * h, stride * w) bool; cells centred there, and
    points there, do not count.
    The mean sigmoid of the positive cells that lie on no instance, plus the mean over instances
    that count of 1 - the largest sigmoid of the instance's cells. Instances too small to hold the
    centre of a cell are left out; a part without cells or instances is 0. (Ours: the authors
    count mismatches on integers, without gradient.) Raises ValueError as `mask_constraint`."""
    return point_mask_consistencies(
        logits[None], _one(label_map), None if points is None else [points], stride=stride,
        ignore=_one(ignore))[0]


def point_mask_consistencies(
        logits: torch.Tensor, label_maps: torch.Tensor, points: Sequence[Any] | None = None, *,
        stride: int = 4, ignore: torch.Tensor | None = None) -> torch.Tensor:
    """`point_mask_consistency` of a batch: logits (B, h, w), label_maps (B, H, W), B sets of
    points or None, ignore (B, H, W) bool or None -> (B,)."""
    logits = features.full_precision(logits)
    labels = _fitting("label_map", label_maps, logits, stride).long()
    count, cells = len(labels), tuple(logits.shape[1:])
    numbers, most = _numbered(labels)
    number = _at_cells(numbers, cells, stride)
    score = torch.sigmoid(logits).reshape(-1)
    if ignore is not None:
        ignore = _fitting("ignore", ignore, logits, stride).bool()
        seen = torch.nonzero(~_at_cells(ignore, cells, stride)).squeeze(1)
        number, score = number[seen], score[seen]
    image = torch.div(number, most, rounding_mode="floor")
    stray = (number == image * most) & (score > 0.5)
    strays = _sum_per_label(torch.where(stray, score, 0), image, count)
    total = strays / _sum_per_label(stray.to(score.dtype), image, count).clamp(min=1)

    peak = torch.zeros(count * most, dtype=score.dtype, device=score.device)
    peak = peak.scatter_reduce(0, number, score, "amax").view(count, most)
    asked = _counted_instances(numbers, most, points, ignore)
    asked &= (torch.bincount(number, minlength=count * most) > 0).view(count, most)
    missing = torch.where(asked, 1 - peak, 0).sum(1)
    return total + missing / asked.sum(1).clamp(min=1)


def _heads_per_region(points: torch.Tensor, image: torch.Tensor, owner: torch.Tensor,
                      cells_owned: torch.Tensor, cells_shape: tuple[int, int], stride: int
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


def _numbered(labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Label maps (B, H, W) in which instance k of image b has the number b * most + k, k = 0 for
    its background; and `most`."""
    most = int(labels.max()) + 1 if labels.numel() else 1
    return labels + (torch.arange(len(labels), device=labels.device) * most).view(-1, 1, 1), most


def _counted_instances(numbers: torch.Tensor, most: int, points: Sequence[Any] | None,
                       hidden: torch.Tensor | None) -> torch.Tensor:
    """(B, most) bool: which instances of maps (B, H, W), numbered b * most + label, hold one of
    their image's points (None: all do) on a pixel that is not hidden."""
    present = torch.zeros(len(numbers) * most, dtype=torch.bool, device=numbers.device)
    chosen = numbers.reshape(-1)
    if points is not None:
        at, image, _ = stack_points(points, numbers.device)
        inside, position = _pixel_of(at, image, numbers.shape[1:])
        if hidden is not None:
            inside = inside & ~hidden.reshape(-1)[position]
        chosen = chosen[position[inside]]
    present[chosen] = True
    present = present.view(len(numbers), most)
    present[:, 0] = False  # the background
    return present


def _fields(values: dict[str, Any]) -> Loss:
    """The section of some of its fields, of which None switches one off."""
    return Loss(**{name: 0.0 if value is None else value for name, value in values.items()})


def _one(value: Any) -> Any:
    """(1, H, W) tensor of a map (H, W) of one image; None stays None."""
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else value[None]
    value = np.asarray(value)
    return torch.from_numpy(value.astype(bool if value.dtype == bool else np.int64))[None]


def _fitting(name: str, maps: torch.Tensor, output: torch.Tensor, stride: int) -> torch.Tensor:
    """Maps (B, H, W), on the device of the network's output; ValueError if H and W are not
    `stride` times its cells."""
    height, width = output.shape[-2:]
    if tuple(maps.shape) != (len(output), stride * height, stride * width):
        raise ValueError(
            f"{name}: found {' x '.join(map(str, maps.shape[1:]))} pixels, but the network's "
            f"output has {height} x {width} cells of {stride} pixels; give a map of "
            f"{stride * height} x {stride * width}")
    return maps.to(output.device)


def _pixel_of(points: torch.Tensor, image: torch.Tensor, shape: tuple[int, int]
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """(inside, index): whether each point lies in its image, and the flat index, in maps
    (B, H, W), of the pixel that holds it, or of the nearest one."""
    height, width = shape
    pixel = torch.floor(points + 0.5).long()
    x, y = pixel[:, 0], pixel[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return inside, (image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)


def _at_cells(maps: torch.Tensor, cells: tuple[int, int], stride: int) -> torch.Tensor:
    """(B*h*w,) value of maps (B, stride * h, stride * w) at the pixel that holds the centre of
    each cell."""
    return maps[:, stride // 2::stride, stride // 2::stride].reshape(-1)


def _sum_per_label(value: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) sums of `value` by label; a label beyond counts nowhere."""
    return torch.zeros(count, dtype=value.dtype, device=value.device).index_add(0, label, value)
