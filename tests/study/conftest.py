"""A tiny study, run once from end to end, for all tests that look at what it left."""

import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.test_trainer import TINY
from xmask.study import reproduce, steps
from xmask.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@t")


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like the repository, with a small synthetic dataset as its DATA."""
    return _new_clone(tmp_path / "clone")


def _new_clone(root: Path) -> Path:
    shutil.copytree(ROOT / "notebooks", root / "notebooks",
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    write_dataset("sha", root / "data", train=5, test=3, seed=1, progress=False)
    return root


NARROW = {"data": "data", "datasets": ("sha",), "percents": (40,), "extras": False,
          "overrides": TINY, "jobs": 2}


@pytest.fixture(scope="session")
def done(tmp_path_factory, worker_id):
    """The study's folder: of several processes of pytest-xdist, the first makes it, and each has
    a copy of its own."""
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "made"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            _new_clone(made / "half")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(made / "half")
                assert reproduce.run("photo", **NARROW)
                for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "study"]):
                    subprocess.run([*GIT, *command], check=True)
            (made / "half").rename(made / "clone")
        assert (made / "clone").exists(), "the tiny study failed in another process, see there"
    return Path(shutil.copytree(made / "clone", tmp_path_factory.mktemp("own") / "clone"))


@pytest.fixture
def inside(done, monkeypatch):
    monkeypatch.chdir(done)
    steps._open.cache_clear()
    return done


def the_run(root: Path) -> Path:
    """The run of the study, among those that other tests may have made beside it."""
    run = steps.configure("photo", "sha", NARROW["percents"][0], 1, overrides=TINY).run
    return root / "results" / "photo" / "runs" / run
