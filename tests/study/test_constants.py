"""Constants moved alone: decoding as prediction does it, pairs of runs, the picture."""

import json

import numpy as np
import pytest

import xmask
from xmask import metrics
from xmask.config import override
from xmask.predict import predict_image
from xmask.presets import preset
from xmask.study import constants
from xmask.synthetic import draw_scene

CONFIG = preset("full", "sha", 10, seed=1)


class Scenes(list):
    """Three drawn test images, one of them empty."""

    ids = ("a", "b", "c")


SCENES = Scenes(draw_scene(seed, shape=(96, 128), people=people)
                for seed, people in ((5, 6), (6, 0), (7, 12)))


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_decoding_again_is_what_a_prediction_does(scale):
    network = xmask.load("drawn", device="cpu").network
    usual = override(CONFIG, {"evaluation.scale": scale}).evaluation
    (errors, overlap), (_, wide), (_, circles), (_, one_circle) = constants.decoded(
        network, usual, [("evaluation.theta", usual.theta), ("evaluation.theta", 1.3),
                         ("evaluation.nnec", True), ("evaluation.nnec", False)], SCENES, progress=False)
    np.testing.assert_array_equal(circles, overlap)
    assert not np.allclose(overlap, one_circle, equal_nan=True)
    for scene, error, iou in zip(SCENES, errors, overlap):
        seen = predict_image(network, scene.image, usual)
        assert error == abs(seen.count - len(scene.points))
        if len(scene.points):
            assert iou == pytest.approx(
                100 * metrics.segmentation(seen.instances, scene.instances)["mean_iou"])
        else:
            assert np.isnan(iou)
    assert not np.allclose(overlap, wide, equal_nan=True)


def write_run(results, config, error, iou):
    folder = results / "runs" / config.run
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"per_image": [
        {"name": "a", "count": 10 + error, "true_count": 10, "mean_iou": iou},
        {"name": "b", "count": 0, "true_count": 0, "mean_iou": None}]}))


def test_a_value_is_compared_on_the_seeds_that_both_have(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, preset("full", "sha", 10, seed=seed), 4, 0.4)
    for seed in (1, 2):
        write_run(tmp_path, preset("full", "sha", 10, seed=seed, overrides={"loss.tau": 0.8}), 2,
                  0.5)
    with pytest.raises(FileNotFoundError, match="no run sha-10-s1 .*make reproduce PROFILE=full"):
        constants.table(tmp_path / "none", CONFIG, SCENES, progress=False)
    table = constants.table(tmp_path, CONFIG, SCENES, progress=False).set_index(
        ["constant", "value"])
    assert not any(name in table.index.get_level_values(0) for name in constants.DECODED), (
        "no models, no decoding")
    moved, usual = table.loc["loss.tau", 0.8], table.loc["loss.tau", 0.6]
    assert (moved["seeds"], usual["seeds"]) == (2, 3) and not moved["configured"]
    assert moved["mae_effect"] == 1.0 and moved["mean_iou_effect"] == pytest.approx(10)
    assert moved["seeds_lower"] == 0
    assert usual["mae_effect"] == 0 and usual["configured"]
    assert ("loss.tau", 0.4) not in table.index, "nobody trained it"
    assert set(table.index.get_level_values(0)) == {"loss.tau"}


def test_every_constant_has_its_configured_value_among_those_tried():
    for name, values in (constants.DECODED | constants.TRAINED).items():
        assert constants._value(CONFIG, name) in values, name
    assert len(constants.changes(CONFIG)) == sum(len(v) - 1 for v in constants.TRAINED.values())


def test_the_picture_has_a_column_a_constant(tmp_path):
    for seed in (1, 2, 3):
        for change in ({}, {"loss.tau": 0.8}, {"optimisation.ema": 0.99}):
            write_run(tmp_path, preset("full", "sha", 10, seed=seed, overrides=change), seed, 0.4)
    table = constants.table(tmp_path, CONFIG, SCENES, progress=False)
    picture = constants.figure(table)
    titles = [axis.get_title() for axis in picture.axes if axis.get_title()]
    assert "tau\n(3 seeds)" in titles and "ema\n(3 seeds)" in titles
    assert picture.write(tmp_path / "a.png").stat().st_size > 1000
