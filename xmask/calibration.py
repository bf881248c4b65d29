"""Counts that are right on labelled images which training did not see: a threshold, an interval.

P2R weighs heads twice, so a network that is unsure counts too many at probability 0.5. On images
held out from training, one threshold makes the total count right. A few images can err about it, so
it is taken only as far as they agree (shrinkage, with the jackknife's variance; Efron 1982). What
is still wrong in each of them says how far off the count of a new image may be (own; the interval
is split-conformal prediction, Lei et al. 2018, normalised by how unsure the network is; but for
the threshold, which the same images set, for each the others).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xmask.config import Evaluation, override

_LOWEST = -6.0  # logit below which no threshold is looked for
# logits: how far the right threshold lay from 0.5, as a root mean square, in the 43 networks of
# `results/full` whose threshold sixty drawn scenes set (ours)
USUAL = 0.32


@dataclass(frozen=True)
class Calibration:
    """threshold: probability above which a point is counted. factor: half the width of the
    interval in units of `spread`; None where too few images were held out for one. coverage: of
    the interval. images: how many set the threshold. mae, mae_before: mean absolute error on them
    with a threshold that the others set, and with the threshold of the configuration; None where
    they were not held out."""

    threshold: float
    factor: float | None
    coverage: float
    images: int
    mae: float | None
    mae_before: float | None

    def applied(self, decoding: Evaluation) -> Evaluation:
        """The decoding with this threshold; a point that is counted also has a mask."""
        return override(decoding, {
            "count_threshold": self.threshold,
            "point_threshold": min(decoding.point_threshold, self.threshold)})

    def interval(self, count: int, spread: float) -> tuple[int | None, int | None]:
        """(low, high): whole numbers that hold the true count in `coverage` of the images, if
        they are like those held out; None, None where there is no factor."""
        if self.factor is None:
            return None, None
        half = self.factor * spread
        return max(0, math.floor(count - half)), math.ceil(count + half)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)


def from_dict(values: object) -> Calibration | None:
    """The inverse of `Calibration.to_dict`; None for None. Raises ValueError for anything else."""
    if values is None:
        return None
    try:
        found = Calibration(**values)  # type: ignore[arg-type]
        fit = (0 < found.threshold < 1 and 0 < found.coverage < 1
               and (found.factor is None or 0 <= found.factor < 1e6))
    except TypeError as error:
        raise ValueError(f"calibration: {error}") from None
    if not fit:
        raise ValueError(f"calibration: {values} is not one of this package; calibrate again")
    return found


def spread(logits: np.ndarray) -> float:
    """How unsure the network is of a count: the standard deviation of the number of heads if every
    cell were a head or not by itself, plus a little. logits: (h, w), of the image's own cells."""
    share = 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))
    return math.sqrt(1 + float((share * (1 - share)).sum()))


def calibrate(logits: Sequence[np.ndarray], counts: Sequence[int], coverage: float,
              before: float) -> Calibration:
    """The calibration by images that training did not see.

    logits: of each image, (h, w), its own cells. counts: the true ones. coverage: of the interval.
    before: the threshold, a probability, to start from and to compare with. In logits, the
    threshold goes the share USUAL^2 / (USUAL^2 + v) of the way to the one that makes the total
    right, v being how far that one varies with the choice of images, by the jackknife. The interval
    comes from the error of each image at the threshold of the others; it needs coverage / (1 -
    coverage) images, 9 for 90%. Images without any head leave the threshold as it was. Raises
    ValueError for fewer than two images.
    """
    true = np.asarray(counts)
    if len(true) < 2:
        raise ValueError(f"calibration: {len(true)} images held out; give at least two")
    sure = [np.sort(one[one > _LOWEST].astype(np.float64).ravel())[::-1] for one in logits]

    start = math.log(before / (1 - before))

    def right(images: Sequence[int]) -> float:
        every = np.sort(np.concatenate([sure[i] for i in images]))[::-1]
        total = int(true[list(images)].sum())
        if total == 0 or len(every) == 0:
            return start
        last = every[min(total, len(every)) - 1]
        following = every[total] if total < len(every) else _LOWEST
        return float((last + following) / 2)

    def count(image: int, logit: float) -> int:
        return int((sure[image] > logit).sum())

    everyone = range(len(true))
    without = np.array([right([i for i in everyone if i != image]) for image in everyone])
    varies = float((len(true) - 1) * without.var())  # of the one of all images
    trusted = USUAL ** 2 / (USUAL ** 2 + varies)
    error = np.array([abs(count(i, start + trusted * (without[i] - start)) - true[i])
                      for i in everyone])
    at_first = [abs(count(i, start) - true[i]) for i in everyone]
    rank = math.ceil((len(true) + 1) * coverage - 1e-9)
    ratios = np.sort(error / [spread(one) for one in logits])
    return Calibration(
        threshold=1 / (1 + math.exp(-start - trusted * (right(everyone) - start))),
        factor=float(ratios[rank - 1]) if rank <= len(true) else None, coverage=coverage,
        images=len(true), mae=float(error.mean()), mae_before=float(np.mean(at_first)))
