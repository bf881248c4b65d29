"""Helpers of the walkthroughs: small, and as exact as what they explain."""

import nbformat
import numpy as np
import pytest
from PIL import Image

from xmask.study import illustrations, sweeps, walkthroughs
from xmask.synthetic import draw_scene
from xmask.tools import learn


def test_coverage_counts_circles():
    points = np.array([[10.0, 10.0], [14.0, 10.0], [40.0, 30.0]])
    covered = illustrations.coverage(points, (48, 64))
    y, x = np.mgrid[:48, :64]
    reach = (4, 4, 24)  # the third one is clipped to half the shorter side
    wanted = sum((np.hypot(x - px, y - py) <= r).astype(int) for (px, py), r in zip(points, reach))
    assert (covered == wanted).all()


def test_only_heads_closer_than_3_px_break_the_bound():
    crowd = np.stack(np.meshgrid(np.arange(10, 22, 1.5), np.arange(10, 22, 1.5)), -1).reshape(-1, 2)
    table = illustrations.coverage_table([(crowd, (32, 32))])
    over = table[table["circles"] > 6]
    assert over["pixels"].sum() > 0 and over["pixels_unclipped"].sum() == 0
    assert (table[["pixels", "pixels_unclipped"]].sum() == 32 * 32).all()


def test_equal_vectors_have_equal_colours():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(16, 6, 8))
    first, second = illustrations.embedding_colours([one, one[:, ::-1]])
    assert first.shape == (6, 8, 3) and np.allclose(first, second[::-1])
    assert 0 <= first.min() and first.max() <= 1


def test_a_grid_has_every_combination():
    found = list(sweeps.grid(loss__tau=[0.4, 0.6], seed=[1, 2]))
    assert found == [{"loss.tau": 0.4, "seed": 1}, {"loss.tau": 0.4, "seed": 2},
                     {"loss.tau": 0.6, "seed": 1}, {"loss.tau": 0.6, "seed": 2}]


def test_a_sweep_is_one_table_of_fields_and_measures():
    table = sweeps.table("results/demo", ["percent", "loss.tau"])
    assert list(table.columns) == ["run", "percent", "loss.tau", "mae", "rmse", "mean_iou",
                                   "synthetic"]
    assert table["percent"].is_monotonic_increasing and (table["loss.tau"] == 0.6).all()
    with pytest.raises(ValueError, match="loss.tua: the configuration of .* has no such field"):
        sweeps.table("results/demo", ["loss.tua"])


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        scene = draw_scene(number, shape=(96, 128), people=6)
        Image.fromarray(scene.image).save(tmp_path / f"p{number}.png")
    np.savetxt(tmp_path / "p1.csv", scene.points, delimiter=",", header="x,y", comments="")
    return tmp_path, scene


def test_a_folder_of_photos_and_dots(photos):
    folder, scene = photos
    dotted, bare = learn.read_folder(folder)
    assert [one.name for one in dotted] == ["p1"] and [one.name for one in bare] == ["p0", "p2"]
    assert np.allclose(dotted[0].points, scene.points, atol=1e-4)


@pytest.mark.parametrize("text, message", [
    ("a,b\n1,2\n", "p1.csv: .*line 'x,y' first"),
    ("x,y\n1,two\n", "p1.csv"),
    ("x,y\n1,2\n3,\n", "p1.csv: line 3 lacks x or y"),
    ("", "p1.csv"),
])
def test_bad_dots_are_named(photos, text, message):
    folder, _ = photos
    (folder / "p1.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        learn.read_folder(folder)


def test_dots_without_a_photo_and_folders_without_photos_are_errors(photos, tmp_path):
    folder, _ = photos
    (folder / "other.csv").write_text("x,y\n")
    with pytest.raises(ValueError, match="other.csv: no image of this name"):
        learn.read_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no image"):
        learn.read_folder(tmp_path / "empty")


def test_learning_from_own_photos_makes_a_model_that_loads(photos, tmp_path):
    import xmask

    folder, _ = photos
    dotted, bare = learn.read_folder(folder)
    tiny = learn.configure({
        "optimisation.crop": 64, "optimisation.batch": 1, "schedule.phase1": 1,
        "schedule.phase2": 2, "schedule.phase3": 3, "schedule.warmup": 0,
        "schedule.mask_warmup": 0, "schedule.steps_per_epoch": 1})
    run = learn.learn(dotted, bare, tmp_path / "run", tiny, progress=False)
    model = xmask.load(run, device="cpu")
    assert model.record["trained_on"]["labelled"] == 1
    assert model.record["trained_on"]["unlabelled"] == 2
    assert not model.record["trained_on"]["synthetic"]
    assert "weights of the package" in model.record["initialisation"]
    assert model.predict(folder / "p0.png").instances.shape == (96, 128)
    with pytest.raises(ValueError, match="no dots"):
        learn.learn([], bare, tmp_path / "none", tiny)


def test_running_a_walkthrough_stores_outputs_and_nothing_of_the_run(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# A page", id="09-00"),
             nbformat.v4.new_code_cell("import sys\nprint('out')\nprint('bar', file=sys.stderr)")]
    path = tmp_path / "09_page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    first = walkthroughs.execute(path).read_bytes()
    notebook = nbformat.read(path, 4)
    assert [cell.id for cell in notebook.cells] == ["09-00", "09-01"]
    assert [one.name for one in notebook.cells[1].outputs] == ["stdout"]
    assert notebook.metadata == walkthroughs.METADATA and not notebook.cells[1].metadata
    assert walkthroughs.execute(path).read_bytes() == first
    with pytest.raises(ValueError, match="no walkthrough begins with 99"):
        walkthroughs.walkthroughs(tmp_path, only=["99"])
