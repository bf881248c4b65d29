"""Counting, localisation and segmentation metrics as pure functions: paper section on evaluation.

Label maps hold 0 for background and k > 0 for an instance; labels need not be consecutive.
Overlaps are sparse, so that images with thousands of heads cost no more than their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from xmask.nnec import Incidence, point_tensor

# What `segmentation` adds up, in this order.
_SUMS = ("iou_sum", "n_true", "n_pred", "tp50", "pq_iou_sum", "pq_tp", "aji_intersection",
         "aji_union")


def counting(pred: Sequence[float], true: Sequence[float]) -> dict[str, float | None]:
    """Errors of the counts of a data set.

    pred, true: (n,) counts, one per image; of a `decode.Prediction` its `count`.
    Returns
    - mae: mean absolute error, mean |pred - true|;
    - rmse: root of the mean squared error (called MSE in this field);
    - nae: normalised absolute error, mean |pred - true| / true over the images with true > 0,
      None if there are none.
    Raises ValueError if there are no images, the lengths differ, or a count is not finite."""
    pred = np.asarray(pred, dtype=np.float64).reshape(-1)
    true = np.asarray(true, dtype=np.float64).reshape(-1)
    if len(pred) != len(true) or len(true) == 0:
        raise ValueError(
            f"counting: {len(pred)} predicted and {len(true)} true counts; "
            "give one of each for every image, and at least one image")
    if not (np.isfinite(pred).all() and np.isfinite(true).all()):
        raise ValueError("counting: some counts are NaN or infinite; give numbers of heads")
    error = np.abs(pred - true)
    some = true > 0
    return {"mae": float(error.mean()), "rmse": float(np.sqrt((error**2).mean())),
            "nae": float((error[some] / true[some]).mean()) if some.any() else None}


def localization(pred_points: Any, true_points: Any, sigma: float) -> dict[str, float]:
    """One-to-one matching of predicted to true heads at most `sigma` pixels apart.

    pred_points, true_points: (N, 2) and (M, 2), (x, y) pixels; of a `decode.Prediction` its
    `heads`. The number of pairs is maximal.
    Returns
    - precision: matched / n_pred; recall: matched / n_true; f1: their harmonic mean. Nothing
      predicted and nothing there is perfect (1.0 each); otherwise a share of nothing is 0.0;
    - the counts behind them, for `localization_total`: matched, n_pred, n_true.
    Raises ValueError if sigma is negative or points are not finite (N, 2)."""
    if not sigma >= 0:
        raise ValueError(f"sigma: found {sigma}; give a distance in pixels, 0 or more")
    pred, true = (point_tensor(_numpy(p))[0].numpy() for p in (pred_points, true_points))
    matched = 0
    if len(pred) and len(true):
        pairs = cKDTree(pred).sparse_distance_matrix(cKDTree(true), sigma, output_type="ndarray")
        matched = _matching_size(pairs["i"], pairs["j"], (len(pred), len(true)))
    return _localization_values(matched, len(pred), len(true))


def localization_total(images: Iterable[dict[str, float]]) -> dict[str, float]:
    """`localization` of a data set, from the dicts of its images: counts summed, then shares."""
    images = list(images)
    return _localization_values(*(
        sum(int(image[key]) for image in images) for key in ("matched", "n_pred", "n_true")))


def segmentation(pred_map: Any, true_map: Any) -> dict[str, float]:
    """Instance segmentation of one image.

    pred_map, true_map: (H, W) int label maps (arrays or tensors); of a `decode.Prediction` its
    `instances`, the masks of all points, counted or not (as the authors' release evaluates).
    Returns
    - mean_iou: IoU summed over the one-to-one matching of predicted to true instances that makes
      this sum largest (Hungarian), divided by the number of true instances (paper);
    - ap50: TP / (TP + FP + FN) of a largest matching at IoU >= 0.5, StarDist's average precision;
    - pq: panoptic quality of the one class, IoU summed over pairs with IoU > 0.5 (unique by
      themselves), divided by TP + FP / 2 + FN / 2;
    - aji: aggregated Jaccard index: each true instance with the predicted one of highest IoU
      (lowest label on ties; one may serve several), intersections summed, divided by the summed
      unions plus the pixels of predicted instances that served none;
    - the sums behind them, for `segmentation_total`.
    A value whose denominator is 0 (no instances) is 0.0.
    Raises ValueError if the shapes differ or a label is negative."""
    pred, true = _numpy(pred_map), _numpy(true_map)
    if pred.shape != true.shape:
        raise ValueError(
            f"segmentation: label maps of shape {pred.shape} (predicted) and {true.shape} (true); "
            "bring them to the same size, nearest neighbour")
    pred, true, length = _runs(pred.reshape(-1), true.reshape(-1))
    pred, pred_area = _compact(pred, "pred_map", length)
    true, true_area = _compact(true, "true_map", length)
    shape = n_pred, n_true = len(pred_area), len(true_area)
    i, j, overlap = _overlaps(pred, true, length, shape)
    union = pred_area[i] + true_area[j] - overlap
    iou = overlap / union
    best, fifty, above = _best_pairs(i, j, iou, shape), iou >= 0.5, iou > 0.5

    # Highest IoU per true instance, of equal ones the lowest predicted label.
    order = np.lexsort((i, -iou, j))
    served, first = np.unique(j[order], return_index=True)
    chosen = order[first]
    unmet = np.setdiff1d(np.arange(n_true), served)
    idle = np.setdiff1d(np.arange(n_pred), i[chosen])
    together = union[chosen].sum() + true_area[unmet].sum() + pred_area[idle].sum()
    return _segmentation_values(dict(zip(_SUMS, (
        float(iou[best].sum()), n_true, n_pred, _matching_size(i[fifty], j[fifty], shape),
        float(iou[above].sum()), int(above.sum()), int(overlap[chosen].sum()), int(together)))))


def overlapping_iou_sum(masks: Incidence, true_map: np.ndarray) -> float:
    """IoU summed over the best one-to-one matching, for predicted masks that may overlap.

    masks: pairs of arrays, mask of head i covers pixel u. true_map: (H, W) int label map.
    It serves the baseline of equal discs."""
    flat = np.asarray(true_map).reshape(-1)
    true, _, length = _runs(flat, flat)
    true, true_area = _compact(true, "true_map", length)
    area = np.bincount(masks.head) if len(masks) else np.zeros(0, np.int64)
    shape, ones = (len(area), len(true_area)), np.ones(len(masks), np.int64)
    i, j, overlap = _overlaps(masks.head, np.repeat(true, length)[masks.pixel], ones, shape)
    iou = overlap / (area[i] + true_area[j] - overlap)
    return float(iou[_best_pairs(i, j, iou, shape)].sum())


def segmentation_total(images: Iterable[dict[str, float]]) -> dict[str, float]:
    """`segmentation` of a data set, from the dicts of its images.

    Sums are added first: mean_iou is the matched IoU of all images divided by the number of true
    instances in all images (paper), not a mean over images; likewise ap50, pq and aji."""
    images = list(images)
    return _segmentation_values({key: sum(image[key] for image in images) for key in _SUMS})


def _localization_values(matched: int, n_pred: int, n_true: int) -> dict[str, float]:
    counts = {"matched": matched, "n_pred": n_pred, "n_true": n_true}
    if n_pred == n_true == 0:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0, **counts}
    return {"precision": _share(matched, n_pred), "recall": _share(matched, n_true),
            "f1": _share(2 * matched, n_pred + n_true), **counts}


def _segmentation_values(sums: dict[str, float]) -> dict[str, float]:
    n_true, n_pred, tp = sums["n_true"], sums["n_pred"], sums["tp50"]
    return {"mean_iou": _share(sums["iou_sum"], n_true),
            "ap50": _share(tp, n_pred + n_true - tp),
            "pq": _share(sums["pq_iou_sum"], (n_pred + n_true) / 2),  # TP + FP/2 + FN/2
            "aji": _share(sums["aji_intersection"], sums["aji_union"]), **sums}


def _runs(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of pixels that agree in both maps, far fewer than pixels: labels in either, length."""
    if len(pred) == 0:
        return pred, true, np.zeros(0, np.int64)
    changes = (pred[1:] != pred[:-1]) | (true[1:] != true[:-1])
    start = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return pred[start], true[start], np.diff(start, append=len(pred))


def _overlaps(pred: np.ndarray, true: np.ndarray, length: np.ndarray, shape: tuple[int, int]
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of instances that overlap, (i, j) sorted, and their common pixels.

    pred, true: instance of each run of pixels, -1 for none. shape: numbers of instances."""
    both = (pred >= 0) & (true >= 0)
    table = coo_array((length[both], (pred[both], true[both])), shape=shape).tocsr()
    table.sum_duplicates()  # and sorts the columns of a row
    i = np.repeat(np.arange(shape[0]), np.diff(table.indptr))
    return i, table.indices.astype(np.int64), table.data


def _best_pairs(i: np.ndarray, j: np.ndarray, iou: np.ndarray, shape: tuple[int, int]
                ) -> np.ndarray:
    """Positions in (i, j) of the one-to-one pairs with the largest total IoU.

    A full matching of rows exists once every row has a dummy column of its own. Costs are 2 - IoU
    and 2 for a dummy, because the sparse solver takes a stored zero for no edge."""
    # Edges that meet no other edge are pairs already.
    lonely = (np.bincount(i, minlength=shape[0])[i] == 1) & (
        np.bincount(j, minlength=shape[1])[j] == 1)
    met = np.flatnonzero(~lonely)
    if len(met) == 0:
        return np.flatnonzero(lonely)
    left, i = np.unique(i[met], return_inverse=True)
    right, j = np.unique(j[met], return_inverse=True)
    rows, columns = len(left), len(right)
    alone = np.arange(rows)
    graph = csr_array(
        (np.concatenate([2 - iou[met], np.full(rows, 2.0)]),
         (np.concatenate([i, alone]), np.concatenate([j, columns + alone]))),
        shape=(rows, columns + rows))
    row, column = min_weight_full_bipartite_matching(graph)
    real = column < columns
    key = i * columns + j  # sorted, as the pairs are
    chosen = np.searchsorted(key, row[real].astype(np.int64) * columns + column[real])
    return np.sort(np.concatenate([np.flatnonzero(lonely), met[chosen]]))


def _matching_size(i: np.ndarray, j: np.ndarray, shape: tuple[int, int]) -> int:
    """Number of pairs in a maximum one-to-one matching of the edges (i, j)."""
    if len(i) == 0:
        return 0
    graph = csr_array((np.ones(len(i), dtype=np.int8), (i, j)), shape=shape)
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _compact(labels: np.ndarray, name: str, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the instance of each run of pixels, -1 for background; and the instances' areas."""
    found, index = np.unique(labels, return_inverse=True)
    if len(found) and found[0] < 0:
        raise ValueError(f"{name}: found label {found[0]}; 0 is background, instances are 1 and up")
    background = int(len(found) > 0 and found[0] == 0)
    area = np.bincount(index, length, minlength=len(found)).astype(np.int64)
    return index - background, area[background:]


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
