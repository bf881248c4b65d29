"""Sweeps: many runs that differ in some fields of the configuration, and one table of them all.

Runs are made by papermill (walkthrough 06); each has a folder of its own, named after a hash of
its changed fields, and everything it depends on in its config.json. So a table needs no notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd

from xmask import files
from xmask.study import tables
from xmask.study.runs import by_dotted_name


def grid(**values: list) -> Iterator[dict[str, object]]:
    """Every combination of fields and their values: dicts {"loss.tau": 0.5, ...}.

    values: lists by field, a dot in the field's name written as two underscores:
    `grid(loss__tau=[0.4, 0.6], seed=[1, 2])` gives four dicts.
    """
    names = [name.replace("__", ".") for name in values]
    for chosen in product(*values.values()):
        yield dict(zip(names, chosen))


def table(results: str | Path, fields: list[str]) -> pd.DataFrame:
    """One row a run of `results/<profile>`: the fields asked for, then what was measured.

    fields: dotted names of the configuration, such as "loss.tau" or "seed". The measures are mae
    and rmse (people), mean_iou (0..1, NaN without truth masks) and whether the images were
    synthetic; rows are sorted by the fields.
    Raises ValueError for a field that a run's configuration does not have, and what
    `tables.load_runs` raises.
    """
    runs = tables.load_runs(results)
    rows = []
    for run in runs.itertuples():
        settings = by_dotted_name(files.read_json(Path(run.path) / "config.json")["config"])
        for name in set(fields) - set(settings):
            raise ValueError(f"{name}: the configuration of {run.run} has no such field; see "
                             "`xmask.config.Config` for the names")
        rows.append({"run": run.run} | {name: settings[name] for name in fields})
    found = pd.DataFrame(rows).join(runs[["mae", "rmse", "mean_iou", "synthetic"]])
    return found.sort_values([*fields, "run"], ignore_index=True)
