"""Test images through the network: counts, points and masks, and what they are worth.

Full resolution, padded to a multiple of 32 (paper section on evaluation). Besides the metrics,
baselines that know the test set and no image: the best constant count, and discs of the best
fixed radius at the predicted heads, whole or cut where they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import logit
from torch import nn
from tqdm.auto import tqdm

from xmask import calibration, decode, files, losses, metrics, nnec
from xmask.calibration import Calibration
from xmask.config import Config, Evaluation
from xmask.data.sample import Sample
from xmask.predict import network_maps, own_cells, predict_image, scaled

LOCALISATION_SIGMAS = (4, 8)  # px, usual for ShanghaiTech A


def count_error(network: nn.Module, samples, decoding: Evaluation) -> float:
    """Mean absolute error of the counts over samples: what "best-on-test" selects by."""
    least = logit(decoding.count_threshold)
    return float(np.mean([abs((cells > least).sum() - true) for cells, true in
                          look(network, samples, decoding, progress=False)]))


def look(network: nn.Module, samples: Sequence[Sample], decoding: Evaluation, *,
         progress: bool = True) -> list[tuple[np.ndarray, int]]:
    """(logits (h, w) of the image's cells, number of its points) of every sample; see
    `decode.candidates`."""
    return [(cells, len(sample.points))
            for sample, (_, cells) in _cells(network, samples, decoding, progress)]


def _cells(network: nn.Module, samples: Sequence[Sample], decoding: Evaluation, progress: bool):
    """Of every sample: itself, and the logits of its cells, all and those that may be heads."""
    for sample in tqdm(samples, desc="calibrate", unit="image", total=len(samples),
                       disable=not progress):
        image = scaled(sample.image, decoding.scale)
        logits = torch.from_numpy(own_cells(network_maps(network.eval(), image)[0], image))
        yield sample, (logits, decode.candidates(logits, decoding).numpy())


def calibrate(seen: Sequence[tuple[np.ndarray, int]], config: Config) -> Calibration:
    """The calibration of a network by images it was not trained on. seen: of each its logits (h, w)
    and its true count, see `look`."""
    logits, counts = zip(*seen)
    return calibration.calibrate(logits, counts, config.calibration.coverage,
                                 config.evaluation.count_threshold)


def calibrate_by_expectation(network: nn.Module, samples: Sequence[Sample], config: Config, *,
                             progress: bool = True) -> Calibration:
    """A calibration by images that training may have learnt from (ours): the threshold at which as
    many heads are counted as the network expects (`losses.expected_heads`). It reads no dots, has
    no interval, and knows no error of its own."""
    every = _cells(network, samples, config.evaluation, progress)
    seen = [(cells, losses.expected_heads(logits)) for _, (logits, cells) in every]
    return replace(calibrate(seen, config), factor=None, mae=None, mae_before=None)


def evaluate(network: nn.Module, dataset, config: Config, folder: Path, *,
             calibrated: Calibration | None = None, progress: bool = True) -> dict:
    """Evaluate on every image of a test set; returns what metrics.json holds.

    Counting reads the counted heads, localisation their places, segmentation the masks of all
    points, as the authors' release does. calibrated: sets the threshold of the counted heads;
    `counting_uncalibrated` says what the configuration's own threshold gives, `interval` how many
    true counts lie in the intervals. Writes predictions/<image>.png (16-bit label map) and
    .csv (x, y, score, counted: 1 or 0; line k of the table has label k) into `folder`.
    """
    decoding, usual = config.evaluation, config.evaluation.count_threshold
    if calibrated:
        decoding = calibrated.applied(decoding)
    rows, segmentations, predicted, located = [], [], [], []
    truths: list[np.ndarray | None] = []
    for index in tqdm(range(len(dataset)), desc="evaluate", unit="image", disable=not progress):
        sample: Sample = dataset[index]
        prediction = predict_image(network, sample.image, decoding, calibration=calibrated)
        _write_prediction(folder / "predictions", dataset.ids[index], prediction)
        row = {"name": dataset.ids[index], "true_count": len(sample.points),
               "count": prediction.count, "mean_iou": None}
        if calibrated:
            row |= {"uncalibrated": int((prediction.scores > usual).sum()),
                    "low": prediction.low, "high": prediction.high}
        near = [metrics.localization(prediction.heads, sample.points, sigma)
                for sigma in LOCALISATION_SIGMAS]
        row["matched"] = {str(s): n["matched"] for s, n in zip(LOCALISATION_SIGMAS, near)}
        if sample.instances is not None:
            segmentations.append(metrics.segmentation(prediction.instances, sample.instances))
            if len(sample.points):
                row["mean_iou"] = float(segmentations[-1]["mean_iou"])
        rows.append(row)
        predicted.append(prediction.heads)
        located.append(near)
        truths.append(sample.instances)

    counts = np.array([r["count"] for r in rows]), np.array([r["true_count"] for r in rows])
    segmentation, discs = None, dict.fromkeys(("fixed_disc", "exclusive_disc"))
    if segmentations:
        total = metrics.segmentation_total(segmentations)
        segmentation = {name: float(total[name]) for name in ("mean_iou", "ap50", "pq", "aji")}
        discs = {name: best_fixed_disc(predicted, truths, exclusive=name == "exclusive_disc",
                                       progress=progress) for name in discs}
    return {
        "run": config.run, **identity(config, dataset.synthetic), "images": len(rows),
        "counting": metrics.counting(*counts),
        "counting_uncalibrated": metrics.counting(
            [r["uncalibrated"] for r in rows], counts[1]) if calibrated else None,
        "interval": None if calibrated is None or calibrated.factor is None else _coverage(
            rows, calibrated),
        "localization": {str(s): metrics.localization_total(near)
                         for s, near in zip(LOCALISATION_SIGMAS, zip(*located))},
        "segmentation": segmentation,
        "baselines": {"constant_count": best_constant_count(counts[1]), **discs},
        "per_image": rows,
    }


def _coverage(rows: list[dict], calibrated: Calibration) -> dict[str, float]:
    """How many true counts lie in the intervals, how many should, and how wide these are."""
    inside = [r["low"] <= r["true_count"] <= r["high"] for r in rows]
    width = [r["high"] - r["low"] for r in rows]
    return {"coverage": float(np.mean(inside)), "wanted": calibrated.coverage,
            "mean_width": float(np.mean(width)), "median_width": float(np.median(width))}


def identity(config: Config, synthetic: bool) -> dict[str, object]:
    """Which run this is, as config.json and metrics.json say it."""
    return {"profile": config.profile, "dataset": config.dataset, "percent": config.percent,
            "seed": config.seed, "variant": config.variant, "synthetic": synthetic,
            "selection": config.selection}


def best_constant_count(true: np.ndarray) -> dict[str, float]:
    """One count for every image, chosen with the test set in view; true: (n,) counts.

    `value` is their median, the constant of lowest mae; `mae` and `rmse` are its errors. `mean`
    is the constant of lowest rmse, and `mean_rmse` its error.
    """
    value, mean = float(np.median(true)), float(np.mean(true))
    errors = metrics.counting(np.full(len(true), value), true)
    return {"value": value, "mae": errors["mae"], "rmse": errors["rmse"], "mean": mean,
            "mean_rmse": float(np.std(true))}


def best_fixed_disc(points: list[np.ndarray], truths: list[np.ndarray], *, exclusive: bool,
                    progress: bool = False) -> dict[str, float]:
    """Discs of one radius at the given points: the radius (px) whose mean IoU over the whole set
    is best, from 2 to 34 px in steps of 50%, then of 11%.

    points: (N, 2) (x, y) px for every image; truths: their true label maps (H, W).
    exclusive: False draws equal, whole discs, which may overlap; True gives each contested pixel
    to the nearest point, so that neighbours cut each other down to size.
    """
    values: dict[float, float] = {}
    people = sum(np.count_nonzero(np.bincount(truth.ravel())[1:]) for truth in truths)

    def search(radii: np.ndarray) -> float:
        for radius in tqdm(radii, desc="fixed discs", disable=not progress, leave=False):
            iou = sum(_disc_iou(dots, radius, truth, exclusive)
                      for dots, truth in zip(points, truths))
            values[float(radius)] = iou / max(people, 1)
        return max(values, key=values.get)

    best = search(2 * 1.5 ** np.arange(8))
    best = search(best * 1.5 ** np.array([-0.5, -0.25, 0.25, 0.5]))
    return {"radius": round(best, 2), "mean_iou": float(values[best])}


def _disc_iou(points: np.ndarray, radius: float, truth: np.ndarray, exclusive: bool) -> float:
    """Sum of IoUs of the best one-to-one matching of discs to true instances."""
    discs = nnec.circles(points, np.full(len(points), radius), truth.shape, split=False)
    if exclusive:
        return metrics.segmentation(discs.lowest_wins(discs.squared), truth)["iou_sum"]
    return metrics.overlapping_iou_sum(discs, truth)


def _write_prediction(folder: Path, name: str, prediction: decode.Prediction) -> None:
    files.write_png(folder / f"{name}.png", prediction.instances.astype(np.uint16))
    table = pd.DataFrame(prediction.points, columns=["x", "y"]).assign(
        score=prediction.scores, counted=prediction.counted.astype(int))
    files.write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
