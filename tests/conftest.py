"""One thread per test process, and the same examples in every run: results depend neither on the
machine's cores nor on chance."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
