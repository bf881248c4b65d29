"""Which commits carry the code that made a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from xmask import files, provenance
from xmask.study import steps

SHORTEST = 8  # digits of a digest


def find(wanted: str, limit: int = 200) -> Iterator[str]:
    """Lines for people: the commits, latest first, that carry the code of a result.

    wanted: a run folder, or a digest from its config.json or metrics.json, or how it begins.
    limit: how many commits are looked at.
    Raises ValueError for anything else, and where the package does not lie in a git clone.
    """
    for title, digest, modules in list(_records(wanted)):
        here = provenance.code(*modules).startswith(digest)
        yield f"{title}: {digest[:16]}, {'the same' if here else 'not the same'} as the code here"
        found = list(commits_of(digest, modules, limit))
        yield from (f"  {line}" for line in found or [
            f"none of the last {limit} commits carries it; --limit looks further back"])


def commits_of(digest: str, modules: Sequence[str], limit: int) -> Iterator[str]:
    """Lines "<commit> <date> <subject>" of the commits in which `provenance.code(*modules)`
    begins with `digest`."""
    for line in provenance.git("log", f"-n{limit}", "--format=%h %cs %s").splitlines():
        if provenance.code_in(_reader(line.split()[0]), modules).startswith(digest):
            yield line


def _records(wanted: str) -> Iterator[tuple[str, str, list[str]]]:
    """(title, digest, modules) of what is asked for."""
    if Path(wanted).is_dir():
        records = [Path(wanted) / name for name in ("config.json", "metrics.json")]
        for path in records[:1 + records[1].is_file()]:  # without the second, it is only trained
            code = files.read_json(path).get("code") if path.is_file() else None
            if not isinstance(code, dict) or not isinstance(code.get("digest"), str) or not (
                    isinstance(code.get("modules"), list)
                    and all(isinstance(one, str) for one in code["modules"])):
                raise ValueError(f"{path}: holds no digest of code; it was made by an earlier "
                                 "version, was edited, or is not there")
            yield path.as_posix(), code["digest"], code["modules"]
    elif re.fullmatch(f"[0-9a-f]{{{SHORTEST},64}}", wanted):
        for title, modules in steps.CODE.items():
            yield f"as the code of {title}", wanted, list(modules)
    else:
        raise ValueError(f"{wanted}: neither a run folder nor a digest ({SHORTEST} to 64 digits "
                         "0-9 and a-f, as in a run's config.json)")


def _reader(commit: str) -> Callable[[str], str | None]:
    """Gives the source at a path of a commit; each version of a file is asked of git once."""
    listed = provenance.git("ls-tree", "-r", commit, "--", "xmask").splitlines()
    blobs = {path: entry.split()[2] for entry, path in (line.split("\t") for line in listed)}
    return lambda path: _blob(blobs[path]) if path in blobs else None


@cache
def _blob(blob: str) -> str:
    return provenance.git("cat-file", "blob", blob)
