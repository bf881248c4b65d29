"""Whatever a user hands in gets a sentence that names the file, and no file of a user changes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hostile, soak
from xmask import files
from xmask.cli import main
from xmask.data import annotations, images, own_photos
from xmask.data.check import as_text, check_dataset
from xmask.data.masks import summary


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
    assert part in refused(annotations.read_dots, path)
    assert time.process_time() - begun < 2


def test_tables_that_people_really_have_are_read(tmp_path):
    path = tmp_path / "dots.csv"
    for content in (b"x,y\n1,2\n3.5,4\n", b"\xef\xbb\xbfx,y\r\n1,2\r\n3.5,4\r\n",
                    b"X, Y\n1, 2\n3.5,4",
                    b'name,"x","y"\n"a, b",1,2\n\n,3.5,4\n'):
        path.write_bytes(content)
        np.testing.assert_array_equal(annotations.read_dots(path), [[1, 2], [3.5, 4]])
    path.write_bytes(b"x,y\n")
    assert annotations.read_dots(path).shape == (0, 2)


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
    for name, read in (("a.csv", annotations.read_dots), ("a.txt", annotations.read_jhu),
                       ("a.mat", annotations.read_qnrf), ("a.json", files.read_json),
                       ("a.png", images.read_image), ("b.png", images.read_labels)):
        (folder / name).write_bytes(content)
        refused(read, folder / name)
    (folder / "a.csv").write_bytes(content)
    if refused(annotations.read_dots, folder / "a.csv") is None:
        assert np.isfinite(annotations.read_dots(folder / "a.csv")).all()
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


@pytest.mark.parametrize("command", ["masks", "predict"])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(command, tmp_path):
    found = soak.kill_and_compare(command, tmp_path, kills=2, seed=1)
    assert found["kills"] == 2 and not found["different"] and not found["lost"]


def test_predicting_many_images_takes_no_more_memory_than_a_few(tmp_path):
    few, many = (soak.peak_of_predict(tmp_path / str(n), n) for n in (3, 15))
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


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_memory_is_measured_in_the_unit_we_think(tmp_path):
    assert 10 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < 100_000  # MB
