"""Figures name their runs, repeat byte for byte, and keep real people out of the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.color import rgb2lab

import xmask
from tests.study.test_tables import write_run
from xmask import files
from xmask.study import figures, tables
from xmask.tools.overlay import INSTANCES, overlay

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


class DrawnSplit:
    """A test split of a few small pictures with truth masks."""

    def __init__(self, synthetic=True, counts=(6, 0, 2, 12), masks=True):
        random = np.random.default_rng(0)
        self.synthetic, self.samples = synthetic, []
        for number, count in enumerate(counts, 1):
            image = random.integers(60, 120, (48, 64, 3)).astype(np.uint8)
            points = np.column_stack([random.uniform(4, 60, count), random.uniform(4, 44, count)])
            instances = np.zeros((48, 64), np.int32)
            for head, (x, y) in enumerate(points.round().astype(int), 1):
                instances[y - 2:y + 3, x - 2:x + 3] = head
            self.samples.append(SimpleNamespace(
                image=image, points=points.astype(np.float32), name=f"IMG_{number}",
                instances=instances if masks else None))
        self.ids = [sample.name for sample in self.samples]

    def counts(self):
        return np.array([len(sample.points) for sample in self.samples])

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def predict_into(self, run):
        for sample in self.samples:
            label_map = np.zeros(sample.image.shape[:2], np.uint16)
            for head, (x, y) in enumerate(sample.points.round().astype(int), 1):
                label_map[y - 1:y + 2, x - 1:x + 2] = head
            files.write_png(run / "predictions" / f"{sample.name}.png", label_map)
            table = pd.DataFrame(sample.points, columns=["x", "y"]).assign(score=0.9, counted=1)
            table.to_csv(run / "predictions" / f"{sample.name}.csv", index=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "results" / "demo"
    for percent in (5, 40):
        for seed in (1, 2):
            write_run(folder, "sha", percent, seed, mae=10.0 + seed)
        write_run(folder, "sha", percent, 1, "supervised-only", mae=20.0, mean_iou=0.4)
    for variant in ("without-nnec", "without-smoothing"):
        write_run(folder, "sha", 40, 1, variant, mae=15.0, mean_iou=0.3)
    for percent in (5, 40):
        DrawnSplit().predict_into(folder / "runs" / f"sha-{percent}-s1")
    return folder


@pytest.fixture(scope="module")
def written(study):
    out = study.parents[1] / "figures" / "demo"
    paths = figures.write_figures(study, out, lambda name: DrawnSplit())
    return {path.name: path for path in paths}


def test_every_figure_is_written_and_shows_something(written):
    assert set(written) == {
        "learning_sha.png", "counts_sha.png", "mae_versus_percent.png", "mean_iou.png",
        "ablation_sha-40.png", "predictions_sha.png", "percents_sha.png"}
    for path in written.values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 250 and pixels.shape[1] > 500
        assert (pixels[:3] == 255).all()  # a white margin, not a transparent one
        assert 0.005 < (pixels != 255).any(axis=2).mean() < 0.95


def test_every_figure_names_all_its_runs_and_no_date(written):
    for name, path in written.items():
        text = Image.open(path).text
        assert set(text) == {"Description"}
        assert "drawn crowds, profile demo, selection last, runs:" in text["Description"]
        assert "sha-40-s1" in text["Description"], name
    assert "sha-5-s1-supervised-only" in Image.open(written["mean_iou.png"]).text["Description"]
    assert "without-nnec" not in Image.open(written["counts_sha.png"]).text["Description"]


def test_figures_are_the_same_byte_for_byte(study, written, tmp_path):
    with matplotlib_settings({"axes.facecolor": "black", "font.size": 30}):
        again = figures.write_figures(study, tmp_path, lambda name: DrawnSplit())
    assert [path.name for path in again] == list(written)
    for path in again:
        assert path.read_bytes() == written[path.name].read_bytes(), path.name


def test_percentages_stand_side_by_side_beside_the_truth(study):
    runs = [study / "runs" / f"sha-{percent}-s1" for percent in (5, 40)]
    titles = [axis.get_title() for axis in figures.figure_by_percent(
        DrawnSplit(), runs, ["IMG_1"]).axes]
    assert len(titles) == 3 and titles[0].startswith("IMG_1, truth: ")
    assert titles[1].startswith("5% labelled: ") and titles[2].startswith("40% labelled: ")


def matplotlib_settings(settings):
    import matplotlib

    return matplotlib.rc_context(settings)


def test_pictures_of_real_people_never_enter_the_figures_folder(tmp_path):
    folder, out = tmp_path / "results" / "paper", tmp_path / "figures"
    run = write_run(folder, synthetic=False, profile="paper", mean_iou=None, disc=None)
    split = DrawnSplit(synthetic=False, masks=False)
    split.predict_into(run)
    paths = figures.write_figures(folder, out, lambda name: split)
    assert [path for path in paths if "predictions" in path.name] == [
        run / "pictures" / "predictions_sha.png"]
    assert not list(out.glob("predictions*"))
    assert "real photographs" in Image.open(paths[-1]).text["Description"]


def test_a_run_on_drawn_crowds_is_not_pictured_on_photographs(tmp_path):
    DrawnSplit().predict_into(write_run(tmp_path))
    with pytest.raises(ValueError, match="measured on drawn images, but the sha test set"):
        figures.write_figures(tmp_path, tmp_path / "out", lambda name: DrawnSplit(synthetic=False))


def test_without_predictions_or_images_the_other_figures_are_still_drawn(tmp_path):
    write_run(tmp_path)
    with pytest.warns(UserWarning, match="sha-5-s1.*not committed.*xmask evaluate"):
        some = figures.write_figures(tmp_path, tmp_path / "out", lambda name: DrawnSplit())
    assert len(some) == 4
    assert len(figures.write_figures(tmp_path, tmp_path / "out", lambda name: None)) == 4


def test_best_on_test_and_real_runs_have_figures_of_their_own(tmp_path):
    write_run(tmp_path, "sha", seed=1)
    write_run(tmp_path, "sha", seed=2, selection="best-on-test")
    write_run(tmp_path, "jhu", seed=1, synthetic=False, mean_iou=None, disc=None)
    names = {path.name: path for path in figures.write_figures(tmp_path, tmp_path / "out")}
    assert {"counts_sha.png", "counts_sha_best-on-test.png", "counts_jhu_real.png",
            "mae_versus_percent_real.png"} <= set(names)
    assert "s2" not in Image.open(names["counts_sha.png"]).text["Description"]
    with pytest.raises(ValueError, match="several selections"):
        figures.count_scatter(tables.load_runs(tmp_path), "sha")


def test_only_the_named_runs_are_read(study, tmp_path):
    everything = figures.write_figures(study, tmp_path)
    (tmp_path / "mine.png").write_bytes(everything[0].read_bytes())
    paths = figures.write_figures(study, tmp_path, only=["sha-5-s1"])
    assert len(paths) < len(everything)
    assert set(tmp_path.glob("*.*")) - {tmp_path / ".xmask"} == {
        *paths, tmp_path / "mine.png"}, "plots without runs stay"
    assert all(Image.open(path).text["Description"].endswith("runs: sha-5-s1") for path in paths)
    with pytest.raises(FileNotFoundError, match="no run sha-7-s1"):
        figures.write_figures(study, tmp_path, only=["sha-7-s1"])


def test_mean_iou_stands_beside_both_kinds_of_discs_at_its_points(study):
    bars = {container.get_label(): [bar.get_height() for bar in container]
            for container in figures.iou_bars(tables.load_runs(study)).axes[0].containers
            if container.get_label() in ("XMask", "discs, whole, at XMask points",
                                         "discs, cut, at XMask points")}
    assert bars == {"discs, whole, at XMask points": pytest.approx([40.0, 40.0]),
                    "discs, cut, at XMask points": pytest.approx([45.0, 45.0]),
                    "XMask": pytest.approx([50.0, 50.0])}


def test_an_overlay_paints_instances_contours_and_points_and_nothing_else():
    image = np.full((20, 30, 3), 100, np.uint8)
    label_map = np.zeros((20, 30), np.int32)
    label_map[4:11, 4:11], label_map[4:11, 11:18] = 1, 8  # neighbours of one colour
    painted = overlay(image, label_map, np.array([[7.0, 7.0], [29.4, 0.0]]))
    assert painted.dtype == np.uint8 and painted.shape == image.shape
    assert (image == 100).all()
    outside = label_map == 0
    outside[0:2, 28:30] = False  # the second point, cut by the image's corner
    assert (painted[outside] == 100).all()
    colour = INSTANCES[0]
    assert (painted[4, 4] == colour).all() and (painted[8, 10:12] == colour).all()  # contours
    assert (painted[5, 5] == (0.6 * 100 + 0.4 * colour).round()).all()
    assert (painted[7, 7] == 255).all() and (painted[6, 6] == 0).all()
    with pytest.raises(ValueError, match="label_map is"):
        overlay(image, label_map[:5])
    with pytest.raises(ValueError, match="uint8"):
        overlay(image / 255, label_map)


def test_pictured_are_a_sparse_a_middle_and_a_dense_image():
    assert figures.sparse_middle_dense(DrawnSplit()) == ["IMG_3", "IMG_1", "IMG_4"]
    assert figures.sparse_middle_dense(DrawnSplit(counts=(0, 3))) == ["IMG_2"]
    assert figures.sparse_middle_dense(DrawnSplit(counts=(0,))) == ["IMG_1"]


def test_predictions_of_other_images_are_refused(tmp_path):
    run = write_run(tmp_path)
    split = DrawnSplit()
    with pytest.raises(FileNotFoundError, match="IMG_3.png: no prediction"):
        figures.figure_predictions(split, run)
    split.predict_into(run)
    with pytest.raises(ValueError, match="no test image named IMG_9"):
        figures.figure_predictions(split, run, ["IMG_9"])
    files.write_png(run / "predictions" / "IMG_1.png", np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match=r"IMG_1.png: \(5, 5\) pixels"):
        figures.figure_predictions(split, run, ["IMG_1"])


def test_a_point_that_is_not_counted_is_no_predicted_head(tmp_path):
    run, split = write_run(tmp_path), DrawnSplit()
    split.predict_into(run)
    sample, _, everybody, heads = figures.painted(split, run, "IMG_1")
    assert heads == len(sample.points) == 6
    table = pd.read_csv(run / "predictions" / "IMG_1.csv")
    table.loc[2, "counted"] = 0
    table.to_csv(run / "predictions" / "IMG_1.csv", index=False)
    _, _, counted, heads = figures.painted(split, run, "IMG_1")
    assert heads == 5 and (counted != everybody).any()
    titles = [axis.get_title() for axis in figures.figure_predictions(split, run, ["IMG_1"]).axes]
    assert titles == ["IMG_1", "truth: 6 people", "predicted: 5 people"]
    table.drop(columns="counted").to_csv(run / "predictions" / "IMG_1.csv", index=False)
    with pytest.raises(ValueError, match="IMG_1.csv: no column 'counted'.*xmask evaluate"):
        figures.painted(split, run, "IMG_1")


def test_a_missing_or_foreign_history_says_what_to_do(tmp_path):
    path = write_run(tmp_path) / "history.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="history.csv: columns constraint, .*point_mask.*Train"):
        figures.learning_curves(tables.load_runs(tmp_path), "sha")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="history.csv: missing"):
        figures.learning_curves(tables.load_runs(tmp_path), "sha")
    with pytest.raises(ValueError, match="no XMask run of qnrf"):
        figures.learning_curves(tables.load_runs(tmp_path), "qnrf")


def test_smoothing_never_crosses_a_phase():
    history = pd.DataFrame({"phase": [1] * 200 + [2] * 200, "loss": [5.0] * 200 + [1.0] * 200})
    smooth = figures._smooth(history, "loss")
    assert (smooth[:200] == 5).all() and (smooth[200:] == 1).all()


def test_one_history_is_drawn_alone_and_shows_itself(study):
    history = pd.read_csv(study / "runs" / "sha-5-s1" / "history.csv")
    assert figures.plot_history(history)._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["20_tables", "21_figures", "22_ablations"])
def test_the_notebooks_run_on_run_folders(study, tmp_path, monkeypatch, name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 15
    steps = []
    fake = SimpleNamespace(check_parameters=lambda inputs: steps.append("checked"),
                           enter_root=lambda: steps.append("root"),
                           test_images_of=lambda run, data: DrawnSplit())
    monkeypatch.setitem(sys.modules, "xmask.study.steps", fake)
    monkeypatch.setattr(xmask.study, "steps", fake, raising=False)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names = {"In": []}
    exec(code[0].source, names)
    assert {"profile", "results", "runs", "data", "sam"} <= set(names)  # what a study gives
    names |= {"results": str(study.parent)}
    names |= {"figures": str(tmp_path / "figures")} if name == "21_figures" else {}
    monkeypatch.setattr(tables, "write_tables",
                        lambda folder, out, only: write_tables(folder, tmp_path / "tables", only))
    for cell in code[1:]:
        exec(cell.source, names)
    assert steps == ["checked", "root"]
    assert len(shown) == {"20_tables": 5, "21_figures": 7, "22_ablations": 0}[name]


write_tables = tables.write_tables


def test_notebooks_are_json_with_stable_cells():
    for path in NOTEBOOKS.glob("2*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert [cell["id"] for cell in cells] == [f"{path.name[:2]}-{i:02d}"
                                                  for i in range(len(cells))]


# How colours look without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1),
# on linear RGB
WITHOUT_CONES = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
              [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
             [0.004733, 0.691367, 0.303900]],
}


def closest(colours, matrix):
    """The smallest difference (CIE76) between two of the colours (N, 3), 0..255, as seen."""
    shown = np.asarray(colours, np.float64) / 255
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(matrix).T).clip(0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return apart[~np.eye(len(apart), dtype=bool)].min()


@pytest.mark.parametrize("missing", WITHOUT_CONES)
def test_instance_colours_differ_for_colour_blind_eyes(missing):
    assert closest(INSTANCES, WITHOUT_CONES[missing]) > 12  # 2 is just noticeable


def test_red_and_green_of_one_lightness_would_not_pass():
    assert closest([[214, 39, 40], [44, 160, 44]], WITHOUT_CONES["green"]) < 12
