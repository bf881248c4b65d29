"""One thread per test process and per process that it starts, and the same examples in every run:
results depend neither on the machine's cores nor on chance."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
