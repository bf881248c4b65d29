"""Time and peak memory of one side of a comparison, in a process of its own.

Every side lives in a fresh child process that makes its inputs first. The sides of a comparison
then take turns, one call at a time, so that a busy machine hurts them alike. Time is the wall
clock of the call alone. Memory is how far the resident size rises during the first call above
where it stood before it (Linux: the high-water mark VmHWM, reset before the call; elsewhere
`ru_maxrss`, which also remembers the making of the inputs and so may report too little).
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAUSE = 0.1  # seconds before a call: threads of the other side may still spin on a core
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Measured:
    """seconds: of each timed call. peak: bytes above the inputs in the first call. result: what
    the first call returned."""

    seconds: list[float]
    peak: int
    result: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(
    sides: list[tuple[Callable, dict[str, Any]]],
    *,
    threads: int,
    runs: int = 5,
    patience: float = 6.0,
) -> list[Measured]:
    """Measure sides in turns: each a maker (importable, it returns the call to time) and its
    arguments.

    The first call of a side warms up and is not timed, unless it alone took more than
    `patience` seconds; a side is called until it has `runs` timed calls or has used `patience`
    seconds, at least once.
    Raises RuntimeError with the child's traceback if a side fails.
    """
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(threads)
    context = multiprocessing.get_context("spawn")
    children = []
    try:
        for make, arguments in sides:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make, arguments, threads),
                                      daemon=True)
            process.start()
            there.close()
            children.append((process, here))
        for _, pipe in children:
            _receive(pipe)
        first = [_call(pipe, "measure") for _, pipe in children]
        seconds = [[f["seconds"]] if f["seconds"] > patience else [] for f in first]
        for _ in range(runs):
            for (_, pipe), spent in zip(children, seconds):
                if not spent or (len(spent) < runs and sum(spent) < patience):
                    spent.append(_call(pipe, "time")["seconds"])
        return [Measured(s, f["peak"], f["result"]) for s, f in zip(seconds, first)]
    finally:
        for _, pipe in children:
            pipe.close()  # ends the child's loop
        for process, _ in children:
            process.join(10)
            if process.is_alive():
                process.terminate()


def _call(pipe, order: str) -> dict:
    pipe.send(order)
    return _receive(pipe)


def _receive(pipe) -> dict:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError(
            "bench: a measuring process died without a word, probably out of memory; close other "
            "programs, or leave the group out with --only") from None
    if "error" in answer:
        raise RuntimeError(f"bench: a side failed:\n{answer['error']}")
    return answer


def _serve(pipe, make: Callable, arguments: dict[str, Any], threads: int) -> None:
    """The child: make the inputs, then answer one order after another."""
    import traceback

    import torch

    torch.set_num_threads(threads)
    try:
        call = make(**arguments)
        pipe.send({"ready": True})
        while True:
            try:
                order = pipe.recv()
            except EOFError:
                return
            before = _reset_peak() if order == "measure" else 0
            time.sleep(_PAUSE)
            start = time.perf_counter()
            result = call()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
            if order == "measure":
                answer |= {"peak": max(_peak() - before, 0), "result": result}
            pipe.send(answer)
    except Exception:
        pipe.send({"error": traceback.format_exc()})


def _reset_peak() -> int:
    """Start a new high-water mark; the resident bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak() -> int:
    """Bytes: the high-water mark of the resident size."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bandwidth(threads: int) -> float:
    """Bytes per second of a copy between two arrays far larger than any cache, read and written
    bytes added up; the best of five."""
    return alternate([(_copying, {})], threads=threads, runs=1)[0].result


def _copying() -> Callable[[], float]:
    import torch

    source = torch.ones(1 << 26)  # 256 MB
    target = torch.zeros_like(source)

    def best() -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
        return 2 * source.numel() * source.element_size() / min(seconds)

    return best
