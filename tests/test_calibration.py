"""The threshold makes the held-out total right, and the interval holds what it promises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmask import calibration
from xmask.calibration import Calibration, calibrate, spread
from xmask.config import Evaluation


def crowds(n, seed):
    """Images whose heads are drawn with the probability that their logits say."""
    rng = np.random.default_rng(seed)
    logits = [rng.normal(-3, 2, (12, 16)) for _ in range(n)]
    counts = [int((rng.random(one.shape) < 1 / (1 + np.exp(-one))).sum()) for one in logits]
    return logits, counts


def logit(probability):
    return math.log(probability / (1 - probability))


@given(st.integers(2, 12), st.integers(0, 1000), st.sampled_from([0.3, 0.5, 0.6]))
def test_the_threshold_goes_towards_a_right_total_as_far_as_the_images_agree(n, seed, before):
    logits, counts = crowds(n, seed)
    if sum(counts) == 0:
        return
    found = calibrate(logits, counts, 0.9, before)
    assert found.images == n and (found.factor is None) is (n < 9)

    def right(images):  # where the counts of some images are right together, by trying
        tried = np.sort(np.concatenate([logits[i].ravel() for i in images]))[::-1]
        total = sum(counts[i] for i in images)
        return (tried[total - 1] + tried[total]) / 2 if total else logit(before)

    everyone = list(range(n))
    one_less = [right([i for i in everyone if i != k]) for k in everyone]
    spread_of_all = (n - 1) / n * sum((x - np.mean(one_less)) ** 2 for x in one_less)
    share = (logit(found.threshold) - logit(before)) / (right(everyone) - logit(before))
    assert share == pytest.approx(0.32 ** 2 / (0.32 ** 2 + spread_of_all), rel=1e-6)


def test_images_that_agree_make_the_total_right_whatever_their_number():
    logits, _ = crowds(1, 3)
    counts = [int((logits[0] > 0.7).sum())]
    found = calibrate(3 * logits, 3 * counts, 0.9, 0.5)
    assert (logits[0] > logit(found.threshold)).sum() == counts[0]
    assert found.mae == 0 < found.mae_before


def test_counting_too_many_is_repaired_and_both_errors_are_said():
    logits, _ = crowds(40, 1)
    counts = [int((one > 1).sum()) for one in logits]  # a network that is sure too early
    found = calibrate(logits, counts, 0.9, 0.5)
    at_half = np.abs([(one > 0).sum() - n for one, n in zip(logits, counts)])
    assert found.mae_before == pytest.approx(at_half.mean())
    assert found.mae < found.mae_before


def test_intervals_cover_new_images_as_often_as_they_promise():
    inside = []
    for seed in range(20):
        found = calibrate(*crowds(30, 100 + seed), 0.8, 0.5)
        logit = math.log(found.threshold / (1 - found.threshold))
        for one, true in zip(*crowds(30, 200 + seed)):
            low, high = found.interval(int((one > logit).sum()), spread(one))
            assert 0 <= low <= high
            inside.append(low <= true <= high)
    assert 0.78 <= np.mean(inside) <= 0.92


def test_an_unsure_network_gives_a_wider_interval():
    found = Calibration(0.6, 2.0, 0.9, 20, 1.0, 2.0)
    sure, unsure = np.full((8, 8), 9.0), np.zeros((8, 8))
    narrow, wide = (np.diff(found.interval(40, spread(x))) for x in (sure, unsure))
    assert narrow < wide
    assert Calibration(0.6, None, 0.9, 5, 1.0, 2.0).interval(40, 3.0) == (None, None)
    assert spread(np.full((3, 3), -50.0)) == pytest.approx(1)


def test_a_counted_point_has_a_mask_whatever_the_threshold():
    for threshold, point in ((0.3, 0.3), (0.7, 0.5)):
        decoding = Calibration(threshold, 1.0, 0.9, 9, 1, 1).applied(Evaluation(point_threshold=0.5))
        assert decoding.count_threshold == threshold and decoding.point_threshold == point


def test_it_travels_as_json_and_anything_else_is_refused():
    found = Calibration(0.6, 2.0, 0.9, 20, 1.0, 2.0)
    assert calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert calibration.from_dict(None) is None
    for wrong in ([], {}, {"threshold": 1}, found.to_dict() | {"threshold": 2},
                  found.to_dict() | {"factor": -1}, found.to_dict() | {"threshold": "x"}):
        with pytest.raises(ValueError, match="calibration"):
            calibration.from_dict(wrong)


def test_one_image_is_too_little_to_calibrate_by():
    with pytest.raises(ValueError, match="calibration: 1 images held out"):
        calibrate([np.zeros((4, 4))], [3], 0.9, 0.5)


def test_empty_scenes_leave_the_threshold_as_it_was():
    empty, one = np.full((4, 4), -3.0), np.where(np.eye(4) > 0, 2.0, -3.0)
    assert calibrate([empty, empty], [0, 0], 0.9, 0.6).threshold == pytest.approx(0.6)
    found = calibrate([empty, empty, one], [0, 0, 4], 0.9, 0.6)  # others of the third hold nobody
    assert found.mae == found.mae_before == 0


def test_how_far_thresholds_usually_lie_from_a_half_is_read_from_the_study():
    folder = Path(__file__).parents[1] / "results" / "full" / "runs"
    moved = [logit(json.loads(path.read_text())["threshold"])
             for path in folder.glob("*/calibrated.json")]
    assert len(moved) >= 43
    assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(calibration.USUAL, abs=0.03)
