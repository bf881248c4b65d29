"""`xmask.load`: what it loads says what it is, and predicts as evaluation does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import xmask
from tests.test_trainer import tiny
from xmask import files, model, predict
from xmask.study import evaluate
from xmask.cli import main
from xmask.data.images import resize_image
from xmask.synthetic import draw_scene


@pytest.fixture(scope="module")
def scene():
    return draw_scene(seed=2, shape=(160, 200), people=25)


@pytest.fixture(scope="module")
def bundled():
    return xmask.load(device="cpu")


@pytest.fixture
def run(tmp_path):
    """A run folder as the trainer leaves it, of an untrained tiny network."""
    torch.manual_seed(0)
    config = tiny()
    network = model.build(config.network)[0]
    folder = tmp_path / "runs" / "sha-40-s1"
    files.write_json(folder / "config.json", {
        "profile": "demo", "selection": "last", "dataset": "sha", "synthetic": True,
        "backbone": {"name": "slim", "initialisation": "random"}, "versions": {"xmask": "0"},
        "data": {"labelled": ["IMG_1", "IMG_2"], "unlabelled": 3}, "config": config.to_dict()})
    state = network.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"config": json.dumps(
        config.to_dict()), "backbone": "random"})
    other = {name: value * 0 for name, value in state.items()}
    torch.save({"teacher": state, "student": other, "epoch": 7}, folder / "checkpoint.pt")
    return folder


def test_the_bundled_model_says_what_it_is(bundled):
    record = bundled.record
    assert record["trained_on"]["synthetic"] is True and record["backbone"] == "slim"
    assert record["initialisation"] == "random" and len(record["sha256"]) == 64
    assert record["trained_on"]["labelled"] > 0 and record["epochs"] > 0
    json.dumps(record)
    assert "synthetic crowds" in repr(bundled) and record["sha256"][:12] in repr(bundled)
    assert predict.BUNDLED.stat().st_size < 4e6


def test_the_bundled_model_beats_guessing_on_a_crowd_it_has_not_seen(bundled):
    """Not a number to be proud of: a model file swapped for an untrained one must be noticed."""
    scenes = [draw_scene(seed=seed, shape=(256, 320), people=people)
              for seed, people in ((901, 20), (902, 60), (903, 120))]
    counts = [bundled.predict(s.image).count for s in scenes]
    true = [len(s.points) for s in scenes]
    constant = np.abs(np.array(true) - np.median(true)).mean()
    assert np.abs(np.array(counts) - true).mean() < constant
    assert counts == sorted(counts)


def test_a_prediction_is_what_evaluation_says(bundled, scene):
    ours = bundled.predict(scene.image)
    theirs = evaluate.predict(bundled.network, scene.image, bundled.decoding)
    assert ours.count == len(theirs.points) > 0
    np.testing.assert_array_equal(ours.points, theirs.points)
    assert (ours.instances != theirs.instances).mean() < 1e-4
    assert ours.instances.dtype == np.int32 and ours.points.dtype == np.float32


def test_a_path_and_its_pixels_give_the_same(bundled, scene, tmp_path):
    files.write_png(tmp_path / "scene.png", scene.image)
    by_path = bundled.predict(tmp_path / "scene.png")
    np.testing.assert_array_equal(by_path.instances, bundled.predict(scene.image).instances)
    logits, embedding = bundled.maps(str(tmp_path / "scene.png"))
    assert logits.shape == embedding.shape[1:] == (40, 56)


def test_changed_thresholds_are_used(bundled, scene):
    from xmask.config import override

    mine = xmask.load(device="cpu")
    mine.decoding = override(mine.decoding, {"theta": 0.2})
    few, usual = mine.predict(scene.image), bundled.predict(scene.image)
    assert few.count == usual.count
    assert 0 < (few.instances > 0).sum() < (usual.instances > 0).sum()


def test_a_close_up_can_be_computed_smaller(bundled, scene):
    """Twice as large an image, computed at the size of the first: the same heads, twice as far
    apart, each in its own mask."""
    large = scene.image.repeat(2, axis=0).repeat(2, axis=1)
    found = bundled.predict(large, max_side=200)
    small = bundled.predict(resize_image(large, scene.shape))
    assert found.instances.shape == large.shape[:2] and found.count == small.count > 5
    np.testing.assert_allclose(found.points, small.points * 2 + 0.5)
    np.testing.assert_array_equal(found.instances[::2, ::2], small.instances)
    same = bundled.predict(scene.image, max_side=200)  # not larger: nothing happens
    np.testing.assert_array_equal(same.points, bundled.predict(scene.image).points)
    with pytest.raises(ValueError, match="max-side.: 9 px; give at least 32"):
        bundled.predict(scene.image, max_side=9)
    with pytest.raises(ValueError, match="image, resized: 100 x 1 px"):
        bundled.predict(np.zeros((10, 1000, 3), np.uint8), max_side=100)


@pytest.mark.parametrize("image", [
    np.zeros((20, 20), np.uint8), np.zeros((20, 20, 4), np.uint8), np.zeros((20, 20, 3))])
def test_an_array_that_is_no_image_is_refused(bundled, image):
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        bundled.predict(image)


def test_too_small_and_missing_images_are_named(bundled, tmp_path):
    with pytest.raises(ValueError, match="1 x 1 px; the smaller side"):
        bundled.predict(np.zeros((1, 1, 3), np.uint8))
    files.write_png(tmp_path / "dot.png", np.zeros((7, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="dot.png: 50 x 7 px"):
        bundled.predict(tmp_path / "dot.png")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg: no such image"):
        bundled.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="tile: 100 is not a positive multiple of 32"):
        bundled.predict(np.zeros((40, 40, 3), np.uint8), tile=100)


def test_a_run_folder_its_export_and_its_checkpoint_hold_the_same_teacher(run, tmp_path, capsys):
    direct = xmask.load(run, "cpu")
    assert main(["export", str(run), "--out", str(tmp_path / "mine.safetensors")]) == 0
    assert "synthetic crowds (2 labelled and 3 unlabelled images" in capsys.readouterr().out
    exported = xmask.load(tmp_path / "mine.safetensors", "cpu")
    (run / "model.safetensors").unlink()
    halfway = xmask.load(run / "checkpoint.pt", "cpu")
    assert direct.record["sha256"] == exported.record["sha256"] == halfway.record["sha256"]
    assert halfway.record["epochs"] == 7
    assert direct.record["epochs"] == exported.record["epochs"] == tiny().schedule.phase3
    assert direct.config == exported.config == halfway.config == tiny()
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        assert set(file.metadata()) == {"config", "backbone", "record"}


def test_a_file_that_does_not_say_what_it_was_trained_on_is_refused(run):
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        xmask.load(run / "model.safetensors")


@pytest.mark.parametrize("broken, message", [
    ("config.json", "config.json: missing"), ("both", "model.safetensors: missing"),
    ("field", "field 'backbone' is missing"), ("checkpoint", "not a checkpoint of this run")])
def test_a_folder_that_is_no_run_is_named(run, tmp_path, broken, message):
    if broken == "config.json":
        (run / "config.json").unlink()
    elif broken == "field":
        content = files.read_json(run / "config.json")
        del content["backbone"]
        files.write_json(run / "config.json", content)
    else:
        (run / "model.safetensors").unlink()
        if broken == "checkpoint":
            (run / "checkpoint.pt").write_bytes(b"nothing")
        else:
            (run / "checkpoint.pt").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict.export(run, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_and_devices_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        xmask.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="text.safetensors: not a model"):
        xmask.load(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="device: 'gpuu' is unknown"):
        xmask.load(device="gpuu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree(bundled, scene):
    on_cuda = xmask.load(device="cuda").predict(scene.image, tile=64)
    on_cpu = bundled.predict(scene.image)
    assert abs(on_cuda.count - on_cpu.count) <= 0.05 * on_cpu.count + 1


def test_the_bundled_model_can_be_committed_and_shipped():
    from pathlib import Path

    root = Path(__file__).parents[1]
    assert '"weights/*"' in (root / "pyproject.toml").read_text()
    if shutil.which("git") and (root / ".git").exists():
        import subprocess

        ignored = subprocess.run(["git", "check-ignore", str(predict.BUNDLED)], cwd=root)
        assert ignored.returncode == 1, "the bundled model is ignored by git"
