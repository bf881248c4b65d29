"""Notebooks on machines that share no folder with this one: files travel with them (ours).

A notebook's files are sent with it, into an empty folder of the worker that executes it. What it
wrote, changed or removed there comes back. What to do next is decided here, where all results are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Client, get_worker

from xmask import files
from xmask.data.cluster import ask, carried, open_client
from xmask.study import steps
from xmask.study.execute import Notebooks

_ALWAYS = ("pyproject.toml", "xmask")  # beside the notebook itself
_LEFT = ("lock", "record.lock", "holder.json", "__pycache__")  # of no use elsewhere


@contextmanager
def open_notebooks(job: Travelling, workers: int = 2, scheduler: str = "", cluster: str = ""
                   ) -> Iterator[Client]:
    """A Dask client for a job of notebooks, as `xmask.data.cluster.open_client`.

    Where its workers do not see the job's folder, this process keeps the job, and only sends them
    what they are to execute.
    """
    with ExitStack() as stack:
        client = stack.enter_context(open_client(workers, scheduler, cluster, processes=False))
        if (scheduler or cluster) and not sees_all(client, Path(job.root)):
            name = stack.enter_context(carried(client, Visitors("", job.environment)))
            job.far = client.scheduler.address, name
            number = sum(client.nthreads().values())
            client = stack.enter_context(open_client(number, processes=False))
        yield client


def sees_all(client: Client, root: Path) -> bool:
    """Whether every worker, once there is one, sees the folder of this process."""
    client.wait_for_workers(1)
    (root / "work").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".partial-", dir=root / "work") as mark:
        return all(client.run(os.path.exists, mark.name).values())


@dataclass
class Travelling(Notebooks):
    """Notebooks that are executed here or, where that is set, `far`: by the workers of a scheduler
    at this address, to whom `Visitors` were carried under this name."""

    far: tuple[str, str] | None = None
    client: Client | None = field(default=None, repr=False)

    def begin(self) -> None:
        """In a thread of this process, before its first notebook."""
        super().begin()
        if self.far:
            self.client = Client(self.far[0], set_as_default=False)
            warnings.filterwarnings("ignore", "Sending large graph")  # files, as is meant

    def end(self) -> None:
        """End the notebook that runs, wherever it does."""
        super().end()
        if self.client:  # what it waits for ends with it. Dask would wait for itself here
            threading.Thread(target=self.client.close).start()

    def execute(self, source: Path, target: Path, parameters: dict[str, Any], log: Path) -> str:
        """As of `Notebooks`. Raises ValueError where a file that comes back was changed here."""
        if not self.client:
            return super().execute(source, target, parameters, log)
        root = Path(self.root)
        sent = pack(root, [*map(str, (source, target, log)), *needed(parameters)])
        parameters = parameters | {name: str(root / parameters[name]) for name in ("data", "sam")
                                   if parameters.get(name) and (root / parameters[name]).exists()}
        failure, changed = ask(self.client, self.far[1], source.stem,
                               (sent, (source, target, parameters, log)))
        take_back(root, sent, changed)
        return failure


@dataclass
class Visitors(Notebooks):
    """Executes notebooks of another machine, each in a folder with the files that came with it."""

    def begin(self) -> None:
        """Nothing: the folder lies with the worker's own, which Dask clears away."""

    def run_in_worker(self, item: tuple[dict[str, bytes], tuple]
                      ) -> tuple[str, dict[str, bytes | None]]:
        """item: files, and what `execute` takes. Returns what that does, and `changes`."""
        sent, arguments = item
        self.root = self.root or tempfile.mkdtemp(dir=get_worker().local_directory)
        root = Path(self.root)
        for path in root.iterdir():  # of the notebook before
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in sent.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        failure = self.execute(*arguments)
        return failure, changes(root, sent)


def needed(parameters: dict[str, Any]) -> list[str]:
    """Patterns of what a notebook with these parameters may read or write, folders included."""
    profile = parameters.get("profile")
    if not profile:  # it may read the measures of all
        return [*_ALWAYS, "figures", "results/*.*", "results/*/[!r]*", "results/*/runs/*/*.json",
                "results/*/runs/*/*.csv"]
    work, results = steps.work_folder(profile), steps.results_folder(profile)
    paths = [work / "stamps", *([work / "data"] if profile in steps.DRAWN else [])]
    if "variant" not in parameters:  # tables and figures of all runs
        paths += [results, Path("figures") / profile, Path("figures") / "claims"]
    else:
        percent = (parameters.get("percents") or [parameters.get("percent")])[0]
        run = steps.configure(profile, parameters["dataset"], percent, parameters.get("seed", 1),
                              variant=parameters["variant"], overrides=parameters.get("overrides"))
        paths += [steps.mask_folder(run), results / "masks", steps.phase1_folder(run),
                  steps.run_folder(run), work / "calibration"]
    return [*_ALWAYS, *(path.as_posix() for path in paths)]


def pack(root: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The content of files, and of all files in folders, by path relative to `root`."""
    found = {path for pattern in patterns for one in root.glob(pattern)
             for path in (one.rglob("*") if one.is_dir() else [one])}
    return {name.as_posix(): path.read_bytes() for path in sorted(found) if path.is_file()
            and not set((name := path.relative_to(root)).parts) & set(_LEFT)}


def changes(root: Path, sent: dict[str, bytes]) -> dict[str, bytes | None]:
    """What differs in a folder from what was sent there; None is a file that was removed."""
    there = pack(root, ["*"])
    return {name: there.get(name) for name in (*there, *(sent.keys() - there.keys()))
            if there.get(name) != sent.get(name)}


def take_back(root: Path, sent: dict[str, bytes], changed: dict[str, bytes | None]) -> None:
    """Make the same changes here, where all files are still what was sent.

    A folder of masks, states or drawn crowds that another notebook has made meanwhile stays as it
    is: it can be made again, while two halves make no whole.
    Raises ValueError, naming it, for a result that was changed here meanwhile, before any is
    written.
    """
    here = {name: (root / name).read_bytes() if (root / name).is_file() else None
            for name in changed}
    met = [name for name in changed if here[name] not in (sent.get(name), changed[name])]
    for name in met:
        if not name.startswith("work/"):
            raise ValueError(
                f"{root / name}: changed here while a notebook made it anew elsewhere. Both cannot "
                "stay: move this one away, then run the same command again")
    stay = {_place(name) for name in met}
    wanted = {name: content for name, content in changed.items()
              if here[name] != content and _place(name) not in stay}
    # a folder's record lists what it holds before that is there; a stamp comes when all is
    for name in sorted(wanted, key=lambda name: ("/stamps/" in name, files.HIDDEN not in name)):
        if (content := wanted[name]) is None:
            (root / name).unlink()
        else:
            with files.replacing(root / name) as temporary:
                temporary.write_bytes(content)


def _place(name: str) -> tuple[str, ...]:
    """The folder that is made as one: work/<profile>/<kind>/<name>."""
    return Path(name).parts[:4]
