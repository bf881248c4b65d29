"""The three lists of versions agree, and the locks are hashed and name no place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from xmask import provenance

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader")

ROOT = Path(__file__).parents[1]
LOCKS = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-uv.lock")]
LOCKED = dict(re.findall(r"^([a-z0-9_.-]+)==([^ ;\\\n]+)", LOCKS[0], re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(lines) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in lines} - {"xmask"}


def wanted() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    return names(PROJECT["project"]["dependencies"] + [
        line for extra in extras.values() for line in extra])


def test_environment_yml_lists_the_versions_of_the_lock():
    text = (ROOT / "environment.yml").read_text()
    listed = dict(re.findall(r"^ +- ([a-z0-9_.-]+)={1,2}([0-9][^ \n]*)$", text, re.MULTILINE))
    assert listed.pop("python") == "3.11"
    assert listed == {name: LOCKED[name] for name in wanted()}


def test_the_locks_hold_every_requirement_with_hashes_and_no_address():
    assert wanted() <= set(LOCKED)
    for lock in LOCKS:
        assert "://" not in lock and "index-url" not in lock
        entries = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
        assert entries and all("--hash=sha256:" in entry for entry in entries)
    assert LOCKS[1].startswith("uv==")


def test_clean_removes_what_the_study_makes_and_nothing_else(tmp_path):
    made = ["work/demo/data/a.jpg", "work/full/stamps/b.json", "work/edp_study/c/1.json",
            "work/sweeps/d.ipynb", "build/lib/xmask/e.py", "xmask/__pycache__/f.pyc"]
    kept = ["work/correct/masks/corrected/a.json", "work/photo/masks/sha/corrected/a.json",
            "work/elsewhere/shb-s1/model.safetensors", "work/notes.txt", "build/thesis.tex",
            "work/photo/data/part_A/train_data/images/IMG_1.jpg",
            "work/full/masks/sha/IMG_1.png.set-aside-1",
            "own/correct/masks/corrected/a.json", "own/elsewhere/x/model.safetensors"]
    for name in (*made, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    shown = subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True,
                           capture_output=True, text=True).stdout
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == set(kept)
    for name in ("work/correct", "work/elsewhere", "work/notes.txt", "work/photo", "work/full",
                 "build/thesis.tex"):
        assert f"stays, because it holds more than the study makes: {name}" in shown
    assert not (tmp_path / "work" / "demo").exists()


def test_what_builds_the_package_is_in_the_lock():
    assert names(PROJECT["build-system"]["requires"]) <= set(LOCKED)
    assert "--no-build-isolation" in (ROOT / "Makefile").read_text()


def test_torch_is_new_enough():
    assert tuple(map(int, LOCKED["torch"].split(".")[:2])) >= (2, 11)


LIGHT = """
import sys
sys.modules.update(dict.fromkeys(%r))  # None: importing it fails
import xmask, xmask.predict, xmask.tools.photos, xmask.edp_sam, xmask.cli
from xmask.cli import main
import numpy as np
from PIL import Image
rng = np.random.default_rng(0)
Image.fromarray(rng.integers(0, 255, (96, 128, 3), np.uint8)).save("photo.png")
with open("dots.csv", "w") as file:
    file.write("x,y\\n30,40\\n60,50\\n")
sys.exit(main(["predict", "photo.png", "--out", "predicted"])
         or main(["masks", "--image", "photo.png", "--points", "dots.csv", "--out", "masks"]))
"""


def test_predicting_and_making_masks_need_no_extra(tmp_path):
    extras = PROJECT["project"]["optional-dependencies"].values()
    refused = names(line for extra in extras for line in extra) - {"setuptools"}  # torch has it
    refused |= {"IPython", "nbformat", "nbclient"}
    done = subprocess.run([sys.executable, "-c", LIGHT % sorted(refused)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "predicted" / "photo.overlay.png").is_file()


def test_the_version_is_one_and_a_commit_more_changes_no_result():
    release = PROJECT["tool"]["setuptools_scm"]["fallback_version"]
    assert f"\nversion: {release}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == release
    assert "xmask" not in provenance.versions()  # the digest of the code stands for it


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CITATION.cff", "Makefile",
                                  "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_files_people_look_for_are_there(name):
    assert (ROOT / name).stat().st_size > 500


def test_the_authors_of_the_paper_have_their_full_names():
    cited = (ROOT / "CITATION.cff").read_text()
    for given, family in (("Jiyang", "Huang"), ("Hongru", "Chen"), ("Wei", "Lin"), ("Jia", "Wan"),
                          ("Antoni B.", "Chan")):
        assert f"family-names: {family}\n      given-names: {given}\n" in cited
        assert f"{family}, {given}" in (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
