"""Evaluation: predictions at the image's own size, metrics that add up, honest baselines."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_transforms import scene
from tests.test_trainer import tiny
from xmask import files, model
from xmask.config import override
from xmask.data.sample import Sample
from xmask.decode import Prediction
from xmask.predict import predict_image
from xmask.study import evaluate
from xmask.tools.models import load_network


class Images(list):
    synthetic = True

    @property
    def ids(self):
        return [f"IMG_{i}" for i in range(len(self))]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return model.build(tiny().network)[0].eval()


@pytest.mark.parametrize("changes", [{}, {"evaluation.peaks": True, "evaluation.scale": 1.25,
                                          "evaluation.count_threshold": 0.65}])
def test_the_error_that_selects_is_that_of_the_predicted_counts(network, changes):
    decoding = override(tiny(), changes).evaluation
    samples = [scene(i, (64, 48)) for i in range(3)]
    errors = [predict_image(network, s.image, decoding).count - len(s.points) for s in samples]
    assert evaluate.count_error(network, samples, decoding) == np.abs(errors).mean() > 0


@pytest.mark.parametrize("shape", [(1, 1), (31, 50), (64, 64), (65, 33)])
def test_a_prediction_has_the_size_of_the_image(network, shape):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    prediction = predict_image(network, image, tiny().evaluation)
    assert prediction.instances.shape == shape
    assert len(prediction.points) == len(prediction.scores)
    assert (prediction.points <= np.array(shape[::-1]) - 1).all()
    assert prediction.instances.max() <= len(prediction.points)


def test_what_metrics_json_holds_agrees_with_the_predictions_on_disk(network, tmp_path):
    images = Images([scene(1), scene(2, people=0), scene(3, people=5)])
    result = evaluate.evaluate(network, images, tiny(), tmp_path, progress=False)
    files.write_json(tmp_path / "metrics.json", result)
    rows = result["per_image"]
    assert [row["true_count"] for row in rows] == [12, 0, 5]
    for row in rows:
        lines = (tmp_path / "predictions" / f"{row['name']}.csv").read_text().splitlines()
        assert lines[0] == "x,y,score,counted"
        assert sum(line.endswith(",1") for line in lines[1:]) == row["count"]
    errors = [abs(row["count"] - row["true_count"]) for row in rows]
    assert result["counting"]["mae"] == pytest.approx(np.mean(errors))
    assert result["baselines"]["constant_count"] == pytest.approx({
        "value": 5.0, "mae": 4.0, "rmse": (74 / 3) ** 0.5, "mean": 17 / 3,
        "mean_rmse": np.std([12, 0, 5])})
    assert result["selection"] == "last" and result["synthetic"] is True
    assert rows[1]["mean_iou"] is None


def test_places_keep_their_fractions_in_wide_images(tmp_path):
    prediction = Prediction(np.array([[12345.5, 2.25]]), np.array([0.75]),
                            np.ones((4, 4), np.int32), np.array([True]))
    evaluate._write_prediction(tmp_path, "wide", prediction)
    assert (tmp_path / "wide.csv").read_text() == "x,y,score,counted\n12345.5,2.25,0.75,1\n"


def test_uncounted_points_have_masks_and_are_no_heads(network, tmp_path):
    low = override(tiny(), {"evaluation.point_threshold": 0.0001,
                            "evaluation.count_threshold": 0.999})
    result = evaluate.evaluate(network, Images([scene(1)]), low, tmp_path, progress=False)
    assert result["per_image"][0]["count"] == result["localization"]["4"]["n_pred"] == 0
    assert result["segmentation"]["mean_iou"] > 0


def test_counts_are_reported_with_calibration_and_without(network, tmp_path):
    images = Images([scene(i, people=2 + i) for i in range(1, 13)])
    seen = evaluate.look(network, images, tiny().evaluation, progress=False)
    assert [true for _, true in seen] == [len(s.points) for s in images]
    found = evaluate.calibrate(seen, tiny())
    result = evaluate.evaluate(network, images, tiny(), tmp_path, calibrated=found, progress=False)
    rows = result["per_image"]
    assert abs(sum(r["count"] - r["true_count"] for r in rows)) <= 1  # made right on these images
    plain = evaluate.evaluate(network, images, tiny(), tmp_path, progress=False)
    assert result["counting_uncalibrated"] == plain["counting"]
    assert plain["counting_uncalibrated"] is None is plain["interval"]
    inside = [r["low"] <= r["true_count"] <= r["high"] for r in rows]
    assert result["interval"]["coverage"] == pytest.approx(np.mean(inside))
    assert result["interval"]["wanted"] == 0.9
    matched = sum(r["matched"]["8"] for r in rows)
    assert matched == result["localization"]["8"]["matched"]


@pytest.mark.parametrize("peaks", [False, True])
def test_without_images_to_spare_as_many_heads_are_counted_as_the_network_expects(network, peaks):
    config = override(tiny(), {"evaluation.peaks": peaks})
    images = Images([scene(i, people=2 + i) for i in range(1, 9)])
    found = evaluate.calibrate_by_expectation(network, images, config, progress=False)
    blind = Images([Sample(s.image, s.points[:0]) for s in images])  # dots are not read
    assert found == evaluate.calibrate_by_expectation(network, blind, config, progress=False)
    assert found.factor is found.mae is found.mae_before is None and found.images == len(images)

    every = override(tiny(), {"evaluation.peaks": False}).evaluation
    expected = sum((1 / (1 + 2 * np.exp(-cells.astype(float)))).sum()
                   for cells, _ in evaluate.look(network, images, every, progress=False))

    def miscounted(decoding):
        counted = sum(predict_image(network, s.image, decoding).count for s in images)
        return abs(counted - expected) / expected

    after = miscounted(found.applied(config.evaluation))
    assert after < miscounted(config.evaluation)
    assert peaks or after < 0.01  # an untrained network has fewer peaks than it expects heads


def test_a_calibration_sees_images_as_large_as_a_prediction_does(network):
    large = override(tiny(), {"evaluation.scale": 1.5, "evaluation.point_threshold": 0.5,
                              "evaluation.count_threshold": 0.5}).evaluation
    images = Images([scene(1)])
    (logits, true), = evaluate.look(network, images, large, progress=False)
    height, width = images[0].shape
    assert logits.shape == (-(-round(1.5 * height) // 4), -(-round(1.5 * width) // 4))
    counted = predict_image(network, images[0].image, large).count
    assert true == len(images[0].points) and counted == (logits > 0).sum()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30), st.floats(0, 3000))
def test_no_constant_count_beats_the_median_in_mae_or_the_mean_in_rmse(true, other):
    true = np.array(true)
    best, rival = evaluate.best_constant_count(true), np.abs(true - other)
    assert best["mae"] <= rival.mean() + 1e-6
    assert best["mean_rmse"] <= (rival**2).mean() ** 0.5 + 1e-6
    assert best["mae"] <= best["rmse"] + 1e-6 and best["mean_rmse"] <= best["rmse"] + 1e-6


def test_without_truth_masks_nothing_is_said_of_masks(network, tmp_path):
    bare = Images([Sample(s.image, s.points) for s in (scene(1), scene(2))])
    result = evaluate.evaluate(network, bare, tiny(), tmp_path, progress=False)
    assert result["segmentation"] is None
    assert result["baselines"]["fixed_disc"] is result["baselines"]["exclusive_disc"] is None


def drawn_discs(points, radius, shape=(60, 80)):
    """True heads as equal discs; a contested pixel belongs to the nearest point."""
    y, x = np.mgrid[:shape[0], :shape[1]]
    squared = np.array([(x - px) ** 2 + (y - py) ** 2 for px, py in points])
    return np.where(squared.min(0) <= radius**2, squared.argmin(0) + 1, 0).astype(np.int32)


def test_the_best_fixed_disc_finds_the_radius_of_discs_that_are_far_apart():
    # Half the least distance is 14.1 px: up to there, whole and exclusive discs are the same.
    points = np.array([[20, 20], [60, 30], [20, 50]], np.float32)
    truth = drawn_discs(points, 8)
    whole, exclusive = (evaluate.best_fixed_disc([points], [truth], exclusive=exclusive)
                        for exclusive in (False, True))
    assert whole == exclusive
    assert whole["radius"] == pytest.approx(8, rel=0.08) and whole["mean_iou"] > 0.85


def test_where_true_heads_cut_each_other_exclusive_discs_are_the_stricter_baseline():
    points = np.array([[30, 30], [40, 30], [50, 30]], np.float32)
    truth = drawn_discs(points, 8)
    whole, exclusive = (evaluate.best_fixed_disc([points], [truth], exclusive=exclusive)
                        for exclusive in (False, True))
    assert exclusive["radius"] == pytest.approx(8, rel=0.08)  # steps of 11%
    assert exclusive["mean_iou"] > max(0.85, whole["mean_iou"] + 0.05)


def test_discs_at_no_predicted_point_reach_nothing():
    nowhere, truth = np.zeros((0, 2), np.float32), drawn_discs([(20, 20)], 8)
    for exclusive in (False, True):
        assert evaluate.best_fixed_disc([nowhere], [truth], exclusive=exclusive)["mean_iou"] == 0.0


def test_a_file_that_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such model"):
        load_network(tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match="half.safetensors: not a model of this version"):
        load_network(tmp_path / "half.safetensors")
