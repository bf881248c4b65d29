"""The study end to end on a tiny set: plan, staleness, failures, comparison."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.study.conftest import GIT, NARROW, ROOT, the_run
from xmask import files
from xmask.presets import ABLATIONS
from xmask.study import constants, reproduce, steps


def test_tables_and_figures_are_made_and_say_drawn(inside):
    tables = inside / "results" / "photo" / "tables"
    text = (tables / "counting.md").read_text()
    assert "measured on drawn crowds" in text and the_run(inside).name in text
    assert list((inside / "figures" / "photo").glob("*.png"))


def test_the_second_time_nothing_is_run(inside, capsys):
    assert reproduce.run("photo", **NARROW)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("unchanged") == 5


def test_a_changed_notebook_or_a_lost_file_is_made_again(inside, capsys):
    step = next(step for step in reproduce.plan("photo", **{
        k: v for k, v in NARROW.items() if k != "jobs"}) if step.name.startswith("evaluate"))
    step.inputs = []

    def said() -> str:
        assert reproduce.run_steps("photo", [step], workers=1, threads=1) == []
        return "".join(capsys.readouterr())

    assert f"- {step.name}: unchanged" in said()
    metrics = the_run(inside) / "metrics.json"
    before = metrics.read_bytes()
    metrics.write_text("{}")
    assert f"- {step.name}: unchanged" not in said()
    assert metrics.read_bytes() == before, "the same run must give the same numbers"


def test_a_study_made_anew_changes_no_tracked_file(inside, capsys):
    def status() -> str:
        return subprocess.run([*GIT, "status", "--porcelain", "results", "figures", "notebooks"],
                              capture_output=True, text=True, check=True).stdout

    before = status()
    shutil.rmtree("work")
    assert reproduce.run("photo", **NARROW | {"jobs": 1})
    assert status() == before
    assert not list(Path("results").rglob("*.ipynb"))
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == "reproduced: 4 of 4 tables equal"


def test_one_process_reproduces_a_profile(inside):
    with files.lock(Path("work/photo")), pytest.raises(ValueError, match="another process"):
        reproduce.run("photo", **NARROW)


def test_a_failing_step_is_named_its_log_kept_and_the_rest_does_not_start(inside, capsys):
    config = steps.configure("photo", "sha", 40, 1, overrides=NARROW["overrides"])
    image = steps.open_test(config, "data").image_path(0)
    notebook = next(Path("work/photo/notebooks").glob("evaluate-*"))
    saved = {path: path.read_bytes() for path in (image, notebook)}
    image.write_bytes(b"no image")
    steps._open.cache_clear()
    try:
        ok = reproduce.run("photo", **NARROW | {"jobs": 1})
    finally:
        for path, content in saved.items():
            path.write_bytes(content)
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert not ok
    assert image.name in text and "log: work" in text
    assert "tables: not started, an input failed" in text
    assert "the same command goes on from here" in text


def test_tables_are_compared_with_the_committed_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = Path("results/demo/tables")
    tables.mkdir(parents=True)
    for name in ("same", "changed", "lost"):
        (tables / f"{name}.csv").write_text("a,b\n1,2\n3,4\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "tables"]):
        subprocess.run([*GIT, *command], check=True)
    assert reproduce.compare_with_committed(Path("results/demo")) == (
        "reproduced: 3 of 3 tables equal")
    (tables / "changed.csv").write_text("a,b\n1,2\n3,5\n")
    (tables / "new.csv").write_text("a\n")
    (tables / "lost.csv").unlink()
    assert reproduce.compare_with_committed(Path("results/demo")) == (
        "reproduced: 1 of 4 tables equal; results/demo/tables/changed.csv differs in 1 of 3 lines; "
        "results/demo/tables/lost.csv was not made; results/demo/tables/new.csv is not committed")


def test_without_a_commit_to_compare_with_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert reproduce.compare_with_committed(Path("results/demo")) == (
        "reproduced: no git commit here to compare the tables with")


def test_new_published_numbers_make_the_tables_stale(monkeypatch):
    published = reproduce.tables.read_published()
    before = reproduce._report_fingerprint([])
    monkeypatch.setattr(reproduce.tables, "read_published", lambda: published[1:])
    assert reproduce._report_fingerprint([]) != before


def test_the_plan_covers_the_study():
    steps = reproduce.plan("demo")
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    trained = [name for name in names if name.startswith("train")]
    assert len(trained) == 9 + 3 + len(reproduce.ABLATED["demo"])
    for index, step in enumerate(steps):
        assert set(step.inputs) <= set(names[:index]), f"{step.name} before its inputs"
        assert step.source.name in {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    narrowed = reproduce.plan("demo", datasets=("jhu",), percents=(5,), seeds=(1, 2),
                              extras=False)
    assert [s.name for s in narrowed if s.name.startswith("train")] == [
        "train jhu-5-s1", "train jhu-5-s2"]


def test_the_profile_full_compares_all_that_claims_need():
    planned = {step.name: step for step in reproduce.plan("full")}
    trained = [name for name in planned if name.startswith("train")]
    moved = [name for name in trained if "-x" in name]
    assert len(moved) == 3 * sum(len(v) - 1 for v in constants.TRAINED.values())
    trained = [name for name in trained if name not in moved]
    assert len(trained) == 5 * (9 + 3 * 4 + len(ABLATIONS) - 1 + 1)
    assert {f"evaluate {moved[0].split()[1]}", "evaluate sha-10-s5"} <= set(
        planned["constants"].inputs)
    assert "constants" in planned["claims"].inputs, "it reads their table"
    known = list(planned)
    for index, step in enumerate(planned.values()):
        assert set(step.inputs) <= set(known[:index]), f"{step.name} before its inputs"
    assert sum(name.startswith("compare sha-10") for name in planned) == 5
    assert not any(name.startswith("compare qnrf") for name in planned)
    assert {"prompts", "compare sha-40-s5", "evaluate sha-5-s3-points-only"} <= set(
        planned["claims"].inputs)
    seeds = [planned[name].parameters["seed"] for name in trained]
    assert seeds == sorted(seeds), "seed by seed"
    assert "claims" not in {step.name for step in reproduce.plan("full", extras=False)}


def test_the_published_profile_has_the_published_seed():
    planned = reproduce.plan("paper", data="unused", datasets=("sha",), percents=(10,))
    assert {step.parameters["seed"] for step in planned if "seed" in step.parameters} == {2024}


def test_a_study_says_which_claims_it_can_show():
    demo = reproduce._claims_shown("demo", reproduce.plan("demo"))
    assert "1 seed and 16 test images a dataset. A verdict takes 3 seeds and 100 images" in demo
    photo = reproduce._claims_shown("photo", reproduce.plan("photo", seeds=(1, 2), extras=False))
    assert photo.startswith("Claims: 2 seeds. A verdict")
    assert reproduce._claims_shown("full", reproduce.plan("full")).endswith("results/claims.md")


def test_a_study_of_changed_fields_has_no_ablation_table_to_make():
    changed = [step.name for step in reproduce.plan("demo", overrides={"loss.tau": 0.5})]
    assert "tables" in changed and "ablations" not in changed


def test_masks_are_compared_at_the_points_of_a_run(inside, monkeypatch):
    config = steps.configure("photo", "sha", 40, 1, overrides=NARROW["overrides"])
    result = steps.compare_masks(config, "data", progress=False)
    file = the_run(inside) / "other_masks.json"
    assert len(result["per_image"]) == 3 and {"EDP-SAM", "watershed"} <= set(result["per_image"][0])
    before = file.stat().st_mtime_ns
    assert steps.compare_masks(config, "data", progress=False) == result
    assert file.stat().st_mtime_ns == before, "done and unchanged"
    found = files.read_json(the_run(inside) / "metrics.json")
    found["baselines"]["exclusive_disc"] = None
    monkeypatch.setattr(steps, "evaluate", lambda *_, **__: found)
    with pytest.raises(ValueError, match=r"metrics.json: no true masks .*profile demo or full"):
        steps.compare_masks(config, "data")
    file.unlink()
