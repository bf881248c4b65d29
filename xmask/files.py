"""Reading and writing files so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on error.

    The temporary name keeps the suffix of `path`, because writers such as Pillow read the
    format from it, and starts with a dot, so that no reader lists it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file in one move: a reader sees the old one or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write JSON; NaN and infinities are refused, because JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """The content of a JSON file; ValueError, naming the file, if it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). Delete it and run the step again."
        ) from None


def write_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a uint8 (H, W, 3) picture, or a uint8/uint16 (H, W) map, as PNG."""
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: a PNG holds uint8 or uint16 values, not {array.dtype}")
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def sha256(path: str | os.PathLike) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock(folder: str | os.PathLike, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, made if need be, as the only process; the system frees it when we die.

    wait: seconds to wait for another process.
    Raises ValueError, naming who holds the folder, if another one still does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder, held = folder / ".holder.json", FileLock(folder / ".lock", timeout=wait)
    try:
        held.acquire()
    except Timeout:
        try:
            who = " ".join(f"{name} {value}" for name, value in read_json(holder).items())
        except (OSError, ValueError, AttributeError):
            who = "of which nothing is noted"
        raise ValueError(f"{folder}: another process works in it ({who}); wait for it or end it, "
                         "then run the same command again") from None
    try:
        write_json(holder, {"pid": os.getpid(), "on": platform.node(),
                            "since": time.strftime("%F %T")})
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()
