"""A matplotlib figure that carries its description and holds no date (needs matplotlib)."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from xmask import files

DPI = 130


class DescribedFigure(Figure):
    """A figure that says what it was made of and shows itself in a notebook, whatever the
    backend. `description` is text that its PNG carries."""

    description = ""

    def __init__(self, figsize: tuple[float, float], **options) -> None:
        super().__init__(figsize, **{"dpi": DPI, "layout": "constrained", "facecolor": "white",
                                     **options})

    def write(self, path: str | Path) -> Path:
        """Write the figure as PNG. The same figure always gives the same bytes."""
        with files.replacing(path) as temporary:
            self._save(temporary)
        return Path(path)

    def _save(self, target: Path | io.BytesIO) -> None:
        with matplotlib.style.context("default"):
            self.savefig(target, format="png", dpi=DPI, facecolor="white",
                         metadata={"Software": None, "Description": self.description})

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self._save(stream)
        return stream.getvalue()
