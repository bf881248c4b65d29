"""`xmask predict`: a list of image files in, for each its count, points, masks and overlay out.

A bad file is named and the others go on. Every image is finished on its own, atomically, and
noted with what it was made from (image, model, settings, code), so that the same command after
an interruption does only what is missing, and a second call adds to the results of the first.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.data.annotations import MOST_HEADS
from xmask.data.images import SUFFIXES, check_header, is_image, upright
from xmask.data.images import decode as decode_file
from xmask.predict import Predictor, check_side
from xmask.tools import coco
from xmask.tools.overlay import overlay

_log = logging.getLogger("xmask")


@dataclass(frozen=True)
class Photo:
    """An image file and the name of what is written about it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Row:
    """A line of counts.csv: `error` says why where an image failed, and `count` is None unless an
    earlier call has counted it; `low` and
    `high` are the count's interval where the model is calibrated."""

    image: str
    name: str
    count: int | None = None
    low: int | None = None
    high: int | None = None
    width: int | None = None
    height: int | None = None
    repairs: str = ""
    error: str = ""


def find(arguments: Sequence[str | os.PathLike]) -> list[Photo]:
    """The image files that files, folders and globs name, once each, in order.

    A folder gives the images directly in it, by their suffix; a glob may hold ** for folders
    below. Left out are hidden files and what an earlier call has written. A file named outright
    is taken whatever its suffix, and may be missing: that is said when its turn comes. Names are
    file names without suffix; where two are alike, the suffix and folders (with dashes) are added.
    Raises ValueError for a folder or glob that gives no image.
    """
    paths: list[Path] = []
    for argument in map(os.fspath, arguments):
        path = Path(argument)
        if os.path.isdir(path):
            found = _images(path.iterdir())
            if not found:
                raise ValueError(f"{path}: no image in this folder ({', '.join(SUFFIXES)}). For "
                                 f"folders below it give the glob '{path}/**/*.jpg', in quotes.")
        elif glob.has_magic(argument) and not os.path.exists(path):
            found = _images(map(Path, glob.glob(argument, recursive=True)))
            if not found:
                raise ValueError(f"{argument}: no image matches this pattern. Check it against "
                                 f"the folder; images are {', '.join(SUFFIXES)}.")
        else:
            found = [path]
        paths += found
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(Path(os.path.realpath(path)), path)
    paths = list(once.values())
    return [Photo(path, name) for path, name in zip(paths, _names(paths))]


def _images(paths: Iterable[Path]) -> list[Path]:
    """The images among paths, in order, without those that this package has written."""
    return files.without_ours(filter(is_image, paths))


def _names(paths: list[Path]) -> list[str]:
    stems = Counter(path.stem.casefold() for path in paths)
    full = [path.absolute() for path in paths]
    alike = max(stems.values(), default=0) > 1  # else no common folder is needed: drives have none
    shared = os.path.commonpath([path.parent for path in full]) if alike else ""
    names, taken = [], set()
    for path in full:
        name = path.stem
        if stems[name.casefold()] > 1:
            name = "-".join(path.relative_to(shared).parts)
        names.append(_free(_plain(name), taken))
        taken.add(names[-1].casefold())
    return names


def _plain(name: str) -> str:
    """A name that every file system and every text file can hold: bytes that are not UTF-8, and
    backslashes, become %XX."""
    return re.sub(r"[\udc80-\udcff\\]", lambda m: f"%{ord(m[0]) & 0xff:02X}", name)


def _free(name: str, taken: Collection[str]) -> str:
    """`name`, with as many underscores as make it another than all in `taken` (lower case)."""
    while name.casefold() in taken:
        name += "_"
    return name


def run(photos: Sequence[Photo], model: Predictor, out: str | os.PathLike, *,
        max_side: int | None = None, overwrite: bool = False, progress: bool = True) -> list[Row]:
    """Predict every photo into the folder `out`; return one row for each, failed or not.

    max_side: as in `Predictor.predict`. overwrite: as of `files.OutputFolder`, which `out` is.

    Written for a photo named N: `N.points.csv` (counted heads: x, y, score, area in pixels),
    `N.masks.png` (16-bit label map, value k the head of line k), `N.overlay.png`. Written for all
    results in the folder, of earlier calls, too: `counts.csv` (by name, and what failed in this
    call, beside the count of an earlier one) and `coco.json` (all masks as RLE). Written for this
    call: `model.json` (the record of the model and the thresholds). A photo keeps its name from
    call to call; another one of the same name gets the name of its folder before its own.
    Raises ValueError for a max_side that no image can have, and, without overwrite, for a folder
    with masks of `xmask masks` or results of another model; and what `files.OutputFolder` does.
    """
    check_side(max_side)
    with files.OutputFolder(out, overwrite=overwrite,
                            kept=[photo.path for photo in photos]) as folder:
        results, rows = _Results(folder, model, max_side), []
        if not overwrite:
            results.check()
        for name in ("counts.csv", "coco.json", "model.json"):
            folder.make_way(folder.path / name)
        bar = tqdm(photos, desc="predict", unit="image", disable=not progress)
        for photo in bar:
            bar.set_postfix_str(_plain(photo.name[-30:]), refresh=False)
            try:
                rows.append(results.add(photo))
            except (OSError, ValueError, RuntimeError, MemoryError) as error:  # out of memory, too
                message = " ".join(str(error).split()) or type(error).__name__
                rows.append(Row(str(photo.path), photo.name, error=message))
        files.write_json(folder.path / "model.json", model.record | {
            "decoding": model.decoding.model_dump(), "max_side": max_side})
        results.write_tables([row for row in rows if row.error])
    return rows


class _Results:
    """The results in a folder: a note for each, `.xmask/notes/N.json`, and its part of coco.json,
    an annotation a line, `.xmask/coco/N.jsonl`."""

    def __init__(self, folder: files.OutputFolder, model: Predictor, max_side: int | None) -> None:
        self.folder, self.model, self.max_side = folder, model, max_side
        self.settings = (model.record["sha256"], model.decoding.model_dump(), model.device.type,
                         max_side, provenance.code("xmask.tools.photos"))
        self.place = folder.path / files.HIDDEN
        self.source: dict[str, str] = {}  # where a photo lies -> its name
        self.image: dict[str, str] = {}  # name in lower case -> checksum of its photo
        self.others = 0  # results that are known to be of other weights
        for path in sorted((self.place / "notes").glob("*.json")):
            if note := self._note(path.stem):
                self.source[note["source"]] = path.stem
                self.image[path.stem.casefold()] = note["image"]
                self.others += note.get("model", self.settings[0]) != self.settings[0]

    def check(self) -> None:
        """Raises ValueError where results in the folder are of another command or model."""
        coco.check_folder(self.folder, "manifest.json", "masks of `xmask masks`")
        if self.others:
            raise ValueError(f"{self.folder.path}: holds {self.others} results of another model. "
                             "Give another folder (--out), or --overwrite to replace them")

    def _note(self, name: str) -> dict[str, Any] | None:
        """What is known of a result; None if nothing, or if its note is damaged."""
        try:
            note = files.read_json(self.place / "notes" / f"{name}.json")
            return note if note.pop("seal") == provenance.digest(name, note) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def _paths(self, name: str) -> list[Path]:
        """Points, masks, overlay and the part of coco.json of a result."""
        return [*(self.folder.path / f"{name}.{kind}"
                  for kind in ("points.csv", "masks.png", "overlay.png")),
                self.place / "coco" / f"{name}.jsonl"]

    def _name(self, photo: Photo, source: str, image: str) -> str:
        if source in self.source:
            return self.source[source]
        if self.image.get(photo.name.casefold(), image) == image:
            return photo.name  # free, or the same photo at another place
        return _free(_plain(f"{photo.path.absolute().parent.name}-{photo.path.name}"), self.image)

    def add(self, photo: Photo) -> Row:
        """Predict one photo, or take what an earlier call has made of it."""
        if not photo.path.is_file():
            raise FileNotFoundError(f"{photo.path}: no such file")
        if not photo.path.stat().st_size:
            raise ValueError(f"{photo.path}: the file is empty (0 bytes). Copy or download it "
                             "again.")
        check_header(photo.path)  # before all of it is read
        image, source = files.sha256(photo.path), os.fspath(photo.path.absolute())
        name = self._name(photo, source, image)
        made_from = provenance.digest(image, *self.settings)
        note = self._note(name)
        if note and note["made_from"] == made_from and all(
                path.is_file() and files.sha256(path) == note["files"].get(path.name)
                for path in self._paths(name)):
            row, made = Row(**note["row"] | {"image": str(photo.path)}), note["files"]
        else:
            row = self._predict(photo, name)
            made = {path.name: files.sha256(path) for path in self._paths(name)}
        new = {"source": source, "image": image, "made_from": made_from, "model": self.settings[0],
               "row": dataclasses.asdict(row), "files": made}
        if new != note:
            files.write_json(self.place / "notes" / f"{name}.json",
                             new | {"seal": provenance.digest(name, new)})
        self.source[source], self.image[name.casefold()] = name, image
        return row

    def _predict(self, photo: Photo, name: str) -> Row:
        *results, fragment = self._paths(name)
        for path in results:
            self.folder.make_way(path)
        image, repairs = _read(photo.path)
        found = self.model.predict(image, max_side=self.max_side, name=str(photo.path))
        if found.count > MOST_HEADS:
            raise ValueError(f"{photo.path}: {found.count} heads, and a 16-bit label map holds "
                             f"{MOST_HEADS}. Cut the image in parts.")
        number = np.where(found.counted, np.cumsum(found.counted), 0)  # of each head; 0 for none
        labels = np.r_[0, number][found.instances]
        area = np.bincount(labels.ravel(), minlength=found.count + 1)[1:]
        table = pd.DataFrame(found.heads, columns=["x", "y"]).assign(
            score=found.scores[found.counted], area=area)
        points, masks, picture = results
        # the largest first: on a full disk, numbers of an earlier call stay
        files.write_png(picture, overlay(image, labels, found.heads))
        files.write_png(masks, labels.astype(np.uint16))
        files.write_text(points, table.to_csv(index=False, float_format="%.6g",
                                              lineterminator="\n"))
        table = pd.read_csv(points).assign(head=range(1, len(table) + 1), source="predicted")
        with files.replacing(fragment) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for one in coco.annotations(labels, table):
                file.write(json.dumps(one) + "\n")
        return Row(str(photo.path), name, found.count, found.low, found.high, image.shape[1],
                   image.shape[0], repairs)

    def write_tables(self, failed: list[Row]) -> None:
        """counts.csv and coco.json, of all results and of what failed in this call."""
        without = {os.fspath(Path(row.image).absolute()): row for row in failed}
        kept, others = [], 0
        for path in (self.place / "notes").glob("*.json"):
            note, part = self._note(path.stem), self._paths(path.stem)[-1]
            if note and part.is_file() and files.sha256(part) == note["files"].get(part.name):
                if note["source"] in without:
                    if self._is_changed(note, path.stem):
                        continue
                    # what an earlier call has finished stays, with what failed in this one
                    note["row"] |= {"error": without.pop(note["source"]).error}
                kept.append(note["row"])
                others += note.get("model") != self.settings[0]
            else:
                _log.warning("%s: the notes about %s are damaged, so counts.csv and coco.json "
                             "leave it out; predict it again", self.folder.path, path.stem)
        if others:
            _log.warning("%s: %d of the %d results in counts.csv and coco.json are of another "
                         "model or an earlier version; predict those photos again, or give every "
                         "model a folder of its own", self.folder.path, others, len(kept))
        rows = [*without.values(), *(Row(**row) for row in kept)]
        rows.sort(key=lambda row: (row.name, row.image))
        table = pd.DataFrame(rows, columns=[field.name for field in dataclasses.fields(Row)])
        table = table.astype(dict.fromkeys(
            ("count", "low", "high", "width", "height"), "Int64"))
        files.write_text(self.folder.path / "counts.csv",
                         table.to_csv(index=False, lineterminator="\n"))
        record = self.model.record
        text = (f"Predicted by xmask ({record['backbone']}, trained on "
                f"{record['trained_on']['text']}); not ground truth")
        coco.write_document(self.folder.path / "coco.json",
                            {"description": text, "version": record["sha256"]},
                            (({"file_name": row.image, "width": row.width, "height": row.height,
                               "count": row.count}, self._annotations(row.name))
                             for row in rows if row.count is not None))

    def _is_changed(self, note: dict[str, Any], name: str) -> bool:
        """Whether points or masks are not as a result's note says; to remove them is no change."""
        return any(path.is_file() and files.sha256(path) != note["files"].get(path.name)
                   for path in self._paths(name)[:2])

    def _annotations(self, name: str) -> Iterator[dict[str, Any]]:
        with open(self._paths(name)[-1], encoding="utf-8") as file:
            yield from map(json.loads, file)


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
