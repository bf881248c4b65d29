"""`xmask predict`: any folder of images in, one finished result for each, bad files named."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools.coco import COCO

import xmask
from xmask import files
from xmask.cli import main
from xmask.data.images import read_labels
from xmask.synthetic import draw_scene
from xmask.tools import photos


@pytest.fixture(scope="module")
def scene():
    return draw_scene(seed=4, shape=(96, 128), people=14).image


@pytest.fixture(scope="module")
def model():
    return xmask.load("drawn", device="cpu")


@pytest.fixture
def folder(tmp_path_factory, scene):
    """Good images and bad ones."""
    folder = tmp_path_factory.mktemp("mine")
    picture = Image.fromarray(scene)
    picture.save(folder / "plain.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("CMYK").save(folder / "print.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(scene).copy()).save(folder / "phone.jpg", quality=95, exif=exif)
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "plain.png").read_bytes()[:900])
    (folder / "letter.jpg").write_text("not an image")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "notes.txt").write_text("not listed")
    return folder


def test_bad_files_are_named_and_the_rest_goes_on(folder, tmp_path, capsys, scene):
    out = tmp_path / "out"
    assert main(["predict", str(folder), "--out", str(out), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "5 of 9 images done" in shown and "4 failed" in shown
    assert f"look at {out / 'counts.csv'}" in shown and "<xmask" not in shown
    assert "test images of ShanghaiTech A" in shown
    table = pd.read_csv(out / "counts.csv", keep_default_na=False).set_index("name")
    assert "the file is empty" in table.error["empty"]
    assert "cannot be read as an image" in table.error["cut"]
    assert "cannot be read as an image" in table.error["letter"]
    assert "1 x 1 px" in table.error["dot"]
    assert table.repairs["grey"] == "grey to RGB"
    assert table.repairs["print"] == "CMYK to RGB"
    assert "16-bit" in table.repairs["deep"]
    assert table.repairs["phone"] == "turned upright (EXIF orientation 6)"
    assert table.repairs["plain"] == table.error["plain"] == ""
    for name in ("plain", "grey", "print", "phone", "deep"):
        labels = read_labels(out / f"{name}.masks.png")
        points = pd.read_csv(out / f"{name}.points.csv")
        assert labels.shape == (96, 128) == (int(table.height[name]), int(table.width[name]))
        assert int(table["count"][name]) == len(points) >= labels.max() > 0
        assert list(points.area) == list(np.bincount(labels.ravel(), minlength=len(points) + 1)[1:])
        assert Image.open(out / f"{name}.overlay.png").size == (128, 96)
    assert (read_labels(out / "grey.masks.png") == read_labels(out / "deep.masks.png")).all()
    assert not list(out.rglob(".partial-*"))
    assert not list(out.glob("dot.*")) and not list(out.glob("empty.*"))


def test_what_is_written_is_what_the_model_says(folder, tmp_path, model, scene):
    rows = photos.run(photos.find([folder / "plain.png"]), model, tmp_path, progress=False)
    prediction = model.predict(scene)
    assert rows[0].count == prediction.count
    np.testing.assert_array_equal(read_labels(tmp_path / "plain.masks.png"), prediction.instances)
    points = pd.read_csv(tmp_path / "plain.points.csv")
    np.testing.assert_allclose(points[["x", "y"]], prediction.points)
    np.testing.assert_allclose(points.score, prediction.scores, rtol=1e-5)
    assert files.read_json(tmp_path / "model.json")["sha256"] == model.record["sha256"]


def test_one_coco_file_holds_all_images_of_the_call(folder, tmp_path, model):
    photos.run(photos.find([folder]), model, tmp_path, progress=False)
    with contextlib.redirect_stdout(io.StringIO()):
        reader = COCO(str(tmp_path / "coco.json"))
    assert len(reader.imgs) == 5 and len(set(reader.getAnnIds())) == len(reader.anns)
    for image in reader.imgs.values():
        name = photos.Path(image["file_name"]).stem
        again = np.zeros((image["height"], image["width"]), np.int32)
        for one in reader.loadAnns(reader.getAnnIds(imgIds=[image["id"]])):
            again[reader.annToMask(one) > 0] = one["head"]
            assert one["source"] == "predicted" and 0.5 <= one["score"] <= 1
            assert one["area"] == (again == one["head"]).sum() and one["category_id"] == 1
        np.testing.assert_array_equal(again, read_labels(tmp_path / f"{name}.masks.png"))


def test_an_interrupted_call_goes_on_where_it_was(folder, tmp_path, model, monkeypatch):
    wanted = photos.find([folder / "plain.png", folder / "grey.png", folder / "print.jpg"])
    once, seen = type(model).predict, []

    def counted(self, image, **options):
        seen.append(options["name"])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return once(self, image, **options)

    monkeypatch.setattr(type(model), "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        photos.run(wanted, model, tmp_path, progress=False)
    assert (tmp_path / "plain.masks.png").exists() and not (tmp_path / "grey.masks.png").exists()
    rows = photos.run(wanted, model, tmp_path, progress=False)
    assert len(seen) == 4 and not any(row.error for row in rows)  # plain once, grey twice
    assert photos.run(wanted, model, tmp_path, progress=False) == rows and len(seen) == 4


def test_a_changed_image_model_or_output_is_made_again(folder, tmp_path, model, monkeypatch):
    wanted = photos.find([folder / "plain.png"])
    photos.run(wanted, model, tmp_path, progress=False)
    before = (tmp_path / "plain.masks.png").stat().st_mtime_ns

    def made_again():
        nonlocal before
        photos.run(wanted, model, tmp_path, progress=False)
        now = (tmp_path / "plain.masks.png").stat().st_mtime_ns
        changed, before = now != before, now
        return changed

    assert not made_again()
    (tmp_path / "plain.points.csv").write_text("x,y\n")
    assert made_again()
    (tmp_path / "plain.overlay.png").unlink()
    assert made_again()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "plain.png")
    assert made_again()
    photos.run(wanted, model, tmp_path, max_side=48, progress=False)
    assert made_again() and files.read_json(tmp_path / "model.json")["max_side"] is None
    monkeypatch.setitem(model.record, "sha256", "0" * 64)
    with pytest.raises(ValueError, match="holds 1 results of another model.*--overwrite"):
        made_again()
    assert (tmp_path / "plain.masks.png").stat().st_mtime_ns == before
    photos.run(wanted, model, tmp_path, overwrite=True, progress=False)
    assert made_again() is True and not made_again()


def test_files_folders_and_globs_name_each_image_once(folder, tmp_path):
    deeper = folder / "deeper"
    deeper.mkdir()
    Image.new("RGB", (9, 9)).save(deeper / "plain.png")
    Image.new("RGB", (9, 9)).save(deeper / "other.tiff")
    here = [photo.path.name for photo in photos.find([folder])]
    assert "notes.txt" not in here and "other.tiff" not in here and len(here) == 9
    twice = photos.find([folder / "plain.png", folder, str(folder / "p*.png")])
    assert [photo.path.name for photo in twice][0] == "plain.png" and len(twice) == 9
    below = photos.find([str(folder / "**" / "*.png")])
    names = [photo.name for photo in below]
    assert {"deeper-plain.png", "plain.png", "grey"} <= set(names)
    assert len(set(names)) == len(names) == 6
    with pytest.raises(ValueError, match="no image in this folder"):
        photos.find([tmp_path])
    with pytest.raises(ValueError, match="no image matches"):
        photos.find([str(folder / "*.webp")])


def test_a_missing_file_fails_alone(folder, tmp_path, capsys):
    status = main(["predict", str(folder / "plain.png"), str(folder / "gone.png"), "--out",
                   str(tmp_path / "out")])
    assert status == 1 and "gone.png: no such file" in capsys.readouterr().out
    status = main(["predict", str(folder / "plain.png"), "--out", str(tmp_path / "out")])
    assert status == 0 and "1 of 1 images done" in capsys.readouterr().out


def test_what_no_image_can_cure_is_said_at_once(folder, tmp_path, capsys):
    """Wrong options stop the command before the first image, and name the option or the file."""
    image, out = str(folder / "plain.png"), str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    for words, said in ((["--out", str(tmp_path / "file")], "file: is a file; results need"),
                        (["--out", out, "--max-side", "9"], "--max-side): 9 px; give at least 32"),
                        (["--out", out, "--weights", image], "not a model of this version"),
                        (["--out", out, "--weights", "gone.safetensors"], "no such model. Check"),
                        (["--out", out, "--device", "tpu"], "unknown or not here; give cpu")):
        assert main(["predict", image, *words]) == 1
        caught = capsys.readouterr()
        assert said in caught.err and "heads" not in caught.out
    assert not (tmp_path / "out").exists()


def test_a_failure_names_its_file_once(folder, tmp_path, capsys):
    gone = str(folder / "gone.png")
    main(["predict", gone, "--out", str(tmp_path / "out")])
    caught = capsys.readouterr()
    assert f"{gone}: no such file\n" in caught.out and (caught.out + caught.err).count(gone) == 1


def test_a_second_call_adds_to_the_first(folder, tmp_path, model):
    out = tmp_path / "out"
    photos.run(photos.find([folder / "plain.png"]), model, out, progress=False)
    before = {p.name: files.sha256(p) for p in out.glob("plain.*")}
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(other / "plain.png")
    (other / "grey.png").write_bytes((folder / "grey.png").read_bytes())
    photos.run(photos.find([other]), model, out, progress=False)
    assert {name: files.sha256(out / name) for name in before} == before
    table = pd.read_csv(out / "counts.csv")
    assert list(table.name) == ["grey", "other-plain.png", "plain"]
    assert [Path(one).parent.name for one in table.image] == ["other", "other", folder.name]
    assert len(files.read_json(out / "coco.json")["images"]) == 3
    for wanted in ([other, folder / "plain.png"], [folder / "grey.png"]):  # the same photo, moved
        photos.run(photos.find(wanted), model, out, progress=False)
        assert list(pd.read_csv(out / "counts.csv").name) == ["grey", "other-plain.png", "plain"]
    one_call = tmp_path / "one call"
    photos.run(photos.find([folder / "plain.png", other / "grey.png"]), model, one_call,
               progress=False)
    for path in one_call.glob("plain.*"):
        assert files.sha256(path) == before[path.name]


def test_photos_never_lie_in_the_folder_of_the_results(folder, model, capsys):
    for _ in range(2):
        assert main(["predict", str(folder), "--out", str(folder)]) == 1
        assert "no record of xmask" in capsys.readouterr().err
    for _ in range(2):
        main(["predict", str(folder), "--out", str(folder), "--overwrite"])
        assert "of 9 images done" in capsys.readouterr().out  # overlays and masks are no photos


def test_what_the_user_wrote_or_changed_is_kept(folder, tmp_path, model, caplog):
    wanted = photos.find([folder / "plain.png", folder / "grey.png"])
    photos.run(wanted[:1], model, tmp_path, progress=False)
    (tmp_path / "counts.csv").write_text("my notes")
    (tmp_path / "grey.points.csv").write_text("mine")
    rows = photos.run(wanted, model, tmp_path, progress=False)
    assert (tmp_path / "counts.csv.set-aside-1").read_text() == "my notes"
    assert "set aside as counts.csv.set-aside-1" in caplog.text
    assert "grey.points.csv: was not written by xmask" in rows[1].error and not rows[0].error
    assert (tmp_path / "grey.points.csv").read_text() == "mine"
    rows = photos.run(wanted, model, tmp_path, overwrite=True, progress=False)
    assert not any(row.error for row in rows)


def test_results_of_two_models_in_one_folder_are_told(folder, tmp_path, model, monkeypatch,
                                                       caplog):
    plain, grey = photos.find([folder / "plain.png", folder / "grey.png"])
    photos.run([plain], model, tmp_path, progress=False)
    assert "of another model" not in caplog.text
    monkeypatch.setitem(model.record, "sha256", "0" * 64)
    photos.run([grey], model, tmp_path, overwrite=True, progress=False)
    assert "1 of the 2 results in counts.csv and coco.json are of another model" in caplog.text


@pytest.mark.parametrize("damage", ["gone", "text", "cut", "count", "name"])
def test_damaged_notes_of_one_photo_stop_no_other(folder, tmp_path, model, damage, caplog):
    plain, grey = photos.find([folder / "plain.png", folder / "grey.png"])
    photos.run([plain], model, tmp_path, progress=False)
    part, note = (tmp_path / ".xmask" / kind / f"plain.{end}"
                  for kind, end in (("coco", "jsonl"), ("notes", "json")))
    if damage == "gone":
        part.unlink()
    elif damage == "text":
        part.write_text("garbage")
    elif damage == "cut":
        note.write_text(note.read_text()[:40])
    else:
        found = files.read_json(note)
        found["row"] |= {"count": "many"} if damage == "count" else {"name": "../../victim"}
        note.write_text(json.dumps(found))
    rows = photos.run([grey], model, tmp_path, progress=False)
    assert not rows[0].error
    assert list(pd.read_csv(tmp_path / "counts.csv")["name"]) == ["grey"]
    assert "the notes about plain are damaged" in caplog.text
    assert not any(row.error for row in photos.run([plain], model, tmp_path, progress=False))
    assert set(pd.read_csv(tmp_path / "counts.csv")["name"]) == {"plain", "grey"}


@pytest.mark.parametrize("failure", ["moved", ".overlay.png", ".masks.png", ".jsonl"])
def test_a_finished_result_stays_when_a_later_call_fails(folder, tmp_path, model, monkeypatch,
                                                         failure):
    wanted = photos.find([folder / "plain.png", folder / "grey.png"])
    photos.run(wanted, model, tmp_path, progress=False)
    before = pd.read_csv(tmp_path / "counts.csv").set_index("name")
    replacing, options = files.replacing, {}

    def full(path):
        if os.fspath(path).endswith(failure):
            raise OSError(28, "No space left on device", str(path))
        return replacing(path)
    if failure == "moved":
        (folder / "plain.png").rename(folder / "elsewhere.png")
    else:
        monkeypatch.setattr(files, "replacing", full)
        options = {"max_side": 48}
    rows = photos.run(wanted, model, tmp_path, progress=False, **options)
    assert rows[0].error
    after = pd.read_csv(tmp_path / "counts.csv").set_index("name")
    assert after.loc["plain", "error"] and len(after) == 2
    # from the masks on, what lies there is half of the new settings
    stays = failure != ".jsonl"
    assert (after["count"] == before["count"]).tolist() == [stays] * 2
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert len(images) == (2 if stays else 0)


def test_names_that_look_like_our_own_are_names(tmp_path, scene, model):
    for name in ("a.jpg", "a.row.jpg", "a.points.jpg", "counts.jpg", "A.png"):
        Image.fromarray(scene).save(tmp_path / name)
    rows = photos.run(photos.find([tmp_path]), model, tmp_path / "out", progress=False)
    assert not any(row.error for row in rows) and len({row.name for row in rows}) == 5
    again = photos.run(photos.find([tmp_path]), model, tmp_path / "out", progress=False)
    assert again == rows


def test_a_bad_photo_does_not_take_the_row_of_another_one_of_its_name(tmp_path):
    for folder in "AB":
        (tmp_path / folder).mkdir()
    Image.fromarray(draw_scene(1, shape=(96, 128), people=5).image).save(tmp_path / "A" / "x.png")
    (tmp_path / "B" / "x.png").write_bytes(b"no image")
    out = str(tmp_path / "out")
    assert main(["predict", str(tmp_path / "A" / "x.png"), "--out", out]) == 0
    assert main(["predict", str(tmp_path / "B" / "x.png"), "--out", out]) == 1
    rows = pd.read_csv(tmp_path / "out" / "counts.csv")
    assert rows["error"].isna().tolist() == [True, False]
    assert [Path(name).parent.name for name in rows["image"]] == ["A", "B"]
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 1


def test_photos_on_two_drives_need_no_folder_in_common(tmp_path, monkeypatch):
    def apart(_):
        raise ValueError("Paths don't have the same drive")  # as on Windows

    monkeypatch.setattr(photos.os.path, "commonpath", apart)
    assert photos._names([tmp_path / "C" / "a.jpg", tmp_path / "D" / "b.jpg"]) == ["a", "b"]
