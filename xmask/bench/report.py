"""The benchmark's numbers as a table in Markdown and as one figure."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes

from xmask.bench import sam_image
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import BLUE, GREEN, GREY, ORANGE, VERMILION


def table(found: dict[str, Any]) -> str:
    """Markdown: every row, growth with heads and pixels, distance from memory traffic."""
    machine = found["machine"]
    lines = [
        "# What it costs",
        "",
        f"Measured by `make bench` on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}; load average "
        f"{_load(found['load_average_before'])} before and {_load(found['load_average_after'])} "
        "after. All inputs are synthetic. Time: median of the wall clock and quartiles; memory: "
        "peak above the inputs, each side in a process of its own; the sides of a row took turns.",
        "",
        "| operation | size | heads | ours | against | takes | ratio | target | memory, ours | "
        "memory, other | results |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        other = row["other"]
        lines.append("| " + " | ".join([
            row["operation"], _size(row["shape"]), _count(row["heads"]), _time(row["ours"]),
            row["against"], _time(other) + _how(other), _ratio(row), _target(row),
            _memory(row["ours"]["peak"]), _memory(other["peak"]), row["agreement"] or "",
        ]) + " |")
    notes = list(dict.fromkeys(
        f"- {row['operation']}, against {row['against']}: {row['note']}."
        for row in found["rows"] if row["note"]))
    lines += [
        "",
        "\\* extrapolated by a straight line from the two numbers of heads named; dense code is "
        "linear in heads.",
        "",
        *notes,
    ]
    if found["missing"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {item['row']}: {item['why']}" for item in found["missing"]]
    if found["growth"]:
        lines += ["", "## Growth", "",
                  "| operation | grows in | median time, peak memory | last ÷ first | target |",
                  "| --- | --- | --- | --- | --- |"]
        for item in found["growth"]:
            lines.append("| " + " | ".join([
                item["operation"],
                "heads, 1024×768" if item["axis"] == "heads" else
                f"pixels, {item['points'][0]['heads']:,} heads",
                "; ".join(f"{_where(item, p)}: {_seconds(p['median'])}, {_memory(p['peak'])}"
                          for p in item["points"]),
                f"{item['last_over_first']:.2f}",
                "" if item["at_most"] is None else
                f"≤ {item['at_most']:g} {_mark(item['met'])}",
            ]) + " |")
    if found["floor"]:
        lines += [
            "", "## Distance from memory traffic", "",
            f"A copy moves {found['bandwidth'] / 1e9:.1f} GB/s here (read + written). The floor "
            "is the least that must be moved at that speed: decoding reads the embedding and "
            "writes the map; the loss reads the embedding twice and writes its gradient.", "",
            "| operation | size | heads | least | floor | ours ÷ floor |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += ["| " + " | ".join([
            item["operation"], _size(item["shape"]), _count(item["heads"]),
            _memory(item["least_bytes"]), _seconds(item["floor"]), f"{item['times_floor']:.1f}",
        ]) + " |" for item in found["floor"]]
    for one in found["sam_images"]:
        lines += sam_image.lines(one)
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG; left: time against heads; right: how far each target is met."""
    picture(found).write(path)


def picture(found: dict[str, Any]) -> DescribedFigure:
    with matplotlib.style.context(["default", {
            "font.family": "DejaVu Sans", "font.size": 8, "axes.grid": True,
            "grid.color": "#E5E5E5", "axes.axisbelow": True}]):
        made = DescribedFigure(figsize=(8.4, 3.4), layout="constrained")
        left, right = made.subplots(1, 2, width_ratios=(1, 1))
        _draw_growth(left, found["rows"])
        _draw_targets(right, [row for row in found["rows"] if row["met"]])
        machine = found["machine"]
        made.description = (
            f"make bench: {machine['processor']}, {machine['threads']} threads, synthetic inputs")
        made.supxlabel(made.description, fontsize=6.5, color=GREY)
    return made


def _draw_growth(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for operation, label, colour in (
        ("decoding, every head", "decoding", BLUE),
        ("exclusivity loss with gradient", "exclusivity loss + gradient", VERMILION),
    ):
        series = sorted((row for row in rows if row["operation"] == operation
                         and row["shape"] == [768, 1024]), key=lambda row: row["heads"])
        if not series:
            continue
        heads = [row["heads"] for row in series]
        axes.plot(heads, [row["ours"]["median"] for row in series], "o-", color=colour, ms=3.5,
                  label=f"{label}, ours")
        dense = [row["other"]["median"] for row in series]
        axes.plot(heads, dense, "--", color=colour, lw=1, label=f"{label}, dense")
        for row, seconds in zip(series, dense):
            guessed = "extrapolated_from" in row["other"]
            axes.plot(row["heads"], seconds, "s", color=colour, ms=4,
                      mfc="white" if guessed else colour)
    if not axes.lines:  # these groups were left out
        axes.set_axis_off()
        return
    axes.set(xscale="log", yscale="log", xlabel="heads in one 1024×768 image",
             ylabel="seconds (hollow: extrapolated)")
    axes.legend(fontsize=6.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.29))


def _draw_targets(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One bar a target: what was reached, divided by what had to be."""
    names, values = [], []
    for row in rows:
        heads = "" if row["heads"] is None else f", {row['heads']:,} heads"
        reached = {"faster": row["times_faster"], "leaner": row["times_leaner"],
                   "share": row["times_faster"]}
        for name in row["met"]:
            need = row["target"][name] if name != "share" else 1 / row["target"]["share"]
            names.append(textwrap.shorten(row["operation"], 46, placeholder=" …") + heads
                         + (" (memory)" if name == "leaner" else ""))
            values.append((reached[name] or 0) / need)
    place = range(len(values))
    axes.barh(place, values, color=[GREEN if v >= 1 else ORANGE for v in values])
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="reached ÷ target (right of the line: met)")
    axes.set_yticks(place, names, fontsize=6)
    axes.invert_yaxis()


def _where(item: dict[str, Any], point: dict[str, Any]) -> str:
    return _count(point["heads"]) if item["axis"] == "heads" else _size(point["shape"])


def _how(other: dict[str, Any]) -> str:
    if "extrapolated_from" in other:
        return " *(" + ", ".join(map(str, other["extrapolated_from"])) + ")"
    return f" (×{other['multiplied_by']})" if "multiplied_by" in other else ""


def _ratio(row: dict[str, Any]) -> str:
    if row["target"]["share"] is not None:
        return f"{100 / row['times_faster']:.1f}%"
    text = f"{row['times_faster']:,.3g}× faster" if row["times_faster"] < 1000 else (
        f"{row['times_faster']:,.0f}× faster")
    if row["target"]["leaner"] is not None and row["times_leaner"]:
        text += f", {row['times_leaner']:,.0f}× less memory"
    return text


def _target(row: dict[str, Any]) -> str:
    target, met = row["target"], row["met"]
    parts = []
    if target["faster"] is not None:
        parts.append(f"≥ {target['faster']:,g}× {_mark(met['faster'])}")
    if target["leaner"] is not None:
        parts.append(f"≥ {target['leaner']:,g}× less memory {_mark(met['leaner'])}")
    if target["share"] is not None:
        parts.append(f"≤ {100 * target['share']:g}% {_mark(met['share'])}")
    return ", ".join(parts)


def _mark(met: bool) -> str:
    return "met" if met else "**missed**"


def _size(shape: list[int]) -> str:
    return f"{shape[1]}×{shape[0]}"


def _count(heads: int | None) -> str:
    return "" if heads is None else f"{heads:,}"


def _time(side: dict[str, Any]) -> str:
    if side["runs"] == 1:
        return f"{_seconds(side['median'])} (one run)"
    return f"{_seconds(side['median'])} [{_seconds(side['low'])}, {_seconds(side['high'])}]"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else (
        f"{value:,.0f} s")


def _memory(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _load(values: list[float] | None) -> str:
    return "unknown" if values is None else f"{values[0]:.1f}"
