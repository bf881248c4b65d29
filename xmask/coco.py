"""Label maps as COCO annotations: one run-length encoded mask a person.

Masks are encoded from the runs of each label, so the cost is that of the map, not of N masks of
its size; `pycocotools` reads them back identically.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

PERSON = {"id": 1, "name": "person", "supercategory": "person"}


def annotations(
    label_map: np.ndarray,
    points: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    *,
    image_id: int = 1,
    first_id: int = 1,
) -> list[dict[str, Any]]:
    """One COCO annotation for every label that has pixels, in the order of the labels.

    label_map: (H, W) integers, 0 background, k the person of points[k - 1]. points: (N, 2)
    (x, y) pixels; scores: (N,). first_id: `id` of the first annotation; the next ones count up.
    Each has the usual fields (`segmentation` a compressed RLE, `area` in pixels, `bbox` as x, y,
    width, height), and besides `label`, k, and where given `point` and `score`.
    Raises ValueError if points or scores are fewer than the labels.
    """
    label_map = np.asarray(label_map)
    height, width = label_map.shape
    # column by column, as COCO counts; a stable sort keeps each label's pixels in that order
    flat = label_map.ravel(order="F")
    pixel = np.flatnonzero(flat)
    owner = flat[pixel]
    order = np.argsort(owner, kind="stable")
    pixel, owner = pixel[order], owner[order]
    labels, begin = np.unique(owner, return_index=True)
    for name, values in (("points", points), ("scores", scores)):
        if values is not None and len(labels) and len(values) < labels[-1]:
            raise ValueError(f"{name}: {len(values)} for a label map that goes to {labels[-1]}; "
                             "give one for every label")
    made = []
    for number, (label, mine) in enumerate(zip(labels, np.split(pixel, begin[1:]))):
        counts = {"size": [height, width], "counts": _runs(mine, height * width)}
        encoded = rle.frPyObjects(counts, height, width)
        one = {
            "id": first_id + number,
            "image_id": image_id,
            "category_id": PERSON["id"],
            "segmentation": {"size": [height, width], "counts": encoded["counts"].decode()},
            "area": len(mine),
            "bbox": _box(mine, height),
            "iscrowd": 0,
            "label": int(label),
        }
        if points is not None:
            one["point"] = [float(value) for value in points[label - 1]]
        if scores is not None:
            one["score"] = round(float(scores[label - 1]), 6)
        made.append(one)
    return made


def document(images: Sequence[dict[str, Any]], found: Iterable[dict[str, Any]],
             info: dict[str, Any]) -> dict[str, Any]:
    """The COCO file: images (`id`, `file_name`, `width`, `height`, ...), annotations, category."""
    return {"info": info, "images": list(images), "annotations": list(found),
            "categories": [PERSON]}


def label_map(found: Iterable[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32, the inverse of `annotations` for the annotations of one image.

    Raises ValueError for a mask of another size. Of overlapping masks the later one stands.
    """
    made = np.zeros(shape, np.int32)
    for one in found:
        if list(one["segmentation"]["size"]) != list(shape):
            raise ValueError(f"annotation {one['id']}: its mask is {one['segmentation']['size']} "
                             f"(height, width), the image {list(shape)}")
        x, y, width, height = (int(value) for value in one["bbox"])
        inside = rle.decode(one["segmentation"])[y:y + height, x:x + width] > 0
        made[y:y + height, x:x + width][inside] = one["label"]
    return made


def _runs(pixel: np.ndarray, total: int) -> list[int]:
    """Lengths of alternating runs of 0 and 1, zeros first; pixel: sorted indices of the ones."""
    gap = np.flatnonzero(np.diff(pixel) > 1)
    first = pixel[np.concatenate([[0], gap + 1])]
    last = pixel[np.concatenate([gap, [len(pixel) - 1]])] + 1
    edges = np.stack([first, last], axis=1).ravel()
    runs = np.diff(np.concatenate([[0], edges, [total]]))
    return [int(length) for length in (runs if runs[-1] else runs[:-1])]


def _box(pixel: np.ndarray, height: int) -> list[float]:
    x, y = np.divmod(pixel, height)
    return [float(x.min()), float(y.min()), float(x.max() - x.min() + 1),
            float(y.max() - y.min() + 1)]
