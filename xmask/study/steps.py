"""The steps of the study, as the notebooks call them: masks, train, evaluate.

Each step makes what it needs first (the demo's data are drawn, masks are made), skips what is
done and unchanged, and leaves a stamp. All paths are relative to the repository's root.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch

from xmask import files, processes, provenance, segmenters
from xmask.config import Config, from_dict, preset
from xmask.data import open_dataset
from xmask.data.masks import mask_dataset
from xmask.data.splits import labelled_ids, stratified
from xmask.data.training_images import BareImages, Kept, MaskedImages
from xmask.study import calibrated, other_masks, training
from xmask.study import evaluate as evaluation
from xmask.synthetic import write_dataset
from xmask.tools import models
from xmask.trainer import Trainer

TRAINED = ("config.json", "history.csv", "model.safetensors")  # what a training leaves
# what is committed of a run folder, and so comes with a clone
COMMITTED = ("config.json", "history.csv", "metrics.json", "other_masks.json", "calibrated.json")
PATIENCE = 5.0  # seconds to wait for a run folder: within these a killed study's notebooks end
# profiles that draw their crowds; images per dataset: both draw the same training images
DRAWN = {"demo": {"train": 100, "test": 16, "seed": 2024},
         "full": {"train": 100, "test": 100, "seed": 2024}}


# -- notebooks -----------------------------------------------------------------------------


def enter_root(start: Path | None = None) -> Path:
    """Change to the repository's root: `start`, by default the current folder, or one above it.

    Another project with notebooks is none: the root's pyproject.toml is the one of xmask.
    """
    here = start or Path.cwd()
    for folder in (here, *here.parents):
        project = folder / "pyproject.toml"
        if (folder / "notebooks").is_dir() and project.is_file() and re.search(
                r'^name\s*=\s*"xmask"', project.read_text(encoding="utf-8"), re.MULTILINE):
            os.chdir(folder)
            return folder
    raise FileNotFoundError(
        f"{here} is not inside a clone of the repository (no folder above it holds `notebooks` "
        "and the `pyproject.toml` of xmask); work in the clone")


def check_parameters(inputs: Sequence[str]) -> None:
    """Refuse parameters that the notebook does not have; give it IPython's `In`.

    papermill itself only warns about `-p perecnt 10` and goes on with the default.
    """
    known = _assigned(inputs[1])
    for cell in inputs[2:]:
        injected = cell.lstrip().startswith("# Parameters")  # by papermill
        for name in sorted(_assigned(cell) - known) if injected else ():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown parameter {name!r}: {hint}This notebook has "
                             f"{', '.join(sorted(known))}")


def _assigned(cell: str) -> set[str]:
    return {target.id for node in ast.parse(cell).body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)}


def configure(profile: str, dataset: str, percent: int, seed: int, *, variant: str = "xmask",
              sam: str = "", overrides: dict[str, object] | None = None) -> Config:
    """The configuration of a run from a notebook's parameters; sam: path of a SAM checkpoint."""
    changes = (overrides or {}) | ({"masks.segmenter": sam} if sam else {})
    return preset(profile, dataset, percent, seed=seed, variant=variant, overrides=changes)


# -- where things are ----------------------------------------------------------------------


def results_folder(profile: str) -> Path:
    """Where tables and run folders of a profile live."""
    return Path("results") / profile


def run_folder(config: Config) -> Path:
    """The folder of a run: configuration, history, measures."""
    return results_folder(config.profile) / "runs" / config.run


def work_folder(profile: str) -> Path:
    """What is made on the way and never committed: drawn data, masks, stamps, logs."""
    return Path("work") / profile


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- data ----------------------------------------------------------------------------------


def data_root(profile: str, dataset: str, data: str = "", *, jobs: int = 1) -> Path:
    """The folder that holds the dataset; profiles of drawn crowds draw their own, once.

    Raises ValueError where a profile for real photographs is given no folder.
    """
    if profile not in DRAWN:
        if not data:
            raise ValueError(
                f"data: profile {profile!r} runs on real photographs; give the folder that holds "
                "the datasets (`--data /path`; with make `DATA=/path`, with papermill `-p data "
                "/path`)")
        return Path(data)
    if data:
        raise ValueError(
            f"data: profile {profile!r} draws its own synthetic crowds and would ignore {data}; "
            "use PROFILE=photo or PROFILE=paper for real photographs")
    root = work_folder(profile) / "data"
    write_dataset(dataset, root, **DRAWN[profile], jobs=jobs)
    return root


@cache
def _open(profile: str, dataset: str, data: str, split: str, max_side: int | None):
    return open_dataset(dataset, data_root(profile, dataset, data), split, max_side=max_side)


def open_train(config: Config, data: str = ""):
    """The training images of a configuration, a sequence of `Sample`."""
    return _open(config.profile, config.dataset, data, "train", config.max_side)


def open_test(config: Config, data: str = ""):
    """The test images of a configuration, a sequence of `Sample`."""
    return _open(config.profile, config.dataset, data, "test", config.max_side)


def test_images_of(run: str | Path, data: str = ""):
    """The test images that a run was evaluated on, at the size it saw them, by the run's folder;
    None for photographs without `data`, the folder that holds them."""
    file = Path(run) / "config.json"
    try:
        config = from_dict(files.read_json(file)["config"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: field 'config': {error}. Train the run again.") from None
    if config.profile not in DRAWN and not data:
        return None
    return open_test(config, data)


# -- masks ---------------------------------------------------------------------------------


def mask_options(config: Config) -> dict[str, bool]:
    """The options of `edp_sam.generate_masks` that a configuration sets."""
    return {"nnec": config.masks.nnec, "superpixel_prompt": config.masks.superpixel_prompt}


def mask_folder(config: Config) -> Path:
    """One folder per dataset, image size and way of making masks, for all percentages and seeds."""
    names = [config.dataset, *(f"no-{name}" for name, on in mask_options(config).items() if not on)]
    if config.max_side is not None:
        names.append(f"max-{config.max_side}")
    return work_folder(config.profile) / "masks" / "-".join(names)


def phase1_folder(config: Config) -> Path:
    """Where runs of the same labels and seed share the state at the end of phase 1."""
    split = f"{config.dataset}-{config.percent}-s{config.seed}"
    return work_folder(config.profile) / "phase1" / split


def make_masks(config: Config, indices: list[int], data: str = "", *,
               progress: bool = True) -> Path:
    """EDP-SAM masks of training images; images done by the same code are kept."""
    segmenter = segmenters.open_segmenter(config.masks.segmenter, device())
    return mask_dataset(open_train(config, data), indices, segmenter, mask_folder(config),
                        wait=3600,  # trainings share masks: the second finds them made
                        progress=progress, depends={"code": provenance.code(*_MASKING),
                                                    "versions": provenance.versions()},
                        **mask_options(config))


def labelled(config: Config, data: str = "") -> list[int]:
    """Indices of the labelled images of the configuration's split that training learns from."""
    kept = set(held_out(config, data))
    return [i for i in labelled_ids(open_train(config, data), config.percent) if i not in kept]


def held_out(config: Config, data: str = "") -> list[int]:
    """Indices of the labelled images that calibrate the counts: the same share of sparse and
    dense ones, the same for all seeds; none where that would be fewer than two. Training may see
    them as unlabelled ones."""
    share = config.calibration.held_out
    if share == 0:
        return []
    dataset = open_train(config, data)
    chosen = labelled_ids(dataset, config.percent)
    if round(share * len(chosen)) < 2:
        return []
    return [chosen[i] for i in stratified(dataset.counts()[chosen], 100 * share, seed=2024)]


# -- what steps depend on ------------------------------------------------------------------


_READING = ("xmask.data.readers", "xmask.data.splits")  # code through which every image comes
_MASKING = ("xmask.data.masks", *_READING)
# step -> modules it starts from
CODE = {"training": ("xmask.study.training", "xmask.data.training_images", "xmask.calibration",
                     *_MASKING),
        "evaluation": ("xmask.study.evaluate", *_READING),
        "comparison": ("xmask.study.other_masks", *_READING),
        "calibration": ("xmask.study.calibrated", "xmask.synthetic", *_READING)}


def _training(config: Config) -> tuple[str, ...]:
    selecting = CODE["evaluation"] if config.selection == "best-on-test" else ()
    return tuple(dict.fromkeys((*CODE["training"], *selecting)))


def _code(modules: tuple[str, ...]) -> dict[str, object]:
    """What config.json and metrics.json say about the code that made them."""
    return {"digest": provenance.code(*modules), "modules": list(modules)}


def mask_fingerprint(config: Config, indices: list[int], data: str = "") -> str:
    """What masks and their table depend on, as a digest."""
    return provenance.fingerprint(
        (*_MASKING, "xmask.study.mask_table"), _segmenter(config.masks.segmenter),
        mask_options(config), open_train(config, data).checksum(), indices)


def train_fingerprint(config: Config, data: str = "") -> str:
    """What a training depends on, as a digest: code, versions, configuration, data."""
    weights = Path(config.network.weights)  # a file of pretrained weights, or a word
    selecting = config.selection == "best-on-test"
    return provenance.fingerprint(
        _training(config), config.to_dict(), _segmenter(config.masks.segmenter),
        open_train(config, data).checksum(), labelled(config, data), device().type,
        files.sha256(weights) if weights.is_file() else "",
        open_test(config, data).checksum() if selecting else "")


def evaluation_fingerprint(config: Config, data: str = "") -> str:
    """What an evaluation depends on, as a digest: its training and the test images."""
    return provenance.fingerprint(CODE["evaluation"], train_fingerprint(config, data),
                                  open_test(config, data).checksum())


_segmenter = cache(segmenters.describe)  # a checkpoint of gigabytes is read once


def comparison_fingerprint(config: Config, data: str = "") -> str:
    """What a comparison with other masks depends on, as a digest."""
    return provenance.fingerprint(CODE["comparison"], _segmenter(config.masks.segmenter),
                                  evaluation_fingerprint(config, data))


def calibrated_fingerprint(config: Config, data: str = "") -> str:
    """What counts at a threshold set on other scenes depend on, as a digest."""
    return provenance.fingerprint(CODE["calibration"], calibrated.SCENES,
                                  evaluation_fingerprint(config, data))


def stamp_of(step: str, config: Config) -> Path:
    """The file that says that a step of a run is done."""
    return work_folder(config.profile) / "stamps" / f"{step}-{config.run}.json"


# -- training and evaluation ---------------------------------------------------------------


@processes.gone()
def train(config: Config, data: str = "", *, progress: bool = True) -> Path:
    """Train one run into its folder (config.json, history.csv, model.safetensors).

    Returns the folder. A run that is complete and whose inputs, configuration and code are
    unchanged is left alone; one that was interrupted goes on from its checkpoint. One of an earlier
    configuration or code is kept in the folder `earlier-1` until the new one is evaluated.
    Raises ValueError, naming the other process, where one trains the same run, and
    FileExistsError where the folder holds files and is no run folder, or holds a file of the
    user's whose name is needed.
    Several processes (`torchrun`) train together; the first one writes.
    """
    folder, stamp = run_folder(config), stamp_of("train", config)
    fabric = processes.open_fabric(device())
    with fabric.rank_zero_first():  # where data are drawn, once
        fingerprint = train_fingerprint(config, data)
        done = provenance.is_done(stamp, fingerprint)
    if done:
        return folder
    with ExitStack() as stack:
        held = stack.enter_context(_held(folder)) if fabric.is_global_zero else None
        with fabric.rank_zero_first():
            masks = make_masks(config, labelled(config, data), data,
                               progress=progress and fabric.is_global_zero)
        _fit(config, data, masks, fingerprint, held, progress)
        if held:
            provenance.write_stamp(stamp, fingerprint, [folder / name for name in TRAINED])
    return folder


@contextmanager
def _held(folder: Path) -> Iterator[files.OutputFolder]:
    """A run folder, locked, under the rule of all output folders.

    The record of one that came with a clone is its config.json: what is committed of a run is noted
    as ours. Another file whose name is needed, such as a model put there by hand, is set aside.
    Without either, files in it are the user's.
    """
    out = files.OutputFolder(folder, overwrite=_is_run(folder), wait=PATIENCE)
    try:
        out.check()
    except FileExistsError:
        raise FileExistsError(
            f"{folder}: holds files, but neither a record of xmask nor the config.json of a run, "
            "so they are not this package's, and nothing was written. Move them elsewhere, then "
            "run it again") from None
    with out as held:
        held.overwrite = False
        if not held.names():
            for path in map(folder.joinpath, COMMITTED):
                if path.is_file():
                    held.note(path, files.sha256(path))
        held.cloned = True
        yield held


def _is_run(folder: Path) -> bool:
    try:
        return {"config", "profile", "data"} <= set(files.read_json(folder / "config.json"))
    except (OSError, ValueError):
        return False


def _fit(config: Config, data: str, masks: Path, fingerprint: str,
         held: files.OutputFolder | None, progress: bool) -> None:
    """held: the run folder; None in a process that does not write."""
    dataset, chosen, folder = open_train(config, data), labelled(config, data), run_folder(config)
    score = None
    if config.selection == "best-on-test":
        def score(network):
            return evaluation.count_error(network, open_test(config, data), config.evaluation)

    keep = Kept if config.machine.cache_images else (lambda images: images)
    images = keep(dataset)
    trainer = Trainer(config, keep(MaskedImages(images, chosen, masks, dataset.ids)),
                      BareImages(images), device=device())
    calibrating = held_out(config, data)
    expecting = config.calibration.expected and len(chosen) > 1
    record = {
        **evaluation.identity(config, dataset.synthetic),
        "backbone": {"name": config.network.backbone, "initialisation": trainer.initialisation},
        "segmenter": _segmenter(config.masks.segmenter),
        "code": _code(_training(config)),
        "versions": provenance.versions(), "device": device().type,
        "precision": trainer.precision, "processes": processes.count(),
        "data": {
            "checksum": dataset.checksum(), "settings": dataset.settings,
            "labelled": [dataset.ids[i] for i in chosen],
            "held_out": [dataset.ids[i] for i in calibrating],
            "unlabelled": len(dataset) if config.schedule.unlabelled else 0},
        "calibration": None, "config": config.to_dict()}
    if held:
        # of an earlier configuration or code: not to stand beside a new record
        finished = [name for name in ("model.safetensors", "metrics.json")
                    if os.path.lexists(folder / name)]
        if finished:
            held.keep_earlier(*finished, "history.csv", "config.json")
        checkpoint = folder / "checkpoint.pt"
        if os.path.lexists(checkpoint) and not held.is_listed(checkpoint):
            held.set_aside(checkpoint, "not written by xmask here")
        files.write_json(folder / "config.json", record)

    def calibrate(network):
        if calibrating:
            seen = evaluation.look(network, [dataset[i] for i in calibrating], config.evaluation,
                                   progress=progress)
            found = evaluation.calibrate(seen, config)
        else:
            found = evaluation.calibrate_by_expectation(
                network, [dataset[i] for i in chosen], config, progress=progress)
        files.write_json(folder / "config.json", record | {"calibration": found.to_dict()})

    phase1 = provenance.fingerprint(("xmask.trainer", *_READING), dataset.checksum(), chosen)
    training.fit(trainer, folder, fingerprint=fingerprint, score=score, progress=progress,
                 finish=calibrate if calibrating or expecting else None,
                 shared=(phase1_folder(config), phase1))


def evaluate(config: Config, data: str = "", *, progress: bool = True) -> dict:
    """Evaluate a trained run on its test set and write metrics.json; train it first if needed.

    What `train` had kept of an earlier configuration or code is then removed.
    """
    folder, stamp = train(config, data, progress=progress), stamp_of("evaluate", config)
    fingerprint = evaluation_fingerprint(config, data)
    if not provenance.is_done(stamp, fingerprint):
        with _held(folder) as held:
            model = models.load(folder, device())
            if config.machine.threads:
                torch.set_num_threads(config.machine.threads)
            result = evaluation.evaluate(model.network, open_test(config, data), config, folder,
                                         calibrated=model.calibration, progress=progress)
            files.write_json(folder / "metrics.json", result | {"code": _code(CODE["evaluation"])})
            held.remove_earlier()
            provenance.write_stamp(stamp, fingerprint, [folder / "metrics.json"])
    return files.read_json(folder / "metrics.json")


def compare_masks(config: Config, data: str = "", *, progress: bool = True) -> dict:
    """Compare a run's masks with others at the same points and write other_masks.json; train and
    evaluate it first if needed. Raises ValueError where the test images have no true masks."""
    baselines = evaluate(config, data, progress=progress)["baselines"]
    folder, stamp = run_folder(config), stamp_of("compare", config)
    if baselines["exclusive_disc"] is None:
        raise ValueError(f"{folder / 'metrics.json'}: no true masks of the test images, so masks "
                         "cannot be compared. Use drawn crowds (profile demo or full).")
    fingerprint = comparison_fingerprint(config, data)
    if not provenance.is_done(stamp, fingerprint):
        with _held(folder):
            rows = other_masks.compare(
                open_test(config, data), folder,
                (baselines["fixed_disc"]["radius"], baselines["exclusive_disc"]["radius"]),
                segmenters.open_segmenter(config.masks.segmenter, device()), progress=progress)
            files.write_json(folder / "other_masks.json", {
                "run": config.run, "segmenter": _segmenter(config.masks.segmenter),
                "code": _code(CODE["comparison"]), "per_image": rows})
            provenance.write_stamp(stamp, fingerprint, [folder / "other_masks.json"])
    return files.read_json(folder / "other_masks.json")


def count_calibrated(config: Config, data: str = "", *, progress: bool = True) -> dict:
    """Count with the threshold that other drawn scenes set and write calibrated.json; train the
    run first if needed. Raises ValueError for a profile of photographs, which has no such scenes.
    """
    if config.profile not in DRAWN:
        raise ValueError(f"profile: {config.profile!r} runs on photographs, and the scenes that "
                         "would set the threshold are drawn. Use profile demo or full.")
    folder, stamp = train(config, data, progress=progress), stamp_of("calibrated", config)
    fingerprint = calibrated_fingerprint(config, data)
    if not provenance.is_done(stamp, fingerprint):
        place = work_folder(config.profile) / "calibration"
        write_dataset(config.dataset, place, **calibrated.SCENES, progress=progress)
        with _held(folder):
            if config.machine.threads:
                torch.set_num_threads(config.machine.threads)
            found = calibrated.counts(
                models.load(folder, device()).network, config,
                open_dataset(config.dataset, place, "test", max_side=config.max_side),
                open_test(config, data), progress=progress)
            files.write_json(folder / "calibrated.json", {
                "run": config.run, "code": _code(CODE["calibration"])} | found)
            provenance.write_stamp(stamp, fingerprint, [folder / "calibrated.json"])
    return files.read_json(folder / "calibrated.json")
