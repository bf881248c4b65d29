"""The masks of a whole data set as a folder of files, which grows image by image.

One image is `xmask.edp_sam.generate_masks`; here are its results on disk, what they were made
from, and how a run that was stopped goes on.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from xmask import files
from xmask.data.images import read_labels
from xmask.edp_sam import ALGORITHM, generate_masks, source_names
from xmask.segmenters import Segmenter

try:
    import resource
except ImportError:  # Windows does not tell a process its peak memory
    resource = None

_NOTE_EVERY = 10.0  # seconds between two writes of a growing manifest
_OWN_FILES = ("manifest", "times", "coco", "worst")  # beside the masks; no image's names
_PROGRESS = ("images", "failed", "todo")  # of a manifest; the rest is what masks depend on
_COUNTS = ("sources", "flags", "repairs")  # what the manifest counts for every image
_KEYS = {"algorithm", "segmenter", "options", "dataset", "images", "failed"}
_log = logging.getLogger("xmask")

# On record, options hold what nobody chose, too. Head sizes come from the samples, if wanted.
_DEFAULTS = {name: one.default for name, one in inspect.signature(generate_masks).parameters.items()
             if one.kind is one.KEYWORD_ONLY} | {"boxes": False}


class MasksFailed(RuntimeError):
    """Some images got no masks; the rest of the data set did."""


def mask_dataset(
    dataset: Any, indices: Iterable[int], segmenter: Segmenter, out: str | os.PathLike, *,
    workers: int = 1, threads: int = 1, progress: bool = True,
    depends: dict[str, Any] | None = None, anew: bool = True, overwrite: bool = False,
    wait: float = 0.0, **options: Any,
) -> Path:
    """Masks of many images as a folder; run again after an interruption, it goes on.

    dataset: a `xmask.data` dataset. indices: which of its images. options: of `generate_masks`;
    boxes=True takes the head sizes from the samples.
    workers: processes; above 1 they are spawned, so a script needs the usual
    `if __name__ == "__main__":`. threads: of the segmenter in each; its last bits may depend
    on this number, while no result depends on the number of workers.
    depends: further facts that the masks depend on (JSON values, such as versions): masks made
    under other ones are made anew. They are stored as "depends".
    anew: False refuses, instead, where the folder's masks were made under another request.
    overwrite, wait: as of `files.OutputFolder`, which `out` is.

    Writes into `out`, per image, <id>.png (label map, 16-bit grey) and then <id>.csv (table),
    each in one move, so that an image with both is complete whenever the process is stopped.
    manifest.json holds what all masks depend on (algorithm, segmenter, every option, settings of
    the data set), and for each image its checksum, statistics, and what was repaired in its
    annotation, or why it failed, or that it is still to do.
    Images complete under the same manifest are skipped unless their own checksum changed or a
    file of theirs was damaged; other files than the folder's own are left alone.
    times.csv tells how long the images of this call took, and the memory used.

    Returns `out`. An image that fails does not stop the others.
    Raises MasksFailed at the end if any failed, and at once what `files.OutputFolder` does, or
    ValueError if an image has the name of a file that this package writes beside the masks.
    """
    if not (1 <= workers <= 1024 and 1 <= threads <= 1024):
        raise ValueError(f"workers, threads: {workers}, {threads}; each has to be 1 or more, and "
                         "at most 1024")
    out, indices = Path(out), list(indices)
    _check_names([dataset.ids[i] for i in indices], out)
    request = json.loads(json.dumps({
        "algorithm": ALGORITHM, "segmenter": segmenter.describe(),
        "options": {**_DEFAULTS, **options}, "dataset": dataset.settings,
        **({} if depends is None else {"depends": depends})}))
    with files.OutputFolder(out, overwrite=overwrite, wait=wait) as folder:
        manifest = _Manifest(folder, request, dataset, segmenter, anew)
        todo = [i for i in indices if manifest.begins(i)]
        _make(_Job(dataset, segmenter, out, threads, options, overwrite), todo, workers, manifest,
              progress)
    failed = [dataset.ids[i] for i in indices if dataset.ids[i] in manifest.failed]
    if failed:
        raise MasksFailed(
            f"{out}: masks failed for {len(failed)} of {len(indices)} images, the first "
            f"{failed[0]} ({manifest.failed[failed[0]]}); all are listed in "
            f"{out / 'manifest.json'}. The others are done: mend these and run again")
    return out


def _check_names(names: list[str], out: Path) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not files.is_plain(name):
            raise ValueError(f"image {name!r}: not a file name; rename the image and its "
                             "annotation")
        if name.lower() in _OWN_FILES:
            raise ValueError(
                f"image {name}: {out} has files of its own with this name ("
                f"{', '.join(_OWN_FILES)} are taken); rename the image and its annotation")
        if name.lower() in seen:
            raise ValueError(f"image {name}: {seen[name.lower()]} has the same name, and so would "
                             "its masks; rename one of the two")
        seen[name.lower()] = name


def _make(job: _Job, todo: list[int], workers: int, manifest: _Manifest, progress: bool) -> None:
    """Make the masks of the images `todo`, noting every one."""
    times: list[dict[str, Any]] = []
    manifest.write()
    results = _in_order(job, todo) if workers == 1 else _in_parallel(job, todo, workers)
    try:
        for name, found, error, took in tqdm(
                results, desc="masks", unit="image", total=len(todo), disable=not progress):
            manifest.ends(name, found, error)
            if error:
                tqdm.write(f"masks of {name} failed: {error}", file=sys.stderr)
            else:
                times.append({"image": name, "heads": found["heads"], **took})
    finally:
        manifest.write()
        files.write_text(job.out / "times.csv", pd.DataFrame(times).to_csv(
            index=False, float_format="%.3f"))


class _Manifest:
    """What a folder of masks holds: `images` that are done (name -> checksum and statistics),
    `failed` ones (name -> why) and those `todo` (name -> checksum), which a killed process may
    have finished without noting it."""

    def __init__(self, folder: files.OutputFolder, request: dict[str, Any], dataset: Any,
                 segmenter: Segmenter, anew: bool) -> None:
        self.folder, self.request = folder, request
        self.dataset, self.segmenter = dataset, segmenter
        stored = self._read()
        self.images, self.failed, self.todo = (dict(stored.get(key, {})) for key in _PROGRESS)
        before = {key: value for key, value in stored.items() if key not in _PROGRESS}
        if before != request:
            if before and not anew and self.images:
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
        self._checksums: dict[str, str] = {}
        for i, name in enumerate(dataset.ids):
            if name in self.images and self.images[name]["checksum"] != self._checksum(i):
                there = self.images[name].get("file")
                if not anew and there not in (None, self._file(i)):
                    raise ValueError(
                        f"{self._file(i)}: {folder.path} holds masks of {there}, which has the "
                        "same name. Rename one of the two, give another folder (--out), or "
                        "--overwrite to replace them")
                self._remove(name)
                del self.images[name]
        for name in self.images.keys() - set(dataset.ids):
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
        bad = [path for path in _paths(self.folder.path, name) if not self.folder.is_intact(path)]
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
        paths = _paths(folder.path, name)
        complete = all(folder.is_intact(path) for path in paths)
        if complete and name in self.images:
            return False
        if complete and self.todo.get(name) == self._checksum(i):
            table = pd.read_csv(paths[1], keep_default_na=False)
            self._enter(i, _statistics(table, self.dataset[i].repairs, self.segmenter))
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
        return True

    def ends(self, name: str, found: dict[str, Any] | None, error: str) -> None:
        """Note what became of an image: its statistics, or why it failed."""
        if error:
            self.failed[name] = error
        else:
            self._enter(self.dataset.ids.index(name), found)
        if time.monotonic() - self._written > _NOTE_EVERY:
            self.write()

    def _enter(self, i: int, found: dict[str, Any]) -> None:
        file = self._file(i)
        self.images[self.dataset.ids[i]] = {
            "checksum": self._checksum(i), **({"file": file} if file else {}), **found}

    def write(self) -> None:
        """Store it: images of earlier calls, then those of this data set, in its order."""
        ids, known = set(self.dataset.ids), (*self.images, *self.failed, *self.todo)
        order = dict.fromkeys((*(name for name in known if name not in ids), *self.dataset.ids))
        files.write_json(self.folder.path / "manifest.json", {
            **self.request,
            "images": {name: self.images[name] for name in order if name in self.images},
            "failed": {name: self.failed[name] for name in order if name in self.failed},
            "todo": {name: self.todo[name] for name in order
                     if name in self.todo and name not in (*self.images, *self.failed)}})
        self._written = time.monotonic()

    def _remove(self, name: str) -> None:
        """The table first: without it the image is not complete."""
        for path in reversed(_paths(self.folder.path, name)):
            self.folder.remove(path)

    def _read(self) -> dict[str, Any]:
        """What the folder's manifest says; {} where there is none, or a damaged one, whose masks
        are set aside, because nobody knows of what they are."""
        path = self.folder.path / "manifest.json"
        if self.folder.is_listed(path) and path.is_file():
            try:
                return _check_manifest(files.read_json(path), path)
            except ValueError as error:
                _log.warning("%s", error)
            for name in self.folder.names():
                file = self.folder.path / name
                if name.endswith((".png", ".csv")) and Path(name).stem not in _OWN_FILES and (
                        file.is_file()):
                    self.folder.set_aside(file, "its manifest is damaged")
        return {}


def _check_manifest(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest itself; ValueError if it is none, or if its names lead out of the folder."""
    good = set(manifest) >= _KEYS and all(
        isinstance(manifest.get(key, {}), dict) and all(map(files.is_plain, manifest.get(key, {})))
        for key in _PROGRESS)
    if not good or not all(
            isinstance(one, dict) and isinstance(one.get("checksum"), str)
            and isinstance(one.get("heads"), int)
            and all(isinstance(one.get(key), dict) for key in _COUNTS)
            for one in manifest["images"].values()):
        raise ValueError(
            f"{path}: not a manifest of masks, which has the fields {', '.join(sorted(_KEYS))} and "
            "plain image names. Masks that it listed are set aside; make them anew")
    return manifest


def _paths(out: Path, name: str) -> tuple[Path, Path]:
    """Label map and table of an image."""
    return out / f"{name}.png", out / f"{name}.csv"


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make the masks of any image of a data set."""

    dataset: Any
    segmenter: Segmenter
    out: Path
    threads: int
    options: dict[str, Any]
    overwrite: bool

    def run(self, i: int) -> tuple[str, dict[str, Any] | None, str, dict[str, float]]:
        """Name, statistics, error (or "") and times of image i, whose masks are then stored."""
        name = self.dataset.ids[i]
        began = time.perf_counter()
        try:
            sample = self.dataset[i]
            options = dict(self.options)
            if options.pop("boxes", False):
                if sample.boxes is None:
                    raise ValueError("boxes: this data set has no head sizes; leave --boxes out")
                options["boxes"] = sample.boxes
            labels, table = generate_masks(
                sample.image, sample.points, self.segmenter, **options)
            took = {"seconds": time.perf_counter() - began}
            took |= getattr(self.segmenter, "seconds", {}) if len(table) else {}
            _write_masks(self.out, name, labels, table)
        except Exception as error:  # one broken image must not cost the night's other images
            return name, None, f"{type(error).__name__}: {error}", {}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if resource else 0.0
        found = _statistics(table, sample.repairs, self.segmenter)
        return name, found, "", {**took, "peak_mb": peak}


def _in_order(job: _Job, todo: list[int]) -> Iterator[tuple]:
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        for i in todo:
            yield job.run(i)
    finally:
        torch.set_num_threads(before)


def _in_parallel(job: _Job, todo: list[int], workers: int) -> Iterator[tuple]:
    """The results of all images, as they come. Where a worker process dies, nobody knows over which
    of the images under way: those that are left go on one at a time, and the next to die is named.
    Raises RuntimeError where one process after the other dies: then it is not the images.
    """
    left, deaths = list(todo), 0
    while left:
        if deaths > 2:
            raise RuntimeError(
                f"{job.out}: {deaths} worker processes in a row died before they finished an "
                "image, for want of memory or because the calling script lacks `if __name__ == "
                '"__main__":`. What is done is kept: run again with one worker')
        deaths += 1
        with ProcessPoolExecutor(
            min(workers, len(left)), mp_context=get_context("spawn"),
            initializer=_start_worker, initargs=(job,),
        ) as pool:
            futures = {pool.submit(_run_in_worker, i): i for i in left}
            try:
                for future in as_completed(futures):
                    if isinstance(future.exception(), BrokenProcessPool):
                        continue
                    left.remove(futures[future])
                    deaths = 0
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
        if left and workers == 1:
            yield (job.dataset.ids[left.pop(0)], None,
                   "a process died over it, most likely for want of memory", {})
        workers = 1


_job: _Job | None = None  # of this worker process


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    files.OutputFolder(job.out, overwrite=job.overwrite).join()
    torch.set_num_threads(job.threads)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed has nobody to work for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(i: int) -> tuple:
    return _job.run(i)


def _statistics(table: pd.DataFrame, repairs: dict[str, int], segmenter: Segmenter
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


def summary(out: str | os.PathLike, names: list[str]) -> str:
    """What became of the images `names` in a folder of masks, in a few lines."""
    path = Path(out) / "manifest.json"
    manifest = _check_manifest(files.read_json(path), path)
    done = [manifest["images"][name] for name in names if name in manifest["images"]]
    failed = [name for name in names if name in manifest["failed"]]
    heads = sum(one["heads"] for one in done)
    lines = [f"{len(done)} of {len(names)} images have masks, {len(failed)} failed"]
    for key in _COUNTS:
        total: dict[str, int] = {}
        for one in done:
            for word, count in one[key].items():
                total[word] = total.get(word, 0) + count
        if total:
            title = f"{heads} heads" if key == "sources" else key
            lines.append(f"{title}: " + ", ".join(f"{n} {word}" for word, n in total.items()))
    lines += [f"failed: {name}: {manifest['failed'][name]}" for name in failed]
    return "\n".join(lines)


def file_names(out: str | os.PathLike, dataset: Any) -> dict[str, str]:
    """Image name -> file name of all images with masks in a folder, `dataset` the last to come."""
    path = Path(out) / "manifest.json"
    known = {name: dataset.image_path(i).name for i, name in enumerate(dataset.ids)}
    images = _check_manifest(files.read_json(path), path)["images"]
    return {name: Path(one["file"]).name if "file" in one else known.get(name, name)
            for name, one in images.items()}


def read_masks(out: str | os.PathLike, name: str) -> np.ndarray:
    """The label map of image `name` from a folder made by `mask_dataset`: (H, W) int32.

    Raises FileNotFoundError if it is not there or not complete, ValueError if it is no label map.
    """
    path, _ = _paths(Path(out), name)
    if not is_complete(Path(out), name):
        raise FileNotFoundError(
            f"{path}: no complete masks of image {name} in {out}; run `xmask masks` for this "
            "data set (it goes on where it stopped)")
    return read_labels(path)


def _write_masks(out: Path, name: str, labels: np.ndarray, table: pd.DataFrame) -> None:
    if len(table) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(table)} heads do not fit a 16-bit label map (at most 65535)")
    picture, numbers = _paths(out, name)
    files.write_png(picture, labels.astype(np.uint16))
    files.write_text(numbers, table.to_csv(index=False, float_format="%.6g"))


def is_complete(out: Path, name: str) -> bool:
    """Whether image `name` has its masks in folder `out`."""
    return all(path.is_file() for path in _paths(out, name))
