"""What a folder of masks holds, as its manifest.json says it: for `xmask.data.masks`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pandas as pd

from xmask import files
from xmask.edp_sam import source_names
from xmask.segmenters import Segmenter

_NOTE_EVERY = 10.0  # seconds between two writes of a growing manifest
OWN_FILES = ("manifest", "times", "coco", "worst")  # beside the masks; no image's names
_PROGRESS = ("images", "failed", "todo")  # of a manifest; the rest is what masks depend on
COUNTS = ("sources", "flags", "repairs")  # what the manifest counts for every image
_KEYS = {"algorithm", "segmenter", "options", "dataset", "images", "failed"}
_log = logging.getLogger("xmask")


class Manifest:
    """What a folder of masks holds: `images` that are done (name -> checksum and statistics),
    `failed` ones (name -> why) and those `todo` (name -> checksum), which a killed process may
    have finished without noting it."""

    def __init__(self, folder: files.OutputFolder, request: dict[str, Any], dataset: Any,
                 segmenter: Segmenter, anew: bool, own: list[int], checksums: dict[str, str]
                 ) -> None:
        self.folder, self.request = folder, request
        self.dataset, self.segmenter = dataset, segmenter
        # of a shard, its own images are all that it looks at
        self.seen = own if folder.shard else list(range(len(dataset)))
        self.own = {dataset.ids[i] for i in self.seen}
        stored = self._read()
        self.images, self.failed, self.todo = (dict(stored.get(key, {})) for key in _PROGRESS)
        before = {key: value for key, value in stored.items() if key not in _PROGRESS}
        if before != request:
            if before and not anew and (self.images or (folder.shard and self.todo)):
                differ = [k for k in {**request, **before} if before.get(k) != request.get(k)]
                raise ValueError(
                    f"{folder.path}: holds masks of {len(self.images)} images that were made with "
                    f"another {' and '.join(differ)}. Give another folder (--out), or --overwrite "
                    "to make masks anew in this one")
            # Removed before the new manifest is there: stopped in between, the old one is still
            # true of what is left.
            for name in (*self.images, *self.failed, *self.todo):
                self._remove(name)
            self.images, self.failed, self.todo = {}, {}, {}
        self._written = 0.0
        self._checksums = checksums
        for i in self.seen:
            name = dataset.ids[i]
            if name in self.images and self.images[name]["checksum"] != self._checksum(i):
                there = self.images[name].get("file")
                if not anew and there not in (None, self._file(i)):
                    raise ValueError(
                        f"{self._file(i)}: {folder.path} holds masks of {there}, which has the "
                        "same name. Rename one of the two, give another folder (--out), or "
                        "--overwrite to replace them")
                self._remove(name)
                del self.images[name]
        for name in () if folder.shard else self.images.keys() - self.own:
            self._check_other(name)

    def _checksum(self, i: int) -> str:
        name = self.dataset.ids[i]
        if name not in self._checksums:
            self._checksums[name] = self.dataset.image_checksum(i)
        return self._checksums[name]

    def _file(self, i: int) -> str | None:
        """Where an own photo lies; images of a data set are known by their names."""
        path = getattr(self.dataset, "source", None)
        return path(i) if path else None

    def _check_other(self, name: str) -> None:
        """An image of an earlier call, which this one does not see: are its masks as they were?"""
        bad = [path for path in paths_of(self.folder.path, name) if not self.folder.is_intact(path)]
        if not bad:
            return
        del self.images[name]
        for path in bad:
            self.folder.remove(path)
        _log.warning("%s: %s not as xmask wrote it, so the masks of %s count no longer; make them "
                     "again", self.folder.path, " and ".join(path.name for path in bad), name)

    def begins(self, i: int) -> bool:
        """Whether the masks of image `i` are to be made; if so, its place is cleared."""
        name, folder = self.dataset.ids[i], self.folder
        self.failed.pop(name, None)
        paths = paths_of(folder.path, name)
        complete = all(folder.is_intact(path) for path in paths)
        if complete and name in self.images:
            return False
        if complete and self.todo.get(name) == self._checksum(i):
            table = pd.read_csv(paths[1], keep_default_na=False)
            self._enter(i, statistics(table, self.dataset[i].repairs, self.segmenter))
            return False
        self.images.pop(name, None)
        try:
            self._remove(name)  # so that no old table stands beside a new label map
            for path in paths:
                folder.make_way(path)
        except FileExistsError as error:
            self.failed[name] = str(error)
            return False
        self.todo[name] = self._checksum(i)
        tries_of(folder.path, name).unlink(missing_ok=True)
        return True

    def ends(self, name: str, found: dict[str, Any] | None, error: str) -> None:
        """Note what became of an image: its statistics, or why it failed."""
        if error:
            self.failed[name] = error
        else:
            self._enter(self.dataset.ids.index(name), found)
        if time.monotonic() - self._written > _NOTE_EVERY:
            with self.folder.alone():
                self.write()

    def _enter(self, i: int, found: dict[str, Any]) -> None:
        file = self._file(i)
        self.images[self.dataset.ids[i]] = {
            "checksum": self._checksum(i), **({"file": file} if file else {}), **found}

    def write(self) -> None:
        """Store it: images of earlier calls, then those of this data set, in its order."""
        if self.folder.shard:
            self._take_in()
        ids, known = set(self.dataset.ids), (*self.images, *self.failed, *self.todo)
        order = dict.fromkeys((*(name for name in known if name not in ids), *self.dataset.ids))
        files.write_json(self.folder.path / "manifest.json", {
            **self.request,
            "images": {name: self.images[name] for name in order if name in self.images},
            "failed": {name: self.failed[name] for name in order if name in self.failed},
            "todo": {name: self.todo[name] for name in order
                     if name in self.todo and name not in (*self.images, *self.failed)}})
        self._written = time.monotonic()

    def _take_in(self) -> None:
        """What the processes of other shards have noted since."""
        stored = self._read()
        for key in _PROGRESS:
            mine = getattr(self, key)
            setattr(self, key, {
                name: found for name, found in (stored.get(key, {}) | mine).items()
                if name in (mine if name in self.own else stored.get(key, {}))})

    def _remove(self, name: str) -> None:
        """The table first: without it the image is not complete."""
        for path in reversed(paths_of(self.folder.path, name)):
            self.folder.remove(path)

    def _read(self) -> dict[str, Any]:
        """What the folder's manifest says; {} where there is none, or a damaged one, whose masks
        are set aside, because nobody knows of what they are."""
        path = self.folder.path / "manifest.json"
        if self.folder.is_listed(path) and path.is_file():
            try:
                return check_manifest(files.read_json(path), path)
            except ValueError as error:
                _log.warning("%s", error)
            for name in self.folder.names():
                file = self.folder.path / name
                if name.endswith((".png", ".csv")) and Path(name).stem not in OWN_FILES and (
                        file.is_file()):
                    self.folder.set_aside(file, "its manifest is damaged")
        return {}


def check_manifest(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest itself; ValueError if it is none, or if its names lead out of the folder."""
    good = set(manifest) >= _KEYS and all(
        isinstance(manifest.get(key, {}), dict) and all(map(files.is_plain, manifest.get(key, {})))
        for key in _PROGRESS)
    if not good or not all(
            isinstance(one, dict) and isinstance(one.get("checksum"), str)
            and isinstance(one.get("heads"), int)
            and isinstance(one.get("file", ""), str)
            and all(isinstance(one.get(key), dict)
                    and all(isinstance(n, int) for n in one[key].values()) for key in COUNTS)
            for one in manifest["images"].values()):
        raise ValueError(
            f"{path}: not a manifest of masks, which has the fields {', '.join(sorted(_KEYS))} and "
            "plain image names. Masks that it listed are set aside; make them anew")
    return manifest


def paths_of(out: Path, name: str) -> tuple[Path, Path]:
    """Label map and table of image `name` in the folder `out`."""
    return out / f"{name}.png", out / f"{name}.csv"


def tries_of(out: Path, name: str) -> Path:
    """Holds a byte for every worker that began with an image and did not come to its end."""
    return out / files.HIDDEN / "trying" / name


def statistics(table: pd.DataFrame, repairs: dict[str, int], segmenter: Segmenter
                ) -> dict[str, Any]:
    """What the manifest says about an image."""
    words = pd.Series([word for one in table["flags"] for word in one.split()], dtype=object)
    return {
        "heads": len(table),
        "sources": {one: int((table["source"] == one).sum()) for one in source_names(segmenter)},
        "flags": {word: int(count) for word, count in words.value_counts().sort_index().items()},
        # as the table on disk says it, so that a number does not depend on who reads it
        "score": float(f"{table['score'].map('{:.6g}'.format).astype(float).mean():.4f}")
        if len(table) else None,
        "repairs": {name: int(count) for name, count in repairs.items()},
    }
