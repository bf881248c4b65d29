"""Where a result comes from: code, versions and inputs as fingerprints; stamps of finished steps.

A step is done when its stamp names the fingerprint it would have today and the files it wrote
still have the checksums noted then. Stamps live in `work/`, which is not committed: in a fresh
clone nothing counts as done.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import threading
from functools import cache
from pathlib import Path

from xmask import files

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "pandas",
             "segment-anything")


def digest(*parts: object) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide numbers."""
    import xmask

    # the release alone: a commit more must not change what a rerun writes
    release = re.match(r"[\d.]*\d", xmask.__version__)[0]
    found = {"python": platform.python_version(), "xmask": release}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def code(*modules: str) -> str:
    """Digest of the source of modules of this package and of all they import from it.

    `xmask.config` is left out: the values that a step uses are in its configuration, and another
    profile's values must not make it stale.
    """
    with _PARSING:
        return _code(*modules)


# steps run in threads, and Python before 3.12 cannot parse in two of them at a time
_PARSING = threading.Lock()


@cache
def _code(*modules: str) -> str:
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in sources or name == "xmask.config":
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue  # a function or class imported from a package, not a module
        source = Path(spec.origin).read_text(encoding="utf-8")
        sources[name] = hashlib.sha256(source.encode()).hexdigest()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xmask"):
                waiting.append(node.module)
                waiting += [f"{node.module}.{alias.name}" for alias in node.names
                            if _is_module(f"{node.module}.{alias.name}")]
            elif isinstance(node, ast.Import):
                waiting += [a.name for a in node.names if a.name.startswith("xmask")]
    return digest(sources)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def is_done(stamp: Path, fingerprint: str) -> bool:
    """Whether the stamp's step was finished with this fingerprint and its files are unchanged."""
    if not stamp.is_file():
        return False
    noted = files.read_json(stamp)
    return noted["fingerprint"] == fingerprint and all(
        Path(name).is_file() and files.sha256(name) == checksum
        for name, checksum in noted["outputs"].items()
    )


def write_stamp(stamp: Path, fingerprint: str, outputs: list[Path]) -> None:
    """Note that a step is done: its fingerprint and the checksums of its outputs."""
    files.write_json(
        stamp,
        {
            "fingerprint": fingerprint,
            "outputs": {path.as_posix(): files.sha256(path) for path in outputs},
        },
    )
