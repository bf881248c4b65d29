"""Where a result comes from: code, versions and inputs as a fingerprint; stamps of finished steps.

One rule says whether a step is done: its stamp names the fingerprint it would have today, and the
files it wrote still have the checksums noted then. Stamps live in `work/`, which is not
committed: in a fresh clone nothing counts as done.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from xmask import files

ROOT = Path(__file__).parents[1]  # the folder that holds `xmask`
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "pandas",
             "segment-anything", "timm")
# Their values stand in each step's configuration: another profile's values change no step.
_LEFT_OUT = ("xmask.config", "xmask.presets")


def digest(*parts: object) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers; `code` stands for our own."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


# -- code ----------------------------------------------------------------------------------


def code(*modules: str) -> str:
    """Digest of what modules of this package, and all that they import from it, say.

    Comments, docstrings, blank lines and formatting do not count: the syntax tree does. The same
    code has the same digest under Python 3.10 to 3.13.
    """
    return code_in(_installed, modules)


def code_in(read: Callable[[str], str | None], modules: Sequence[str]) -> str:
    """`code` of another tree; read: its source at a path such as "xmask/nnec.py", or None."""
    said: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in said or name in _LEFT_OUT:
            continue
        base = name.replace(".", "/")
        source = read(f"{base}.py")
        source = read(f"{base}/__init__.py") if source is None else source
        if source is None:  # a name that a module imports from another one, not a module itself
            if "." in name:
                waiting.append(name.rpartition(".")[0])
            continue
        with _PARSING:
            said[name], imports = _parsed(source)
        waiting += imports
    return digest(said)


# steps run in threads, and Python before 3.12 cannot parse in two of them at a time
_PARSING = threading.Lock()


@cache
def _parsed(source: str) -> tuple[str, tuple[str, ...]]:
    """Digest of what a source says, and the dotted names of this package that it imports."""
    tree, names = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xmask":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "xmask"]
    return digest(_said(tree)), tuple(names)


def _said(node: Any) -> Any:
    """A syntax tree as JSON values, without places and docstrings. `ast.dump` differs between
    Python versions: they show empty fields or not, and know different ones."""
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds empty texts to some f-strings
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    if isinstance(node, list):
        return [_said(item) for item in node if not (
            isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
            and isinstance(item.value.value, str))]
    if not isinstance(node, ast.AST):
        return repr(node)
    return [type(node).__name__, {
        name: _said(value) for name, value in ast.iter_fields(node)
        if name not in ("ctx", "kind", "type_comment") and value is not None and value != []}]


@cache
def _installed(path: str) -> str | None:
    file = ROOT / path
    return file.read_text(encoding="utf-8") if file.is_file() else None


def git(*arguments: str) -> str:
    """What git says in the folder of the package; ValueError outside a clone."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True,
                              check=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise ValueError(f"{ROOT}: git knows no commits here ({str(said).strip()}); run this in a "
                         "clone of the repository") from None


def commit() -> dict[str, Any]:
    """The git commit of the code and whether files were changed since; {} outside a clone."""
    try:
        return {"commit": git("rev-parse", "HEAD").strip(),
                "changed": bool(git("status", "--porcelain", "--", "xmask"))}
    except ValueError:
        return {}


# -- steps ---------------------------------------------------------------------------------


def fingerprint(modules: Sequence[str], *inputs: object) -> str:
    """What a step depends on: the code it runs through, versions, configuration, checksums."""
    return digest(code(*modules), versions(), *inputs)


def is_done(stamp: Path, fingerprint: str) -> bool:
    """Whether the stamp's step was finished with this fingerprint and its files are unchanged.

    A damaged stamp, or none, says that the step is not done.
    """
    try:
        noted = json.loads(stamp.read_text(encoding="utf-8"))
        return noted["fingerprint"] == fingerprint and all(
            files.sha256(name) == checksum for name, checksum in noted["outputs"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def write_stamp(stamp: Path, fingerprint: str, outputs: list[Path]) -> None:
    """Note that a step is done: its fingerprint, the checksums of its outputs, and, for people,
    the git commit, the machine and the time."""
    files.write_json(stamp, {
        "fingerprint": fingerprint,
        "outputs": {path.as_posix(): files.sha256(path) for path in outputs},
        "git": commit(), "machine": platform.node(), "finished": time.strftime("%F %T %z")})
