"""`xmask.load`: what it loads says what it is, and predicts as evaluation does; an image in pieces
gives what it gives in one piece: no seam, no head lost or counted twice."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import xmask
from tests.test_trainer import tiny
from xmask import config as configuration
from xmask import features, files, model, predict
from xmask.cli import main
from xmask.data.images import resize_image
from xmask.data.transforms import to_tensor
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
    theirs = predict.predict_image(bundled.network, scene.image, bundled.decoding)
    assert ours.count == theirs.count > 0
    np.testing.assert_array_equal(ours.points, theirs.points)
    np.testing.assert_array_equal(ours.instances, theirs.instances)
    assert ours.instances.dtype == np.int32 and ours.points.dtype == np.float32


def test_a_path_and_its_pixels_give_the_same(bundled, scene, tmp_path):
    files.write_png(tmp_path / "scene.png", scene.image)
    by_path = bundled.predict(tmp_path / "scene.png")
    np.testing.assert_array_equal(by_path.instances, bundled.predict(scene.image).instances)
    logits, embedding = bundled.maps(str(tmp_path / "scene.png"))
    assert logits.shape == embedding.shape[1:] == (40, 56)


def test_changed_thresholds_are_used(bundled, scene):
    mine = xmask.load(device="cpu")
    mine.decoding = configuration.override(mine.decoding, {"theta": 0.2})
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
    np.testing.assert_array_equal(found.counted, small.counted)
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


def test_a_checkpoint_gives_the_student_where_evaluation_reads_it(run):
    content = files.read_json(run / "config.json")
    content["config"]["evaluation"]["weights"] = "student"
    files.write_json(run / "config.json", content)
    (run / "model.safetensors").unlink()
    assert all(not value.any() for value in xmask.load(run, "cpu").network.state_dict().values())


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


# -- files that are no models --------------------------------------------------------------------


def exported(run, tmp_path, state=None, **metadata):
    """A model file like those of `xmask export`, some of its parts replaced; None: left out."""
    file = predict.export(run, tmp_path / "model.safetensors")
    with safe_open(file, "pt") as opened:
        known = opened.metadata()
    whole = known | metadata
    save_file(predict.load_file(file) if state is None else state, file,
              metadata={name: text for name, text in whole.items() if text is not None} or None)
    return file


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(run, tmp_path, value):
    state = predict.load_file(run / "model.safetensors")
    name = sorted(state)[3]
    state[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"model.safetensors: weights {name} hold NaN or infin"):
        xmask.load(exported(run, tmp_path, state), "cpu")
    (run / "model.safetensors").unlink()
    torch.save({"teacher": state, "student": state, "epoch": 7}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"checkpoint.pt: weights {name} hold NaN or infinite"):
        xmask.load(run, "cpu")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10**40, 10**40) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_metadata_of_any_shape_is_refused_by_the_name_of_the_file(data):
    """Not JSON, a list, fields missing, of another type or size: always a ValueError."""
    config = tiny()
    whole = {"config": config.to_dict(), "record": {
        "backbone": "slim", "initialisation": "random", "trained_on": {"text": "crowds"}}}
    part = data.draw(st.sampled_from(["config", "record"]))
    kind = data.draw(st.sampled_from(["text", "json", "field", "section"]))
    if kind == "text":
        text = data.draw(st.text(max_size=30))
    elif kind == "json":
        text = json.dumps(data.draw(JSON))
    else:
        values = json.loads(json.dumps(whole[part]))
        if kind == "field" or part == "record":
            name = data.draw(st.sampled_from(sorted(values)))
            values[name] = data.draw(JSON)
        else:
            field = data.draw(st.sampled_from(["backbone", "channels", "embedding"]))
            values["network"][field] = data.draw(JSON | st.sampled_from([10**9, -4, "resnet999"]))
        text = json.dumps(values)
    import tempfile
    from pathlib import Path

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "odd.safetensors"
        save_file(model.XMask(config.network).state_dict(), file, metadata={
            name: json.dumps(value) for name, value in whole.items()} | {part: text})
        try:
            repr(xmask.load(file, "cpu"))
        except ValueError as error:
            assert "odd.safetensors" in str(error)


@pytest.mark.parametrize("part, text", [
    ("config", None), ("config", "[]"), ("config", "nonsense"), ("config", "[" * 100_000),
    ("record", "3"), ("record", "{}"), ("record", '{"backbone": 1}')])
def test_metadata_that_says_nothing_is_refused(run, tmp_path, part, text):
    with pytest.raises(ValueError, match="model.safetensors: "):
        xmask.load(exported(run, tmp_path, **{part: text}), "cpu")


def test_a_configuration_that_asks_for_gigabytes_is_refused_before_they_are_made(run, tmp_path):
    values = tiny().to_dict()
    values["network"]["channels"] = 4096
    with pytest.raises(ValueError, match=r"model.safetensors: .*tensor .*asks for \(4096"):
        xmask.load(exported(run, tmp_path, config=json.dumps(values)), "cpu")


# -- in pieces -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """Random weights, but with a density that fires in places and an embedding that differs."""
    torch.manual_seed(3)
    network = model.build(tiny().network)[0].eval()
    image = draw_scene(seed=5, shape=(256, 256), people=60).image
    with torch.no_grad():
        for layer in network.modules():  # statistics of real activations, as after training
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.5
        network.train()
        for _ in range(4):
            network(model.pad_to_multiple(to_tensor(image)[None]))
        network.eval()
        last = network.decoder[4]
        last.weight *= 20
        logits = network(to_tensor(image)[None]).logits
        # odd channels of the shuffle are "person": about 2% of the cells fire
        last.bias[4:] -= float(torch.quantile(logits.flatten(), 0.98))
    return network


@pytest.fixture(scope="module")
def large():
    return draw_scene(seed=7, shape=(1100, 1380), people=300)


@pytest.mark.parametrize("gate", [False, True])
def test_pieces_and_whole_agree_to_rounding(network, large, gate):
    decoding = configuration.override(tiny().evaluation, {"density_gate": gate})
    one = predict.network_maps(network, large.image, tile=1408)
    cut = predict.network_maps(network, large.image, tile=256)
    for a, b in zip(one, cut):
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5, rtol=1e-4)
    whole = predict.predict_image(network, large.image, decoding, tile=1408)
    pieces = predict.predict_image(network, large.image, decoding, tile=256)
    assert 100 < whole.count == pieces.count
    np.testing.assert_array_equal(pieces.points, whole.points)
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-4)
    differ = (pieces.instances != whole.instances).mean()
    assert differ < 1e-5, f"{differ:.2%} of the pixels have another owner"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_head_on_a_seam_counts_once(data):
    """Heads anywhere, and always some in the cells on both sides of every seam between bands of
    rows: each is one point with one mask, as in one piece."""
    height, width = (data.draw(st.integers(40, 140), label=side) for side in ("H", "W"))
    cells = [-(-side // 32) * 8 for side in (height, width)]
    seen = [-(-side // model.STRIDE) for side in (height, width)]
    logits = torch.full(cells, -5.0)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    for row in range(1, 24):  # bands of 8 px meet between cells 1 and 2, 3 and 4, ...
        if row < seen[0]:
            logits[row, rng.integers(seen[1])] = 3.0
    embedding = torch.nn.functional.normalize(
        torch.from_numpy(rng.normal(size=(4, *cells)).astype(np.float32)), dim=0)
    decoding = configuration.override(tiny().evaluation, {"theta": 3.0})
    with pytest.MonkeyPatch.context() as patch:  # every head gets a mask
        patch.setattr(features, "_BAND", 1)
        patch.setattr(features, "_ROWS", 1)
        cut = predict.decode.predict(logits, embedding, (height, width), decoding)
    whole = predict.decode.predict(logits, embedding, (height, width), decoding)
    heads = int((logits > 0).sum())
    assert cut.count == heads == len(np.unique(cut.points, axis=0))
    np.testing.assert_array_equal(cut.points, whole.points)
    assert set(np.unique(cut.instances)) - {0} == set(range(1, heads + 1))
    assert (cut.instances != whole.instances).mean() < 1e-3  # ties of energies, to rounding


def test_no_cell_sees_farther_than_the_margin(network):
    """Change one pixel: only cells within the margin may answer."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 1280, 64)
    other = image.clone()
    other[:, :, 640, 32] = 1 - other[:, :, 640, 32]
    with torch.inference_mode():
        before, after = network(image), network(other)
    moved = ((before.logits != after.logits)[0]
             | (before.embedding != after.embedding)[0].any(0)).any(1)
    cell = torch.nonzero(moved).squeeze(1) * model.STRIDE
    assert 0 < max(640 - int(cell.min()), int(cell.max()) - 640) <= predict.reach(network) <= 512


def test_a_network_that_sees_everything_takes_the_image_in_one_piece(monkeypatch):
    torch.manual_seed(0)
    network = model.build(tiny().network)[0].eval()
    body = type(network).forward

    def forward(self, images, *arguments, **options):
        sizes.append(tuple(images.shape[-2:]))
        return body(self, images + images.mean(), *arguments, **options)

    sizes = []
    monkeypatch.setattr(type(network), "forward", forward)
    assert predict.reach(network) > 1024
    predict.network_maps(network, np.zeros((200, 300, 3), np.uint8), tile=64)
    assert sizes[1:] == [(224, 320)]


def test_nothing_the_network_or_the_decoding_holds_grows_with_the_image(network, monkeypatch):
    """Whatever the image's size, pieces stay within tile + 2 margins, features within a band."""
    pieces, bands, stretched = [], [], []
    forward, made, rows = type(network).forward, features.feature_bands, features._smooth_rows

    def seen(self, images, *arguments, **options):
        pieces.append(tuple(images.shape[-2:]))
        return forward(self, images, *arguments, **options)

    def banded(*arguments):
        for band in made(*arguments):
            bands.append(band[-1].nbytes)
            yield band

    def widened(*arguments):
        stretched.append(rows(*arguments))
        return stretched[-1]

    margin = predict.reach(network)
    monkeypatch.setattr(type(network), "forward", seen)
    monkeypatch.setattr(predict.decode, "feature_bands", banded)
    monkeypatch.setattr(features, "_smooth_rows", widened)
    monkeypatch.setattr(features, "_BAND", 1 << 19)
    monkeypatch.setattr(features, "_ROWS", 1 << 20)
    image = draw_scene(seed=1, shape=(600, 1000), people=40).image
    predict.predict_image(network, image, tiny().evaluation, tile=64)
    assert len(pieces) == 10 * 16 and max(map(max, pieces)) <= 64 + 2 * margin
    assert len(bands) == 75 and max(bands) <= 8 * 1000 * 16 * 4
    # three cells more than the rows of a band: the smoothing reaches beyond it
    assert len(stretched) > 5 and max(s.nbytes for s in stretched) < (1 << 20) + 4 * 1000 * 16 * 4


@pytest.mark.parametrize("length", [1, 31, 32, 1024, 1344, 1345, 2047, 2048, 5000, 10016])
def test_spans_cover_a_side_once_with_equal_parts(length):
    spans = list(predict._spans(length, 1024, 160))
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert all(start % 32 == 0 for start, _ in spans)
    assert max(stop - start for start, stop in spans) <= (1344 if len(spans) == 1 else 1024)
    assert min(stop - start for start, stop in spans) >= min(length, 512)
