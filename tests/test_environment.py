"""The three lists of versions agree, and the lock is hashed and names no place."""

import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader")

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"^([a-z0-9_.-]+)==([^ ;\\\n]+)", LOCK, re.MULTILINE))


def wanted() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in requirements}


def test_environment_yml_lists_the_versions_of_the_lock():
    text = (ROOT / "environment.yml").read_text()
    listed = dict(re.findall(r"^ +- ([a-z0-9_.-]+)={1,2}([0-9][^ \n]*)$", text, re.MULTILINE))
    assert listed.pop("python") == "3.11"
    assert listed == {name: LOCKED[name] for name in wanted()}


def test_the_lock_holds_every_requirement_with_hashes_and_no_address():
    assert wanted() <= set(LOCKED)
    assert "://" not in LOCK and "index-url" not in LOCK
    entries = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert entries and all("--hash=sha256:" in entry for entry in entries)


def test_torch_is_new_enough():
    assert tuple(map(int, LOCKED["torch"].split(".")[:2])) >= (2, 11)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CITATION.cff", "Makefile"])
def test_the_files_people_look_for_are_there(name):
    assert (ROOT / name).stat().st_size > 500


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
