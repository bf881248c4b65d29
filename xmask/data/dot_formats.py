"""The dots of own photos, as annotation tools write them: COCO, CVAT, LabelMe, VIA, Label Studio,
Pascal VOC, MATLAB.

What a file is shows in its content. Every point is a head, and of every box, circle and ellipse
the centre; labels do not matter, so a file holds heads only (a warning tells of several labels).
Places are taken as they stand in the file, in pixels.

In COCO, an annotation with one keypoint is a head there. One with several is a person: the head is
the mean of its labelled keypoints that are named head, nose, eye or ear (the five on the face of
COCO's persons; a name such as left_ear counts). One without keypoints is the box of a head; a box
of a whole body would put the dot on the belly.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np

from xmask.data.annotations import check_number, read_content, read_either
from xmask.data.images import SUFFIXES

DOT_SUFFIXES = (".csv", ".json", ".mat", ".xml")
_PLACELESS = {"choices", "datetime", "labels", "number", "rating", "relation", "taxonomy",
              "text", "textarea"}  # results of Label Studio that mark no place of their own
_FAR = 1e6  # px: no image is so large
_KINDS = {list: "a list", dict: "an object", str: "a text", int: "a number"}
_HEAD = re.compile(r"head|nose|eye|ear(?![a-z])", re.IGNORECASE)  # and no forearm
_log = logging.getLogger("xmask")


class Dots(NamedTuple):
    """The dots of one image.

    points: (N, 2) float64, `(x, y)` in pixels as annotated; (0, 2) for an image without a head.
    name: the image's file name without folders; None if a file holds the dots of one photo.
    size: (width, height) of the image they were put on, None if the file does not say it.
    labels: what the tool calls the shapes. file: where they were read, for messages.
    """

    points: np.ndarray
    name: str | None = None
    size: tuple[float, float] | None = None
    labels: frozenset[str] = frozenset()
    file: str = "the dots"


def read_dot_file(path: str | os.PathLike) -> list[Dots]:
    """Read dots from a file: those of one photo, or those of all photos that the file lists.

    One photo: a CSV with columns x and y; the JSON of LabelMe or NWPU-Crowd; the XML of Pascal VOC;
    a .mat as ShanghaiTech's or UCF-QNRF's (NWPU-Crowd's is one). Many photos: the JSON of COCO; the
    XML of CVAT for images; JSON or JSON-MIN of Label Studio; a project, the JSON or the CSV of VIA.
    Left out, as their heads are not known: of COCO, images with a region of a crowd or with a
    person whose head has no labelled keypoint; of Label Studio, tasks without a finished
    annotation.
    Raises FileNotFoundError, or ValueError naming the file, what was found, and what is wrong.
    """
    found = _read(path)
    found = [Dots(found)] if isinstance(found, np.ndarray) else found
    return [one._replace(file=os.fspath(path)) for one in found]


def _read(path: str | os.PathLike) -> np.ndarray | list[Dots]:
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".xml":
        return _read_xml(path)
    if suffix == ".mat":
        return read_either(path)
    if b"region_shape_attributes" in read_content(path).partition(b"\n")[0]:
        return _via_csv(path)
    return read_dots(path)


# columns by which tables of several photos tell them apart
_OF_IMAGES = ("image", "image_id", "image_name", "file", "file_name", "filename", "photo")


def read_dots(path: str | os.PathLike) -> np.ndarray:
    """Read the dots of an own photo: a CSV in UTF-8 with columns x and y in pixels, a line a head.

    Semicolons or tabs may split it; it may have decimal commas then. Further columns are left out.
    Refused are one of several images, as their dots would all become those of one photo, and one
    with width and height, beside which x and y are often the corner of a box.
    Returns (N, 2) float64, (0, 2) for a table without lines.
    Raises FileNotFoundError, or ValueError naming file and line.
    """
    expected = "expected a table with columns x and y: a line 'x,y' first, then one line a head"
    text = _csv_text(path, expected)
    check_number(text.count("\n") - 1, path)
    first = text.lstrip().partition("\n")[0]
    split = next((one for one in ";\t" if one in first and "," not in first), ",")
    reader, points = csv.reader(io.StringIO(text, newline=""), delimiter=split), []
    header = None
    named: set[tuple[int, str]] = set()  # the images of the lines, by column
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [field.strip().lower() for field in fields]
                if header.count("x") != 1 or header.count("y") != 1:
                    raise ValueError(f"{path}: {expected}; the first line is "
                                     f"{', '.join(fields)[:60]!r}")
                for box in (("width", "height"), ("w", "h")):
                    if {*box} <= {*header} and "bx" not in header:  # ImageJ's corner of a box
                        raise ValueError(
                            f"{path}: has columns {box[0]} and {box[1]}, so that x and y may be "
                            "the corner of a box. Give x and y of its centre, without these two")
                at = header.index("x"), header.index("y")
                continue
            where = f"{path}: line {reader.line_num}"
            if len(fields) > len(header):
                raise ValueError(f"{where} has more fields than the header ({', '.join(header)}); "
                                 f"{expected}. Name every column, or remove what is too much")
            named.update((k, one.strip()) for k, one in enumerate(fields)
                         if header[k] in _OF_IMAGES or one.strip().lower().endswith(SUFFIXES))
            if len(named) > len({k for k, _ in named}):
                raise ValueError(f"{where} is of another image than the lines before it; a CSV "
                                 "holds the dots of one photo, a.csv those of a.jpg. Split it, or "
                                 "give the dots of many photos as COCO, CVAT, VIA or Label Studio")
            found = [fields[k].strip() if k < len(fields) else "" for k in at]
            if "" in found:
                raise ValueError(f"{where} lacks x or y; complete or delete it")
            try:
                points.append([float(value if split == "," else value.replace(",", "."))
                               for value in found])
            except ValueError:
                points.append([np.nan, np.nan])
            if not np.isfinite(points[-1]).all():
                raise ValueError(f"{where} is {','.join(fields)[:60]!r}, not a place in an image. "
                                 "Correct or remove it")
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; {expected}") from None
    if header is None:
        raise ValueError(f"{path}: {expected}; the file is empty. For a photo without heads write "
                         "the line 'x,y' alone")
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _csv_text(path: str | os.PathLike, expected: str) -> str:
    """The text of a CSV in UTF-8; ValueError, naming the file and what was `expected`, if it is
    none; errors as in `read_content`."""
    content = read_content(path)
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except ValueError as error:
        raise ValueError(f"{path}: {expected}; it is no text in UTF-8 ({str(error)[:80]}). Save "
                         "it as CSV in UTF-8") from None
    return text


def _read_json(path: str | os.PathLike) -> list[Dots]:
    content = read_content(path)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(f"{path}: not valid JSON ({str(error)[:100]}). Export it again") from None
    if isinstance(value, dict):
        if "shapes" in value:
            return _labelme(value, path)
        if "human_num" in value:  # NWPU-Crowd
            return [Dots(_as_points([_numbers(one, 2, f"{path}: point {number}") for number, one in
                                     enumerate(_field(value, "points", list, path), 1)], path))]
        if "images" in value and "annotations" in value:
            return _coco(value, path)
        if "_via_img_metadata" in value:
            return _via(_field(value, "_via_img_metadata", dict, path), path)
        if value and all(isinstance(one, dict) and "filename" in one and "regions" in one
                         for one in value.values()):
            return _via(value, path)
        found = f"an object with the keys {', '.join(map(short, [*value][:8])) or '(none)'}"
    elif isinstance(value, list) and value and all(
            isinstance(one, dict) and "data" in one and "annotations" in one for one in value):
        return _label_studio(value, path)
    elif isinstance(value, list) and value and all(
            isinstance(one, dict) and "annotation_id" in one for one in value):
        return _label_studio([_label_studio_task(one) for one in value], path)
    elif isinstance(value, list):
        found = f"a list of {len(value)}" + (f", the first one {short(value[0])}" if value else "")
    else:
        found = short(value)
    raise ValueError(
        f"{path}: {found}; expected COCO (images, annotations), LabelMe (shapes), VIA 2 "
        "(_via_img_metadata, or filename and regions of every image) or Label Studio (a list of "
        "tasks with data and annotations). Move other files elsewhere")


def _labelme(value: dict, path: str | os.PathLike) -> list[Dots]:
    places = []
    for number, one in enumerate(_field(value, "shapes", list, path), start=1):
        where = f"{path}: shape {number}"
        kind = _field(one, "shape_type", str, where)
        points = np.array([_numbers(p, 2, where) for p in _field(one, "points", list, where)])
        box = kind in ("rectangle", "oriented_rectangle")
        if len(points) == 0 or not (box or kind in ("point", "circle")):
            raise ValueError(f"{where} is a {short(kind)} of {len(points)} points; expected point, "
                             "circle or rectangle. Mark heads so, and remove it")
        # a circle is its centre and a point of its border, a rectangle two or four corners
        places.append((points.min(axis=0) + points.max(axis=0)) / 2 if box else points[0])
    return [Dots(_as_points(places, path), None, _size(value, "imageWidth", "imageHeight"),
                 frozenset(str(one.get("label")) for one in value["shapes"]))]


def _coco(value: dict, path: str | os.PathLike) -> list[Dots]:
    """An image has no dots, and is left out with a warning, if the head of one of its persons is
    not labelled, or if a region of it is marked as a crowd (`iscrowd`)."""
    names: dict[str, str] = {}
    sizes = {}
    for number, one in enumerate(_field(value, "images", list, path), start=1):
        where = f"{path}: image {number}"
        name = _field(one, "file_name", str, where)
        key = str(_field(one, "id", (int, str), where))  # of VIA a number here, a text below
        if key in names:
            raise ValueError(f"{where}: has the id {short(key)} of {short(names[key])}, too; "
                             "export it again")
        names[key], sizes[key] = name, _size(one, "width", "height")
    categories = _field(value, "categories", list, path) if _has(value, "categories") else []
    heads = {}  # category -> its keypoints of a head, by their positions
    for number, one in enumerate(categories, start=1):
        where = f"{path}: category {number}"
        parts = _field(one, "keypoints", list, where) if _has(one, "keypoints") else []
        heads[str(_field(one, "id", (int, str), where))] = [
            k for k, part in enumerate(parts) if isinstance(part, str) and _HEAD.search(part)]
    places: dict[str, list] = {key: [] for key in names}
    unknown, used, tall = set(), set(), []
    for number, one in enumerate(_field(value, "annotations", list, path), start=1):
        where = f"{path}: annotation {number}"
        image = str(_field(one, "image_id", (int, str), where))
        if image not in names:
            raise ValueError(f"{where}: image_id {short(image)}, and no image has this id")
        category = str(_field(one, "category_id", (int, str), where)
                       if "category_id" in one else None)
        used.add(category)
        crowd = one.get("iscrowd") or one.get("ignore")
        place = None if crowd else _coco_place(one, heads.get(category, []), where)
        if place and not one.get("keypoints"):
            tall.append(one["bbox"][3] > 2 * one["bbox"][2])
        if place is None:
            unknown.add(image)
        else:
            places[image].append(place)
    if len(used) > 1:
        raise ValueError(f"{path}: annotations of the categories "
                         f"{', '.join(sorted(map(short, used))[:5])}, and all would be heads. "
                         "Export those of heads only")
    if sum(tall) > len(tall) / 2:
        _log.warning("%s: most boxes are more than twice as high as wide. If they are of whole "
                     "bodies, their dots lie on the belly: give boxes of heads", path)
    if unknown:
        _log.warning("%s: %d of %d images have persons without a labelled head, or regions of a "
                     "crowd, and count as photos without dots", path, len(unknown), len(names))
    return [Dots(_as_points(places[key], f"{path}: {short(name)}"), _file_name(name), sizes[key])
            for key, name in names.items() if key not in unknown]


def _coco_place(one: dict, heads: list[int], where: str) -> list[float] | None:
    """(x, y) of an annotation; None for a person whose head is not labelled."""
    if not one.get("keypoints"):
        x, y, width, height = _numbers(_field(one, "bbox", list, where), 4, where)
        return [x + width / 2, y + height / 2]
    flat = _field(one, "keypoints", list, where)
    points = np.reshape(_numbers(flat, 3 * max(1, len(flat) // 3), where), (-1, 3))
    if len(points) == 1:
        heads = [0]
    heads = [k for k in heads if k < len(points)]
    if not heads:
        raise ValueError(f"{where}: {len(points)} keypoints, and its category names none of them "
                         "head, nose, eye or ear. Name them, or export one keypoint per head")
    points = points[heads]
    points = points[points[:, 2] > 0]
    return points[:, :2].mean(axis=0).tolist() if len(points) else None


def _via(images: dict, path: str | os.PathLike) -> list[Dots]:
    listed = []
    for key, one in images.items():
        where = f"{path}: image {short(key)}"
        regions = _field(one, "regions", (list, dict), where)
        places = [_via_place(_field(region, "shape_attributes", dict, f"{where}, region {number}"),
                             f"{where}, region {number}")
                  for number, region in enumerate(
                      regions if isinstance(regions, list) else regions.values(), start=1)]
        name = _file_name(_field(one, "filename", str, where))
        listed.append(Dots(_as_points(places, where), name))
    return listed


def _via_csv(path: str | os.PathLike) -> list[Dots]:
    text = _csv_text(path, "expected a CSV of VIA 2")
    # the first versions write a # before the header
    reader = csv.DictReader(io.StringIO(text.removeprefix("#"), newline=""))
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
    return [Dots(_as_points(places, f"{path}: {short(name)}"), _file_name(name))
            for name, places in images.items()]


def _via_place(shape: Any, where: str) -> list[float]:
    kind = _field(shape, "name", str, where)
    if kind in ("point", "circle", "ellipse"):
        return _numbers([shape.get("cx"), shape.get("cy")], 2, where)
    if kind == "rect":
        x, y, width, height = _numbers(
            [shape.get(name) for name in ("x", "y", "width", "height")], 4, where)
        return [x + width / 2, y + height / 2]
    raise ValueError(f"{where} is a {short(kind)}; expected point, circle, ellipse or rect. Mark "
                     "heads so, and remove it")


def _read_xml(path: str | os.PathLike) -> list[Dots]:
    content = read_content(path)
    try:
        if b"<!DOCTYPE" in content:  # no tool writes one, and entities can grow without end
            raise ValueError("it has a DOCTYPE")
        root = ElementTree.fromstring(content)
    except (ValueError, LookupError, ElementTree.ParseError) as error:  # an unknown encoding, too
        raise ValueError(f"{path}: not valid XML ({str(error)[:100]}). Export it again") from None
    if root.tag == "annotation":
        boxes = [[one.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
                 for one in root.iter("object")]
        places = [_centre(box, f"{path}: object {number}") for number, box in enumerate(boxes, 1)]
        size = {name: _parsed(root.findtext(f"size/{name}")) for name in ("width", "height")}
        return [Dots(_as_points(places, path), None, _size(size, "width", "height"),
                     frozenset(str(one.findtext("name")) for one in root.iter("object")))]
    images = [one for one in root if one.tag == "image"]
    if root.tag != "annotations" or not images:
        raise ValueError(
            f"{path}: an element {short(root.tag)} with {', '.join(one.tag for one in root)[:80]}; "
            "expected CVAT for images (annotations with image) or Pascal VOC (annotation). Move "
            "other files elsewhere")
    found = []
    for number, image in enumerate(images, start=1):
        name = _field(image.attrib, "name", str, f"{path}: image {number}")
        where = f"{path}: image {short(name)}"
        places = [place for shape in image for place in _cvat_places(shape, where)]
        size = {key: _parsed(image.get(key)) for key in ("width", "height")}
        found.append(Dots(_as_points(places, where), _file_name(name),
                          _size(size, "width", "height"),
                          frozenset(str(shape.get("label")) for shape in image
                                    if shape.tag != "tag")))
    return found


def _cvat_places(shape: ElementTree.Element, where: str) -> list[list[float]]:
    """The heads of a shape: it may be of many points, each of them one."""
    if shape.tag == "tag":  # about the whole image
        return []
    if shape.tag == "points":
        return [_numbers([*map(_parsed, one.split(","))], 2, where)
                for one in shape.get("points", "").split(";")]
    if shape.tag == "box":
        return [_centre([shape.get(name) for name in ("xtl", "ytl", "xbr", "ybr")], where)]
    if shape.tag == "ellipse":
        return [_numbers([_parsed(shape.get(name)) for name in ("cx", "cy")], 2, where)]
    raise ValueError(f"{where} has a {short(shape.tag)}; expected points, box or ellipse. Mark "
                     "heads so, and remove it")


def _centre(box: list[str | None], where: str) -> list[float]:
    """(x, y) of the middle of a box, from the texts of left, top, right, bottom."""
    left, top, right, bottom = _numbers([*map(_parsed, box)], 4, where)
    return [(left + right) / 2, (top + bottom) / 2]


def _parsed(text: str | None) -> float | str | None:
    """A text as a number, if it is one."""
    try:
        return float(text or "")
    except ValueError:
        return text


def _label_studio(tasks: list[dict], path: str | os.PathLike) -> list[Dots]:
    listed = []
    for number, task in enumerate(tasks, start=1):
        where = f"{path}: task {short(task.get('id', number))}"
        done = [one for one in _field(task, "annotations", list, where)
                if not _has(one, "was_cancelled")]
        done = [one for one in done if _has(one, "ground_truth")] or done
        if len(done) > 1:
            raise ValueError(f"{where} has {len(done)} annotations; keep one, or make one of them "
                             "the ground truth")
        for one in done:
            results = [result for result in _field(one, "result", list, where)
                       if _field(result, "type", str, where) not in _PLACELESS]
            places = [_label_studio_place(result, where) for result in results]
            listed.append(Dots(
                _as_points(places, where), _label_studio_name(task, where),
                _size(results[0], "original_width", "original_height") if results else None,
                frozenset(short(one["value"].get(one["type"])) for one in results)))
    return listed


def _label_studio_task(record: dict) -> dict:
    """A record of the export JSON-MIN as a task; without an annotation if it was not annotated."""
    result = []
    for one in [one for values in record.values() if isinstance(values, list) for one in values]:
        if not isinstance(one, dict) or "original_width" not in one:
            continue
        kinds = sorted(one, key=lambda name: name in _PLACELESS)
        kind = next((name for name in kinds if name.endswith("labels") or name in _PLACELESS), (
            "ellipse" if "radiusX" in one else "rectangle" if "height" in one else
            "keypoint" if "x" in one else ", ".join(one)))
        result.append(one | {"type": kind, "value": one})
    done = record["annotation_id"] is not None
    return {"id": record.get("id"), "data": record, "annotations": [{"result": result}] * done}


def _label_studio_name(task: dict, where: str) -> str:
    """The file of a task; it is uploaded, local (`?d=`), or has an address."""
    data = _field(task, "data", dict, where)
    for text in (data.get("image"), *data.values()):
        if isinstance(text, str):
            name = _file_name(unquote(text.split("?d=")[-1].split("?")[0]))
            if name.lower().endswith(SUFFIXES):
                return name
    raise ValueError(f"{where}: data names no image file, found {short(data)}")


def _label_studio_place(result: dict, where: str) -> list[float]:
    """Places are in percent of the image; a box turns around its first corner, by degrees."""
    kind, value = result["type"], _field(result, "value", dict, where)
    box = kind in ("rectangle", "rectanglelabels")
    if not box and kind not in ("keypoint", "keypointlabels", "ellipse", "ellipselabels"):
        raise ValueError(f"{where}: a result is of type {short(kind)}; expected keypointlabels, "
                         "rectanglelabels or ellipselabels. Mark heads so, and remove it")
    size = np.array(_numbers([result.get("original_width"), result.get("original_height")], 2,
                             f"{where}: original_width, original_height"))
    corner = np.array(_numbers([value.get("x"), value.get("y")], 2, where)) * size / 100
    if not box:
        return corner.tolist()
    x, y = np.array(_numbers([value.get("width"), value.get("height")], 2, where)) * size / 200
    turn = math.radians(_numbers([value.get("rotation") or 0], 1, where)[0])
    return (corner + [x * math.cos(turn) - y * math.sin(turn),
                      x * math.sin(turn) + y * math.cos(turn)]).tolist()


def _field(value: object, name: str, kind: type | tuple[type, ...],
          where: str | os.PathLike) -> Any:
    """A field of an object, if it is of this kind (dict, list, str, int or several of them).

    where: file and entry, for the message of the ValueError that is raised otherwise.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the field {name}, found {short(value)}")
    found = value.get(name)
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"{where}: field {name} should be "
                         f"{' or '.join(_KINDS[one] for one in kinds)}, found "
                         f"{short(found) if name in value else 'none'}")
    return found


def _has(value: object, name: str) -> bool:
    """Whether something is an object with this field, and the field is neither empty nor false."""
    return isinstance(value, dict) and bool(value.get(name))


def _size(value: dict, width: str, height: str) -> tuple[float, float] | None:
    """The size of an image from two fields; None where they are missing, or no size."""
    size = value.get(width), value.get(height)
    return size if all(type(one) in (int, float) and one > 0 for one in size) else None


def _numbers(values: object, number: int, where: str | os.PathLike) -> list[float]:
    """So many values that can be places or sizes in an image, in pixels or percent.

    Raises ValueError, naming `where`, for another number of them, for anything that is no number,
    and for NaN, infinities and numbers beyond any image.
    """
    if not (isinstance(values, list) and len(values) == number and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and -_FAR < v < _FAR
            for v in values)):
        raise ValueError(f"{where}: found {short(values)} where {number} numbers of a place in an "
                         "image should be. Correct or remove it")
    return [float(v) for v in values]


def _as_points(places: Sequence[Sequence[float]], where: str | os.PathLike) -> np.ndarray:
    """Places of the heads of one image as (N, 2) float64; ValueError if they are too many."""
    check_number(len(places), where)
    return np.array(places, dtype=np.float64).reshape(-1, 2)


def _file_name(path: str) -> str:
    """The last part of a path or address, as Windows or others write it."""
    return re.split(r"[/\\]", path)[-1]
