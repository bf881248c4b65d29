"""`python -m xmask.study.execute SOURCE TARGET PARAMETERS`: one notebook, by papermill.

The process that starts it holds the other end of its standard input. When that end closes, because
the process ended or was killed by whatever signal, this one ends at once. Its kernel follows within
a second: ipykernel watches who started it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading


def end_with_input() -> None:
    """From now on, end this process as soon as its standard input ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(source: str, target: str, parameters: str) -> None:
    """Execute the notebook `source` into `target`; parameters: a JSON object."""
    end_with_input()
    # these take a second, in which the watch is on already
    from papermill import execute_notebook
    from traitlets.config import Config

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as place:
        # Kernels that start at the same time can choose the same ports, and then one of them never
        # answers. Sockets in a folder of their own cannot meet, and no port is open; Windows has
        # none.
        own = {"transport": "ipc", "ip": f"{place}/kernel"} if os.name == "posix" else {}
        execute_notebook(source, target, json.loads(parameters), progress_bar=False,
                         log_output=True, config=Config({"KernelManager": own}))


if __name__ == "__main__":
    main(*sys.argv[1:])
