"""The numbers of docs/model_card.md, made from the run folder of the model for photographs.

`xmask docs` writes them; a test fails where they are not what it would write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xmask import files, metrics
from xmask.study.tables import markdown_table

CARD = Path("docs") / "model_card.md"
RUN = Path("results") / "photo" / "runs" / "sha-100-s2024"
BEGIN = "<!-- numbers: written by `xmask docs`, not by hand -->"
END = "<!-- end of numbers -->"
_HEADS = ["test images", "images", "people", "MAE", "MAE, not calibrated", "RMSE", "bias",
          "best constant's MAE", *(f"{name} % at {s} px" for s in (4, 8)
                                  for name in ("precision", "recall", "F1")),
          "in the interval %", "its median width"]


def card_block(root: Path) -> str:
    """The numbers of the model card, markers included. root: of the repository."""
    run = files.read_json(root / RUN / "config.json")
    found = files.read_json(root / RUN / "metrics.json")
    rows = sorted(found["per_image"], key=lambda row: row["true_count"])
    thirds = [rows[len(rows) * k // 3:len(rows) * (k + 1) // 3] for k in range(3)]
    names = ("all", "sparsest third", "middle third", "densest third")
    table = [_HEADS, *(_row(name, part) for name, part in zip(names, [rows, *thirds]))]
    c = run["calibration"]
    return "\n".join([
        BEGIN, *markdown_table(table), "",
        f"Trained on {len(run['data']['labelled'])} labelled images of ShanghaiTech A; "
        f"{len(run['data']['held_out'])} more set the threshold, {c['threshold']:.3f} instead of "
        f"{run['config']['evaluation']['count_threshold']}, and the interval of "
        f"{c['coverage']:.0%} (on them, the MAE is {c['mae_before']:.1f} without and "
        f"{c['mae']:.1f} with a threshold from the others). Run `{RUN.as_posix()}`, code "
        f"`{run['code']['digest'][:12]}`.", END])


def _row(name: str, images: list[dict]) -> list[str]:
    true, count, before = (np.array([r[key] for r in images])
                           for key in ("true_count", "count", "uncalibrated"))
    errors = metrics.counting(count, true)
    cells = [name, str(len(images)), f"{true.min()} to {true.max()}", f"{errors['mae']:.1f}",
             f"{np.abs(before - true).mean():.1f}", f"{errors['rmse']:.1f}",
             f"{(count - true).mean():+.1f}", f"{np.abs(true - np.median(true)).mean():.1f}"]
    for sigma in ("4", "8"):
        found = metrics.localization_total({"matched": r["matched"][sigma], "n_pred": r["count"],
                                            "n_true": r["true_count"]} for r in images)
        cells += [f"{100 * found[name]:.1f}" for name in ("precision", "recall", "f1")]
    inside = [r["low"] <= r["true_count"] <= r["high"] for r in images]
    width = np.median([r["high"] - r["low"] for r in images])
    return [*cells, f"{100 * np.mean(inside):.0f}", f"{width:.0f}"]
