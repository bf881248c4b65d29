"""The shipped model on other photographs: who is dotted, what is counted, what the table says."""

import json

import numpy as np
import pandas as pd
import pytest

from tests.test_trainer import TINY
from xmask import files
from xmask.data import open_dataset
from xmask.study import elsewhere
from xmask.synthetic import write_dataset


def test_parts_are_disjoint_cover_all_and_measure_on_the_same_photos_whatever_the_seed():
    one, other = (elsewhere.parts(120, 20, 40, seed) for seed in (1, 2))
    for parts in (one, other):
        assert [len(part) for part in parts] == [20, 40, 60]
        assert sorted(np.concatenate(parts)) == list(range(120))
    assert list(one[2]) == list(other[2]) and set(one[0]) != set(other[0])


@pytest.mark.parametrize("dotted,bare", [(0, 3), (5, 5), (11, 0)])
def test_a_trial_without_photos_to_dot_or_to_measure_is_refused(dotted, bare):
    with pytest.raises(ValueError, match="dotted, bare: of 10 photos"):
        elsewhere.parts(10, dotted, bare, 1)


def test_a_trial_counts_the_photos_that_it_did_not_learn_from(tmp_path):
    write_dataset("sha", tmp_path / "data", train=3, test=1, seed=3, progress=False)
    photos = open_dataset("sha", tmp_path / "data", "train")
    small = {k: v for k, v in TINY.items() if not k.startswith("network.")
             and k != "masks.segmenter"} | {
                 "schedule.phase1": 1, "schedule.phase2": 2, "schedule.phase3": 3,
                 "schedule.steps_per_epoch": 1, "schedule.warmup": 0, "schedule.mask_warmup": 0}
    out = elsewhere.trial(photos, tmp_path / "results" / "sha-s1", dotted=1, bare=1, seed=1,
                          segmenter="classical", overrides=small, work=tmp_path / "work",
                          progress=False)
    found, record = pd.read_csv(out / "counts.csv"), files.read_json(out / "config.json")
    given, _, rest = elsewhere.parts(3, 1, 1, 1)
    assert list(found["photo"]) == [photos.ids[i] for i in rest]
    assert list(found["people"]) == [len(photos[i].points) for i in rest]
    assert record["data"]["labelled"] == [photos.ids[i] for i in given]
    assert record["start"] and record["code"] and record["photos"]["checksum"]
    assert (found["before_low"] <= found["before"]).all()
    again = elsewhere.trial(photos, out, dotted=1, bare=1, seed=1, segmenter="classical",
                            overrides=small, work=tmp_path / "work", progress=False)
    assert pd.read_csv(again / "counts.csv").equals(found)


def test_the_table_and_the_gain_are_those_of_the_counts(tmp_path):
    for seed, after in ((1, [10, 22, 30]), (2, [10, 20, 28])):
        (tmp_path / f"shb-s{seed}").mkdir()
        pd.DataFrame({"people": [10, 20, 30], "before": [16, 20, 33], "after": after}).to_csv(
            tmp_path / f"shb-s{seed}" / "counts.csv", index=False)
    found = elsewhere.summary(tmp_path)
    assert found.to_dict("records")[0] == pytest.approx(
        {"trial": "shb-s1", "photos": 3, "people": 60, "constant": 20 / 3, "before": 3.0,
         "after": 2 / 3})
    mean, low, high = elsewhere.gain("shb", tmp_path)
    assert mean == pytest.approx((3 - 2 / 3 + 3 - 2 / 3) / 2) and low <= mean <= high
    assert json.dumps(found.to_dict("records"))
