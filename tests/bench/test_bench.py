"""The benchmark measures what it says: equal results, honest targets. No test looks at a clock."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.warm import FORKS, Program
from xmask import bench, decode, features, losses, model
from xmask.bench import comparisons, dense, measure, report
from xmask.config import Loss
from xmask.files import read_json

SMALL = (64, 96)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_dense_sides_are_the_slow_references(seed, heads):
    rng = np.random.default_rng(seed)
    shape = (20, 24)
    points = rng.uniform(0, [23, 19], (heads, 2)).astype(np.float32)
    tensor = torch.from_numpy(points)
    np.testing.assert_allclose(dense.radii(tensor, shape), reference.radii(points, shape))
    embedding = comparisons.unit_embedding(4, *shape)
    energy = reference.energies(embedding, points, 0.8, 3.0, shape)
    wanted = np.where(energy.min(0) < 1.1, energy.argmin(0) + 1, 0)
    differ = dense.instance_map(embedding, tensor).numpy() != wanted
    first, second = np.nan_to_num(np.sort(energy, 0)[:2], posinf=1e9)
    assert not (differ & (second - first > 1e-5) & (np.abs(first - 1.1) > 1e-5)).any()
    labels = comparisons.discs(tensor, shape)
    torch.testing.assert_close(
        dense.exclusivity_loss(embedding.double(), tensor, labels),
        reference.exclusivity(embedding.double(), points, labels.numpy()))
    pred, true = comparisons.two_maps(heads, shape)
    if pred.max() and true.max():
        wanted = reference.segmentation(pred, true)
        assert dense.segmentation(pred, true) == pytest.approx(wanted)


@pytest.mark.parametrize("make", [
    comparisons.circles, comparisons.decoding, comparisons.segmentation,
])
def test_both_sides_of_a_row_give_the_same(make):
    ours, other = make(30, SMALL)
    assert comparisons.same(ours(), other()) == "identical"


def test_both_losses_have_the_same_value_and_gradient():
    (value, gradient), (other, wanted) = (side() for side in comparisons.exclusivity(20, SMALL))
    assert value == pytest.approx(other, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def test_disagreement_is_said():
    assert comparisons.same(np.zeros((2, 2)), np.eye(2)) == "2 of 4 numbers differ"
    assert comparisons.same([1.0, 2.0], [1.0, 2.1]) == "1 of 2 numbers differ"
    assert comparisons.same(1, 2) == "1 of 1 numbers differ"


def test_sam_rows_agree():
    ours, stock = (side() for side in comparisons.sam_prompts(3, SMALL, batch=2))
    assert (ours != stock).mean() < 1e-3  # where a logit is nearly 0
    assert ours.max() > 0


def test_an_image_with_sam_is_encoded_anew_in_every_call(monkeypatch):
    import segment_anything

    from tests.test_segmenters import tiny_sam
    from xmask.segmenting import sam_segmenter

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", tiny_sam)
    seen = []
    for where, name in ((sam_segmenter, "encode"),
                        (segment_anything.modeling.ImageEncoderViT, "forward")):
        monkeypatch.setattr(where, name, lambda *given, made=getattr(where, name): (
            seen.append(1) or made(*given)))
    ours, encoder = comparisons.sam_image(12, SMALL)
    for _ in range(2):
        before = len(seen)
        assert ours() == 12 and len(seen) > before
    before = len(seen)
    encoder()
    assert len(seen) == before + 1


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_terms_of_a_step_are_finite_and_the_network_learns(phase):
    terms, network = comparisons.training(5, (64, 64), 1, phase=phase, batch=2)
    assert np.isfinite(terms())
    network()


def _side(value, bytes_=0):
    block = np.ones(bytes_, np.uint8)
    return value + int(block[:0].sum())


def _sleepy(value, bytes_=0):
    return partial(_side, value, bytes_)


def _broken():
    raise ValueError("no such thing")


def test_a_side_is_measured_in_its_own_process():
    small, large = measure.alternate(
        [partial(_sleepy, 1), partial(_sleepy, 2, 1 << 27)], threads=1, runs=3)
    assert (small.result, large.result) == (1, 2)
    assert 1 <= len(small.seconds) <= 3 and min(small.seconds) >= 0
    # a page or two of it may have been there before
    assert large.peak > 0.95 * (1 << 27) > small.peak


@pytest.fixture
def forked(monkeypatch):
    """Sides are forked from a process that has imported xmask: how they start is not the point."""
    monkeypatch.setattr(measure, "get_context", lambda how: FORKS)


def test_a_failing_side_says_why(forked):
    with pytest.raises(ValueError, match="no such thing"):
        measure.alternate([_broken], threads=1)


def _says_who_it_is(path):
    path.write_text(str(os.getpid()))
    return partial(time.sleep, 600)


def test_a_side_ends_with_who_measures_it(tmp_path):
    code = ("from functools import partial; from pathlib import Path; "
            "from xmask.bench import measure; from tests.bench.test_bench import _says_who_it_is; "
            f"measure.alternate([partial(_says_who_it_is, Path({str(tmp_path / 'pid')!r}))], threads=1)")
    parent = Program("-c", code, log=tmp_path / "log")
    wait_for((tmp_path / "pid").is_file)
    side = int((tmp_path / "pid").read_text())
    parent.kill()
    wait_for(lambda: not Path(f"/proc/{side}").exists())


def wait_for(what):
    for _ in range(1200):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("in vain")


def _tiny_rows():
    yield comparisons.Comparison("decode", "decoding, every head", "dense, every head",
                                 comparisons.decoding, 40, SMALL, fewer=(2, 4), faster=1e9,
                                 leaner=1e-9)
    yield comparisons.Comparison("network", "after", "itself", comparisons.decoding, 40, SMALL,
                                 fewer=(10,), of=30, share=1e9)


def test_a_run_writes_table_numbers_and_figure(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(comparisons, "comparisons", _tiny_rows)
    bench.run(tmp_path, tmp_path, only=("decode", "network"), threads=1, progress=False)
    found = read_json(tmp_path / "bench.json")
    first, second = found["rows"]
    faster, leaner = first["targets"].values()
    assert faster < 1 <= leaner
    assert first["other"]["extrapolated_from"] == [2, 4]
    assert next(iter(second["targets"].values())) >= 1
    assert second["other"]["extrapolated_from"] == [10]
    text = (tmp_path / "bench.md").read_text()
    assert "**missed**" in text and "*(2, 4)" in text and "synthetic" in text
    assert (tmp_path / "bench.png").stat().st_size > 1000
    # another run of one group keeps the other's numbers
    bench.run(tmp_path, tmp_path, only=("network",), threads=1, progress=False)
    assert read_json(tmp_path / "bench.json")["rows"][0] == first


def test_an_extrapolation_is_a_straight_line():
    def side(median, peak=None):
        return {"median": median, "low": median, "high": median, "runs": 3, "peak": peak}

    two = bench._extrapolated([side(1.0, 10), side(2.0, 10)], (4, 12), 28)
    assert (two["median"], two["peak"]) == (4.0, 10)
    one = bench._extrapolated([side(3.0)], (2,), 16)  # through nothing
    assert one["median"] == 24.0 and "peak" not in one


SIDE = {"median": 1.0, "low": 1.0, "high": 1.0, "runs": 5, "peak": 100}


def _canned(row, *, threads):
    """What `bench.compare` gives, without measuring."""
    return {"name": row.name, "group": row.group, "operation": row.operation, "heads": row.heads,
            "shape": list(row.shape), "against": row.against, "ours": SIDE, "other": SIDE,
            "times_faster": 1.0, "targets": {"≥ 1× faster": 1.0}, "agreement": ""}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stopped_run_keeps_its_rows_and_says_what_is_missing(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(comparisons, "comparisons", _tiny_rows)

    def second_stops(row, *, threads):
        if row.group == "network":
            raise stop
        return _canned(row, threads=threads)

    monkeypatch.setattr(bench, "compare", second_stops)
    with pytest.raises(stop):
        bench.run(tmp_path, tmp_path, only=("decode", "network"), threads=1, progress=False)
    found = read_json(tmp_path / "bench.json")
    assert [row["group"] for row in found["rows"]] == ["decode"]
    assert found["missing"] == {"after, 96×64, 40 heads, against itself": "not reached"}
    text = (tmp_path / "bench.md").read_text()
    assert "## Not measured" in text and "after, 96×64, 40 heads, against itself" in text
    # the missing group alone, later: the table is whole
    monkeypatch.setattr(bench, "compare", _canned)
    found = bench.run(tmp_path, tmp_path, only=("network",), threads=1, progress=False)
    assert len(found["rows"]) == 2 and found["missing"] == {}
    assert "Not measured" not in (tmp_path / "bench.md").read_text()


def test_a_stopped_rerun_loses_no_earlier_number_and_no_file_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "comparisons", _tiny_rows)
    monkeypatch.setattr(bench, "compare", _canned)
    for name in ("bench.md", "bench.png"):
        (tmp_path / name).write_text("mine")
    first = bench.run(tmp_path, tmp_path, threads=1, progress=False)
    for name in ("bench.md", "bench.png"):
        assert (tmp_path / f"{name}.set-aside-1").read_text() == "mine"
    measured = []

    def second_stops(row, *, threads):
        if measured:
            raise KeyboardInterrupt
        measured.append(row.name)
        return _canned(row, threads=threads) | {"times_faster": 2.0}

    monkeypatch.setattr(bench, "compare", second_stops)
    with pytest.raises(KeyboardInterrupt):
        bench.run(tmp_path, tmp_path, threads=1, progress=False)
    found = read_json(tmp_path / "bench.json")
    assert found["missing"] == {} and found["rows"][1] == first["rows"][1]
    assert [row["times_faster"] for row in found["rows"]] == [2.0, 1.0]
    monkeypatch.setattr(bench, "compare", _canned)
    bench.run(tmp_path, tmp_path, only=("decode",), threads=2, progress=False)
    assert read_json(tmp_path / "bench.json.set-aside-1") == found


def test_a_row_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    def first_fails(row, *, threads):
        if row.group == "decode":
            raise ValueError("no such thing")
        return _canned(row, threads=threads)

    monkeypatch.setattr(comparisons, "comparisons", _tiny_rows)
    monkeypatch.setattr(bench, "compare", first_fails)
    with pytest.raises(RuntimeError, match="1 rows could not be.*\n.*decoding.*no such thing"):
        bench.run(tmp_path, tmp_path, only=("decode", "network"), threads=1, progress=False)
    found = read_json(tmp_path / "bench.json")
    assert [row["group"] for row in found["rows"]] == ["network"]
    assert list(found["missing"].values()) == ["ValueError: no such thing"]


def test_an_unknown_group_is_named(tmp_path):
    with pytest.raises(ValueError, match="speed unknown; known: nnec"):
        bench.run(tmp_path, tmp_path, only=("speed",))


def test_every_row_has_a_group_and_a_name_of_its_own():
    every = list(comparisons.comparisons())
    assert len({row.name for row in every}) == len(every)
    assert {row.group for row in every} == set(bench.GROUPS)
    assert [row.heads for row in every if row.operation == "decoding, every head"] == [
        50, 541, 3000, 10000]


def test_the_committed_page_and_figure_are_of_the_committed_numbers(tmp_path):
    found = read_json("results/bench/bench.json")
    assert report.table(found) == Path("results/bench/bench.md").read_text(encoding="utf-8")
    assert "| 10.8× slower |" in report.table(found) and "| 0.0" not in report.table(found)
    names = [row.name for row in comparisons.comparisons()]
    assert [row["name"] for row in found["rows"]] == [
        name for name in names if name not in found["missing"]]
    assert found["missing"].keys() < set(names)


# -- the batched functions that the rows stand on -----------------------------------------------


def _batch(seed, shape=(32, 48), sizes=(7, 0, 1, 12)):
    rng = np.random.default_rng(seed)
    points = [torch.from_numpy(rng.uniform(0, [shape[1] - 1, shape[0] - 1], (n, 2))).float()
              for n in sizes]
    points[3][5] = points[3][2]  # two heads at one place
    labels = torch.stack([comparisons.discs(p, shape) for p in points])
    cells = tuple(side // model.STRIDE for side in shape)
    logits = torch.from_numpy(rng.normal(size=(len(sizes), *cells)))
    embedding = torch.from_numpy(rng.normal(size=(len(sizes), 5, *cells)))
    ignore = torch.from_numpy(rng.random((len(sizes), *shape)) < 0.2)
    return points, labels, logits, torch.nn.functional.normalize(embedding, dim=1), ignore


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_gives_what_its_images_give(seed):
    points, labels, logits, embedding, ignore = _batch(seed)
    each = range(len(points))
    weights = {"background": 0.3, "foreground": 0.2, "one_point": 0.1}
    logits.requires_grad_()
    embedding.requires_grad_()
    pairs = [
        (losses.p2r_losses(logits, points, 4),
         [losses.p2r_loss(logits[i], points[i], 4) for i in each]),
        (losses.exclusivity_losses(embedding, points, labels, ignore=ignore),
         [losses.exclusivity_loss(embedding[i], points[i], labels[i], ignore=ignore[i])
          for i in each]),
        (losses.mask_constraints(logits, labels, points[::-1], Loss(**weights)),
         [losses.mask_constraint(logits[i], labels[i], points[::-1][i], **weights) for i in each]),
        (losses.point_mask_consistencies(logits, labels, ignore=ignore),
         [losses.point_mask_consistency(logits[i], labels[i], ignore=ignore[i]) for i in each]),
    ]
    for batch, single in pairs:
        single = torch.stack(single)
        torch.testing.assert_close(batch, single)
        for leaf in (logits, embedding):
            gradients = [
                torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)[0]
                for value in (batch, single)]
            if gradients[1] is not None:
                torch.testing.assert_close(*gradients)
                assert gradients[0].any()
            else:
                assert gradients[0] is None
    shape = tuple(labels.shape[1:])
    maps = decode.instance_maps(embedding, points, stride=4, shape=shape)
    for i in each:
        whole = features.upsample(embedding[i], 4)
        assert torch.equal(maps[i], decode.instance_map(whole, points[i]))


def test_the_batched_exclusivity_list_of_an_accelerator_gives_the_same(monkeypatch):
    points, labels, _, embedding, ignore = _batch(4)
    wanted = losses.exclusivity_losses(embedding, points, labels, ignore=ignore)
    monkeypatch.setattr(losses, "_one_at_a_time", lambda device: False)
    got = losses.exclusivity_losses(embedding, points, labels, ignore=ignore)
    torch.testing.assert_close(got, wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40),
       st.sampled_from([3.0, 17.0, 96.0]), st.booleans())
def test_nearest_heads_equal_all_distances_ties_included(seed, heads, rows_, columns, far, grid):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-5, [4 * columns + 5, 4 * rows_ + 5], (heads, 2))
    points = torch.from_numpy(np.rint(points) + 0.5 if grid else points)
    owner, distance = losses.p2r_assign(points, (rows_, columns), 4, far)
    if heads == 0:
        assert (owner == -1).all() and torch.isinf(distance).all()
        return
    y, x = torch.meshgrid(torch.arange(rows_) * 4 + 1.5, torch.arange(columns) * 4 + 1.5,
                          indexing="ij")
    delta = torch.stack([x.reshape(-1), y.reshape(-1)], 1).double()[:, None] - points[None]
    squared = delta.square().sum(2)
    best = squared.min(1).values
    wanted = (squared == best[:, None]).int().argmax(1)  # the lowest index among equals
    wanted[best.sqrt() >= far] = -1
    assert torch.equal(owner, wanted)
    reached = owner >= 0
    torch.testing.assert_close(distance[reached], best.sqrt()[reached])


@pytest.mark.parametrize("stride, shape", [(1, (40, 70)), (4, (40, 70)), (4, (133, 20)),
                                           (2, (9, 3))])
@pytest.mark.parametrize("sigma", [None, 1.5, 3.0])
def test_bands_and_centres_are_upsampling_then_smoothing(stride, shape, sigma):
    cells = [-(-side // stride) for side in shape]
    embedding = torch.randn(2, 3, *cells, generator=torch.Generator().manual_seed(0)).double()
    whole = features.smooth(features.upsample(embedding, stride)[:, :, :shape[0], :shape[1]], sigma)
    bands = torch.cat([
        band for *_, band in features.feature_bands(embedding, stride, shape, sigma)])
    torch.testing.assert_close(bands, features.flat_features(whole))
    points = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([shape[1], shape[0]])
    image = torch.arange(20) % 2
    torch.testing.assert_close(
        features.smooth_at(embedding, points, image, stride, shape, sigma),
        features.sample_at(whole, points, image))


def test_lowest_energy_wins_for_any_float():
    from xmask.nnec import lowest_wins

    nan, inf = float("nan"), float("inf")
    energy = torch.tensor([0.0, -0.0, -2.0, -1.0, nan, 3.0, inf, nan, 1.1])
    head = torch.tensor([1, 0, 0, 1, 0, 1, 0, 1, 0])
    pixel = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    for kind in (energy, energy.double()):
        assert lowest_wins(kind, head, pixel, (1, 5)).tolist() == [[1, 1, 2, 0, 1]]
        assert lowest_wins(kind, head, pixel, (1, 5), -1.5).tolist() == [[0, 1, 0, 0, 0]]
    # 1.1 in float32 is above 1.1: not below the threshold
    assert lowest_wins(energy, head, pixel, (1, 5), 1.1).tolist() == [[1, 1, 0, 0, 0]]


def test_the_picture_shows_every_target():
    row = {"operation": "after", "shape": [4, 4], "heads": 5, "targets": {"≤ 5% of the time": 0.1}}
    found = {"rows": [row], "machine": {"processor": "a", "threads": 1}}
    _, right = report.figure(found).axes
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.1])
    assert right.get_yticklabels()[0].get_text() == "after, 5 heads"
