"""Counts of a run whose threshold was set on other drawn scenes (ours).

A network can count wrong because it takes the ground for heads, or because 0.5 is the wrong place
to cut. What trains it moves that place: P2R counts too many where it is unsure, and the mask
constraint too few. With a threshold that makes the total of other scenes right, the first is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from xmask.config import Config
from xmask.decode import points_from_logits
from xmask.study import evaluate

SCENES = {"train": 1, "test": 60, "seed": 2025}  # of `write_dataset`; no run trains on any of them


def counts(network: nn.Module, config: Config, scenes: Sequence, tested: Sequence, *,
           progress: bool = True) -> dict[str, Any]:
    """What calibrated.json holds of a network.

    scenes: drawn ones that set the threshold, by `calibration.calibrate`. tested: the test images,
    with `ids`. Returns `threshold`, `scenes` (their number) and `per_image`: name, true_count and
    count of every test image.
    """
    look = partial(evaluate.look, network, decoding=config.evaluation, progress=progress)
    found, seen = evaluate.calibrate(look(scenes), config), look(tested)
    return {"threshold": found.threshold, "scenes": found.images, "per_image": [
        {"name": name, "true_count": people,
         "count": len(points_from_logits(torch.as_tensor(logits), threshold=found.threshold)[0])}
        for name, (logits, people) in zip(tested.ids, seen)]}
