"""Helpers of the walkthroughs: small, and as exact as what they explain."""

import nbformat
import numpy as np
import pytest

from xmask.study import illustrations, sweeps, walkthroughs


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
