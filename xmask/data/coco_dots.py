"""The dots of a COCO file: one head for each annotation.

An annotation with one keypoint is a head there. One with several is a person: the head is the
mean of its labelled keypoints that are named head, nose, eye or ear (the five on the face of
COCO's persons; a name such as left_ear counts). One without keypoints is the box of a head, and
the dot is its centre; a box of a whole body would put the dot on the belly.
"""

from __future__ import annotations

import logging
import os
import re
from reprlib import repr as short

import numpy as np

from xmask.data.json_values import Listed, as_points, field, file_name, has, numbers

_HEAD = re.compile(r"head|nose|eye|ear(?![a-z])", re.IGNORECASE)  # and no forearm
_log = logging.getLogger("xmask")


def read_coco(value: dict, path: str | os.PathLike) -> Listed:
    """The images that a COCO document lists, and the head of each of their annotations.

    value: the document. path: its file, for messages.
    Returns (file name without folders, points (N, 2) float64, `(x, y)` in pixels as annotated).
    An image has no dots, and is left out with a warning, if the head of one of its persons is not
    labelled, or if a region of it is marked as a crowd (`iscrowd`).
    Raises ValueError, naming the file and the entry, for what is no COCO, for keypoints of which
    none is known to be of a head, and for annotations of several categories.
    """
    names: dict[int | str, str] = {}
    for number, one in enumerate(field(value, "images", list, path), start=1):
        where = f"{path}: image {number}"
        name, key = field(one, "file_name", str, where), field(one, "id", (int, str), where)
        if key in names:
            raise ValueError(f"{where}: has the id {short(key)} of {short(names[key])}, too; "
                             "export it again")
        names[key] = name
    categories = field(value, "categories", list, path) if has(value, "categories") else []
    heads = {}  # category -> its keypoints of a head, by their positions
    for number, one in enumerate(categories, start=1):
        where = f"{path}: category {number}"
        parts = field(one, "keypoints", list, where) if has(one, "keypoints") else []
        heads[field(one, "id", (int, str), where)] = [
            k for k, part in enumerate(parts) if isinstance(part, str) and _HEAD.search(part)]
    places: dict[int | str, list] = {key: [] for key in names}
    unknown, used = set(), set()
    for number, one in enumerate(field(value, "annotations", list, path), start=1):
        where = f"{path}: annotation {number}"
        image = field(one, "image_id", (int, str), where)
        if image not in names:
            raise ValueError(f"{where}: image_id {short(image)}, and no image has this id")
        category = field(one, "category_id", (int, str), where) if "category_id" in one else None
        used.add(category)
        place = None if one.get("iscrowd") else _place(one, heads.get(category, []), where)
        if place is None:
            unknown.add(image)
        else:
            places[image].append(place)
    if len(used) > 1:
        raise ValueError(f"{path}: annotations of the categories "
                         f"{', '.join(sorted(map(short, used))[:5])}, and all would be heads. "
                         "Export those of heads only")
    if unknown:
        _log.warning("%s: %d of %d images have persons without a labelled head, or regions of a "
                     "crowd, and count as photos without dots", path, len(unknown), len(names))
    return [(file_name(name), as_points(places[key], f"{path}: {short(name)}"))
            for key, name in names.items() if key not in unknown]


def _place(one: dict, heads: list[int], where: str) -> list[float] | None:
    """(x, y) of an annotation; None for a person whose head is not labelled."""
    if not one.get("keypoints"):
        x, y, width, height = numbers(field(one, "bbox", list, where), 4, where)
        return [x + width / 2, y + height / 2]
    flat = field(one, "keypoints", list, where)
    points = np.reshape(numbers(flat, 3 * max(1, len(flat) // 3), where), (-1, 3))
    if len(points) == 1:
        heads = [0]
    heads = [k for k in heads if k < len(points)]
    if not heads:
        raise ValueError(f"{where}: {len(points)} keypoints, and its category names none of them "
                         "head, nose, eye or ear. Name them, or export one keypoint per head")
    points = points[heads]
    points = points[points[:, 2] > 0]
    return points[:, :2].mean(axis=0).tolist() if len(points) else None
