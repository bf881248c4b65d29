"""`xmask.load`: what it loads says what it is; files that are no models are refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import xmask
from tests.test_trainer import tiny
from xmask import files, model
from xmask.cli import main
from xmask.synthetic import draw_scene
from xmask.tools import models


@pytest.fixture(scope="module")
def bundled():
    return xmask.load("drawn", device="cpu")


@pytest.fixture
def run(tmp_path):
    """A run folder as the trainer leaves it, of an untrained tiny network."""
    torch.manual_seed(0)
    config = tiny()
    network = model.build(config.network)[0]
    folder = tmp_path / "runs" / "sha-40-s1"
    files.write_json(folder / "config.json", {
        "profile": "demo", "selection": "last", "dataset": "sha", "synthetic": True,
        "backbone": {"name": "test_resnet", "initialisation": "random"}, "versions": {"xmask": "0"},
        "data": {"labelled": ["IMG_1", "IMG_2"], "unlabelled": 3}, "config": config.to_dict()})
    state = network.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"config": json.dumps(
        config.to_dict()), "backbone": "random"})
    other = {name: value * 0 for name, value in state.items()}
    torch.save({"teacher": state, "student": other, "epoch": 7}, folder / "checkpoint.pt")
    return folder


def test_the_bundled_model_says_what_it_is(bundled):
    record = bundled.record
    assert record["trained_on"]["synthetic"] is True and record["backbone"] == "tf_efficientnet_lite0"
    assert record["initialisation"].startswith("ImageNet") and len(record["sha256"]) == 64
    assert record["trained_on"]["labelled"] > 0 and record["epochs"] > 0
    json.dumps(record)
    assert "drawn crowds" in repr(bundled) and record["sha256"][:12] in repr(bundled)


def test_the_models_of_the_package_are_small_and_say_what_they_are_for():
    assert all(path.stat().st_size < 12e6 for path in models.BUNDLED.values())
    photo, drawn = xmask.load(device="cpu").record, xmask.load("drawn", "cpu").record
    assert xmask.load("photo", "cpu").record == photo
    assert drawn["trained_on"]["synthetic"] and drawn["file"] == "xmask-drawn.safetensors"
    assert photo["trained_on"]["dataset"] == "sha" and not photo["trained_on"]["synthetic"]
    assert photo["initialisation"].startswith("ImageNet")
    assert 0 < photo["calibration"]["threshold"] < 1 and photo["measured"]["images"] == 182
    json.dumps(photo)


def test_the_bundled_model_beats_guessing_on_a_crowd_it_has_not_seen(bundled):
    """Not a number to be proud of: a model file swapped for an untrained one must be noticed."""
    scenes = [draw_scene(seed=seed, shape=(256, 320), people=people)
              for seed, people in ((901, 20), (902, 60), (903, 120))]
    counts = [bundled.predict(s.image).count for s in scenes]
    true = [len(s.points) for s in scenes]
    constant = np.abs(np.array(true) - np.median(true)).mean()
    assert np.abs(np.array(counts) - true).mean() < constant
    assert counts == sorted(counts)


def test_a_run_folder_its_export_and_its_checkpoint_hold_the_same_teacher(run, tmp_path, capsys):
    direct = xmask.load(run, "cpu")
    assert main(["export", str(run), "--out", str(tmp_path / "mine.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "drawn crowds (2 labelled and 3 unlabelled images" in said
    assert f"next: xmask predict PHOTOS --out FOLDER --weights {tmp_path / 'mine.safetensors'}\n" in said
    exported = xmask.load(tmp_path / "mine.safetensors", "cpu")
    (run / "model.safetensors").unlink()
    halfway = xmask.load(run / "checkpoint.pt", "cpu")
    assert direct.record["sha256"] == exported.record["sha256"] == halfway.record["sha256"]
    assert halfway.record["epochs"] == 7
    assert direct.record["epochs"] == exported.record["epochs"] == tiny().schedule.phase3
    assert direct.config == exported.config == halfway.config == tiny()
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        assert set(file.metadata()) == {"config", "backbone", "record"}


@pytest.mark.parametrize("source", ["", "checkpoint.pt", "../mine.safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.safetensors", "new.onnx"])
def test_an_export_never_goes_into_the_run_that_it_is_made_from(run, source, name, capsys):
    out = run / (source if source.startswith("..") else name)
    models.export(run, run.parent / "mine.safetensors")
    before = {path: files.sha256(path) for path in run.parent.rglob("*") if path.is_file()}
    for option in ("--out", "--onnx"):
        assert main(["export", str(run / source), option, str(out), "--overwrite"]) == 1
        assert "belongs to the model that is exported" in capsys.readouterr().err
    assert before == {path: files.sha256(path) for path in run.parent.rglob("*") if path.is_file()}


def test_a_run_that_is_trained_anew_gives_the_finished_model_that_it_keeps(run, tmp_path, caplog):
    finished = xmask.load(run, "cpu").record["sha256"]
    with files.OutputFolder(run, overwrite=True) as folder:
        for name in ("model.safetensors", "config.json"):
            folder.note(run / name, files.sha256(run / name))
        folder.keep_earlier("model.safetensors", "config.json")
    files.write_json(run / "config.json", files.read_json(run / "earlier-1" / "config.json"))
    half = torch.load(run / "checkpoint.pt")
    torch.save(half | {"teacher": half["student"]}, run / "checkpoint.pt")
    assert xmask.load(run, "cpu").record["sha256"] == finished
    models.export(run, tmp_path / "mine.safetensors")
    assert xmask.load(tmp_path / "mine.safetensors", "cpu").record["sha256"] == finished
    assert caplog.text.count("this is the model in earlier-1") == 2
    assert xmask.load(run / "checkpoint.pt", "cpu").record["sha256"] != finished


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
        models.export(run, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_and_devices_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        xmask.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="text.safetensors: not a model"):
        xmask.load(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="device: 'gpuu' is unknown"):
        xmask.load(device="gpuu")


def test_the_bundled_model_can_be_committed_and_shipped():
    from pathlib import Path

    root = Path(__file__).parents[2]
    assert '"weights/*"' in (root / "pyproject.toml").read_text()
    if shutil.which("git") and (root / ".git").exists():
        import subprocess

        for path in models.BUNDLED.values():
            ignored = subprocess.run(["git", "check-ignore", str(path)], cwd=root)
            assert ignored.returncode == 1, f"{path.name} is ignored by git"


@pytest.mark.parametrize("counts, said", [
    ([80], "On the 4 of 10 test images of ShanghaiTech A in which this model finds 31 to 90 "
          "heads, its count is wrong by 5 on average (5 too few where errors up and down cancel)"),
    ([1, 2, 900], "finds 1 to 10 heads"),
    ([0], "0 heads are fewer than in any of this model's test images. On the 3 of 10"),
    ([9999], "9999 heads are more than in any of this model's test images. On the 4 of 10")])
def test_it_says_how_far_off_counts_of_a_size_are(tmp_path, counts, said):
    rows = [{"count": n, "true_count": n + 5} for n in (1, 5, 10, 11, 20, 30, 31, 40, 50, 90)]
    files.write_json(tmp_path / "metrics.json", {
        "dataset": "sha", "synthetic": False, "images": 10, "counting": {"mae": 5.0},
        "per_image": rows})
    record = {"trained_on": {"synthetic": False}, "measured": models.measured(tmp_path)}
    assert said in models.reliability(record, counts)
    assert models.reliability(record, []) == ""
    record["trained_on"]["synthetic"] = True
    assert "drawn crowds" in models.reliability(record, counts)
    alone = {"trained_on": {"synthetic": False}, "measured": None}
    assert "was not measured" in models.reliability(alone, counts)
    learnt = alone | {"calibration": {"mae": 12.3}}
    assert "held out when this model learnt, its count was wrong by 12" in models.reliability(
        learnt, counts)
    assert models.measured(tmp_path / "none") is None
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.warns(UserWarning, match="metrics.json: field 'per_image' is missing"):
        assert models.measured(tmp_path) is None


def test_half_precision_is_half_the_size_and_the_same_network(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "full.safetensors")]) == 0
    assert main(["export", str(run), "--half", "--out", str(tmp_path / "half.safetensors")]) == 0
    full, half = (xmask.load(tmp_path / f"{n}.safetensors", "cpu") for n in ("full", "half"))
    for mine, theirs in zip(half.network.parameters(), full.network.parameters()):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.half().float())


# -- files that are no models --------------------------------------------------------------------


def exported(run, tmp_path, state=None, **metadata):
    """A model file like those of `xmask export`, some of its parts replaced; None: left out."""
    file = models.export(run, tmp_path / "model.safetensors")
    with safe_open(file, "pt") as opened:
        known = opened.metadata()
    whole = known | metadata
    save_file(load_file(file) if state is None else state, file,
              metadata={name: text for name, text in whole.items() if text is not None} or None)
    return file


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(run, tmp_path, value):
    state = load_file(run / "model.safetensors")
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
        "backbone": "test_resnet", "initialisation": "random", "trained_on": {"text": "crowds", "synthetic": True}}}
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
    ("record", "3"), ("record", "{}"), ("record", '{"backbone": 1}'),
    *(("record", json.dumps({
        "backbone": "b", "initialisation": "random",
        "trained_on": {"text": "photographs", "synthetic": False}} | odd)) for odd in (
            {"trained_on": {"text": "photographs"}}, {"calibration": {"threshold": 0.5}},
            {"calibration": 3}, {"measured": {"thirds": [{"to": "many"}]}}, {"measured": [1]}))])
def test_metadata_that_says_nothing_is_refused(run, tmp_path, part, text):
    with pytest.raises(ValueError, match="model.safetensors: "):
        xmask.load(exported(run, tmp_path, **{part: text}), "cpu")


def test_a_configuration_that_asks_for_gigabytes_is_refused_before_they_are_made(run, tmp_path):
    values = tiny().to_dict()
    values["network"]["channels"] = 4096
    with pytest.raises(ValueError, match=r"model.safetensors: .*tensor .*asks for \(4096"):
        xmask.load(exported(run, tmp_path, config=json.dumps(values)), "cpu")
