"""Whatever a user hands in gets a sentence that names the file, and no file of a user changes."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import hostile, soak
from xmask import files
from xmask.cli import main
from xmask.data import annotations, dot_formats, images, own_photos
from xmask.data.check import as_text, check_dataset
from xmask.data.masks import summary
from xmask.segmenting import sam
from xmask.tools import models, photos


def refused(read, path):
    """The message that reading a file is refused with; None if it is read."""
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert path.name in message or path.parent.name in message
        return message
    return None


def test_images_that_are_none_are_refused_by_name_in_no_time(tmp_path):
    begun, refusals = time.process_time(), 0
    for name, content in hostile.images().items():
        path = tmp_path / name
        path.write_bytes(content)
        message = refused(images.read_image, path)
        sound = message is None
        assert sound <= (any(c.isdigit() for c in name) or name == "dot.png")  # mutations may be
        refusals += not sound
    assert refusals > 100 and time.process_time() - begun < 60


def test_an_image_has_as_many_pixels_as_are_allowed(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(hostile._png(13000, 13000, b"\0"))
    assert "13000 x 13000 px, more than the 100,000,000 allowed" in refused(images.read_image, path)
    (tmp_path / "small.png").write_bytes(hostile.picture())
    monkeypatch.setenv("XMASK_MAX_PIXELS", "3000")
    assert "64 x 48 px, more than the 3,000 allowed" in refused(
        images.read_image, tmp_path / "small.png")
    monkeypatch.setenv("XMASK_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="--max-pixels"):
        images.read_image(tmp_path / "small.png")


@pytest.mark.parametrize("content,part", hostile.TABLES.items(),
                         ids=lambda value: str(value)[:24])
def test_tables_of_dots_that_are_none_are_refused_at_once(tmp_path, content, part):
    path = tmp_path / "dots.csv"
    path.write_bytes(content)
    begun = time.process_time()
    assert part in refused(dot_formats.read_dots, path)
    assert time.process_time() - begun < 2


def test_tables_that_people_really_have_are_read(tmp_path):
    path = tmp_path / "dots.csv"
    for content in (b"x,y\n1,2\n3.5,4\n", b"\xef\xbb\xbfx,y\r\n1,2\r\n3.5,4\r\n",
                    b"X, Y\n1, 2\n3.5,4",
                    b'name,"x","y"\n"a, b",1,2\n\n,3.5,4\n',
                    b"\xef\xbb\xbfname;X;Y\r\na, b;1;2\r\n;3,5;4\r\n", b"x\ty\n1\t2\n3.5\t4\n",
                    b" ,Area,X,Y,BX,BY,Width,Height\n1,0,1,2,1,2,0,0\n2,0,3.5,4,3,4,0,0\n"):
        path.write_bytes(content)
        np.testing.assert_array_equal(dot_formats.read_dots(path), [[1, 2], [3.5, 4]])
    path.write_bytes(b"x,y\n")
    assert dot_formats.read_dots(path).shape == (0, 2)
    path.write_bytes(b"image,x,y\na.jpg,1,2\na.jpg,3.5,4\n")
    np.testing.assert_array_equal(dot_formats.read_dots(path), [[1, 2], [3.5, 4]])


@pytest.mark.parametrize("text", ["label,x,y,width,height\nhead,1,2,3,4\n", "x;y;W;H\n"])
def test_a_table_of_boxes_is_not_taken_for_one_of_dots(tmp_path, text):
    path = tmp_path / "dots.csv"
    path.write_text(text)
    assert "so that x and y may be the corner of a box" in refused(dot_formats.read_dots, path)


@pytest.mark.parametrize("column", ["image", "filename", "Image_ID", "photo", "Label"])
def test_a_table_of_several_photos_is_not_taken_for_that_of_one(tmp_path, column):
    path = tmp_path / "dots.csv"
    path.write_text(f"{column},x,y\na.jpg,1,2\na.jpg,3,4\nb.jpg,5,6\n")
    found = refused(dot_formats.read_dots, path)
    assert "dots.csv: line 4 is of another image" in found and "COCO, CVAT" in found


def test_annotations_that_are_none_are_refused_by_name(tmp_path):
    readers = {"mat": (annotations.read_qnrf, annotations.read_shanghaitech),
               "txt": (annotations.read_jhu,)}
    for kind, contents in hostile.annotations().items():
        path = tmp_path / f"heads.{kind}"
        for content in contents:
            path.write_bytes(content)
            for read in readers[kind]:
                refused(read, path)


def test_json_that_is_none_is_refused_by_name(tmp_path):
    for number, content in enumerate(hostile.JSONS):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        folder = tmp_path / f"of{number}"
        (folder / files.HIDDEN).mkdir(parents=True)
        shutil.copy(path, folder / "manifest.json")
        shutil.copy(path, folder / files.HIDDEN / "record.jsonl")
        assert refused(lambda place: summary(place.parent, []), folder / "manifest.json")
        refused(files.read_json, path)
        refused(files.read_record, folder)


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode),
                 st.lists(st.tuples(st.floats(), st.floats()), max_size=5).map(
                     lambda rows: ("x,y\n" + "\n".join(f"{x},{y}" for x, y in rows)).encode())))
def test_readers_refuse_or_read_whatever_they_are_given(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    (folder / files.HIDDEN).mkdir(parents=True, exist_ok=True)
    for name, read in (("a.csv", dot_formats.read_dots), ("a.txt", annotations.read_jhu),
                       ("a.mat", annotations.read_qnrf), ("a.json", files.read_json),
                       ("a.png", images.read_image), ("b.png", images.read_labels)):
        (folder / name).write_bytes(content)
        refused(read, folder / name)
    (folder / "a.csv").write_bytes(content)
    if refused(dot_formats.read_dots, folder / "a.csv") is None:
        assert np.isfinite(dot_formats.read_dots(folder / "a.csv")).all()
    record = folder / files.HIDDEN / "record.jsonl"
    record.write_bytes(b'{"record of": "xmask", "version": 1}\n' + content)
    refused(files.read_record, folder)


@given(st.text())
def test_no_plain_name_leads_out_of_a_folder(name):
    if files.is_plain(name):
        assert os.path.dirname(os.path.normpath(os.path.join("in", name))) == "in"


def test_a_folder_of_hostile_photos_costs_no_sound_one_its_result(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in hostile.images(many=4).items():
        (folder / name).write_bytes(content)
    (folder / "good.png").write_bytes(hostile.picture())
    (folder / "._good.png").write_bytes(b"macOS")
    (folder / "d.jpg").mkdir()
    bad = os.fsencode(folder) + b"/caf\xe9.png"
    with open(bad, "wb") as file:
        file.write(hostile.picture())
    assert main(["predict", str(folder), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    table = pd.read_csv(tmp_path / "out" / "counts.csv", keep_default_na=False).set_index("name")
    assert table.error["good"] == "" and table.error["caf%E9"] == ""
    assert (tmp_path / "out" / "caf%E9.points.csv").is_file()
    assert "pixel" not in table.error["good"] and "13000 x 13000" in table.error["wide"]
    assert all(table.error[name] for name in ("script", "moving", "empty", "text"))


def test_a_data_set_names_every_bad_image_in_short_lines(tmp_path):
    from tests.data.test_check import build

    folder = build(tmp_path, numbers=range(1, 39))
    for path in (folder / "Train").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    text = as_text(check_dataset("qnrf", folder, progress=False))
    assert max(map(len, text.splitlines())) <= 160
    assert all(f"img_{number:04d}.jpg" in text for number in range(1, 39))


@pytest.mark.parametrize("content", [b"[]", b'{"images": []}', b'{"images": {"train": "2"}}'])
def test_a_mistyped_marker_of_a_drawn_data_set_is_named(tmp_path, content, capsys):
    from tests.data.test_check import build

    (build(tmp_path) / "synthetic.json").write_bytes(content)
    assert main(["data", "check", "--dataset", "qnrf", "--root", str(tmp_path)]) == 1
    assert main(["masks", "--dataset", "qnrf", "--root", str(tmp_path), "--out",
                 str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert "synthetic.json" in shown.out and "synthetic.json" in shown.err


TINY = ["--set", "schedule.phase1=1", "--set", "schedule.phase2=1", "--set", "schedule.phase3=1"]


def command_lines(root, number):
    """Command lines that point into a user's folder, most of them wrong in some way."""
    rng = random.Random(12)
    places = [root, root / "other", root / "empty", root / "masks", root / "d.jpg", root / "gone",
              root / "notes.txt", root / "new" / "deep", root / "f.txt"]
    photos = [root / "a.jpg", root / "b.png", root, root / "*.jpg", root / "a.row.jpg",
              root / "V.jpg", root / "notes.txt", root / "d.jpg", root / "other" / "a.jpg",
              root / "gone.jpg"]
    tables = [root / "a.csv", root / "V.CSV", root / "notes.txt", root / "gone.csv", root,
              root / "coco.json"]
    for _ in range(number):
        out, image, table = rng.choice(places), rng.choice(photos), rng.choice(tables)
        yield rng.choice([
            ["predict", image, rng.choice(photos), "--out", out],
            ["predict", root, "--out", root], ["predict", image, "--out", out, "--device",
                                               rng.choice(["xpu", "cuda:9", "meta", "?"])],
            ["predict", image, "--out", out, "--max-side", rng.choice(["-5", "0", "9", "64"])],
            ["predict", image, "--out", out, "--weights", rng.choice([*photos, *tables])],
            ["predict", image, "--out", out, "--max-pixels", rng.choice(["0", "-1", "x", "100"])],
            ["masks", "--image", image, "--points", table, "--out", out, "--segmenter",
             "classical"],
            ["masks", "--image", image, "--points", table, "--out", out, "--checkpoint", image],
            ["masks", "--dataset", rng.choice(["sha", "qnrf", "jhu"]), "--root", root, "--out",
             out],
            ["masks", "--image", image, "--points", table, "--out", out, "--segmenter",
             "classical", "--workers", rng.choice(["0", "-3", "99999999999"])],
            ["learn", rng.choice([root, root / "other", root / "empty", image]), "--out",
             rng.choice([root, root / "masks", root / "f.txt", root / "other"]), *TINY],
            ["learn", root, "--out", out, "--set", rng.choice(["seed", "loss.tau=-1", "x=1",
                                                               "optimisation.lr=1e9"])],
            ["export", rng.choice(places), "--out", rng.choice([root / "f.txt", root, root / "gone",
                                                                root / "x.safetensors"])],
            ["data", "check", "--dataset", "sha", "--root", rng.choice(places)],
            ["data", "coverage", "--dataset", "sha", "--root", root, "--out", root / "counts.csv"],
        ])


def test_a_hundred_command_lines_change_no_file_of_the_user(tmp_path, capsys, monkeypatch):
    root = tmp_path / "mine"
    root.mkdir()
    before = hostile.users_folder(root)
    monkeypatch.chdir(tmp_path)
    for number, words in enumerate(command_lines(root, 100)):
        words = [str(word) for word in words]
        try:
            status = main(words)
        except SystemExit as ended:
            status = ended.code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, (words, shown.err)
        assert "fault of xmask" not in shown.err, (words, shown.err)
        assert status in (0, 1, 2), words
        after = hostile.checksums(root)
        assert {name: after.get(name) for name in before} == before, (number, words)


@pytest.mark.parametrize("command", ["masks", "predict", "learn"])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(command, tmp_path):
    found = soak.kill_and_compare(command, tmp_path, kills=1, seed=1)
    assert found["kills"] == 1 and not found["different"] and not found["lost"]


def test_predicting_many_images_takes_no_more_memory_than_a_few(tmp_path):
    few, many = soak.peaks("predict", tmp_path, 3, 15)
    assert many <= 1.1 * few


def test_own_photos_are_paired_whatever_the_case_and_never_by_guessing(tmp_path):
    hostile.users_folder(tmp_path / "u")
    dotted, bare = own_photos.read_folder(tmp_path / "u" / "other")
    assert dotted.ids == ["a"] and not len(bare)
    (tmp_path / "u" / "other" / "V.CSV").write_text("x,y\n1,2\n")
    shutil.copy(tmp_path / "u" / "a.jpg", tmp_path / "u" / "other" / "V.jpg")
    assert own_photos.read_folder(tmp_path / "u" / "other")[0].ids == ["V", "a"]
    shutil.copy(tmp_path / "u" / "b.png", tmp_path / "u" / "other" / "a.png")
    with pytest.raises(ValueError, match="a.csv: are these the dots of a.jpg or of a.png"):
        own_photos.read_folder(tmp_path / "u" / "other")


def test_closed_and_full_outputs_and_missing_memory_get_a_sentence(monkeypatch, capsys, tmp_path):
    for error, part in ((MemoryError("4 GB"), "out of memory (4 GB)"),
                        (RecursionError("deep"), "deep"), (KeyError("x"), "KeyError: 'x'"),
                        (OSError(28, "No space left on device", "a.png"),
                         "a.png: No space left on device"), (pd.errors.ParserError("c"), "c")):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("xmask.data.check.check_dataset", fail)
        assert main(["data", "check", "--dataset", "sha", "--root", str(tmp_path)]) == 1
        shown = capsys.readouterr().err
        assert part in shown and "Traceback" not in shown
        monkeypatch.setenv("XMASK_TRACEBACK", "1")
        with pytest.raises(type(error)):
            main(["data", "check", "--dataset", "sha", "--root", str(tmp_path)])
        monkeypatch.delenv("XMASK_TRACEBACK")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(OSError, match="a.json") as failed, files.replacing(path):
        raise OSError(28, "No space left on device")
    assert failed.value.filename == str(path)
    assert files.read_json(path) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_cannot_be_written_to_is_named_by_the_result(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only.*a.json") as failed:
        files.write_json(tmp_path / "a.json", {})
    assert failed.value.filename == str(tmp_path / "a.json")


def test_a_record_lists_what_lies_at_most_one_folder_deep(tmp_path):
    for _ in range(2):
        with files.OutputFolder(tmp_path, overwrite=True) as folder:
            for name in ("a.txt", "one/b.txt", "one/two/c.txt"):
                files.write_text(tmp_path / name, name)
    assert folder.names() == ["a.txt", "one/b.txt"]
    assert set(files.read_record(tmp_path)) == {"a.txt", "one/b.txt"}


def test_half_a_line_of_a_killed_process_spoils_no_record(tmp_path):
    with files.OutputFolder(tmp_path, shard="1/2"):
        files.write_text(tmp_path / "a.txt", "a")
        with open(tmp_path / ".xmask" / "record.jsonl", "ab") as record:
            record.write(b'{"file": "b.tx')  # another shard, on a full disk
        files.write_text(tmp_path / "c.txt", "c")
    assert set(files.read_record(tmp_path)) == {"a.txt", "c.txt"}


@pytest.mark.parametrize("link", [".xmask", ".xmask/record.jsonl", ".xmask/lock", ".xmask/notes",
                                  ".xmask/trying/IMG_1"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_the_hidden_part_is_not_followed(link, overwrite, tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "dots.csv").write_text("x,y\n1,2")
    with files.OutputFolder(out):
        files.write_text(out / "a.txt", "a")
    place = out / link
    place.parent.mkdir(exist_ok=True)
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(mine if link in (".xmask", ".xmask/notes") else mine / "dots.csv")
    with pytest.raises(ValueError, match=f"{place.name}: is a link.*new or empty folder"):
        with files.OutputFolder(out, overwrite=overwrite):
            pass
    assert [one.name for one in mine.iterdir()] == ["dots.csv"]
    assert (mine / "dots.csv").read_text() == "x,y\n1,2"


@pytest.mark.parametrize("content", ["x,y\n1,2\n3,4", "x,y", "{}\n"])
def test_a_record_that_is_none_is_refused_and_stays(content, tmp_path):
    (tmp_path / ".xmask").mkdir()
    (tmp_path / ".xmask" / "record.jsonl").write_text(content)
    with pytest.raises(ValueError, match="record.jsonl, line 1: not a record of xmask"):
        with files.OutputFolder(tmp_path, overwrite=True):
            pass
    assert (tmp_path / ".xmask" / "record.jsonl").read_text() == content


def test_a_folder_that_stayed_empty_goes_before_another_process_can_have_it(tmp_path, monkeypatch):
    removed, unlink = [], Path.unlink

    def checked(path, **options):
        if path.name == "record.jsonl":
            with pytest.raises(files.FolderInUse), files.lock(tmp_path / "out"):
                pass
        removed.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", checked)
    with files.OutputFolder(tmp_path / "out"):
        removed.clear()
    assert removed.index("record.jsonl") < removed.index("lock") and not list(tmp_path.iterdir())
    with files.OutputFolder(tmp_path / "out"):
        files.write_text(tmp_path / "out" / "a.txt", "a")
    assert set(files.read_record(tmp_path / "out")) == {"a.txt"}


def test_no_name_leads_out_of_a_folder(tmp_path):
    (tmp_path / "victim.txt").write_text("mine")
    with files.OutputFolder(tmp_path / "out", cloned=True):
        with pytest.raises(ValueError, match="victim.txt: leads out of .*out"):
            files.write_text(tmp_path / "out" / ".." / "victim.txt", "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["victim.txt"]
    assert (tmp_path / "victim.txt").read_text() == "mine"


def test_a_file_that_came_with_a_clone_is_ours_if_it_says_the_same_and_else_set_aside(tmp_path):
    for name, text in (("a.txt", "same"), ("b.txt", "edited"), ("c.txt", "mine")):
        (tmp_path / name).write_text(text)
    for made in ("same", "new"):
        with files.OutputFolder(tmp_path, cloned=True) as folder:
            files.write_text(tmp_path / "a.txt", "same")
            files.write_text(tmp_path / "b.txt", made)
    for name in "ac":
        folder.remove(tmp_path / f"{name}.txt")
    assert {path.name: path.read_text() for path in tmp_path.glob("*.*") if path.is_file()} == {
        "b.txt": "new", "b.txt.set-aside-1": "edited", "c.txt": "mine"}


def test_equal_models_are_equal_files(tmp_path):
    tensors = {"ä": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(5, dtype=torch.float16)}
    code = ("import sys, torch; from xmask import files\n"
            "tensors = {'ä': torch.arange(6.).reshape(2, 3).T, 'b': torch.ones(5).half()}\n"
            "name = sys.argv[1]\n"
            "files.write_safetensors(name, tensors, dict.fromkeys(name[-3:], '\"é'))")
    for seed, order in enumerate(("abc", "cab", "bca")):  # their order is another by process, too
        subprocess.run([sys.executable, "-c", code, str(tmp_path / order)], check=True,
                       env=os.environ | {"PYTHONHASHSEED": str(seed)})
    assert len({(tmp_path / order).read_bytes() for order in ("abc", "cab", "bca")}) == 1
    found = load_file(tmp_path / "abc")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "abc", "pt") as file:
        assert file.metadata() == dict.fromkeys("abc", '"é')


def test_what_a_record_lists_in_a_folder_below_is_ours_too(tmp_path, caplog):
    run, picture = tmp_path / "run", np.zeros((9, 9, 3), np.uint8)
    with files.OutputFolder(run):
        for name in ("ours.png", "changed.png"):
            files.write_png(run / "predictions" / name, picture)
    for name in ("changed.png", "mine.png"):
        Image.fromarray(picture + 1).save(run / "predictions" / name)
    for pattern in (f"{run}/**/*.png", f"{run}/predictions", f"{tmp_path}/r*/predictions/*.png"):
        assert [photo.path.name for photo in photos.find([pattern])] == ["mine.png"]
    assert "changed.png: left out" in caplog.text


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_memory_is_measured_in_the_unit_we_think(tmp_path):
    assert 10 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < 100_000  # MB


# -- found by a reviewer who tried to break the commands -------------------------------------


def test_a_users_hidden_half_file_stays(tmp_path, capsys):
    """`.partial-...` was once how we called our own half-written files."""
    photo, keep = tmp_path / "a.png", tmp_path / "keep"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    keep.mkdir()
    mine = keep / ".partial-1999999-0a1b2c3d.png"
    mine.write_bytes(b"mine")
    os.utime(mine, (time.time() - 7200,) * 2)
    assert main(["predict", str(photo), "--out", str(keep)]) == 1
    assert "no record of xmask" in capsys.readouterr().err
    assert main(["predict", str(photo), "--out", str(keep), "--overwrite"]) == 0
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("layout,place", [
    ("sha", "ShanghaiTech/part_A/train_data/ground-truth/GT_IMG_1.mat"),
    ("sha", "ShanghaiTech/part_A/test_data/instances/IMG_1.png"),
    ("jhu", "jhu_crowd_v2.0/train/image_labels.txt")])
def test_drawing_replaces_no_annotation(tmp_path, layout, place, capsys):
    mine = tmp_path / place
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    status = main(["data", "draw", "--layout", layout, "--out", str(tmp_path), "--train", "1",
                   "--test", "1"])
    said = capsys.readouterr().err
    assert status == 1 and mine.name in said and "stays as it is" in said
    assert mine.read_text() == "mine"


def test_a_link_to_a_disk_that_is_away_is_a_file_that_is_there(tmp_path):
    link = tmp_path / "table.csv"
    link.symlink_to(tmp_path / "away" / "table.csv")
    with pytest.raises(FileExistsError, match="table.csv: is there already"):
        files.check_new(link, overwrite=False)
    files.check_new(link, overwrite=True)


@pytest.mark.parametrize("words", [
    ["report", "--out", "mine"],
    ["train-sam", "--scenes", "1", "--steps", "1", "--stop", "1", "--out", "mine.safetensors"]])
def test_one_file_is_not_replaced_unasked(tmp_path, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / ("mine" if words[0] == "report" else "mine.json")
    mine.write_text("mine")
    assert main(words) == 1
    assert f"{mine.name}: is there already" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("given", ["photo", "points"])
def test_overwrite_does_not_mean_the_photo_and_the_dots_themselves(tmp_path, given, capsys):
    folder, other = tmp_path / "photos", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    photo = (folder if given == "photo" else other) / "a.png"
    dots = (folder if given == "points" else other) / "a.csv"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    dots.write_text("x,y\n9,9\n")
    before = photo.read_bytes(), dots.read_bytes()
    status = main(["masks", "--image", str(photo), "--points", str(dots), "--out", str(folder),
                   "--segmenter", "classical", "--overwrite"])
    assert status == 1 and "is read by this command" in capsys.readouterr().err
    assert (photo.read_bytes(), dots.read_bytes()) == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_overwrite_does_not_mean_the_photo_by_another_name(tmp_path, link, capsys):
    photos, store = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    store.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(store / "a.png")
    link(store / "a.png", photos / "a.jpg")
    (photos / "a.csv").write_text("x,y\n9,9\n")
    before = files.sha256(store / "a.png")
    assert main(["masks", "--image", str(photos / "a.jpg"), "--points", str(photos / "a.csv"),
                 "--out", str(store), "--segmenter", "classical", "--overwrite"]) == 1
    assert "a.png: is read by this command" in capsys.readouterr().err
    assert files.sha256(store / "a.png") == before


def test_a_photo_that_goes_meanwhile_is_kept_no_longer(tmp_path):
    """Its number on the disk may be that of a file of ours by then."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"photo")
    with files.OutputFolder(tmp_path / "out", kept=[photo]) as folder:
        os.rename(photo, folder.path / "counts.csv")
        folder.note(folder.path / "counts.csv", files.sha256(folder.path / "counts.csv"))
        files.write_text(folder.path / "counts.csv", "new")
    assert (tmp_path / "out" / "counts.csv").read_text() == "new"


@pytest.mark.parametrize("words", [
    ["report", "--out"], ["data", "coverage", "--dataset", "sha", "--root", "d", "--out"]])
def test_overwrite_replaces_no_photo_by_a_table_or_a_page(tmp_path, words, capsys):
    mine = tmp_path / "IMG_1.jpg"
    mine.write_bytes(b"photo")
    assert main([*words, str(mine), "--overwrite"]) == 1
    assert "IMG_1.jpg: is no ." in capsys.readouterr().err and mine.read_bytes() == b"photo"


@pytest.mark.skipif(os.name != "posix", reason="Windows has locks of another kind")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_network_folder_without_locks_takes_results(tmp_path, number, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with files.OutputFolder(tmp_path / "out") as folder:
        files.write_text(folder.path / "counts.csv", "counts")
    assert files.read_record(tmp_path / "out").keys() == {"counts.csv"}


def test_a_link_to_nowhere_is_no_folder_for_results(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with pytest.raises(NotADirectoryError, match="out: is a link that leads nowhere"):
        files.OutputFolder(tmp_path / "out").check()


def test_any_name_that_a_file_can_have_is_one(tmp_path, capsys):
    """A colon and a backslash once made the folder unusable for the second call."""
    if os.name != "posix":
        pytest.skip("such names are none on Windows")
    for name in ("a:b.png", "c\\d.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / name)
    for _ in range(2):
        assert main(["predict", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
        assert "2 of 2 images done" in capsys.readouterr().out


def test_an_argument_that_leads_nowhere_stops_no_other(tmp_path, capsys):
    photo, loop = tmp_path / "a.png", tmp_path / "loop.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    loop.symlink_to(loop)
    status = main(["predict", str(photo), str(loop), "n" * 300 + ".png", "--out",
                   str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert status == 1 and "1 of 3 images done" in said and "loop.png: " in said


def test_a_huge_file_that_is_no_image_is_refused_by_its_header(tmp_path, monkeypatch):
    huge = tmp_path / "huge.jpg"
    with open(huge, "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("read to its end"))
    with pytest.raises(ValueError, match="huge.jpg: cannot be read as an image"):
        photos._Results.add(object.__new__(photos._Results), photos.Photo(huge, "huge"))


def test_dots_from_something_that_is_no_file_are_refused(tmp_path):
    pipe = tmp_path / "dots.csv"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        assert "no regular file" in refused(dot_formats.read_dots, Path(path))


@pytest.mark.parametrize("change", [
    {"sha256": {"a": 1}}, {"versions": math.nan},
    {"calibration": {"threshold": 0.5, "factor": 1e308, "coverage": 0.9, "images": 9, "mae": 1.0,
                     "mae_before": 1.0}}])
def test_metadata_of_weights_that_no_export_writes(tmp_path, change, capsys):
    path = models.BUNDLED["drawn"]
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata["record"] = json.dumps(json.loads(metadata["record"]) | change)
    save_file(load_file(path), tmp_path / "w.safetensors", metadata=metadata)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    status = main(["predict", str(tmp_path / "a.png"), "--weights",
                   str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "not foreseen" not in said
    assert status == 0 if "sha256" in change else "w.safetensors: its record is not" in said


@pytest.mark.parametrize("words,part", [
    (["train-sam", "--threads", "100000000"], "at most 1024"),
    (["train-sam", "--seed", "-7"], "expected a whole number"),
    (["train", "--dataset", "sha", "--percent", "5", "--set", "loss.tau=" + "9" * 5000],
     "--set loss.tau: "),
    (["train", "--dataset", "sha", "--percent", "5", "--set", "loss.tau=" + "[" * 100_000],
     "--set loss.tau: ")])
def test_values_no_computer_can_take_are_named(words, part, capsys):
    try:
        assert main(words) == 1
    except SystemExit as left:
        assert left.code == 2
    assert part in capsys.readouterr().err


def test_learn_says_at_once_that_a_network_cannot_be(tmp_path, capsys):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("x,y\n9,9\n")
    for change, part in (("network.backbone=nope", "nope"), ("network.channels=7", "another network")):
        assert main(["learn", str(tmp_path), "--out", str(tmp_path / "out"), "--segmenter",
                     "classical", "--set", change]) == 1
        assert part in capsys.readouterr().err
        assert not (tmp_path / "out" / "masks").exists()


# -- found by reviewers ------------------------------------------------------------------------


def _part(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _array(cls, shape, name, body):
    return _part(14, _part(6, struct.pack("<II", cls, 0))
                 + _part(5, struct.pack(f"<{len(shape)}i", *shape)) + _part(1, name) + body)


def _nested(levels):
    body = _array(6, (1, 1), b"", _part(9, struct.pack("<d", 1)))
    for _ in range(levels):
        body = _array(1, (1, 1), b"", body)
    return body


_FIELD = _part(5, struct.pack("<i", 32)) + _part(1, b"location".ljust(32, b"\0"))
MAT_FILES = {
    "20,000 levels": _array(1, (1, 1), b"image_info", _nested(20_000)),
    "text of 300 million": _array(2, (1, 1), b"image_info", _FIELD + _array(
        4, (1, 300_000_000), b"", _part(16, b""))),
    "300 million cells": _array(1, (1, 1), b"image_info", _array(1, (1, 300_000_000), b"", b"")),
    "a negative shape": _array(1, (1, 1), b"image_info", _array(1, (-1, -300_000_000), b"", b"")),
    "300 million structures": _array(1, (1, 1), b"image_info", _array(
        2, (1, 300_000_000), b"", _FIELD)),
    "3,000 fields": _array(2, (1, 500_000), b"image_info", _part(5, struct.pack("<i", 8)) + _part(
        1, b"".join(b"f%05d\0\0" % k for k in range(3000)))),
    "60 MB of zeros": bytes(60 << 20),
    "many texts": b"".join(_array(4, (1, 900_000), b"t%04d" % k, _part(16, b""))
                           for k in range(2000)),
}


@pytest.mark.parametrize("order", ["IM", "MI", "XX"])  # scipy takes all but the first for MI
def test_small_mat_files_that_claim_a_lot_are_refused_at_once(order, tmp_path):
    for number, body in enumerate(MAT_FILES.values()):
        if order != "IM":
            body = np.frombuffer(body[:len(body) // 4 * 4], "<u4").byteswap().tobytes()
        (tmp_path / f"{number}.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(
            "<H" if order == "IM" else ">H", 0x0100) + order.encode() + body)
    code = ("import resource, sys; from xmask.data import annotations\n"
            "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
            "for path in sys.argv[1:]:\n"
            "    try: annotations.read_shanghaitech(path)\n"
            "    except ValueError as error: print(error)")
    found = subprocess.run([sys.executable, "-c", code, *sorted(map(str, tmp_path.iterdir()))],
                           capture_output=True, text=True, timeout=60)
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == len(MAT_FILES), found
    assert all(f"{number}.mat: " in line for number, line in enumerate(lines))


@pytest.mark.parametrize("command,names", [
    (["edp-study", "--scenes", "3", "--segmenters", "classical", "--out"], ("table.md",)),
    (["edp-study", "--scenes", "3", "--boxes", "--out"], ("boxes.csv", "x.txt")),
])
def test_edp_study_leaves_a_folder_of_the_users_alone(command, names, tmp_path, capsys):
    for name in names:
        (tmp_path / name).write_text("mine")
    assert main([*command, str(tmp_path)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "mine")


def test_the_weights_of_the_package_are_not_replaced_unasked(capsys):
    before = files.sha256(sam.BUNDLED)
    assert main(["train-sam", "--scenes", "1", "--steps", "1"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert files.sha256(sam.BUNDLED) == before


def test_overwrite_does_not_mean_what_the_command_reads(tmp_path, capsys):
    hostile.users_folder(tmp_path / "u")
    own = tmp_path / "own"
    own.mkdir()
    for name in ("a.jpg", "a.overlay.png", "history.png", "history.csv"):
        shutil.copy(tmp_path / "u" / {".csv": "a.csv"}.get(name[-4:], f"a{name[-4:]}".replace(
            "a.png", "b.png")), own / name)
    before = hostile.checksums(own)
    main(["predict", str(own), "--out", str(own), "--overwrite", "--device", "cpu"])
    assert "a.overlay.png: is read by this command" in capsys.readouterr().out
    main(["learn", str(own), "--out", str(own), "--overwrite", *soak._SHORT, "--segmenter",
          "classical"])
    assert "history.csv: is read by this command" in capsys.readouterr().err
    after = hostile.checksums(own)
    assert {name: after[name] for name in before} == before


def test_tables_of_the_users_beside_masks_are_not_read(tmp_path, capsys):
    hostile.users_folder(tmp_path / "u")
    command = ["masks", "--image", str(tmp_path / "u" / "a.jpg"), "--points",
               str(tmp_path / "u" / "a.csv"), "--out", str(tmp_path / "m"), "--segmenter",
               "classical"]
    assert main(command) == 0
    for name in ("notes.csv", "notes.png"):
        (tmp_path / "m" / name).write_bytes(b"\xff")
    assert main(command) == 0


def test_a_photo_may_have_the_name_of_a_file_beside_masks(tmp_path):
    hostile.users_folder(tmp_path / "u")
    for ending, source in ((".jpg", "a.jpg"), (".csv", "a.csv")):
        shutil.copy(tmp_path / "u" / source, tmp_path / f"Coco{ending}")
    dotted, _ = own_photos.read_folder(tmp_path)
    assert dotted.ids == ["Coco.jpg"]


def test_a_checkpoint_of_the_users_is_not_taken_for_a_damaged_one(tmp_path, capsys):
    soak._photos(tmp_path / "photos", 2, dotted=1)
    command = ["learn", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), *soak._SHORT,
               "--segmenter", "classical"]
    assert main([*command[:4], *command[4:], "--set=schedule.phase3=5"]) == 0
    for name in ("checkpoint.pt", "checkpoint.pt.damaged"):
        (tmp_path / "run" / name).write_text(f"my {name}")
    main(command)
    found = {path.read_text() for path in (tmp_path / "run").glob("checkpoint.pt*")}
    assert {"my checkpoint.pt", "my checkpoint.pt.damaged"} <= found


@pytest.mark.parametrize("streams", [("stderr",), ("stdout", "stderr")])
def test_streams_that_are_closed_stop_nothing(streams, tmp_path, monkeypatch):
    soak._photos(tmp_path / "photos", 1)
    closed = " ".join({"stdout": ">&-", "stderr": "2>&-"}[one] for one in streams)
    command = (f"{sys.executable} -m xmask predict {tmp_path}/photos --out {tmp_path}/out "
               f"--device cpu {closed}")
    assert subprocess.run(command, shell=True).returncode == 0
    assert (tmp_path / "out" / "counts.csv").is_file()


@pytest.mark.parametrize("words,message", [
    (["reproduce", "--percents", ""], "expected whole numbers"),
    (["reproduce", "--datasets", ","], "expected names"),
])
def test_empty_lists_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file,field,value,message", [
    ("metrics.json", "dataset", "x/../../../victim/precious", "is no name"),
    ("metrics.json", "variant", "../evil", "is no name"),
    ("metrics.json", "localization", {"abc": {}}, "no distances"),
    ("metrics.json", "per_image", [], "is empty"),
    ("metrics.json", "per_image", [{"true_count": 1, "count": 1}], "'name' is missing"),
    ("metrics.json", "counting", {"mae": 10**400, "rmse": 1}, "metrics.json"),
    ("metrics.json", "baselines", {"constant_count": 5}, "metrics.json"),
    ("config.json", "config", [], "config.json"),
    ("config.json", "config", {"schedule": 5}, "config.json"),
    ("config.json", "segmenter", 5, "config.json"),
    ("config.json", "data", {"checksum": "x", "settings": "x"}, "config.json"),
    ("config.json", "code", "text", "config.json: holds no digest"),
    ("history.csv", "", "", "history.csv"),
    ("history.csv", "", "step,epoch,phase,loss\nx,x,x,x\n", "history.csv"),
])
def test_runs_that_were_edited_by_hand_are_named(file, field, value, message, tmp_path,
                                                 monkeypatch, capsys):
    run = tmp_path / "results" / "demo" / "runs" / "sha-10-s1"
    shutil.copytree(Path(__file__).parents[1] / "results" / "demo" / "runs" / "sha-10-s1", run)
    for name in ("metrics.json", "config.json") if field in ("dataset", "variant") else (file,):
        if name.endswith(".json"):
            files.write_json(run / name, files.read_json(run / name) | {field: value})
        else:
            (run / name).write_text(value)
    monkeypatch.chdir(tmp_path)
    for command in (["code", str(run)],) if field == "code" else (["tables"], ["figures"]):
        main(command)
    shown = capsys.readouterr().err
    assert message in shown and "not foreseen" not in shown
    assert not list(tmp_path.rglob("*precious*"))
