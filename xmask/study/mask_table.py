"""One row per masked image: where the masks of its heads came from, and what they are worth."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from xmask import edp_sam, metrics
from xmask.data.masks import read_masks


def mask_table(dataset, indices: list[int], folder: Path) -> pd.DataFrame:
    """A table of images masked by `mask_dataset` into `folder`.

    Columns: image; heads; median_radius (px); score (mean of the heads'); point, superpixel,
    merged, disc (shares of heads whose mask came from there); mean_iou with the truth, None
    where the dataset has no masks.
    """
    rows = []
    for index in indices:
        name, sample = dataset.ids[index], dataset[index]
        heads = pd.read_csv(folder / f"{name}.csv")
        # "sam-point" and "classical-point" share a column
        shares = heads["source"].str.split("-").str[-1].value_counts(normalize=True)
        row = {"image": name, "heads": len(heads), "median_radius": heads["radius"].median(),
               "score": heads["score"].mean()}
        row |= {source: shares.get(source, 0.0) for source in edp_sam.SOURCES}
        row["mean_iou"] = None
        if sample.instances is not None and len(heads):
            masks = read_masks(folder, name)
            row["mean_iou"] = metrics.segmentation(masks, sample.instances)["mean_iou"]
        rows.append(row)
    return pd.DataFrame(rows)
