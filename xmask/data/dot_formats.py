"""The dots of own photos, as annotation tools write them: COCO, LabelMe, VIA, Label Studio, MATLAB.

What a file is shows in its content. Every point is a head, and of every box, circle and ellipse
the centre; labels do not matter, so a file holds heads only. Places are taken as they stand in
the file, in pixels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from reprlib import repr as short
from typing import Any
from urllib.parse import unquote

import numpy as np

from xmask.data.annotations import (
    load_mat,
    read_content,
    read_csv_text,
    read_dots,
    read_qnrf,
    read_shanghaitech,
)
from xmask.data.coco_dots import read_coco
from xmask.data.images import SUFFIXES
from xmask.data.json_values import Listed, as_points, field, file_name, has, numbers

DOT_SUFFIXES = (".csv", ".json", ".mat")
_PLACELESS = {"choices", "datetime", "labels", "number", "rating", "relation", "taxonomy",
              "textarea"}  # results of Label Studio that mark no place


def read_dot_file(path: str | os.PathLike) -> np.ndarray | Listed:
    """Read dots from a file: those of one photo, or those of all photos that the file lists.

    One photo: a CSV with columns x and y; the JSON of LabelMe; a .mat as ShanghaiTech's or
    UCF-QNRF's. Returns (N, 2) float64, `(x, y)` in pixels as annotated.
    Many photos: the JSON of COCO or Label Studio; a project, the JSON or the CSV of VIA 2.
    Returns a list of (file name without folders, (N, 2) float64); (0, 2) for an image that is
    listed without a head. Left out, as their heads are not known: of COCO, images with a region
    of a crowd or with a person whose head has no labelled keypoint; of Label Studio, tasks
    without a finished annotation.
    Raises FileNotFoundError, or ValueError naming the file, what was found, and what is wrong.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".mat":
        fields = [name for name in load_mat(path) if not name.startswith("__")]
        if "image_info" in fields:
            return read_shanghaitech(path)[0]
        if "annPoints" in fields:
            return read_qnrf(path)[0]
        raise ValueError(f"{path}: the fields {', '.join(fields)[:80] or '(none)'}; expected "
                         "image_info (as ShanghaiTech) or annPoints (as UCF-QNRF)")
    if b"region_shape_attributes" in read_content(path).partition(b"\n")[0]:
        return _via_csv(path)
    return read_dots(path)


def _read_json(path: str | os.PathLike) -> np.ndarray | Listed:
    content = read_content(path)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(f"{path}: not valid JSON ({str(error)[:100]}). Export it again") from None
    if isinstance(value, dict):
        if "shapes" in value:
            return _labelme(value, path)
        if "images" in value and "annotations" in value:
            return read_coco(value, path)
        if "_via_img_metadata" in value:
            return _via(field(value, "_via_img_metadata", dict, path), path)
        if value and all(isinstance(one, dict) and "filename" in one and "regions" in one
                         for one in value.values()):
            return _via(value, path)
        found = f"an object with the keys {', '.join(map(short, [*value][:8])) or '(none)'}"
    elif isinstance(value, list) and value and all(
            isinstance(one, dict) and "data" in one and "annotations" in one for one in value):
        return _label_studio(value, path)
    elif isinstance(value, list):
        found = f"a list of {len(value)}" + (f", the first one {short(value[0])}" if value else "")
    else:
        found = short(value)
    raise ValueError(
        f"{path}: {found}; expected COCO (images, annotations), LabelMe (shapes), VIA 2 "
        "(_via_img_metadata, or filename and regions of every image) or Label Studio (a list of "
        "tasks with data and annotations). Move other files elsewhere")


def _labelme(value: dict, path: str | os.PathLike) -> np.ndarray:
    places = []
    for number, one in enumerate(field(value, "shapes", list, path), start=1):
        where = f"{path}: shape {number}"
        kind = field(one, "shape_type", str, where)
        points = np.array([numbers(p, 2, where) for p in field(one, "points", list, where)])
        if len(points) == 0 or kind not in ("point", "circle", "rectangle"):
            raise ValueError(f"{where} is a {short(kind)} of {len(points)} points; expected point, "
                             "circle or rectangle. Mark heads so, and remove it")
        # a circle is its centre and a point of its border, a rectangle two or four corners
        places.append((points.min(axis=0) + points.max(axis=0)) / 2 if kind == "rectangle"
                      else points[0])
    return as_points(places, path)


def _via(images: dict, path: str | os.PathLike) -> Listed:
    listed = []
    for key, one in images.items():
        where = f"{path}: image {short(key)}"
        regions = field(one, "regions", (list, dict), where)
        places = [_via_place(field(region, "shape_attributes", dict, f"{where}, region {number}"),
                             f"{where}, region {number}")
                  for number, region in enumerate(
                      regions if isinstance(regions, list) else regions.values(), start=1)]
        listed.append((file_name(field(one, "filename", str, where)), as_points(places, where)))
    return listed


def _via_csv(path: str | os.PathLike) -> Listed:
    text = read_csv_text(path, "expected a CSV of VIA 2")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    images: dict[str, list] = {}
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            name, shape = row.get("filename"), row.get("region_shape_attributes")
            if not name or shape is None:
                raise ValueError(f"{where} lacks filename or region_shape_attributes; export it "
                                 "again")
            try:
                shape = json.loads(shape)
            except (ValueError, RecursionError):
                raise ValueError(f"{where}: {short(shape)} is no shape; export it again") from None
            places = images.setdefault(name, [])
            if shape != {}:  # so are images without regions
                places.append(_via_place(shape, where))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; export it again") from None
    return [(file_name(name), as_points(places, f"{path}: {short(name)}"))
            for name, places in images.items()]


def _via_place(shape: Any, where: str) -> list[float]:
    kind = field(shape, "name", str, where)
    if kind in ("point", "circle", "ellipse"):
        return numbers([shape.get("cx"), shape.get("cy")], 2, where)
    if kind == "rect":
        x, y, width, height = numbers(
            [shape.get(name) for name in ("x", "y", "width", "height")], 4, where)
        return [x + width / 2, y + height / 2]
    raise ValueError(f"{where} is a {short(kind)}; expected point, circle, ellipse or rect. Mark "
                     "heads so, and remove it")


def _label_studio(tasks: list[dict], path: str | os.PathLike) -> Listed:
    listed = []
    for number, task in enumerate(tasks, start=1):
        where = f"{path}: task {short(task.get('id', number))}"
        done = [one for one in field(task, "annotations", list, where)
                if not has(one, "was_cancelled")]
        done = [one for one in done if has(one, "ground_truth")] or done
        if len(done) > 1:
            raise ValueError(f"{where} has {len(done)} annotations; keep one, or make one of them "
                             "the ground truth")
        for one in done:
            places = [_label_studio_place(result, where)
                      for result in field(one, "result", list, where)
                      if field(result, "type", str, where) not in _PLACELESS]
            listed.append((_label_studio_name(task, where), as_points(places, where)))
    return listed


def _label_studio_name(task: dict, where: str) -> str:
    """The file of a task; it is uploaded, local (`?d=`), or has an address."""
    data = field(task, "data", dict, where)
    for text in (data.get("image"), *data.values()):
        if isinstance(text, str):
            name = file_name(unquote(text.split("?d=")[-1].split("?")[0]))
            if name.lower().endswith(SUFFIXES):
                return name
    raise ValueError(f"{where}: data names no image file, found {short(data)}")


def _label_studio_place(result: dict, where: str) -> list[float]:
    """Places are in percent of the image; a box turns around its first corner, by degrees."""
    kind, value = result["type"], field(result, "value", dict, where)
    size = np.array(numbers([result.get("original_width"), result.get("original_height")], 2,
                             f"{where}: original_width, original_height"))
    corner = np.array(numbers([value.get("x"), value.get("y")], 2, where)) * size / 100
    if kind in ("keypoint", "keypointlabels", "ellipse", "ellipselabels"):
        return corner.tolist()
    if kind not in ("rectangle", "rectanglelabels"):
        raise ValueError(f"{where}: a result is of type {short(kind)}; expected keypointlabels, "
                         "rectanglelabels or ellipselabels. Mark heads so, and remove it")
    x, y = np.array(numbers([value.get("width"), value.get("height")], 2, where)) * size / 200
    turn = math.radians(numbers([value.get("rotation") or 0], 1, where)[0])
    return (corner + [x * math.cos(turn) - y * math.sin(turn),
                      x * math.sin(turn) + y * math.cos(turn)]).tolist()
