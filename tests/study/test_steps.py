"""Steps of the study and their notebooks: what they leave, what they depend on, what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.study.conftest import the_run
from tests.test_trainer import TINY
from xmask import edp_sam, files, provenance
from xmask.config import from_dict, override
from xmask.data.masks import read_masks
from xmask.data.training_images import BareImages, Kept, MaskedImages
from xmask.study import steps
from xmask.tools import models


def test_a_run_folder_holds_everything_a_number_traces_to(inside):
    folder = the_run(inside)
    config = files.read_json(folder / "config.json")
    assert config["synthetic"] is True and config["selection"] == "last"
    assert config["backbone"] == {"name": "test_resnet", "initialisation": "random"}
    assert config["segmenter"]["kind"] == "classical"
    assert len(config["data"]["labelled"]) == 2 and config["data"]["unlabelled"] == 5
    assert set(config["versions"]) >= {"python", "torch", "numpy"}
    metrics = files.read_json(folder / "metrics.json")
    for record, step in ((config, "training"), (metrics, "evaluation")):
        assert record["code"] == {"digest": provenance.code(*steps.CODE[step]),
                                  "modules": list(steps.CODE[step])}
    assert metrics["images"] == 3 and metrics["run"] == folder.name
    for name in ("train", "evaluate"):
        cells = nbformat.read(f"work/photo/notebooks/{name}-{folder.name}.ipynb", 4).cells
        assert all(c.get("execution_count") for c in cells if c.cell_type == "code")
    assert (folder / "predictions").is_dir() and (folder / "history.csv").is_file()


def test_held_out_images_calibrate_and_are_not_learnt_from(inside):
    config = steps.configure("photo", "sha", 100, 1, overrides=TINY | {
        "calibration.held_out": 0.4, "schedule.unlabelled": False})
    kept, learnt = steps.held_out(config, "data"), steps.labelled(config, "data")
    assert len(kept) == 2 and sorted(kept + learnt) == list(range(5))
    result = steps.evaluate(config, "data", progress=False)
    record = files.read_json(steps.run_folder(config) / "config.json")
    dataset = steps.open_train(config, "data")
    assert record["data"]["held_out"] == [dataset.ids[i] for i in kept]
    assert record["data"]["labelled"] == [dataset.ids[i] for i in learnt]
    assert record["calibration"]["images"] == 2 and record["calibration"]["factor"] is None
    assert result["counting_uncalibrated"] is not None and result["interval"] is None
    shutil.rmtree(steps.run_folder(config))


def test_where_no_image_is_held_out_the_learnt_ones_can_set_the_threshold(inside):
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY | {
        "calibration.expected": True, "evaluation.peaks": True, "schedule.unlabelled": False})
    result = steps.evaluate(config, "data", progress=False)
    record = files.read_json(steps.run_folder(config) / "config.json")
    found = record["calibration"]
    assert record["data"]["held_out"] == []
    assert found["images"] == len(record["data"]["labelled"]) and found["mae"] is None
    assert result["counting_uncalibrated"] is not None and result["interval"] is None
    shutil.rmtree(steps.run_folder(config))


def test_a_finished_run_is_kept_until_the_new_one_is(inside, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    config = steps.configure("photo", "sha", 40, 1, overrides=TINY | {
        "schedule.unlabelled": False, "loss.tau": 0.4})
    folder = steps.run_folder(config)
    steps.evaluate(config, "data", progress=False)
    names = ("model.safetensors", "metrics.json", "history.csv", "config.json")
    before = {name: (folder / name).read_bytes() for name in names}
    monkeypatch.setattr(provenance, "code", lambda *_: "new code")
    with monkeypatch.context() as patch:
        patch.setattr(steps.training, "fit", stopped)
        for _ in range(2):  # the second time nothing that is finished is in the way
            with pytest.raises(KeyboardInterrupt):
                steps.train(config, "data", progress=False)
    kept = folder / "earlier-1"
    assert {one.name: one.read_bytes() for one in kept.iterdir()} == before
    assert models.load(kept, "cpu").config == config
    assert not {"model.safetensors", "metrics.json"} & {one.name for one in folder.iterdir()}
    assert files.read_json(folder / "config.json")["code"]["digest"] == "new code"
    steps.train(config, "data", progress=False)
    assert kept.is_dir() and not (folder / "earlier-2").exists(), "until it is evaluated"
    steps.evaluate(config, "data", progress=False)
    assert not kept.exists() and (folder / "model.safetensors").is_file()
    assert files.read_json(folder / "metrics.json")["code"]["digest"] == "new code"
    shutil.rmtree(folder)


def test_a_run_killed_while_it_keeps_the_earlier_one_has_it_whole_in_one_place(
        tmp_path, monkeypatch):
    names = ("model.safetensors", "config.json")
    moves = []
    with files.OutputFolder(tmp_path) as folder:
        for name in names:
            files.write_text(tmp_path / name, name)
        unlink = Path.unlink

        def watched(path, *arguments, **options):
            if path.parent == tmp_path:
                moves.append(path.name)
                assert all((tmp_path / "earlier-1" / name).read_text() == name for name in names)
            unlink(path, *arguments, **options)

        monkeypatch.setattr(Path, "unlink", watched)
        folder.keep_earlier(*names)
    assert moves == list(names)


def test_another_setting_makes_a_step_stale(inside):
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY)
    base = steps.train_fingerprint(config, "data")
    assert base == steps.train_fingerprint(config, "data")
    other = steps.configure("photo", "sha", 40, 1, overrides=TINY | {"loss.tau": 0.5})
    assert steps.train_fingerprint(other, "data") != base
    stamp = steps.stamp_of("train", config)
    assert provenance.is_done(stamp, base) and not provenance.is_done(stamp, "other")


def test_a_changed_docstring_retrains_nothing_and_changed_code_does(inside, monkeypatch):
    config = from_dict(files.read_json(the_run(inside) / "config.json")["config"])
    chosen, read = steps.labelled(config, "data"), provenance._installed

    def prints():
        return [steps.mask_fingerprint(config, chosen, "data"),
                steps.train_fingerprint(config, "data"),
                steps.evaluation_fingerprint(config, "data")]

    def patch(*change):
        def changed(path):
            source = read(path)
            return source if source is None else source.replace(*change)

        monkeypatch.setattr(provenance, "_installed", changed)

    before = prints()
    patch('"""', '"""So: ', 1)
    assert "So: " in provenance._installed("xmask/nnec.py")
    assert prints() == before
    patch(" return ", " x = 1; return ")
    assert not set(prints()) & set(before)


def test_a_segmenter_is_described_and_not_loaded_to_see_what_is_stale(inside, monkeypatch):
    config = from_dict(files.read_json(the_run(inside) / "config.json")["config"])
    config = override(config, {"masks.segmenter": "bundled"})
    monkeypatch.setattr("xmask.segmenters.open_segmenter", None)
    assert steps.train_fingerprint(config, "data")


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_one_process_works_in_a_run_folder_and_the_second_says_who(inside, monkeypatch, step):
    config = from_dict(files.read_json(the_run(inside) / "config.json")["config"])
    monkeypatch.setattr(provenance, "is_done", lambda stamp, print: f"{step}-" not in stamp.name)
    monkeypatch.setattr(steps, "PATIENCE", 0.1)
    wanted = rf"another process .*pid {os.getpid()}"
    with files.lock(the_run(inside)), pytest.raises(ValueError, match=wanted):
        steps.evaluate(config, "data", progress=False)


def test_all_images_are_unlabelled_ones_without_points_and_masks(inside):
    dataset = steps.open_test(steps.configure("photo", "sha", 40, 1, overrides=TINY), "data")
    bare = BareImages(Kept(dataset))
    assert len(bare) == len(dataset) == 3
    for sample, full in zip(bare, dataset):
        assert (sample.image == full.image).all() and len(full.points)
        assert sample.points.shape == (0, 2) and sample.instances is None and not sample.boxes
    assert bare[1].image is bare[1].image  # read once


def papermill(root: Path, notebook: str, parameters: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "papermill", f"notebooks/{notebook}", "out.ipynb",
         "--no-progress-bar", "-y", json.dumps(parameters)],
        cwd=root, capture_output=True, text=True, check=False)


def test_a_train_notebook_works_alone_and_makes_its_masks(clone):
    parameters = {"profile": "photo", "dataset": "sha", "percent": 20, "seed": 3,
                  "data": "data", "overrides": TINY}
    result = papermill(clone, "11_train.ipynb", parameters)
    assert result.returncode == 0, result.stderr[-2000:]
    run = steps.configure("photo", "sha", 20, 3, overrides=TINY).run
    assert (clone / "results" / "photo" / "runs" / run / "model.safetensors").is_file()


def test_an_unknown_parameter_stops_a_notebook_with_a_hint(clone):
    result = papermill(clone, "11_train.ipynb", {"perecnt": 10})
    assert result.returncode != 0
    assert "unknown parameter 'perecnt': did you mean 'percent'?" in result.stderr


def test_check_parameters_accepts_what_the_notebook_has():
    steps.check_parameters(["", "percent = 10\nseed = 1", "# Parameters\npercent = 40", "x = 1"])
    with pytest.raises(ValueError, match="unknown parameter 'sede': did you mean 'seed'"):
        steps.check_parameters(["", "percent = 10\nseed = 1", "# Parameters\nsede = 40\n"])


def test_a_killed_mask_step_leaves_no_half_file(inside):
    folder = inside / "work" / "photo" / "masks" / "sha"
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY)
    chosen = steps.labelled(config, "data")
    names = [steps.open_train(config, "data").ids[index] for index in chosen]
    assert not list(folder.glob(".partial-*"))
    (folder / f"{names[0]}.png").write_bytes(b"\x89PNG half")
    with pytest.raises(ValueError, match=names[0]):
        read_masks(folder, names[0])
    (folder / f"{names[0]}.png").unlink()
    steps.make_masks(config, chosen, "data", progress=False)
    assert read_masks(folder, names[0]).max() > 0


def test_runs_see_test_images_and_masks_of_their_own_size(inside):
    folder = the_run(inside)
    assert steps.test_images_of(folder) is None  # photographs that are not at hand
    saved = (folder / "config.json").read_text()
    record = json.loads(saved)
    record["config"]["max_side"] = 64
    try:
        (folder / "config.json").write_text(json.dumps(record))
        assert max(steps.test_images_of(folder, "data")[0].image.shape) == 64
    finally:
        (folder / "config.json").write_text(saved)
    config = from_dict(record["config"])
    assert steps.mask_folder(config).name == "sha-max-64"
    small, large = steps.open_train(config, "data"), steps.open_train(
        override(config, {"max_side": None}), "data")
    chosen = steps.labelled(config, "data")
    masks = steps.mask_folder(override(config, {"max_side": None}))
    assert MaskedImages(large, chosen, masks, large.ids)[0].instances.any()
    with pytest.raises(ValueError, match="delete .* and run the masks step again"):
        MaskedImages(small, chosen, masks, small.ids)[0]


def test_code_that_reads_images_and_weights_on_disk_are_part_of_a_training(
        inside, monkeypatch, tmp_path):
    config = from_dict(files.read_json(the_run(inside) / "config.json")["config"])
    before = steps.train_fingerprint(config, "data")
    code = provenance.code
    monkeypatch.setattr(provenance, "code", lambda *names: code(*names) + str(
        "xmask.data.readers" in names))
    assert steps.train_fingerprint(config, "data") != before
    monkeypatch.undo()
    weights, prints = tmp_path / "vgg.pth", []
    config = override(config, {"network.weights": str(weights)})
    monkeypatch.chdir(inside)
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        prints.append(steps.train_fingerprint(config, "data"))
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    "profile, data, message",
    [("paper", "", "give the folder that holds the datasets"),
     ("demo", "/photos", "draws its own synthetic crowds and would ignore /photos")],
)
def test_profiles_say_which_data_they_want(profile, data, message):
    with pytest.raises(ValueError, match=message):
        steps.data_root(profile, "sha", data)


def test_outside_a_clone_the_notebooks_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not inside a clone of the repository"):
        steps.enter_root()


def test_another_project_with_notebooks_is_no_clone(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = ["xmask"]\n')
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(FileNotFoundError, match="not inside a clone of the repository"):
        steps.enter_root()


def test_the_mask_summary_says_where_masks_come_from(inside):
    table = pd.read_csv(next((inside / "results" / "photo" / "masks").rglob("masks.csv")))
    assert table[list(edp_sam.SOURCES)].sum(axis=1).round(3).eq(1).all()
    assert table["mean_iou"].between(0.2, 1).all()


def test_masks_of_other_code_are_made_anew(inside, monkeypatch):
    config = from_dict(files.read_json(the_run(inside) / "config.json")["config"])
    folder, chosen = steps.mask_folder(config), steps.labelled(config, "data")[:1]
    first = folder / f"{steps.open_train(config, 'data').ids[chosen[0]]}.csv"
    made = first.stat().st_mtime_ns
    steps.make_masks(config, chosen, "data", progress=False)
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(provenance, "code", lambda *names: "other")
    steps.make_masks(config, chosen, "data", progress=False)
    assert first.stat().st_mtime_ns > made


@pytest.mark.parametrize("content", [None, "{}", '{"mine": 1}', "text"])
def test_a_run_folder_with_files_of_the_user_is_left_alone(content, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="nor the config.json of a run.*nothing was written"):
        with steps._held(tmp_path):
            pass
    assert sorted(tmp_path.iterdir()) == before
    with steps._held(tmp_path / "new") as held:
        assert held.names() == []


def test_a_run_folder_of_a_clone_is_ours_but_for_files_that_no_commit_brings(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"config": {}, "profile": "demo", "data": {}}')
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("mine")
    with steps._held(tmp_path) as held:
        files.write_json(tmp_path / "metrics.json", {"new": 1})
        assert held.names() == ["config.json", "metrics.json"]
        assert not list(tmp_path.glob("*set-aside*"))
        files.write_text(tmp_path / "model.safetensors", "ours")
    assert (tmp_path / "model.safetensors.set-aside-1").read_text() == "mine"
    (tmp_path / "metrics.json").write_text("edited by hand")
    with steps._held(tmp_path):
        files.write_json(tmp_path / "metrics.json", {"newer": 1})
    assert (tmp_path / "metrics.json.set-aside-1").read_text() == "edited by hand"
    assert "set aside as metrics.json.set-aside-1" in caplog.text


@pytest.mark.parametrize("made_by", ["", "xmask"])
def test_a_model_put_into_a_run_folder_by_hand_is_kept(inside, made_by, caplog):
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY | {
        "schedule.unlabelled": False})
    folder = steps.run_folder(config)
    shutil.copytree(the_run(inside), folder, ignore=shutil.ignore_patterns(".xmask"))
    if made_by:
        with steps._held(folder):
            pass  # the record is there, and knows nothing of these
    mine = ("model.safetensors", "checkpoint.pt")
    for name in mine:
        (folder / name).write_text(f"my {name}")
    steps.evaluate(config, "data", progress=False)
    assert models.load(folder, "cpu").record["trained_on"]["labelled"]
    assert (folder / "earlier-1" / "model.safetensors").read_text() == "my model.safetensors"
    assert (folder / "earlier-1" / "config.json").is_file(), "what it was lies beside it"
    assert (folder / "checkpoint.pt.set-aside-1").read_text() == "my checkpoint.pt"
    assert "kept in earlier-1" in caplog.text
    shutil.rmtree(folder)
