"""Where the CPU profiles depart from the paper, field by field: a table of docs/differences.md.

`xmask docs` writes it; a test fails where it is not what it would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xmask.config import Config, preset
from xmask.study.tables import markdown_table

PAGE = Path("docs") / "differences.md"
BEGIN = "<!-- profiles: written by `xmask docs`, not by hand -->"
END = "<!-- end of profiles -->"
_COLUMNS = {"`paper`, SHA 10%": ("paper", 10), "`demo`, 10%": ("demo", 10),
            "`full`, 10%": ("full", 10), "`photo`, 5%": ("photo", 5),
            "`photo`, 10%": ("photo", 10), "`photo`, 40%": ("photo", 40),
            "`photo`, 100%": ("photo", 100)}


def differences_block(root: Path) -> str:
    """Every field of the method that a profile sets otherwise than `paper`, markers included.
    root: of the repository; nothing of it is read."""
    columns = {name: _fields(preset(profile, "sha", percent))
               for name, (profile, percent) in _COLUMNS.items()}
    paper = next(iter(columns.values()))
    rows = [[f"`{field}`", *(_said(values[field]) for values in columns.values())]
            for field, value in paper.items()
            if any(values[field] != value for values in columns.values())]
    return "\n".join([BEGIN, *markdown_table([["field", *columns], *rows]), END])


def _fields(config: Config) -> dict[str, Any]:
    """Value by dotted name, of the fields that belong to the method."""
    return {f"{section}.{field}": value for section, values in config.to_dict().items()
            if isinstance(values, dict) and section != "machine"
            for field, value in values.items()}


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
