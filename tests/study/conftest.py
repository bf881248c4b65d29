"""A tiny study, run once from end to end, for all tests that look at what it left."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_trainer import TINY
from xmask.study import reproduce, steps
from xmask.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@t")


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A folder that looks like the repository, with a small synthetic dataset as its DATA."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "notebooks", root / "notebooks",
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    write_dataset("sha", root / "data", train=5, test=3, seed=1, progress=False)
    return root


NARROW = {"data": "data", "datasets": ("sha",), "percents": (40,), "extras": False,
          "overrides": TINY, "jobs": 2}


@pytest.fixture(scope="session")
def done(clone):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        assert reproduce.run("photo", **NARROW)
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "study"]):
            subprocess.run([*GIT, *command], check=True)
    return clone


@pytest.fixture
def inside(done, monkeypatch):
    monkeypatch.chdir(done)
    steps._open.cache_clear()
    return done


def the_run(root: Path) -> Path:
    """The run of the study, among those that other tests may have made beside it."""
    run = steps.configure("photo", "sha", NARROW["percents"][0], 1, overrides=TINY).run
    return root / "results" / "photo" / "runs" / run
