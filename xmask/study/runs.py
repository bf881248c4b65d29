"""Run folders as one table: what was trained, on what, and how well it did.

A run is a folder `results/<profile>/runs/<dataset>-<percent>-s<seed>[-<variant>]/` with
config.json (what the run was) and metrics.json (what it reached). Tables and figures start here.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from xmask import files

UNKNOWN = "—"
DATASETS = {"sha": "ShanghaiTech A", "shb": "ShanghaiTech B", "qnrf": "UCF-QNRF",
            "jhu": "JHU-CROWD++", "synthetic": "drawn crowds"}
VARIANTS = {"xmask": "XMask", "supervised-only": "supervised only",
            "points-only": "points only (mean teacher)",
            "supervised-points-only": "points only, supervised",
            "with-point-mask": "with the point-mask term",
            "without-nnec": "without NNEC", "without-superpixel": "without superpixel prompt",
            "without-smoothing": "without Gaussian smoothing",
            "without-center-sampling": "without center sampling",
            "without-mask-constraint": "without mask constraint"}
SELECTIONS = ("last", "best-on-test")
AGAIN = "Delete this file and evaluate the run again (`xmask evaluate`, or `make reproduce`)."
REMEDY = {"metrics.json": AGAIN,
          "config.json": "Delete the run folder and train again (`xmask train`)."}


def load_runs(folder: str | Path, only: Sequence[str] = ()) -> pd.DataFrame:
    """Read every evaluated run of one profile, one row a run.

    folder: `results/<profile>`, the folder that holds `runs/`. only: names of the runs wanted;
    empty for all.
    Columns: run, path, profile, dataset, percent, seed, variant, synthetic, selection, images;
    mae, rmse (people); mean_iou, ap50, pq, aji (0 to 1, NaN without truth masks);
    precision_<px>, recall_<px>, f1_<px> (0 to 1); constant_mae and constant_rmse (people),
    disc_mean_iou (whole discs) and exclusive_disc_mean_iou (discs that cut each other), the
    baselines, NaN if absent;
    longer_side, checksum, backbone, initialisation, segmenter (what the number depends on).
    `.attrs["skipped"]` names the run folders that have no metrics.json yet; they are left out
    with a warning.
    Raises FileNotFoundError without a runs folder or without any evaluated run, and ValueError
    for a broken file, for two runs of the same experiment, and for runs of one table cell that
    differ in data, backbone or segmenter.
    """
    folder = Path(folder)
    if not (folder / "runs").is_dir():
        raise FileNotFoundError(f"{folder / 'runs'}: no such folder. Train a model first "
                                "(`xmask train`, or `make reproduce`), or name another profile.")
    found = sorted(path for path in (folder / "runs").iterdir()
                   if path.is_dir() and not path.name.startswith("."))
    missing = sorted(set(only) - {path.name for path in found})
    if missing:
        raise FileNotFoundError(f"{folder / 'runs'}: no run {', '.join(missing)}. Train it first "
                                "(`xmask train`, or `make reproduce`).")
    found = [path for path in found if not only or path.name in only]
    skipped = [path.name for path in found if not (path / "metrics.json").exists()]
    if skipped:
        warnings.warn(f"{folder / 'runs'}: not yet evaluated, left out: {', '.join(skipped)}",
                      stacklevel=2)
    rows = [_read_checked(path) for path in found if path.name not in skipped]
    if not rows:
        raise FileNotFoundError(f"{folder / 'runs'}: no run has a metrics.json. "
                                "Evaluate one first (`xmask evaluate`, or `make reproduce`).")
    rows.sort(key=lambda row: (_place(row["dataset"], DATASETS), row["percent"],
                               _place(row["variant"], VARIANTS), row["seed"]))
    runs = pd.DataFrame(rows)
    _check_runs(runs, folder)
    runs.attrs["skipped"] = skipped
    return runs


def _field(content: Any, file: Path, name: str, kind: type | tuple[type, ...]) -> Any:
    """The value at a dotted field name, or an error that names the file, field and remedy."""
    value = content
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{file}: field '{name}' is missing. {REMEDY[file.name]}")
        value = value[key]
    number = kind is float
    wrong = isinstance(value, bool) if number else not isinstance(value, kind)
    if wrong or number and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{file}: field '{name}' holds {value!r}, "
                         f"which is not a valid {'number' if number else 'value'}. "
                         f"{REMEDY[file.name]}")
    return float(value) if number else value


def _fraction(content: Any, file: Path, name: str) -> float:
    """A value from 0 to 1; null is a value that is not defined, such as 0 of 0 predictions."""
    if _field(content, file, name, (float, int, type(None))) is None:
        return math.nan
    value = _field(content, file, name, float)
    if not -1e-9 <= value <= 1 + 1e-9:
        raise ValueError(f"{file}: field '{name}' is {value}, and must be between 0 and 1. {AGAIN}")
    return value


_OF_MASKS = {  # column -> field of metrics.json, whose section is null without truth masks
    **{name: f"segmentation.{name}" for name in ("mean_iou", "ap50", "pq", "aji")},
    "disc_mean_iou": "baselines.fixed_disc.mean_iou",
    "exclusive_disc_mean_iou": "baselines.exclusive_disc.mean_iou"}


def _read_checked(path: Path) -> dict[str, Any]:
    """A run, whatever hands its files went through."""
    try:
        return _read_run(path)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: config.json or metrics.json is not as a run leaves it "
                         f"({type(error).__name__}: {error}). {AGAIN}") from None


def _read_run(path: Path) -> dict[str, Any]:
    file, config_file = path / "metrics.json", path / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file}: missing, so nothing says what this run was. "
                                "Restore it, or delete the run folder and train again.")
    metrics, config = files.read_json(file), files.read_json(config_file)
    known, share = partial(_field, metrics, file), partial(_fraction, metrics, file)
    row: dict[str, Any] = {"run": path.name, "path": str(path)}
    kinds = {"profile": str, "dataset": str, "percent": float, "seed": int, "variant": str,
             "synthetic": bool, "selection": str}
    for name, kind in kinds.items():
        row[name] = known(name, kind)
        if _field(config, config_file, name, kind) != row[name]:
            raise ValueError(f"{file}: field '{name}' is {row[name]!r}, but config.json beside it "
                             f"says {config[name]!r}. {AGAIN}")
    for name in ("dataset", "variant", "profile"):  # they become names of files
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", row[name]) or row[name].startswith("."):
            raise ValueError(f"{file}: field '{name}' is {row[name]!r}, which is no name. {AGAIN}")
    if row["selection"] not in SELECTIONS:
        raise ValueError(f"{file}: field 'selection' is {row['selection']!r}, and must be one of "
                         f"{', '.join(SELECTIONS)}. {AGAIN}")
    row |= {"images": known("images", int), "mae": known("counting.mae", float),
            "rmse": known("counting.rmse", float)}
    distances = known("localization", dict)
    if not all(re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", one) for one in distances):
        raise ValueError(f"{file}: field 'localization' has {', '.join(distances)[:80]}, which are "
                         f"no distances in pixels. {AGAIN}")
    for sigma in sorted(distances, key=float):
        for name in ("precision", "recall", "f1"):
            row[f"{name}_{sigma}"] = share(f"localization.{sigma}.{name}")
    row["constant_mae"] = known("baselines.constant_count.mae", float)
    row["constant_rmse"] = (  # runs evaluated by an earlier version have none
        known("baselines.constant_count.rmse", float)
        if "rmse" in metrics["baselines"]["constant_count"] else math.nan)
    # runs of points only never train their mask head: what it says of masks is not a result
    schedule = config.get("config", {}).get("schedule", {})
    untrained = "phase1" in schedule and schedule["phase1"] == schedule["phase2"]
    for column, name in _OF_MASKS.items():
        unknown = untrained or known(name.rpartition(".")[0], (dict, type(None))) is None
        row[column] = math.nan if unknown else share(name)
    for image in known("per_image", list):
        _field(image, file, "name", str)
        for name in ("true_count", "count"):
            _field(image, file, name, float)
    if not metrics["per_image"]:
        raise ValueError(f"{file}: field 'per_image' is empty. {AGAIN}")
    return row | _conditions(config, config_file)


def _conditions(config: dict, file: Path) -> dict[str, str]:
    """What a number depends on besides the method; text, so that runs can be compared."""
    data = _field(config, file, "data", dict)
    data = {**(data.get("settings") or {}), **data}
    longer_side = "full size" if data.get("max_side") is None else f"<= {data['max_side']} px"
    segmenter = config.get("segmenter") or {}
    return {
        "longer_side": longer_side if "max_side" in data else UNKNOWN,
        "checksum": json.dumps(_field(config, file, "data.checksum", (str, dict)), sort_keys=True),
        "backbone": str(_field(config, file, "backbone.name", str)),
        "initialisation": str(_field(config, file, "backbone.initialisation", str)),
        "segmenter": " ".join(str(segmenter[name])[:12] for name in ("kind", "model_type", "sha256")
                              if name in segmenter) or UNKNOWN,
    }


def _check_runs(runs: pd.DataFrame, folder: Path) -> None:
    if runs["profile"].nunique() > 1:
        raise ValueError(f"{folder}: runs of several profiles ({listing(runs['profile'])}) in one "
                         "folder. Move each run to results/<its profile>/runs.")
    cell = ["dataset", "percent", "variant", "synthetic", "selection"]
    for key, group in runs.groupby([*cell, "seed"], sort=False):
        if len(group) > 1:
            raise ValueError(f"{folder}: {listing(group['run'])} are the same experiment {key}; "
                             "a seed counts once. Move all but one elsewhere.")
    for _, group in runs.groupby(cell, sort=False):
        for name in ("images", "longer_side", "checksum", "backbone", "initialisation",
                     "segmenter"):
            if group[name].nunique() > 1:
                raise ValueError(f"{folder}: {listing(group['run'])} differ in '{name}' "
                                 f"({listing(group[name])}), so their mean would be of unlike "
                                 "things. Run them alike, or move some to another profile.")


def by_dotted_name(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"loss.tau": 0.6, ...}; an empty section stays a value."""
    flat: dict[str, Any] = {}
    for name, inner in settings.items():
        flat |= (by_dotted_name(inner, f"{prefix}{name}.") if isinstance(inner, dict) and inner
                 else {f"{prefix}{name}": inner})
    return flat


def listing(values: pd.Series) -> str:
    """Unique values, for a sentence."""
    return ", ".join(str(value) for value in values.unique())


def ordered(names: pd.Series | list[str], order: dict | tuple) -> list[str]:
    """Unique names: the known ones in their usual order, then others by the alphabet."""
    return sorted(set(names), key=lambda name: _place(name, order))


def _place(name: str, order: dict | tuple) -> tuple[int, str]:
    return (list(order).index(name), "") if name in order else (len(order), name)
