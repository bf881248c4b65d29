"""`make reproduce`: plan the study, run what is missing or stale with papermill, compare.

A step is one notebook with parameters. Steps run in parallel where their inputs allow it, each
in its own process; a finished step is stamped, so that nothing finished is lost to a crash or to
Ctrl-C. At the end every table is compared with the committed one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.study import steps
from xmask.config import Config, preset
from xmask.presets import ABLATIONS, DATASETS, PERCENTS, VARIANTS

NOTEBOOKS = Path("notebooks")
# bytes: the C library (glibc; others ignore it) keeps freed memory for the next step instead of
# giving it back, which saves about 6% of a training step on a CPU
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 29), "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
                "MALLOC_TOP_PAD_": str(1 << 26)}


@dataclass
class Step:
    """One execution of a notebook.

    inputs: names of the steps that must be done before. fingerprint: called once they are.
    done: whether what the notebook makes is there and fresh.
    """

    name: str
    notebook: str
    parameters: dict
    executed: Path
    inputs: list[str] = field(default_factory=list)
    fingerprint: Callable[[], str] = lambda: ""
    outputs: Callable[[], list[Path]] = list

    @property
    def source(self) -> Path:
        return NOTEBOOKS / self.notebook


def plan(
    profile: str,
    *,
    data: str = "",
    sam: str = "",
    datasets: tuple[str, ...] = DATASETS,
    percents: tuple[int, ...] = PERCENTS,
    seeds: tuple[int, ...] = (1,),
    extras: bool = True,
    overrides: dict[str, object] | None = None,
) -> list[Step]:
    """All steps of a study, inputs before what needs them.

    extras: also supervised-only runs on the first dataset and, on its middle percentage, the
    ablations. overrides: changes to every run's configuration, by dotted name.
    """
    def config(dataset: str, percent: int, seed: int, variant: str = "xmask") -> Config:
        return steps.configure(profile, dataset, percent, seed, variant=variant, sam=sam,
                               overrides=overrides)

    steps: list[Step] = []
    runs: list[Config] = [config(d, p, s) for d in datasets for p in percents for s in seeds]
    extra: list[Config] = []
    if extras:
        first, middle = datasets[0], sorted(percents)[len(percents) // 2]
        extra = [config(first, p, s, "supervised-only") for p in percents for s in seeds]
        extra += [config(first, middle, s, v) for v in ABLATIONS for s in seeds]

    # a run's configuration is named after its overrides too; notebooks want the plain variant
    named = {config(d, p, s, v).run: v for d in datasets for p in percents for s in seeds
             for v in VARIANTS}
    by_masks: dict[Path, list[Config]] = {}
    for run in runs + extra:
        by_masks.setdefault(steps.mask_folder(run), []).append(run)
    common = {"profile": profile, "data": data, "sam": sam}
    settings = {"overrides": overrides or {}}
    results = steps.results_folder(profile)
    for folder, users in by_masks.items():
        percents_used = sorted({user.percent for user in users})
        steps.append(
            Step(
                f"masks {folder.name}",
                "10_masks.ipynb",
                common | settings | {"dataset": users[0].dataset, "percents": percents_used,
                                     "variant": named[users[0].run]},
                results / "masks" / folder.name / "10_masks.ipynb",
                fingerprint=partial(_masks_fingerprint, users, data),
                outputs=partial(_one, results / "masks" / folder.name / "masks.csv"),
            )
        )
    for run in sorted(runs + extra, key=lambda r: -r.percent):  # the longest first
        variant = named[run.run]
        shared = [f"train {config(run.dataset, run.percent, run.seed).run}"]
        folder = steps.run_folder(run)
        arguments = common | settings | {"dataset": run.dataset, "percent": run.percent,
                                         "seed": run.seed, "variant": variant}
        steps.append(
            Step(
                f"train {run.run}", "11_train.ipynb", arguments, folder / "11_train.ipynb",
                [f"masks {steps.mask_folder(run).name}"]
                + (shared if variant != "xmask" else []),
                partial(steps.train_fingerprint, run, data),
                partial(_in, folder, ("config.json", "history.csv", "model.safetensors")),
            )
        )
        steps.append(
            Step(
                f"evaluate {run.run}", "12_evaluate.ipynb", arguments,
                folder / "12_evaluate.ipynb", [f"train {run.run}"],
                partial(steps.evaluation_fingerprint, run, data),
                partial(_one, folder / "metrics.json"),
            )
        )
    names = [run.run for run in runs + extra]
    evaluated = [f"evaluate {name}" for name in names]
    inputs = [steps.run_folder(run) / name for run in runs + extra
              for name in ("metrics.json", "history.csv", "config.json")]
    last = common | {"runs": names}
    for title, notebook, parameters, folder in (
        ("tables", "20_tables.ipynb", last, results / "tables"),
        ("figures", "21_figures.ipynb", last, Path("figures") / profile),
        ("ablations", "22_ablations.ipynb",
         last | {"dataset": datasets[0], "percent": sorted(percents)[len(percents) // 2]}, None),
    ):
        # runs with changed fields are named after them: none is the full method to compare with
        if title == "ablations" and (not extras or runs[0].variant != "xmask"):
            continue
        steps.append(
            Step(title, notebook, parameters, results / notebook, evaluated,
                 partial(_report_fingerprint, inputs),
                 partial(_all_in, folder) if folder else list)
        )
    return steps


def _masks_fingerprint(users: list[Config], data: str) -> str:
    from xmask import segmenters

    dataset = steps.open_train(users[0], data)
    chosen = sorted({index for user in users for index in steps.labelled(user, data)})
    segmenter = segmenters.open_segmenter(users[0].masks.segmenter, "cpu").describe()
    return provenance.digest(provenance.code("xmask.edp_sam", "xmask.study.steps"), segmenter,
                             provenance.versions(), steps.mask_options(users[0]),
                             dataset.checksum(), chosen)


def _report_fingerprint(inputs: list[Path]) -> str:
    return provenance.digest(provenance.code("xmask.study.tables", "xmask.study.figures"),
                             [files.sha256(path) for path in inputs])


def _one(path: Path) -> list[Path]:
    return [path]


def _in(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names]


def _all_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- running -------------------------------------------------------------------------------


def run(profile: str, *, data: str = "", jobs: int | None = None, **narrowed) -> bool:
    """Run a study; print what was done and whether the tables equal the committed ones.

    jobs: steps at a time; by default as many as runs fit on the CPU cores, one on CUDA.
    Returns False if a step failed; the others that do not need it still run.
    """
    steps = plan(profile, data=data, **narrowed)
    config = preset(profile, "sha", 5)
    if jobs is None:
        threads = config.machine.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = 1 if steps.device().type == "cuda" or not threads else max(1, cores // threads)
    for dataset in dict.fromkeys(s.parameters["dataset"] for s in steps
                                 if "dataset" in s.parameters):
        steps.data_root(profile, dataset, data, jobs=jobs)
    begun = time.time()
    failed = Runner(profile, jobs, config.machine.threads).run(steps)
    minutes = (time.time() - begun) / 60
    if failed:
        print(f"\n{len(failed)} of {len(steps)} steps failed or could not start after "
              f"{minutes:.1f} min: {', '.join(failed)}.\nWhat finished is kept; the same command "
              "goes on from here.")
        return False
    print(f"\nAll {len(steps)} steps are done ({minutes:.1f} min).")
    for line in compare_with_committed(steps.results_folder(profile)):
        print(line)
    return True


class Runner:
    """Runs steps in parallel, each notebook in its own process."""

    def __init__(self, profile: str, jobs: int, threads: int):
        self.profile, self.jobs = profile, jobs
        self.environment = dict(os.environ)
        if threads:
            self.environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "agg"}
        for name, value in _KEEP_MEMORY.items():
            self.environment.setdefault(name, value)
        self.processes: set[subprocess.Popen] = set()
        self.lock, self.stopping = threading.Lock(), False

    def run(self, steps: list[Step]) -> list[str]:
        """Names of the steps that failed or whose inputs failed."""
        waiting, done, failed = list(steps), set(), []
        bar = tqdm(total=len(steps), unit="step", desc=f"reproduce {self.profile}")
        running: dict = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    for step in list(waiting):
                        if any(name in failed for name in step.inputs):
                            waiting.remove(step)
                            failed.append(step.name)
                            bar.write(f"- {step.name}: not started, an input failed")
                        elif len(running) < self.jobs and done.issuperset(step.inputs):
                            waiting.remove(step)
                            running[pool.submit(self._step, step)] = step
                    bar.set_postfix_str(", ".join(s.name for s in running.values()))
                    if not running:
                        continue
                    for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                        step = running.pop(future)
                        bar.update()
                        try:
                            bar.write(f"- {step.name}: {future.result()}")
                            done.add(step.name)
                        except StepFailed as error:
                            failed.append(step.name)
                            bar.write(f"- {step.name}: FAILED\n{error}")
            except BaseException:
                self._stop()
                raise
        bar.close()
        return failed

    def _step(self, step: Step) -> str:
        work, label = steps.work_folder(self.profile), step.name.replace(" ", "-")
        stamp = work / "stamps" / f"{label}.nb.json"
        try:
            fingerprint = provenance.digest(
                step.fingerprint(), files.sha256(step.source), step.parameters
            )
        except (OSError, ValueError) as error:
            raise StepFailed(f"  {error}") from error
        if provenance.is_done(stamp, fingerprint):
            return "unchanged"
        begun = time.time()
        log = work / "logs" / f"{label}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        draft = log.with_suffix(".ipynb")
        command = [sys.executable, "-m", "papermill", str(step.source), str(draft),
                   "--no-progress-bar", "--log-output",
                   "-y", json.dumps(step.parameters)]
        with open(log, "w", encoding="utf-8") as output:
            with self.lock:
                if self.stopping:
                    raise StepFailed("  stopped")
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                           env=self.environment, start_new_session=True)
                self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
            raise StepFailed(f"{tail}\n  log: {log}\n  notebook as far as it came: {draft}")
        step.executed.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(draft, step.executed)
        provenance.write_stamp(stamp, fingerprint, [step.executed, *step.outputs()])
        return f"{time.time() - begun:.0f} s"

    def _stop(self) -> None:
        """Interrupt the notebooks that run; each has its own process group (its kernel)."""
        with self.lock:
            self.stopping = True
            for process in self.processes:
                try:
                    os.killpg(process.pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass


class StepFailed(Exception):
    """A notebook ended with an error; the message ends with where to look."""


def compare_with_committed(results: Path) -> list[str]:
    """One line per table: equal to the one committed in git, different, or not committed."""
    lines = []
    for path in sorted((results / "tables").glob("*.csv")):
        shown = subprocess.run(["git", "show", f"HEAD:./{path.as_posix()}"], capture_output=True)
        if shown.returncode:
            verdict = "not committed, nothing to compare with"
        elif shown.stdout == path.read_bytes():
            verdict = "equal to the committed table"
        else:
            ours, theirs = path.read_text().splitlines(), shown.stdout.decode().splitlines()
            different = sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
            verdict = (f"DIFFERS from the committed table in {different} of {len(theirs)} lines "
                       "(another choice of runs, code, data, versions or kind of CPU)")
        lines.append(f"{path}: {verdict}")
    return lines
