"""Slow, dense versions of the method, written as the paper states it: oracles for the tests.

They loop over heads and pixels and build N x H x W arrays on purpose; nothing outside tests/
uses them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def radii(points, shape, min_radius=3.0, lone=0.5):
    points, side = np.asarray(points, dtype=np.float64), min(shape)
    out = []
    for i, p in enumerate(points):
        others = [math.dist(p, q) for j, q in enumerate(points) if j != i]
        r = min(others) if others else lone * side
        out.append(max(min(r, 0.5 * side), min_radius))
    return np.array(out)


def squared_distances(points, shape):
    """(N, H, W) float64."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    y, x = np.mgrid[:shape[0], :shape[1]]
    dx, dy = x[None] - points[:, 0, None, None], y[None] - points[:, 1, None, None]
    return dx * dx + dy * dy


def circles(points, radii, shape):
    """(N, H, W) bool."""
    return squared_distances(points, shape) <= (np.asarray(radii) ** 2)[:, None, None]


def smooth(embedding, sigma, kernel=7):
    """(D, H, W) tensor, by explicit reflected indices and a full two-dimensional kernel."""
    if not sigma:
        return embedding
    reach = kernel // 2
    one = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
    one = [w / sum(one) for w in one]

    def reflected(length, shift):
        return [i if 0 <= i < length else (-i if i < 0 else 2 * (length - 1) - i)
                for i in range(shift, length + shift)]

    _, height, width = embedding.shape
    out = torch.zeros_like(embedding)
    for a, dy in zip(one, range(-reach, reach + 1)):
        for b, dx in zip(one, range(-reach, reach + 1)):
            out = out + a * b * embedding[:, reflected(height, dy)][:, :, reflected(width, dx)]
    return out


def bilinear(features, point):
    """(D,) value of (D, H, W) at one (x, y), clamped to the map."""
    _, height, width = features.shape
    x, y = min(max(float(point[0]), 0), width - 1), min(max(float(point[1]), 0), height - 1)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    fx, fy = x - x0, y - y0
    return ((1 - fy) * ((1 - fx) * features[:, y0, x0] + fx * features[:, y0, x1])
            + fy * ((1 - fx) * features[:, y1, x0] + fx * features[:, y1, x1]))


def upsample(maps, factor):
    """(D, h, w) -> (D, h * factor, w * factor): cell c is centred at factor*c + (factor-1)/2."""
    _, height, width = maps.shape
    place = [[((x + 0.5) / factor - 0.5, (y + 0.5) / factor - 0.5)
              for x in range(width * factor)] for y in range(height * factor)]
    return torch.stack([torch.stack([bilinear(maps, p) for p in row], 1) for row in place], 1)


def energies(embedding, points, geometry_weight, sigma, shape, r=None):
    """(N, H, W) energies, infinite outside the circles; r: their radii, if not those of NNEC."""
    features = smooth(embedding, sigma)
    r = radii(points, shape, lone=0.25) if r is None else r
    squared = squared_distances(points, shape)
    out = np.full(squared.shape, np.inf)
    for i, point in enumerate(points):
        d = (features - bilinear(features, point)[:, None, None]).square().sum(0).sqrt().numpy()
        e = d + geometry_weight * squared[i] / r[i] ** 2
        out[i] = np.where(squared[i] <= r[i] ** 2, e, np.inf)
    return out


def exclusivity(embedding, points, label_map, tau=0.6, margin=0.1, sigma=1.5, ignore=None,
                differentiable_centers=True):
    """Loops over heads; `embedding` (D, H, W) may require a gradient."""
    features = smooth(embedding, sigma)
    height, width = label_map.shape
    inside = circles(points, radii(points, (height, width)), (height, width))
    valid = np.ones((height, width), bool) if ignore is None else ~ignore
    terms = []
    for i, (x, y) in enumerate(np.asarray(points, dtype=np.float64)):
        column, row = math.floor(x + 0.5), math.floor(y + 0.5)
        if not (0 <= column < width and 0 <= row < height) or label_map[row, column] == 0:
            continue
        centre = bilinear(features, (x, y)) if differentiable_centers else (
            features[:, row, column].detach())
        same = label_map == label_map[row, column]
        term = features.new_zeros(())
        for region, pull in ((inside[i] & valid & same, True), (inside[i] & valid & ~same, False)):
            rows, columns = np.nonzero(region)
            if len(rows):
                delta = features[:, rows, columns] - centre[:, None]
                d = torch.linalg.vector_norm(delta, dim=0)
                cost = d - (tau - margin) if pull else (tau + 4 * margin) - d
                term = term + torch.relu(cost).mean()
        terms.append(term)
    return torch.stack(terms).mean() if terms else embedding.sum() * 0


def p2r(logits, points, stride, max_distance=96.0, min_radius=8.0):
    """The gradient runs through the logits only. A point that owns no cell (coincident ones) counts
    in the region that owns the cell nearest to it."""
    rows, columns = logits.shape
    value = logits.detach().numpy()
    regions = {}
    for row in range(rows):
        for column in range(columns):
            centre = (stride * column + (stride - 1) / 2, stride * row + (stride - 1) / 2)
            distance = [math.dist(centre, p) for p in points]
            if distance and min(distance) < max_distance:
                owner = int(np.argmin(distance))
                regions.setdefault(owner, []).append((row, column, distance[owner]))
    owner_of = {(row, column): owner for owner, cells in regions.items()
                for row, column, _ in cells}
    heads = dict.fromkeys(regions, 1)
    for i, (x, y) in enumerate(points):
        if i not in regions:
            column, row = (min(max(math.floor((c - (stride - 1) / 2) / stride + 0.5), 0), n - 1)
                           for c, n in ((x, columns), (y, rows)))
            heads[owner_of[row, column]] += 1
    target = torch.zeros_like(logits)
    for owner, cells in regions.items():
        rho = min(max(max(d for _, _, d in cells), min_radius), max_distance)
        cost = [8 * d / rho - value[row, column] for row, column, d in cells]
        for cheapest in np.argsort(cost, kind="stable")[:heads[owner]]:
            row, column, _ = cells[cheapest]
            target[row, column] = 1
    weight = target + 1 if len(points) else torch.full_like(target, 0.5)
    loss = -(target * torch.nn.functional.logsigmoid(logits)
             + (1 - target) * torch.nn.functional.logsigmoid(-logits))
    return (weight * loss).mean(), target


def _cells_of(labels, k, cells, stride):
    """Cells (row, column) whose centre lies in a pixel with label k."""
    def at(c):
        return math.floor(stride * c + (stride - 1) / 2 + 0.5)

    return [(row, column) for row in range(cells[0]) for column in range(cells[1])
            if labels[at(row), at(column)] == k]


def _instances(labels):
    return [k for k in np.unique(labels) if k]


def mask_constraint(logits, labels, confident, stride, background, foreground, one_point,
                    visible=None):
    """The three terms, instance by instance; the count's gradient is that of the sigmoids."""
    outside = torch.from_numpy(labels == 0 if visible is None else (labels == 0) & visible)
    fine = upsample(torch.relu(logits)[None], stride)[0]
    if fine.sum() > 0:
        fine = fine * (torch.relu(logits).sum() / fine.sum())
    hit = {labels[math.floor(y + 0.5), math.floor(x + 0.5)] for x, y in confident
           if 0 <= x + 0.5 < labels.shape[1] and 0 <= y + 0.5 < labels.shape[0]}
    counted = [k for k in _instances(labels) if k in hit]
    total = logits.sum() * 0
    if outside.any():
        total = total + background * fine[outside].mean()
    for k in counted:
        inside = fine[torch.from_numpy(labels == k)].sum()
        total = total + foreground * (inside - 1).abs() / len(counted)
        number = sum(float(logits[cell] > 0) for cell in _cells_of(labels, k, logits.shape, stride))
        soft = sum(torch.sigmoid(logits[cell])
                   for cell in _cells_of(labels, k, logits.shape, stride))
        slope = float(np.sign(number - 1))
        if isinstance(soft, torch.Tensor):
            total = total + one_point * slope * (soft - soft.detach()) / len(counted)
        total = total + one_point * abs(number - 1) / len(counted)
    return total


def consistency(logits, labels, stride, points=None, ignore=None):
    """points: of the instances that count, None: all do. ignore: (H, W) bool, cells left out."""
    labels = np.asarray(labels)
    counted = _instances(labels) if points is None else {
        labels[math.floor(y + 0.5), math.floor(x + 0.5)] for x, y in points} - {0}
    if ignore is not None:
        labels = np.where(ignore, -1, labels)
    stray = [torch.sigmoid(logits[cell]) for cell in _cells_of(labels, 0, logits.shape, stride)
             if logits[cell] > 0]
    lost = [1 - max(torch.sigmoid(logits[cell]) for cell in cells) for cells in (
        _cells_of(labels, k, logits.shape, stride) for k in counted) if cells]
    return logits.sum() * 0 + sum(sum(part) / len(part) for part in (stray, lost) if part)


def overlaps(pred_map, true_map):
    """(n_pred, n_true) intersections and unions, one pair of masks at a time."""
    preds = [pred_map == k for k in np.unique(pred_map) if k]
    trues = [true_map == k for k in np.unique(true_map) if k]
    both = np.array([[(p & t).sum() for t in trues] for p in preds]).reshape(len(preds), len(trues))
    any_ = np.array([[(p | t).sum() for t in trues] for p in preds]).reshape(both.shape)
    return both, any_, [p.sum() for p in preds], [t.sum() for t in trues]


def segmentation(pred_map, true_map):
    both, any_, pred_area, true_area = overlaps(pred_map, true_map)
    n_pred, n_true = both.shape
    iou = both / any_ if both.size else np.zeros(both.shape)
    rows, columns = linear_sum_assignment(-iou)
    total = iou[rows, columns].sum()
    rows, columns = linear_sum_assignment(-(iou >= 0.5).astype(float))
    tp = int((iou[rows, columns] >= 0.5).sum())
    intersection = union = 0
    used = set()
    for j in range(n_true):
        i = int(np.argmax(iou[:, j])) if n_pred else -1
        if i < 0 or iou[i, j] == 0:
            union += true_area[j]
            continue
        used.add(i)
        intersection += both[i, j]
        union += any_[i, j]
    union += sum(area for i, area in enumerate(pred_area) if i not in used)

    def share(a, b):
        return a / b if b else 0.0

    return {
        "mean_iou": share(total, n_true),
        "ap50": share(tp, n_pred + n_true - tp),
        "pq": share(iou[iou > 0.5].sum(), (n_pred + n_true) / 2),
        "aji": share(intersection, union),
    }


def matched_points(pred, true, sigma):
    """Size of the largest one-to-one matching within sigma, by a dense assignment."""
    near = np.array([[math.dist(p, t) <= sigma for t in true] for p in pred], dtype=float)
    if near.size == 0:
        return 0
    rows, columns = linear_sum_assignment(-near)
    return int(near[rows, columns].sum())
