"""The study end to end on a tiny set: every notebook, stamps, staleness, failures, comparison."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.test_trainer import TINY
from xmask import edp_sam, files, provenance
from xmask.study import reproduce, steps
from xmask.config import from_dict, override
from xmask.presets import ABLATIONS
from xmask.synthetic import write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like the repository, with a small synthetic dataset as its DATA."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "notebooks", root / "notebooks",
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", root)
    write_dataset("sha", root / "data", train=5, test=3, seed=1, progress=False)
    return root


NARROW = {"data": "data", "datasets": ("sha",), "percents": (40,), "extras": False,
          "overrides": TINY, "jobs": 2}


@pytest.fixture(scope="module")
def done(clone):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        assert reproduce.run("photo", **NARROW)
    return clone


@pytest.fixture
def inside(done, monkeypatch):
    monkeypatch.chdir(done)
    steps._open.cache_clear()
    return done


def the_run(root: Path) -> Path:
    return next((root / "results" / "photo" / "runs").iterdir())


def test_a_run_folder_holds_everything_a_number_traces_to(inside):
    folder = the_run(inside)
    config = files.read_json(folder / "config.json")
    assert config["synthetic"] is True and config["selection"] == "last"
    assert config["backbone"] == {"name": "slim", "initialisation": "random"}
    assert config["segmenter"]["kind"] == "classical"
    assert len(config["data"]["labelled"]) == 2 and config["data"]["unlabelled"] == 3
    assert set(config["versions"]) >= {"python", "torch", "numpy", "xmask"}
    metrics = files.read_json(folder / "metrics.json")
    assert metrics["images"] == 3 and metrics["run"] == folder.name
    for name in ("11_train.ipynb", "12_evaluate.ipynb"):
        cells = nbformat.read(folder / name, 4).cells
        assert all(c.get("execution_count") for c in cells if c.cell_type == "code")
    assert (folder / "predictions").is_dir() and (folder / "history.csv").is_file()


def test_tables_and_figures_are_made_and_say_synthetic(inside):
    tables = inside / "results" / "photo" / "tables"
    text = (tables / "counting.md").read_text()
    assert "synthetic" in text and the_run(inside).name in text
    assert list((inside / "figures" / "photo").glob("*.png"))


def test_the_second_time_nothing_is_run(inside, capsys):
    assert reproduce.run("photo", **NARROW)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("unchanged") == 5


def test_a_changed_notebook_or_a_lost_file_is_made_again(inside):
    steps = {step.name.split()[0]: step for step in reproduce.plan("photo", **{
        k: v for k, v in NARROW.items() if k != "jobs"})}
    runner = reproduce.Runner("photo", 1, 1)
    assert runner._step(steps["evaluate"]) == "unchanged"
    metrics = the_run(inside) / "metrics.json"
    before = metrics.read_bytes()
    metrics.write_text("{}")
    assert runner._step(steps["evaluate"]) != "unchanged"
    assert metrics.read_bytes() == before, "the same run must give the same numbers"


def test_another_setting_makes_a_step_stale(inside):
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY)
    base = steps.train_fingerprint(config, "data")
    assert base == steps.train_fingerprint(config, "data")
    other = steps.configure("photo", "sha", 40, 1, overrides=TINY | {"loss.tau": 0.5})
    assert steps.train_fingerprint(other, "data") != base
    stamp = steps.stamp_of("train", config)
    assert provenance.is_done(stamp, base) and not provenance.is_done(stamp, "other")


def papermill(root: Path, notebook: str, parameters: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "papermill", f"notebooks/{notebook}", "out.ipynb",
         "--no-progress-bar", "-y", json.dumps(parameters)],
        cwd=root, capture_output=True, text=True)


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


def test_a_failing_step_is_named_its_log_kept_and_the_rest_runs(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    steps._open.cache_clear()
    ok = reproduce.run("photo", **NARROW | {
        "overrides": TINY | {"optimisation.lr": 1e30, "optimisation.encoder_lr": 1e30,
                             "schedule.warmup": 3}})
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert not ok
    assert "lower the learning rate of that phase" in text and "log: work" in text
    assert "tables: not started, an input failed" in text
    assert "the same command goes on from here" in text


def test_a_killed_mask_step_leaves_no_half_file(inside):
    folder = inside / "work" / "photo" / "masks" / "sha"
    config = steps.configure("photo", "sha", 40, 1, overrides=TINY)
    chosen = steps.labelled(config, "data")
    names = [steps.open_train(config, "data").ids[index] for index in chosen]
    assert not list(folder.glob(".partial-*"))
    (folder / f"{names[0]}.png").write_bytes(b"\x89PNG half")
    with pytest.raises(ValueError, match=names[0]):
        edp_sam.read_masks(folder, names[0])
    (folder / f"{names[0]}.png").unlink()
    steps.make_masks(config, chosen, "data", progress=False)
    assert edp_sam.read_masks(folder, names[0]).max() > 0


def test_tables_are_compared_with_the_committed_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = Path("results/demo/tables")
    tables.mkdir(parents=True)
    for name in ("same", "changed"):
        (tables / f"{name}.csv").write_text("a,b\n1,2\n3,4\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "tables"]):
        subprocess.run([*git, *command], check=True)
    (tables / "changed.csv").write_text("a,b\n1,2\n3,5\n")
    (tables / "new.csv").write_text("a\n")
    lines = "\n".join(reproduce.compare_with_committed(Path("results/demo")))
    assert "same.csv: equal to the committed table" in lines
    assert "changed.csv: DIFFERS from the committed table in 1 of 3 lines" in lines
    assert "new.csv: not committed" in lines


def test_the_plan_covers_the_study():
    steps = reproduce.plan("demo")
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    trained = [name for name in names if name.startswith("train")]
    assert len(trained) == 9 + 3 + len(ABLATIONS)
    for index, step in enumerate(steps):
        assert set(step.inputs) <= set(names[:index]), f"{step.name} before its inputs"
        assert step.source.name in {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    narrowed = reproduce.plan("demo", datasets=("jhu",), percents=(5,), seeds=(1, 2),
                              extras=False)
    assert [s.name for s in narrowed if s.name.startswith("train")] == [
        "train jhu-5-s1", "train jhu-5-s2"]


def test_a_study_of_changed_fields_has_no_ablation_table_to_make():
    changed = [step.name for step in reproduce.plan("demo", overrides={"loss.tau": 0.5})]
    assert "tables" in changed and "ablations" not in changed


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
    assert steps.MaskedImages(large, chosen, masks, keep=False)[0].instances.any()
    with pytest.raises(ValueError, match="delete .* and run the masks step again"):
        steps.MaskedImages(small, chosen, masks, keep=False)[0]


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


def test_the_mask_summary_says_where_masks_come_from(inside):
    table = pd.read_csv(next((inside / "results" / "photo" / "masks").rglob("masks.csv")))
    assert table[list(edp_sam.SOURCES)].sum(axis=1).round(3).eq(1).all()
    assert table["mean_iou"].between(0.2, 1).all()


def test_the_code_of_a_step_may_be_fingerprinted_in_many_threads():
    provenance._code.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(provenance.code, ["xmask.trainer"] * 8))
    assert len(set(found)) == 1 and found[0] != provenance.code("xmask.study.tables")


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
