"""Python programs that start at once, as they are forked from a process that has imported xmask.

A new interpreter takes five seconds to import torch and all that needs it. What a test says about
such seconds, about hash seeds or about memory needs a new interpreter; all else does not.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import dask

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["xmask.tools.learn", "xmask.tools.mask_folder",
                               "xmask.tools.photos", "xmask.study.reproduce"])


def forked_workers() -> AbstractContextManager:
    """Within it, workers of Dask that this process starts are forked, too."""
    ensure_running()  # before Dask says what it should import
    return dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


class Program(FORKS.Process):
    """`python -m MODULE ARGUMENTS` or `python -c CODE ARGUMENTS`, begun at once, in a session of
    its own.

    log: the file that takes what it prints. environment: beside that of the test.
    """

    def __init__(self, option: str, *words: object, log: Path,
                 environment: dict[str, str] | None = None) -> None:
        super().__init__()
        self.option, self.words = option, list(map(str, words))
        self.log, self.folder = log, os.getcwd()
        self.environment = os.environ | (environment or {})
        self.start()

    def run(self) -> None:
        os.setsid()
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
        with open(self.log, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.argv = self.words
        if self.option == "-m":
            runpy.run_module(self.words[0], run_name="__main__", alter_sys=True)
        else:
            exec(self.words[0], {"__name__": "__main__"})

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; raises subprocess.TimeoutExpired as a `subprocess.Popen` does."""
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.exitcode

    def kill_all(self) -> None:
        """Kill it and what it has started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.join()

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8")
