"""Counts at a threshold that other scenes set."""

import pytest
import torch

from tests.data.test_transforms import scene
from tests.study.test_evaluate import Images
from tests.test_trainer import tiny
from xmask import model
from xmask.study import calibrated, steps


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return model.build(tiny().network)[0].eval()


def test_the_threshold_makes_the_total_of_the_scenes_right(network):
    scenes, tested = Images([scene(1), scene(2), scene(3, people=5)]), Images([scene(4)])
    found = calibrated.counts(network, tiny(), scenes, tested, progress=False)
    people = sum(len(one.points) for one in scenes)
    again = calibrated.counts(network, tiny(), scenes, scenes, progress=False)
    assert sum(row["count"] for row in again["per_image"]) == people
    assert again["threshold"] == found["threshold"] and found["scenes"] == 3
    row, = found["per_image"]
    assert row["name"] == "IMG_0" and row["true_count"] == len(tested[0].points)


def test_photographs_have_no_such_scenes():
    with pytest.raises(ValueError, match="profile: 'photo' runs on photographs.*demo or full"):
        steps.count_calibrated(steps.configure("photo", "sha", 40, 1))
