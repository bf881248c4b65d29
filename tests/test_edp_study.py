"""The comparison counts what it says it counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xmask import edp_study, files, nnec
from xmask.cli import main
from xmask.data.sample import Sample


def test_masks_are_compared_person_by_person():
    truth = np.zeros((4, 6), np.int32)
    truth[:, :2], truth[:, 4:] = 1, 2
    labels = np.zeros_like(truth)
    labels[:, 1:5] = 1  # half of its own head, half of the other's, and background between
    found = edp_study.compare(labels, truth, 3)
    assert found == {"heads": 3, "iou_sum": 4 / 20, "mask_px": 16, "other_px": 4,
                     "without_mask": 2}
    assert edp_study.compare(truth, truth, 2)["iou_sum"] == 2


def test_the_simple_methods_are_what_they_are_called():
    sample = edp_study.draw_evaluation_scene(0)
    methods = edp_study.simple_methods()
    radii = nnec.exclusion_radii(sample.points, sample.shape)
    y, x = np.indices(sample.shape)
    for k in (0, len(radii) // 2):
        away = np.hypot(x - sample.points[k, 0], y - sample.points[k, 1])
        assert ((methods["exclusion discs"](sample) == k + 1) == (away <= radii[k] / 2)).all()
        assert (away[methods["fixed discs, 5 px"](sample) == k + 1] <= 5).all()
        # Voronoi: no pixel of the mask is nearer to somebody else.
        mine = methods["Voronoi-limited discs"](sample) == k + 1
        everybody = np.hypot(x[mine, None] - sample.points[:, 0], y[mine, None]
                             - sample.points[:, 1])
        assert (away[mine] <= everybody.min(axis=1) + 1e-4).all() and mine.any()
    labels = methods["watershed"](sample)
    assert labels.max() <= len(radii) and (labels > 0).any() and (labels == 0).any()
    again = edp_study.draw_evaluation_scene(0)
    assert (again.image == sample.image).all() and isinstance(sample, Sample)


def test_thirds_go_by_median_radius_and_only_the_best_fixed_disc_stays():
    rows = pd.DataFrame([
        {"scene": k, "median_radius": radius, "segmenter": "none", "method": method, "heads": 10,
         "iou_sum": score * (k + 1), "mask_px": 100, "other_px": 2 * k, "without_mask": k}
        for k, radius in enumerate([30.0, 10.0, 20.0])
        for method, score in (("fixed discs, 4 px", 1.0), ("fixed discs, 8 px", 2.0),
                              ("watershed", 0.5))])
    table = edp_study.thirds(rows)
    assert table["method"].to_list() == ["fixed discs, 8 px", "watershed"]
    best = table.iloc[0]
    assert [best[f"{name} IoU"] for name in edp_study.THIRDS] == [0.4, 0.6, 0.2]
    assert best["all IoU"] == pytest.approx(0.4) and best["on others"] == pytest.approx(0.02)
    assert best["without mask"] == 3


def test_the_command_writes_its_tables_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["edp-study", "--out", str(tmp_path), "--scenes", "3", "--seed", "9700000",
                 "--segmenters", "classical"]) == 0
    assert "| classical | EDP-SAM |" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "thirds.csv")
    assert set(edp_study.PROMPTS) <= set(table["method"])
    assert table.filter(like="IoU").stack().between(0, 1).all()
    assert files.read_json(tmp_path / "study.json")["command"] == (
        "xmask edp-study --scenes 3 --seed 9700000 --segmenters classical")
    scenes = pd.read_csv(tmp_path / "scenes.csv")
    assert (scenes.groupby("scene")["heads"].nunique() == 1).all()
    before = (tmp_path / "scenes.csv").read_text()
    kept = sorted((tmp_path / "work" / "edp_study").rglob("*.json"))
    assert len(kept) == 3
    asked = []
    monkeypatch.setattr(edp_study, "one_scene", lambda number, seed, segmenters: (
        asked.append(number) or files.read_json(kept[number])["rows"]))
    kept[1].rename(tmp_path / "1.json")
    kept[1] = tmp_path / "1.json"  # stopped before scene 1 was finished
    edp_study.run(tmp_path, scenes=3, seed=9_700_000, segmenters=["classical"], progress=False)
    assert asked == [1] and (tmp_path / "scenes.csv").read_text() == before
    assert main(["edp-study", "--out", str(tmp_path), "--scenes", "2"]) == 1
    assert "scenes: 2; give 3 or more" in capsys.readouterr().err


def test_head_sizes_are_compared_on_the_same_scenes(tmp_path, capsys):
    assert main(["edp-study", "--boxes", "--out", str(tmp_path), "--scenes", "1", "--seed",
                 "9700010", "--segmenters", "classical"]) == 0
    table = pd.read_csv(tmp_path / "boxes.csv").set_index("sizes")
    assert table.index.to_list() == ["none", "exact", "off by 20%"]
    assert table["heads"].nunique() == 1 and table.loc["exact", "mean_iou"] > 0.5
    assert "off by 20%" in capsys.readouterr().out
