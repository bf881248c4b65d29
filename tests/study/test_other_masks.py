"""Masks at predicted points: each method does what its name says."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from xmask import files, segmenters
from xmask.study import other_masks
from xmask.synthetic import draw_scene

CELLS = "Voronoi cells in circles"


class Images:
    """A test set of one drawn scene, and one without people."""

    def __init__(self):
        self.samples = [draw_scene(5, shape=(96, 128), people=6),
                        draw_scene(6, shape=(96, 128), people=0)]
        self.ids = ["some", "none"]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def write_predictions(folder, data, points):
    (folder / "predictions").mkdir(parents=True)
    for name, dots, sample in zip(data.ids, points, data.samples):
        masks = np.zeros((96, 128)) if sample.instances is None else sample.instances
        files.write_png(folder / "predictions" / f"{name}.png", masks.astype(np.uint16))
        pd.DataFrame(dots, columns=["x", "y"]).to_csv(
            folder / "predictions" / f"{name}.csv", index=False)


def test_every_method_is_measured_on_every_image(tmp_path):
    data = Images()
    write_predictions(tmp_path, data, [s.points for s in data.samples])
    rows = other_masks.compare(data, tmp_path, (6.0, 6.0),
                               segmenters.open_segmenter("classical"), progress=False)
    assert [row.pop("name") for row in rows] == ["some", "none"]
    assert all(0.05 < value < 1 for value in rows[0].values()), rows[0]
    assert set(rows[1].values()) == {None}
    assert rows[0]["EDP-SAM"] > rows[0][CELLS]
    assert 0.9 < rows[0][other_masks.NEAREST] < 1, "the truth, cut by circles and cells"


def test_cells_fill_the_circles_and_give_a_pixel_to_the_nearest():
    sample = Images().samples[0]
    points = np.array([[30.0, 40.0], [50.0, 40.0]])
    labels = other_masks.methods(6.0, None)[CELLS](sample, points)
    assert labels[40, 39] == 1 and labels[40, 41] == 2
    assert labels[40, 11] == 1 and labels[40, 9] == 0, "20 px around each head"


def test_no_predicted_head_is_no_overlap(tmp_path):
    data = Images()
    write_predictions(tmp_path, data, [np.zeros((0, 2))] * 2)
    rows = other_masks.compare(data, tmp_path, (6.0, 6.0), None, progress=False)
    assert {value for name, value in rows[0].items() if name != "name"} == {0.0}


def test_lost_predictions_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"predictions: not there .* evaluate the run"):
        other_masks.compare(Images(), tmp_path, (6.0, 6.0), None, progress=False)


def test_a_foreground_is_shared_out_by_distance_within_circles():
    points = np.array([[30.0, 40.0], [50.0, 40.0]])
    masks = np.zeros((96, 128), np.int32)
    masks[40, 5:60] = 1
    shared = other_masks.nearest_head(masks, points)
    assert shared[40, 38] == 1 and shared[40, 42] == 2 and shared[40, 9] == 0
    assert (shared[41] == 0).all(), "the foreground does not grow"


def test_photographs_have_no_masks_to_compare_with(tmp_path):
    data = Images()
    data.samples = [replace(sample, instances=None) for sample in data.samples]
    write_predictions(tmp_path, data, [s.points for s in Images().samples])
    with pytest.raises(ValueError, match="some: no true masks"):
        other_masks.compare(data, tmp_path, (6.0, 6.0), None, progress=False)
