"""`check_dataset` finds every kind of damage, says what to do, and never falls over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

from xmask import files
from xmask.data.check import COLUMNS, check_dataset

REAL = Path(__file__).parents[2].parent / "shared/data"


def build(root, numbers=(1, 2, 3)):
    """A drawn UCF-QNRF of 24×32 images with one head each, and masks."""
    folder = root / "UCF-QNRF_ECCV18"
    for split in ("Train", "Test"):
        (folder / split).mkdir(parents=True)
        for number in numbers:
            stem = folder / split / f"img_{number:04d}"
            Image.fromarray(np.full((24, 32, 3), 9, np.uint8)).save(f"{stem}.jpg")
            annotate(stem, [[4, 5]])
            files.write_png(f"{stem}_instances.png", np.ones((24, 32), np.uint16))
    files.write_json(folder / "synthetic.json",
                     {"images": {"train": len(numbers), "test": len(numbers)}})
    return folder


def annotate(stem, points):
    savemat(f"{stem}_ann.mat", {"annPoints": np.asarray(points, float)})


def check(root, name="qnrf"):
    table = check_dataset(name, root, progress=False)
    assert list(table.columns) == COLUMNS and set(table.status) <= {"ok", "warning", "error"}
    assert (table.remedy[table.status != "ok"] != "").all()
    return table


def row(table, item, split="train"):
    return table[(table["item"] == item) & (table.split == split)].iloc[0]


def test_a_sound_data_set_is_ok_throughout(tmp_path):
    table = check(build(tmp_path))
    assert (table.status == "ok").all() and set(table.split) == {"train", "test"}
    assert row(table, "images").found == row(table, "images").expected == 3
    assert row(table, "heads").found == 3 and pd.isna(row(table, "heads").expected)


def test_a_missing_data_set_is_a_row(tmp_path):
    table = check(tmp_path)
    assert table.status.tolist() == ["error"] and "UCF-QNRF not found" in table.remedy[0]


def test_an_unknown_name_is_the_callers_mistake(tmp_path):
    with pytest.raises(ValueError, match="no data set 'cifar'"):
        check_dataset("cifar", tmp_path)


def test_checking_draws_nothing(tmp_path):
    assert (check(tmp_path, "synthetic").status == "error").all()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_marker_is_a_row(tmp_path):
    (build(tmp_path) / "synthetic.json").write_text("{")
    table = check(tmp_path)
    assert table.status.tolist() == ["error"] and "not valid JSON" in table.remedy[0]


def test_a_missing_split_is_a_row_and_the_other_is_checked(tmp_path):
    folder = build(tmp_path)
    (folder / "Test").rename(folder / "elsewhere")
    table = check(folder)
    assert row(table, "split folder", "test").status == "error"
    assert (table.status[table.split == "train"] == "ok").all()


def test_missing_files_are_counted_and_named(tmp_path):
    folder = build(tmp_path)
    (folder / "Train/img_0002_ann.mat").unlink()
    (folder / "Train/img_0003.jpg").unlink()
    table = check(folder)
    for item in ("images", "annotations"):
        assert (row(table, item).found, row(table, item).status) == (2, "error")
    lone = row(table, "images without annotation")
    assert lone.found == 1 and "img_0002.jpg" in lone.remedy
    assert "img_0003_ann.mat" in row(table, "annotations without image").remedy


def test_a_smaller_or_larger_data_set_is_an_error(tmp_path):
    folder = build(tmp_path)
    (folder / "synthetic.json").unlink()
    images = row(check(folder), "images")
    assert (images.found, images.expected, images.status) == (3, 1201, "error")
    assert "Download UCF-QNRF again" in images.remedy
    files.write_json(folder / "synthetic.json", {"images": {"train": 2, "test": 3}})
    assert "Remove the files" in row(check(folder), "images").remedy


def test_a_marker_without_counts_still_gets_a_full_check(tmp_path):
    folder = build(tmp_path)
    files.write_json(folder / "synthetic.json", {})
    table = check(folder)
    assert (table.status == "ok").all() and row(table, "images").found == 3


def test_damaged_files_are_found_by_reading_them_all(tmp_path):
    folder = build(tmp_path) / "Train"
    whole = (folder / "img_0001.jpg").read_bytes()
    (folder / "img_0001.jpg").write_bytes(whole[:-40])
    (folder / "img_0002_ann.mat").write_bytes(b"nothing")
    files.write_png(folder / "img_0003_instances.png", np.ones((5, 5), np.uint16))
    table = check(folder.parent)
    for item, name in (("unreadable images", "img_0001.jpg"),
                       ("unreadable annotations", "img_0002_ann.mat"),
                       ("unreadable masks", "img_0003_instances.png")):
        found = row(table, item)
        assert (found.found, found.expected, found.status) == (1, 0, "error")
        assert name in found.remedy
    assert (table.status[table.split == "test"] == "ok").all()


def test_missing_masks_of_a_drawn_data_set_are_errors(tmp_path):
    folder = build(tmp_path)
    (folder / "Train/img_0003_instances.png").unlink()
    assert row(check(folder), "unreadable masks").status == "error"


def test_what_the_reader_handles_is_counted_but_no_fault(tmp_path):
    folder = build(tmp_path, numbers=range(1, 8)) / "Train"
    stems = [folder / f"img_{n:04d}" for n in range(1, 8)]
    image = Image.fromarray(np.full((24, 32, 3), 9, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("L").save(f"{stems[0]}.jpg")
    image.convert("CMYK").save(f"{stems[1]}.jpg")
    annotate(stems[2], np.zeros((0, 2)))
    files.write_png(f"{stems[2]}_instances.png", np.zeros((24, 32), np.uint16))
    image.save(f"{stems[3]}.jpg", exif=exif)
    files.write_png(f"{stems[3]}_instances.png", np.ones((32, 24), np.uint16))
    image.save(f"{stems[4]}.jpg", exif=exif)
    annotate(stems[4], [[30, 5]])
    annotate(stems[5], [[32, 5], [-0.5, 2], [3, 3], [3, 3], [3, 3]])
    table = check(folder.parent)
    expected = {
        "greyscale images": 1, "CMYK images": 1, "images without heads": 1,
        "images turned by EXIF": 1, "images not turned despite EXIF": 1, "points outside": 2,
        "images with points outside": 1, "duplicate points": 2, "heads": 10}
    for item, count in expected.items():
        assert (item, row(table, item).found) == (item, count)
    assert (table.status == "ok").all()


def test_points_far_outside_are_a_warning(tmp_path):
    folder = build(tmp_path)
    annotate(folder / "Train/img_0002", [[500, 5]])
    table = check(folder)
    far = row(table, "images with points over 1 px outside")
    assert (far.found, far.status) == (1, "warning") and "img_0002.jpg" in far.remedy
    assert not (table.status == "error").any()


@pytest.mark.skipif(not (REAL / "ShanghaiTech").is_dir(),
                    reason=f"ShanghaiTech A is not at {REAL}")
def test_the_real_data_are_sound():
    table = check(REAL, "sha")
    assert (table.status == "ok").all()
    assert row(table, "heads").found == 162413 and row(table, "heads", "test").found == 78862
    for split, duplicates, outside, grey in (("train", 63, 46, 11), ("test", 61, 25, 9)):
        assert row(table, "duplicate points", split).found == duplicates
        assert row(table, "points outside", split).found == outside
        assert row(table, "greyscale images", split).found == grey
