"""The benchmark's numbers as a table in Markdown and as one figure."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes

from xmask.study.tables import markdown_table
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import BLUE, GREEN, GREY, ORANGE, VERMILION


def table(found: dict[str, Any]) -> str:
    """Markdown: every row, and what is missing."""
    machine = found["machine"]
    loads = (f"{found[f'load_average_{when}'][0]:.1f} {when}" if found[f"load_average_{when}"] else
             f"unknown {when}" for when in ("before", "after"))
    rows = [["operation", "size", "heads", "ours", "against", "takes", "ratio", "target",
             "memory, ours", "memory, other", "results"]]
    rows += [[row["operation"], f"{row['shape'][1]}×{row['shape'][0]}", f"{row['heads']:,}",
              _time(row["ours"]), row["against"], _time(row["other"]), _ratio(row),
              ", ".join(f"{target} {'met' if reached >= 1 else '**missed**'}"
                        for target, reached in row["targets"].items()),
              _memory(row["ours"]["peak"]), _memory(row["other"]["peak"]), row["agreement"]]
             for row in found["rows"]]
    lines = [
        "# What it costs", "",
        f"Measured by `make bench` on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}; load average "
        f"{', '.join(loads)}. All inputs are synthetic. Time: median of the wall clock and "
        "quartiles; memory: peak above the inputs, each side in a process of its own; the sides "
        "of a row took turns.", "",
        *markdown_table(rows), "",
        "\\* extrapolated by a straight line from the sizes named (heads, or crops of either "
        "kind): dense code is linear in heads, a network in crops.", ""]
    if found["missing"]:
        lines += ["## Not measured", "",
                  *(f"- {name}: {why}" for name, why in found["missing"].items()), ""]
    return "\n".join(lines)


@matplotlib.style.context(["default", {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.grid": True, "grid.color": "#E5E5E5",
    "axes.axisbelow": True}])
def figure(found: dict[str, Any]) -> DescribedFigure:
    """Left: time against heads; right: how far each target is met."""
    made = DescribedFigure((8.4, 3.4))
    left, right = made.subplots(1, 2)
    _draw_growth(left, found["rows"])
    _draw_targets(right, found["rows"])
    machine = found["machine"]
    made.description = (
        f"make bench: {machine['processor']}, {machine['threads']} threads, synthetic inputs")
    made.supxlabel(made.description, fontsize=6.5, color=GREY)
    return made


def _draw_growth(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Ours as a line, dense code dashed, its extrapolated times hollow."""
    for operation, label, colour in (
            ("decoding, every head", "decoding", BLUE),
            ("exclusivity loss with gradient", "exclusivity loss + gradient", VERMILION)):
        series = [row for row in rows
                  if row["operation"] == operation and row["shape"] == [768, 1024]]
        if not series:  # left out; a log axis needs something
            continue
        heads = [row["heads"] for row in series]
        dense = [row["other"]["median"] for row in series]
        axes.plot(heads, [row["ours"]["median"] for row in series], "o-", color=colour, ms=3.5,
                  label=f"{label}, ours")
        axes.plot(heads, dense, "--", color=colour, lw=1, label=f"{label}, dense")
        for row, seconds in zip(series, dense):
            axes.plot(row["heads"], seconds, "s", color=colour, ms=4,
                      mfc="white" if "extrapolated_from" in row["other"] else colour)
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set(xscale="log", yscale="log", xlabel="heads in one 1024×768 image",
             ylabel="seconds (hollow: extrapolated)")
    axes.legend(fontsize=6.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.29))


def _draw_targets(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One bar a target: what was reached, divided by what had to be."""
    bars = [(f"{textwrap.shorten(row['operation'], 46, placeholder=' …')}, {row['heads']:,} heads"
             + " (memory)" * ("memory" in target), reached)
            for row in rows for target, reached in row["targets"].items()]
    axes.barh(range(len(bars)), [reached for _, reached in bars],
              color=[GREEN if reached >= 1 else ORANGE for _, reached in bars])
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="reached ÷ target (right of the line: met)")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=6)
    axes.invert_yaxis()


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["times_faster"]
    if any(target.startswith("≤") for target in row["targets"]):
        return f"{1 / ratio:.1%}"
    if ratio < 1:
        return f"{1 / ratio:,.3g}× slower"
    return f"{ratio:,.3g}× faster" if ratio < 1000 else f"{ratio:,.0f}× faster"


def _time(side: dict[str, Any]) -> str:
    spread = f" [{_seconds(side['low'])}, {_seconds(side['high'])}]"
    text = _seconds(side["median"]) + (" (one run)" if side["runs"] == 1 else spread)
    sizes = side.get("extrapolated_from", [])
    return text + f" *({', '.join(map(str, sizes))})" * bool(sizes)


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else (
        f"{value:,.0f} s")


def _memory(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
