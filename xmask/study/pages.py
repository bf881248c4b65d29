"""The results table of README.md, made from the tables of the demo study.

`xmask docs` writes it; a test fails where it is not what it would write. Pages of every public
function are made by pdoc from the docstrings (`make docs`) and are not committed.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pandas as pd

from xmask import files
from xmask.study.runs import UNKNOWN
from xmask.study.tables import markdown_table

README = Path("README.md")
SUMMARY = Path("results") / "demo" / "tables" / "summary.csv"
BEGIN = "<!-- results: written by `xmask docs`, not by hand -->"
END = "<!-- end of results -->"
# Columns of the summary that README shows, and what it calls them.
SHOWN = {
    "dataset": "crowds", "labelled %": "labels %", "method": "method", "seeds": "seeds",
    "MAE, drawn (ours)": "MAE",
    "constant-count MAE, drawn (ours)": "MAE of the best constant",
    "RMSE, drawn (ours)": "RMSE",
    "constant-count RMSE, drawn (ours)": "RMSE of that constant",
    "F1 % at 4 px, drawn (ours)": "F1 % at 4 px",
    "F1 % at 8 px, drawn (ours)": "F1 % at 8 px",
    "mean IoU %, drawn (ours)": "mean IoU %",
    "mean IoU % of equal discs, cut where they meet, drawn (ours)":
        "mean IoU % of discs that cut each other",
}


def results_block(root: Path, day: str) -> str:
    """The results of README.md, markers included. root: of the repository; day: e.g. 2026-11-22."""
    table = pd.read_csv(root / SUMMARY, dtype=str, keep_default_na=False)
    table = table[~table["dataset"].str.startswith("mean of")]
    rows = [list(SHOWN.values())]
    for row in table.to_dict("records"):
        spreads = [row.get(f"std of {column}", "") for column in SHOWN]
        rows.append([(row[column] or UNKNOWN) + (f" ± {spread}" if spread else "")
                     for column, spread in zip(SHOWN, spreads)])
    return "\n".join([
        BEGIN, f"**Drawn crowds, profile `demo`, as of {day}**, from "
        f"[`{SUMMARY.as_posix()}`]({SUMMARY.as_posix()}):", "", *markdown_table(rows), END])


def write_block(path: Path, block: str) -> Path:
    """Put a block, whose first and last line are its markers, into a page in the place of the one
    that is there; return the page's path. Raises ValueError if it has lost its markers."""
    text = path.read_text(encoding="utf-8")
    begin, *_, end = block.splitlines()
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: no lines {begin} and {end} with numbers between them. Restore "
                         "them and run `xmask docs`.")
    if (new := before + block + after) != text:
        files.write_text(path, new)
    return path


def refresh(root: str | Path = ".") -> Path:
    """Write the results of README.md anew; return its path.

    The date changes only where the table does: it says since when the numbers stand.
    """
    page = Path(root) / README
    text = page.read_text(encoding="utf-8")
    day = re.search(r"as of (\d{4}-\d{2}-\d{2})", text)
    block = results_block(Path(root), day[1] if day else "")
    if block not in text:
        block = results_block(Path(root), date.today().isoformat())
    return write_block(page, block)
