"""The masks of a whole data set as a folder of files, which grows image by image.

One image is `xmask.edp_sam.generate_masks`; here are its results on disk, what they were made
from, and how a run that was stopped goes on.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from xmask import files
from xmask.data.annotations import check_number
from xmask.data.images import read_labels
from xmask.edp_sam import ALGORITHM, generate_masks, source_names
from xmask.segmenters import Segmenter

try:
    import resource
except ImportError:  # Windows does not tell a process its peak memory
    resource = None

OWN_FILES = ("manifest", "times", "coco", "worst")  # beside the masks; no image's names
_KEYS = {"algorithm", "segmenter", "options", "dataset", "images", "failed"}  # of a manifest
_STATES = ("images", "failed", "todo")  # of an image; the rest is what all masks depend on
_OLD = "made anew: what is there is of an earlier request"  # noted where no checksum is to be
_COUNTS = ("sources", "flags", "repairs")  # what the manifest counts for every image
_TRIES = 3  # of an image whose worker dies
_PEAK_UNIT = 1 << (20 if sys.platform == "darwin" else 10)  # a MB, in what the system counts
_NOTE_EVERY = 10.0  # seconds between two writes of a growing manifest
#: index, statistics or why there are no masks, line of times.csv
_Result = tuple[int, "dict[str, Any] | str", dict[str, Any]]
_log = logging.getLogger("xmask")

# On record, options hold what nobody chose, too. Head sizes come from the samples, if wanted.
_DEFAULTS = {name: one.default for name, one in inspect.signature(generate_masks).parameters.items()
             if one.kind is one.KEYWORD_ONLY} | {"boxes": False}


class MasksFailed(RuntimeError):
    """Some images got no masks; the rest of the data set did."""


def mask_dataset(
    dataset: Any, indices: Iterable[int], segmenter: Segmenter, out: str | os.PathLike, *,
    workers: int = 1, threads: int = 1, scheduler: str = "", cluster: str = "", shard: str = "",
    progress: bool = True, depends: dict[str, Any] | None = None, other: str = "drop",
    overwrite: bool = False, wait: float = 0.0, **options: Any,
) -> Path:
    """Masks of many images as a folder; run again after an interruption, it goes on.

    dataset: a `xmask.data` dataset. indices: which of its images. options: of `generate_masks`;
    boxes=True takes the head sizes from the samples.
    workers: processes; above 1 they are spawned, so a script needs the usual
    `if __name__ == "__main__":`. threads: of the segmenter in each; its last bits may depend
    on this number, while no result depends on the number of workers. scheduler, cluster: workers
    on other machines, which see the same paths; as of `xmask.data.cluster.open_client`.
    shard: "2/5" makes every fifth image from the second on, in a process that knows nothing of
    those that make the others in the same `out`, and redoes none of theirs.
    depends: further facts that the masks depend on (JSON values, such as versions), stored as
    "depends".
    other: what becomes of masks of another request, that is, of other options or facts or another
    segmenter. "drop", for a folder that is only a store: those of `indices` are made anew, the
    rest is removed. "replace" makes them anew, too, but refuses where that would lose masks of
    further images. "refuse" always refuses.
    overwrite, wait: as of `files.OutputFolder`, which `out` is.

    Writes into `out`, per image, <id>.png (label map, 16-bit grey) and then <id>.csv (table),
    each in one move, so that an image with both is complete whenever the process is stopped.
    manifest.json holds what all masks depend on (algorithm, segmenter, every option, settings of
    the data set), and of each image its checksum, statistics and repairs, or why it failed, or
    that it is still to do. times.csv has the seconds and memory (MB) of the images of this call.
    Images complete under the same manifest are skipped unless their own checksum changed (of a
    data set: name, height, width, annotation; edited pixels go unseen) or a file of theirs was
    damaged; other files than the folder's own are left alone. Masks that are made anew stay until
    the new ones are written.

    Returns `out`. Raises MasksFailed at the end if any image failed, which stops no other; at once
    what `files.OutputFolder` does, or ValueError for a name that no image can have there.
    """
    if not (1 <= workers <= 1024 and 1 <= threads <= 1024):
        raise ValueError(f"workers, threads: {workers}, {threads}; each has to be 1 or more, and "
                         "at most 1024")
    out, indices = Path(out), part_of(indices, shard)
    names = [dataset.ids[i] for i in indices]
    _check_names(names, out)
    request = json.loads(json.dumps({
        "algorithm": ALGORITHM, "segmenter": segmenter.describe(),
        "options": {**_DEFAULTS, **options}, "dataset": dataset.settings,
        **({} if depends is None else {"depends": depends})}))
    job = _Job(dataset, segmenter, request["segmenter"], out, threads, options, overwrite)
    with ExitStack() as stack:
        client = None
        if scheduler or cluster:  # before anything is written
            from xmask.data.cluster import open_client
            client = stack.enter_context(open_client(workers, scheduler, cluster))
        folder = stack.enter_context(files.OutputFolder(
            out, overwrite=overwrite, shard=shard, wait=wait))
        manifest = _Manifest(folder, request, dataset, segmenter,
                             indices if shard else range(len(dataset)))
        for i in indices if shard else ():  # it takes a while, and others need not wait for it
            manifest.checksum(i)
        with folder.alone():
            todo = manifest.begin(indices, "refuse" if shard else other)
        if todo and (workers > 1 or client):
            from xmask.data.cluster import open_client, work
            client = client or stack.enter_context(open_client(min(workers, len(todo))))
            _make(work(client, job, todo, job.state), len(todo), manifest, progress)
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            _make((job.run(i) for i in todo), len(todo), manifest, progress)
    failed = manifest.all_of("failed")
    if mine := [name for name in names if name in failed]:
        raise MasksFailed(
            f"{out}: masks failed for {len(mine)} of {len(names)} images, the first {mine[0]} "
            f"({failed[mine[0]]}); all are listed in {out / 'manifest.json'}. The others are done: "
            "mend these and run again")
    return out


def _check_names(names: list[str], out: Path) -> None:
    """Raises ValueError for names that the files of an image cannot have, or not twice."""
    taken = dict.fromkeys(OWN_FILES, f"{out} has files of its own with this name "
                                     f"({', '.join(OWN_FILES)} are taken)")
    for name in names:
        why = taken.get(name.lower()) if files.is_plain(name) else "not a file name"
        if why:
            raise ValueError(f"image {name!r}: {why}; rename the image and its annotation")
        taken[name.lower()] = f"{name!r} has the same name, and so would its masks"


def part_of(indices: Iterable[int], shard: str = "") -> list[int]:
    """The indices of a shard: of "2/3" every third, from the second on. ValueError for none."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", shard or "1/1")
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(f"shard: {shard!r}; 1/4 to 4/4 are the four shards of a data set")
    return list(indices)[int(found[1]) - 1::int(found[2])]


class _Manifest:
    """The manifest of a folder while masks are made. Of each image it knows a state, and what is
    noted: "images" are done (checksum, statistics), "failed" (why), or "todo": these were begun
    (checksum), and a killed process may have finished them.

    request: what all masks depend on. own: the images of `dataset` that this process looks at;
    those of other shards have processes of their own.
    """

    def __init__(self, folder: files.OutputFolder, request: dict[str, Any], dataset: Any,
                 segmenter: Segmenter, own: Iterable[int]) -> None:
        self.folder, self.request, self.segmenter = folder, request, segmenter
        self.dataset, self.ids, self.own = dataset, dataset.ids, {dataset.ids[i]: i for i in own}
        self.checksum = functools.cache(dataset.image_checksum)
        self._known: dict[str, tuple[str, Any]] = {}  # image name -> state, what is noted

    def all_of(self, state: str) -> dict[str, Any]:
        """Name -> what is noted, of the images in a state."""
        return {name: noted for name, (one, noted) in self._known.items() if one == state}

    def begin(self, indices: list[int], other: str) -> list[int]:
        """Take over what the folder holds; returns which of the images `indices` are to be made.

        other: as of `mask_dataset`. Raises ValueError, unless it is "drop", rather than lose masks
        of another request, or, if it is "refuse", of another photo of the same name.
        """
        folder, wanted = self.folder, set(indices)
        before, self._known = self._read()
        if before != self.request:
            self._leave(before, {self.ids[i] for i in wanted}, other)
        for name, noted in self.all_of("images").items():
            if name not in self.own:
                if not folder.shard:
                    self._check_other(name)
            elif noted["checksum"] != (now := self._identity(self.own[name]))["checksum"]:
                if other == "refuse" and noted.get("file") not in (None, now.get("file")):
                    raise ValueError(
                        f"{now.get('file')}: {folder.path} holds masks of {noted['file']}, which "
                        "has the same name. Rename one of the two, give another folder (--out), "
                        "or --overwrite to replace them")
                if self.own[name] not in wanted:
                    self._remove(name)
                del self._known[name]
        todo = [i for i in indices if self._is_to_make(i)]
        self.write()
        return todo

    def _leave(self, before: dict[str, Any], wanted: set[str], other: str) -> None:
        """The request is another one than that of the folder, `before`: its masks count no longer.
        Those of images that are not `wanted` go, if `other` allows it; see `begin`."""
        folder = self.folder
        held = [name for name in {**self.all_of("images"), **self.all_of("todo")}
                if any(map(folder.is_intact, _paths(folder.path, name)))]
        lost = [name for name in held if name not in wanted]
        if lost if other == "replace" else other == "refuse" and (
                held or (folder.shard and self.all_of("todo"))):
            differ = [{"depends": "version of xmask"}.get(key, key) for key in
                      {**self.request, **before} if before.get(key) != self.request.get(key)]
            remedy = ("--overwrite to make masks anew in this one" if other == "refuse" else
                      f"make those of all anew: {lost[0]} is not among the images of this call")
            raise ValueError(
                f"{folder.path}: holds masks of {len(held)} images that were made with another "
                f"{' and '.join(differ)}. Give another folder (--out), or {remedy}")
        # Removed before the new manifest is there: stopped in between, the old one is still true
        # of what is left.
        for name in lost:
            self._remove(name)
        self._known = {}

    def _check_other(self, name: str) -> None:
        """An image that this call does not see: are its masks as they were?"""
        bad = [path.name for path in _paths(self.folder.path, name)
               if not self.folder.is_intact(path)]
        if bad:
            del self._known[name]
            _log.warning("%s: %s not as xmask wrote it, so the masks of %s count no longer; make "
                         "them again", self.folder.path, " and ".join(bad), name)

    def _is_to_make(self, i: int) -> bool:
        """Whether an image still needs masks; if so, nothing of the user's is in their place."""
        name, folder = self.ids[i], self.folder
        paths, (state, noted) = _paths(folder.path, name), self._known.get(name, ("", None))
        whole = all(map(folder.is_intact, paths))
        if whole:
            if state == "images":
                return False
            if state == "todo" and noted == self.checksum(i):
                with suppress(OSError, ValueError):  # a broken image is to fail as any other
                    table = pd.read_csv(paths[1], keep_default_na=False)
                    self.note(i, _statistics(table, self.dataset[i].repairs, self.segmenter))
                    return False
        try:
            if not whole:
                self._remove(name)
            for path in paths:
                folder.make_way(path)
        except FileExistsError as error:
            self.note(i, str(error))
            return False
        # Old masks stay until the new ones are there, and are not to be taken for them.
        self._known[name] = "todo", _OLD if whole else self.checksum(i)
        _tries(folder.path, name).unlink(missing_ok=True)
        return True

    def note(self, i: int, found: dict[str, Any] | str) -> None:
        """What became of image i: its statistics, or why it failed."""
        self._known[self.ids[i]] = (("failed", found) if isinstance(found, str) else
                                    ("images", {**self._identity(i), **found}))

    def _identity(self, i: int) -> dict[str, str]:
        """Checksum and, of an own photo, file; images of a data set are known by their names."""
        source = getattr(self.dataset, "source", None)
        return {"checksum": self.checksum(i), **({"file": source(i)} if source else {})}

    def write(self) -> None:
        """Store it: images of earlier calls, then those of this data set, in its order."""
        if self.folder.shard:  # of the others, what their processes have noted since
            mine = {name: self._known[name] for name in self.own if name in self._known}
            self._known = {name: one for name, one in self._read()[1].items()
                           if name not in self.own} | mine
        place = {name: k for k, name in enumerate(self.ids)}
        self._known = dict(sorted(self._known.items(), key=lambda one: place.get(one[0], -1)))
        files.write_json(self.folder.path / "manifest.json",
                         self.request | {state: self.all_of(state) for state in _STATES})

    def _remove(self, name: str) -> None:
        """What is as we wrote it; the table first: without it the image is not complete."""
        for path in reversed(_paths(self.folder.path, name)):
            if self.folder.is_intact(path):
                self.folder.remove(path)

    def _read(self) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
        """Request and states of images in the folder's manifest; nothing of a damaged one, whose
        masks are set aside, as nobody knows of what they are."""
        folder, path, stored = self.folder, self.folder.path / "manifest.json", {}
        if folder.is_listed(path) and path.is_file():
            try:
                stored = read_manifest(folder.path)
            except ValueError as error:
                _log.warning("%s", error)
                for name in dict.fromkeys(Path(one).stem for one in folder.names()):
                    paths = _paths(folder.path, name)
                    if name not in OWN_FILES and all(map(folder.is_intact, paths)):
                        for one in paths:
                            folder.set_aside(one, "its manifest is damaged")
        known = {name: (state, noted) for state in _STATES
                 for name, noted in stored.pop(state, {}).items()}
        return stored, known


def _make(results: Generator[_Result], total: int, manifest: _Manifest, progress: bool) -> None:
    """Note every image as its masks are made."""
    times, noted = [], time.monotonic()
    try:
        with closing(results):  # before what it works with is closed
            for i, found, line in tqdm(results, desc="masks", unit="image", total=total,
                                       disable=not progress):
                manifest.note(i, found)
                if line:
                    times.append(line)
                else:
                    tqdm.write(f"masks of {manifest.ids[i]} failed: {found}", file=sys.stderr)
                if time.monotonic() - noted > _NOTE_EVERY:
                    with manifest.folder.alone():
                        manifest.write()
                    noted = time.monotonic()
    finally:
        with manifest.folder.alone():
            manifest.write()
            _write_times(manifest.folder, times)


def _write_times(folder: files.OutputFolder, times: list[dict[str, Any]]) -> None:
    """times.csv of this call; of all shards, which are one call in pieces."""
    path = folder.path / "times.csv"
    if not times and folder.is_intact(path):
        return
    made = pd.DataFrame(times) if times else pd.DataFrame(columns=["image", "heads", "seconds"])
    if folder.shard and folder.is_intact(path) and path.stat().st_size > 1:
        before = pd.read_csv(path, dtype={"image": str}, keep_default_na=False)
        made = pd.concat([before[~before["image"].isin(made["image"])], made])
    files.write_text(path, made.to_csv(index=False, float_format="%.3f"))


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make the masks of any image of a data set."""

    dataset: Any
    segmenter: Segmenter
    described: dict[str, Any]
    out: Path
    threads: int
    options: dict[str, Any]
    overwrite: bool

    def begin(self) -> None:
        """In a worker, before its first image."""
        files.OutputFolder(self.out, overwrite=self.overwrite).join()
        found = json.loads(json.dumps(self.segmenter.describe()))
        if found != self.described:
            raise ValueError(f"the segmenter of a worker is another one, {found}, than that of "
                             f"this process, {self.described}. Give both the same weights and the "
                             "same version of xmask")

    def end(self) -> None:
        """Nothing: an image that is begun is made to its end."""

    def state(self) -> tuple[int, ...]:
        """Changes whenever a worker has begun or written something."""
        hidden = self.out / files.HIDDEN
        return tuple(sum(one.stat().st_size for one in hidden.glob(pattern))
                     for pattern in ("record.jsonl", "trying/*"))

    def run_in_worker(self, i: int) -> _Result:
        """As `run`; an image over which workers died is tried three times."""
        tries = _tries(self.out, self.dataset.ids[i])
        tries.parent.mkdir(exist_ok=True)
        with open(tries, "ab") as file:
            if file.tell() >= _TRIES:
                return i, f"{_TRIES} processes died over it, most likely for want of memory", {}
            file.write(b"x")
        found = self.run(i)
        tries.unlink(missing_ok=True)
        return found

    def run(self, i: int) -> _Result:
        """Make and store the masks of image i."""
        torch.set_num_threads(self.threads)  # of this thread; a worker begins in another one
        name, options, began = self.dataset.ids[i], dict(self.options), time.perf_counter()
        try:
            sample = self.dataset[i]
            if options.pop("boxes", False):
                if sample.boxes is None:
                    raise ValueError("boxes: this data set has no head sizes; leave --boxes out")
                options["boxes"] = sample.boxes
            check_number(len(sample.points), name)
            labels, table = generate_masks(
                sample.image, sample.points, self.segmenter, **options)
            line = {"image": name, "heads": len(table), "seconds": time.perf_counter() - began}
            line |= getattr(self.segmenter, "seconds", {}) if len(table) else {}
            picture, numbers = _paths(self.out, name)
            with files.replacing(numbers) as rows, files.replacing(picture) as pixels:
                rows.write_text(table.to_csv(index=False, float_format="%.6g"), "utf-8", newline="")
                Image.fromarray(labels.astype(np.uint16)).save(pixels, "PNG")
                # what is old goes once all that is new found room on the disk; the table first,
                # as no old one is to stand beside a new label map
                if folder := files.OutputFolder.around(numbers):
                    folder.remove(numbers)
        except Exception as error:  # one broken image must not cost the night's other images
            return i, f"{type(error).__name__}: {error}", {}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
        line["peak_mb"] = peak / _PEAK_UNIT
        return i, _statistics(table, sample.repairs, self.segmenter), line


def _statistics(table: pd.DataFrame, repairs: dict[str, int], segmenter: Segmenter) -> dict:
    """What the manifest says about an image."""
    # as the table on disk says it, so that a number does not depend on who reads it
    score = table["score"].map("{:.6g}".format).astype(float).mean()
    return {
        "heads": len(table),
        "sources": {one: int((table["source"] == one).sum()) for one in source_names(segmenter)},
        "flags": dict(sorted(Counter(" ".join(table["flags"]).split()).items())),
        "score": float(f"{score:.4f}") if len(table) else None,
        "repairs": {name: int(count) for name, count in repairs.items()},
    }


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """manifest.json of a folder of masks; ValueError if it is none, or leads out of the folder."""
    path = Path(folder) / "manifest.json"
    manifest = files.read_json(path)
    # By hand: pydantic takes no text with the bytes of names that are not UTF-8.
    if not (set(manifest) >= _KEYS
            and all(isinstance(part, dict) and all(map(files.is_plain, part))
                    for part in (manifest.get(state, {}) for state in _STATES))
            and all(isinstance(noted, dict) and isinstance(noted.get("checksum"), str)
                    and isinstance(noted.get("heads"), int)
                    and isinstance(noted.get("file", ""), str)
                    and all(isinstance(counts, dict) and set(map(type, counts.values())) <= {int}
                            for counts in map(noted.get, _COUNTS))
                    for noted in manifest["images"].values())):
        raise ValueError(
            f"{path}: not a manifest of masks, which has the fields {', '.join(sorted(_KEYS))} and "
            "plain image names. Masks that it listed are set aside; make them anew")
    return manifest


def summary(out: str | os.PathLike, names: list[str]) -> str:
    """What became of the images `names` in a folder of masks, in a few lines."""
    manifest = read_manifest(out)
    done = [manifest["images"][name] for name in names if name in manifest["images"]]
    failed = [f"failed: {name}: {manifest['failed'][name]}" for name in names
              if name in manifest["failed"]]
    lines = [f"{len(done)} of {len(names)} images have masks, {len(failed)} failed"]
    for key in _COUNTS:
        total = pd.DataFrame([one[key] for one in done]).sum()
        if len(total):
            title = f"{sum(one['heads'] for one in done)} heads" if key == "sources" else key
            lines.append(f"{title}: " + ", ".join(f"{n:.0f} {word}" for word, n in total.items()))
    return "\n".join(lines + failed)


def file_names(out: str | os.PathLike, dataset: Any) -> dict[str, str]:
    """Image name -> file name of all images with masks in a folder, `dataset` the last to come."""
    known = {name: dataset.image_path(i) for i, name in enumerate(dataset.ids)}
    return {name: Path(one.get("file", known.get(name, name))).name
            for name, one in read_manifest(out)["images"].items()}


def read_masks(out: str | os.PathLike, name: str) -> np.ndarray:
    """The label map of image `name` from a folder made by `mask_dataset`: (H, W) int32.

    Raises FileNotFoundError if it is not there or not complete, ValueError if it is no label map.
    """
    paths = _paths(Path(out), name)
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"{paths[0]}: no complete masks of image {name} in {out}; run `xmask masks` for this "
            "data set (it goes on where it stopped)")
    return read_labels(paths[0])


def _paths(out: Path, name: str) -> tuple[Path, Path]:
    """Label map and table of image `name` in the folder `out`."""
    return out / f"{name}.png", out / f"{name}.csv"


def _tries(out: Path, name: str) -> Path:
    """Holds a byte for every worker that began with an image and did not come to its end."""
    return out / files.HIDDEN / "trying" / name
