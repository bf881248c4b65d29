"""Masks that need no mask head, at the heads that a run predicted, beside the run's own.

They are what somebody has who counts with points only. Each method gets the predicted points of
the test images; its masks are compared with the truth as the run's own are (`metrics`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from xmask import metrics, nnec
from xmask.data.images import read_labels
from xmask.data.sample import Sample
from xmask.edp_sam import generate_masks, local_head_radius
from xmask.segmenters import Segmenter
from xmask.study.edp_study import discs, watershed_masks

NEAREST = "its own foreground, nearest head"  # the run's masks, shared out by distance alone
WHOLE = "equal discs, whole"


def methods(radius: float, segmenter: Segmenter
            ) -> dict[str, Callable[[Sample, np.ndarray], np.ndarray]]:
    """Name -> label map (H, W) int32 of a sample's image and predicted points (N, 2) px.

    radius: px, of the equal discs; the best one on the test images, pooled over people (an
    advantage).
    """
    def radii(sample: Sample, points: np.ndarray) -> np.ndarray:
        return nnec.exclusion_radii(points, sample.shape, lone=0.25)

    return {
        "equal discs, cut where they meet": lambda s, p: discs(
            p, np.full(len(p), radius), s.shape),
        "exclusion discs": lambda s, p: discs(p, radii(s, p) / 2, s.shape),
        "Voronoi cells in circles": lambda s, p: discs(p, radii(s, p), s.shape),
        "Voronoi-limited discs": lambda s, p: discs(
            p, local_head_radius(p, radii(s, p), s.shape), s.shape),
        "watershed": lambda s, p: watershed_masks(s.image, p),
        "EDP-SAM": lambda s, p: generate_masks(s.image, p, segmenter)[0],
    }


def nearest_head(masks: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The foreground of a label map (H, W), each pixel given to the nearest of the points (N, 2)
    in whose circle it lies: what is left of masks without the embedding's say on neighbours."""
    shared = discs(points, nnec.exclusion_radii(points, masks.shape, lone=0.25), masks.shape)
    return np.where(masks > 0, shared, 0)


def compare(dataset, folder: str | Path, radii: tuple[float, float], segmenter: Segmenter, *,
            progress: bool = True) -> list[dict[str, float | str | None]]:
    """Mean IoU over the people of every test image, by every method of `methods`, by
    `nearest_head`, and of whole discs, which overlap.

    dataset: the test images, with true masks. folder: of the run; its predictions are read.
    radii: px, of whole discs and of those that cut each other.
    Returns a row an image: `name`, then the methods; None where nobody is in the picture.
    """
    predictions, rows = Path(folder) / "predictions", []
    if not predictions.is_dir():
        raise FileNotFoundError(f"{predictions}: not there (predictions are not committed). Delete "
                                f"{Path(folder) / 'metrics.json'} and evaluate the run again.")
    for index in tqdm(range(len(dataset)), desc="other masks", unit="image",
                      disable=not progress):
        sample, name = dataset[index], dataset.ids[index]
        table = pd.read_csv(predictions / f"{name}.csv")
        points, truth = table[["x", "y"]].to_numpy(float), sample.instances
        if truth is None:
            raise ValueError(f"{name}: no true masks, so masks cannot be compared. Use drawn "
                             "crowds (profile demo or full).")
        own = read_labels(predictions / f"{name}.png")
        ways = {**methods(radii[1], segmenter), NEAREST: lambda _, p, o=own: nearest_head(o, p)}
        row: dict[str, float | str | None] = {"name": name}
        for method, masks in ways.items():
            labels = masks(sample, points) if len(points) else np.zeros(sample.shape, np.int32)
            row[method] = metrics.segmentation(labels, truth)["mean_iou"]
        whole = nnec.circles(points, np.full(len(points), radii[0]), sample.shape, split=False)
        row[WHOLE] = metrics.overlapping_iou_sum(whole, truth) / max(len(sample.points), 1)
        rows.append(row if len(sample.points) else {"name": name} | dict.fromkeys([*ways, WHOLE]))
    return rows
