"""Notebooks executed by papermill, each in a kernel of its own: a job of `xmask.data.cluster`.

A worker starts this module as a process, `python -m xmask.study.execute`, which imports what
notebooks import, once, and then forks for every notebook: one process for papermill and one, its
kernel. Where Python cannot fork with care (that is, but on Linux) such a process executes one
notebook only. The worker holds the other end of its standard input: when that end closes, because
the worker ended or was killed by whatever signal, a notebook ends at once and its kernel within a
second, as ipykernel watches who started it.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FORKS = sys.platform == "linux"
_PROCESSES = multiprocessing.get_context("fork" if _FORKS else None)
_NEEDED = ("ipykernel.kernelapp", "papermill", "seaborn", "xmask.study.claim_figures",
           "xmask.study.steps", "xmask.tools.overlay")  # by notebooks


# -- in a worker ---------------------------------------------------------------------------


@dataclass
class Notebooks:
    """Executes notebooks, one at a time.

    root: the folder in which they run. environment: of their processes, beside the worker's own.
    """

    root: str
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    ended: bool = False

    def begin(self) -> None:
        """Raises ValueError where this worker does not see the folder."""
        if not Path(self.root).is_dir():
            raise ValueError(f"{self.root}: a worker on {platform.node()} sees no such folder. "
                             "All machines have to see it under the same path")

    def end(self) -> None:
        """End the notebook that runs, if one does; no other will."""
        self.ended = True
        if self.process:
            self.process.stdin.close()

    def run_in_worker(self, item: tuple[Path, Path, dict[str, Any], Path]) -> str:
        """As `execute`, of what it takes."""
        return self.execute(*item)

    def execute(self, source: Path, target: Path, parameters: dict[str, Any], log: Path) -> str:
        """Execute a notebook; returns "", or what a reader needs to see why it failed.

        All paths are relative to the root. log: takes what is printed.
        Raises ChildProcessError if its process was killed.
        """
        output = Path(self.root) / log
        for path in (output, Path(self.root) / target):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "w", encoding="utf-8") as file:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "xmask.study.execute"], stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=file, cwd=self.root, text=True,
                    env=os.environ | self.environment, start_new_session=True)
        if self.ended:
            self.process.stdin.close()
        with suppress(OSError, ValueError):  # it has ended, as `wait` will tell
            self.process.stdin.write(json.dumps([*map(str, (source, target, log)), parameters]))
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        code = int(self.process.stdout.readline() or self.process.wait())
        where = f"  log: {log}\n  notebook as far as it came: {target}"
        if code < 0:
            self.process.stdin.close()  # what it forked has not died, maybe
            self.process.wait()  # so that the next try starts another
            raise ChildProcessError(f"  the process of the notebook died ({-code})\n{where}")
        tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-12:])
        return f"{tail}\n{where}" if code else ""


# -- in the process that it starts ---------------------------------------------------------


class _Kernel(_PROCESSES.Process):
    """A kernel, forked before there are threads; papermill takes it for a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        super().__init__()
        self.told, self.tell = _PROCESSES.Pipe(duplex=False)

    def run(self) -> None:
        from ipykernel.kernelapp import IPKernelApp

        self.tell.close()
        with suppress(EOFError):  # papermill ended before it asked for a kernel
            arguments = self.told.recv()
            os.setsid()
            IPKernelApp.launch_instance(arguments, parent_handle=os.getppid())

    def poll(self) -> int | None:
        return self.exitcode

    wait = _PROCESSES.Process.join

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _execute(line: int, source: str, target: str, log: str, parameters: dict[str, Any]) -> None:
    """Execute one notebook; end this process as soon as `line` does."""
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    kernel = _Kernel() if _FORKS else None
    if kernel:
        kernel.start()
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    # these take a second, in which the watch is on already
    from jupyter_client import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from traitlets.config import Config

    class Manager(AsyncKernelManager):
        async def _async_launch_kernel(self, kernel_cmd: list[str], **how: Any) -> None:
            if kernel:
                kernel.tell.send(kernel_cmd[kernel_cmd.index("-f"):])
                self.provisioner.process = kernel
            else:
                await super()._async_launch_kernel(kernel_cmd, **how)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as place:
        # Kernels that start at the same time can choose the same ports, and then one of them never
        # answers. Sockets in a folder of their own cannot meet, and no port is open; Windows has
        # none.
        own = {"transport": "ipc", "ip": f"{place}/kernel"} if os.name == "posix" else {}
        try:
            execute_notebook(source, target, parameters, progress_bar=False, log_output=True,
                             kernel_manager_class=Manager, config=Config({"KernelManager": own}))
        except DeadKernelError:
            os.kill(os.getpid(), signal.SIGTERM)  # as if it had been killed itself: to be retried


def _end_with(line: int) -> None:
    while os.read(line, 1024):
        pass
    os._exit(1)


def main() -> None:
    """Execute a notebook for every line of standard input, as `Notebooks.execute` writes it."""
    line = os.dup(0)
    for name in _NEEDED if _FORKS else ():
        with suppress(ImportError):  # the notebook that needs it will say so
            importlib.import_module(name)
    for request in sys.stdin:
        if not _FORKS:
            _execute(line, *json.loads(request))
            return
        child = _PROCESSES.Process(target=_execute, args=(line, *json.loads(request)))
        child.start()
        child.join()
        with suppress(OSError):  # the worker is gone
            os.write(1, f"{child.exitcode}\n".encode())
    os._exit(1)  # whoever still waits waits in vain; tidying all modules away would take seconds


if __name__ == "__main__":
    main()
