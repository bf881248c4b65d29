"""Dots as annotation tools write them: every format is read, and whatever is none is named."""

from __future__ import annotations

import copy
import json
import logging
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from xmask.data import mat_file
from xmask.data.dot_formats import read_dot_file
from xmask.data.own_photos import OwnPhotos, read_folder

POINT = {"name": "point", "cx": 3, "cy": 4.5}


def region(**shape):
    return {"shape_attributes": shape, "region_attributes": {"type": "head"}}


def shape(kind, *points):
    return {"label": "head", "points": [list(p) for p in points], "shape_type": kind, "flags": {}}


def result(kind, **value):
    return {"type": kind, "value": value, "original_width": 200, "original_height": 100,
            "image_rotation": 0, "from_name": "tag", "to_name": "image"}


def task(image, *annotations):
    return {"id": 7, "data": {"image": image}, "annotations": [
        {"id": 1, "was_cancelled": False, "result": list(one)} for one in annotations]}


COCO_HEADS = {
    "info": {}, "categories": [{"id": 1, "name": "head"}],
    "images": [{"id": 1, "file_name": "train/a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [2, 3, 4, 6]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "keypoints": [7, 8, 2],
         "num_keypoints": 1}]}
LABELME = {"version": "5.5.0", "flags": {}, "imagePath": "a.png", "imageData": None,
           "imageHeight": 48, "imageWidth": 64,
           "shapes": [shape("point", (3, 4.5)), shape("circle", (9, 8), (12, 8)),
                      shape("rectangle", (10, 4), (6, 2)),
                      shape("oriented_rectangle", (0, 1), (2, 0), (4, 1), (2, 2))]}
VIA = {
    "a.png1234": {"filename": "a.png", "size": 1234, "file_attributes": {}, "regions": [
        region(**POINT), region(name="circle", cx=1, cy=2, r=3),
        region(name="ellipse", cx=5, cy=6, rx=3, ry=2, theta=0.1),
        region(name="rect", x=10, y=20, width=4, height=6)]},
    "b.png99": {"filename": "b.png", "size": 99, "regions": [], "file_attributes": {}}}
VIA_POINTS = [[3, 4.5], [1, 2], [5, 6], [12, 23]]
LABEL_STUDIO = [
    task("/data/upload/1/0a1b2c3d-a.png", [
        result("keypointlabels", x=10, y=20, width=0.5, keypointlabels=["Head"]),
        result("rectanglelabels", x=10, y=20, width=2, height=4, rotation=0),
        result("rectanglelabels", x=10, y=20, width=2, height=4, rotation=90),
        result("ellipselabels", x=50, y=50, radiusX=2, radiusY=3),
        {"type": "choices", "value": {"choices": ["sunny"]}, "from_name": "weather"}]),
    task("/data/local-files/?d=photos%5Cb.png", []), task("c.png")]
LABEL_STUDIO_POINTS = [[20, 20], [22, 22], [18, 22], [100, 50]]
def record(image, annotation, **results):
    """Of JSON-MIN: results by their tags, without their types."""
    return {"image": image, "id": 7, "annotator": 1, "annotation_id": annotation, "lead_time": 2.5,
            "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"} | {
        tag: [one["value"] | {key: one[key] for key in ("original_width", "original_height")}
              for one in values] for tag, values in results.items()}


BOX = {"x": 10, "y": 20, "width": 2, "height": 4, "rotation": 0}
LABEL_STUDIO_MIN = [
    record("/data/upload/1/0a1b2c3d-a.png", 1, dots=LABEL_STUDIO[0]["annotations"][0]["result"][:1],
           box=[result("rectangle", **BOX), result("rectangle", **BOX | {"rotation": 90})],
           kind=[result("labels", **BOX, labels=["Head"]), result("choices", **BOX, choices=["a"]),
                 result("textarea", **BOX, text=["a", "b"])],
           oval=[result("ellipse", x=50, y=50, radiusX=2, radiusY=3, rotation=0)])
    | {"weather": "sunny", "tags": ["x"]},
    record("/data/local-files/?d=photos%5Cb.png", 2), record("c.png", None)]
VIA_CSV = ("filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
           "region_attributes\n"
           'a.png,1234,"{}",2,0,"{""name"":""point"",""cx"":3,""cy"":4.5}","{}"\n'
           'a.png,1234,"{}",2,1,"{""name"":""rect"",""x"":10,""y"":20,""width"":4,""height"":6}",'
           '"{}"\nb.png,99,"{}",0,0,"{}","{}"\n')


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        Image.new("RGB", (64, 48)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


MANY = {"coco": (COCO_HEADS, [[4, 6], [7, 8]]), "via": (VIA, VIA_POINTS),
        "project": ({"_via_settings": {}, "_via_img_metadata": VIA, "_via_attributes": {}},
                    VIA_POINTS),
        "via1": ({"a.png": {"filename": "http://host/a.png", "regions": {"0": region(**POINT)}},
                  "b.png": {"filename": "b.png", "regions": {}}}, [[3, 4.5]]),
        "studio": (LABEL_STUDIO, LABEL_STUDIO_POINTS),
        "studio-min": (LABEL_STUDIO_MIN, LABEL_STUDIO_POINTS)}


@pytest.mark.parametrize("value, expected", MANY.values(), ids=MANY)
def test_a_file_for_many_photos_gives_dots_empty_scenes_and_unlabelled_photos(
        folder, value, expected):
    table = write(folder / "labels.JSON", value)
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["a", "b"] and bare.ids == ["c"]
    assert dotted.counts().tolist() == [len(expected), 0]
    first, second = read_dot_file(table)
    assert first.name.endswith("a.png") and first.points.dtype == np.float64
    np.testing.assert_allclose(first.points, expected)
    assert second.points.shape == (0, 2) and second.file == str(table)
    assert OwnPhotos([(folder / "a.png", table)]).counts().tolist() == [len(expected)]


@pytest.mark.parametrize("before", ["", "#", "\ufeff#"])  # VIA 2, its first versions, and a BOM
def test_the_csv_of_via(folder, before):
    write(folder / "via_export_csv.csv", before + VIA_CSV)
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["a", "b"] and bare.ids == ["c"]
    np.testing.assert_array_equal(dotted[0].points, [[3, 4.5], [12, 23]])


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>1</id><mode>annotation</mode></task></meta>
  <image id="0" name="day one/a.png" width="64" height="48">
    <points label="head" source="manual" occluded="0" points="3.00,4.50;10.25,20.00" z_order="0">
    </points>
    <box label="head" occluded="0" xtl="8.00" ytl="2.00" xbr="12.00" ybr="6.00" rotation="30.00"/>
    <ellipse label="head" occluded="0" cx="9.00" cy="7.00" rx="3.00" ry="2.00" z_order="0"/>
    <tag label="sunny" source="manual"/>
  </image>
  <image id="1" name="b.png" width="64" height="48">
  </image>
</annotations>
"""
VOC = """<annotation>
  <folder>photos</folder><filename>a.png</filename>
  <size><width>64</width><height>48</height><depth>3</depth></size>
  <object><name>head</name><difficult>0</difficult>
    <bndbox><xmin>8</xmin><ymin>2</ymin><xmax>12</xmax><ymax>6</ymax></bndbox></object>
</annotation>
"""


def test_the_xml_of_cvat_and_of_pascal_voc(folder):
    write(folder / "annotations.xml", CVAT)
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["a", "b"] and bare.ids == ["c"] and not len(dotted[1].points)
    np.testing.assert_array_equal(dotted[0].points, [[3, 4.5], [10.25, 20], [10, 4], [9, 7]])
    (folder / "annotations.xml").unlink()
    write(folder / "a.xml", VOC)
    dotted, bare = read_folder(folder)
    assert dotted[0].points.tolist() == [[10, 4]] and bare.ids == ["b", "c"]
    for text in (CVAT.replace('"64"', '"128"'), VOC.replace("64", "128")):
        write(folder / "a.xml", text)
        with pytest.raises(ValueError, match="a.png: 64 x 48 px, and .*a.xml says 128 x 48"):
            read_folder(folder)[0][0]


@pytest.mark.parametrize("text, message", [
    ("", "not valid XML"), ("<annotations>", "not valid XML"),
    ("<?xml version='1.0' encoding='nothing'?><a/>", "not valid XML"),
    ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", r"not valid XML \(it has a DOCTYPE"),
    ("<plist><dict/></plist>", "an element 'plist' with dict; expected CVAT for images"),
    ("<annotations><meta/><track/></annotations>", "an element 'annotations' with meta, track; expected CVAT"),
    (CVAT.replace("ellipse", "polygon"), r"image 'day one/a.png' has a 'polygon'; expected poi"),
    (CVAT.replace("3.00,4.50", "3.00"), r"image 'day one/a.png': found \[3.0\] where 2 numbers"),
    (CVAT.replace("3.00,4.50;10.25,20.00", ""), "image .*: found .* where 2 numbers"),
    (CVAT.replace('xbr="12.00"', ""), r"image .*: found \[8.0, 2.0, None, 6.0\] where 4 numbers"),
    (CVAT.replace('name="b.png"', ""), "image 2: field name should be a text, found none"),
    (VOC.replace("<xmin>8", "<xmin>nan"), r"object 1: found \[nan, 2.0, 12.0, 6.0\] where 4"),
    (VOC.replace("bndbox", "polygon"), "object 1: found .* where 4 numbers"),
])
def test_xml_that_is_no_dots_is_named_with_what_was_found(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"a.xml: {message}"):
        read_dot_file(write(tmp_path / "a.xml", text))


def test_coco_as_via_writes_it_has_numbers_in_one_place_and_texts_in_another(folder):
    write(folder / "via_export_coco.json", {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "head"}], "annotations": [
            {"id": 0, "image_id": "1", "category_id": one, "segmentation": [[]], "area": [],
             "bbox": [], "iscrowd": 0, "keypoints": [3, 4, 2], "num_keypoints": 1}
            for one in (1, "1")]})
    dotted, _ = read_folder(folder)
    assert dotted.ids == ["a", "b"] and dotted.counts().tolist() == [2, 0]


def test_a_labelme_file_beside_each_photo(folder):
    write(folder / "a.json", LABELME)
    write(folder / "b.json", LABELME | {"shapes": []})
    write(folder / "._a.json", "macOS")
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["a", "b"] and bare.ids == ["c"] and dotted.counts().tolist() == [4, 0]
    np.testing.assert_array_equal(dotted[0].points, [[3, 4.5], [9, 8], [8, 3], [2, 1]])


@pytest.mark.parametrize("name", ["GT_a.mat", "a_ann.mat", "a.MAT"])
@pytest.mark.parametrize("fields", [
    {"image_info": {"location": [[3.0, 4.0], [5.0, 6.0]], "number": 2}},
    {"annPoints": [[3.0, 4.0], [5.0, 6.0]]}])
def test_mat_files_under_the_names_of_the_benchmarks(folder, name, fields, monkeypatch):
    savemat(folder / name, fields, appendmat=False)
    read, parsed = mat_file.read, []
    monkeypatch.setattr(mat_file, "read", lambda *args: parsed.append(args) or read(*args))
    dotted, bare = read_folder(folder)
    assert len(parsed) == 1
    assert dotted.ids == ["a"] and bare.ids == ["b", "c"]
    np.testing.assert_array_equal(dotted[0].points, [[3, 4], [5, 6]])


def test_the_head_of_a_person_is_the_mean_of_its_labelled_keypoints_of_the_head(folder, caplog):
    names = ["nose", "left_eye", "right_ear", "left_shoulder", "left_forearm"]
    person = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 60]}
    value = COCO_HEADS | {
        "categories": [{"id": 1, "name": "person", "keypoints": names}], "annotations": [
            person | {"keypoints": [0, 0, 0, 4, 6, 2, 8, 8, 1, 50, 50, 2, 60, 60, 2]},
            person | {"image_id": 2, "keypoints": [0, 0, 0] * 3 + [5, 5, 2, 6, 6, 2]}]}
    write(folder / "persons.json", value)
    with caplog.at_level(logging.WARNING, "xmask"):
        dotted, bare = read_folder(folder)
    np.testing.assert_array_equal(dotted[0].points, [[6, 7]])
    assert bare.ids == ["b", "c"] and "persons.json: 1 of 2 images" in caplog.text  # unknown heads
    value["annotations"][1] = person | {"image_id": 2, "iscrowd": 1}
    write(folder / "persons.json", value)
    assert read_folder(folder)[0].ids == ["a"]


def test_names_are_found_as_label_studio_changes_them(folder):
    Image.new("RGB", (64, 48)).save(folder / "deadbeef-a.png")
    Image.new("RGB", (64, 48)).save(folder / "my photo (2).PNG")
    head = [result("keypoint", x=50, y=50)]
    write(folder / "studio.json", [
        task("/data/upload/1/0a1b2c3d-my_photo_2.png", head), task("/u/deadbeef-a.png", head),
        task("https://host/x/b.png?sign=a/c.png", head)])
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["b", "deadbeef-a", "my photo (2)"] and bare.ids == ["a", "c"]


def test_names_in_addresses_are_found(folder):
    Image.new("RGB", (64, 48)).save(folder / "my photo (2).PNG")
    Image.new("RGB", (64, 48)).save(folder / "c%20d.png")
    write(folder / "via.json", {name: {"filename": name, "size": -1, "regions": [region(**POINT)]}
                                for name in ("http://host/my%20photo%20(2).PNG", "c%20d.png")})
    assert read_folder(folder)[0].ids == ["c%20d", "my photo (2)"]


def test_the_json_of_nwpu_crowd(folder):
    value = {"img_id": "a.jpg", "human_num": 2, "points": [[3, 4.5], [5, 6]], "boxes": []}
    write(folder / "a.json", value)
    assert read_folder(folder)[0][0].points.tolist() == [[3, 4.5], [5, 6]]
    write(folder / "a.json", changed(value, "points", 1, to=[5]))
    with pytest.raises(ValueError, match=r"a.json: point 2: found \[5\] where 2 numbers"):
        read_folder(folder)


def test_an_annotation_of_label_studio_may_be_skipped_or_the_true_one(folder):
    head, two = [result("keypoint", x=50, y=50)], [result("keypoint", x=5, y=5)] * 2
    value = [task("a.png", head, two), task("b.png", head)]
    value[0]["annotations"][1]["ground_truth"] = True
    value[1]["annotations"][0]["was_cancelled"] = True
    write(folder / "studio.json", value)
    dotted, bare = read_folder(folder)
    assert dotted.ids == ["a"] and dotted.counts().tolist() == [2] and bare.ids == ["b", "c"]


def changed(value, *keys, to):
    """A copy of a document with one value changed."""
    value = copy.deepcopy(value)
    at = value
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    return value


THOUSANDS = 100_000
WRONG = {
    "{": "not valid JSON", "": "not valid JSON", "[" * 100_000: "not valid JSON",
    "[]": "a list of 0; expected COCO", "3": "3; expected COCO", "null": "None; expected COCO",
    "{}": r"keys \(none\); expected COCO", '{"a": 1, "b": 2}': "keys 'a', 'b'; expected COCO",
    '[{"id": 1}]': "a list of 1, the first one {'id': 1}; expected COCO"}
CHANGED = [
    (LABELME, ("shapes",), {}, "field shapes should be a list, found {}"),
    (LABELME, ("shapes", 0), 3, "shape 1: expected an object with the field shape_type, found 3"),
    (LABELME, ("shapes", 1, "shape_type"), "polygon", "shape 2 is a 'polygon' of 2 points; expect"),
    (LABELME, ("shapes", 0, "points"), [], "shape 1 is a 'point' of 0 points"),
    (LABELME, ("shapes", 0, "points"), [[1]], r"shape 1: found \[1\] where 2 numbers"),
    (LABELME, ("shapes", 0, "points"), [[1, float("nan")]], r"shape 1: found \[1, nan\] where"),
    (LABELME, ("shapes", 0, "points"), [[1, 10**400]], "shape 1: found .* where 2 numbers"),
    (LABELME, ("shapes", 0, "points"), [["1", True]], "shape 1: found .* where 2 numbers"),
    (LABELME, ("shapes",), [shape("point", (1, 2))] * THOUSANDS, "100000 heads, and an image has"),
    (COCO_HEADS, ("images", 0), "a.png", "image 1: expected an object with the field file_name"),
    (COCO_HEADS, ("images", 1, "id"), 1, "image 2: has the id '1' of 'train/a.png', too"),
    (COCO_HEADS, ("images", 0, "id"), [], "image 1: field id should be a number or a text, found"),
    (COCO_HEADS, ("categories",), 3, "field categories should be a list, found 3"),
    (COCO_HEADS, ("annotations",), {}, "field annotations should be a list"),
    (COCO_HEADS, ("annotations", 0, "image_id"), 9, "annotation 1: image_id '9', and no image has"),
    (COCO_HEADS, ("annotations", 0, "category_id"), 2, "the categories '1', '2', and all would be"),
    (COCO_HEADS, ("annotations", 0, "bbox"), None, "annotation 1: field bbox should be a list"),
    (COCO_HEADS, ("annotations", 0, "bbox"), [1, 2, 3], r"annotation 1: found \[1, 2, 3\] where 4"),
    (COCO_HEADS, ("annotations", 1, "keypoints"), [1, 2], r"annotation 2: found \[1, 2\] where 3"),
    (COCO_HEADS, ("annotations", 1, "keypoints"), [1, 2, 2] * 5,
     "annotation 2: 5 keypoints, and its category names none"),
    (COCO_HEADS, ("annotations",), [COCO_HEADS["annotations"][0]] * THOUSANDS,
     "'train/a.png': 100000 heads, and"),
    (VIA, ("a.png1234", "regions"), 3, "'a.png1234': field regions should be a list or an object"),
    (VIA, ("a.png1234", "filename"), 3, "'a.png1234': field filename should be a text, found 3"),
    (VIA, ("a.png1234", "regions", 1), [], "region 2: expected an object with the field shape_att"),
    (VIA, ("a.png1234", "regions", 0, "shape_attributes", "name"), "polygon",
     "region 1 is a 'polygon'; expected point, circle, ellipse or rect"),
    (VIA, ("a.png1234", "regions", 0, "shape_attributes", "cx"), None, "region 1: found .None, 4.5"),
    (VIA, ("a.png1234", "regions"), [region(**POINT)] * THOUSANDS, "100000 heads, and"),
    (MANY["project"][0], ("_via_img_metadata",), [], "field _via_img_metadata should be an object"),
    (LABEL_STUDIO, (0, "annotations"), {}, "task 7: field annotations should be a list"),
    (LABEL_STUDIO, (0, "annotations"), [{"result": []}] * 2, "task 7 has 2 annotations; keep one"),
    (LABEL_STUDIO, (0, "annotations", 0, "result", 0), 3, "task 7: expected an object with the fie"),
    (LABEL_STUDIO, (0, "annotations", 0, "result", 0, "type"), "polygonlabels",
     "task 7: a result is of type 'polygonlabels'; expected keypointlabels"),
    (LABEL_STUDIO, (0, "annotations", 0, "result", 0, "original_width"), None,
     "task 7: original_width, original_height: found"),
    (LABEL_STUDIO, (0, "annotations", 0, "result", 0, "value", "x"), float("inf"),
     r"task 7: found \[inf, 20\] where 2 numbers"),
    (LABEL_STUDIO, (0, "annotations", 0, "result"), [result("keypoint", x=1, y=1)] * THOUSANDS,
     "task 7: 100000 heads, and"),
    (LABEL_STUDIO_MIN, (0, "dots", 0), {"points": [[1, 2]], "original_width": 9, "original_height": 9, "polygonlabels": []},
     "task 7: a result is of type 'polygonlabels'; expected keypointlabels"),
    (LABEL_STUDIO_MIN, (0, "dots", 0), {"rle": [], "original_width": 9, "original_height": 9},
     "task 7: a result is of type 'rle, .*'; expected"),
    (LABEL_STUDIO, (0, "data"), {"text": "a.txt"}, "task 7: data names no image file, found {'tex"),
]


@pytest.mark.parametrize("text, message", [
    *WRONG.items(), *((json.dumps(changed(value, *keys, to=to)), message)
                      for value, keys, to, message in CHANGED)],
    ids=[*map(str, range(len(WRONG) + len(CHANGED)))])
def test_json_that_is_no_dots_is_named_with_what_was_found(tmp_path, text, message):
    path = write(tmp_path / "labels.json", text)
    with pytest.raises(ValueError, match=f"labels.json.*{message}") as raised:
        read_dot_file(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600 + len(str(path))


@pytest.mark.parametrize("old, new, message", [
    ('""cx"":3', '""cx"":', "line 2: .* is no shape"),
    ('"{""name"":""point"",""cx"":3,""cy"":4.5}"', "[]", "line 2: expected an object with the fie"),
    ("b.png,99", ",99", "line 4 lacks filename"), ("point", "polyline", "line 2 is a 'polyline'"),
    ("filename,", "file,", "line 2 lacks filename or region_shape_attributes"),
    ("b.png", "b" * 200_000, "line 3: field larger than field limit"),
    ("b.png", "b\0", "no text in UTF-8"),
])
def test_a_damaged_csv_of_via_is_named(tmp_path, old, new, message):
    path = write(tmp_path / "via.csv", VIA_CSV.replace(old, new))
    with pytest.raises(ValueError, match=f"via.csv.*{message}"):
        read_dot_file(path)


def test_other_mat_files_and_csv_files_are_named(folder):
    savemat(folder / "a.mat", {"points": [[1.0, 2.0]], "version": 3})
    with pytest.raises(ValueError, match="a.mat: the fields points, version; expected image_info"):
        read_folder(folder)
    (folder / "a.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match="a.mat: cannot be read as a MATLAB file"):
        read_folder(folder)
    (folder / "a.mat").unlink()
    write(folder / "a.csv", "name,count\na,3\n")
    with pytest.raises(ValueError, match="a.csv: expected a table with columns x and y"):
        read_folder(folder)


def test_one_photo_has_dots_in_one_file(folder):
    write(folder / "a.csv", "x,y\n1,2\n")
    write(folder / "a.json", LABELME)
    with pytest.raises(ValueError, match="a.json: a.csv beside it has dots of a.png, too; keep"):
        read_folder(folder)
    (folder / "a.json").unlink()
    write(folder / "via.json", VIA)
    with pytest.raises(ValueError, match="via.json: a.csv beside it has dots of a.png, too"):
        read_folder(folder)
    (folder / "a.csv").unlink()
    write(folder / "via.json", VIA | {"again": VIA["a.png1234"]})
    with pytest.raises(ValueError, match="via.json: lists a.png twice"):
        read_folder(folder)


def test_dots_of_images_that_are_not_there_are_named(folder):
    write(folder / "via.json", VIA | {f"{k}": VIA["b.png99"] | {"filename": f"{k}.jpg"}
                                      for k in range(7)})
    with pytest.raises(ValueError, match=r"via.json: lists 7 images that are not beside it: 0.jpg, "
                                         r"1.jpg, 2.jpg, 3.jpg, 4.jpg, \.\.\.; copy"):
        read_folder(folder)
    (folder / "via.json").unlink()
    write(folder / "d.json", LABELME)
    with pytest.raises(ValueError, match="d.json: no image of this name beside it"):
        read_folder(folder)
    (folder / "d.json").unlink()
    savemat(folder / "GT_d.mat", {"annPoints": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="GT_d.mat: no image of this name beside it"):
        read_folder(folder)
    with pytest.raises(ValueError, match="via.json: lists c.png 0 times among its 2 images"):
        OwnPhotos([(folder / "c.png", write(folder / "via.json", VIA))])


def test_a_checksum_changes_with_the_dots_of_its_photo_only(folder):
    def checksums(value):
        write(folder / "via.json", value)
        dotted, bare = read_folder(folder)
        return [one.image_checksum(i) for one in (dotted, bare) for i in range(len(one))]

    before = checksums(VIA)
    after = checksums(changed(VIA, "a.png1234", "regions", 0, "shape_attributes", "cx", to=9))
    assert before[0] != after[0] and before[1:] == after[1:]
    (folder / "via.json").unlink()
    assert read_folder(folder)[1].image_checksum(1) != before[1]  # no dots are not no heads


def test_a_photo_that_cannot_be_read_stops_no_checksum_of_all(folder, monkeypatch):
    photos = read_folder(folder)[1]
    before = photos.checksum()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("xmask.files.sha256", refuse)
    assert photos.checksum() != before


def test_dots_may_be_given_as_an_array(folder):
    photos = OwnPhotos([(folder / "a.png", np.array([[1, 2]])), (folder / "b.png", None)])
    assert photos.counts().tolist() == [1, 0] and photos[0].points.tolist() == [[1, 2]]
    for wrong in (np.zeros(2), np.array([["a", "b"]]), np.full((1, 2), np.nan)):
        with pytest.raises(ValueError, match="a.png: dots should be"):
            OwnPhotos([(folder / "a.png", wrong)])


OUTSIDE = (r"a.png: 2 of its \d+ dots lie outside the image \(64 x 48 px\), the first at x \d+, y "
           r"\d+. Are they in")
SHARES = (r"a.png: its dots all lie within the first pixel, the first at x 0.5, y 0.25. Are they "
          r"shares of the im")


@pytest.mark.parametrize("dots, refused", [
    ([[-0.9, 2], [64.0, 48.0]], None),             # slips of less than a pixel
    ([[3, 4]] * 9 + [[80, 4]], None),              # one that is far out
    ([[3, 4]] * 20 + [[80, 4]] * 2, None),         # no more than a tenth
    ([[3, 4]] * 9 + [[80, 4]] * 2, OUTSIDE),
    ([[40, 60], [30, 63]], OUTSIDE),               # y before x
    ([[0.5, 0.25], [1, 0]], SHARES), ([[0.5, 0.25]], SHARES),
    ([[0, 1]], None), ([[0.5, 2]], None),
])
def test_dots_of_another_size_and_shares_of_the_image_are_refused(folder, dots, refused):
    photos = OwnPhotos([(folder / "a.png", np.array(dots, dtype=float))])
    if refused:
        with pytest.raises(ValueError, match=refused):
            photos[0]
        assert photos.sound()[1] and len(photos.sound()[0]) == 0
    else:
        assert len(photos[0].points) == len(dots)


SIZED = {  # what says on which size of an image dots were put: a.png here, of w x h
    "labelme": lambda w, h: LABELME | {"imageWidth": w, "imageHeight": h},
    "coco": lambda w, h: changed(COCO_HEADS, "images", 0, to={
        "id": 1, "file_name": "a.png", "width": w, "height": h}),
    "studio": lambda w, h: [task("a.png", [
        result("keypoint", x=50, y=50) | {"original_width": w, "original_height": h}])]}


@pytest.mark.parametrize("make", SIZED.values(), ids=SIZED)
def test_dots_that_were_put_on_another_size_of_the_photo_are_refused(folder, make):
    write(folder / "a.json", make(64, 48))
    assert len(read_folder(folder)[0].sound()[0])
    write(folder / "a.json", make(128, 96))  # all dots lie inside, and all are wrong
    with pytest.raises(ValueError, match=r"a.png: 64 x 48 px, and .*a.json says 128 x 96. Take"):
        read_folder(folder)[0][0]
    write(folder / "a.json", make(48, 64))
    assert read_folder(folder)[0].sound()[1]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "a.png", exif=turned)  # 48 x 64 once upright
    for size in ((48, 64), (64, 48)):
        write(folder / "a.json", make(*size))
        assert not read_folder(folder)[0].sound()[1]


def test_text_files_named_like_photos_are_told_and_others_are_not(folder, caplog):
    write(folder / "readme.txt", "not of a photo")
    read_folder(folder)
    assert "text file" not in caplog.text
    write(folder / "a.txt", "3 4.5\n")
    assert not len(read_folder(folder)[0])
    assert ("1 text file named like photos: a.txt. Dots in text files are not read; write a.csv"
            in caplog.text)


def test_images_without_a_dot_in_a_file_for_many_are_told(folder, caplog):
    write(folder / "via.json", VIA)
    read_folder(folder)
    assert "via.json: 1 of its 2 images have no dot, and count as photos without" in caplog.text


@pytest.mark.parametrize("value, name, labels", [
    (LABELME, "a.json", None), (changed(LABELME, "shapes", 0, "label", to="car"), "a.json", "car, head"),
    (CVAT, "a.xml", None), (CVAT.replace("head", "car", 1), "a.xml", "car, head"),
    (VOC, "a.xml", None), (VOC.replace("</annotation>", VOC[VOC.index("  <object>"):].replace(
        "head", "car")), "a.xml", "car, head"),
    (LABEL_STUDIO[1:] + [task("a.png", [
        result("keypointlabels", x=1, y=1, keypointlabels=[one]) for one in ("head", "car")])],
     "l.json", r"\['car'\], \['head'\]")])
def test_shapes_of_several_labels_are_told(folder, caplog, value, name, labels):
    write(folder / name, value)
    read_folder(folder)
    assert bool(labels) == ("count as heads" in caplog.text)
    assert re.search(f"shapes of 2 labels, {labels}, and" if labels else "", caplog.text)


def test_boxes_of_whole_bodies_are_told_and_those_to_ignore_are_a_crowd(folder, caplog):
    value = changed(COCO_HEADS, "annotations", 0, "bbox", to=[2, 3, 4, 9])
    write(folder / "coco.json", value)
    assert read_folder(folder)[0].ids == ["a", "b"]
    assert "coco.json: most boxes are more than twice as high as wide" in caplog.text
    value["annotations"][0]["ignore"] = 1
    write(folder / "coco.json", value)
    assert read_folder(folder)[0].ids == ["b"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", "a.png", 10**400, 1e999, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["shapes", "images", "annotations", "regions", "filename", "result", "x"])
        | st.text(max_size=3), inner, max_size=3), max_leaves=8)


@st.composite
def spoilt(draw):
    """A good document of a format, in which one value is another one, or gone."""
    value = copy.deepcopy(draw(st.sampled_from([LABELME, *(value for value, _ in MANY.values())])))
    at = value
    while True:
        key = draw(st.sampled_from(sorted(at, key=str) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            break
        at = at[key]
    if draw(st.booleans()):
        at[key] = draw(JSON)
    else:
        del at[key]
    return value


@settings(max_examples=200, deadline=None)
@given(spoilt() | JSON)
@example({"images": [], "annotations": [], "categories": [[]]})
def test_every_json_is_read_or_refused_by_name(tmp_path_factory, value):
    path = write(tmp_path_factory.getbasetemp() / "fuzzed.json", value)
    table = write(tmp_path_factory.getbasetemp() / "fuzzed.csv", VIA_CSV.splitlines()[0] + (
        "\na.png,1,{},1,0," + json.dumps(json.dumps(value)).replace('\\"', '""') + ",{}\n"))
    for one in (path, table):
        try:
            found = read_dot_file(one)
        except ValueError as error:
            assert one.name in str(error)
            continue
        for points in [each.points for each in found]:
            assert points.shape[1:] == (2,) and np.isfinite(points).all()
