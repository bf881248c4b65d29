"""Statements about the exclusion circles and their incidence list."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from xmask.nnec import circles, exclusion_radii, incidence, lowest_wins, row_spans

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def crowds(draw, most=25, shape=None):
    """(points, shape): continuous places, pixel centres with duplicates, some off the border."""
    height, width = shape or draw(SHAPES)
    seed, count = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, most))
    rng = np.random.default_rng(seed)
    points = rng.uniform([-1, -1], [width, height], (count, 2)).astype(np.float32)
    return (points.round() if draw(st.booleans()) else points), (height, width)


@settings(max_examples=150, deadline=None)
@given(crowds())
def test_radii_are_nearest_neighbour_distances_clipped(crowd):
    points, shape = crowd
    radii = exclusion_radii(points, shape)
    assert radii.shape == (len(points),)
    np.testing.assert_allclose(radii, reference.radii(points, shape), rtol=1e-12)


def test_a_lone_head_gets_a_share_of_the_shorter_side():
    assert exclusion_radii([[20.0, 10.0]], (60, 80)) == pytest.approx([30.0])
    assert exclusion_radii([[20.0, 10.0]], (60, 80), lone=0.25) == pytest.approx([15.0])


def test_coincident_heads_get_the_smallest_radius():
    points = np.array([[9.0, 9.0], [9.0, 9.0], [30.0, 9.0]])
    assert exclusion_radii(points, (80, 80)) == pytest.approx([3.0, 3.0, 21.0])


@settings(max_examples=200, deadline=None)
@given(crowds(), st.floats(0.1, 3))
def test_incidences_equal_brute_force_sorted_by_head_then_pixel(crowd, scale):
    points, shape = crowd
    radii = exclusion_radii(points, shape) * scale
    head, pixel = incidence(points, radii, shape)
    inside = reference.circles(points, radii, shape).reshape(len(points), shape[0] * shape[1])
    expected_head, expected_pixel = np.nonzero(inside)
    assert head.dtype == pixel.dtype == np.int64
    np.testing.assert_array_equal(head, expected_head)
    np.testing.assert_array_equal(pixel, expected_pixel)


def test_pixels_exactly_on_the_circle_are_inside():
    head, pixel = incidence([[10.0, 10.0]], [5.0], (21, 21))
    for dx, dy in ((3, 4), (-4, 3), (0, 5), (-5, 0)):
        assert (10 + dy) * 21 + 10 + dx in pixel
    assert (10 + 4) * 21 + 14 not in pixel


@pytest.mark.parametrize("place", [(0, 0), (-0.5, 19.4), (29.49, -0.49), (30.2, 20.3), (-100, 5)])
def test_heads_on_or_beyond_the_border_are_cut_there(place):
    shape = (20, 30)
    points = np.array([place, (15.0, 10.0)])
    radii = exclusion_radii(points, shape)
    head, pixel = incidence(points, radii, shape)
    expected = np.nonzero(reference.circles(points, radii, shape).reshape(2, -1))
    np.testing.assert_array_equal(np.stack([head, pixel]), np.stack(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 150))
def test_no_pixel_is_covered_by_more_than_five_circles(seed, count):
    shape = (48, 64)
    points = np.random.default_rng(seed).uniform([0, 0], [63, 47], (count, 2))
    radii = exclusion_radii(points, shape, min_radius=0.0)
    _, pixel = incidence(points, radii, shape)
    assert np.bincount(pixel).max(initial=0) <= 5


def test_six_circles_meet_only_on_exact_ties():
    # Six heads of a regular hexagon: each is one side from its neighbours and from the centre.
    # The circles are opened by a hair, for a regular hexagon has no exact coordinates.
    angle = np.arange(6) * np.pi / 3
    points = 20 + 8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    radii = exclusion_radii(points, (41, 41))
    _, pixel = incidence(points, radii + 1e-9, (41, 41))
    assert np.bincount(pixel).max() == 6


@settings(max_examples=100, deadline=None)
@given(crowds())
def test_no_circle_holds_the_centre_of_another_head(crowd):
    points, shape = crowd
    radii = exclusion_radii(points, shape, min_radius=0.0)
    apart = np.linalg.norm(points[:, None].astype(float) - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (apart >= radii[:, None] * (1 - 1e-12)).all()


@settings(max_examples=100, deadline=None)
@given(crowds(), st.booleans(), st.integers(0, 1000))
def test_lowest_energy_wins_and_ties_go_to_the_lowest_head(crowd, ties, seed):
    points, shape = crowd
    head, pixel = incidence(points, exclusion_radii(points, shape), shape)
    rng = np.random.default_rng(seed)
    energy = rng.integers(0, 3, len(head)) / 2.0 if ties else rng.random(len(head))
    dense = np.full((len(points) + 1, shape[0] * shape[1]), np.inf)
    dense[head, pixel] = energy
    dense[:-1][dense[:-1] >= 0.8] = np.inf
    expected = np.where(np.isfinite(dense).any(0), dense.argmin(0) + 1, 0).reshape(shape)
    shuffled = rng.permutation(len(head))
    for order in (slice(None), shuffled):
        labels = lowest_wins(energy[order], head[order], pixel[order], shape, 0.8)
        assert labels.dtype == np.int32 and labels.shape == shape
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("place", [(15.0, 15.0), (12.3, 7.8), (0.0, 0.0), (29.0, 14.0)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_coincident_heads_share_their_circle_without_rest_or_overlap(place, count):
    shape = (30, 30)
    points = np.array([(5.0, 25.0)] + [place] * count + [(25.0, 26.0)], dtype=np.float32)
    radii = exclusion_radii(points, shape)
    head, pixel = incidence(points, radii, shape)
    kept = circles(points, radii, shape)
    circle = set(pixel[head == 1])
    parts = [kept.pixel[kept.head == 1 + k] for k in range(count)]
    assert set(np.concatenate(parts)) == circle
    assert sum(map(len, parts)) == len(circle)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for k in (0, count + 1):  # with a place of their own
        np.testing.assert_array_equal(kept.pixel[kept.head == k], pixel[head == k])
    if place == (15.0, 15.0):
        assert 15 * 30 + 15 in parts[0]


def test_shares_of_coincident_heads_are_angular_sectors_in_index_order():
    points = np.array([(15.0, 15.0)] * 2)
    kept = circles(points, [8.0, 8.0], (31, 31))
    # Angles count from +x towards +y, which is downwards: the first head gets the lower half.
    rows = [kept.pixel[kept.head == k] // 31 for k in (0, 1)]
    assert (rows[0] > 15).mean() > 0.9
    assert not (rows[1] > 15).any()


@pytest.mark.parametrize("doubled", [0, 4])
def test_spans_of_rows_hold_the_pixels_of_the_list_and_coincident_heads_share_them(doubled):
    rng = np.random.default_rng(doubled)
    points, shape = torch.from_numpy(rng.uniform(-2, 42, (20, 2))), (30, 41)
    points[10:10 + doubled] = points[2:2 + doubled]
    radii = exclusion_radii(points, shape)
    kept, whole = circles(points, radii, shape), circles(points, radii, shape, split=False)
    spans = row_spans(points, radii, shape)
    assert (spans.first <= spans.last).all() and (spans.head.diff() >= 0).all()
    got = [(k, row * shape[1] + column) for k, row, first, last in zip(*map(torch.Tensor.tolist,
           spans)) for column in range(first, last + 1)]
    assert got == list(zip(kept.head.tolist(), kept.pixel.tolist()))
    assert set(got) <= set(zip(whole.head.tolist(), whole.pixel.tolist()))
    assert (doubled > 0) == (len(got) < len(whole))
    assert len(np.unique(whole.pixel)) == len(np.unique(kept.pixel))  # no pixel is lost


def test_coincident_heads_of_two_images_of_a_batch_share_nothing():
    points, shape = torch.tensor([[9.0, 9.0], [30.0, 9.0], [9.0, 9.0]]).double(), (20, 40)
    radii = torch.tensor([6.0, 6.0, 6.0])
    apart = row_spans(points, radii, shape, image=torch.tensor([0, 0, 1]))
    for found, expected in zip(apart, row_spans(points, radii, shape, split=False)):
        assert torch.equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(crowds())
def test_circles_are_the_incidence_list_with_squared_distances(crowd):
    points, shape = crowd
    radii = exclusion_radii(points, shape)
    found = circles(points, radii, shape, split=False)
    head, pixel = incidence(points, radii, shape)
    np.testing.assert_array_equal(found.head, head)
    np.testing.assert_array_equal(found.pixel, pixel)
    row, column = np.divmod(pixel, shape[1])
    squared = ((np.stack([column, row], 1) - points.astype(float)[head]) ** 2).sum(1)
    np.testing.assert_array_equal(found.squared, squared)
    assert found.squared.dtype == np.float64 and found.shape == shape and len(found) == len(head)
    assert (found.squared <= radii[head] ** 2).all()
    for chosen in (found.squared < 4, slice(3, 9), np.arange(len(head))[::2]):
        some = found.select(chosen)
        np.testing.assert_array_equal(some.pixel, pixel[chosen])
        np.testing.assert_array_equal(some.squared, squared[chosen])
    np.testing.assert_array_equal(
        found.lowest_wins(squared, 9.0), lowest_wins(squared, head, pixel, shape, 9.0))
    tensors = row_spans(torch.from_numpy(points), radii, shape, split=False).pixels()
    np.testing.assert_array_equal(np.stack([head, row, column]), np.stack(tensors))


def test_no_heads_give_no_incidences_and_an_empty_map():
    for nothing in (np.zeros((0, 2), np.float32), [], torch.zeros(0, 2)):
        radii = exclusion_radii(nothing, (5, 7))
        found = circles(nothing, radii, (5, 7))
        assert len(radii) == len(found) == len(incidence(nothing, radii, (5, 7))[1]) == 0
        labels = found.lowest_wins(found.squared)
        assert labels.shape == (5, 7) and not labels.any()


def test_tensors_and_arrays_give_the_same_also_with_deterministic_algorithms():
    rng = np.random.default_rng(1)
    points, shape = rng.uniform(0, 60, (40, 2)).astype(np.float32).round(), (60, 60)
    radii = exclusion_radii(points, shape)
    found = circles(points, radii, shape)
    energy = rng.random(len(found))
    labels = found.lowest_wins(energy)
    torch.use_deterministic_algorithms(True)
    try:
        tensor = torch.from_numpy(points)
        radii_t = exclusion_radii(tensor, shape)
        found_t = circles(tensor, radii_t, shape)
        labels_t = found_t.lowest_wins(torch.from_numpy(energy))
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = ((radii, radii_t), (found.head, found_t.head), (found.pixel, found_t.pixel),
             (found.squared, found_t.squared), (labels, labels_t))
    for array, tensor in pairs:
        assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(array, tensor.numpy())


def test_read_only_points_are_accepted():
    points = np.array([[3.0, 4.0], [9.0, 4.0]], dtype=np.float32)
    points.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # but what other tests have left open may be found here
        exclusion_radii(points, (20, 20))


def test_bad_points_are_refused_with_a_reason():
    for shape in ((4, 3), (2, 5), (1, 2, 2), (4,)):
        with pytest.raises(ValueError, match=r"\(N, 2\)"):
            exclusion_radii(np.zeros(shape), (9, 9))
    with pytest.raises(ValueError, match="NaN"):
        exclusion_radii(np.array([[1.0, np.nan]]), (9, 9))
    with pytest.raises(ValueError, match="radii"):
        incidence(np.zeros((2, 2)), np.ones(3), (9, 9))


def test_brute_force_distances_of_an_accelerator_agree_with_the_tree(monkeypatch):
    from xmask import nnec

    points = torch.rand(101, 2, dtype=torch.float64) * 200
    points[7] = points[55]
    tree = nnec._nearest_distance(points)
    monkeypatch.setattr(nnec, "_DISTANCES_AT_ONCE", 1000)
    brute = nnec._nearest_by_slabs(points)
    torch.testing.assert_close(brute, tree, rtol=1e-12, atol=1e-12)
