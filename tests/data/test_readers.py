"""What the readers promise: every pair of files, honestly counted, brought into the image."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy.io import savemat

from xmask import files
from xmask.cli import main
from xmask.data import images, mat_file, open_dataset, read_image, readers
from xmask.data.annotations import clip_points, read_jhu, read_qnrf, read_shanghaitech
from xmask.data.layouts import LAYOUTS
from xmask.data.readers import turns_upright
from xmask.synthetic import write_dataset

REAL = Path(__file__).parents[2].parent / "shared/data"
needs_real_data = pytest.mark.skipif(
    not (REAL / "ShanghaiTech").is_dir(), reason=f"ShanghaiTech A is not at {REAL}")

ORIENTATION = 0x0112


def picture(shape=(24, 32), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def save_jpeg(path, array=None, orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    image = array if isinstance(array, Image.Image) else Image.fromarray(
        picture() if array is None else array)
    image.save(path, quality=95, exif=exif)


def shanghaitech_mat(path, points):
    """The nesting of the real files: a cell with a structure with cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = np.zeros((1, 1), dtype=[("location", object), ("number", object)])
    record[0, 0] = (np.asarray(points, float), np.array([[len(points)]], np.uint8))
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = record
    savemat(path, {"image_info": cell})


def build_sha(root, train=(3,), test=(2,), folder="part_A", truth="ground-truth", drawn=True):
    """A tiny ShanghaiTech: image numbers 1.., with as many points as the tuples say."""
    folder = root / folder
    for split, counts in (("train_data", train), ("test_data", test)):
        for number, count in enumerate(counts, start=1):
            points = np.random.default_rng(number).uniform(0, 24, (count, 2))
            save_jpeg(folder / split / "images" / f"IMG_{number}.jpg")
            shanghaitech_mat(folder / split / truth / f"GT_IMG_{number}.mat", points)
            if drawn:
                masks = folder / split / "instances"
                masks.mkdir(exist_ok=True)
                labels = np.zeros((24, 32), np.uint16)
                labels[0, :count] = np.arange(1, count + 1)
                files.write_png(masks / f"IMG_{number}.png", labels)
    if drawn:
        mark(folder, train=len(train), test=len(test))
    return folder


def mark(folder, **images):
    files.write_json(folder / "synthetic.json", {"images": images})


def build_qnrf(root, points=((1.0, 2.0),), shape=(24, 32)):
    folder = root / "UCF-QNRF_ECCV18"
    for split in ("Train", "Test"):
        save_jpeg(folder / split / "img_0001.jpg", picture(shape))
        savemat(folder / split / "img_0001_ann.mat", {"annPoints": np.asarray(points, float)})
    return folder


def build_jhu(root, text="5 6 3 4 1 0\n7 8 1 2 2 1\n", splits=("train", "val", "test")):
    folder = root / "jhu_crowd_v2.0"
    for split in splits:
        save_jpeg(folder / split / "images" / "0007.jpg")
        (folder / split / "gt").mkdir()
        (folder / split / "gt" / "0007.txt").write_text(text)
    return folder


# --- reading images ---------------------------------------------------------------------------

def test_an_rgb_image_comes_back_as_it_is(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, picture())


def test_grey_images_get_three_equal_channels(tmp_path):
    grey = picture()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey > 127).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(
        read_image(tmp_path / "bit.png")[:, :, 1], np.where(grey > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, suffix):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(
        read_image(tmp_path / f"a.{suffix}")[:, :, 2], [[0, 0, 1], [128, 254, 255]])


def test_32_bit_and_floating_point_images_are_refused_with_a_remedy(tmp_path):
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "f.tif")
    for name in ("i.tif", "f.tif"):
        with pytest.raises(ValueError, match=rf"{name}.*Convert the file to 8 or 16 bits"):
            read_image(tmp_path / name)


def test_cmyk_and_palette_images_become_rgb(tmp_path):
    red = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    Image.fromarray(red).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    Image.fromarray(red).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        assert np.abs(read_image(tmp_path / name).astype(int) - red).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_over_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.convert(mode).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.shape == (4, 4, 3)
    assert read[0, 0].tolist() == [255] * 3 and read[3, 3].tolist() == [0] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(tmp_path, orientation):
    save_jpeg(tmp_path / "a.jpg", orientation=orientation)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), expected)


def test_an_orientation_that_does_not_exist_is_upright(tmp_path):
    save_jpeg(tmp_path / "a.jpg", orientation=99)
    assert read_image(tmp_path / "a.jpg").shape == (24, 32, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_an_error_that_names_file_and_remedy(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(picture((64, 64))).save(path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 30, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}.*download it again"):
            read_image(path)


def test_a_text_file_is_not_an_image_and_a_missing_one_is_said_to_be_missing(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as an image"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: no such image"):
        read_image(tmp_path / "b.jpg")


# --- reading annotations ----------------------------------------------------------------------

@pytest.mark.parametrize("value, expected", [
    (np.zeros((0, 0)), 0), (np.zeros((0, 2)), 0), (np.zeros((1, 0)), 0),
    (np.array([3.0, 4.0]), 1), (np.array([[3.0, 4.0]]), 1), (np.array([[3.0], [4.0]]), 1),
    (np.array([[3, 4], [5, 6]], np.uint16), 2),
])
def test_no_point_one_point_and_many_are_n_by_2(tmp_path, value, expected):
    savemat(tmp_path / "q.mat", {"annPoints": value})
    shanghaitech_mat(tmp_path / "s.mat", value)
    for points, boxes in (read_qnrf(tmp_path / "q.mat"), read_shanghaitech(tmp_path / "s.mat")):
        assert points.shape == (expected, 2) and points.dtype == np.float64 and boxes is None
        assert points[:1].tolist() == [[3, 4]][:expected]


@pytest.mark.parametrize("order", "<>")
def test_a_packed_file_that_unpacks_to_far_more_than_dots_is_refused(tmp_path, order, monkeypatch):
    savemat(tmp_path / "s.mat", {"image_info": {"location": np.zeros((2_000_000, 2))}},
            do_compression=True)
    content = (tmp_path / "s.mat").read_bytes()
    if order == ">":  # as a machine of the other byte order writes the part that is not packed
        content = content[:124] + b"\1\0MI" + np.frombuffer(
            content[128:136], "<u4").astype(">u4").tobytes() + content[136:]
        (tmp_path / "s.mat").write_bytes(content)
    monkeypatch.setattr(mat_file, "loadmat", None)  # it never comes so far
    assert len(content) < 100_000
    with pytest.raises(ValueError, match=r"s\.mat: it unpacks to more than 16 MB"):
        read_shanghaitech(tmp_path / "s.mat")


def test_what_lies_beside_the_dots_of_a_mat_file_does_not_matter(tmp_path):
    others = {"sparse": scipy.sparse.csr_matrix(([1.0], ([2], [3])), (3000, 2000)),
              "region": np.ones((2000, 3000), bool), "text": "seen from above", "none": [],
              "picture": np.zeros((1536, 1024, 3), np.uint8), "cells": np.array(["a", 1], object)}
    for packed in (False, True):
        savemat(tmp_path / "s.mat", {"annPoints": [[1.0, 2.0]], **others}, do_compression=packed)
        np.testing.assert_array_equal(read_qnrf(tmp_path / "s.mat")[0], [[1, 2]])


def test_packed_and_plain_files_are_the_same(tmp_path):
    points = np.random.default_rng(0).uniform(0, 99, (65535, 2))
    for packed in (False, True):
        savemat(tmp_path / "s.mat", {"annPoints": points, "more": "text"}, do_compression=packed)
        np.testing.assert_array_equal(read_qnrf(tmp_path / "s.mat")[0], points)


def test_a_structure_without_the_cell_around_it_is_read_too(tmp_path):
    savemat(tmp_path / "s.mat", {"image_info": {"location": [[1.0, 2.0]], "number": 1}})
    np.testing.assert_array_equal(read_shanghaitech(tmp_path / "s.mat")[0], [[1, 2]])


@pytest.mark.parametrize("value, message", [
    (np.zeros((4, 3)), r"N×2 array of numbers, found shape \(4, 3\)"),
    ("heads", "N×2 array of numbers"),
    (np.array([[1, 2], [np.nan, 3]]), r"row 2 is \[nan, 3.0\]"),
    (np.array([[np.inf, 2]]), "row 1 is"),
])
def test_what_is_not_a_list_of_places_is_refused(tmp_path, value, message):
    savemat(tmp_path / "q.mat", {"annPoints": value})
    with pytest.raises(ValueError, match=rf"q\.mat: field annPoints.*{message}"):
        read_qnrf(tmp_path / "q.mat")


def test_other_fields_are_listed_beside_the_one_expected(tmp_path):
    savemat(tmp_path / "q.mat", {"points": [[1.0, 2.0]], "version": 3})
    with pytest.raises(ValueError, match=r"q\.mat: no field annPoints; fields found: points, vers"):
        read_qnrf(tmp_path / "q.mat")
    with pytest.raises(ValueError, match=r"q\.mat: no field image_info; fields found: points"):
        read_shanghaitech(tmp_path / "q.mat")
    savemat(tmp_path / "s.mat", {"image_info": {"loc": [[1.0, 2.0]]}})
    with pytest.raises(ValueError, match=r"no field image_info.location; .*: image_info.loc\."):
        read_shanghaitech(tmp_path / "s.mat")
    savemat(tmp_path / "n.mat", {"image_info": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"image_info.location; fields found: none"):
        read_shanghaitech(tmp_path / "n.mat")


@pytest.mark.parametrize("length", [0, 50, 160, 250])
def test_a_damaged_mat_file_is_an_error_that_names_it(tmp_path, length):
    shanghaitech_mat(tmp_path / "GT_IMG_1.mat", np.ones((50, 2)))
    whole = (tmp_path / "GT_IMG_1.mat").read_bytes()
    (tmp_path / "GT_IMG_1.mat").write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"GT_IMG_1\.mat: .*download it again"):
        read_shanghaitech(tmp_path / "GT_IMG_1.mat")


def test_a_file_of_zeros_as_broken_downloads_leave_is_refused(tmp_path):
    (tmp_path / "q.mat").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match=r"q\.mat: "):
        read_qnrf(tmp_path / "q.mat")


def test_a_matlab_73_file_says_so(tmp_path):
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "q.mat").write_bytes(header + bytes(512))
    with pytest.raises(ValueError, match=r"q\.mat: a MATLAB 7\.3 \(HDF5\) file"):
        read_qnrf(tmp_path / "q.mat")


def test_jhu_lines_are_heads_with_box_sizes(tmp_path):
    (tmp_path / "a.txt").write_text("10 20 3 4 1 0\n\n30.5 40 5 6 2 1\n")
    points, boxes = read_jhu(tmp_path / "a.txt")
    np.testing.assert_array_equal(points, [[10, 20], [30.5, 40]])
    np.testing.assert_array_equal(boxes, [[3, 4], [5, 6]])


def test_an_empty_jhu_file_is_an_image_without_heads(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    points, boxes = read_jhu(tmp_path / "a.txt")
    assert points.shape == boxes.shape == (0, 2)


@pytest.mark.parametrize("line", ["10 20 3 4", "10 20 3 4 1 x", "10,20,3,4,1,0", "1 2 3 4 5 6 7"])
def test_a_damaged_jhu_line_is_named_with_its_number(tmp_path, line):
    (tmp_path / "a.txt").write_text(f"10 20 3 4 1 0\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: expected six numbers.*download it"):
        read_jhu(tmp_path / "a.txt")


def test_a_binary_jhu_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"a\.txt: not a text file"):
        read_jhu(tmp_path / "a.txt")


# --- bringing points into the image -----------------------------------------------------------

point_lists = st.lists(
    st.tuples(st.integers(-80, 200), st.integers(-80, 200)), max_size=30,
).map(lambda rows: np.array(rows, dtype=np.float64).reshape(-1, 2) / 2)
shapes = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(point_lists, shapes)
@settings(deadline=None, max_examples=200)
def test_clipping_loses_no_head_and_moves_only_those_outside(points, shape):
    inside, repairs = clip_points(points, shape)
    limit = np.array([shape[1] - 1, shape[0] - 1])
    outside = ((points < 0) | (points > limit)).any(axis=1)
    assert inside.dtype == np.float32 and inside.shape == points.shape
    assert ((inside >= 0) & (inside <= limit)).all()
    np.testing.assert_array_equal(inside[~outside], points[~outside])
    assert repairs.get("clipped", 0) == outside.sum()
    assert repairs.get("duplicates", 0) == len(points) - len(set(map(tuple, points)))
    assert all(count > 0 for count in repairs.values())


@given(point_lists, shapes)
@settings(deadline=None, max_examples=100)
def test_clipping_twice_is_clipping_once(points, shape):
    once, _ = clip_points(points, shape)
    twice, repairs = clip_points(once, shape)
    np.testing.assert_array_equal(once, twice)
    assert "clipped" not in repairs


@given(point_lists, shapes, st.integers(1, 8))
@settings(deadline=None, max_examples=100)
def test_points_that_fit_the_upright_image_always_turn_it(points, shape, orientation):
    stored = shape if orientation < 5 else shape[::-1]
    inside, _ = clip_points(points, shape)
    assert turns_upright(inside, stored, orientation)


def test_a_sample_counts_what_was_repaired(tmp_path):
    build_qnrf(tmp_path, [[5, 5], [5, 5], [-3, 2], [31.5, 30], [5, 5]])
    sample = open_dataset("qnrf", tmp_path, allow_partial=True)[0]
    assert sample.repairs == {"clipped": 2, "duplicates": 2}
    np.testing.assert_array_equal(sample.points, [[5, 5], [5, 5], [0, 2], [31, 23], [5, 5]])


def test_an_image_with_exif_is_turned_unless_its_points_fit_only_as_stored(tmp_path):
    folder = build_qnrf(tmp_path, [[5, 30]])
    save_jpeg(folder / "Train/img_0001.jpg", orientation=6)  # stored 24×32, upright 32×24
    dataset = open_dataset("qnrf", tmp_path, allow_partial=True)
    assert dataset[0].shape == (32, 24) and dataset[0].repairs == {"exif_rotated": 1}
    savemat(folder / "Train/img_0001_ann.mat", {"annPoints": [[30.0, 5.0]]})
    assert dataset[0].shape == (24, 32) and dataset[0].repairs == {"exif_ignored": 1}


# --- opening data sets ------------------------------------------------------------------------

@pytest.mark.parametrize("folder", ["part_A", "part_A_final", "ShanghaiTech/part_A"])
@pytest.mark.parametrize("truth", ["ground-truth", "ground_truth"])
def test_shanghaitech_is_found_from_its_folder_and_from_above(tmp_path, folder, truth):
    path = build_sha(tmp_path, folder=folder, truth=truth)
    for root in {tmp_path, path.parent, path}:
        dataset = open_dataset("sha", root)
        assert dataset.ids == ["IMG_1"] and len(dataset[0].points) == 3
        assert dataset.image_path(0) == path / "train_data/images/IMG_1.jpg"


def test_a_string_is_a_root_too(tmp_path):
    build_sha(tmp_path)
    assert len(open_dataset("sha", str(tmp_path), "test")) == 1


def test_a_sample_holds_image_points_masks_and_name(tmp_path):
    build_sha(tmp_path)
    sample = open_dataset("sha", tmp_path)[0]
    assert sample.image.shape == (24, 32, 3) and sample.image.dtype == np.uint8
    assert sample.points.shape == (3, 2) and sample.points.dtype == np.float32
    assert sample.instances.dtype == np.int32 and sample.instances[0, :4].tolist() == [1, 2, 3, 0]
    assert (sample.name, sample.boxes, sample.repairs) == ("IMG_1", None, {})


def test_images_come_in_numeric_order(tmp_path):
    dataset = open_dataset("sha", build_sha(tmp_path, train=range(12)))
    assert dataset.ids == [f"IMG_{n}" for n in range(1, 13)]
    assert dataset.numbers == list(range(1, 13))
    assert dataset.counts().tolist() == list(range(12))
    assert [len(sample.points) for sample in dataset] == list(range(12))
    assert dataset[0].points.shape == (0, 2)


def test_slices_are_datasets_and_other_indices_are_explained(tmp_path):
    dataset = open_dataset("sha", build_sha(tmp_path, train=(1, 2, 3)))
    part = dataset[1:]
    assert part.ids == ["IMG_2", "IMG_3"] and len(part[0].points) == 2
    assert part.settings["images"] == 2 and part.synthetic
    assert dataset[::-1].counts().tolist() == [3, 2, 1]
    assert dataset[-1].name == dataset[np.int64(2)].name == "IMG_3"
    assert dataset.subset([2, 0]).ids == ["IMG_3", "IMG_1"]
    with pytest.raises(TypeError, match=r"not by 'IMG_1'.*dataset\.ids\.index"):
        dataset["IMG_1"]
    with pytest.raises(TypeError, match="number or a slice"):
        dataset[1.0]
    with pytest.raises(IndexError, match="image 3 of 3"):
        dataset[3]


def test_opening_reads_no_file_but_the_marker(tmp_path):
    folder = build_sha(tmp_path)
    for path in folder.rglob("*IMG_1.*"):
        path.write_bytes(b"")
    dataset = open_dataset("sha", folder)
    assert len(dataset) == 1 and "1 images" in repr(dataset)
    with pytest.raises(ValueError, match=r"GT_IMG_1\.mat"):
        dataset[0]


def test_a_dataset_travels_to_worker_processes(tmp_path):
    dataset = pickle.loads(pickle.dumps(open_dataset("sha", build_sha(tmp_path))))
    assert len(dataset[0].points) == 3


def test_qnrf_reads_both_splits_and_masks(tmp_path):
    folder = build_qnrf(tmp_path)
    labels = np.zeros((24, 32), np.uint16)
    labels[2, 1] = 1
    files.write_png(folder / "Test/img_0001_instances.png", labels)
    mark(folder, train=1, test=1)
    test = open_dataset("qnrf", tmp_path, "test")
    np.testing.assert_array_equal(test[0].instances, labels)
    assert test.ids == ["img_0001"] and test.numbers == [1]


def test_jhu_reads_three_splits_and_box_sizes(tmp_path):
    folder = build_jhu(tmp_path)
    for split in ("train", "val", "test"):
        dataset = open_dataset("jhu", folder, split, allow_partial=True)
        np.testing.assert_array_equal(dataset[0].points, [[5, 6], [7, 8]])
        np.testing.assert_array_equal(dataset[0].boxes, [[3, 4], [1, 2]])
        assert dataset[0].instances is None and dataset.numbers == [7]


def test_large_images_are_shrunk_with_points_boxes_and_masks(tmp_path):
    folder = build_jhu(tmp_path, "0 0 8 4 1 0\n31 23 8 4 1 0\n16 12 8 4 1 0\n")
    labels = np.zeros((24, 32), np.uint16)
    labels[:12, :16], labels[12:, 16:] = 1, 2
    (folder / "train/instances").mkdir()
    files.write_png(folder / "train/instances/0007.png", labels)
    sample = open_dataset("jhu", folder, max_side=16, allow_partial=True)[0]
    assert sample.image.shape == (12, 16, 3)
    np.testing.assert_allclose(sample.points, [[0, 0], [15, 11], [7.75, 5.75]])
    np.testing.assert_array_equal(sample.boxes, [[4, 2]] * 3)
    np.testing.assert_array_equal(sample.instances, labels[::2, ::2])
    assert sample.repairs == {} and sample.boxes.dtype == sample.points.dtype == np.float32


def test_shrinking_keeps_the_content_under_the_point():
    square = np.zeros((90, 120, 3), np.uint8)
    square[30:33, 60:63] = 255  # centred at (61, 31)
    small = images.resize_image(square, (30, 40))[:, :, 0]
    assert np.unravel_index(small.argmax(), small.shape) == ((31 + 0.5) / 3 - 0.5,
                                                            (61 + 0.5) / 3 - 0.5)


@given(shapes, shapes)
@settings(deadline=None, max_examples=50)
def test_shrinking_label_maps_invents_no_label(shape, new):
    labels = np.arange(1, shape[0] * shape[1] + 1, dtype=np.int32).reshape(shape)
    small = images.resize_labels(labels, new)
    assert small.shape == new and np.isin(small, labels).all()
    np.testing.assert_array_equal(images.resize_labels(labels, shape), labels)


def test_the_usual_size_limits_apply_and_are_recorded(tmp_path):
    build_qnrf(tmp_path, shape=(4, 2400))
    usual = open_dataset("qnrf", tmp_path, allow_partial=True)
    assert usual[0].shape == (3, 1920) and usual.settings["max_side"] == 1920
    full = open_dataset("qnrf", tmp_path, max_side=0, allow_partial=True)
    assert full[0].shape == (4, 2400) and full.settings["max_side"] is None
    assert full.settings["resized"] == "never"
    assert (LAYOUTS["jhu"].max_side, LAYOUTS["sha"].max_side) == (2048, None)
    with pytest.raises(ValueError, match="max_side is a number of pixels"):
        open_dataset("qnrf", tmp_path, max_side=-1)


def test_settings_can_be_written_as_json(tmp_path):
    dataset = open_dataset("sha", build_sha(tmp_path))
    files.write_json(tmp_path / "settings.json", dataset.settings)
    assert dataset.settings["synthetic"] and dataset.settings["generator"]["images"]["train"] == 1


def test_the_checksum_sees_annotations_sizes_and_names(tmp_path):
    folder = build_sha(tmp_path, train=(2, 3))
    dataset = open_dataset("sha", folder)
    first = dataset.checksum()
    assert first == open_dataset("sha", folder).checksum() != dataset[:1].checksum()
    save_jpeg(folder / "train_data/images/IMG_1.jpg", picture((25, 32)))
    second = dataset.checksum()
    shanghaitech_mat(folder / "train_data/ground-truth/GT_IMG_1.mat", [[1, 2], [3, 4]])
    assert len({first, second, dataset.checksum()}) == 3
    (folder / "train_data/images/IMG_1.jpg").write_bytes(b"")
    assert dataset.checksum() not in (first, second)  # one broken image does not hide the others
    with pytest.raises(ValueError, match=r"IMG_1\.jpg"):
        dataset[0]


def test_the_checksum_of_an_image_changes_with_that_image_only(tmp_path):
    folder = build_sha(tmp_path, train=(2, 3))
    dataset = open_dataset("sha", folder)
    before = [dataset.image_checksum(i) for i in range(2)]
    # One image's checksum is that of the data set with this image only, wherever it stands.
    assert before == [dataset[:1].checksum(), dataset[1:].image_checksum(0)]
    shanghaitech_mat(folder / "train_data/ground-truth/GT_IMG_1.mat", [[1, 2], [3, 4]])
    after = [dataset.image_checksum(i) for i in range(2)]
    assert after[0] != before[0] and after[1] == before[1] == dataset.image_checksum(-1)


def test_counts_are_a_copy(tmp_path):
    dataset = open_dataset("sha", build_sha(tmp_path))
    dataset.counts()[0] = 99
    assert dataset.counts().tolist() == [3]


# --- what opening refuses ---------------------------------------------------------------------

def test_unknown_names_and_splits_are_listed(tmp_path):
    with pytest.raises(ValueError, match="no data set 'SHA'; known: sha, shb, qnrf, jhu, synth"):
        open_dataset("SHA", tmp_path)
    with pytest.raises(ValueError, match="no split 'val'; it has: train, test"):
        open_dataset("sha", build_sha(tmp_path), "val")


def test_a_missing_data_set_says_what_was_looked_for_and_where_to_put_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=(
            r"UCF-QNRF not found: .* holds no such folder. Looked for UCF-QNRF_ECCV18/"
            r"\{Train,Test\}/\{img_<n>.jpg, img_<n>_ann.mat\} .*unpack it to")):
        open_dataset("qnrf", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist.*GT_IMG_<n>.mat"):
        open_dataset("shb", tmp_path / "nowhere")


def test_a_missing_split_is_named(tmp_path):
    folder = build_jhu(tmp_path, splits=("train",))
    with pytest.raises(FileNotFoundError, match="test: the folder of the test split is missing"):
        open_dataset("jhu", folder, "test")


def test_part_b_is_not_part_a(tmp_path):
    folder = build_sha(tmp_path, folder="part_B")
    with pytest.raises(ValueError, match="this is part_B, not ShanghaiTech A"):
        open_dataset("sha", folder)
    with pytest.raises(FileNotFoundError):
        open_dataset("sha", tmp_path)
    assert len(open_dataset("shb", tmp_path)) == 1


def test_two_candidates_are_a_question_not_a_guess(tmp_path):
    build_sha(tmp_path, folder="part_A")
    build_sha(tmp_path, folder="part_A_final")
    with pytest.raises(ValueError, match="2 folders look like ShanghaiTech A.*Give the one"):
        open_dataset("sha", tmp_path)


@pytest.mark.parametrize("pattern, message", [
    ("ground-truth/GT_IMG_{}.mat", r"2 images without an annotation: IMG_2\.jpg, IMG_3\.jpg"),
    ("images/IMG_{}.jpg", r"2 annotations without an image: GT_IMG_2\.mat, GT_IMG_3\.mat"),
])
def test_half_a_pair_is_an_error_that_names_the_files(tmp_path, pattern, message):
    folder = build_sha(tmp_path, train=(1, 1, 1))
    for number in (2, 3):
        (folder / "train_data" / pattern.format(number)).unlink()
    with pytest.raises(ValueError, match=message + r"\. The data set is incomplete.*again"):
        open_dataset("sha", folder)
    assert open_dataset("sha", folder, allow_partial=True).ids == ["IMG_1"]


def test_only_the_first_few_files_are_named(tmp_path):
    folder = build_sha(tmp_path, train=[1] * 9)
    for path in (folder / "train_data/ground-truth").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"9 images .*IMG_5\.jpg, \.\.\.\. The"):
        open_dataset("sha", folder)


def test_a_half_downloaded_data_set_is_not_a_smaller_one(tmp_path):
    build_sha(tmp_path, drawn=False)
    with pytest.raises(ValueError, match=(
            "1 images, but the train split of ShanghaiTech A has 300.*incomplete.*allow_partial")):
        open_dataset("sha", tmp_path)
    assert len(open_dataset("sha", tmp_path, allow_partial=True)) == 1


def test_a_half_drawn_data_set_is_not_a_smaller_one(tmp_path):
    folder = build_sha(tmp_path)
    mark(folder, train=5, test=1)
    with pytest.raises(ValueError, match="1 images, but the train split.* has 5"):
        open_dataset("sha", folder)
    assert len(open_dataset("sha", folder, "test")) == 1


def test_too_many_images_are_suspicious(tmp_path):
    folder = build_sha(tmp_path, train=(1, 1))
    mark(folder, train=1, test=1)
    for partial in (False, True):
        with pytest.raises(ValueError, match="2 images.* has only 1.* another data set"):
            open_dataset("sha", folder, allow_partial=partial)


def test_an_empty_folder_is_not_an_empty_data_set(tmp_path):
    (tmp_path / "part_A/train_data/images").mkdir(parents=True)
    for partial in (False, True):
        with pytest.raises(ValueError, match="no pair of an image and its annotation"):
            open_dataset("sha", tmp_path, allow_partial=partial)


def test_files_that_are_not_of_the_data_set_are_passed_over(tmp_path):
    folder = build_sha(tmp_path)
    for name in ("._IMG_1.jpg", "IMG_1 (1).jpg", ".DS_Store", "readme.txt", ".partial-1.jpg"):
        (folder / "train_data/images" / name).write_bytes(b"")
    assert open_dataset("sha", folder).ids == ["IMG_1"]


def test_broken_true_masks_are_named(tmp_path):
    folder = build_sha(tmp_path)
    mask = folder / "train_data/instances/IMG_1.png"
    dataset = open_dataset("sha", folder)
    for labels, message in ((np.full((24, 32), 4, np.uint16), "labels up to 4.*with 3 heads"),
                            (np.zeros((5, 5), np.uint16), r"shape \(5, 5\)"),
                            (picture(), "found colour mode 'RGB'")):
        files.write_png(mask, labels)
        with pytest.raises(ValueError, match=rf"IMG_1\.png.*{message}"):
            dataset[0]
    mask.write_bytes(b"")
    with pytest.raises(ValueError, match=r"IMG_1\.png: cannot be read as a label map"):
        dataset[0]
    mask.unlink()
    with pytest.raises(ValueError, match=r"IMG_1\.png: the true masks .* draw it again"):
        dataset[0]


# --- the drawn data set -----------------------------------------------------------------------

def test_the_synthetic_data_set_is_drawn_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "DRAWN", {"train": 2, "test": 1, "seed": 0})
    root = tmp_path / "work"
    train = open_dataset("synthetic", root)
    assert train.synthetic and len(train) == 2
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    test = open_dataset("synthetic", root, "test")
    assert len(test) == 1
    assert written == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    sample = test[0]
    assert sample.instances.shape == sample.shape and len(sample.points) == test.counts()[0]
    assert open_dataset("sha", root).checksum() == train.checksum()


def test_the_synthetic_data_set_is_never_mixed_with_a_real_one(tmp_path):
    build_sha(tmp_path, drawn=False)
    with pytest.raises(ValueError, match="has no synthetic.json.*name it 'sha'"):
        open_dataset("synthetic", tmp_path)


@pytest.mark.parametrize("state", ["photos", "drawn", "empty", "finder"])
def test_the_synthetic_data_set_is_drawn_beside_no_file_of_the_user(tmp_path, monkeypatch, state):
    monkeypatch.setattr(readers, "DRAWN", {"train": 1, "test": 1, "seed": 0})
    if state == "photos":
        save_jpeg(tmp_path / "holiday.jpg")
        with pytest.raises(ValueError, match="holds holiday.jpg and no drawn data set"):
            open_dataset("synthetic", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
        return
    if state == "drawn":
        write_dataset("qnrf", tmp_path, train=1, test=1, seed=0, progress=False)
    if state == "finder":
        (tmp_path / ".DS_Store").write_text("")
    assert len(open_dataset("synthetic", tmp_path)) == 1


@pytest.mark.parametrize("command", ["masks", "data coverage"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_command_that_reads_draws_nothing(tmp_path, command, missing, capsys):
    root = tmp_path / "photos"
    if not missing:
        root.mkdir()
    assert main([*command.split(), "--dataset", "synthetic", "--root", str(root), "--out",
                 str(tmp_path / "out.csv")]) == 1
    assert "no drawn data set. Draw one first" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ([] if missing else ["photos"])


# --- the real ShanghaiTech A ------------------------------------------------------------------

@needs_real_data
@pytest.mark.parametrize("below", ["", "ShanghaiTech", "ShanghaiTech/part_A"])
def test_the_real_data_open_from_every_level(below):
    dataset = open_dataset("sha", REAL / below)
    assert (dataset.ids[0], dataset.ids[-1], len(dataset)) == ("IMG_1", "IMG_300", 300)
    assert not dataset.synthetic and dataset.generator is None


@needs_real_data
@pytest.mark.parametrize("split, size, heads, duplicates, clipped, grey", [
    ("train", 300, 162413, 63, 46, 11), ("test", 182, 78862, 61, 25, 9)])
def test_the_real_heads_and_duplicates_are_all_there(
        split, size, heads, duplicates, clipped, grey):
    dataset = open_dataset("sha", REAL, split)
    total = {"heads": 0, "duplicates": 0, "clipped": 0, "grey": 0}
    for sample, count in zip(dataset, dataset.counts(), strict=True):
        height, width = sample.shape
        assert len(sample.points) == count and sample.instances is None
        assert ((sample.points >= 0) & (sample.points <= (width - 1, height - 1))).all()
        total["heads"] += len(sample.points)
        for name, repaired in sample.repairs.items():
            total[name] += repaired
    assert len(dataset) == size
    assert total == {
        "heads": heads, "duplicates": duplicates, "clipped": clipped, "grey": grey}
