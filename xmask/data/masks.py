"""The masks of a whole data set as a folder of files, which grows image by image.

One image is `xmask.edp_sam.generate_masks`; here are its results on disk, what they were made
from, and how a run that was stopped goes on.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
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

_TRIES = 3  # of an image whose worker dies
_NOTE_EVERY = 10.0  # seconds between two writes of a growing manifest
OWN_FILES = ("manifest", "times", "coco", "worst")  # beside the masks; no image's names
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
    workers: int = 1, threads: int = 1, scheduler: str = "", cluster: str = "", shard: str = "",
    progress: bool = True,
    depends: dict[str, Any] | None = None, anew: bool = True, overwrite: bool = False,
    wait: float = 0.0, **options: Any,
) -> Path:
    """Masks of many images as a folder; run again after an interruption, it goes on.

    dataset: a `xmask.data` dataset. indices: which of its images. options: of `generate_masks`;
    boxes=True takes the head sizes from the samples.
    workers: processes; above 1 they are spawned, so a script needs the usual
    `if __name__ == "__main__":`. threads: of the segmenter in each; its last bits may depend
    on this number, while no result depends on the number of workers. scheduler, cluster: workers
    on other machines, as of `xmask.data.cluster.open_client`; all see `out` and the images under
    the same paths.
    shard: "2/5" makes the second fifth of the images, in a process of its own that knows nothing
    of the others; all write into the same `out`, and none of another shard's images is redone.
    depends: further facts that the masks depend on (JSON values, such as versions): masks made
    under other ones are made anew. They are stored as "depends".
    anew: False refuses, instead, where the folder's masks were made under another request.
    overwrite, wait: as of `files.OutputFolder`, which `out` is.

    Writes into `out`, per image, <id>.png (label map, 16-bit grey) and then <id>.csv (table),
    each in one move, so that an image with both is complete whenever the process is stopped.
    manifest.json holds what all masks depend on (algorithm, segmenter, every option, settings of
    the data set), and for each image its checksum, statistics, and what was repaired in its
    annotation, or why it failed, or that it is still to do.
    Images complete under the same manifest are skipped unless their own checksum changed (of a
    data set: name, height, width, annotation; edited pixels go unseen) or a file of theirs was
    damaged; other files than the folder's own are left alone.
    times.csv tells how long the images of this call took, and the memory used.

    Returns `out`. An image that fails does not stop the others.
    Raises MasksFailed at the end if any failed, and at once what `files.OutputFolder` does, or
    ValueError if an image has the name of a file that this package writes beside the masks.
    """
    if not (1 <= workers <= 1024 and 1 <= threads <= 1024):
        raise ValueError(f"workers, threads: {workers}, {threads}; each has to be 1 or more, and "
                         "at most 1024")
    out, indices = Path(out), part_of(indices, shard)
    _check_names([dataset.ids[i] for i in indices], out)
    request = json.loads(json.dumps({
        "algorithm": ALGORITHM, "segmenter": segmenter.describe(),
        "options": {**_DEFAULTS, **options}, "dataset": dataset.settings,
        **({} if depends is None else {"depends": depends})}))
    with ExitStack() as stack:
        client = None
        if scheduler or cluster:  # before anything is written
            from xmask.data.cluster import open_client
            client = stack.enter_context(open_client(workers, scheduler, cluster))
        folder = stack.enter_context(files.OutputFolder(
            out, overwrite=overwrite, shard=shard, wait=wait))
        # reading all images takes a while, and the others need not wait for it
        known = {dataset.ids[i]: dataset.image_checksum(i) for i in indices} if shard else {}
        with folder.alone():
            manifest = _Manifest(folder, request, dataset, segmenter, anew and not shard,
                                 indices, known)
            todo = [i for i in indices if manifest.begins(i)]
            manifest.write()
        job = _Job(dataset, segmenter, request["segmenter"], out, threads, options, overwrite)
        if not todo or workers == 1 and not client:
            _make(_in_order(job, todo), todo, manifest, progress)
        else:
            from xmask.data.cluster import open_client, work
            client = client or stack.enter_context(open_client(min(workers, len(todo))))
            _make(work(client, job, todo, job.state), todo, manifest, progress)
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
        if name.lower() in OWN_FILES:
            raise ValueError(
                f"image {name}: {out} has files of its own with this name ("
                f"{', '.join(OWN_FILES)} are taken); rename the image and its annotation")
        if name.lower() in seen:
            raise ValueError(f"image {name}: {seen[name.lower()]} has the same name, and so would "
                             "its masks; rename one of the two")
        seen[name.lower()] = name


def part_of(indices: Iterable[int], shard: str = "") -> list[int]:
    """The indices of one shard, "1/3" to "3/3", every third of them; "" is all.

    Raises ValueError for what is no shard.
    """
    if not shard:
        return list(indices)
    found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", shard)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(f"shard: {shard!r}; 1/4 to 4/4 are the four shards of a data set")
    return list(indices)[int(found[1]) - 1::int(found[2])]


def _make(results: Generator[_Result], todo: list[int], manifest: _Manifest, progress: bool
          ) -> None:
    """Note every image as its masks are made."""
    times: list[dict[str, Any]] = []
    try:
        for name, found, error, took in tqdm(
                results, desc="masks", unit="image", total=len(todo), disable=not progress):
            manifest.ends(name, found, error)
            if error:
                tqdm.write(f"masks of {name} failed: {error}", file=sys.stderr)
            else:
                times.append({"image": name, "heads": found["heads"], **took})
    finally:
        results.close()  # before what it works with is closed
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
        made = pd.concat([before[~before["image"].isin({one["image"] for one in times})], made])
    files.write_text(path, made.to_csv(index=False, float_format="%.3f"))


class _Manifest:
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
        _tries(folder.path, name).unlink(missing_ok=True)
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
                if name.endswith((".png", ".csv")) and Path(name).stem not in OWN_FILES and (
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
            and isinstance(one.get("file", ""), str)
            and all(isinstance(one.get(key), dict)
                    and all(isinstance(n, int) for n in one[key].values()) for key in _COUNTS)
            for one in manifest["images"].values()):
        raise ValueError(
            f"{path}: not a manifest of masks, which has the fields {', '.join(sorted(_KEYS))} and "
            "plain image names. Masks that it listed are set aside; make them anew")
    return manifest


def _paths(out: Path, name: str) -> tuple[Path, Path]:
    """Label map and table of an image."""
    return out / f"{name}.png", out / f"{name}.csv"


def _tries(out: Path, name: str) -> Path:
    """Holds a byte for every worker that began with an image and did not come to its end."""
    return out / files.HIDDEN / "trying" / name


_Result = tuple[str, "dict[str, Any] | None", str, dict[str, float]]  # see `_Job.run`


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
        torch.set_num_threads(self.threads)
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
        name = self.dataset.ids[i]
        tries = _tries(self.out, name)
        tries.parent.mkdir(exist_ok=True)
        with open(tries, "ab") as file:
            if file.tell() >= _TRIES:
                return name, None, (f"{_TRIES} processes died over it, most likely for want of "
                                    "memory"), {}
            file.write(b"x")
        found = self.run(i)
        tries.unlink(missing_ok=True)
        return found

    def run(self, i: int) -> _Result:
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


def _in_order(job: _Job, todo: list[int]) -> Generator[_Result]:
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        for i in todo:
            yield job.run(i)
    finally:
        torch.set_num_threads(before)


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
    known = {name: dataset.image_path(i).name for i, name in enumerate(dataset.ids)}
    return {name: Path(one["file"]).name if "file" in one else known.get(name, name)
            for name, one in masked(out).items()}


def masked(out: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Name -> what the manifest says, of all images with masks in a folder."""
    path = Path(out) / "manifest.json"
    return _check_manifest(files.read_json(path), path)["images"]


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
