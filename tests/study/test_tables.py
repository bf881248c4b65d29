"""Tables are functions of run folders, and never mix what must not be compared."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from xmask.study import other_masks, tables


def write_run(folder, dataset="sha", percent=5, seed=1, variant="xmask", *, synthetic=True,
              selection="last", mae=10.0, mean_iou=0.5, constant=40.0, disc=0.4, exclusive=0.45,
              profile="demo", counts=((0, 3), (20, 18), (150, 160)), steps=30, **config):
    """A made-up run folder with the files that training and evaluation leave."""
    name = f"{dataset}-{percent}-s{seed}" + ("" if variant == "xmask" else f"-{variant}")
    path = folder / "runs" / name
    path.mkdir(parents=True)
    head = {"profile": profile, "dataset": dataset, "percent": percent, "seed": seed,
            "variant": variant, "synthetic": synthetic, "selection": selection}
    data = {"max_side": None, "checksum": f"sum-of-{dataset}", "labelled": ["IMG_1"]}
    (path / "config.json").write_text(json.dumps(
        {**head, "backbone": {"name": "vgg16_bn", "initialisation": "random"},
         "segmenter": {"kind": "classical"}, "versions": {}, "data": data, "config": {}, **config}))
    discs = {"fixed_disc": {"radius": 6.0, "mean_iou": disc},
             "exclusive_disc": {"radius": 7.0, "mean_iou": exclusive}}
    if disc is None:
        discs = dict.fromkeys(discs)
    segmentation = None if mean_iou is None else {"mean_iou": mean_iou, "ap50": 0.3, "pq": 0.2,
                                                  "aji": 0.1}
    (path / "metrics.json").write_text(json.dumps(
        {"run": name, **head, "images": len(counts),
         "counting": {"mae": mae, "rmse": 2 * mae, "nae": 0.5},
         "localization": {"4": {"precision": 0.5, "recall": 0.25, "f1": 1 / 3},
                          "8": {"precision": 0.75, "recall": 0.5, "f1": 0.6}},
         "segmentation": segmentation,
         "baselines": {"constant_count": {"value": 50.0, "mae": constant}, **discs},
         "per_image": [{"name": f"IMG_{i}", "true_count": true, "count": count,
                        "mean_iou": mean_iou} for i, (true, count) in enumerate(counts, 1)]}))
    lines = ["step,epoch,phase,loss,labelled,unlabelled,weight,p2r,exclusivity,constraint,"
             "point_mask"]
    noise = np.random.default_rng(seed)
    for step in range(steps):
        phase = 1 + 3 * step // steps
        loss = 2 * math.exp(-step / steps) + 0.1 * noise.random()
        term = {1: f"{loss},,,", 2: f",{loss},,{loss / 5}", 3: f"{loss},,{loss / 3},"}[phase]
        lines.append(f"{step},{step // 3},{phase},{loss},{loss},{loss / 2},0.5,{term}")
    (path / "history.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def study(tmp_path):
    """A demo study: two datasets, two percentages, seeds, baselines, ablations."""
    folder = tmp_path / "results" / "demo"
    for dataset in ("qnrf", "sha"):
        for percent in (5, 40):
            write_run(folder, dataset, percent, 1, mae=10.0, mean_iou=0.5)
            write_run(folder, dataset, percent, 2, mae=12.0, mean_iou=0.6)
            write_run(folder, dataset, percent, 1, "supervised-only", mae=20.0, mean_iou=0.45)
    write_run(folder, "sha", 40, 1, "without-nnec", mae=13.5, mean_iou=0.35)
    write_run(folder, "sha", 40, 2, "without-nnec", mae=12.5, mean_iou=0.4)
    write_run(folder, "sha", 40, 1, "without-mask-constraint", mae=9.0, mean_iou=0.5)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def row_of(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_load_runs_gives_one_flat_row_a_run(study):
    runs = tables.load_runs(study)
    assert len(runs) == 15
    run = runs.set_index("run").loc["sha-40-s1-without-nnec"]
    assert (run.mae, run.rmse, run.mean_iou, run.f1_8) == (13.5, 27.0, 0.35, 0.6)
    assert (run.constant_mae, run.longer_side) == (40.0, "full size")
    assert (run.disc_mean_iou, run.exclusive_disc_mean_iou) == (0.4, 0.45)


def test_a_method_without_masks_has_no_row_among_masks(study):
    runs = tables.load_runs(study)
    none = (runs["variant"] == "supervised-only") & (runs["percent"] == 40)
    runs.loc[none, ["mean_iou", "ap50", "pq", "aji", "disc_mean_iou", "exclusive_disc_mean_iou"]] = np.nan
    table = tables.segmentation_table(runs).text
    alone = table[table["method"].str.contains("supervised only")]
    assert set(alone["labelled %"]) == {"5"} and len(alone) == 6
    runs.loc[:, ["mean_iou", "ap50", "pq", "aji"]] = np.nan  # photographs: nobody has any
    table = tables.segmentation_table(runs).text
    assert set(table[table["method"] == "supervised only (ours)"]["labelled %"]) == {"5", "40"}


def test_the_counting_table_holds_means_spreads_seeds_and_runs(study):
    table = tables.counting_table(tables.load_runs(study))
    row = row_of(table.numbers, dataset="drawn, ShanghaiTech A layout", method="XMask (ours)",
                 **{"labelled %": 40})
    assert row["MAE, drawn (ours)"] == 11.0
    assert row["std of MAE, drawn (ours)"] == 1.4
    assert row["RMSE, drawn (ours)"] == 22.0
    assert row["seeds"] == 2 and row["runs"] == "sha-40-s1 sha-40-s2"
    text = row_of(table.text, dataset="drawn, UCF-QNRF layout", method="XMask (ours)",
                  **{"labelled %": "5"})
    assert text["MAE, drawn (ours)"] == "11.0 ± 1.4"
    alone = row_of(table.text, dataset="drawn, UCF-QNRF layout", method="supervised only (ours)",
                   **{"labelled %": "5"})
    assert alone["MAE, drawn (ours)"] == "20.0" and alone["seeds"] == "1"
    constant = row_of(table.text, dataset="drawn, UCF-QNRF layout",
                      method="constant count (baseline)", **{"labelled %": "5"})
    assert constant["MAE, drawn (ours)"] == "40.0"
    assert constant["RMSE, drawn (ours)"] == tables.UNKNOWN  # not in these metrics.json


def test_the_constant_count_has_an_rmse_where_it_was_measured(study):
    for path in (study / "runs").glob("*/metrics.json"):
        edit(path, lambda content: content["baselines"]["constant_count"].update(rmse=55.04))
    runs = tables.load_runs(study)
    row = row_of(tables.counting_table(runs).text, dataset="drawn, UCF-QNRF layout",
                 method="constant count (baseline)", **{"labelled %": "5"})
    assert row["RMSE, drawn (ours)"] == "55.0"
    assert set(tables.summary_table(runs).text["constant-count RMSE, drawn (ours)"]) == {
        "55.0", tables.UNKNOWN}  # unknown: the mean over datasets


def test_every_table_with_counts_says_how_well_heads_were_found(study):
    runs = tables.load_runs(study)
    for table in (tables.counting_table(runs), tables.summary_table(runs),
                  tables.ablation_table(runs, "sha", 40)):
        assert "MAE, drawn (ours)" in table.text
        for distance, value in ((4, "33.3"), (8, "60.0")):
            shown = table.text[f"F1 % at {distance} px, drawn (ours)"]
            assert shown.str.startswith(value).any()


def test_numbers_not_checked_where_they_were_published_are_marked(study):
    table = tables.counting_table(tables.load_runs(study))
    row = row_of(table.text, method="TMTB (published)", dataset="ShanghaiTech A")
    assert row["MAE, real (published)"] == "72.4 (secondary)"
    assert "Secondary: see the source" in table.caption
    assert row_of(table.numbers, method="TMTB (published)", dataset="ShanghaiTech A")[
        "MAE, real (published)"] == 72.4


@pytest.mark.parametrize("make", [tables.counting_table, tables.segmentation_table])
def test_published_and_drawn_numbers_never_share_a_column(study, make):
    write_run(study, "jhu", 10, 1, synthetic=False, mean_iou=None, disc=None)
    table = make(tables.load_runs(study))
    for frame in (table.numbers, table.text):
        assert set(frame["images"]) == {"drawn", "real"}
        assert all(name.startswith("drawn, ") == (kind == "drawn")
                   for name, kind in zip(frame["dataset"], frame["images"]))
        for column in frame:
            if "(ours)" not in column and "(published)" not in column:
                continue
            assert ("drawn" in column) != ("real" in column)
            for _, row in frame.iterrows():
                shown = not (pd.isna(row[column]) or row[column] == tables.UNKNOWN)
                if shown and "drawn" in column:
                    assert row["images"] == "drawn" and "(published)" not in row["method"]
                if shown and "(published)" in column:
                    assert row["images"] == "real" and "(published)" in row["method"]


def test_every_published_number_of_the_datasets_stands_in_a_table(study):
    write_run(study, "jhu", 10)
    runs = tables.load_runs(study)
    made = {"mae": tables.counting_table(runs), "rmse": tables.counting_table(runs),
              "mean_iou": tables.segmentation_table(runs)}
    columns = {"mae": "MAE, real (published)", "rmse": "RMSE, real (published)",
               "mean_iou": "mean IoU %, real (published)"}
    published = tables.read_published()
    assert set(published["metric"]) == set(columns)
    for line in published.itertuples():
        where = {"dataset": tables.DATASETS[line.dataset], "method": f"{line.method} (published)",
                 "labelled %": line.labelled_percent or "unknown"}
        shown = line.value + " (secondary)" * line.source.startswith("secondary")
        row = row_of(made[line.metric].text, **where)
        assert row[columns[line.metric]] == shown and line.source in row["source"]
        where["labelled %"] = float(line.labelled_percent or "nan")
        numbers = made[line.metric].numbers
        if not line.labelled_percent:
            numbers = numbers[numbers["labelled %"].isna()]
            del where["labelled %"]
        assert row_of(numbers, **where)[columns[line.metric]] == float(line.value)


def test_unknown_numbers_stay_visibly_unknown(study):
    table = tables.counting_table(tables.load_runs(study))
    row = row_of(table.text, dataset="ShanghaiTech A", method="XMask (published)",
                 **{"labelled %": "5"})
    assert row["MAE, real (published)"] == tables.UNKNOWN
    assert f"{tables.UNKNOWN}: unknown" in table.caption
    assert "nan" not in table.markdown().lower() + table.csv().lower()
    assert tables.UNKNOWN not in table.csv()


def test_drawn_crowds_of_no_published_dataset_have_no_published_rows(tmp_path):
    write_run(tmp_path, "synthetic", 10)
    table = tables.counting_table(tables.load_runs(tmp_path))
    assert not [column for column in table.numbers if "published" in column]


def test_a_study_of_one_dataset_shows_that_dataset_alone(tmp_path):
    write_run(tmp_path, "qnrf", 10)
    assert set(tables.counting_table(tables.load_runs(tmp_path)).text["dataset"]) == {
        "UCF-QNRF", "drawn, UCF-QNRF layout"}
    assert tables.write_tables(tmp_path, tmp_path / "tables")


def test_segmentation_is_in_percent_with_its_baselines(study):
    table = tables.segmentation_table(tables.load_runs(study))
    where = {"dataset": "drawn, ShanghaiTech A layout", "labelled %": "5"}
    ours = row_of(table.text, method="XMask (ours)", **where)
    assert ours["mean IoU %, drawn (ours)"] == "55.0 ± 7.1"
    assert ours["PQ %, drawn (ours)"] == "20.0 ± 0.0"
    for discs, value in (("equal discs, whole,", "40.0"), ("equal discs, cut where they meet,", "45.0")):
        row = row_of(table.text, method=f"{discs} at the points of XMask (baseline)", **where)
        assert row["mean IoU %, drawn (ours)"] == value
        assert row["PQ %, drawn (ours)"] == tables.UNKNOWN
    assert "may overlap; equal discs, cut where they meet: a contested" in table.caption


def test_discs_have_one_name_in_tables_and_claims():
    assert set(tables.DISCS.values()) <= {other_masks.WHOLE, *other_masks.methods(1.0, None)}


def test_seeds_whose_baselines_are_equal_all_count_in_their_mean(tmp_path):
    for seed, disc in enumerate((0.4, 0.4, 0.7), 1):
        write_run(tmp_path, seed=seed, disc=disc)
    table = tables.segmentation_table(tables.load_runs(tmp_path))
    row = row_of(table.text, method="equal discs, whole, at the points of XMask (baseline)")
    assert row["mean IoU %, drawn (ours)"] == "50.0 ± 17.3"


def test_real_data_without_truth_masks_has_unknown_mean_iou(tmp_path):
    write_run(tmp_path, synthetic=False, mean_iou=None, disc=None)
    table = tables.segmentation_table(tables.load_runs(tmp_path))
    row = row_of(table.text, method="XMask (ours)")
    assert row["mean IoU %, real (ours)"] == tables.UNKNOWN
    assert not [column for column in table.text if "drawn" in column]
    assert "measured on real photographs" in table.caption


def test_localisation_shows_every_distance(study):
    row = row_of(tables.localisation_table(tables.load_runs(study)).numbers,
                 dataset="drawn, ShanghaiTech A layout", method="XMask (ours)", **{"labelled %": 5})
    assert row["recall % at 4 px, drawn (ours)"] == 25.0
    assert row["F1 % at 8 px, drawn (ours)"] == 60.0


def test_the_summary_gives_ratios_and_their_mean_over_datasets(tmp_path):
    write_run(tmp_path, "sha", 5, mae=10.0, constant=40.0, mean_iou=0.6, disc=0.4, exclusive=0.5)
    write_run(tmp_path, "jhu", 5, mae=30.0, constant=40.0, mean_iou=0.5, disc=0.4, exclusive=0.5)
    table = tables.summary_table(tables.load_runs(tmp_path))
    numbers = table.numbers
    sha = row_of(numbers, dataset="drawn, ShanghaiTech A layout")
    assert sha["MAE / constant count, drawn (ours)"] == 0.25
    assert sha["mean IoU % of equal discs, whole, drawn (ours)"] == 40.0
    assert sha["mean IoU % of equal discs, cut where they meet, drawn (ours)"] == 50.0
    assert sha["mean IoU / equal discs, whole, drawn (ours)"] == 1.5
    assert sha["mean IoU / equal discs, cut where they meet, drawn (ours)"] == 1.2
    mean = row_of(numbers, dataset="mean of 2 datasets")
    assert mean["MAE / constant count, drawn (ours)"] == 0.5
    assert mean["mean IoU / equal discs, whole, drawn (ours)"] == 1.375
    assert mean["mean IoU / equal discs, cut where they meet, drawn (ours)"] == 1.1
    assert math.isnan(mean["MAE, drawn (ours)"])  # a mean of MAEs would mean nothing
    assert math.isnan(mean["mean IoU % of equal discs, cut where they meet, drawn (ours)"])
    for written in (table.csv(), table.markdown(), table.latex()):
        assert "mean IoU / equal discs, cut where they meet, drawn (ours)" in written


def test_a_ratio_to_discs_that_hit_nothing_is_unknown(tmp_path):
    write_run(tmp_path, disc=0.4, exclusive=0.0)
    row = tables.summary_table(tables.load_runs(tmp_path)).text.iloc[0]
    assert row["mean IoU / equal discs, cut where they meet, drawn (ours)"] == tables.UNKNOWN
    assert row["mean IoU / equal discs, whole, drawn (ours)"] == "1.250"


def test_ablation_differences_are_paired_by_seed(study):
    table = tables.ablation_table(tables.load_runs(study), "sha", 40)
    assert list(table.text["variant"])[0] == "XMask"
    nnec = row_of(table.numbers, variant="without NNEC")
    assert nnec["MAE difference, drawn (ours)"] == 2.0  # (3.5 + 0.5) / 2
    assert nnec["std of MAE difference, drawn (ours)"] == 2.1
    assert nnec["mean IoU % difference, drawn (ours)"] == -17.5
    lone = row_of(table.text, variant="without mask constraint")
    assert lone["MAE difference, drawn (ours)"] == "-1.0"  # against seed 1 only, not the mean
    assert lone["seeds"] == "1" and "not evidence" in table.caption


def test_an_ablation_with_two_seeds_throughout_needs_no_warning(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, seed=seed, variant="without-nnec")
    table = tables.ablation_table(tables.load_runs(tmp_path), "sha", 5)
    assert "not evidence" not in table.caption


def test_a_variant_without_a_shared_seed_has_no_difference(tmp_path):
    write_run(tmp_path, seed=1)
    write_run(tmp_path, seed=2, variant="without-nnec", mae=7.0)
    table = tables.ablation_table(tables.load_runs(tmp_path), "sha", 5)
    row = row_of(table.text, variant="without NNEC")
    assert row["MAE, drawn (ours)"] == "7.0"
    assert row["MAE difference, drawn (ours)"] == tables.UNKNOWN


def test_an_ablation_without_variants_says_what_to_train(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ValueError, match="sha at 5%.*found xmask.*without-nnec"):
        tables.ablation_table(tables.load_runs(tmp_path), "sha", 5)


def test_best_on_test_runs_stand_in_files_of_their_own(tmp_path):
    write_run(tmp_path, seed=1, mae=11.0)
    write_run(tmp_path, seed=2, mae=77.7, selection="best-on-test")
    runs = tables.load_runs(tmp_path)
    with pytest.raises(ValueError, match="chosen on the test set"):
        tables.counting_table(runs)
    names = {path.name: path for path in tables.write_tables(tmp_path, tmp_path / "tables")}
    last = names["counting.md"].read_text()
    best = names["counting_best-on-test.md"].read_text()
    assert "77.7" in best and "77.7" not in last and "sha-5-s2" not in last
    assert "best-on-test" in best.splitlines()[0] and "best-on-test" not in last


def test_tables_are_the_same_byte_for_byte_and_ignore_the_last_bits(study, tmp_path):
    first = tables.write_tables(study, tmp_path / "a")
    for path in (study / "runs").glob("*/metrics.json"):
        edit(path, lambda content: content["counting"].update(
            mae=content["counting"]["mae"] * (1 + 1e-12)))
    second = tables.write_tables(study, tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 5 * 3
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
        assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", one.read_text())


def test_every_file_names_its_runs(study, tmp_path):
    for path in tables.write_tables(study, tmp_path / "tables"):
        assert "sha-40-s1" in path.read_text()
    tex = (tmp_path / "tables" / "counting.tex").read_text()
    assert "% run: qnrf-5-s1-supervised-only" in tex


def test_latex_is_escaped(study, tmp_path):
    assert tables._latex(r"a_b & 5% ± {x} — \~^<>#$") == (
        r"a\_b \& 5\% $\pm$ \{x\} --- \textbackslash{}\textasciitilde{}\textasciicircum{}"
        r"\textless{}\textgreater{}\#\$")
    tex = tables.segmentation_table(tables.load_runs(study)).latex()
    assert r"mean IoU \%, drawn (ours)" in tex and r"\toprule" in tex
    body = [line for line in tex.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)%", "\n".join(body))
    columns = re.search(r"tabular}\{(l+)\}", tex).group(1)
    for line in body:
        if line.endswith(r"\\"):
            assert line.count(" & ") == len(columns) - 1


def test_tables_no_longer_supported_by_a_run_are_removed(tmp_path, caplog):
    out = tmp_path / "tables"
    path = write_run(tmp_path, seed=2, selection="best-on-test")
    write_run(tmp_path, seed=1)
    tables.write_tables(tmp_path, out)
    (out / "notes.md").write_text("mine")
    (out / "ablation_mine.md").write_text("mine")
    (out / "counting.md").write_text("edited")
    (path / "metrics.json").unlink()
    with pytest.warns(UserWarning, match="sha-5-s2"):
        tables.write_tables(tmp_path, out)
    assert not list(out.glob("*_best-on-test*")) and (out / "notes.md").exists()
    assert (out / "ablation_mine.md").read_text() == "mine"
    assert "ablation_mine.md: no run here gives it" in caplog.text
    assert (out / "counting.md.set-aside-1").read_text() == "edited"


def test_a_run_not_yet_evaluated_is_skipped_and_named(study, tmp_path):
    (study / "runs" / "sha-5-s2" / "metrics.json").unlink()
    with pytest.warns(UserWarning, match="not yet evaluated, left out: sha-5-s2"):
        runs = tables.load_runs(study)
    assert len(runs) == 14
    assert "left out: sha-5-s2" in tables.counting_table(runs).caption


def test_no_runs_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make reproduce"):
        tables.load_runs(tmp_path / "paper")
    path = write_run(tmp_path)
    (path / "metrics.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="xmask evaluate"):
        tables.load_runs(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["counting"].pop("mae"), "'counting.mae' is missing"),
    (lambda c: c["counting"].update(rmse=None), "'counting.rmse' holds None"),
    (lambda c: c["counting"].update(mae=float("nan")), "'counting.mae' holds nan"),
    (lambda c: c["segmentation"].update(mean_iou=31.4), "between 0 and 1"),
    (lambda c: c["localization"]["4"].update(f1="high"), "localization.4.f1"),
    (lambda c: c["baselines"].pop("fixed_disc"), "'baselines.fixed_disc' is missing"),
    (lambda c: c["baselines"].pop("exclusive_disc"), "'baselines.exclusive_disc' is missing"),
    (lambda c: c.update(selection="luckiest"), "'selection' is 'luckiest'|config.json"),
    (lambda c: c.update(dataset="qnrf"), "'dataset' is 'qnrf', but config.json"),
    (lambda c: c["per_image"][0].pop("count"), "'count' is missing"),
])
def test_a_broken_run_is_an_error_that_names_file_field_and_remedy(tmp_path, change, message):
    path = write_run(tmp_path)
    edit(path / "metrics.json", change)
    with pytest.raises(ValueError, match=message) as error:
        tables.load_runs(tmp_path)
    assert "metrics.json" in str(error.value) and "xmask evaluate" in str(error.value)


def test_a_broken_config_is_an_error_with_another_remedy(tmp_path):
    edit(write_run(tmp_path) / "config.json", lambda content: content.pop("backbone"))
    with pytest.raises(ValueError, match="config.json: field 'backbone.name'.*xmask train"):
        tables.load_runs(tmp_path)


def test_half_written_metrics_are_an_error(tmp_path):
    path = write_run(tmp_path)
    (path / "metrics.json").write_text('{"run": "sha-5')
    with pytest.raises(ValueError, match="metrics.json: not valid JSON"):
        tables.load_runs(tmp_path)
    (path / "metrics.json").write_text("{}")
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        tables.load_runs(tmp_path)


def test_unlike_runs_are_never_averaged(tmp_path):
    write_run(tmp_path, seed=1)
    path = write_run(tmp_path, seed=2, data={"checksum": "other", "max_side": None})
    with pytest.raises(ValueError, match="sha-5-s1, sha-5-s2 differ in 'checksum'"):
        tables.load_runs(tmp_path)
    edit(path / "config.json", lambda c: c.update(data={"checksum": "sum-of-sha",
                                                        "settings": {"max_side": 1024}}))
    with pytest.raises(ValueError, match="'longer_side' .full size, <= 1024 px"):
        tables.load_runs(tmp_path)


def test_a_seed_counts_once(tmp_path):
    path = write_run(tmp_path)
    path.rename(path.with_name("copy"))
    write_run(tmp_path)
    with pytest.raises(ValueError, match="copy, sha-5-s1 are the same experiment"):
        tables.load_runs(tmp_path)
