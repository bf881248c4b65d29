"""The method's constants, each moved alone: how far count and masks go with it.

Constants of decoding are moved on trained networks; those of the losses, of the teacher and of the
constraint take a training each. Every value is compared with the configured one on the same seeds
and test images, as claims are (`claims.paired`). Nothing is chosen by it: these are test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from xmask import decode, metrics, model
from xmask.config import Config, Evaluation
from xmask.predict import brought_back, network_maps, scaled
from xmask.presets import preset
from xmask.study import claims, figures
from xmask.tools import models
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import BLUE, GREY

SEEDS = (1, 2, 3)  # of the constants that take a training
DECODED: dict[str, tuple[float, ...]] = {
    "evaluation.theta": (0.5, 0.7, 0.9, 1.1, 1.3),
    "evaluation.geometry_weight": (0.0, 0.3, 0.6, 0.8, 1.2, 2.0),
    "evaluation.sigma": (0.0, 0.75, 1.5, 3.0, 5.0),
    "evaluation.count_threshold": (0.5, 0.55, 0.6, 0.65, 0.7),
    "evaluation.nnec": (False, True),  # one circle for all heads, or the exclusion circles
}
TRAINED: dict[str, tuple[float, ...]] = {
    "loss.tau": (0.4, 0.6, 0.8),
    "loss.margin": (0.05, 0.1, 0.2),
    "loss.sigma": (0.75, 1.5, 3.0),
    "optimisation.ema": (0.95, 0.98, 0.99),
    "loss.background": (0.1, 0.2, 0.4, 3.2),  # 16 times: the other reading, docs/differences.md
    "loss.foreground": (0.0025, 0.005, 0.01),
    "loss.one_point": (0.005, 0.01, 0.02),
}
COLUMNS = ("constant", "value", "configured", "seeds", "images", "mae", "mae_effect", "mae_low",
           "mae_high", "mean_iou", "mean_iou_effect", "mean_iou_low", "mean_iou_high",
           "seeds_lower")


def changes(config: Config) -> list[dict[str, float]]:
    """What the constants that take a training are changed to, beside this configuration."""
    return [{name: value} for name, values in TRAINED.items() for value in values
            if value != _value(config, name)]


def _value(config: Config, name: str) -> float:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def table(results: str | Path, config: Config, dataset: Any, seeds: Sequence[int] = SEEDS, *,
          progress: bool = True) -> pd.DataFrame:
    """A row a constant and value: errors, and their paired difference from the configured value
    (positive is better) with its 95% interval, on the seeds that have both.

    results: folder of the profile. config: of any seed. dataset: the test images, with true masks.
    seeds: of the runs. Decoding needs their models, which are not committed. A value without any
    run is left out. Columns: COLUMNS, mean IoU in per cent; seeds_lower: the seeds whose own mean
    IoU is lower than with the configured value.
    Raises FileNotFoundError where there is no run at all.
    """
    folder, rows = Path(results) / "runs", []
    runs = {s: preset(config.profile, config.dataset, config.percent, seed=s) for s in seeds}
    values = [(name, v) for name, moved in DECODED.items() for v in moved]
    found = {s: decoded(models.load(folder / run.run, "cpu").network, run.evaluation, values,
                        dataset, progress=progress)
             for s, run in runs.items() if (folder / run.run / "model.safetensors").is_file()}
    for number, (name, value) in enumerate(values if found else ()):
        usual = values.index((name, _value(config, name)))
        rows.append(_row(name, value, config, *(
            [pd.DataFrame({s: measure[place][m] for s, measure in found.items()},
                          index=dataset.ids).T for m in (0, 1)] for place in (number, usual))))
    for name, moved in TRAINED.items():
        before = len(rows)
        for value in moved:
            variant = "xmask" if value == _value(config, name) else preset(
                config.profile, config.dataset, config.percent, overrides={name: value}).variant
            pair = [[claims.values(folder, config.dataset, config.percent, one, measure)
                     for measure in (claims.count_error, claims.own_iou)]
                    for one in (variant, "xmask")]
            if len(pair[0][0]) and len(pair[1][0]):
                rows.append(_row(name, value, config, *pair))
        if len(rows) == before + 1:  # nobody moved it
            rows.pop()
    if not rows:
        raise FileNotFoundError(f"{folder}: no run {runs[seeds[0]].run} or of another seed, so no "
                                "constant can be moved. Run `make reproduce PROFILE=full` first.")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def decoded(network: nn.Module, decoding: Evaluation, values: Iterable[tuple[str, float]],
            dataset: Sequence, *, progress: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """(count errors (n,), mean IoU in per cent (n,), NaN without people) over the images of a
    dataset, for each (constant, value): the network sees each image once."""
    ways = [Evaluation.model_validate(decoding.model_dump() | {name.partition(".")[2]: value})
            for name, value in values]
    errors, overlap = np.zeros((2, len(ways), len(dataset)))
    for index in tqdm(range(len(dataset)), desc="constants", unit="image", disable=not progress):
        sample = dataset[index]
        image = scaled(sample.image, decoding.scale)
        maps = network_maps(network.eval(), image)
        for number, way in enumerate(ways):
            found = decode.predict(*maps, image.shape[:2], way, stride=model.STRIDE)
            seen = brought_back(found, sample.shape)
            errors[number, index] = abs(seen.count - len(sample.points))
            overlap[number, index] = math.nan if len(sample.points) == 0 else (
                100 * metrics.segmentation(seen.instances, sample.instances)["mean_iou"])
    return list(zip(errors, overlap))


def _row(name: str, value: float, config: Config, moved: list[pd.DataFrame],
         usual: list[pd.DataFrame]) -> dict[str, object]:
    """moved, usual: (count errors, mean IoU in per cent), a row a seed and a column an image."""
    row: dict[str, object] = {"constant": name, "value": float(value),
                              "configured": value == _value(config, name)}
    for measure, sign, one, other in zip(("mae", "mean_iou"), (-1, 1), moved, usual):
        one, other = one.dropna(axis=1), other.dropna(axis=1)
        seeds, images = one.index.intersection(other.index), one.columns.intersection(other.columns)
        mine, theirs = (part.loc[seeds, images].to_numpy(float) for part in (one, other))
        row |= {"seeds": len(seeds), measure: mine.mean()}
        row |= {"images": len(images)} if measure == "mae" else {}
        row |= dict(zip((f"{measure}_effect", f"{measure}_low", f"{measure}_high"),
                        claims.paired(sign * (mine - theirs))))
    return row | {"seeds_lower": int(((mine - theirs).mean(axis=1) < 0).sum())}


@figures.styled
def figure(found: pd.DataFrame) -> DescribedFigure:
    """One column a constant, those of decoding above those that take a training: the effect of its
    values on MAE (above) and mean IoU (below), with intervals; grey is the configured value."""
    names = list(dict.fromkeys(found["constant"]))
    blocks = [block for group in (DECODED, TRAINED) if (block := [n for n in names if n in group])]
    across = max(map(len, blocks))
    picture = DescribedFigure((2.0 * across + 0.6, 4.2 * len(blocks)))
    axes = picture.subplots(2 * len(blocks), across, squeeze=False, sharey="row")
    for number, block in enumerate(blocks):
        pair = axes[2 * number:2 * number + 2]
        for axis in pair[:, len(block):].ravel():
            axis.set_visible(False)
        for column, name in zip(pair.T, block):
            part = found[found["constant"] == name].reset_index(drop=True)
            for axis, measure in zip(column, ("mae", "mean_iou")):
                _effects(axis, part, measure)
            column[0].set_title(f"{name.partition('.')[2]}\n({part['seeds'].min()} seeds)",
                                fontsize=9)
        pair[0, 0].set_ylabel("fewer people wrong (MAE)")
        pair[1, 0].set_ylabel("more points of mean IoU")
    picture.description = "Constants moved alone, against the configured value, on test images"
    return picture


def _effects(axis, part: pd.DataFrame, measure: str) -> None:
    """The effects of one constant's values on a measure, with their intervals."""
    effect, low, high = (part[f"{measure}_{end}"].to_numpy() for end in ("effect", "low", "high"))
    axis.axhline(0, color=GREY, lw=0.8)
    axis.errorbar(part.index, effect, color=BLUE, marker="o", ms=4, capsize=2, lw=1,
                  yerr=np.stack([effect - low, high - effect]))
    axis.axvspan(*(part.index[part["configured"]][0] + np.array([-0.3, 0.3])),
                 color="#E5E5E5", lw=0)
    axis.set_xticks(part.index, [f"{v:g}" for v in part["value"]], fontsize=7)
