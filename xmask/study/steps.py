"""The steps of the study, as the notebooks call them: masks, train, evaluate.

Each step makes what it needs first (the demo's data are drawn, masks are made), skips what is
done and unchanged, and leaves a stamp. All paths are relative to the repository's root.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from xmask import edp_sam, files, metrics, provenance, segmenters
from xmask.study import evaluate as evaluation
from xmask.config import Config, from_dict, preset
from xmask.data import open_dataset
from xmask.data.sample import Sample
from xmask.data.splits import labelled_ids
from xmask.synthetic import write_dataset
from xmask.trainer import Trainer

_READING = ("xmask.data.readers", "xmask.data.splits")  # code through which every image comes
DRAWN = {"train": 100, "test": 16, "seed": 2024}  # images per synthetic dataset of the demo


# -- notebooks -----------------------------------------------------------------------------


def enter_root() -> Path:
    """Change to the repository's root, the folder above that holds `notebooks` and `xmask`."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            os.chdir(folder)
            return folder
    raise FileNotFoundError(
        f"{here} is not inside a clone of the repository (no folder above it holds `notebooks` "
        "and `pyproject.toml`); start Jupyter or papermill in the clone"
    )


def check_parameters(inputs: Sequence[str]) -> None:
    """Refuse parameters that the notebook does not have; give it IPython's `In`.

    papermill itself only warns about `-p perecnt 10` and goes on with the default.
    """
    known = _assigned(inputs[1])
    for cell in inputs[2:]:
        if not cell.lstrip().startswith("# Parameters"):  # papermill's injected cell
            continue
        for name in sorted(_assigned(cell) - known):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown parameter {name!r}: {hint}This notebook has {', '.join(sorted(known))}"
            )


def _assigned(cell: str) -> set[str]:
    return {
        target.id
        for node in ast.parse(cell).body if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def configure(
    profile: str,
    dataset: str,
    percent: int,
    seed: int,
    *,
    variant: str = "xmask",
    sam: str = "",
    overrides: dict[str, object] | None = None,
) -> Config:
    """The configuration of a run from a notebook's parameters; sam: path of a SAM checkpoint."""
    changes = dict(overrides or {})
    if sam:
        changes["masks.segmenter"] = sam
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
    """The folder that holds the dataset; the demo draws its own, once.

    Raises ValueError where a profile for real photographs is given no folder.
    """
    if profile != "demo":
        if not data:
            raise ValueError(
                f"data: profile {profile!r} runs on real photographs; give the folder that holds "
                "the datasets (`make reproduce PROFILE=... DATA=/path`, or `-p data /path`)"
            )
        return Path(data)
    if data:
        raise ValueError(
            f"data: profile 'demo' draws its own synthetic crowds and would ignore {data}; use "
            "PROFILE=photo or PROFILE=paper for real photographs"
        )
    root = work_folder(profile) / "data"
    write_dataset(dataset, root, **DRAWN, jobs=jobs)
    return root


@cache
def _open(profile: str, dataset: str, data: str, split: str, max_side: int | None):
    return open_dataset(dataset, data_root(profile, dataset, data), split, max_side=max_side)


def open_train(config: Config, data: str = ""):
    """The training images of a configuration, a sequence of `Sample`."""
    return _open(config.profile, config.dataset, data, "train", config.max_side)


def open_test(profile: str, dataset: str, data: str = "", max_side: int | None = None):
    """The test images of a dataset, a sequence of `Sample`."""
    return _open(profile, dataset, data, "test", max_side)


def test_images_of(run: str | Path, data: str = ""):
    """The test images that a run was evaluated on, at the size it saw them, by the run's folder;
    None for photographs without `data`, the folder that holds them."""
    config = from_dict(files.read_json(Path(run) / "config.json")["config"])
    if config.profile != "demo" and not data:
        return None
    return open_test(config.profile, config.dataset, data, config.max_side)


class MaskedImages(Sequence):
    """The labelled images: points from the dataset, masks from EDP-SAM, truth masks unread."""

    def __init__(self, dataset, indices: list[int], masks: Path, keep: bool):
        self.dataset, self.indices, self.masks = dataset, indices, masks
        self.kept: dict[int, Sample] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        return _kept(self.kept, position, self._read)

    def _read(self, position: int) -> Sample:
        index = self.indices[position]
        sample = self.dataset[index]
        mask = edp_sam.read_masks(self.masks, self.dataset.ids[index])
        if mask.shape != sample.image.shape[:2]:
            raise ValueError(
                f"{self.masks / self.dataset.ids[index]}.png: {mask.shape[1]} x "
                f"{mask.shape[0]} px, but its image has {sample.image.shape[1]} x "
                f"{sample.image.shape[0]}; delete {self.masks} and run the masks step again")
        return replace(sample, instances=mask)


class BareImages(Sequence):
    """The unlabelled images: no points and no masks, so that none can leak into training."""

    def __init__(self, dataset, indices: list[int], keep: bool):
        self.dataset, self.indices = dataset, indices
        self.kept: dict[int, Sample] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        return _kept(self.kept, position, self._read)

    def _read(self, position: int) -> Sample:
        sample = self.dataset[self.indices[position]]
        return Sample(sample.image, np.zeros((0, 2), np.float32), name=sample.name)


def _kept(kept: dict[int, Sample] | None, position: int, read) -> Sample:
    if kept is None:
        return read(position)
    if position not in kept:
        kept[position] = read(position)
    return kept[position]


# -- masks ---------------------------------------------------------------------------------


def mask_options(config: Config) -> dict[str, bool]:
    """The options of `edp_sam.generate_masks` that a configuration sets."""
    return {"nnec": config.masks.nnec, "superpixel_prompt": config.masks.superpixel_prompt}


def mask_folder(config: Config) -> Path:
    """One folder per dataset, image size and way of making masks, for all percentages and seeds."""
    names = [f"no-{name}" for name, on in mask_options(config).items() if not on]
    if config.max_side is not None:
        names.append(f"max-{config.max_side}")
    label = "-".join([config.dataset, *names])
    return work_folder(config.profile) / "masks" / label


def make_masks(config: Config, indices: list[int], data: str = "", *,
               progress: bool = True) -> Path:
    """EDP-SAM masks of training images; images done by the same code are kept."""
    segmenter = segmenters.open_segmenter(config.masks.segmenter, device())
    return edp_sam.mask_dataset(open_train(config, data), indices, segmenter,
                                mask_folder(config), progress=progress,
                                depends={"code": provenance.code("xmask.edp_sam"),
                                         "versions": provenance.versions()},
                                **mask_options(config))


def labelled(config: Config, data: str = "") -> list[int]:
    """Indices of the labelled training images of the configuration's split."""
    return labelled_ids(open_train(config, data), config.percent)


def mask_summary(config: Config, indices: list[int], data: str = "") -> pd.DataFrame:
    """One row per masked image: heads, where their masks came from, score, and IoU with the
    truth where the dataset has it (synthetic crowds)."""
    dataset, folder, rows = open_train(config, data), mask_folder(config), []
    for index in indices:
        name = dataset.ids[index]
        heads = pd.read_csv(folder / f"{name}.csv")
        sample = dataset[index]
        # "sam-point" and "classical-point" share a column
        shares = heads["source"].str.split("-").str[-1].value_counts(normalize=True)
        row = {"image": name, "heads": len(heads), "median_radius": heads["radius"].median(),
               "score": heads["score"].mean()}
        row |= {source: shares.get(source, 0.0) for source in edp_sam.SOURCES}
        row["mean_iou"] = None
        if sample.instances is not None and len(heads):
            mask = edp_sam.read_masks(folder, name)
            row["mean_iou"] = metrics.segmentation(mask, sample.instances)["mean_iou"]
        rows.append(row)
    return pd.DataFrame(rows)


# -- training and evaluation ---------------------------------------------------------------


def train_fingerprint(config: Config, data: str = "") -> str:
    """What a training depends on, as a digest: code, versions, configuration, data."""
    dataset = open_train(config, data)
    segmenter = segmenters.open_segmenter(config.masks.segmenter, "cpu").describe()
    return provenance.digest(
        provenance.code("xmask.trainer", "xmask.edp_sam", *_READING), provenance.versions(),
        config.to_dict(), segmenter, dataset.checksum(), labelled(config, data), device().type,
        _weights(config),
    )


def _weights(config: Config) -> str:
    """Checksum of the file of pretrained weights; "" where the configuration names none."""
    path = Path(config.network.weights)
    return files.sha256(path) if path.is_file() else ""


def evaluation_fingerprint(config: Config, data: str = "") -> str:
    """What an evaluation depends on, as a digest: its training and the test images."""
    test = open_test(config.profile, config.dataset, data, config.max_side)
    return provenance.digest(
        provenance.code("xmask.study.evaluate", *_READING), train_fingerprint(config, data),
        test.checksum(),
    )


def stamp_of(step: str, config: Config) -> Path:
    """The file that says that a step of a run is done."""
    return work_folder(config.profile) / "stamps" / f"{step}-{config.run}.json"


def train(config: Config, data: str = "", *, progress: bool = True) -> Path:
    """Train one run into its folder (config.json, history.csv, model.safetensors).

    Returns the folder. A run that is complete and whose inputs, configuration and code are
    unchanged is left alone; one that was interrupted goes on from its checkpoint.
    """
    folder, stamp = run_folder(config), stamp_of("train", config)
    fingerprint = train_fingerprint(config, data)
    if provenance.is_done(stamp, fingerprint):
        return folder
    dataset = open_train(config, data)
    chosen = labelled(config, data)
    masks = make_masks(config, chosen, data, progress=progress)
    rest = sorted(set(range(len(dataset))) - set(chosen))
    keep = config.machine.cache_images
    score = None
    if config.selection == "best-on-test":
        test = open_test(config.profile, config.dataset, data, config.max_side)

        def score(network):
            return evaluation.count_error(network, test, config.evaluation)

    data_part = provenance.digest(dataset.checksum(), chosen, provenance.versions(),
                                  provenance.code("xmask.trainer"))
    trainer = Trainer(
        config,
        MaskedImages(dataset, chosen, masks, keep),
        BareImages(dataset, rest, keep),
        folder,
        device=device(),
        fingerprint=fingerprint,
        cache=(work_folder(config.profile) / "phase1", data_part),
        score=score,
        progress=progress,
    )
    for stale in ("metrics.json", "model.safetensors"):  # of an earlier configuration or code
        (folder / stale).unlink(missing_ok=True)
    files.write_json(
        folder / "config.json",
        {
            "profile": config.profile,
            "dataset": config.dataset,
            "percent": config.percent,
            "seed": config.seed,
            "variant": config.variant,
            "synthetic": dataset.synthetic,
            "backbone": {"name": config.network.backbone,
                         "initialisation": trainer.initialisation},
            "selection": config.selection,
            "segmenter": segmenters.open_segmenter(config.masks.segmenter, "cpu").describe(),
            "versions": provenance.versions(),
            "device": device().type,
            "data": {
                "checksum": dataset.checksum(),
                "settings": dataset.settings,
                "labelled": [dataset.ids[i] for i in chosen],
                "unlabelled": len(rest) if config.schedule.unlabelled else 0,
            },
            "config": config.to_dict(),
        },
    )
    trainer.fit()
    provenance.write_stamp(
        stamp, fingerprint,
        [folder / name for name in ("config.json", "history.csv", "model.safetensors")],
    )
    return folder


def evaluate(config: Config, data: str = "", *, progress: bool = True) -> dict:
    """Evaluate a trained run on its test set and write metrics.json; train it first if needed."""
    folder, stamp = train(config, data, progress=progress), stamp_of("evaluate", config)
    fingerprint = evaluation_fingerprint(config, data)
    if not provenance.is_done(stamp, fingerprint):
        network, _, _ = evaluation.load(folder / "model.safetensors", device())
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        test = open_test(config.profile, config.dataset, data, config.max_side)
        files.write_json(folder / "metrics.json",
                         evaluation.evaluate(network, test, config, folder, progress=progress))
        provenance.write_stamp(stamp, fingerprint, [folder / "metrics.json"])
    return files.read_json(folder / "metrics.json")
