"""Claims: the interval, the verdicts, and what is read from run folders."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmask.study import claim_figures, claims

IMAGES = 120
HARD = np.random.default_rng(9).normal(0, 30, IMAGES)  # how hard each image is, for every method


def write_run(folder, name, errors, ious=None, other=None, reverse=False):
    """A run folder whose images are wrong by `errors` people more than they are hard."""
    path = folder / name
    path.mkdir(parents=True)
    rows = [{"name": f"IMG_{k}", "true_count": 100, "count": 100 + round(
                 error + abs(HARD[k])), "mean_iou": None if ious is None else ious[k]}
            for k, error in enumerate(errors)]
    rows = rows[::-1] if reverse else rows
    (path / "metrics.json").write_text(json.dumps({"per_image": rows}))
    (path / "config.json").write_text(json.dumps({"config": {"loss": {"phase2_p2r": 10.0}}}))
    (path / "calibrated.json").write_text(json.dumps({"per_image": [
        row | {"count": 100 + 2 * (row["count"] - 100)} for row in rows]}))
    if other is not None:
        (path / "other_masks.json").write_text(json.dumps({"per_image": [
            {"name": f"IMG_{k}", **dict.fromkeys(other[1], iou)}
            for k, iou in enumerate(other[0])]}))
    history = pd.DataFrame({"step": [5, 10, 15], "phase": [1, 2, 3], "p2r": [1.0, 5.0, 0.25]})
    history.to_csv(path / "history.csv", index=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three seeds at 5 and 10%: XMask counts and segments better than every rival but smoothing's,
    whose masks are like its own."""
    folder = tmp_path_factory.mktemp("results")
    runs, rng = folder / "full" / "runs", np.random.default_rng(0)
    rivals = tuple({c.rival for c in claims.CLAIMS if c.source == "masks"})
    for percent in (5, 10):
        for seed in (1, 2, 3):
            noise = rng.normal(0, 1, IMAGES)
            iou = np.clip(rng.normal(0.5, 0.05, IMAGES), 0, 1)
            write_run(runs, f"sha-{percent}-s{seed}", 10 + noise, iou, (iou - 0.1, rivals))
            write_run(runs, f"sha-{percent}-s{seed}-supervised-only", 15 + noise, iou - 0.05,
                      reverse=True)
            write_run(runs, f"sha-{percent}-s{seed}-points-only", 10 + noise)
            write_run(runs, f"sha-{percent}-s{seed}-supervised-points-only", 12 + noise)
            write_run(runs, f"sha-{percent}-s{seed}-without-mask-constraint", 7 + noise,
                      iou + {5: 0.005, 10: 0.03}[percent])
            if percent == 10:
                write_run(runs, f"sha-10-s{seed}-without-smoothing", 10 + noise,
                          iou + rng.normal(0, 0.02, IMAGES))
    # an image and a seed that only the rival has
    write_run(runs, "sha-5-s9-points-only", np.zeros(IMAGES))
    write_run(runs, "sha-40-s1", np.full(IMAGES, 4.0))
    scenes = [{"scene": k, "segmenter": "classical", "method": method, "head_radius": radius,
               "iou_sum": iou * 50 + k % 7, "heads": 50}
              for k in range(IMAGES)
              for method, radius, iou in (
                  ("point prompt only", 7.0, 0.4), ("point prompt only", 10.0, 0.5),
                  ("superpixel prompt only", 7.0, 0.4), ("both, without NNEC", 7.0, 0.6),
                  ("EDP-SAM", math.nan, 0.7), ("without the clip", math.nan, 0.7),
                  ("without negatives", math.nan, 0.75))]
    (folder / "full" / "edp_sam").mkdir()
    pd.DataFrame(scenes).to_csv(folder / "full" / "edp_sam" / "scenes.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def table(results):
    return claims.table(results)


def verdicts(table, text, labels=None):
    rows = table[table["claim"] == text]
    return (rows if labels is None else rows[rows["labels"] == labels]).to_dict("records")


def test_the_interval_of_one_seed_is_the_bootstrap_of_its_images():
    rng = np.random.default_rng(1)
    differences = rng.normal(1, 2, (1, 50))
    mean, low, high = claims.paired(differences)
    drawn = [rng.choice(differences[0], 50).mean() for _ in range(4000)]
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.1)
    assert claims.paired(differences) == (mean, low, high), "no luck from call to call"


@pytest.mark.parametrize("seeds", [3, 5])
def test_nothing_is_rarely_taken_for_something(seeds, monkeypatch):
    """A plain bootstrap of so few seeds excludes zero in 15 to 19 of 100 cases."""
    monkeypatch.setattr(claims, "DRAWS", 1000)
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        low, high = claims.paired(rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, (seeds, 30)))[1:]
        wrong += not low <= 0 <= high
    assert 0 < wrong <= 0.08 * 200


@given(st.floats(-50, 50), st.floats(0.1, 10))
def test_a_shift_moves_the_interval_and_a_factor_widens_it(shift, factor):
    differences = np.random.default_rng(2).normal(0, 1, (3, 20))
    plain, moved = claims.paired(differences), claims.paired(factor * differences + shift)
    assert moved == pytest.approx([factor * value + shift for value in plain], abs=1e-6)


def test_an_effect_beyond_chance_holds_and_none_does_not(table):
    better, = [r for r in verdicts(table, "Unlabelled images help counting", 10)
               if r["data"] == "drawn crowds" and r["measure"] == claims.COUNTS]
    assert better["verdict"] == claims.HOLDS and better["in_favour"] == better["seeds"] == 3
    assert better["effect"] == pytest.approx(5) and better["high"] - better["low"] < 0.5, "paired"
    assert better["rival_value"] - better["ours_value"] == pytest.approx(5)
    assert better["images"] == IMAGES
    at_set, = [r for r in verdicts(table, "Unlabelled images help counting", 10)
               if r["measure"] == claims.CALIBRATED]
    assert at_set["effect"] == pytest.approx(10) and at_set["data"] == "drawn crowds"
    equal = verdicts(table, "Gaussian smoothing helps")[0]
    assert (equal["verdict"], equal["why"]) == (claims.FAILS, "no difference shown")
    worse = verdicts(table, "The mask constraint helps counting", 5)[0]
    assert (worse["verdict"], worse["why"]) == (claims.FAILS, "the opposite")
    masks = verdicts(
        table, "Exclusivity shares pixels among neighbours better than distance alone", 5)[0]
    assert masks["verdict"] == claims.HOLDS and masks["effect"] == pytest.approx(10)


def test_as_good_allows_a_little_and_no_more(table):
    both = "One model does both: it counts as well as one that learns points only"
    same = verdicts(table, both, 10)[0]
    assert same["verdict"] == claims.HOLDS and same["effect"] == pytest.approx(0, abs=0.5)
    better = "Points and masks as pseudo-labels count better than points alone"
    assert verdicts(table, better, 10)[0]["verdict"] == claims.FAILS
    assert verdicts(table, better, 5)[0]["seeds"] == 3, "those that both have"
    masks = [verdicts(table, "The mask constraint leaves masks as good", p)[0] for p in (5, 10)]
    assert [row["effect"] for row in masks] == pytest.approx([-0.5, -3.0])
    assert [row["verdict"] for row in masks] == [claims.HOLDS, claims.FAILS]
    assert masks[1]["why"] == "the opposite"
    assert claims._verdict(-0.5, 0.4, allowed=1.0)["verdict"] == claims.HOLDS
    assert claims._verdict(-1.5, 3.0, allowed=1.0)["why"] == "not shown to be as good"


def test_too_few_seeds_or_images_decide_nothing(table):
    one = [r for r in verdicts(table, "More labels, with more steps, are better", 40)
           if r["data"] == "drawn crowds"][0]
    assert (one["verdict"], one["why"]) == (claims.UNTESTED, "1 of at least 3 seeds")
    assert math.isnan(one["effect"])
    photographs = table[table["data"] == "ShanghaiTech A"]
    assert len(photographs) and (photographs["verdict"] == claims.UNTESTED).all()
    assert not (photographs["measure"] == claims.MASKS).any()
    assert "photographs here have no true masks" in set(photographs["why"])


def test_prompts_need_no_seeds_and_take_the_best_radius(table):
    both = verdicts(table, "Two prompts are better than one")
    assert [round(r["effect"]) for r in both] == [10, 20]
    assert all(r["verdict"] == claims.HOLDS and not r["trained"] for r in both)
    clip = verdicts(table, "Masks from dots: the circle helps as clip")[0]
    assert (clip["effect"], clip["verdict"]) == (0, claims.FAILS)
    assert verdicts(table, "Masks from dots: neighbours help as negative points")[0]["why"] == (
        "the opposite")
    sizes = verdicts(table, "Masks from dots: the crowd's vote on head sizes helps")[0]
    assert sizes["why"] == "0 of at least 100 images"


@pytest.mark.parametrize("seeds, images, verdict, why", [
    (3, 100, claims.HOLDS, ""), (2, 100, claims.UNTESTED, "too few networks"),
    (3, 99, claims.UNTESTED, "too few networks")])
def test_the_circle_in_decoding_is_read_from_the_constants(tmp_path, seeds, images, verdict, why):
    pd.DataFrame([
        {"constant": "evaluation.nnec", "value": value, "configured": configured, "seeds": seeds,
         "images": images, "mean_iou": iou, "mean_iou_effect": effect, "mean_iou_low": low,
         "mean_iou_high": high, "seeds_lower": lower}
        for value, configured, iou, effect, low, high, lower in (
            (0, False, 40.0, -8.0, -10.0, -5.0, 3), (1, True, 48.0, 0.0, 0.0, 0.0, 0))
    ]).to_csv(tmp_path / "constants.csv", index=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "constants.csv").rename(tmp_path / "full" / "constants.csv")
    row, = verdicts(claims.table(tmp_path), "The circle helps as region of decoding")
    assert row["verdict"] == verdict and row["why"].startswith(why)
    if verdict == claims.HOLDS:
        assert [row[name] for name in ("rival_value", "ours_value", "effect", "low", "high",
                                       "in_favour")] == [40, 48, 8, 5, 10, 3]
        assert "one circle for all heads" in claims.write(claims.table(tmp_path), tmp_path)[
            0].read_text(encoding="utf-8")


def test_the_page_names_every_claim_and_folds_what_was_not_tested(results, table):
    paths = claims.write(table, results)
    page = paths[0].read_text(encoding="utf-8")
    assert all(claim.text in page for claim in claims.CLAIMS)
    assert "| supervised only | ShanghaiTech A, 5, 10, 40% |" in page
    assert page.count("| drawn crowds, 40% |") == len(
        {c.text for c in claims.CLAIMS if 40 in c.percents}), "one row for all rivals"
    assert "too few networks were decoded both ways" in page
    assert "+5.00 [" in page and "3 of 3" in page
    read = pd.read_csv(paths[1])
    assert list(read) == list(claims.COLUMNS) and len(read) == len(table)
    assert claims.write(table, results)[0].read_text(encoding="utf-8") == page
    assert not list(results.glob("*.set-aside-*"))
    paths[0].write_text("notes of the user")
    claims.write(table, results)
    assert (results / "claims.md.set-aside-1").read_text() == "notes of the user"


def test_luck_is_told_apart(results):
    luck = claims.luck(results).set_index(["method", "labels"])
    assert set(luck.index.get_level_values("labels")) == {5, 10}
    row = luck.loc["XMask", 10]
    assert row["seeds"] == 3 and row["images"] == IMAGES and row["seed_std"] < 0.5
    assert row["image_se"] == pytest.approx(np.abs(HARD).std() / math.sqrt(IMAGES), rel=0.1)


def test_the_page_of_evidence_has_numbers_or_says_how_to_get_them(results, table, tmp_path):
    with pytest.raises(FileNotFoundError, match="claims.csv: missing.*make reproduce PROFILE=full"):
        claims.evidence_block(tmp_path)
    root = tmp_path / "root"
    shutil.copytree(results, root / "results")
    claims.write(table, root / "results")
    block = claims.evidence_block(root)
    assert "\n".join(claims.markdown(table)) in block, "read back as it was written"
    tested = table["effect"].notna().sum()
    assert f"{tested} comparisons could be made" in block and "| XMask | 10 | 3 × 120 |" in block


def test_runs_of_other_labelled_images_are_not_compared(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    runs = tmp_path / "results" / "full" / "runs"
    config = json.loads((runs / "sha-5-s2" / "config.json").read_text())
    (runs / "sha-5-s2" / "config.json").write_text(json.dumps(
        config | {"data": {"checksum": "0", "labelled": ["IMG_1"], "held_out": []}}))
    with pytest.raises(ValueError, match=r"s2 .*s2-points-only|s2 .*s2-supervised-only") as error:
        claims.table(tmp_path / "results")
    assert "differ in data.checksum, data.labelled" in str(error.value)


def test_an_earlier_metrics_file_is_named(tmp_path):
    path = tmp_path / "full" / "runs" / "sha-5-s1"
    path.mkdir(parents=True)
    (path / "metrics.json").write_text('{"per_image": [{"name": "a"}]}')
    with pytest.raises(ValueError, match=r"metrics.json: field .mean_iou. is missing. Evaluate"):
        claims.table(tmp_path)


def test_the_forest_plot_shows_every_tested_claim(table, tmp_path):
    figure = claim_figures.forest(table)
    labels = [text.get_text() for axis in figure.axes for text in axis.get_yticklabels()]
    assert len(labels) == table["effect"].notna().sum()
    assert [len({text.get_text() for text in axis.get_yticklabels()}) for axis in figure.axes
            ] == [len(axis.get_yticklabels()) for axis in figure.axes], "labels tell rows apart"
    one, two = figure.write(tmp_path / "a.png"), claim_figures.forest(table).write(
        tmp_path / "b.png")
    assert one.read_bytes() == two.read_bytes()
    empty = claim_figures.forest(table.assign(effect=math.nan))
    assert "no claim could be tested yet" in [text.get_text() for text in empty.axes[0].texts]


def test_learning_curves_have_a_band_a_method(results):
    figure = claim_figures.compared_curves(results / "full", "sha", (5, 10))
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    assert len(lines) == 2 * 3
    unknown = claim_figures.compared_curves(results / "full", "jhu", (5, 10))
    assert len(unknown.axes) == 1 and not unknown.axes[0].get_lines()
    values = lines[0].get_ydata()
    assert values[-1] < 1 and len(values) == 3
