"""What `torchrun` starts in tests/test_processes.py: a small training, of which each process has
its share. `python -m tests.two_processes OUT [fault]`."""

import functools
import os
import signal
import sys
from pathlib import Path

import torch

from tests.test_trainer import CPU, images, tiny
from xmask import processes
from xmask.trainer import Trainer

EPOCHS = {"schedule__phase1": 4, "schedule__phase2": 8, "schedule__phase3": 12,
          "schedule__steps_per_epoch": 5,  # 20 steps a phase
          "optimisation__pseudo_threshold": None,  # of the whole batch, which they share
          "seed": 4}  # with it, no choice hangs on the last digit


# Where a gradient is nothing but rounding, Adam's usual 1e-8 makes a whole step of it
GENTLE = functools.partial(torch.optim.Adam, eps=1e-2)


def main(out: str, fault: str = "") -> None:
    torch.optim.Adam = GENTLE
    run = Trainer(tiny(optimisation__batch=4, **EPOCHS), *images(), device=CPU)
    last = run.fabric.global_rank == run.fabric.world_size - 1
    with processes.gone():
        while not run.finished:
            if fault and last and run.epoch == 1:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                run.student.decoder[0].bias.data.fill_(float("nan"))
            run.run_epoch()
            if run.epoch in (4, 8, 12) and run.fabric.is_global_zero:
                torch.save(run.state(), Path(out) / f"{run.epoch}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
