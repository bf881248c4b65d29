"""Dense versions of the method, as fast as dense goes: what the benchmark compares with.

Every head meets every pixel, as in the authors' released code; within that they are written
well: vectorised, without copies that nobody needs, and the decoder keeps a running minimum
instead of an N x H x W stack. The tests hold them to the slow references and to our own code.
Nothing else uses them.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from xmask.config import Loss
from xmask.decode import LONE_RADIUS
from xmask.features import sample_at, smooth


def radii(points: Tensor, shape: tuple[int, int], *, lone: float = 0.5) -> Tensor:
    """(N,) exclusion radii from the N x N distances."""
    if len(points) < 2:
        return torch.full((len(points),), lone * min(shape), dtype=torch.float64)
    distance = torch.cdist(points.double(), points.double(),
                           compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    return distance.amin(1).clamp(max=0.5 * min(shape)).clamp(min=3.0)


def squared_distance(point: Tensor, shape: tuple[int, int]) -> Tensor:
    """(..., H, W) squared distances from points (..., 2) to all pixels, float64."""
    x = torch.arange(shape[1], dtype=torch.float64) - point[..., 0, None].double()
    y = torch.arange(shape[0], dtype=torch.float64) - point[..., 1, None].double()
    return y.square()[..., :, None] + x.square()[..., None, :]


def incidences(points: Tensor, shape: tuple[int, int]) -> int:
    """Number of (head, pixel) pairs, from an N x H x W array of circles."""
    reach = radii(points, shape).square()[:, None, None]
    return int((squared_distance(points, shape) <= reach).sum())


@torch.no_grad()
def instance_map(embedding: Tensor, points: Tensor, *, threshold: float = 1.1,
                 geometry_weight: float = 0.8, sigma: float = 3.0, radius_of: Tensor | None = None
                 ) -> Tensor:
    """`xmask.decode.instance_map` with an energy of every pixel for every head.

    radius_of: (N,) radii of the points, for some heads of a larger crowd; None computes them.
    Heads at one place are not shared out: the benchmark has none.
    """
    shape = tuple(embedding.shape[-2:])
    features = smooth(embedding, sigma).permute(1, 2, 0).contiguous()
    reach = radii(points, shape, lone=LONE_RADIUS) if radius_of is None else radius_of
    centres = sample_at(features.permute(2, 0, 1), points)
    lowest = torch.full(shape, threshold)
    labels = torch.zeros(shape, dtype=torch.int32)
    for i, point in enumerate(points):
        squared = squared_distance(point, shape)
        energy = torch.linalg.vector_norm(features - centres[i], dim=2)
        energy += geometry_weight * (squared / reach[i].square()).float()
        better = (squared <= reach[i].square()) & (energy < lowest)
        lowest[better] = energy[better]
        labels[better] = i + 1
    return labels


def exclusivity_loss(embedding: Tensor, points: Tensor, label_map: Tensor, *, tau: float = 0.6,
                     margin: float = 0.1, sigma: float = 1.5, radius_of: Tensor | None = None
                     ) -> Tensor:
    """`xmask.losses.exclusivity_loss` with N x D x H x W differences, all heads at once."""
    shape = tuple(label_map.shape)
    features = smooth(embedding, sigma)
    reach = radii(points, shape) if radius_of is None else radius_of
    column, row = (points + 0.5).floor().long().unbind(1)
    label = label_map[row, column]
    chosen = label > 0
    points, label, reach = points[chosen], label[chosen], reach[chosen]
    inside = squared_distance(points, shape) <= reach.square()[:, None, None]
    same = label_map[None] == label[:, None, None]
    centres = sample_at(features, points)
    distance = torch.linalg.vector_norm(features[None] - centres[:, :, None, None], dim=1)

    def mean(cost: Tensor, region: Tensor) -> Tensor:
        return (cost * region).sum((1, 2)) / region.sum((1, 2)).clamp(min=1)

    pull = mean(torch.relu(distance - (tau - margin)), inside & same)
    push = mean(torch.relu((tau + Loss().push_margins * margin) - distance), inside & ~same)
    return (pull + push).mean()


def segmentation(pred_map: np.ndarray, true_map: np.ndarray) -> dict[str, float]:
    """mean_iou, ap50, pq and aji of `xmask.metrics.segmentation` from the full IoU matrix and
    Hungarian matchings; labels are consecutive, and there is at least one of either."""
    n_pred, n_true = int(pred_map.max()), int(true_map.max())
    joint = pred_map.astype(np.int64).ravel() * (n_true + 1) + true_map.ravel()
    counts = np.bincount(joint, minlength=(n_pred + 1) * (n_true + 1))
    counts = counts.reshape(n_pred + 1, n_true + 1)
    overlap = counts[1:, 1:]
    pred_area, true_area = counts.sum(1)[1:], counts.sum(0)[1:]
    union = pred_area[:, None] + true_area[None] - overlap
    iou = overlap / union
    i, j = linear_sum_assignment(iou, maximize=True)
    fifty = iou >= 0.5
    a, b = linear_sum_assignment(fifty, maximize=True)
    tp = int(fifty[a, b].sum())
    serves = iou.argmax(0)
    met = iou[serves, np.arange(n_true)] > 0
    chosen = serves[met], np.flatnonzero(met)
    idle = np.setdiff1d(np.arange(n_pred), chosen[0])
    return {
        "mean_iou": float(iou[i, j].sum() / n_true),
        "ap50": tp / (n_pred + n_true - tp),
        "pq": float(iou[iou > 0.5].sum() / ((n_pred + n_true) / 2)),
        "aji": float(overlap[chosen].sum() / (
            union[chosen].sum() + true_area[~met].sum() + pred_area[idle].sum())),
    }
