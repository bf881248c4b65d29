"""Pages made from code and results: docs/api.md from docstrings, the results table of README.md.

`xmask docs` writes them; a test fails where they are not what it would write.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import ModuleType

import pandas as pd

import xmask
from xmask import files

API, README = Path("docs") / "api.md", Path("README.md")
SUMMARY = Path("results") / "demo" / "tables" / "summary.csv"
BEGIN = "<!-- results: written by `xmask docs`, not by hand -->"
END = "<!-- end of results -->"
# The order of reading; modules that are not named follow by the alphabet.
FIRST = ("xmask", "xmask.predict", "xmask.tools.photos", "xmask.tools.learn", "xmask.nnec", "xmask.segmenters",
         "xmask.edp_sam", "xmask.model", "xmask.losses", "xmask.decode", "xmask.trainer",
         "xmask.metrics", "xmask.study.evaluate", "xmask.config", "xmask.study.steps", "xmask.study.sweeps")
# Columns of the summary that README shows, and what it calls them.
SHOWN = {
    "dataset": "layout of", "labelled %": "labels %", "method": "method", "seeds": "seeds",
    "MAE, synthetic (ours)": "MAE",
    "constant-count MAE, synthetic (ours)": "MAE of the best constant",
    "mean IoU %, synthetic (ours)": "mean IoU %",
    "mean IoU % of discs, exclusive, synthetic (ours)": "mean IoU % of discs",
}


# -- the API page --------------------------------------------------------------------------


def modules() -> list[ModuleType]:
    """All modules of the package, in the order of the page; of the benchmark only its entrance."""
    names = ["xmask", *(found.name for found in pkgutil.walk_packages(xmask.__path__, "xmask."))]
    names = [name for name in names if not name.endswith("__main__")
             and not name.startswith("xmask.bench.")]
    order = {name: place for place, name in enumerate(FIRST)}
    names.sort(key=lambda name: (order.get(name, len(order)), name))
    return [importlib.import_module(name) for name in names]


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Name and object of every public function and class that is defined in the module."""
    for name, one in vars(module).items():
        if (not name.startswith("_") and (inspect.isfunction(one) or inspect.isclass(one))
                and one.__module__ == module.__name__):
            yield name, one


def api_page() -> str:
    """The text of docs/api.md: every public function and class with its docstring."""
    found = [(module, list(public(module))) for module in modules()]
    found = [(module, members) for module, members in found if members]
    lines = ["# Every public function", "",
             "Written by `xmask docs` from the docstrings. Arrays come with their shapes: N heads, "
             "H × W pixels, h × w cells of 4 × 4 pixels, D numbers of an embedding, B images. "
             "Points are (x, y) in pixels from the centre of the top-left pixel.", ""]
    for module, _ in found:
        lines.append(f"- [`{module.__name__}`](#{module.__name__.replace('.', '')}): "
                     f"{_first_line(module)}")
    for module, members in found:
        lines += ["", f"## {module.__name__}", "", *_block(module)]
        for name, one in members:
            lines += ["", f"### `{name}{_signature(one)}`", "", *_block(one)]
            if inspect.isclass(one):
                for method, function in vars(one).items():
                    if (inspect.isfunction(function) and not method.startswith("_")
                            and function.__doc__):
                        lines += ["", f"#### `{name}.{method}{_signature(function)}`", "",
                                  *_block(function)]
    return "\n".join(lines) + "\n"


def _signature(one: object) -> str:
    """Parameters with their defaults, without types: the docstring says more than they do."""
    try:
        signature = inspect.signature(one)
    except ValueError:
        return ""
    parameters = [parameter.replace(annotation=inspect.Parameter.empty)
                  for parameter in signature.parameters.values() if parameter.name != "self"]
    shown = str(signature.replace(parameters=parameters,
                                  return_annotation=inspect.Signature.empty))
    # a file of the package, wherever that is installed
    shown = re.sub(r"\w*Path\('[^']*/(xmask/[^']*)'\)", r"Path('\1')", shown)
    return re.sub(r"<factory>|<function [\w.]*?(\w+|<lambda>) at 0x[0-9a-f]+>|<class '([\w.]+)'>",
                  lambda match: match[1] or match[2] or "...", shown)


def _first_line(one: object) -> str:
    return (inspect.getdoc(one) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def _block(one: object) -> list[str]:
    return ["```text", *(inspect.getdoc(one) or "").splitlines(), "```"]


# -- the results table of README.md --------------------------------------------------------


def results_block(root: Path, day: str) -> str:
    """The results of README.md, markers included. root: of the repository; day: e.g. 2026-11-22."""
    table = pd.read_csv(root / SUMMARY, dtype=str, keep_default_na=False)
    table = table[~table["dataset"].str.startswith("mean of")]
    rows = []
    for row in table.to_dict("records"):
        cells = []
        for column in SHOWN:
            spread = row.get(f"std of {column}", "")
            cells.append((row[column] or "—") + (f" ± {spread}" if spread else ""))
        rows.append("| " + " | ".join(cells) + " |")
    head = ["| " + " | ".join(cells) + " |" for cells in (SHOWN.values(), ["---"] * len(SHOWN))]
    return "\n".join([
        BEGIN, f"**Synthetic crowds, profile `demo`, slim network, as of {day}**, from "
        f"[`{SUMMARY.as_posix()}`]({SUMMARY.as_posix()}):", "", *head, *rows, END])


def stored_block(text: str) -> tuple[str, str]:
    """The results block in the text of README.md, and its date.

    Raises ValueError if README.md has lost its markers or the date.
    """
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, re.DOTALL)
    day = re.search(r"as of (\d{4}-\d{2}-\d{2})", found[0]) if found else None
    if not day:
        raise ValueError(f"README.md: no results between {BEGIN} and {END} with a date 'as of "
                         "YYYY-MM-DD'; restore the two lines and run `xmask docs`")
    return found[0], day[1]


def refresh(root: str | Path = ".") -> list[Path]:
    """Write docs/api.md and the results of README.md anew; return their paths.

    The date changes only where the table does: it says since when the numbers stand.
    """
    root = Path(root)
    files.write_text(root / API, api_page())
    text = (root / README).read_text(encoding="utf-8")
    block, day = stored_block(text)
    if results_block(root, day) != block:
        text = text.replace(block, results_block(root, date.today().isoformat()))
        files.write_text(root / README, text)
    return [root / API, root / README]
