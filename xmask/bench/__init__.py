"""`make bench`: what the method costs beside dense code and the libraries one would use instead.

Every row is a comparison measured in the same run (`measure`), of sides that get the same inputs
(`sides`), with the target beside it (`rows`); the dense sides are in `dense`. `run` writes the
table, all numbers as JSON, and the figure of the README (`report`).
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.bench import measure, report, rows, sam_image

GROUPS = ("nnec", "decode", "losses", "metrics", "sam", "masks", "network", "growth")
_BYTES = 4


def run(
    results: Path, figures: Path, *, only: Sequence[str] = GROUPS, threads: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the rows of the groups in `only`; write bench.json, bench.md and bench.png.

    Groups that are left out keep the numbers of an earlier bench.json of the same machine.
    bench.json is written after every row, and table and figure also if the run is stopped, so
    that nothing measured is lost; rows that are not there yet stand in it under "missing".
    Raises ValueError for a group that does not exist, RuntimeError in the end if sides of rows
    failed (out of memory, say); the other rows are measured nevertheless.
    """
    unknown = [name for name in only if name not in GROUPS]
    if unknown:
        raise ValueError(f"--only: {', '.join(unknown)} unknown; known: {', '.join(GROUPS)}")
    path = results / "bench.json"
    found = {"machine": _machine(threads), "load_average_before": _load(),
             "bandwidth": measure.bandwidth(threads)}
    found |= _earlier(path, found["machine"], only)
    jobs = _jobs(only, threads)
    found["missing"] += [{"group": group, "row": name, "why": "not reached"}
                         for group, name, _, _ in jobs]
    failed = []
    try:
        for group, name, kind, work in tqdm(jobs, desc="bench", unit="row", disable=not progress):
            this = next(m for m in found["missing"] if (m["group"], m["row"]) == (group, name))
            try:
                found[kind].append(work())
                found["missing"].remove(this)
            except RuntimeError as error:
                this["why"] = str(error).strip().splitlines()[-1]
                failed.append(f"{name}: {this['why']}")
            found["rows"].sort(key=lambda row: GROUPS.index(row["group"]))
            found |= {"load_average_after": _load(), "floor": floors(found)}
            files.write_json(path, found)
    finally:
        if "floor" in found:  # at least one row was tried
            files.write_text(results / "bench.md", report.table(found))
            report.figure(found, figures / "bench.png")
    if failed:
        raise RuntimeError(
            f"bench: {len(failed)} rows could not be measured, the others are in {path}; "
            "measure their groups again with --only\n" + "\n".join(failed))
    return found


def _jobs(only: Sequence[str], threads: int) -> list[tuple[str, str, str, Callable[[], dict]]]:
    """What there is to measure: (group, name, list of bench.json that it goes to, the work)."""
    jobs = []
    for row in rows.rows():
        if row.group in only:
            heads = "" if row.heads is None else f", {row.heads:,} heads"
            name = f"{row.operation}, {row.shape[1]}×{row.shape[0]}{heads}, against {row.against}"
            jobs.append((row.group, name, "rows", partial(compare, row, threads=threads)))
    if "growth" in only:
        for operation in rows.GROWTH:
            for axis in ("heads", "pixels"):
                jobs.append(("growth", f"growth of {operation} with {axis}", "growth",
                             partial(grow, operation, axis, threads=threads)))
    if "sam" in only:
        jobs.append(("sam", "one image with SAM ViT-B", "sam_images",
                     partial(sam_image.run, threads=threads)))
    return jobs


def compare(row: rows.Row, *, threads: int) -> dict[str, Any]:
    """Measure one row: a dict of plain numbers, times in seconds, memory in bytes."""
    maker, arguments = row.other
    if row.fewer:
        others = [(maker, arguments | {"only": few}) for few in row.fewer]
    else:
        others = [row.other]
    ours, *theirs = measure.alternate([row.ours, *others], threads=threads)
    other = _side(theirs[-1])
    if row.fewer:
        few, more = row.fewer
        reach = (row.heads - more) / (more - few)
        for name in ("median", "low", "high", "peak"):
            # the spread of an extrapolation is that of its two ends, carried along
            a, b = _side(theirs[0])[name], other[name]
            other[name] = max(b + reach * (b - a), b)
        other["low"], other["high"] = sorted((other["low"], other["high"]))
        other["extrapolated_from"] = list(row.fewer)
    elif row.times > 1:
        for name in ("median", "low", "high"):
            other[name] *= row.times
        other["multiplied_by"] = row.times
        other["peak"] = None
    mine = _side(ours)
    ratio = other["median"] / mine["median"]
    saved = other["peak"] / max(mine["peak"], 1) if other["peak"] else None
    met = {
        "faster": None if row.faster is None else ratio >= row.faster,
        "leaner": None if row.leaner is None else saved is not None and saved >= row.leaner,
        "share": None if row.share is None else 1 / ratio <= row.share,
    }
    return {
        "group": row.group, "operation": row.operation, "shape": list(row.shape),
        "heads": row.heads, "against": row.against, "ours": mine, "other": other,
        "times_faster": ratio, "times_leaner": saved,
        "target": {"faster": row.faster, "leaner": row.leaner, "share": row.share},
        "met": {name: value for name, value in met.items() if value is not None},
        "agreement": row.agree(ours.result, theirs[0].result) if row.agree else None,
        "note": row.note,
    }


def grow(operation: str, axis: str, *, threads: int) -> dict[str, Any]:
    """What ours costs as heads grow at one size, or as pixels grow at one number of heads."""
    maker, limit = rows.GROWTH[operation]
    if axis == "heads":
        sizes = [(n, rows.IMAGE) for n in rows.CROWDS]
    else:
        sizes, limit = [(rows.SHAPE_HEADS, shape) for shape in rows.SHAPES], None
    sides = measure.alternate(
        [(maker, {"heads": n, "shape": shape}) for n, shape in sizes], threads=threads)
    points = [{"heads": n, "shape": list(shape)} | _side(side)
              for (n, shape), side in zip(sizes, sides)]
    ratio = points[-1]["median"] / points[0]["median"]
    return {"operation": operation, "axis": axis, "points": points, "last_over_first": ratio,
            "at_most": limit, "met": None if limit is None else ratio <= limit}


def floors(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How far decoding and the loss are from the time that memory traffic alone would take.

    The least bytes: decoding reads the embedding and writes the label map; the loss with its
    gradient reads the embedding twice (forward, backward) and writes the gradient once.
    """
    out = []
    for row in found["rows"]:
        passes = {"decoding, every head": (1, 1), "exclusivity loss with gradient": (3, 0)}.get(
            row["operation"])
        if passes is None:
            continue
        pixels = row["shape"][0] * row["shape"][1]
        least = pixels * _BYTES * (passes[0] * 16 + passes[1])
        seconds = least / found["bandwidth"]
        out.append({"operation": row["operation"], "shape": row["shape"], "heads": row["heads"],
                    "least_bytes": least, "floor": seconds,
                    "times_floor": row["ours"]["median"] / seconds})
    return out


def _side(side: measure.Measured) -> dict[str, Any]:
    low, high = side.median, side.median
    if len(side.seconds) > 1:
        low, _, high = statistics.quantiles(side.seconds, n=4, method="inclusive")
    return {"median": side.median, "low": low, "high": high, "runs": len(side.seconds),
            "peak": side.peak}


def _earlier(path: Path, machine: dict[str, Any], only: Sequence[str]) -> dict[str, list]:
    """What bench.json holds of the groups that are left out, if it is of the same machine."""
    kept: dict[str, list] = {"rows": [], "growth": [], "sam_images": [], "missing": []}
    if set(only) == set(GROUPS) or not path.is_file():
        return kept
    earlier = files.read_json(path)
    if earlier["machine"] != machine:
        return kept
    for name in ("rows", "missing"):
        kept[name] = [row for row in earlier.get(name, []) if row["group"] not in only]
    for name, group in (("growth", "growth"), ("sam_images", "sam")):
        if group not in only:
            kept[name] = earlier.get(name, [])
    return kept


def _machine(threads: int) -> dict[str, Any]:
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": threads,
            "system": platform.system(), "versions": provenance.versions()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _load() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
