"""The bundled SAM is a SAM like any other, and its weights are the ones on record."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor

from tests.test_segmenters import as_sam_does, crowd, picture
from xmask import files
from xmask.cli import main
from xmask.edp_sam import generate_masks
from xmask.segmenters import Prompts, open_segmenter
from xmask.segmenting import sam, sam_training
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.segmenting.sam_segmenter import SamSegmenter
from xmask.synthetic import draw_scene

UNSEEN = 9_600_000  # seeds of scenes that neither trained nor tuned anything


def test_the_bundled_weights_are_small_and_say_how_they_were_trained():
    model, record = sam.load_bundled()
    assert sam.BUNDLED.stat().st_size == record["bytes"] < 5e6
    assert record["sha256"] == files.sha256(sam.BUNDLED)
    training = record["training"]
    assert training["command"].startswith("xmask train-sam --seed")
    plan = training["plan"]
    assert training["steps_done"] == (plan.get("stop") or plan["steps"]) == training["log"][-1]["step"]
    assert {"torch", "segment-anything"} <= set(training["versions"])
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_stock_sam_predictor_works_with_the_bundled_sam():
    scene = draw_scene(UNSEEN, shape=(128, 128), people=8)
    model, _ = sam.load_bundled()
    predictor = SamPredictor(model)
    predictor.set_image(scene.image)
    largest = int(np.bincount(scene.instances.ravel())[1:].argmax())
    masks, quality, low = predictor.predict(
        scene.points[largest:largest + 1], np.array([1]), multimask_output=True)
    assert masks.shape == (3, 128, 128) and quality.shape == (3,) and low.shape == (3, 64, 64)
    truth = scene.instances == largest + 1
    best = masks[quality.argmax()]
    assert (best & truth).sum() / (best | truth).sum() > 0.5


def test_the_bundled_segmenter_answers_as_the_library_does():
    shape = (90, 140)
    image = picture(shape)
    points, coordinates, labels, head, pixel = crowd(shape)
    segmenter = SamSegmenter.bundled(max_zoom=1)
    segmenter.set_image(image)
    logits, scores = segmenter.predict(Prompts(coordinates, labels), head, pixel)
    masks, quality = as_sam_does(sam.load_bundled()[0], image, coordinates, labels, None, True)
    expected = masks.reshape(*masks.shape[:2], -1)[head, :, pixel].T
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    np.testing.assert_allclose(scores, quality, atol=1e-4)


def test_on_unseen_scenes_it_beats_the_classical_segmenter():
    scenes = [draw_scene(UNSEEN + k, shape=(240, 320), people=people)
              for k, people in enumerate((25, 60, 90), start=1)]

    def mean_iou(segmenter):
        values = []
        for scene in scenes:
            labels, _ = generate_masks(scene.image, scene.points, segmenter)
            values += [((labels == k) & (scene.instances == k)).sum()
                       / ((labels == k) | (scene.instances == k)).sum()
                       for k in range(1, len(scene.points) + 1)]
        return np.mean(values)

    bundled, classical = mean_iou(open_segmenter("bundled")), mean_iou(ClassicalSegmenter())
    assert bundled > 0.6 and bundled > classical


def test_a_segmenter_is_sent_to_a_worker_without_its_image():
    segmenter = SamSegmenter.bundled()
    image = picture((60, 80))
    points, coordinates, labels, head, pixel = crowd((60, 80), count=6)
    segmenter.set_image(image)
    before = segmenter.predict(Prompts(coordinates, labels), head, pixel)
    assert segmenter.encoded and segmenter.seconds["encoder"] > 0 < segmenter.seconds["prompts"]
    other = pickle.loads(pickle.dumps(segmenter))
    with pytest.raises(RuntimeError, match="set_image"):
        other.predict(Prompts(coordinates, labels), head, pixel)
    other.set_image(image)
    np.testing.assert_array_equal(other.predict(Prompts(coordinates, labels), head, pixel)[0],
                                  before[0])
    assert segmenter.describe()["sha256"] == files.sha256(sam.BUNDLED)


def test_the_same_image_shown_again_is_not_encoded_again():
    segmenter = SamSegmenter.bundled()
    image = picture((60, 80))
    _, coordinates, labels, head, pixel = crowd((60, 80), count=6)
    segmenter.set_image(image)
    before = segmenter.predict(Prompts(coordinates, labels), head, pixel)[0]
    encoded = dict(segmenter._features)
    segmenter.set_image(image.copy())
    assert segmenter.seconds == {"encoder": 0.0, "prompts": 0.0}
    again = segmenter.predict(Prompts(coordinates, labels), head, pixel)[0]
    assert encoded and all(segmenter._features[view] is one for view, one in encoded.items())
    np.testing.assert_array_equal(again, before)
    image[:] = 0  # the caller's array is not the segmenter's
    segmenter.set_image(image)
    assert segmenter.encoded == 0
    assert not np.allclose(segmenter.predict(Prompts(coordinates, labels), head, pixel)[0], before)


def test_weights_that_are_not_those_on_record_are_refused(tmp_path):
    copy = tmp_path / sam.BUNDLED.name
    with pytest.raises(FileNotFoundError, match="the bundled SAM is not there"):
        sam.load_bundled(copy)
    shutil.copy(sam.BUNDLED, copy)
    record = copy.with_suffix(".json")
    shutil.copy(sam.BUNDLED.with_suffix(".json"), record)
    sam.load_bundled(copy)
    copy.write_bytes(copy.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or another one"):
        sam.load_bundled(copy)
    state = load_file(sam.BUNDLED)
    state.pop("mask_decoder.iou_token.weight")
    save_file(state, copy)
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | {"sha256": files.sha256(copy)}))
    with pytest.raises(ValueError, match="does not fit the architecture"):
        sam.load_bundled(copy)


def test_truncated_safetensors_given_as_a_checkpoint_are_named(tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(sam.BUNDLED.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint of 1000 bytes"):
        open_segmenter(str(path))
    with pytest.raises(ValueError, match="128 wide belongs to no known SAM"):
        open_segmenter(str(sam.BUNDLED))


# -- training --------------------------------------------------------------------------------

TINY = sam_training.Training(seed=UNSEEN, scenes=2, steps=3, crops=2, heads=3)


def test_training_repeats_and_leaves_a_loadable_bundle(tmp_path):
    torch.set_num_threads(1)
    first = sam_training.train(TINY, tmp_path / "a.safetensors", progress=False)
    second = sam_training.train(TINY, tmp_path / "b.safetensors", progress=False)
    assert first["sha256"] == second["sha256"]
    model, record = sam.load_bundled(tmp_path / "a.safetensors")
    assert record["training"]["scene_seeds"] == [UNSEEN, UNSEEN + 1]
    assert not torch.equal(model.mask_decoder.iou_token.weight,
                           sam.load_bundled()[0].mask_decoder.iou_token.weight)
    with pytest.raises(ValueError, match="steps: 0 is too small"):
        sam_training.train(sam_training.Training(steps=0), tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ["dots.safetensors", "dots.json", "new.json"])
def test_weights_and_their_record_replace_no_file(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(sam_training, "train", lambda *_: pytest.fail("it must not begin"))
    (tmp_path / "dots.json").write_text("[dots of the user]")
    with pytest.raises((ValueError, FileExistsError), match=r"dots.json: is there|gets this name"):
        sam.check_out(tmp_path / name)
    options = ["--overwrite"] if name == "new.json" else []
    assert main(["train-sam", "--out", str(tmp_path / name), *options]) == 1
    assert "json" in capsys.readouterr().err


def test_the_last_step_is_saved_wherever_training_ends(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sam_training, "NOTE_EVERY", 2)
    plan = sam_training.Training(seed=UNSEEN, scenes=1, steps=9, stop=3, crops=2, heads=3)
    training = sam_training.train(plan, tmp_path / "a.safetensors", progress=False)["training"]
    assert training["steps_done"] == 3 and [row["step"] for row in training["log"]] == [2, 3]
    # The last row is the mean of one step, not half of it.
    assert training["log"][1]["everybody"] > 0.7 * training["log"][0]["everybody"]


def test_a_batch_puts_targets_where_the_prompts_are():
    scenes = [sam_training.draw_training_scene(UNSEEN + k) for k in range(2)]
    batch = sam_training.make_batch(scenes, np.random.default_rng(0), sam_training.Training(), 128, 64)
    assert len(batch.target) == len(batch.crop) > 8 and batch.pixels.shape == (8, 3, 128, 128)
    cell = (batch.points[:, 0] / 2).long().clamp(0, 63)
    at_head = torch.stack([batch.target[k, y, x] for k, (x, y) in enumerate(cell)])
    assert (at_head > 0.5).float().mean() > 0.8  # points are moved a little, and heads are small
    assert (batch.labels[:, 0] == 1).all() and set(batch.labels.unique().tolist()) <= {-1, 0, 1}
    inside = (batch.target * batch.near).sum((1, 2)) / batch.target.sum((1, 2))
    assert inside.median() > 0.95
    everyone = batch.people[batch.crop, 0]
    assert (batch.target <= everyone + 1e-4).all()
