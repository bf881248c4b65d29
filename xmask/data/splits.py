"""Which training images are labelled: the published protocol (section 7), or a stratified draw."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

import numpy as np

from xmask.data.readers import CrowdDataset, first_few

#: Data set -> its key in the published protocol.
_PROTOCOLS = {"sha": "sha", "qnrf": "ucf", "jhu": "jhu"}


@lru_cache(maxsize=1)
def protocols() -> dict:
    """The published protocol: data set -> percentage -> labelled image numbers."""
    return json.loads(resources.files("xmask.data").joinpath("protocols.json").read_text("utf-8"))


def labelled_ids(dataset: CrowdDataset, percent: float, *, seed: int = 2024) -> list[int]:
    """Indices into the training set `dataset` of its labelled images, ascending.

    For the real sha, qnrf and jhu these are the images of the published protocol, which exists
    for 5, 10 and 40 percent; `seed` has no part in it. For UCF-QNRF those percentages are of the
    1081 images that the field does not keep for validation. For drawn and other data sets it is
    `stratified`. 100 percent is always every image.

    Raises ValueError for a percentage outside (0, 100] or without a protocol, for a split other
    than "train", and if images of the protocol are missing from the data set.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent of labelled images is above 0 and at most 100; found {percent}.")
    if dataset.split != "train":
        raise ValueError(f"labelled images are chosen from the train split, not {dataset.split!r}.")
    if percent == 100:
        return list(range(len(dataset)))
    if dataset.synthetic or dataset.name not in _PROTOCOLS:
        return stratified(dataset.counts(), percent, seed=seed)
    protocol = protocols()[_PROTOCOLS[dataset.name]]
    key = f"{percent:g}"
    if key not in protocol:
        raise ValueError(f"no published protocol for {percent:g} percent of "
                         f"{dataset.layout.title}; there is one for {', '.join(protocol)} "
                         "(and 100: all images).")
    position = {number: i for i, number in enumerate(dataset.numbers)}
    missing = sorted(number for number in protocol[key] if number not in position)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(protocol[key])} labelled images of the {key} percent "
            f"protocol are not in this {dataset.layout.title}: numbers {first_few(missing)}. "
            "Download the data set again; image numbers must be the original ones.")
    return sorted(position[number] for number in protocol[key])


def stratified(counts: np.ndarray, percent: float, *, seed: int) -> list[int]:
    """Choose `percent` of the images so that they span sparse to dense crowds.

    counts: (N,) heads per image. The images are sorted by count and cut into k equal strata,
    k = percent of N, at least 1; one image of each is drawn. Returns k indices, ascending.
    """
    k = max(1, round(len(counts) * percent / 100))
    order = np.argsort(counts, kind="stable")
    rng = np.random.default_rng(seed)
    return sorted(int(rng.choice(stratum)) for stratum in np.array_split(order, k))
