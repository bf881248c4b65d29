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
from xmask.data.mask_manifest import (
    COUNTS,
    OWN_FILES,
    Manifest,
    check_manifest,
    paths_of,
    statistics,
    tries_of,
)
from xmask.edp_sam import ALGORITHM, generate_masks
from xmask.segmenters import Segmenter

try:
    import resource
except ImportError:  # Windows does not tell a process its peak memory
    resource = None

_TRIES = 3  # of an image whose worker dies
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
            manifest = Manifest(folder, request, dataset, segmenter, anew and not shard,
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


def _make(results: Generator[_Result], todo: list[int], manifest: Manifest, progress: bool
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
        torch.set_num_threads(self.threads)  # of this thread, which is not the one that begins
        name = self.dataset.ids[i]
        tries = tries_of(self.out, name)
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
        found = statistics(table, sample.repairs, self.segmenter)
        return name, found, "", {**took, "peak_mb": peak}


def _in_order(job: _Job, todo: list[int]) -> Generator[_Result]:
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        for i in todo:
            yield job.run(i)
    finally:
        torch.set_num_threads(before)


def summary(out: str | os.PathLike, names: list[str]) -> str:
    """What became of the images `names` in a folder of masks, in a few lines."""
    path = Path(out) / "manifest.json"
    manifest = check_manifest(files.read_json(path), path)
    done = [manifest["images"][name] for name in names if name in manifest["images"]]
    failed = [name for name in names if name in manifest["failed"]]
    heads = sum(one["heads"] for one in done)
    lines = [f"{len(done)} of {len(names)} images have masks, {len(failed)} failed"]
    for key in COUNTS:
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
    return check_manifest(files.read_json(path), path)["images"]


def read_masks(out: str | os.PathLike, name: str) -> np.ndarray:
    """The label map of image `name` from a folder made by `mask_dataset`: (H, W) int32.

    Raises FileNotFoundError if it is not there or not complete, ValueError if it is no label map.
    """
    path, _ = paths_of(Path(out), name)
    if not is_complete(Path(out), name):
        raise FileNotFoundError(
            f"{path}: no complete masks of image {name} in {out}; run `xmask masks` for this "
            "data set (it goes on where it stopped)")
    return read_labels(path)


def _write_masks(out: Path, name: str, labels: np.ndarray, table: pd.DataFrame) -> None:
    if len(table) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(table)} heads do not fit a 16-bit label map (at most 65535)")
    picture, numbers = paths_of(out, name)
    files.write_png(picture, labels.astype(np.uint16))
    files.write_text(numbers, table.to_csv(index=False, float_format="%.6g"))


def is_complete(out: Path, name: str) -> bool:
    """Whether image `name` has its masks in folder `out`."""
    return all(path.is_file() for path in paths_of(out, name))
