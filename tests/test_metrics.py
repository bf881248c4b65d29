"""Statements about the metrics: worked examples, and dense versions on random maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from xmask.metrics import (
    counting,
    localization,
    localization_total,
    overlapping_iou_sum,
    segmentation,
    segmentation_total,
)
from xmask.nnec import Incidence

MAIN = ("mean_iou", "ap50", "pq", "aji")


def random_maps(seed, shape, count):
    """Two related label maps of discs and noise, with labels that are not consecutive."""
    rng = np.random.default_rng(seed)
    maps = []
    centres = rng.uniform(0, shape, (count, 2))
    for _ in range(2):
        y, x = np.mgrid[:shape[0], :shape[1]]
        label_map = np.zeros(shape, np.int32)
        for k, (cy, cx) in enumerate(centres + rng.normal(0, 1.5, centres.shape)):
            if rng.random() < 0.85:
                label_map[(y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(1, 40)] = 3 * k + 2
        label_map[rng.random(shape) < 0.1] = 0
        maps.append(label_map)
    return maps


def test_counting_worked_by_hand():
    values = counting([10, 20, 3], [12, 20, 0])
    assert values["mae"] == pytest.approx(5 / 3)
    assert values["rmse"] == pytest.approx(np.sqrt(13 / 3))
    assert values["nae"] == pytest.approx((2 / 12 + 0) / 2)  # the empty image has no share
    assert counting([1], [0])["nae"] is None


@pytest.mark.parametrize("pred, true", [([1, 2], [1]), ([], [])])
def test_counting_refuses_lists_that_do_not_pair_up(pred, true):
    with pytest.raises(ValueError, match="image"):
        counting(pred, true)


@pytest.mark.parametrize("points", [np.zeros((2, 5)), [[1.0, np.nan]], [[np.inf, 0.0]], [1.0, 2.0]])
def test_points_and_counts_that_are_no_numbers_are_refused(points):
    for pred, true in ((points, np.zeros((1, 2))), (np.zeros((1, 2)), points)):
        with pytest.raises(ValueError, match="points: "):
            localization(pred, true, 4.0)
    with pytest.raises(ValueError, match="counts are NaN"):
        counting([np.nan], [3])


def test_localization_worked_by_hand():
    true = [[0.0, 0.0], [10.0, 0.0]]
    pred = [[3.0, 4.0], [1.0, 0.0], [50.0, 50.0]]  # the first two both want the first head
    values = localization(pred, true, 5.0)
    assert (values["matched"], values["n_pred"], values["n_true"]) == (1, 3, 2)
    assert values["precision"] == pytest.approx(1 / 3)
    assert values["recall"] == pytest.approx(1 / 2)
    assert values["f1"] == pytest.approx(2 / 5)


def test_localization_matches_as_many_as_possible_not_the_nearest_first():
    # Nearest first would pair (4) with (5) and leave (8) alone.
    values = localization([[4.0, 0], [8.0, 0]], [[0.0, 0], [5.0, 0]], 4.0)
    assert values["matched"] == 2


def test_exactly_sigma_apart_is_a_match_and_the_same_place_is():
    assert localization([[3.0, 4.0]], [[0.0, 0.0]], 5.0)["matched"] == 1
    assert localization([[3.0, 4.0]], [[3.0, 4.0]], 0.0)["matched"] == 1
    assert localization([[3.0, 4.0]] * 2, [[3.0, 4.0]] * 2, 4.0)["matched"] == 2


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.integers(0, 25), st.floats(0, 12))
def test_localization_equals_a_dense_assignment(seed, n_pred, n_true, sigma):
    rng = np.random.default_rng(seed)
    pred, true = rng.uniform(0, 40, (n_pred, 2)), rng.uniform(0, 40, (n_true, 2))
    matched = localization(pred, true, sigma)["matched"]
    assert matched == reference.matched_points(pred, true, sigma)


def test_localization_of_nothing():
    nothing = np.zeros((0, 2))
    assert localization(nothing, nothing, 4.0)["f1"] == 1.0
    for pred, true in ((nothing, [[1.0, 1.0]]), ([[1.0, 1.0]], nothing)):
        values = localization(pred, true, 4.0)
        assert values["precision"] == values["recall"] == values["f1"] == 0.0
    with pytest.raises(ValueError, match="sigma"):
        localization(nothing, nothing, -1.0)


def test_localization_of_a_data_set_sums_heads_not_shares():
    total = localization_total([
        localization([[0.0, 0.0]], [[0.0, 0.0]], 4.0),
        localization(np.zeros((0, 2)), [[0.0, 0.0], [9.0, 9.0], [20.0, 20.0]], 4.0)])
    assert total["recall"] == pytest.approx(1 / 4) and total["precision"] == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 14))
def test_segmentation_equals_dense_hungarian(seed, count):
    pred, true = random_maps(seed, (24, 28), count)
    values, expected = segmentation(pred, true), reference.segmentation(pred, true)
    for name in MAIN:
        assert values[name] == pytest.approx(expected[name], abs=1e-9), name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_segmentation_of_noise_equals_dense_hungarian(seed, n_pred, n_true):
    # Every instance overlaps every other: the matching has real choices to make.
    rng = np.random.default_rng(seed)
    pred, true = rng.integers(0, n_pred + 1, (6, 7)), rng.integers(0, n_true + 1, (6, 7))
    values, expected = segmentation(pred, true), reference.segmentation(pred, true)
    for name in MAIN:
        assert values[name] == pytest.approx(expected[name], abs=1e-9), name


def test_segmentation_worked_by_hand():
    true = np.zeros((4, 8), int)
    true[:, 0:2], true[:, 4:8] = 1, 2  # 8 and 16 pixels
    pred = np.zeros((4, 8), int)
    pred[:, 0:3], pred[:2, 4:8] = 7, 9  # 12 pixels, IoU 8/12; 8 pixels, IoU exactly 1/2
    pred[3, 7] = 4  # one pixel on its own
    values = segmentation(pred, true)
    assert values["mean_iou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert values["ap50"] == pytest.approx(2 / (2 + 1 + 0))
    assert values["pq"] == pytest.approx((2 / 3) / (1 + 2 / 2 + 1 / 2))  # 1/2 is not above 1/2
    assert values["aji"] == pytest.approx((8 + 8) / (12 + 16 + 1))
    assert (values["n_true"], values["n_pred"]) == (2, 3)


def test_matching_takes_the_larger_total_not_the_largest_pair():
    # IoU: second with first 6/14, second with second 4/10, first with first 4/10.
    true = np.array([[1] * 10 + [2] * 4])
    pred = np.array([[1] * 4 + [2] * 10])
    assert segmentation(pred, true)["iou_sum"] == pytest.approx(0.8)


def test_two_halves_are_one_match_at_one_half():
    true, pred = np.ones((2, 4), int), np.array([[1, 1, 2, 2]] * 2)
    assert segmentation(pred, true)["ap50"] == pytest.approx(1 / 2)


def test_a_perfect_map_scores_one_whatever_the_labels():
    true = random_maps(0, (30, 30), 9)[0]
    renamed = np.where(true > 0, 1000 - true, 0)
    values = segmentation(renamed, true)
    assert all(values[name] == pytest.approx(1.0) for name in MAIN)


def test_segmentation_of_nothing_is_zero_and_goes_into_json():
    empty, one = np.zeros((5, 5), int), np.eye(5, dtype=int)
    for pred, true in ((empty, empty), (one, empty), (empty, one)):
        values = segmentation(pred, true)
        assert all(values[name] == 0.0 for name in MAIN)
        json.dumps(values, allow_nan=False)
    assert segmentation(one, empty)["aji_union"] == 5


def test_segmentation_of_a_data_set_is_summed_before_dividing():
    full, empty = np.ones((4, 4), int), np.zeros((4, 4), int)
    four = np.repeat(np.repeat([[1, 2], [3, 4]], 2, 0), 2, 1)
    images = [segmentation(full, full), segmentation(empty, four), segmentation(empty, empty)]
    total = segmentation_total(images)
    assert total["mean_iou"] == pytest.approx(1 / 5)
    assert total["ap50"] == pytest.approx(1 / 5)
    assert total["pq"] == pytest.approx(1 / (1 + 4 / 2))
    assert total["aji"] == pytest.approx(16 / 32)
    assert segmentation_total(images[:1]) == images[0]
    json.dumps(total, allow_nan=False)


def incidences(label_map):
    """The masks of a label map as an incidence list, one head for each label up to the largest."""
    pixel = np.flatnonzero(label_map)
    head = label_map.reshape(-1)[pixel] - 1
    order = np.argsort(head, kind="stable")
    return pairs(head[order].astype(np.int64), pixel[order], label_map)


def pairs(head, pixel, label_map):
    return Incidence(head, pixel, np.zeros(len(head)), label_map.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 14))
def test_masks_that_do_not_overlap_score_as_their_label_map(seed, count):
    pred, true = random_maps(seed, (24, 28), count)  # some labels, so some heads, have no pixel
    assert overlapping_iou_sum(incidences(pred), true) == pytest.approx(
        segmentation(pred, true)["iou_sum"], abs=1e-9)


def test_overlapping_masks_worked_by_hand():
    true = np.array([[0, 5, 5, 5, 9, 9, 9, 0]])
    masks = [range(4), range(1, 6), range(3, 8)]
    head = np.repeat([0, 1, 2], [4, 5, 5])
    pixel = np.concatenate(masks)
    # IoU with 5: 3/4, 3/5, 1/7; with 9: 0, 2/6, 3/5. Best: first with 5, third with 9.
    assert overlapping_iou_sum(pairs(head, pixel, true), true) == pytest.approx(3 / 4 + 3 / 5)
    # Without the first, the second with 5. Masks keep all their pixels, shared ones too.
    rest = head > 0
    fewer = pairs(head[rest], pixel[rest], true)
    assert overlapping_iou_sum(fewer, true) == pytest.approx(3 / 5 + 3 / 5)


def test_of_equal_masks_one_counts():
    true = np.array([[1, 1, 1, 0]])
    head, pixel = np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)
    assert overlapping_iou_sum(pairs(head, pixel, true), true) == pytest.approx(1.0)


def test_overlapping_masks_of_no_heads_or_no_instances_reach_nothing():
    nothing = np.zeros(0, np.int64)
    true = np.eye(5, dtype=int)
    assert overlapping_iou_sum(pairs(nothing, nothing, true), true) == 0.0
    assert overlapping_iou_sum(pairs(nothing, nothing, true), 0 * true) == 0.0
    some = pairs(np.array([0, 0, 1]), np.array([0, 6, 6]), true)
    assert overlapping_iou_sum(some, 0 * true) == 0.0


def test_tensors_and_any_integer_type_are_accepted():
    pred, true = random_maps(1, (20, 20), 6)
    values = segmentation(torch.from_numpy(pred), true.astype(np.uint16))
    assert values == segmentation(pred, true)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shape"):
        segmentation(np.zeros((4, 4), int), np.zeros((4, 5), int))
    with pytest.raises(ValueError, match="label -1"):
        segmentation(np.full((2, 2), -1), np.zeros((2, 2), int))
