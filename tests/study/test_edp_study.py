"""The comparison counts what it says it counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xmask import files, nnec
from xmask.cli import main
from xmask.data.sample import Sample
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.study import edp_study


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
    methods = {(row["method"], row.get("head_radius")): made
               for row, made in edp_study.simple_methods()}
    radii = nnec.exclusion_radii(sample.points, sample.shape)
    y, x = np.indices(sample.shape)
    for k in (0, len(radii) // 2):
        away = np.hypot(x - sample.points[k, 0], y - sample.points[k, 1])
        assert ((methods["exclusion discs", None](sample) == k + 1) == (away <= radii[k] / 2)).all()
        assert (away[methods["fixed discs", 5](sample) == k + 1] <= 5).all()
        # Voronoi: no pixel of the mask is nearer to somebody else.
        mine = methods["Voronoi-limited discs", None](sample) == k + 1
        everybody = np.hypot(x[mine, None] - sample.points[:, 0], y[mine, None]
                             - sample.points[:, 1])
        assert (away[mine] <= everybody.min(axis=1) + 1e-4).all() and mine.any()
    labels = methods["watershed", None](sample)
    assert labels.max() <= len(radii) and (labels > 0).any() and (labels == 0).any()
    again = edp_study.draw_evaluation_scene(0)
    assert (again.image == sample.image).all() and isinstance(sample, Sample)


def test_prompts_without_nnec_know_nothing_of_other_heads():
    sample = edp_study.draw_evaluation_scene(1, 9_700_000)
    points = sample.points.astype(float)
    asked = []

    class Listening(ClassicalSegmenter):
        def predict(self, prompts, head, pixel):
            asked.append((prompts, np.bincount(head)))
            return super().predict(prompts, head, pixel)

    for prompts in edp_study.PROMPTS.values():
        labels = edp_study.prompted_masks(sample.image, points, Listening(), prompts, 10)
        assert labels.max() <= len(points) and (labels > 0).any()
    kinds = [(prompts.boxes is None, prompts.multimask) for prompts, _ in asked]
    assert kinds == [(True, True), (False, False), (True, True), (False, False)]
    for prompts, extent in asked:
        assert (prompts.sizes == 10).all() and (prompts.labels == 1).all()
        assert (prompts.points[:, 0] == points).all() and prompts.points.shape[1] == 1
        # Heads away from the border look at discs of one size, however near others are.
        inner = ((points > 41) & (points < np.array(sample.shape[::-1]) - 41)).all(axis=1)
        assert np.ptp(extent[inner]) < 0.02 * extent.max()
    # One head by itself gets what it got in the crowd, but for the pixels it had to share.
    k = int(np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)).sum(axis=1).argmax())
    alone = edp_study.prompted_masks(
        sample.image, points[k:k + 1], ClassicalSegmenter(), ("point",), 10)
    crowd = edp_study.prompted_masks(
        sample.image, points, ClassicalSegmenter(), ("point",), 10) == k + 1
    assert crowd.any() and not (crowd & (alone == 0)).any()


def test_thirds_go_by_median_radius_and_of_several_radii_the_best_stays():
    rows = pd.DataFrame([
        {"scene": k, "median_radius": median, "segmenter": "none", "block": "simple",
         "method": method, "head_radius": radius, "heads": 10, "iou_sum": score * (k + 1),
         "mask_px": 100, "other_px": 2 * k, "without_mask": k}
        for k, median in enumerate([30.0, 10.0, 20.0])
        for method, radius, score in (("fixed discs", 4, 1.0), ("fixed discs", 8, 2.0),
                                      ("fixed discs", 16, 1.5), ("watershed", None, 0.5))])
    table = edp_study.thirds(rows)
    assert table["method"].to_list() == ["fixed discs, 8 px", "watershed"]
    best = table.iloc[0]
    assert [best[f"{name} IoU"] for name in edp_study.THIRDS] == [0.4, 0.6, 0.2]
    assert best["all IoU"] == pytest.approx(0.4) and best["on others"] == pytest.approx(0.02)
    assert best["without mask"] == 3


def test_the_page_has_a_block_that_builds_up_and_one_that_takes_away():
    numbers = {f"{name} IoU": 0.5 for name in (*edp_study.THIRDS, "all")}
    rest = {"on others": 0.01, "without mask": 0}
    table = pd.DataFrame([
        {"segmenter": "none", "block": edp_study.SIMPLE, "method": "watershed", **numbers, **rest},
        {"segmenter": "bundled", "block": edp_study.BUILD, "method": "EDP-SAM",
         **dict.fromkeys(numbers, 0.7654), **rest},
        {"segmenter": "bundled", "block": edp_study.TAKE, "method": "without the clip",
         **dict.fromkeys(numbers, 0.7642), **rest}])
    first, second = edp_study.markdown(table, 3, 9_700_000).split("## Taking away")
    assert "| bundled | EDP-SAM | **76.5** | **76.5** |" in first and "without the clip" not in first
    assert "|  | watershed | 50.0 |" in first
    assert "| bundled | without the clip | -0.12 | -0.12 |" in second


def test_the_command_writes_its_tables_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["edp-study", "--out", str(tmp_path), "--scenes", "3", "--seed", "9700000",
                 "--segmenters", "classical"]) == 0
    assert "| classical | EDP-SAM |" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "thirds.csv")
    names = set(table["method"].str.replace(r", \d+ px", "", regex=True))
    assert names == {"fixed discs", "exclusion discs", "Voronoi-limited discs", "watershed",
                     "EDP-SAM", *edp_study.PROMPTS, *edp_study.PARTS}
    assert table.filter(like="IoU").stack().between(0, 1).all()
    assert files.read_json(tmp_path / "study.json")["command"] == (
        "xmask edp-study --scenes 3 --seed 9700000 --segmenters classical")
    scenes = pd.read_csv(tmp_path / "scenes.csv")
    assert (scenes.groupby("scene")["heads"].nunique() == 1).all()
    before = (tmp_path / "scenes.csv").read_text()
    kept = sorted((tmp_path / "work" / "edp_study").rglob("*.json"))
    assert len(kept) == 3 and edp_study.WHOLE not in names  # a matter of SAM's input only
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


def test_negatives_are_measured_by_number_and_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edp_study, "NEIGHBOURS", ((0, 4), (1.0, 3.0)))
    assert main(["edp-study", "--negatives", "--out", str(tmp_path), "--scenes", "1",
                 "--segmenters", "classical"]) == 0
    table = pd.read_csv(tmp_path / "negatives.csv").set_index(["at most", "within"])
    assert len(table) == 4 and table["heads"].nunique() == 1
    assert table["mean_iou"].between(0.3, 1).all()
    assert table.loc[(0, 1.0), "mean_iou"] == table.loc[(0, 3.0), "mean_iou"]
    assert table.loc[(4, 1.0), "mean_iou"] != table.loc[(4, 3.0), "mean_iou"]
