"""What is compared: the rows of the benchmark, their targets, and how the two results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmask.bench import sides

IMAGE = (768, 1024)  # H, W of a test image (ShanghaiTech A's commonest size)
CROP = (256, 256)
CROWDS = (50, 500, 3000, 10000)


@dataclass(frozen=True)
class Row:
    """One comparison.

    ours, other: makers of `xmask.bench.sides` with their arguments.
    faster, leaner: how many times faster and smaller in memory ours has to be; None: no target.
    share: instead, ours may cost at most this share of the other's time.
    fewer: the other side runs with this many heads only, twice, and a straight line through the
        two gives its time and memory for all `heads`: dense code is linear in heads.
    times: instead, the other side is measured on a part and multiplied.
    agree: (result of ours, result of the other) -> what they have in common, in words.
    """

    group: str
    operation: str
    shape: tuple[int, int]
    heads: int | None
    ours: tuple[Callable, dict[str, Any]]
    against: str
    other: tuple[Callable, dict[str, Any]]
    faster: float | None = None
    leaner: float | None = None
    share: float | None = None
    fewer: tuple[int, int] | None = None
    times: int = 1
    agree: Callable[[Any, Any], str] | None = None
    note: str = ""


def rows() -> Iterator[Row]:
    """Every row, cheap groups first."""
    yield from _circles()
    yield from _decoding()
    yield from _losses()
    yield from _metrics()
    yield from _masks()
    yield from _network()


def _both(ours: Callable, other: Callable, heads: int, shape: tuple[int, int]) -> dict[str, Any]:
    size = {"heads": heads, "shape": shape}
    return {"shape": shape, "heads": heads, "ours": (ours, size), "other": (other, size)}


def _circles() -> Iterator[Row]:
    for heads in CROWDS:
        yield Row(
            "nnec", "exclusion circles: radii and incidence list",
            **_both(sides.circles_ours, sides.circles_dense, heads, IMAGE),
            against="dense N×H×W", fewer=None if heads <= 50 else (10, 30),
            agree=same_number if heads <= 50 else None)


def _decoding() -> Iterator[Row]:
    for heads, faster in ((50, None), (541, 200), (3000, 1000), (10000, None)):
        few = heads <= 541
        yield Row(
            "decode", "decoding, every head",
            **_both(sides.decode_ours, sides.decode_dense, heads, IMAGE),
            against="dense, every head", faster=faster, fewer=None if few else (10, 30),
            agree=same_map if few else None)


def _losses() -> Iterator[Row]:
    yield Row(
        "losses", "exclusivity loss with gradient",
        **_both(sides.exclusivity_ours, sides.exclusivity_dense, 500, CROP),
        against="dense N×D×H×W", faster=500, leaner=20, agree=same_gradient)
    for heads in CROWDS:
        yield Row(
            "losses", "exclusivity loss with gradient",
            **_both(sides.exclusivity_ours, sides.exclusivity_dense, heads, IMAGE),
            against="dense N×D×H×W", fewer=(4, 12))
    for heads, shape in ((200, CROP), *((heads, IMAGE) for heads in CROWDS)):
        yield Row(
            "losses", "P2R: cells to points",
            **_both(sides.p2r_ours, sides.p2r_dense, heads, shape),
            against="dense cells × points", agree=same_array)


def _metrics() -> Iterator[Row]:
    for heads in CROWDS:
        yield Row(
            "metrics", "segmentation metrics",
            **_both(sides.segmentation_ours, sides.segmentation_dense, heads, IMAGE),
            against="dense IoU + Hungarian", faster=3 if heads == 3000 else None,
            agree=same_metrics)
    for heads in CROWDS:
        yield Row(
            "metrics", "localisation metric",
            **_both(sides.localization_ours, sides.localization_dense, heads, IMAGE),
            against="dense Hungarian", agree=same_number)


def _masks() -> Iterator[Row]:
    yield Row(
        "sam", "SAM masks of every head, image encoder left out",
        **_both(sides.sam_ours, sides.sam_stock, 256, IMAGE),
        against="SamPredictor.predict_torch, batches of 64", faster=3, agree=same_sam_map,
        note="vit_b, random weights, the same on both sides; one point a head, three candidates")
    for heads in (50, 500, 3000):
        yield Row(
            "masks", "EDP-SAM without SAM (classical segmenter), masks from points",
            **_both(sides.masks_ours, sides.watershed, heads, IMAGE),
            against="scikit-image watershed", agree=mean_ious(heads, IMAGE),
            note="drawn scene; not the same masks: the mean IoU with the truth says what they are "
                 "worth")
    yield Row(
        "masks", "EDP-SAM without SAM (classical segmenter), masks from points",
        **_both(sides.masks_ours, sides.random_walker, 500, IMAGE),
        against="scikit-image random walker", fewer=(2, 6), note="drawn scene")


def _network() -> Iterator[Row]:
    after = {"shape": IMAGE, "heads": 3000, "against": "the network's forward pass",
             "other": (sides.forward, {"shape": IMAGE}), "share": 0.05}
    size = {"heads": 3000, "shape": IMAGE}
    yield Row("network", "everything after the network: points and masks",
              ours=(sides.after_network, size), **after)
    yield Row("network", "the same with all metrics against a truth",
              ours=(sides.after_network, size | {"score": True}), **after)
    for phase in (1, 2, 3):
        yield Row(
            "network", f"losses and pseudo-labels of a training step, phase {phase}", CROP, 200,
            (sides.training_terms, {"phase": phase, "batch": 16, "heads": 200}),
            "the network's part of the step (VGG16-BN)",
            (sides.training_step, {"phase": phase, "batch": 2}), share=0.1, times=8,
            note="16 + 16 crops; the network is measured on 2 + 2 and multiplied by 8")
    step = {"phase": 1, "batch": 2}
    for against, change in (("without channels-last", {"channels_last": False}),
                            ("without the fused Adam", {"fused": False})):
        yield Row(
            "network", "the network's part of a training step as it is done (channels-last, fused "
            "Adam)", CROP, None, (sides.training_step, step), against,
            (sides.training_step, step | change),
            note="2 + 2 crops, phase 1; above 1× faster: the other way does not pay on a CPU")
    yield Row(
        "network", "making the crops of a training step, one loader process", CROP, 200,
        (sides.crops, {"batch": 16, "heads": 500, "shape": IMAGE}),
        "the network's part of the step (VGG16-BN)",
        (sides.training_step, {"phase": 3, "batch": 2}), share=1.0, times=8,
        note="phase 3, the cheapest for the network; the loader works while the network does")


# What ours costs alone, as heads and pixels grow: name: (maker, the most that 10,000 heads may
# take over 50, None for no target).
GROWTH = {
    "decoding": (sides.decode_ours, 2.0),
    "exclusivity loss with gradient": (sides.exclusivity_ours, None),
    "circles": (sides.circles_ours, None),
    "P2R: cells to points": (sides.p2r_ours, None),
    "segmentation metrics": (sides.segmentation_ours, None),
}
SHAPES = ((384, 512), (768, 1024), (1536, 2048))
SHAPE_HEADS = 1000


# -- agreement ----------------------------------------------------------------------------------


def same_number(ours: float, other: float) -> str:
    return "identical" if ours == other else f"{ours} against {other}"


def same_array(ours: np.ndarray, other: np.ndarray) -> str:
    differ = int((ours != other).sum())
    return "identical" if differ == 0 else f"{differ} of {ours.size} entries differ"


def same_map(ours: np.ndarray, other: np.ndarray) -> str:
    differ = int((ours != other).sum())
    return "identical map" if differ == 0 else f"{differ} of {ours.size} pixels differ"


def same_gradient(ours: tuple, other: tuple) -> str:
    value = abs(ours[0] - other[0]) / abs(other[0])
    gradient = np.abs(ours[1] - other[1]).max() / np.abs(other[1]).max()
    return f"value to {value:.0e}, gradient to {gradient:.0e} (relative)"


def same_metrics(ours: dict, other: dict) -> str:
    worst = max(abs(ours[name] - other[name]) for name in other)
    return "identical" if worst < 1e-12 else f"differ by up to {worst:.1e}"


def same_sam_map(ours: dict, other: dict) -> str:
    differ = ours["labels"] != other["labels"]
    if not differ.any():
        return "identical map"
    worst = ours["nearest_zero"][differ].max() / ours["scale"]
    return (f"{int(differ.sum())} of {differ.size} pixels differ, where a logit is within "
            f"{worst:.0e} of 0 (relative to the median logit)")


def mean_ious(heads: int, shape: tuple[int, int]) -> Callable[[np.ndarray, np.ndarray], str]:
    def agree(ours: np.ndarray, other: np.ndarray) -> str:
        from xmask.metrics import segmentation

        true = sides.true_map(heads, shape)
        values = [segmentation(m, true)["mean_iou"] for m in (ours, other)]
        return "mean IoU {:.3f} against {:.3f}".format(*values)

    return agree
