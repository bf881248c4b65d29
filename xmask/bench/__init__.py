"""`make bench`: what the method costs beside dense code and the libraries one would use instead.

Every row of `comparisons` is measured in one go, both sides taking turns (`measure`), with the
target beside it; the dense sides are in `dense`. `run` writes the table, all numbers as JSON, and
the figure of the README (`report`).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.bench import comparisons, measure, report

GROUPS = ("nnec", "decode", "losses", "metrics", "sam", "masks", "network")


def run(results: Path, figures: Path, *, only: Sequence[str] = GROUPS, threads: int = 2,
        progress: bool = True) -> dict[str, Any]:
    """Measure the rows of the groups in `only`; write bench.json, bench.md and bench.png.

    Rows that an earlier bench.json of the same machine has keep their numbers until they are
    measured again; one of another machine, or with other `threads`, is set aside.
    bench.json is written after every row, and table and figure also if the run is stopped, so
    that nothing measured is lost; rows that are not there stand in it under "missing". Files of
    these names that were not written there are set aside.
    Raises ValueError for a group that does not exist, RuntimeError in the end if sides of rows
    failed (out of memory, say); the other rows are measured nevertheless.
    """
    unknown = [name for name in only if name not in GROUPS]
    if unknown:
        raise ValueError(f"--only: {', '.join(unknown)} unknown; known: {', '.join(GROUPS)}")
    path, rows = results / "bench.json", list(comparisons.comparisons())
    found: dict[str, Any] = {"machine": _machine(threads), "load_average_before": _load()}
    failed: dict[str, str] = {}
    with (files.OutputFolder(results, cloned=True) as folder,
          files.OutputFolder(figures, cloned=True)):
        earlier = files.read_json(path) if path.is_file() else {}
        foreign = earlier.get("machine") != found["machine"]
        done = {} if foreign else {row["name"]: row for row in earlier.get("rows", ())}
        try:
            for row in tqdm([row for row in rows if row.group in only], desc="bench", unit="row",
                            disable=not progress):
                try:
                    done[row.name] = compare(row, threads=threads)
                except Exception as error:
                    failed[row.name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                if foreign and path.is_file() and "rows" not in found:
                    folder.set_aside(path, "measured on another machine, or with other threads")
                found |= {"load_average_after": _load(),
                          "rows": [done[row.name] for row in rows if row.name in done],
                          "missing": {row.name: failed.get(row.name, "not reached")
                                      for row in rows if row.name not in done}}
                files.write_json(path, found)
        finally:
            if "rows" in found:  # at least one row was tried
                files.write_text(results / "bench.md", report.table(found))
                report.figure(found).write(figures / "bench.png")
    if failed:
        raise RuntimeError(
            f"bench: {len(failed)} rows could not be measured, the others are in {path}; measure "
            "their groups again with --only, with other programs closed if memory was short\n"
            + "\n".join(f"{name}: {why}" for name, why in failed.items()))
    return found


def compare(row: comparisons.Comparison, *, threads: int) -> dict[str, Any]:
    """Measure one row: a dict of plain numbers, times in seconds, memory in bytes.

    "targets": what was reached, divided by what had to be; 1 and more is met.
    """
    size = {"make": row.make, "heads": row.heads, "shape": row.shape}
    sides = [partial(_side, 0, **size)]
    sides += [partial(_side, 1, **size, only=few) for few in row.fewer] or [
        partial(_side, 1, **size)]
    ours, *others = measure.alternate(sides, threads=threads)
    mine, other = _numbers(ours), _numbers(others[-1])
    if row.fewer:
        other |= _extrapolated([_numbers(one) for one in others], row.fewer, row.of or row.heads)
    ratio = other["median"] / mine["median"]
    saved = other["peak"] / max(mine["peak"], 1) if other["peak"] and mine["peak"] else 0.0
    targets = {}
    if row.faster:
        targets[f"≥ {row.faster:,g}× faster"] = ratio / row.faster
    if row.leaner:
        targets[f"≥ {row.leaner:,g}× less memory"] = saved / row.leaner
    if row.share:
        targets[f"≤ {row.share:.0%} of the time"] = ratio * row.share
    return {
        "name": row.name, "group": row.group, "operation": row.operation, "heads": row.heads,
        "shape": list(row.shape), "against": row.against, "ours": mine, "other": other,
        "times_faster": ratio, "targets": targets,
        "agreement": row.agree(ours.result, others[0].result) if row.agree else "",
    }


def _side(which: int, make, **arguments):
    return make(**arguments)[which]


def _numbers(side: measure.Measured) -> dict[str, Any]:
    low, median, high = np.quantile(side.seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "runs": len(side.seconds),
            "peak": side.peak}


def _extrapolated(sides: list[dict[str, Any]], sizes: Sequence[int], whole: int) -> dict[str, Any]:
    """The numbers for `whole` on a straight line through the last two of (nothing, *sizes)."""
    names = [name for name in ("median", "low", "high", "peak") if sides[-1][name] is not None]
    first, last = [dict.fromkeys(names, 0), *sides][-2:]
    few, more = [0, *sizes][-2:]
    reach = (whole - more) / (more - few)
    found = {name: max(last[name] + reach * (last[name] - first[name]), last[name])
             for name in names}
    # the spread of an extrapolation is that of its two ends, carried along
    found["low"], found["high"] = sorted((found["low"], found["high"]))
    return found | {"extrapolated_from": list(sizes)}


def _machine(threads: int) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = named[1] if named else processor
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads,
            "system": platform.system(), "versions": provenance.versions()}


def _load() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
