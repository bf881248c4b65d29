"""COCO files say exactly what the label maps say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.data.test_masks import masks
from xmask.data.masks import read_masks
from xmask.edp_sam import source_names
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.tools import coco


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)),
                  elements=st.integers(0, 4)))
def test_rle_decodes_to_the_same_mask_and_is_what_pycocotools_writes(labels):
    found = coco.encode(labels)
    assert sorted(found) == sorted(set(labels.ravel().tolist()) - {0})
    for k, rle in found.items():
        mask = np.asfortranarray(labels == k, dtype=np.uint8)
        assert (coco_mask.decode(rle) == mask).all()
        assert rle["counts"].encode() == coco_mask.encode(mask)["counts"]


def test_a_folder_of_masks_is_read_back_by_pycocotools_identically(tmp_path, capsys):
    masks(tmp_path, ClassicalSegmenter())
    names = {f"IMG_{k}": f"IMG_{k}.jpg" for k in range(6)}  # the last one has no masks
    read = COCO(coco.write(tmp_path, names, tmp_path / "coco.json"))
    assert [image["file_name"] for image in read.dataset["images"]] == list(names.values())[:5]
    assert len({one["id"] for one in read.dataset["annotations"]}) == len(read.anns) == 20
    for image in read.dataset["images"]:
        table = pd.read_csv(tmp_path / f"{image['file_name'][:-4]}.csv").set_index("head")
        rebuilt = np.zeros((image["height"], image["width"]), np.int32)
        for one in read.imgToAnns[image["id"]]:
            mask = read.annToMask(one)
            assert mask.sum() == one["area"] and not rebuilt[mask > 0].any()
            y, x = np.nonzero(mask)
            assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            rebuilt[mask > 0] = one["head"]
            row = table.loc[one["head"]]
            assert one["source"] == row["source"] in source_names(ClassicalSegmenter())
            assert one["score"] == row["score"] and one["point"] == [row["x"], row["y"]]
        assert (rebuilt == read_masks(tmp_path, image["file_name"][:-4])).all()
    assert json.loads((tmp_path / "coco.json").read_text())["categories"][0]["name"] == "head"
