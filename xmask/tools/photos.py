"""`xmask predict`: a list of image files in, for each its count, points, masks and overlay out.

A bad file is named and the others go on. Every image is finished on its own, atomically, and
stamped with what it was made from (image, model, settings, code), so that the same command after
an interruption does only what is missing.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.tools import coco
from xmask.data.images import decode as decode_file
from xmask.data.images import read_labels, upright
from xmask.predict import Predictor, check_side

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
MOST = 65535  # heads that a 16-bit label map can hold
_STRIP = 512  # rows painted at a time


@dataclass(frozen=True)
class Photo:
    """An image file and the name of what is written about it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Row:
    """A line of counts.csv: `count` is None and `error` says why where an image failed."""

    image: str
    name: str
    count: int | None = None
    width: int | None = None
    height: int | None = None
    repairs: str = ""
    error: str = ""


def find(arguments: Sequence[str | os.PathLike]) -> list[Photo]:
    """The image files that files, folders and globs name, once each, in order.

    A folder gives the images directly in it, by their suffix; a glob may hold ** for folders
    below. A file named outright is taken whatever its suffix, and may be missing: that is said
    when its turn comes. Names are file names without suffix; where two are alike, the suffix and
    folders (with dashes) are added.
    Raises ValueError for a folder or glob that gives no image.
    """
    paths: list[Path] = []
    for argument in map(os.fspath, arguments):
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if _is_image(p))
            if not found:
                raise ValueError(f"{path}: no image in this folder ({', '.join(SUFFIXES)}). For "
                                 f"folders below it give the glob '{path}/**/*.jpg', in quotes.")
        elif glob.has_magic(argument) and not path.exists():
            found = sorted(Path(p) for p in glob.glob(argument, recursive=True)
                           if _is_image(Path(p)))
            if not found:
                raise ValueError(f"{argument}: no image matches this pattern. Check it against "
                                 f"the folder; images are {', '.join(SUFFIXES)}.")
        else:
            found = [path]
        paths += found
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    paths = list(once.values())
    return [Photo(path, name) for path, name in zip(paths, _names(paths))]


def _names(paths: list[Path]) -> list[str]:
    stems = Counter(path.stem for path in paths)
    full = [path.absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in full]) if full else ""
    names: list[str] = []
    for path in full:
        name = path.stem
        if stems[name] > 1:
            name = "-".join(path.relative_to(shared).parts)
        while name in names:
            name += "_"
        names.append(name)
    return names


def _is_image(path: Path) -> bool:
    return (path.is_file() and path.suffix.lower() in SUFFIXES
            and not path.name.startswith("."))


def run(photos: Sequence[Photo], model: Predictor, out: str | os.PathLike, *,
        max_side: int | None = None, progress: bool = True) -> list[Row]:
    """Predict every photo into the folder `out`; return one row for each, failed or not.

    max_side: as in `Predictor.predict`.

    Written for a photo named N: `N.points.csv` (x, y, score, area in pixels), `N.masks.png`
    (16-bit label map, value k the head of line k), `N.overlay.png`; for the call: `counts.csv`,
    `coco.json` (all masks as RLE) and `model.json` (the record of the model and the thresholds).
    Raises ValueError where `out` is a file, and for a max_side that no image can have.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; results need a folder, give the name of one (--out)")
    check_side(max_side)
    rows = []
    bar = tqdm(photos, desc="predict", unit="image", disable=not progress)
    for photo in bar:
        bar.set_postfix_str(photo.name[-30:], refresh=False)
        try:
            rows.append(_one(photo, model, out, max_side))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # out of memory, too
            message = " ".join(str(error).split()) or type(error).__name__
            rows.append(Row(str(photo.path), photo.name, error=message))
    files.write_json(out / "model.json",
                     model.record | {"decoding": model.decoding.model_dump(),
                                     "max_side": max_side})
    table = pd.DataFrame(rows).astype({name: "Int64" for name in ("count", "width", "height")})
    files.write_text(out / "counts.csv", table.to_csv(index=False, lineterminator="\n"))
    files.write_json(out / "coco.json", _coco(rows, model, out))
    return rows


def _one(photo: Photo, model: Predictor, out: Path, max_side: int | None) -> Row:
    """Predict one photo, or take what an earlier call has made of it."""
    if not photo.path.is_file():
        raise FileNotFoundError(f"{photo.path}: no such file")
    if not photo.path.stat().st_size:
        raise ValueError(f"{photo.path}: the file is empty (0 bytes). Copy or download it again.")
    points, masks, overlay = (out / f"{photo.name}.{kind}" for kind in
                              ("points.csv", "masks.png", "overlay.png"))
    stamp = out / ".done" / f"{photo.name}.json"
    fingerprint = provenance.digest(
        files.sha256(photo.path), model.record["sha256"], model.decoding.model_dump(),
        model.device.type, max_side, provenance.code("xmask.tools.photos"))
    noted = out / ".done" / f"{photo.name}.row.json"
    if provenance.is_done(stamp, fingerprint):
        return Row(**files.read_json(noted) | {"image": str(photo.path)})

    image, repairs = _read(photo.path)
    prediction = model.predict(image, max_side=max_side, name=str(photo.path))
    if prediction.count > MOST:
        raise ValueError(f"{photo.path}: {prediction.count} heads, and a 16-bit label map holds "
                         f"{MOST}. Cut the image in parts.")
    area = np.bincount(prediction.instances.ravel(), minlength=prediction.count + 1)[1:]
    table = pd.DataFrame(prediction.points, columns=["x", "y"])
    table = table.assign(score=prediction.scores, area=area)
    files.write_text(points, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    files.write_png(masks, prediction.instances.astype(np.uint16))
    files.write_png(overlay, paint(image, prediction.instances, prediction.points))
    row = Row(str(photo.path), photo.name, prediction.count, image.shape[1], image.shape[0],
              repairs)
    files.write_json(noted, dataclasses.asdict(row))
    provenance.write_stamp(stamp, fingerprint, [points, masks, overlay, noted])
    return row


def _read(path: Path) -> tuple[np.ndarray, str]:
    """The image as upright 8-bit RGB, and what had to be done for that, in words."""
    found = decode_file(path)
    repairs = []
    if found.mode.startswith("I"):
        repairs.append("16-bit grey to 8 bits (high byte) and RGB")
    elif found.mode in ("L", "1", "LA"):
        repairs.append("grey to RGB")
    elif found.mode != "RGB":
        repairs.append(f"{found.mode} to RGB")
    if found.orientation != 1:
        repairs.append(f"turned upright (EXIF orientation {found.orientation})")
    return np.ascontiguousarray(upright(found.rgb, found.orientation)), "; ".join(repairs)


def paint(image: np.ndarray, label_map: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`tools.overlay` of images of any size, in strips: (H, W, 3) uint8."""
    from xmask.tools.overlay import overlay

    painted, points = np.empty_like(image), np.rint(points)  # first: half pixels round to even
    for top in range(0, len(image), _STRIP):
        # two rows more on each side: contours and dots reach that far
        begin, end = max(top - 2, 0), min(top + _STRIP + 2, len(image))
        dots = points[(points[:, 1] > begin - 2) & (points[:, 1] < end + 1)] - [0, begin]
        strip = overlay(image[begin:end], label_map[begin:end], dots)
        painted[top:top + _STRIP] = strip[top - begin:top - begin + _STRIP]
    return painted


def _coco(rows: Sequence[Row], model: Predictor, out: Path) -> dict:
    """All masks of the call as one COCO document, read back from the files just written."""
    images, found = [], []
    for row in rows:
        if row.error:
            continue
        images.append({"id": len(images) + 1, "file_name": row.image, "width": row.width,
                       "height": row.height, "count": row.count})
        table = pd.read_csv(out / f"{row.name}.points.csv")
        table = table.assign(head=range(1, len(table) + 1), source="predicted")
        found += coco.annotations(read_labels(out / f"{row.name}.masks.png"), table,
                                  images[-1]["id"], len(found) + 1)
    text = (f"Predicted by xmask ({model.record['backbone']}, trained on "
            f"{model.record['trained_on']['text']}); not ground truth")
    return {"info": {"description": text, "version": model.record["sha256"]}, "images": images,
            "annotations": found,
            "categories": [{"id": 1, "name": "head", "supercategory": "person"}]}
