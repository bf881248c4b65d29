"""Run the walkthroughs and store their outputs, so that the same code leaves the same file.

What a run leaves by the way (times, versions of the kernel, progress bars) is not stored.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from xmask import files

NOTEBOOKS = Path("notebooks")
PATTERN = "0*.ipynb"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}
CELL_SECONDS = 300


def walkthroughs(folder: str | Path = NOTEBOOKS, only: Sequence[str] = ()) -> list[Path]:
    """The walkthrough notebooks in reading order; only: beginnings of their names, e.g. "01".

    Raises ValueError for a beginning that no walkthrough has.
    """
    paths = sorted(Path(folder).glob(PATTERN))
    unknown = [name for name in only if not any(path.name.startswith(name) for path in paths)]
    if unknown:
        raise ValueError(f"no walkthrough begins with {', '.join(unknown)}; there are "
                         f"{', '.join(path.stem for path in paths)}")
    return [path for path in paths if not only or path.name.startswith(tuple(only))]


def execute(path: str | Path) -> Path:
    """Run a walkthrough from top to bottom and store its outputs in place; return the path.

    A walkthrough in which a cell fails is left as it was, and nbclient's CellExecutionError
    says which cell.
    """
    path = Path(path)
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}},
                            record_timing=False, coalesce_streams=True)
    client.execute()
    files.write_text(path, nbformat.writes(tidy(notebook)) + "\n")
    return path


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with one kernel name, no times, no progress bars, and readable cell names."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    number = os.path.basename(notebook.cells[0].get("id", "00")).split("-")[0]
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{number}-{index:02d}"
        cell.metadata = nbformat.from_dict(
            {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook
