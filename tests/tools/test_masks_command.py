"""`xmask masks`: what it writes, what it survives, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tests.warm import Program
from xmask import files
from xmask.cli import main
from xmask.data.masks import read_masks
from xmask.edp_sam import generate_masks
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.tools import mask_folder

CLASSICAL = ["--segmenter", "classical"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    assert main(["data", "draw", "--layout", "sha", "--out", str(folder), "--train", "4",
                 "--test", "1", "--seed", "3"]) == 0
    return folder


def masks(root, out, *more):
    return main(["masks", "--dataset", "sha", "--root", str(root), "--out", str(out), *more])


def test_a_dataset_gets_masks_a_manifest_coco_and_a_contact_sheet(drawn, tmp_path, capsys):
    assert masks(drawn, tmp_path, *CLASSICAL) == 0
    shown = capsys.readouterr().out
    manifest = files.read_json(tmp_path / "manifest.json")
    heads = sum(one["heads"] for one in manifest["images"].values())
    assert "4 of 4 images have masks, 0 failed" in shown and f"{heads} heads: " in shown
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["images"]) == 4 and len(coco["annotations"]) == heads
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width == 4 * mask_folder.TILE[0]
    worst = mask_folder.confidence(tmp_path)
    assert worst["confidence"].is_monotonic_increasing and worst["heads"].sum() == heads


@pytest.mark.parametrize("split, workers", [("train", "1"), ("train", "2"), ("test", "1")])
def test_files_of_the_dataset_are_not_replaced_even_if_asked(drawn, tmp_path, split, workers,
                                                             capsys):
    root = tmp_path / "copy"
    shutil.copytree(drawn, root)
    truth = next(root.rglob(f"{split}_data")) / "instances"
    before = {path: files.sha256(path) for path in root.rglob("*") if path.is_file()}
    assert masks(root, truth, *CLASSICAL, "--overwrite", "--workers", workers) == 1
    assert "is read by this command, and stays as it is" in capsys.readouterr().err
    assert {path: files.sha256(path) for path in before} == before


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes with names")
@pytest.mark.parametrize("place", ["images/IMG_2.jpg", "ground-truth/GT_IMG_2.mat"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("gone", path)])
def test_what_is_no_file_costs_no_other_its_masks(drawn, tmp_path, place, make, capsys):
    root = tmp_path / "copy"
    shutil.copytree(drawn, root)
    path = next(root.rglob("train_data")) / place
    path.unlink()
    make(path)
    assert masks(root, tmp_path / "out", *CLASSICAL, "--limit", "2") == 1
    shown = capsys.readouterr().out
    assert "1 of 2 images have masks, 1 failed" in shown and "failed: IMG_2: " in shown


def test_a_photo_that_breaks_after_its_masks_were_made_stops_nothing(drawn, tmp_path, caplog):
    root = tmp_path / "copy"
    shutil.copytree(drawn, root)
    assert masks(root, tmp_path / "out", *CLASSICAL, "--limit", "1") == 0
    photo = next(root.rglob("train_data")) / "images" / "IMG_1.jpg"
    photo.write_bytes(photo.read_bytes()[:-100])
    assert masks(root, tmp_path / "out", *CLASSICAL, "--limit", "2") == 0
    assert "left out of" in caplog.text and "IMG_1.jpg: cannot be read" in caplog.text


def test_masks_and_predictions_do_not_share_a_folder(drawn, tmp_path, capsys):
    image = next(drawn.rglob("train_data")) / "images" / "IMG_1.jpg"
    predict = ["predict", str(image), "--weights", "drawn", "--out"]
    assert main([*predict, str(tmp_path / "p")]) == 0
    assert masks(drawn, tmp_path / "m", *CLASSICAL, "--limit", "1") == 0
    before = {p: files.sha256(p) for p in tmp_path.glob("*/*") if p.is_file()}
    capsys.readouterr()
    assert masks(drawn, tmp_path / "p", *CLASSICAL, "--limit", "1") == 1
    assert "holds results of `xmask predict`" in capsys.readouterr().err
    assert main([*predict, str(tmp_path / "m")]) == 1
    assert "holds masks of `xmask masks`" in capsys.readouterr().err
    assert {p: files.sha256(p) for p in tmp_path.glob("*/*") if p.is_file()} == before
    assert masks(drawn, tmp_path / "p", *CLASSICAL, "--limit", "1", "--overwrite") == 0


def test_a_killed_run_leaves_nothing_half_written_and_goes_on(drawn, tmp_path):
    process = Program("-m", "xmask", "masks", "--dataset", "sha", "--root", drawn, "--out",
                      tmp_path / "killed", *CLASSICAL, "--workers", "2", log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("IMG_*.csv")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill_all()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("IMG_*.csv")}
    assert done
    for path in done:
        with Image.open(path.with_suffix(".png")) as picture:
            picture.load()
    left = tmp_path / "killed" / ".xmask" / ".partial-left.png"
    left.write_bytes(b"half")
    for half in left.parent.glob(".partial-*"):
        os.utime(half, (time.time() - 7200,) * 2)  # young ones could be another process's
    assert masks(drawn, tmp_path / "killed", *CLASSICAL) == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done  # no image is made twice
    assert not list((tmp_path / "killed").rglob(".partial-*"))
    assert masks(drawn, tmp_path / "whole", *CLASSICAL) == 0
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("times.csv", ".xmask"):
            assert files.sha256(path) == files.sha256(tmp_path / "killed" / path.name), path.name


def write_sha(root, pictures):
    """A part_A with these pictures: name -> (file content or array, points)."""
    folder = root / "part_A" / "train_data"
    (folder / "images").mkdir(parents=True)
    (folder / "ground-truth").mkdir()
    for number, (picture, points) in enumerate(pictures, start=1):
        path = folder / "images" / f"IMG_{number}.jpg"
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            picture.save(path, format="PNG")  # Pillow goes by content, as readers must
        cell = np.empty((1, 1), object)
        cell[0, 0] = {"location": np.array(points, float).reshape(-1, 2), "number": len(points)}
        savemat(folder / "ground-truth" / f"GT_IMG_{number}.mat", {"image_info": cell})
    images = {"train": len(pictures), "test": 0}
    files.write_json(root / "part_A" / "synthetic.json", {"images": images})
    for number, (picture, _) in enumerate(pictures, start=1):
        size = (1, 1) if isinstance(picture, bytes) else picture.size[::-1]
        files.write_png(folder / "instances" / f"IMG_{number}.png", np.zeros(size, np.uint16))
    return root


def noise(height=60, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_bad_input_gets_a_repair_or_an_error_and_the_rest_goes_on(tmp_path, capsys):
    colour = Image.fromarray(noise())
    grey16 = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257)
    crowd = np.random.default_rng(1).uniform(0, 55, (8, 2))
    root = write_sha(tmp_path, [
        (colour, []),  # no heads
        (colour, [[40, 30]]),  # one head
        (colour, [[-3, 5], [200, 30], [20, 20]]),  # two outside the image
        (colour, [[30, 30], [30, 30], [50, 20]]),  # two at one place
        (colour.convert("L"), crowd), (grey16, crowd), (colour.convert("P"), crowd),
        (b"\xff\xd8 not a picture", crowd),
    ])
    out = tmp_path / "masks"
    assert masks(root, out, *CLASSICAL) == 1
    captured = capsys.readouterr()
    assert "7 of 8 images have masks, 1 failed" in captured.out
    assert "masks failed for 1 of 8 images, the first IMG_8" in captured.err
    manifest = files.read_json(out / "manifest.json")
    assert list(manifest["failed"]) == ["IMG_8"] and "IMG_8.jpg" in manifest["failed"]["IMG_8"]
    found = manifest["images"]
    assert found["IMG_1"]["heads"] == 0 and found["IMG_2"]["heads"] == 1
    assert found["IMG_3"]["repairs"] == {"clipped": 2}
    assert found["IMG_4"]["repairs"] == {"duplicates": 1}
    assert found["IMG_4"]["flags"]["coincident"] == 2
    assert [found[f"IMG_{k}"]["repairs"] for k in (5, 6, 7)] == [
        {"grey": 1}, {"16_bit_grey": 1}, {"palette": 1}]
    assert "repairs: 2 clipped, 1 duplicates, 1 grey, 1 16_bit_grey, 1 palette" in captured.out
    for k in range(2, 8):
        table = pd.read_csv(out / f"IMG_{k}.csv")
        assert (table["area"] > 0).all() and len(np.unique(read_masks(
            out, f"IMG_{k}"))) == len(table) + 1


def test_five_thousand_heads_each_get_a_mask():
    points = np.random.default_rng(0).uniform(0, (799, 599), (5000, 2))
    labels, table = generate_masks(
        np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8), points,
        ClassicalSegmenter())
    assert (table["area"] > 0).all() and len(np.unique(labels)) == 5001


@pytest.mark.parametrize("segmenter", ["bundled", "classical"])
def test_a_panorama_of_8000_px_gets_a_mask_for_every_head(segmenter, tmp_path):
    # A row of dark heads of 12 px along all of it, so that crops are needed far from both ends.
    points = np.stack([np.arange(60, 8000, 264), 60 + 20 * np.sin(np.arange(31))], axis=1)
    image = np.full((120, 8000, 3), 190, np.uint8)
    y, x = np.indices(image.shape[:2])
    for at in points:
        part = np.s_[:, int(at[0]) - 9:int(at[0]) + 10]
        image[part][np.hypot(x[part] - at[0], y[part] - at[1]) <= 6] = 40
    Image.fromarray(image).save(tmp_path / "wide.png")
    pd.DataFrame(points, columns=["x", "y"]).to_csv(tmp_path / "dots.csv", index=False)
    assert main(["masks", "--image", str(tmp_path / "wide.png"), "--points",
                 str(tmp_path / "dots.csv"), "--out", str(tmp_path / "out"),
                 "--segmenter", segmenter]) == 0
    table = pd.read_csv(tmp_path / "out" / "wide.csv")
    assert len(table) == 31 and (table["area"] > 0).all() and (table["source"] != "disc").any()
    labels = read_masks(tmp_path / "out", "wide")
    assert labels.shape == (120, 8000)
    # Most are about as large as what was drawn (113 px), from the first to the last.
    right = table["area"].between(60, 230)
    assert right.mean() > 0.8 and right.iloc[[0, -1]].any()


def test_one_image_and_a_table_of_points(tmp_path, capsys):
    Image.fromarray(noise()).save(tmp_path / "photo.png")
    (tmp_path / "dots.csv").write_text("x,y\n20,30\n60,-4\n")
    arguments = ["masks", "--image", str(tmp_path / "photo.png"), "--points",
                 str(tmp_path / "dots.csv"), "--out", str(tmp_path / "out"), *CLASSICAL]
    assert main(arguments) == 0
    assert set(np.unique(read_masks(tmp_path / "out", "photo"))) == {0, 1, 2}
    assert files.read_json(tmp_path / "out" / "manifest.json")["images"]["photo"]["repairs"] == {
        "clipped": 1}
    for content, found in (("a,b\n1,2\n", "expected a table with columns x and y"),
                           ("x,y\n1,2\n3,somewhere\n", "line 3 is"), ("", "columns x and y"),
                           ("x,y\n10,20,5\n", "more fields than the header (x, y)"),
                           ("x,y\n1,2\n10,20,5\n", "columns x and y")):
        (tmp_path / "dots.csv").write_text(content)
        assert main(arguments) == 1
        assert found in capsys.readouterr().err


def test_ctrl_c_ends_the_workers_without_a_traceback(drawn, tmp_path):
    out = tmp_path / "out"
    process = Program("-m", "xmask", "masks", "--dataset", "sha", "--root", drawn, "--out", out,
                      "--workers", "2", log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not list(out.glob("IMG_*.csv")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    code, shown = process.wait(), process.said()
    assert code == 130 and "the same command goes on from here" in shown
    assert "Traceback" not in shown and "Interrupt" not in shown


def test_shards_at_the_same_time_give_what_one_call_gives(drawn, tmp_path):
    command = ["masks", "--dataset", "sha", "--root", drawn, "--out", tmp_path / "parts",
               *CLASSICAL, "--shard"]
    shards = [Program("-m", "xmask", *command, f"{k}/2", log=tmp_path / f"log-{k}") for k in (1, 2)]
    for shard in shards:
        assert shard.wait() == 0, shard.said()
        assert "2 of 2 images have masks, 0 failed" in shard.said()
    assert masks(drawn, tmp_path / "whole", *CLASSICAL) == 0
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "parts").iterdir()}
    for name in names - {"times.csv", ".xmask"}:
        assert files.sha256(tmp_path / "parts" / name) == files.sha256(tmp_path / "whole" / name)


@pytest.mark.parametrize("arguments,found", [
    ([], "give either --dataset and --root, or --image and --points"),
    (["--dataset", "sha"], "--root: give the folder of sha"),
    (["--image", "x.png"], "--points: give a CSV"),
    (["--dataset", "sha", "--root", "DRAWN", "--checkpoint", "none.pth"], "none.pth: no such SAM"),
    (["--dataset", "sha", "--root", "DRAWN", "--checkpoint", "CUT"], "not a readable checkpoint"),
    (["--dataset", "sha", "--root", "DRAWN", "--checkpoint", "VGG"], "not a SAM state dict"),
    (["--dataset", "sha", "--root", "DRAWN", *CLASSICAL, "--boxes"], "has no head sizes"),
    (["--dataset", "sha", "--root", "DRAWN", "--workers", "0"], "each has to be 1 or more"),
])
def test_command_lines_that_cannot_be_are_explained(arguments, found, drawn, tmp_path, capsys):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vgg.pth").read_bytes()[:300])
    places = {"DRAWN": drawn, "CUT": tmp_path / "cut.pth", "VGG": tmp_path / "vgg.pth"}
    arguments = [str(places.get(one, one)) for one in arguments]
    assert main(["masks", *arguments, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert found in shown and "Traceback" not in shown


def test_photos_and_dots_in_the_output_folder_are_safe_and_results_add_up(tmp_path, capsys):
    """As a person does it who keeps all in one place, and then one photo after the other."""
    from tests import hostile

    before = hostile.users_folder(tmp_path / "mine")
    mine = tmp_path / "mine"

    def call(name, out, *more, points="a.csv"):
        return main(["masks", "--image", str(mine / name), "--points", str(mine / points), "--out",
                     str(out), *CLASSICAL, *more])

    assert call("a.jpg", mine) == 1
    assert "no record of xmask" in capsys.readouterr().err and hostile.checksums(mine) == before
    out = tmp_path / "out"
    assert call("a.jpg", out) == 0
    first = {kind: files.sha256(out / f"a.{kind}") for kind in ("png", "csv")}
    assert call("b.png", out) == 0
    assert {kind: files.sha256(out / f"a.{kind}") for kind in first} == first
    coco = json.loads((out / "coco.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == ["a.jpg", "b.png"]
    assert call("other/a.jpg", out) == 0  # the same dots and pixels, at another place
    Image.fromarray(noise()).save(mine / "other" / "a.jpg")
    capsys.readouterr()
    assert call("other/a.jpg", out) == 1
    assert "which has the same name" in capsys.readouterr().err
    assert call("a.jpg", out, "--boxes") == 1  # other settings
    assert "made with another options" in capsys.readouterr().err
    assert call("a.jpg", out, "--boxes", "--overwrite") == 1  # nor then: b would be lost
    assert "make those of all anew: b is not among" in capsys.readouterr().err
    for name in ("b.png", "b.csv"):  # a photo that lies there is not replaced, nor removed
        (out / name).unlink()
    shutil.copy(mine / "b.png", out / "b.png")
    assert call("b.png", out) == 0 and (out / "b.png.set-aside-1").read_bytes() == (
        mine / "b.png").read_bytes()
