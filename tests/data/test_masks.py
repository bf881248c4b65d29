"""The masks of a whole data set: complete or absent, made once, and nothing else touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pandas as pd
import pytest
import torch
from distributed import Client, LocalCluster, Reschedule, get_client, get_worker
from PIL import Image

from tests.test_edp_sam import picture
from tests.warm import Program, forked_workers
from xmask import files, memory
from xmask.data import cluster
from xmask.data import masks as store
from xmask.data.masks import MasksFailed, mask_dataset, read_masks, summary
from xmask.data.sample import Sample
from xmask.edp_sam import generate_masks
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.segmenting.sam_segmenter import SamSegmenter

# -- a whole data set ------------------------------------------------------------------------

class Dataset:
    """Five small pictures; the readers' interface, as far as masks need it."""

    settings = {"max_side": None}

    def __init__(self, broken=(), mended=()):
        self.ids = [f"IMG_{k}" for k in range(5)]
        self.broken, self.mended = broken, mended

    def __len__(self):
        return 5

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError(f"IMG_{i}.jpg is truncated")
        points = np.random.default_rng(i).uniform(0, 23, (i * 2, 2)).astype(np.float32)
        repairs = {"clipped": i} if i else {}
        return Sample(picture((24, 24), i), points, None, self.ids[i], repairs=repairs)

    def image_checksum(self, i):
        return f"{i}, {'mended' if i in self.mended else 'as it was'}"


class Counting(ClassicalSegmenter):
    """Counts the images it is shown, and can be stopped like a killed process."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.images, self.stop_after = 0, stop_after

    def set_image(self, image):
        if self.images == self.stop_after:
            raise KeyboardInterrupt
        self.images += 1
        super().set_image(image)


def masks(out, segmenter, indices=range(5), broken=(), mended=(), **options):
    return mask_dataset(
        Dataset(broken, mended), indices, segmenter, out, progress=False, **options)


def test_masks_of_a_data_set_can_be_read_back(tmp_path):
    out = masks(tmp_path / "masks", ClassicalSegmenter())
    assert {p.name for p in out.iterdir()} == {
        ".xmask", "manifest.json", "times.csv", *(f"IMG_{k}.{kind}" for k in range(5) for kind in ("png", "csv"))}
    sample = Dataset()[4]
    labels, table = generate_masks(sample.image, sample.points, ClassicalSegmenter())
    stored = read_masks(out, "IMG_4")
    assert stored.dtype == np.int32 and (stored == labels).all()
    read = pd.read_csv(out / "IMG_4.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, table, rtol=1e-5, check_dtype=False)
    assert not read_masks(out, "IMG_0").any()  # an image without heads
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["failed"] == {} and manifest["segmenter"]["kind"] == "classical"
    assert list(manifest["images"]) == [f"IMG_{k}" for k in range(5)]
    found = manifest["images"]["IMG_4"]
    assert found["heads"] == 8 and sum(found["sources"].values()) == 8
    assert list(found["sources"]) == [
        "classical-point", "classical-superpixel", "merged", "disc"]
    assert found["sources"] == {
        name: (table["source"] == name).sum() for name in found["sources"]}
    lines = summary(out, Dataset().ids).splitlines()
    assert lines[0] == "5 of 5 images have masks, 0 failed"
    assert lines[1].startswith("20 heads: ") and " classical-point, " in lines[1]
    assert lines[-1] == "repairs: 10 clipped"
    assert found["score"] == pytest.approx(table["score"].mean(), abs=1e-4)
    assert found["repairs"] == {"clipped": 4}
    assert manifest["images"]["IMG_0"]["heads"] == 0
    assert pd.read_csv(out / "times.csv")["image"].tolist() == [f"IMG_{k}" for k in range(5)]


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        masks(tmp_path, Counting(stop_after=2))  # image 0 has no heads: 0, 1 and 2 are complete
    with files.OutputFolder(tmp_path):  # killed between the two files of an image
        files.write_png(tmp_path / "IMG_3.png", np.ones((24, 24), np.uint16))
    segmenter = Counting()
    masks(tmp_path, segmenter)
    assert segmenter.images == 2
    whole = masks(tmp_path / "at once", ClassicalSegmenter())
    assert (tmp_path / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    for k in range(5):
        for kind in ("png", "csv"):
            name = f"IMG_{k}.{kind}"
            assert files.sha256(tmp_path / name) == files.sha256(whole / name)
    masks(tmp_path, segmenter)
    assert segmenter.images == 2  # nothing left to do


@pytest.fixture
def forked():
    with forked_workers():
        yield


def test_any_number_of_workers_gives_the_same_folder(tmp_path, forked):
    alone = masks(tmp_path / "1", ClassicalSegmenter())
    together = masks(tmp_path / "3", ClassicalSegmenter(), workers=3)
    for path in alone.iterdir():
        if path.name not in ("times.csv", ".xmask"):
            assert files.sha256(path) == files.sha256(together / path.name)
    with pytest.raises(ValueError, match="workers, threads: 0, 1"):
        masks(tmp_path / "0", ClassicalSegmenter(), workers=0)


def test_workers_keep_freed_memory_and_have_the_threads_that_were_asked_for(tmp_path):
    with cluster.open_client(1) as client:
        found, = client.run(lambda: dict(os.environ)).values()
        assert memory.ENVIRONMENT.items() <= found.items() and found["OMP_NUM_THREADS"] == "1"
        job = store._Job(Dataset(), ClassicalSegmenter(), {}, tmp_path, 2, {}, False)
        (tmp_path / files.HIDDEN).mkdir()
        assert client.submit(lambda: (job.run_in_worker(0), torch.get_num_threads())[1]).result() == 2


def test_workers_go_on_when_an_image_fails(tmp_path, forked):
    with pytest.raises(MasksFailed, match="failed for 2 of 5 images, the first IMG_1"):
        masks(tmp_path, ClassicalSegmenter(), broken=(3, 1), workers=2)
    manifest = files.read_json(tmp_path / "manifest.json")
    assert list(manifest["failed"]) == ["IMG_1", "IMG_3"]
    assert list(manifest["images"]) == ["IMG_0", "IMG_2", "IMG_4"]


class Deadly(ClassicalSegmenter):
    """Takes its process down with the picture that begins with the value `victim`."""

    victim = -1

    def set_image(self, image):
        if image[0, 0, 0] == self.victim:
            os._exit(9)
        super().set_image(image)


def test_an_image_over_which_a_worker_dies_is_named_and_the_others_get_masks(
        tmp_path, forked):
    segmenter = Deadly()
    segmenter.victim = int(Dataset()[3].image[0, 0, 0])
    others = [i for i in range(5) if Dataset()[i].image[0, 0, 0] != segmenter.victim]
    assert len(others) == 4
    with pytest.raises(MasksFailed, match=r"IMG_3 \(3 processes died over it"):
        masks(tmp_path, segmenter, workers=2)
    manifest = files.read_json(tmp_path / "manifest.json")
    assert list(manifest["failed"]) == ["IMG_3"] and len(manifest["images"]) == 4


def test_workers_that_cannot_even_start_are_not_started_for_every_image(tmp_path, forked):
    with pytest.raises(RuntimeError, match="workers died one after the other before they did any"):
        masks(tmp_path, Unopenable(), workers=2)
    assert not list(tmp_path.glob("*.png"))


def test_the_workers_of_a_scheduler_that_runs_give_the_same_folder(tmp_path, forked):
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=True, host="127.0.0.1",
                      dashboard_address=None) as cluster:
        for out, segmenter in (("a", ClassicalSegmenter()), ("b", SamSegmenter.bundled())):
            masks(tmp_path / out, segmenter, scheduler=cluster.scheduler_address, indices=[1, 2])
    alone = masks(tmp_path / "1", ClassicalSegmenter(), indices=[1, 2])
    for path in alone.glob("*.??g"):
        assert files.sha256(path) == files.sha256(tmp_path / "a" / path.name)
    assert files.read_json(tmp_path / "b" / "manifest.json")["segmenter"]["kind"] == "sam"


class Slow(ClassicalSegmenter):
    """Takes a second for an image."""

    def set_image(self, image):
        time.sleep(1)
        super().set_image(image)


@contextmanager
def scheduler_and_worker(folder):
    """The address of a Dask scheduler that has one worker, and its process."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    processes = [Program("-m", f"distributed.cli.dask_{name}", "--scheduler-file", file,
                         "--no-dashboard", *words, log=folder / name) for name, words in (
        ("scheduler", ["--host", "127.0.0.1", "--port", "0"]),
        ("worker", ["--nthreads", "1", "--local-directory", folder]))]
    try:
        while not file.exists():
            time.sleep(0.1)
        yield files.read_json(file)["address"], processes[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_scheduler_that_is_killed_and_started_again_costs_no_image(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # where the worker finds this module
    out = tmp_path / "out"

    def kill(process):
        while len(list(out.glob("*.csv"))) < 2:
            time.sleep(0.05)
        process.kill()

    with (scheduler_and_worker(tmp_path) as (address, process),
          dask.config.set({"distributed.comm.timeouts.connect": "1s"})):
        threading.Thread(target=kill, args=(process,), daemon=True).start()
        with pytest.raises(RuntimeError, match="the Dask scheduler is gone, and its workers with"):
            masks(out, Slow(), scheduler=address)
    assert 2 <= len(list(out.glob("*.csv"))) < 5
    with scheduler_and_worker(tmp_path) as (address, _):
        masks(out, ClassicalSegmenter(), scheduler=address)
    alone = masks(tmp_path / "alone", ClassicalSegmenter())
    for path in alone.iterdir():
        if path.name not in ("times.csv", ".xmask"):
            assert files.sha256(path) == files.sha256(out / path.name)


@pytest.mark.parametrize("options,message", [
    ({"scheduler": "tcp://127.0.0.1:9"}, "--scheduler tcp://127.0.0.1:9: no Dask scheduler answ"),
    ({"scheduler": "nonsense://x"}, "--scheduler nonsense://x: no Dask scheduler answers there"),
    ({"cluster": "moon"}, "--cluster moon: unknown; known: slurm"),
    ({"shard": "0/3"}, "shard: '0/3'; 1/4 to 4/4 are the four shards"),
    ({"shard": "4/3"}, "shard: '4/3'"), ({"shard": "01/3"}, "shard: '01/3'"),
    ({"scheduler": "tcp://x:1", "cluster": "slurm"}, "scheduler, cluster: give one of them"), ({"shard": "second"}, "shard: 'second'"),
])
def test_workers_and_shards_that_cannot_be_are_named(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(cluster, "_ANSWER", "1s")
    with pytest.raises(ValueError, match=message):
        masks(tmp_path / "out", ClassicalSegmenter(), **options)
    assert not (tmp_path / "out").exists()


def test_shards_fill_one_folder_as_one_call_does(tmp_path):
    whole = masks(tmp_path / "whole", ClassicalSegmenter())
    segmenter = Counting()
    for shard in ("2/3", "1/3", "3/3", "2/3"):
        masks(tmp_path / "parts", segmenter, shard=shard)
    assert segmenter.images == 4  # one of the five has no heads; none is made twice
    for path in whole.iterdir():
        if path.name not in ("times.csv", ".xmask"):
            assert files.sha256(path) == files.sha256(tmp_path / "parts" / path.name), path.name
    times = pd.read_csv(tmp_path / "parts" / "times.csv")
    assert sorted(times["image"]) == [f"IMG_{k}" for k in range(5)]
    with pytest.raises(ValueError, match="holds masks of 5 images that were made with another opt"):
        masks(tmp_path / "parts", segmenter, shard="1/3", nnec=False)
    masks(tmp_path / "parts", segmenter)
    assert segmenter.images == 4  # the record of all shards is that of the folder
    assert len(pd.read_csv(tmp_path / "parts" / "times.csv")) == 5  # nothing to do: nothing lost


@pytest.mark.parametrize("holding,wanted,free", [
    ("1/2", "1/2", "2/2"), ("1/2", "", "2/2"), ("", "1/2", None), ("1/2", "1/4", "2/2")])
def test_a_shard_and_a_whole_call_keep_out_of_each_others_way(
        tmp_path, holding, wanted, free, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    code = ("import sys, time; from xmask import files\n"
            "with files.OutputFolder(sys.argv[1], shard=sys.argv[2]):\n"
            "    print('in', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), holding],
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(files.FolderInUse, match="another process"):
            masks(tmp_path, ClassicalSegmenter(), shard=wanted)
        if free:
            masks(tmp_path, ClassicalSegmenter(), shard=free)
    finally:
        holder.kill()
        holder.wait()
    masks(tmp_path, ClassicalSegmenter(), shard=wanted)


class Unopenable(ClassicalSegmenter):
    def __reduce__(self):
        return os._exit, (9,)


def test_masks_of_other_settings_are_made_anew(tmp_path):
    masks(tmp_path, ClassicalSegmenter())
    segmenter = Counting()
    masks(tmp_path, segmenter, indices=[1, 2], nnec=False)
    assert segmenter.images == 2
    with pytest.raises(FileNotFoundError, match="no complete masks of image IMG_4"):
        read_masks(tmp_path, "IMG_4")
    masks(tmp_path, segmenter, indices=[1, 2], nnec=False, depends={"code": "new"})
    assert segmenter.images == 4
    assert files.read_json(tmp_path / "manifest.json")["depends"] == {"code": "new"}
    masks(tmp_path, segmenter, indices=[1, 2], nnec=False)  # the other facts count no longer
    assert segmenter.images == 6 and "depends" not in files.read_json(tmp_path / "manifest.json")


def whole(folder, numbers):
    """Content of the masks of some images."""
    return {path.name: path.read_bytes() for k in numbers for path in folder.glob(f"IMG_{k}.*")}


def test_masks_of_other_settings_are_not_replaced_where_others_would_be_lost(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2, 3])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match="masks of 3 images .* another options. Give another folder"
                                         r" \(--out\), or make those of all anew: IMG_1 is not"):
        masks(tmp_path, ClassicalSegmenter(), indices=[2], nnec=False, other="replace")
    with pytest.raises(ValueError, match="--overwrite to make masks anew"):
        masks(tmp_path, ClassicalSegmenter(), indices=[1, 2, 3], nnec=False, other="refuse")
    assert before == {
        path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    segmenter = Counting()
    masks(tmp_path, segmenter, indices=[1, 2, 3], nnec=False, other="replace")
    assert segmenter.images == 3 and whole(tmp_path, [1, 2, 3]) != before


def test_masks_that_are_made_anew_stay_until_the_new_ones_are_there(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2, 3])
    before = whole(tmp_path, [1, 2, 3])
    options = {"indices": [1, 2, 3], "nnec": False, "other": "replace"}
    with pytest.raises(KeyboardInterrupt):
        masks(tmp_path, Counting(stop_after=0), **options)
    assert whole(tmp_path, [1, 2, 3]) == before
    with pytest.raises(KeyboardInterrupt):
        masks(tmp_path, Counting(stop_after=1), **options)
    assert {**before, **whole(tmp_path, [1])} == whole(tmp_path, [1, 2, 3]) != before
    with pytest.raises(ValueError, match="holds masks of 3 images that were made with another"):
        masks(tmp_path, Counting(), indices=[1, 2], other="refuse")  # old ones, too, are not lost
    segmenter = Counting()
    masks(tmp_path, segmenter, **options)
    assert segmenter.images == 2, "old masks are not taken for new ones"
    fresh = masks(tmp_path / "fresh", ClassicalSegmenter(), indices=[1, 2, 3], nnec=False)
    assert whole(tmp_path, [1, 2, 3]) == whole(fresh, [1, 2, 3])


def test_no_old_table_stands_beside_a_new_label_map(tmp_path, monkeypatch):
    masks(tmp_path, ClassicalSegmenter(), indices=[3])
    old = whole(tmp_path, [3])

    def killed(folder):
        if not (tmp_path / "IMG_3.csv").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_sync", killed)
        masks(tmp_path, ClassicalSegmenter(), indices=[3], superpixel_prompt=False)
    assert list(whole(tmp_path, [3])) == ["IMG_3.png"]
    masks(tmp_path, ClassicalSegmenter(), indices=[3])
    assert whole(tmp_path, [3]) == old


@pytest.mark.parametrize("kind", ["PNG", "csv"])
def test_old_masks_stay_where_the_disk_has_no_room_for_new_ones(tmp_path, kind, monkeypatch):
    masks(tmp_path, ClassicalSegmenter(), indices=[3])
    old = whole(tmp_path, [3])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(MasksFailed, match="No space left"):
        patch.setattr(*((Image.Image, "save") if kind == "PNG" else (pd.DataFrame, "to_csv")), full)
        masks(tmp_path, ClassicalSegmenter(), indices=[3], superpixel_prompt=False)
    assert whole(tmp_path, [3]) == old


def test_the_manifest_names_every_option_and_a_default_is_no_other_request(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    options = files.read_json(tmp_path / "manifest.json")["options"]
    assert options == {
        "nnec": True, "point_prompt": True, "superpixel_prompt": True, "negatives": True,
        "neighbours": [4, 3.0], "size_agreement": True, "boxes": False, "compactness": 10.0}
    segmenter = Counting()
    masks(tmp_path, segmenter, indices=[1], boxes=False, compactness=10.0)
    assert segmenter.images == 0


def test_an_image_that_was_mended_is_made_anew_and_no_other(tmp_path):
    masks(tmp_path, ClassicalSegmenter())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("IMG_*")}
    segmenter = Counting()
    masks(tmp_path, segmenter, mended=[3])
    assert segmenter.images == 1
    assert {p.stem for p in before if p.stat().st_mtime_ns != before[p]} == {"IMG_3"}
    images = files.read_json(tmp_path / "manifest.json")["images"]
    assert images["IMG_3"]["checksum"] == "3, mended" and len(images) == 5
    masks(tmp_path, segmenter, indices=[1], mended=[3, 4])  # nobody asked for 4, but it is stale
    assert segmenter.images == 1 and not (tmp_path / "IMG_4.png").exists()
    assert "IMG_4" not in files.read_json(tmp_path / "manifest.json")["images"]


@pytest.mark.parametrize("mended,made", [([], 0), ([2], 1)])
def test_masks_that_a_killed_process_did_not_note_count_if_their_image_is_the_same(
        tmp_path, mended, made):
    masks(tmp_path, ClassicalSegmenter())
    manifest = files.read_json(tmp_path / "manifest.json")
    manifest["todo"]["IMG_2"] = manifest["images"].pop("IMG_2")["checksum"]
    files.write_json(tmp_path / "manifest.json", manifest)
    segmenter = Counting()
    masks(tmp_path, segmenter, mended=mended)
    assert segmenter.images == made
    after = files.read_json(tmp_path / "manifest.json")
    assert len(after["images"]) == 5 and after["todo"] == {}


def test_an_image_that_broke_before_its_masks_were_noted_costs_no_other(tmp_path):
    masks(tmp_path, ClassicalSegmenter())
    manifest = files.read_json(tmp_path / "manifest.json")
    manifest["todo"]["IMG_2"] = manifest["images"].pop("IMG_2")["checksum"]
    files.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(MasksFailed, match="failed for 1 of 5 images, the first IMG_2"):
        masks(tmp_path, ClassicalSegmenter(), broken=(2,))
    after = files.read_json(tmp_path / "manifest.json")
    assert len(after["images"]) == 4 and list(after["failed"]) == ["IMG_2"]


def test_only_masks_that_the_record_lists_are_removed(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2])
    with pytest.raises(KeyboardInterrupt):
        masks(tmp_path, Counting(stop_after=0), indices=[3])
    theirs = ("IMG_3.png", "IMG_3.csv", "mine.png", "mine.csv")  # 3 was begun, but not written
    for name in theirs:
        (tmp_path / name).write_text("x")
    masks(tmp_path, ClassicalSegmenter(), indices=[1], nnec=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".xmask", "IMG_1.png", "IMG_1.csv", *theirs, "manifest.json", "times.csv"}
    with pytest.raises(MasksFailed, match="IMG_3.png: was not written by xmask, and stays"):
        masks(tmp_path, ClassicalSegmenter(), indices=[1, 3], nnec=False)
    assert all((tmp_path / name).read_text() == "x" for name in theirs)


@pytest.mark.parametrize("content", ["[1, 2]", '{"name": "app", "version": "1"}', "{broken"])
def test_a_manifest_that_is_not_ours_is_refused_and_nothing_removed(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    files.write_png(tmp_path / "IMG_1.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(FileExistsError, match="holds IMG_1.png and 1 more.*new or empty folder"):
        masks(tmp_path, ClassicalSegmenter())
    assert (tmp_path / "IMG_1.png").is_file()
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize("content", ["{broken", "[]", '{"images": {}}', "\0"])
def test_a_damaged_manifest_and_its_masks_are_set_aside(tmp_path, content, caplog):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2])
    (tmp_path / "manifest.json").write_text(content)
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    assert list(files.read_json(tmp_path / "manifest.json")["images"]) == ["IMG_1"]
    assert (tmp_path / "manifest.json.set-aside-1").read_text() == content
    assert "set aside as manifest.json.set-aside-1" in caplog.text
    assert not (tmp_path / "IMG_2.png").exists()  # nobody knows of what it was
    assert (tmp_path / "IMG_2.png.set-aside-1").exists(), "but it may be all there is"


@pytest.mark.parametrize("key", ["../victim/precious", "/etc/passwd", "..", "a/b", "a\\b", ""])
def test_a_manifest_cannot_reach_outside_its_folder(tmp_path, key):
    victim = tmp_path / "victim"
    victim.mkdir()
    for kind in ("csv", "png"):
        (victim / f"precious.{kind}").write_text("x")
    out = tmp_path / "out"
    masks(out, ClassicalSegmenter(), indices=[1])
    manifest = files.read_json(out / "manifest.json")
    for field in ("images", "failed", "todo"):
        changed = {**manifest, field: {**manifest[field], key: manifest["images"]["IMG_1"]}}
        (out / "manifest.json").write_text(json.dumps(changed))
        masks(out, ClassicalSegmenter(), indices=[1], nnec=field == "images")
    record = out / ".xmask" / "record.jsonl"
    whole = record.read_text()
    name = key if key in ("", "..") else f"{key}.png"
    record.write_text(whole + json.dumps({"file": name, "sha256": "0" * 64}) + "\n")
    if key not in ("a/b", "a\\b"):  # a folder below, and a backslash in a name, are allowed
        with pytest.raises(ValueError, match="record.jsonl, line .*: not a record of xmask"):
            masks(out, ClassicalSegmenter(), indices=[1], nnec=False)
    assert {p.read_text() for p in victim.iterdir()} == {"x"} and len(list(victim.iterdir())) == 2


@pytest.mark.parametrize("kind", ["png", "csv"])
@pytest.mark.parametrize("how", ["blank", "cut", "edited", "gone"])
def test_a_damaged_mask_is_found_set_aside_and_made_again(tmp_path, kind, how):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2])
    path = tmp_path / f"IMG_2.{kind}"
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"blank": b"", "cut": whole[:20], "edited": whole + b"\n"}[how])
    segmenter = Counting()
    masks(tmp_path, segmenter, indices=[1, 2])
    assert segmenter.images == 1 and path.read_bytes() == whole
    assert (tmp_path / f"IMG_2.{kind}.set-aside-1").exists() == (how != "gone")


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    code = ("import sys, time; from xmask import files\n"
            "with files.OutputFolder(sys.argv[1]): print('in', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(files.FolderInUse, match=f"pid {holder.pid} on .* since 20"):
            masks(tmp_path, ClassicalSegmenter(), indices=[1])
    finally:
        holder.kill()
        holder.wait()
    masks(tmp_path, ClassicalSegmenter(), indices=[1])  # free as soon as it is dead


@pytest.mark.parametrize("kind", ["png", "csv"])
def test_masks_of_an_earlier_call_that_were_damaged_since_count_no_longer(tmp_path, kind, caplog):
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    (tmp_path / f"IMG_1.{kind}").write_text("x")
    others = Dataset()
    others.ids = [f"other_{k}" for k in range(5)]  # a call that does not know IMG_1
    mask_dataset(others, [1], ClassicalSegmenter(), tmp_path, progress=False)
    assert list(files.read_json(tmp_path / "manifest.json")["images"]) == ["other_1"]
    assert (tmp_path / f"IMG_1.{kind}").read_text() == "x", "no result needs its name"
    assert f"IMG_1.{kind} not as xmask wrote it" in caplog.text
    masks(tmp_path, ClassicalSegmenter(), indices=[1])  # this one does
    assert (tmp_path / f"IMG_1.{kind}.set-aside-1").read_text() == "x"


@pytest.mark.parametrize("options", [{}, {"nnec": False}])
def test_a_photo_of_the_users_under_the_name_of_a_mask_stays_where_no_result_needs_it(
        tmp_path, options):
    masks(tmp_path, ClassicalSegmenter(), indices=[1, 2, 3])
    (tmp_path / "IMG_1.png").write_bytes(b"my photo")
    (tmp_path / "manifest.json").write_text("{damaged")
    masks(tmp_path, ClassicalSegmenter(), indices=[2])
    (tmp_path / "IMG_2.png").write_bytes(b"my photo")
    masks(tmp_path, ClassicalSegmenter(), indices=[3], **options)
    assert all((tmp_path / f"IMG_{k}.png").read_bytes() == b"my photo" for k in (1, 2))


def test_what_the_command_reads_is_not_set_aside(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    read = tmp_path / "IMG_1.csv"
    with files.OutputFolder(tmp_path, kept=[read]) as folder:
        with pytest.raises(FileExistsError, match="IMG_1.csv: is read by this command"):
            folder.set_aside(read)
    assert read.is_file()


def test_half_written_files_are_removed_once_they_are_old(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    young, old, users = (tmp_path / name for name in (
        ".xmask/.partial-young.png", ".xmask/.partial-old.png", ".partial-holiday.png"))
    for path in (young, old, users):
        path.write_bytes(b"half")
    for path in (old, users):
        os.utime(path, (time.time() - 7200,) * 2)
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    assert young.is_file() and not old.exists()
    assert users.is_file(), "what lies outside the hidden part is the user's"


def test_failures_of_images_that_nobody_asked_for_this_time_stay_listed(tmp_path):
    with pytest.raises(MasksFailed):
        masks(tmp_path, ClassicalSegmenter(), broken=(1, 3))
    masks(tmp_path, ClassicalSegmenter(), indices=[2, 3])
    assert list(files.read_json(tmp_path / "manifest.json")["failed"]) == ["IMG_1"]
    with pytest.raises(MasksFailed, match="for 1 of 1 images, the first IMG_3"):
        masks(tmp_path, ClassicalSegmenter(), indices=[3], broken=(3,), mended=[3])


@pytest.mark.parametrize("name", ["worst", "times", "coco", "manifest", "Worst"])
def test_an_image_with_the_name_of_our_own_files_is_refused(tmp_path, name):
    dataset = Dataset()
    dataset.ids[2] = name
    with pytest.raises(ValueError, match=f"image '{name}': .*rename the image"):
        mask_dataset(dataset, [1, 2], ClassicalSegmenter(), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    mask_dataset(dataset, [1], ClassicalSegmenter(), tmp_path, progress=False)


def test_one_broken_image_does_not_cost_the_others(tmp_path):
    with pytest.raises(RuntimeError, match="failed for 1 of 5 images, the first IMG_2"):
        masks(tmp_path, ClassicalSegmenter(), broken=(2,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["failed"] == {"IMG_2": "OSError: IMG_2.jpg is truncated"}
    assert read_masks(tmp_path, "IMG_4").any()
    segmenter = Counting()
    masks(tmp_path, segmenter)  # mended: only the broken one is made
    assert segmenter.images == 1


def test_a_folder_of_somebody_elses_pictures_is_left_alone(tmp_path):
    files.write_png(tmp_path / "IMG_1.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(FileExistsError, match="holds IMG_1.png and no record of xmask"):
        masks(tmp_path, ClassicalSegmenter())
    assert (tmp_path / "IMG_1.png").is_file()


def test_unusable_mask_files_are_named(tmp_path):
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    (tmp_path / "IMG_1.png").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"IMG_1\.png: cannot be read as a label map"):
        read_masks(tmp_path, "IMG_1")
    files.write_png(tmp_path / "IMG_1.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="a label map is a grey PNG"):
        read_masks(tmp_path, "IMG_1")


def test_a_label_map_holds_65535_heads_at_most(tmp_path):
    class Crowd(Dataset):
        def __getitem__(self, i):
            return Sample(picture((24, 24), i), np.zeros((65536, 2), np.float32), None, "x")

    with pytest.raises(MasksFailed, match="IMG_0: 65536 heads, and an image has at most 65535"):
        mask_dataset(Crowd(), [0], ClassicalSegmenter(), tmp_path, progress=False)


def test_a_half_written_file_of_a_dead_process_is_removed_at_once(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    halves = [tmp_path / ".xmask" / f".partial-{files._HOST}-{pid}-0a1b2c3d.png"
              for pid in (dead.pid, os.getpid())]
    for half in halves:
        half.write_bytes(b"half")
    masks(tmp_path, ClassicalSegmenter(), indices=[1])
    assert [half.exists() for half in halves] == [False, True]


class Work:
    """A job whose first beginning is ended in the middle of an item."""

    begun = 0
    on: dict = {}

    def begin(self):
        Work.begun += 1

    def end(self):
        pass

    def run_in_worker(self, item):
        if Work.begun == 1:
            Work.on.pop("change")()
        return item


@pytest.mark.parametrize("twice", [True, False])
def test_a_worker_whose_job_was_ended_too_early_leaves_no_item_undone(monkeypatch, twice):
    """Dask brings a job twice to a worker that starts meanwhile, and ends the first one."""
    def carrier():
        made = cluster._Carrier(Work(), "job")
        made.setup(worker)
        return made

    def change():
        if twice:
            first.teardown()
            worker.plugins["job"] = carrier()
        else:  # another task of the same job is let go
            first.transition("items-1-job", "executing", "released")

    worker = SimpleNamespace(plugins={}, nanny=None)
    worker.plugins["job"] = first = carrier()
    monkeypatch.setattr(Work, "begun", 0)
    monkeypatch.setattr(Work, "on", {"change": change})
    monkeypatch.setattr(cluster, "get_worker", lambda: worker)
    with pytest.raises(Reschedule):
        cluster._run("job", ["a", "b"])
    assert cluster._run("job", ["a", "b"]) == ["a", "b"] and Work.begun == 2


class Replaced(Work):
    """A job that Dask brings again to its worker during the first item."""

    def run_in_worker(self, item):
        name = next(one for one in get_worker().plugins if one.startswith("xmask-"))
        if Work.begun == 1:
            get_client().register_plugin(cluster._Carrier(Replaced(), name), name=name)
        return item


def test_dask_gives_a_task_again_whose_job_was_replaced(monkeypatch):
    monkeypatch.setattr(Work, "begun", 0)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
                      ) as made, Client(made) as client:
        items = list(range(60))  # so many that a task has several
        assert sorted(cluster.work(client, Replaced(), items, lambda: 0)) == items
    assert Work.begun == 2
