"""COCO annotations: pycocotools reads back exactly the masks that went in."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as rle
from pycocotools.coco import COCO

from xmask import coco

maps = arrays.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)),
                     elements=st.integers(0, 4))


@settings(deadline=None, max_examples=150)
@given(maps)
def test_every_mask_is_what_pycocotools_makes_of_it(label_map):
    found = coco.annotations(label_map)
    labels = [k for k in np.unique(label_map) if k]
    assert [one["label"] for one in found] == labels
    for one in found:
        mask = np.asfortranarray(label_map == one["label"]).astype(np.uint8)
        reference = rle.encode(mask)
        assert one["segmentation"] == {"size": list(reference["size"]),
                                       "counts": reference["counts"].decode()}
        assert one["area"] == rle.area(reference)
        assert one["bbox"] == list(rle.toBbox(reference))
    np.testing.assert_array_equal(coco.label_map(found, label_map.shape), label_map)


def test_a_document_survives_json_and_the_coco_reader(tmp_path):
    random = np.random.default_rng(0)
    label_map = random.integers(0, 6, (20, 31)).astype(np.int32)
    points = random.uniform(0, 20, (5, 2)).astype(np.float32)
    first = coco.annotations(label_map, points, np.linspace(0.5, 0.9, 5), image_id=1)
    second = coco.annotations(label_map[::-1], image_id=2, first_id=len(first) + 1)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 31} for i in (1, 2)]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco.document(images, first + second, {"description": "test"})))
    with contextlib.redirect_stdout(io.StringIO()):
        reader = COCO(str(path))
    assert reader.getAnnIds() == list(range(1, 11)) and reader.getCatIds() == [1]
    again = np.zeros((20, 31), np.int32)
    for one in reader.loadAnns(reader.getAnnIds(imgIds=[1])):
        again[reader.annToMask(one) > 0] = one["label"]
        assert one["point"] == pytest.approx(points[one["label"] - 1])
        assert 0.5 <= one["score"] <= 0.9
    np.testing.assert_array_equal(again, label_map)


def test_labels_without_points_or_of_another_size_are_refused():
    label_map = np.array([[0, 3]])
    with pytest.raises(ValueError, match="points: 2 for a label map that goes to 3"):
        coco.annotations(label_map, np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"its mask is \[1, 2\]"):
        coco.label_map(coco.annotations(label_map), (2, 2))
    assert coco.annotations(np.zeros((4, 4), int)) == []
