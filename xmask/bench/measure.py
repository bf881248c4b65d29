"""Time and peak memory of one side of a comparison, in a process of its own.

Every side lives in a fresh child process that makes its inputs first. The sides of a comparison
then take turns, one call at a time, so that a busy machine hurts them alike. Time is the wall
clock of the call alone. Memory is how far the resident size rises during the first call above
where it stood before it; Linux alone can tell.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

_PAUSE = 0.1  # seconds before a call: threads of the other side may still spin on a core
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_calls: list[Callable[[], Any]] = []  # in a child: what it measures


@dataclass(frozen=True)
class Measured:
    """seconds: of each timed call. peak: bytes above the inputs in the first call, None if the
    system does not tell. result: what the first call returned."""

    seconds: list[float]
    peak: int | None
    result: Any


def alternate(sides: Sequence[Callable[[], Callable]], *, threads: int, runs: int = 5,
              patience: float = 6.0) -> list[Measured]:
    """Measure sides in turns, each given by an importable maker of the call to time.

    The first call of a side warms up and is not timed, unless it alone took more than
    `patience` seconds; a side is called until it has `runs` timed calls or has used `patience`
    seconds, at least once.
    Raises what a side raises, and BrokenProcessPool if its process dies (out of memory, say).
    """
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    with ExitStack() as stack:
        children = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
                    for _ in sides]
        ready = [child.submit(_prepare, make, threads) for child, make in zip(children, sides)]
        for one in ready:
            one.result()
        first = [child.submit(_measure).result() for child in children]
        for one in first:
            if one.seconds[0] <= patience:
                one.seconds.clear()
        for _ in range(runs):
            for child, one in zip(children, first):
                if sum(one.seconds) < patience:
                    one.seconds.append(child.submit(_measure).result().seconds[0])
        return first


def _prepare(make: Callable[[], Callable], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _calls.append(make())


def _end_with_parent() -> None:
    parent_process().join()  # a pool's child does not notice by itself when its parent is killed
    os._exit(1)


def _measure() -> Measured:
    before = _peak(reset=True)
    time.sleep(_PAUSE)
    start = time.perf_counter()
    result = _calls[0]()
    seconds = time.perf_counter() - start
    after = _peak()
    return Measured([seconds], None if before is None else max(after - before, 0), result)


def _peak(reset: bool = False) -> int | None:
    """Bytes: the high-water mark of the resident size; reset: the resident size of now."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None
