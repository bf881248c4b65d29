"""Sweeps: many runs that differ in some fields of the configuration, and one table of them all.

Each run (walkthrough 06) has a folder of its own, named after a hash of its changed fields, and
everything it depends on in its config.json. So a table needs no notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import pandas as pd

from xmask import files, provenance
from xmask.data.cluster import work_in_order
from xmask.study import tables
from xmask.study.runs import by_dotted_name
from xmask.study.travel import Travelling, open_notebooks

_PARAMETERS = ("dataset", "percent", "seed", "variant")  # of notebooks; all else are overrides


def grid(**values: list) -> Iterator[dict[str, object]]:
    """Every combination of fields and their values: dicts {"loss.tau": 0.5, ...}.

    values: lists by field, a dot in the field's name written as two underscores:
    `grid(loss__tau=[0.4, 0.6], seed=[1, 2])` gives four dicts.
    """
    names = [name.replace("__", ".") for name in values]
    for chosen in product(*values.values()):
        yield dict(zip(names, chosen))


def run(changes: Iterable[dict[str, object]], notebook: str = "12_evaluate.ipynb", *,
        root: str | Path = ".", workers: int = 2, scheduler: str = "", cluster: str = "",
        **parameters) -> list[Path]:
    """Execute a notebook once for every change; returns the executed ones, in the same order.

    changes: as of `grid`. notebook: its name in the folder `notebooks` of the clone `root`.
    parameters: its parameters that stay the same. workers, scheduler, cluster: how many are
    executed at a time, and where, as of `reproduce.run`.
    Raises RuntimeError, with the end of the log of each that failed, once the others are done.
    """
    root, items = Path(root).absolute(), {}
    for change in changes:
        own = {name: change[name] for name in _PARAMETERS if name in change}
        fields = {name: value for name, value in change.items() if name not in own}
        given = {**parameters, **own, "overrides": {**parameters.get("overrides", {}), **fields}}
        executed = Path("work", "sweeps", f"{provenance.digest(notebook, given)[:8]}.ipynb")
        items[executed.as_posix()] = (Path("notebooks", notebook), executed, given,
                                      executed.with_suffix(".log"))
    job = Travelling(str(root))
    with open_notebooks(job, workers, scheduler, cluster) as client:
        found = dict(work_in_order(client, job, {
            name: ([item], ()) for name, item in items.items()}, retries=2))
    failed = [str(one if isinstance(one, Exception) else one[0])
              for one in found.values() if one != [""]]
    if failed:
        raise RuntimeError("\n".join([f"{len(failed)} of {len(items)} failed:", *failed]))
    return [root / name for name in items]


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
