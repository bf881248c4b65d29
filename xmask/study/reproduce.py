"""`make reproduce`: plan the study, run what is missing or stale with papermill, compare.

A step is one notebook with parameters, and one task of Dask, which knows what has to be done before
it: on this machine, or on any cluster, whose machines may see the clone or not. A finished step
is stamped, so that nothing finished is lost to a crash or to Ctrl-C. Executed notebooks lie in
`work/<profile>/notebooks`, since they hold times. At the end every table is compared with the
committed one.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from tqdm.auto import tqdm

from xmask import files, memory, provenance
from xmask.config import Config, preset
from xmask.data.cluster import work_in_order
from xmask.presets import ABLATIONS, COMPARED, DATASETS, PERCENTS, POINTS_ONLY, SEEDS
from xmask.study import claims, constants, steps, tables
from xmask.study.travel import Travelling, open_notebooks

NOTEBOOKS = Path("notebooks")
SCENES = 102  # on which claims about prompts rest
# what is changed at the middle percentage, where that is not ABLATIONS: the demo is to take half
# an hour; `full` tries the point-mask term, too, which the CPU profiles leave out; of photographs
# there are no true masks to tell most of them apart
ABLATED = {"demo": ("without-nnec", "without-mask-constraint"),
           "full": (*ABLATIONS, "with-point-mask"), "photo": ()}


@dataclass
class Step:
    """One execution of a notebook.

    inputs: names of the steps that must be done before. fingerprint: what the notebook's results
    depend on, called once they are. outputs: its files, or folders of them.
    """

    name: str
    notebook: str
    parameters: dict
    inputs: list[str] = field(default_factory=list)
    fingerprint: Callable[[], str] = lambda: ""
    outputs: list[Path] = field(default_factory=list)

    @property
    def source(self) -> Path:
        return NOTEBOOKS / self.notebook

    def made(self) -> list[Path]:
        """Every file of its outputs, once it has run."""
        return [path for output in self.outputs
                for path in (sorted(output.rglob("*")) if output.is_dir() else [output])
                if not path.is_dir()]


def plan(profile: str, *, data: str = "", sam: str = "",
         datasets: tuple[str, ...] = DATASETS, percents: tuple[int, ...] = PERCENTS,
         seeds: tuple[int, ...] | None = None, extras: bool = True,
         overrides: dict[str, object] | None = None) -> list[Step]:
    """All steps of a study, inputs before what needs them.

    seeds: None takes the profile's own. extras: also the methods to compare with (`COMPARED`, else
    supervised-only) on the first dataset and, on its middle percentage, the ablations; with
    `COMPARED` the claims too. overrides: changes to every run's configuration, by dotted name.
    """
    seeds = seeds or SEEDS.get(profile, (1,))
    wanted = [(d, p, s, "xmask") for d in datasets for p in percents for s in seeds]
    first, middle = datasets[0], sorted(percents)[len(percents) // 2]
    if extras:
        wanted += [(first, p, s, variant) for p in percents for s in seeds
                   for variant in COMPARED.get(profile, ("supervised-only",))]
        wanted += [(first, middle, s, variant) for variant in ABLATED.get(profile, ABLATIONS)
                   for s in seeds]
    common = {"profile": profile, "data": data, "sam": sam}
    # a run's configuration is named after its overrides too; notebooks want the plain variant
    runs = [(steps.configure(profile, d, p, s, variant=v, sam=sam, overrides=overrides), v)
            for d, p, s, v in dict.fromkeys(wanted)]
    settings = common | {"overrides": overrides or {}}
    # runs with changed fields are named after them: none is the full method to compare with
    compared = extras and runs[0][0].variant == "xmask"
    planned = [*_mask_steps(runs, settings), *_run_steps(runs, settings),
               *_report_steps([run for run, _ in runs], common,
                              {"dataset": first, "percent": middle} if compared else None)]
    if compared and profile in COMPARED:
        of_first = [(run, v) for run, v in runs if run.dataset == first]
        evaluated = [step for step in planned if step.name.startswith(f"evaluate {first}-")]
        if profile in steps.DRAWN:  # the claims read their table, and share a folder of figures
            moved = _constant_steps([run for run, v in of_first if v == "xmask"
                                     and run.percent == middle], settings)
            planned, evaluated = planned + moved, [*evaluated, moved[-1]]
        planned += _claim_steps(of_first, settings, evaluated)
    return planned


def _mask_steps(runs: list[tuple[Config, str]], settings: dict) -> Iterator[Step]:
    """One step for all runs that share a folder of masks."""
    users: dict[Path, list[tuple[Config, str]]] = {}
    for run, variant in runs:
        users.setdefault(steps.mask_folder(run), []).append((run, variant))
    for folder, using in users.items():
        (run, variant), users_of_it = using[0], [user for user, _ in using]
        yield Step(
            f"masks {folder.name}", "10_masks.ipynb",
            settings | {"dataset": run.dataset, "variant": variant,
                        "percents": sorted({user.percent for user in users_of_it})},
            fingerprint=partial(_masks_fingerprint, users_of_it, settings["data"]),
            outputs=[steps.results_folder(run.profile) / "masks" / folder.name / "masks.csv"])


def _arguments(settings: dict, run: Config, variant: str) -> dict:
    return settings | {"dataset": run.dataset, "percent": run.percent, "seed": run.seed,
                       "variant": variant}


def _run_steps(runs: list[tuple[Config, str]], settings: dict) -> Iterator[Step]:
    full = {(run.dataset, run.percent, run.seed): run.run for run, v in runs if v == "xmask"}
    # seed by seed, so that what is there after a stop can be compared; the longest first
    for run, variant in sorted(runs, key=lambda one: (one[0].seed, -one[0].percent)):
        folder, data = steps.run_folder(run), settings["data"]
        arguments = _arguments(settings, run, variant)
        inputs = [f"masks {steps.mask_folder(run).name}"]
        if variant not in ("xmask", *POINTS_ONLY):  # it takes phase 1 from the full method
            inputs.append(f"train {full[run.dataset, run.percent, run.seed]}")
        yield Step(f"train {run.run}", "11_train.ipynb", arguments, inputs,
                   partial(steps.train_fingerprint, run, data),
                   [folder / name for name in steps.TRAINED])
        yield Step(f"evaluate {run.run}", "12_evaluate.ipynb", arguments, [f"train {run.run}"],
                   partial(steps.evaluation_fingerprint, run, data),
                   [folder / "metrics.json"])


def _report_steps(runs: list[Config], common: dict, compared: dict | None) -> Iterator[Step]:
    """Tables, figures and, of the runs `compared`, the ablations."""
    profile, evaluated = runs[0].profile, [f"evaluate {run.run}" for run in runs]
    inputs = [steps.run_folder(run) / name for run in runs
              for name in ("metrics.json", "history.csv", "config.json")]
    last = common | {"runs": [run.run for run in runs]}
    fingerprint = partial(_report_fingerprint, inputs)
    yield Step("tables", "20_tables.ipynb", last, evaluated, fingerprint,
               [steps.results_folder(profile) / "tables"])
    yield Step("figures", "21_figures.ipynb", last, evaluated, fingerprint,
               [Path("figures") / profile])
    if compared:
        yield Step("ablations", "22_ablations.ipynb", last | compared, evaluated, fingerprint)


def _claim_steps(runs: list[tuple[Config, str]], settings: dict, evaluated: list[Step]
                 ) -> list[Step]:
    """On drawn crowds, other masks at the points of the full method's runs, counts at calibrated
    thresholds, and the prompts; then the claims."""
    profile, made = runs[0][0].profile, []
    scenes = steps.results_folder(profile) / "edp_sam"
    if profile in steps.DRAWN:
        for step, notebook, variants, depends, file in (
                ("compare", "16_other_masks.ipynb", ("xmask",), steps.comparison_fingerprint,
                 "other_masks.json"),
                ("calibrate", "18_calibrated_counts.ipynb", ("xmask", *COMPARED[profile]),
                 steps.calibrated_fingerprint, "calibrated.json")):
            made += [Step(f"{step} {run.run}", notebook, _arguments(settings, run, variant),
                          [f"evaluate {run.run}"], partial(depends, run, settings["data"]),
                          [steps.run_folder(run) / file])
                     for run, variant in runs if variant in variants]
        made.append(Step(
            "prompts", "15_edp_sam_study.ipynb",
            {"scenes": SCENES, "segmenters": ["classical"], "out": scenes.as_posix()}, [],
            partial(provenance.fingerprint, ("xmask.study.edp_study",)), [scenes]))
    results, figures = steps.results_folder(profile).parent, Path("figures") / "claims"
    verdicts = Step("claims", "23_claims.ipynb", {},
                    [step.name for step in (*evaluated, *made)], _claims_fingerprint,
                    [results / "claims.md", results / "claims.csv",
                     figures / "claims.png", figures / "curves_compared.png"])
    return [*made, verdicts]


def _claims_fingerprint() -> str:
    """Of every run that claims may read: they are of several profiles."""
    inputs = [path for profile in COMPARED for name in (
        "runs/*/metrics.json", "runs/*/history.csv", "runs/*/other_masks.json",
        "runs/*/calibrated.json", "edp_sam/scenes.csv", "constants.csv")
              for path in sorted(steps.results_folder(profile).glob(name))]
    return provenance.fingerprint(("xmask.study.claims", "xmask.study.claim_figures"),
                                  [(path.as_posix(), files.sha256(path)) for path in inputs])


def _constant_steps(full: list[Config], settings: dict) -> list[Step]:
    """The constants moved alone: some trainings, and the table of all."""
    made = []
    for run in full:
        if run.seed in constants.SEEDS:
            for change in constants.changes(run):
                moved = (steps.configure(run.profile, run.dataset, run.percent, run.seed,
                                         overrides=change), "xmask")
                made += _run_steps([moved], settings | {"overrides": change})
    evaluated = [step for step in made if step.name.startswith("evaluate")]
    own = [f"evaluate {run.run}" for run in full]
    inputs = [path for step in evaluated for path in step.outputs]
    inputs += [steps.run_folder(run) / name for run in full
               for name in ("metrics.json", "model.safetensors")]
    where = {"dataset": full[0].dataset, "percent": full[0].percent,
             "seeds": [run.seed for run in full]}
    profile = full[0].profile
    table = Step("constants", "24_constants.ipynb",
                 where | {name: settings[name] for name in ("profile", "data", "sam")},
                 [*own, *(step.name for step in evaluated)],
                 lambda: provenance.fingerprint(("xmask.study.constants",),
                                                [files.sha256(path) for path in inputs]),
                 [steps.results_folder(profile) / "constants.csv",
                  Path("figures") / "claims" / "constants.png"])
    return [*made, table]


def _masks_fingerprint(users: list[Config], data: str) -> str:
    chosen = sorted({index for user in users for index in steps.labelled(user, data)})
    return steps.mask_fingerprint(users[0], chosen, data)


def _report_fingerprint(inputs: list[Path]) -> str:
    return provenance.fingerprint(("xmask.study.tables", "xmask.study.figures"),
                                  tables.read_published().to_csv(),
                                  [files.sha256(path) for path in inputs])


def _cells(notebook: Path) -> list[str]:
    """What a notebook does: its code, not its prose."""
    cells = files.read_json(notebook)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


# -- running -------------------------------------------------------------------------------


def run(profile: str, *, data: str = "", jobs: int | None = None, scheduler: str = "",
        cluster: str = "", **narrowed) -> bool:
    """Run a study; print what was done and whether the tables equal the committed ones.

    jobs: steps at a time; by default as many as runs fit on the CPU cores, one on CUDA.
    scheduler, cluster: other machines instead, as of `xmask.data.cluster.open_client`. Where one
    does not see the current folder, files travel to them and back.
    Returns False if a step failed; the others that do not need it still run.
    Raises ValueError, naming the other process, where one reproduces the same profile.
    """
    planned = plan(profile, data=data, **narrowed)
    config = preset(profile, "sha", 5)
    if jobs is None:
        threads = config.machine.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = 1 if steps.device().type == "cuda" or not threads else max(1, cores // threads)
    begun = time.time()
    with files.lock(steps.work_folder(profile)):
        for dataset in dict.fromkeys(step.parameters["dataset"] for step in planned
                                     if "dataset" in step.parameters):
            steps.data_root(profile, dataset, data, jobs=jobs)
        failed = run_steps(profile, planned, threads=config.machine.threads, workers=jobs,
                           scheduler=scheduler, cluster=cluster)
    minutes = (time.time() - begun) / 60
    if failed:
        print(f"\n{len(failed)} of {len(planned)} steps failed or could not start after "
              f"{minutes:.1f} min: {', '.join(failed)}.\nWhat finished is kept; the same command "
              "goes on from here.")
        return False
    print(f"\nAll {len(planned)} steps are done ({minutes:.1f} min).")
    print(_claims_shown(profile, planned))
    print(compare_with_committed(steps.results_folder(profile)))
    return True


def _claims_shown(profile: str, planned: list[Step]) -> str:
    """Which claims of the paper this study can show, in words."""
    if any(step.name == "claims" for step in planned):
        return "Claims and verdicts: results/claims.md"
    seeds = len({step.parameters["seed"] for step in planned if "seed" in step.parameters})
    drawn = steps.DRAWN.get(profile)
    images = f" and {drawn['test']} test images a dataset" if drawn else ""
    return (f"Claims: {seeds} seed{'s' if seeds > 1 else ''}{images}. A verdict takes "
            f"{claims.SEEDS} seeds and {claims.IMAGES} images: see results/claims.md, or run "
            "`make reproduce PROFILE=full`.")


def run_steps(profile: str, planned: list[Step], *, threads: int = 0, **where) -> list[str]:
    """Run steps; returns the names of those that failed or whose inputs failed.

    planned: inputs before what needs them; the first ones are begun first. threads: of each step.
    where: as of `open_client`.
    """
    environment = {name: os.environ.get(name, value) for name, value in memory.ENVIRONMENT.items()}
    environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "agg"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    failed = []
    job = _Steps(os.getcwd(), environment, work=steps.work_folder(profile))
    with (open_notebooks(job, **where) as client,
          tqdm(total=len(planned), unit="step", desc=f"reproduce {profile}") as bar):
        for name, found in work_in_order(
                client, job, {step.name: ([step], step.inputs) for step in planned}, retries=2):
            bar.update()
            (done, said), = [(False, f"FAILED\n{found}")] if isinstance(found, Exception) else found
            bar.write(f"- {name}: {said}")
            if not done:
                failed.append(name)
    return failed


@dataclass
class _Steps(Travelling):
    """Runs the steps of a study, in a worker. work: what is made on the way."""

    work: Path = Path("work")

    def run_in_worker(self, step: Step, *inputs: list[tuple[bool, str]]) -> tuple[bool, str]:
        """Whether the step is done, and what to say of it; inputs: the same of those before."""
        if not all(done for (done, _), in inputs):
            return False, "not started, an input failed"
        os.chdir(self.root)
        begun, label = time.time(), step.name.replace(" ", "-")
        stamp, executed = (self.work / "stamps" / f"{label}.nb.json",
                           self.work / "notebooks" / f"{label}.ipynb")
        try:
            fingerprint = provenance.digest(
                step.fingerprint(), _cells(step.source), step.parameters)
        except (OSError, ValueError) as error:
            return False, f"FAILED\n  {error}"
        if provenance.is_done(stamp, fingerprint):
            return True, "unchanged"
        failure = self.execute(step.source, executed, step.parameters,
                               self.work / "logs" / f"{label}.log")
        if failure:
            return False, f"FAILED\n{failure}"
        provenance.write_stamp(stamp, fingerprint, [executed, *step.made()])
        return True, f"{time.time() - begun:.0f} s"


def compare_with_committed(results: Path) -> str:
    """One line: how many tables equal those committed in git, and what differs in the others."""
    folder = results / "tables"
    try:
        listed = _git("ls-tree", "--name-only", "HEAD", f"{folder.as_posix()}/").decode()
    except (OSError, subprocess.CalledProcessError):  # no git, no clone, no commit
        return "reproduced: no git commit here to compare the tables with"
    committed = {Path(line) for line in listed.splitlines() if line.endswith(".csv")}
    made = set(folder.glob("*.csv"))
    verdicts = {path: _difference(path) if path in committed & made else
                "is not committed" if path in made else "was not made"
                for path in sorted(committed | made)}
    different = [f"{path.as_posix()} {verdict}" for path, verdict in verdicts.items() if verdict]
    equal = len(verdicts) - len(different)
    return "; ".join([f"reproduced: {equal} of {len(verdicts)} tables equal", *different])


def _difference(path: Path) -> str:
    ours, theirs = path.read_bytes(), _git("show", f"HEAD:./{path.as_posix()}")
    if ours == theirs:
        return ""
    pairs = list(zip_longest(ours.splitlines(), theirs.splitlines()))
    return (f"differs in {sum(a != b for a, b in pairs)} of "
            f"{len(theirs.splitlines())} lines")


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
