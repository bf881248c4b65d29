"""The masks of a whole data set as a folder of files, which grows image by image.

One image is `xmask.edp_sam.generate_masks`; here are its results on disk, what they were made
from, and how a run that was stopped goes on.
"""

from __future__ import annotations

import inspect
import json
import os
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
from PIL import Image
from tqdm.auto import tqdm

from xmask import files
from xmask.edp_sam import ALGORITHM, generate_masks, source_names
from xmask.segmenters import Segmenter

try:
    import resource
except ImportError:  # Windows does not tell a process its peak memory
    resource = None

_NOTE_EVERY = 10.0  # seconds between two writes of a growing manifest
_ABANDONED = 3600.0  # seconds after which a half-written file is nobody's
_OWN_FILES = ("manifest", "times", "coco", "worst")  # beside the masks; no image's names
_PROGRESS = ("images", "failed", "todo")  # of a manifest; the rest is what masks depend on
_KEYS = {"algorithm", "segmenter", "options", "dataset", "images", "failed"}

# On record, options hold what nobody chose, too. Head sizes come from the samples, if wanted.
_DEFAULTS = {name: one.default for name, one in inspect.signature(generate_masks).parameters.items()
             if one.kind is one.KEYWORD_ONLY} | {"boxes": False}


class MasksFailed(RuntimeError):
    """Some images got no masks; the rest of the data set did."""


def mask_dataset(
    dataset: Any, indices: Iterable[int], segmenter: Segmenter, out: str | os.PathLike, *,
    workers: int = 1, threads: int = 1, progress: bool = True,
    depends: dict[str, Any] | None = None, **options: Any,
) -> Path:
    """Masks of many images as a folder; run again after an interruption, it goes on.

    dataset: a `xmask.data` dataset. indices: which of its images. options: of `generate_masks`;
    boxes=True takes the head sizes from the samples.
    workers: processes; above 1 they are spawned, so a script needs the usual
    `if __name__ == "__main__":`. threads: of the segmenter in each; its last bits may depend
    on this number, while no result depends on the number of workers.
    depends: further facts that the masks depend on (JSON values, such as versions): masks made
    under other ones are made anew. They are stored as "depends".

    Writes into `out`, per image, <id>.png (label map, 16-bit grey) and then <id>.csv (table),
    each in one move, so that an image with both is complete whenever the process is stopped.
    manifest.json holds what all masks depend on (algorithm, segmenter, every option, settings of
    the data set), and for each image its checksum, statistics, and what was repaired in its
    annotation, or why it failed, or that it is still to do.
    Images complete under the same manifest are skipped unless their own checksum changed; masks
    that the manifest of another request lists are removed, other files are left alone.
    times.csv tells how long the images of this call took, and the memory used.

    Returns `out`. An image that fails does not stop the others.
    Raises MasksFailed at the end if any failed, and ValueError at once if `out` holds pictures
    or tables without a manifest of ours: that is somebody else's folder; or if an image has the
    name of a file that this package writes beside the masks.
    """
    if workers < 1 or threads < 1:
        raise ValueError(f"workers, threads: {workers}, {threads}; each has to be 1 or more")
    out = Path(out)
    indices = list(indices)
    chosen = {dataset.ids[i] for i in indices}
    for name in sorted(chosen):
        if name.lower() in _OWN_FILES:
            raise ValueError(
                f"image {name}: {out} has files of its own with this name ("
                f"{', '.join(_OWN_FILES)} are taken); rename the image and its annotation")
    out.mkdir(parents=True, exist_ok=True)
    request = json.loads(json.dumps({
        "algorithm": ALGORITHM, "segmenter": segmenter.describe(),
        "options": {**_DEFAULTS, **options}, "dataset": dataset.settings,
        **({} if depends is None else {"depends": depends})}))
    manifest = _read_manifest(out)
    _remove_abandoned(out)
    statistics: dict[str, Any] = dict(manifest.get("images", {}))
    failures: dict[str, str] = dict(manifest.get("failed", {}))
    # Checksums of what was begun: a process that is killed leaves masks that it has not noted.
    begun: dict[str, str] = dict(manifest.get("todo", {}))
    if {key: value for key, value in manifest.items() if key not in _PROGRESS} != request:
        # Removed before the new manifest is there: stopped in between, the old one is still
        # true of what is left.
        for name in (*statistics, *failures, *begun):
            _remove_masks(out, name)
        statistics, failures, begun = {}, {}, {}
    checksums = {name: dataset.image_checksum(i) for i, name in enumerate(dataset.ids)
                 if name in chosen or name in statistics}
    for name in list(statistics):
        if name in checksums and statistics[name]["checksum"] != checksums[name]:
            _remove_masks(out, name)
            del statistics[name]
    todo = []
    for i in indices:
        name = dataset.ids[i]
        failures.pop(name, None)
        if is_complete(out, name) and name in statistics:
            continue
        if is_complete(out, name) and begun.get(name) == checksums[name]:
            table = pd.read_csv(out / f"{name}.csv", keep_default_na=False)
            statistics[name] = {"checksum": checksums[name],
                                **_statistics(table, dataset[i].repairs, segmenter)}
            continue
        statistics.pop(name, None)
        _remove_masks(out, name)  # so that no old table stands beside a new label map
        begun[name] = checksums[name]
        todo.append(i)
    order = list(dict.fromkeys((*dataset.ids, *statistics, *failures, *begun)))
    times: list[dict[str, Any]] = []

    def note() -> None:
        files.write_json(out / "manifest.json", {
            **request,
            "images": {name: statistics[name] for name in order if name in statistics},
            "failed": {name: failures[name] for name in order if name in failures},
            "todo": {name: begun[name] for name in order
                     if name in begun and name not in statistics and name not in failures}})

    note()
    job = _Job(dataset, segmenter, out, threads, options)
    noted = time.monotonic()
    results = _in_order(job, todo) if workers == 1 else _in_parallel(job, todo, workers)
    try:
        for name, found, error, took in tqdm(
                results, desc="masks", unit="image", total=len(todo), disable=not progress):
            if error:
                failures[name] = error
                tqdm.write(f"masks of {name} failed: {error}")
            else:
                statistics[name] = {"checksum": checksums[name], **found}
                times.append({"image": name, "heads": found["heads"], **took})
            if time.monotonic() - noted > _NOTE_EVERY:
                note()
                noted = time.monotonic()
    finally:
        note()
        files.write_text(out / "times.csv", pd.DataFrame(times).to_csv(
            index=False, float_format="%.3f"))
    failed = [name for name in order if name in failures and name in chosen]
    if failed:
        raise MasksFailed(
            f"{out}: masks failed for {len(failed)} of {len(indices)} images, the first "
            f"{failed[0]} ({failures[failed[0]]}); all are listed in {out / 'manifest.json'}. The "
            "others are done: mend these and run again")
    return out


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make the masks of any image of a data set."""

    dataset: Any
    segmenter: Segmenter
    out: Path
    threads: int
    options: dict[str, Any]

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
    manifest = files.read_json(Path(out) / "manifest.json")
    done = [manifest["images"][name] for name in names if name in manifest["images"]]
    failed = [name for name in names if name in manifest["failed"]]
    heads = sum(one["heads"] for one in done)
    lines = [f"{len(done)} of {len(names)} images have masks, {len(failed)} failed"]
    for key in ("sources", "flags", "repairs"):
        total: dict[str, int] = {}
        for one in done:
            for word, count in one[key].items():
                total[word] = total.get(word, 0) + count
        if total:
            title = f"{heads} heads" if key == "sources" else key
            lines.append(f"{title}: " + ", ".join(f"{n} {word}" for word, n in total.items()))
    lines += [f"failed: {name}: {manifest['failed'][name]}" for name in failed]
    return "\n".join(lines)


def read_masks(out: str | os.PathLike, name: str) -> np.ndarray:
    """The label map of image `name` from a folder made by `mask_dataset`: (H, W) int32.

    Raises FileNotFoundError if it is not there or not complete, ValueError if it is no label map.
    """
    path = Path(out) / f"{name}.png"
    if not is_complete(Path(out), name):
        raise FileNotFoundError(
            f"{path}: no complete masks of image {name} in {out}; run `xmask masks` for this "
            "data set (it goes on where it stopped)")
    try:
        with Image.open(path) as picture:
            labels = np.asarray(picture)
    except OSError as error:
        raise ValueError(
            f"{path}: not a readable PNG ({error}); delete it and run `xmask masks` again"
        ) from None
    if labels.ndim != 2 or labels.dtype == np.uint8:
        raise ValueError(
            f"{path}: expected a 16-bit grey label map, found {labels.dtype} {labels.shape}; "
            "delete it and run `xmask masks` again")
    return labels.astype(np.int32)


def _write_masks(out: Path, name: str, labels: np.ndarray, table: pd.DataFrame) -> None:
    if len(table) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(table)} heads do not fit a 16-bit label map (at most 65535)")
    files.write_png(out / f"{name}.png", labels.astype(np.uint16))
    files.write_text(out / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))


def is_complete(out: Path, name: str) -> bool:
    """Whether image `name` has its masks in folder `out`."""
    return (out / f"{name}.csv").is_file() and (out / f"{name}.png").is_file()


def _remove_masks(out: Path, name: str) -> None:
    """The table first: without it the image is not complete."""
    for kind in ("csv", "png"):
        (out / f"{name}.{kind}").unlink(missing_ok=True)


def _remove_abandoned(out: Path) -> None:
    """Half-written files of a process that was killed; a young one may be written right now."""
    for half in out.glob(".partial-*"):
        try:
            abandoned = time.time() - half.stat().st_mtime > _ABANDONED
        except FileNotFoundError:  # its process has just finished it
            continue
        if abandoned:
            half.unlink(missing_ok=True)


def _read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a folder of masks, {} for a folder that holds none of ours or others'."""
    path = out / "manifest.json"
    foreign = sorted(path for kind in ("png", "csv") for path in out.glob(f"*.{kind}")
                     if not path.name.startswith(".partial-"))
    if not path.is_file():
        if foreign:
            raise ValueError(
                f"{out}: holds {foreign[0].name} but no manifest.json, so it was not made by this "
                "step; give a new or empty folder")
        return {}
    try:
        manifest = files.read_json(path)
    except ValueError:
        if foreign:
            raise ValueError(
                f"{path}: not readable, so nobody knows whether {foreign[0].name} beside it was "
                "made by this step; give a new or empty folder, or empty this one") from None
        return {}
    if not isinstance(manifest, dict) or not _KEYS <= set(manifest):
        raise ValueError(
            f"{path}: not a manifest of this step, which has the fields "
            f"{', '.join(sorted(_KEYS))}; give a new or empty folder")
    return manifest
