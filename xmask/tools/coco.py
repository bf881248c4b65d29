"""Masks as COCO JSON with run-length encoding, the format that annotation tools read.

Not part of the paper. One pass over the label map finds the runs of all heads, so the cost does
not grow with their number, and no mask is ever spread out over the image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from xmask import files


def check_folder(folder: files.OutputFolder, mark: str, what: str) -> None:
    """Raises ValueError where another command has written `mark`: coco.json is one command's."""
    if folder.is_listed(folder.path / mark) and (folder.path / mark).is_file():
        raise ValueError(f"{folder.path}: holds {what}, whose coco.json would be lost. Give "
                         "another folder (--out), or --overwrite to replace it")


def encode(labels: np.ndarray) -> dict[int, dict[str, Any]]:
    """RLE of every instance of a label map: {k: {"size": [H, W], "counts": str}}.

    labels: (H, W) int, 0 background. The string is pycocotools' compressed form; its decode
    gives exactly labels == k.
    """
    height, width = labels.shape
    columns = np.asarray(labels).ravel(order="F")  # COCO's runs go down the columns
    start = np.flatnonzero(np.r_[True, columns[1:] != columns[:-1]])
    stop = np.r_[start[1:], len(columns)]
    value = columns[start]
    order = np.argsort(value, kind="stable")
    order = order[value[order] > 0]
    found, first = np.unique(value[order], return_index=True)
    result = {}
    for k, runs in zip(found.tolist(), np.split(order, first[1:])):
        # Zeros and ones in turn: the gap before each run, then the run.
        gaps = start[runs] - np.r_[0, stop[runs[:-1]]]
        counts = np.stack([gaps, stop[runs] - start[runs]], axis=1).ravel().tolist()
        rest = len(columns) - int(stop[runs[-1]])
        rle = coco_mask.frPyObjects(
            {"size": [height, width], "counts": counts + [rest] * (rest > 0)}, height, width)
        result[k] = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return result


def annotations(labels: np.ndarray, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One COCO annotation per head that has pixels, without its ids (see `write_document`).

    labels: (H, W) int, 0 background, k head k. table: a row a head, as EDP-SAM's.
    Besides COCO's own fields: head (k), point (x, y), score (the confidence) and source
    ("sam-point", "sam-superpixel", "merged", "disc"), as in the table.
    """
    runs = encode(labels)
    for row in table.itertuples():
        if row.head not in runs:
            continue
        segmentation = runs[row.head]
        yield {
            "category_id": 1, "iscrowd": 0, "segmentation": segmentation,
            "area": int(coco_mask.area(segmentation)),
            "bbox": [float(v) for v in coco_mask.toBbox(segmentation)],
            "head": int(row.head), "point": [float(row.x), float(row.y)],
            "score": float(row.score), "source": str(row.source)}


def write_document(path: str | os.PathLike, info: dict[str, Any],
                   entries: Iterable[tuple[dict[str, Any], Iterable[dict[str, Any]]]]) -> Path:
    """Write a COCO file image by image: it never lies in memory whole.

    entries: per image its fields and its annotations, both without ids; ids count from 1 in the
    order given.
    """
    images, number = [], 0
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        out.write(f'{{"info": {json.dumps(info)},\n'
                  '"categories": [{"id": 1, "name": "head", "supercategory": "person"}],\n'
                  '"annotations": [')
        for image, found in entries:
            images.append({"id": len(images) + 1, **image})
            for one in found:
                number += 1
                one = {"id": number, "image_id": len(images), **one}
                out.write(("\n" if number == 1 else ",\n") + json.dumps(one))
        out.write('],\n"images": ' + json.dumps(images) + "}\n")
    return Path(path)


def write(folder: str | os.PathLike, names: dict[str, str], path: str | os.PathLike) -> Path:
    """All complete images of a folder of masks as one COCO file.

    names: image id -> file name. Ids of images count from 1 in that order.
    """
    from xmask.data.masks import read_masks

    def entries() -> Iterator[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
        for name, file_name in names.items():
            try:
                labels = read_masks(folder, name)
            except FileNotFoundError:  # they are not complete
                continue
            table = pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False)
            yield ({"file_name": file_name, "height": labels.shape[0],
                    "width": labels.shape[1]}, annotations(labels, table))

    return write_document(
        path, {"description": "EDP-SAM masks of heads, made by XMask"}, entries())
