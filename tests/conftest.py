"""One thread per test process and per process that it starts, and the same examples in every run:
results depend neither on the machine's cores nor on chance."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# each takes the better half of a minute or more; begun first, they leave no worker idle at the end
LONG = ("test_walkthroughs.py", "test_hostile.py", "test_execute.py", "test_reproduce.py",
        "test_docs.py", "test_masks.py", "test_onnx_export.py", "test_drawing.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
