"""The claims as pictures: a forest plot of all effects, and learning curves of the rivals."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from xmask import files
from xmask.study import claims, figures, runs
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import BLUE, GREEN, GREY, VERMILION

UNITS = {claims.COUNTS: "people fewer wrong on average (MAE); right of the line: for the claim",
         claims.CALIBRATED: "people fewer wrong (MAE), thresholds set on other drawn scenes",
         claims.MASKS: "points of mean IoU more; right of the line: for the claim"}
COLOURS = {claims.HOLDS: BLUE, claims.FAILS: VERMILION}
METHODS = figures.SERIES | {"points-only": GREEN}


@figures.styled
def forest(table: pd.DataFrame) -> DescribedFigure:
    """Every tested claim with its effect and its interval: counts above, masks below.

    table: of `claims.table`. Right of the line speaks for the claim; "as good as" may lie a little
    left of it. An interval that leaves the picture ends in an arrow.
    """
    tested = table[table["effect"].notna()]
    parts = [part.reset_index(drop=True) for measure in UNITS
             if len(part := tested[tested["measure"] == measure])]
    heights = [len(part) for part in parts] or [1]
    figure = DescribedFigure((9.5, 1.2 + 0.34 * sum(heights)))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if not parts:
        axes[0].text(0.5, 0.5, "no claim could be tested yet", transform=axes[0].transAxes,
                     ha="center")
    for axis, part in zip(axes, parts):
        ends = part[["low", "high"]].abs().max(axis=1)
        limit = max(1.15 * min(ends.max(), 3 * ends.median()), 1.05 * part["effect"].abs().max())
        left = max(min(part["low"].min(), 0.0), -limit) - 0.05 * limit
        right = min(max(part["high"].max(), 0.0), limit) + 0.05 * limit
        axis.axvline(0, color=GREY, lw=1)
        for place, row in enumerate(part.itertuples()):
            colour = COLOURS[row.verdict]
            axis.plot(np.clip([row.low, row.high], -limit, limit), [place] * 2, color=colour,
                      lw=1.8)
            for end, mark in ((row.low, "<"), (row.high, ">")):
                if abs(end) > limit:
                    axis.plot(np.clip(end, -limit, limit), place, mark, color=colour, ms=6)
            axis.plot(row.effect, place, "o", color=colour, ms=5)
        axis.set_yticks(range(len(part)), [_label(row) for row in part.itertuples()], fontsize=7)
        axis.set(xlim=(left, right), ylim=(len(part) - 0.4, -0.6),
                 xlabel=UNITS[part["measure"].iloc[0]])
        axis.grid(axis="y", visible=False)
    figure.suptitle("Claims: effects with 95% intervals (blue: holds, red: does not hold here)",
                    fontsize=9, fontweight="bold")
    figure.description = "Claims: paired effects with bootstrap intervals, from results/claims.csv"
    return figure


def _label(row) -> str:
    rival = runs.VARIANTS.get(row.rival, row.rival)
    labels = "" if pd.isna(row.labels) else f", {row.labels:g}% labels"
    where = ", photographs" if row.data == "ShanghaiTech A" else ""
    return textwrap.fill(row.claim, 70) + f"\n(against {rival}{labels}{where})"


@figures.styled
def compared_curves(results: str | Path, dataset: str, percents: tuple[int, ...]
                    ) -> DescribedFigure:
    """P2R loss of labelled crops against the training step, a line a method: mean over seeds, the
    band from the lowest to the highest seed.

    results: of one profile. What phase 2 weighs the term by is taken back. It is the loss on
    labelled images: what a method learns from the others shows in the tables, not here.
    """
    folder = Path(results) / "runs"
    found = {percent: {variant: curves for variant in METHODS
                       if len(curves := _curves(folder, dataset, percent, variant))}
             for percent in percents}
    trained = [percent for percent in percents if found[percent]] or percents[:1]
    figure = DescribedFigure((3.4 * len(trained) + 0.4, 3.0))
    axes = figure.subplots(1, len(trained), squeeze=False, sharey=True)[0]
    for axis, percent in zip(axes, trained):
        for variant, curves in found[percent].items():
            colour = METHODS[variant]
            axis.plot(curves.index, curves.mean(axis=1), color=colour, lw=1.2,
                      label=f"{runs.VARIANTS[variant]} ({curves.shape[1]} seeds)")
            axis.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), color=colour,
                              alpha=0.2, lw=0)
        axis.set(title=f"{percent:g}% labelled", xlabel="training step", yscale="log")
        if found[percent]:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("P2R loss, labelled crops")
    figure.suptitle("Drawn crowds: learning curves", fontsize=10, fontweight="bold")
    figure.description = f"P2R loss by step, runs of {Path(results).as_posix()}"
    return figure


def _curves(folder: Path, dataset: str, percent: int, variant: str) -> pd.DataFrame:
    """A column a seed, by training step."""
    found = {}
    for seed, path in claims.run_folders(folder, dataset, percent, variant, "history.csv"):
        history = pd.read_csv(path / "history.csv")
        weight = files.read_json(path / "config.json")["config"]["loss"]["phase2_p2r"]
        loss = history["p2r"] / np.where(history["phase"] == 2, weight or 1.0, 1.0)
        smooth = loss.rolling(9, min_periods=1, center=True).mean()
        found[seed] = pd.Series(smooth.to_numpy(), index=history["step"])
    return pd.DataFrame(found)
