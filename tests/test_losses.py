"""Statements about the losses: values and gradients against dense versions, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from xmask import losses
from xmask.losses import (
    exclusivity_loss,
    mask_constraint,
    p2r_assign,
    p2r_loss,
    p2r_target,
    point_mask_consistency,
)
from xmask.nnec import exclusion_radii, incidence, lowest_wins

SEEDS = st.integers(0, 10**6)


def scene(seed, count, shape, depth=5):
    """(embedding float64, points, label map of discs a bit smaller than the circles)."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([-0.5, -0.5], [shape[1] - 0.5, shape[0] - 0.5], (count, 2))
    points = points.astype(np.float32)
    head, pixel = incidence(points, 0.7 * exclusion_radii(points, shape), shape)
    labels = lowest_wins(rng.random(len(head)), head, pixel, shape)
    labels[labels == 1] = 0  # the first head has no mask
    predicted = points + rng.normal(0, 1, points.shape).astype(np.float32)
    embedding = torch.from_numpy(rng.normal(size=(depth, *shape)))
    return F.normalize(embedding, dim=0), predicted, labels


def same_value_and_gradient(function, expected, x):
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, wanted = function(a), expected(b)
    torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-10)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-10)


# --- exclusivity -------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 15), st.integers(5, 24), st.integers(5, 24),
       st.sampled_from([None, 1.5]), st.booleans(), st.booleans())
def test_exclusivity_equals_the_dense_loss(seed, count, height, width, sigma, centres, ignoring):
    embedding, points, labels = scene(seed, count, (height, width))
    ignore = np.random.default_rng(seed).random((height, width)) < 0.3 if ignoring else None
    same_value_and_gradient(
        lambda e: exclusivity_loss(e, points, labels, sigma=sigma, ignore=ignore,
                                   differentiable_centers=centres),
        lambda e: reference.exclusivity(e, points, labels, sigma=sigma, ignore=ignore,
                                        differentiable_centers=centres),
        embedding)


def test_exclusivity_in_single_precision_is_good_to_five_digits():
    embedding, points, labels = scene(0, 30, (48, 48), depth=16)
    single = embedding.float().requires_grad_()
    double = embedding.clone().requires_grad_()
    loss, wanted = exclusivity_loss(single, points, labels), (
        reference.exclusivity(double, points, labels))
    loss.backward()
    wanted.backward()
    assert abs(loss.item() - wanted.item()) < 1e-5
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=0, atol=1e-5)


def test_exclusivity_gradient_passes_a_numerical_check():
    embedding, points, labels = scene(4, 4, (7, 8), depth=2)
    x = (2 * embedding).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: exclusivity_loss(e, points, labels), x)


def test_exclusivity_upsamples_a_coarse_embedding():
    embedding, points, labels = scene(5, 8, (24, 20))
    coarse = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 6, 5)))
    same_value_and_gradient(
        lambda e: exclusivity_loss(e, points, labels),
        lambda e: reference.exclusivity(reference.upsample(e, 4), points, labels),
        coarse)


def test_exclusivity_of_perfect_and_of_collapsed_embeddings():
    labels = np.zeros((32, 32), np.int32)
    labels[4:12, 4:12], labels[20:28, 20:28] = 1, 2
    points = np.array([[8.0, 8.0], [24.0, 24.0]])
    perfect = 3 * F.one_hot(torch.from_numpy(labels).long(), 3).permute(2, 0, 1).double()
    assert exclusivity_loss(perfect, points, labels, sigma=None).item() == 0
    # All pixels alike: nothing to pull, everything to push by tau + 4 * margin.
    assert exclusivity_loss(torch.ones(3, 32, 32), points, labels).item() == pytest.approx(1.0)


def test_exclusivity_has_a_finite_gradient_where_pixels_equal_their_centre():
    labels = np.ones((16, 16), np.int32)
    labels[:, 8:] = 0
    x = torch.ones(4, 16, 16, requires_grad=True)
    exclusivity_loss(x, [[4.0, 8.0]], labels).backward()
    assert torch.isfinite(x.grad).all()


def test_points_off_the_instances_or_off_the_map_only_shape_the_circles():
    embedding, points, labels = scene(6, 6, (30, 30))
    outside = np.concatenate([points, [[-40.0, 3.0], [90.0, 90.0]]]).astype(np.float32)
    assert exclusivity_loss(embedding, outside, labels) == exclusivity_loss(
        embedding, points, labels)
    background = np.argwhere(labels == 0)[0][::-1].astype(np.float32)
    more = np.concatenate([points, [background]])
    torch.testing.assert_close(
        exclusivity_loss(embedding, more, labels), reference.exclusivity(embedding, more, labels))


@pytest.mark.parametrize("points", [np.zeros((0, 2), np.float32), [[3.0, 3.0]]])
def test_exclusivity_with_nothing_to_do_is_a_zero_with_a_graph(points):
    x = torch.randn(4, 8, 8, requires_grad=True)
    loss = exclusivity_loss(x, points, np.zeros((8, 8), np.int32))
    loss.backward()
    assert loss.item() == 0 and loss.ndim == 0 and not x.grad.any()


def test_exclusivity_with_everything_ignored_is_zero():
    embedding, points, labels = scene(7, 5, (20, 20))
    x = embedding.requires_grad_()
    loss = exclusivity_loss(x, points, labels, ignore=np.ones((20, 20), bool))
    loss.backward()
    assert loss.item() == 0


def test_coincident_points_are_two_points():
    embedding, points, labels = scene(8, 6, (30, 30))
    double = np.concatenate([points, points[2:3]])
    torch.testing.assert_close(
        exclusivity_loss(embedding, double, labels),
        reference.exclusivity(embedding, double, labels))


def test_without_nnec_all_circles_are_twice_the_median_radius():
    labels = np.ones((64, 64), np.int32)
    points = np.array([[10.0, 10.0], [14.0, 10.0], [40.0, 40.0]])  # radii 4, 4, 39.9 clipped
    x = torch.ones(2, 64, 64, dtype=torch.float64)
    x[0, 25:, :] = 3.0
    # Circles of 8 px do not reach row 25 from above, nor leave it from below.
    assert exclusivity_loss(x, points, labels, sigma=None, nnec=False).item() == 0
    assert exclusivity_loss(x, points, labels, sigma=None).item() > 0


# --- point to region ---------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 6), st.sampled_from([4, 8]), st.sampled_from([96.0, 20.0]))
def test_p2r_equals_the_loop(seed, count, stride, reach):
    rng = np.random.default_rng(seed)
    rows, columns = 9, 12
    # At least one and a half cells apart, so that each point owns the cell it lies in.
    cells = rng.permutation((rows // 2) * (columns // 2))[:count]
    points = np.stack([cells % (columns // 2), cells // (columns // 2)], 1) * 2.0 * stride
    points = (points + rng.uniform(0, 0.5 * stride, points.shape)).astype(np.float32)
    logits = torch.from_numpy(rng.normal(size=(rows, columns)))
    _, target = reference.p2r(logits, points, stride, max_distance=reach)
    assert torch.equal(p2r_target(logits, points, stride, max_distance=reach), target)
    assert target.sum() == count
    same_value_and_gradient(
        lambda x: p2r_loss(x, points, stride, max_distance=reach),
        lambda x: reference.p2r(x, points, stride, max_distance=reach)[0],
        logits)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-6, 3))
def test_as_many_cells_are_above_the_expected_threshold_as_heads_are_expected(seed, middle):
    logits = torch.tensor(np.random.default_rng(seed).normal(middle, 2, (2, 9, 11)))
    odds = 2 * torch.exp(-logits)  # of no head against a head, without the doubled weight
    wanted = round((1 / (1 + odds)).sum().item())
    threshold = losses.expected_threshold(logits)
    assert (torch.sigmoid(logits) >= threshold).sum() == wanted == losses.expected_heads(logits)
    assert threshold == 1 or wanted
    some = torch.where(logits > 0, logits, -torch.inf)  # the cells that may be heads
    among = losses.expected_threshold(logits, some)
    assert (some > -torch.inf)[torch.sigmoid(some) >= among].sum() == min(wanted, (logits > 0).sum())


def test_the_expected_threshold_of_a_network_that_learnt_the_odds_gives_the_right_number():
    """P2R's minimum for cells that are heads with known probabilities, found by descent."""
    rng = np.random.default_rng(0)
    q = torch.tensor(rng.beta(0.3, 3, 4000))
    logits = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):  # the mean of (target + 1) * BCE over targets drawn with q
        descent.zero_grad()
        loss = 2 * q * F.softplus(-logits) + (1 - q) * F.softplus(logits)
        loss.sum().backward()
        descent.step()
    expected = (torch.sigmoid(logits) >= losses.expected_threshold(logits)).sum().item()
    assert expected == pytest.approx(q.sum().item(), rel=0.02)
    assert (logits > 0).sum().item() != pytest.approx(q.sum().item(), rel=0.1)


def test_p2r_worked_by_hand():
    # One point on the centre of cell (0, 0): distances 0, 4, 8 px; radius 8; costs 0, 4, 8.
    logits = torch.zeros(1, 3, dtype=torch.float64)
    loss = p2r_loss(logits, [[1.5, 1.5]], 4)
    assert loss.item() == pytest.approx(math.log(2) * (2 + 1 + 1) / 3)
    # A logit above 4 makes the second cell cheaper than the first.
    logits[0, 1] = 4.1
    assert p2r_target(logits, [[1.5, 1.5]], 4).tolist() == [[0, 1, 0]]


def test_p2r_without_points_is_all_background_at_half_weight():
    logits = torch.randn(6, 7, dtype=torch.float64)
    loss = p2r_loss(logits, np.zeros((0, 2), np.float32), 4)
    torch.testing.assert_close(loss, 0.5 * F.softplus(logits).mean())


def test_p2r_cells_under_a_cut_out_cost_nothing_but_stay_in_the_mean():
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    points = [[5.0, 6.0], [26.0, 20.0]]
    weight = torch.ones(6, 8)
    weight[:, 4:] = 0
    p2r_loss(logits, points, 4, weight=weight).backward()
    assert not logits.grad[:, 4:].any() and logits.grad[:, :4].all()
    full = logits.detach().clone().requires_grad_()
    p2r_loss(full, points, 4).backward()
    torch.testing.assert_close(logits.grad[:, :4], full.grad[:, :4])


def test_cells_beyond_the_reach_belong_to_nobody():
    owner, distance = p2r_assign([[1.5, 1.5]], (1, 40), 4, 96.0)
    assert (owner[:24] == 0).all() and (owner[24:] == -1).all()  # cell 24 is 96 px away
    assert torch.isinf(distance[24:]).all()
    torch.testing.assert_close(distance[:24], 4.0 * torch.arange(24, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 12))
def test_cells_belong_to_the_nearest_point_and_on_ties_to_the_first(seed, count):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 8, (count, 2)) * 2.0 - 0.5  # many exact ties and duplicates
    owner, distance = p2r_assign(points, (5, 5), 4)
    y, x = np.divmod(np.arange(25), 5)
    centres = np.stack([x, y], 1) * 4 + 1.5
    squared = ((centres[:, None] - points[None]) ** 2).sum(2)
    np.testing.assert_allclose(distance.numpy(), np.sqrt(squared.min(1)))
    near = squared[np.arange(25), owner.numpy()]
    np.testing.assert_array_equal(near, squared.min(1))
    # Up to four places may tie; duplicates of one place do not use up the four.
    places = [len(np.unique(points[row == row.min()], axis=0)) for row in squared]
    few = np.array(places) <= 4
    np.testing.assert_array_equal(owner.numpy()[few], squared.argmin(1)[few])


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_every_head_is_counted_also_coincident_ones_and_those_that_own_no_cell(seed, count):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 39.5, (count, 2))
    points[count // 2:] = points[rng.integers(0, count, count - count // 2)].round()
    logits = torch.from_numpy(rng.normal(size=(10, 10)))
    owner = p2r_assign(points, (10, 10), 4)[0].numpy()
    # Heads by region: a head without a cell of its own joins the owner of its nearest cell.
    heads = np.zeros(count, int)
    for i, (x, y) in enumerate(points):
        nearest = [min(max(math.floor((c - 1.5) / 4 + 0.5), 0), 9) for c in (x, y)]
        heads[i if (owner == i).any() else owner[nearest[1] * 10 + nearest[0]]] += 1
    assert heads.sum() == count
    target = p2r_target(logits, points, 4).reshape(-1).numpy()
    for i in range(count):
        assert target[owner == i].sum() == min(heads[i], (owner == i).sum())


def test_two_heads_at_one_place_give_two_positive_cells():
    logits = torch.zeros(8, 8)
    points = [[9.5, 9.5], [9.5, 9.5], [25.5, 25.5]]
    target = p2r_target(logits, points, 4)
    assert target.sum() == 3 and target[2, 2] == 1 and target[6, 6] == 1


def test_a_head_between_nearer_ones_owns_no_cell_and_is_counted():
    # Heads 0 and 2 sit on the cell centres 5.5 and 9.5, head 1 in the middle of a row above none.
    points = [[5.5, 1.5], [7.5, 1.5], [9.5, 1.5]]
    owner, _ = p2r_assign(points, (1, 4), 4)
    assert owner.tolist() == [0, 0, 2, 2]
    assert p2r_target(torch.zeros(1, 4), points, 4).sum() == 3


def test_p2r_accepts_tensors_and_arrays_alike():
    logits, points = torch.randn(6, 6), np.random.default_rng(0).uniform(0, 24, (5, 2))
    assert p2r_loss(logits, points, 4) == p2r_loss(logits, torch.from_numpy(points), 4)


# --- mask constraint ---------------------------------------------------------------------------

def two_squares():
    labels = np.zeros((16, 16), np.int32)
    labels[0:8, 0:8], labels[8:16, 8:16] = 1, 2
    return labels


def test_background_term_is_the_mean_of_rescaled_activation_off_the_masks():
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = two_squares()
    fine = reference.upsample(torch.relu(logits)[None], 4)[0]
    fine = fine * torch.relu(logits).sum() / fine.sum()
    value = mask_constraint(logits, labels, background=2.0)
    torch.testing.assert_close(value, 2.0 * fine[torch.from_numpy(labels) == 0].mean())


def test_foreground_term_wants_a_total_of_one_per_instance():
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.from_numpy(two_squares())
    fine = reference.upsample(torch.relu(logits)[None], 4)[0]
    fine = fine * torch.relu(logits).sum() / fine.sum()
    miss = [abs(fine[labels == k].sum() - 1) for k in (1, 2)]
    torch.testing.assert_close(
        mask_constraint(logits, labels, foreground=1.0), (miss[0] + miss[1]) / 2)
    # Only the second instance holds a confident point.
    torch.testing.assert_close(
        mask_constraint(logits, labels, [[12.0, 12.0], [2.0, 12.0]], foreground=1.0), miss[1])


def test_one_point_term_counts_cells_and_has_a_gradient():
    logits = torch.full((4, 4), -2.0)
    logits[0, 0] = logits[0, 1] = logits[1, 1] = 2.0  # three in instance 1, none in instance 2
    logits.requires_grad_()
    value = mask_constraint(logits, two_squares(), one_point=1.0)
    assert value.item() == pytest.approx((2 + 1) / 2)
    value.backward()
    assert (logits.grad[:2, :2] > 0).all()  # too many: down
    assert (logits.grad[2:, 2:] < 0).all()  # too few: up
    assert not logits.grad[:2, 2:].any() and not logits.grad[2:, :2].any()


def test_constraint_weights_add_up():
    logits, labels = torch.randn(4, 4), two_squares()
    parts = [mask_constraint(logits, labels, **{name: 1.0})
             for name in ("background", "foreground", "one_point")]
    total = mask_constraint(logits, labels, background=0.1, foreground=0.2, one_point=0.3)
    torch.testing.assert_close(total, 0.1 * parts[0] + 0.2 * parts[1] + 0.3 * parts[2])


def test_constraint_gradient_passes_a_numerical_check():
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: mask_constraint(x, two_squares(), background=1.0, foreground=0.5), logits)


@pytest.mark.parametrize("labels", [np.zeros((16, 16), np.int32), np.ones((16, 16), np.int32)])
@pytest.mark.parametrize("fill", [-3.0, 0.0, 3.0])
def test_constraint_of_empty_and_full_maps_is_finite(labels, fill):
    logits = torch.full((4, 4), fill, requires_grad=True)
    value = mask_constraint(
        logits, labels, np.zeros((0, 2)), background=1.0, foreground=1.0, one_point=1.0)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


# --- point-mask consistency --------------------------------------------------------------------

def test_consistency_wants_points_on_instances_and_a_point_in_each():
    logits = torch.full((4, 4), -20.0)
    logits[0, 0] = logits[3, 3] = 20.0
    assert point_mask_consistency(logits, two_squares()).item() == pytest.approx(0, abs=1e-6)
    stray = logits.clone()
    stray[0, 3] = 1.0
    assert point_mask_consistency(stray, two_squares()).item() == pytest.approx(
        torch.sigmoid(torch.tensor(1.0)).item(), abs=1e-6)
    lost = logits.clone()
    lost[3, 3] = -20.0
    assert point_mask_consistency(lost, two_squares()).item() == pytest.approx(0.5, abs=1e-6)
    ignore = np.zeros((16, 16), bool)
    ignore[:, 8:] = True
    assert point_mask_consistency(stray, two_squares(), ignore=ignore).item() == pytest.approx(
        0, abs=1e-6)


def test_consistency_has_a_gradient():
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: point_mask_consistency(x, two_squares()), logits)
    empty = point_mask_consistency(logits - 50, np.zeros((16, 16), np.int32))
    empty.backward()
    assert empty.item() == 0


# --- persons cut by a crop, and cut-outs ------------------------------------------------------

def cut_person(seed):
    """(logits (6, 7), dots, label map with dots' instances, the same with a cut person on top of
    the background, the pixels of the cut person)."""
    points, labels, _, logits = crowd("heads on the border")
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, 20), rng.integers(0, 24)
    piece = np.zeros(SHAPE, bool)
    piece[top:top + rng.integers(1, 20), left:left + rng.integers(1, 24)] = True
    piece &= labels == 0
    logits = torch.from_numpy(rng.normal(0.5, 2, logits.shape))
    return logits, points, labels, np.where(piece, len(points) + 3, labels), piece


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_pixels_of_a_cut_person_change_the_constraint_only_by_being_no_background(seed):
    logits, dots, labels, cut, piece = cut_person(seed)
    weights = {"background": 0.7, "foreground": 0.5, "one_point": 0.3}
    same_value_and_gradient(
        lambda x: mask_constraint(x, cut, dots, **weights),
        lambda x: reference.mask_constraint(x, labels, dots, 4, **weights, visible=~piece), logits)
    for term in ("foreground", "one_point"):
        torch.testing.assert_close(mask_constraint(logits, cut, dots, **{term: 1.0}),
                                   mask_constraint(logits, labels, dots, **{term: 1.0}))
    same_value_and_gradient(
        lambda x: point_mask_consistency(x, cut, dots),
        lambda x: point_mask_consistency(x, labels, dots, ignore=piece), logits)


@pytest.mark.parametrize("value", [-2.0, 0.5, 2.0])
def test_nothing_is_asked_of_a_cell_of_a_cut_person(value):
    labels = np.zeros((32, 32), np.int32)
    labels[4:12, 4:12], labels[16:, 12:] = 1, 2  # the dot of 2 lies outside
    for term in ("background", "foreground", "one_point"):
        logits = torch.full((8, 8), value, requires_grad=True)
        mask_constraint(logits, labels, [[7.5, 7.5]], **{term: 1.0}).backward()
        assert not logits.grad[5:, 4:].any(), term  # cells whose neighbours are the person's too
    logits = torch.full((8, 8), value, requires_grad=True)
    point_mask_consistency(logits, labels, [[7.5, 7.5]]).backward()
    assert not logits.grad[4:, 3:].any() and logits.grad.any()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_constraint_and_consistency_under_a_cut_out_equal_the_slow_ones(seed):
    points, labels, _, _ = crowd("heads on the border")
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0.5, 2, CELLS))
    visible = np.ones(SHAPE, bool)
    top, left = rng.integers(0, 20), rng.integers(0, 24)
    visible[top:top + rng.integers(1, 24), left:left + rng.integers(1, 28)] = False
    seen = [(x, y) for x, y in points
            if not (0 <= x + 0.5 < SHAPE[1] and 0 <= y + 0.5 < SHAPE[0])
            or visible[math.floor(y + 0.5), math.floor(x + 0.5)]]
    weights = {"background": 0.7, "foreground": 0.5, "one_point": 0.3}
    same_value_and_gradient(
        lambda x: mask_constraint(x, labels, points, **weights, visible=visible),
        lambda x: reference.mask_constraint(x, labels, seen, 4, **weights, visible=visible), logits)
    same_value_and_gradient(
        lambda x: point_mask_consistency(x, labels, points, ignore=~visible),
        lambda x: reference.consistency(x, labels, 4, seen, ~visible), logits)


def test_a_person_under_a_cut_out_counts_whole_if_the_dot_is_visible_else_not_at_all():
    labels = two_squares()
    logits = torch.full((4, 4), -2.0)
    logits[1, 1] = 2.0  # hidden, in instance 1
    visible = np.ones((16, 16), bool)
    visible[4:8] = visible[:, 4:8] = False
    value = mask_constraint(logits, labels, [[1.5, 1.5]], one_point=1.0, visible=visible)
    assert value == 0  # the one positive cell is hidden, and counts
    for dot, wanted in (((1.5, 1.5), 1.0), ((5.5, 5.5), 0.0)):
        nothing = torch.full((4, 4), -2.0)
        assert mask_constraint(nothing, labels, [dot], one_point=1.0, visible=visible) == wanted
        assert mask_constraint(nothing, labels, [dot], foreground=1.0, visible=visible) == wanted
    logits[1, 1], logits[0, 2] = -2.0, 2.0
    visible[:] = True
    visible[0:8, 8:16] = False
    assert mask_constraint(logits, labels, background=1.0) > 0
    logits[0, 2], logits[1, 3] = -2.0, 2.0
    visible[:, 4:] = False  # a cell's activation reaches into its neighbours' pixels
    assert mask_constraint(logits, labels, background=1.0, visible=visible) == 0


BAD_POINTS = {"five columns": (np.zeros((2, 5)), r"found shape \(2, 5\)"),
              "one axis": (np.zeros(2), r"found shape \(2,\)"),
              "NaN": (np.array([[1.0, math.nan]]), "NaN or infinite; remove those points"),
              "infinite": (torch.tensor([[math.inf, 1.0]]), "NaN or infinite")}


@pytest.mark.parametrize("bad", BAD_POINTS)
@pytest.mark.parametrize("loss", [
    lambda points: p2r_loss(torch.zeros(4, 4), points, 4),
    lambda points: exclusivity_loss(torch.zeros(3, 4, 4), points, two_squares()),
    lambda points: mask_constraint(torch.zeros(4, 4), two_squares(), points, foreground=1.0),
    lambda points: point_mask_consistency(torch.zeros(4, 4), two_squares(), points)])
def test_points_that_are_none_are_refused(loss, bad):
    points, message = BAD_POINTS[bad]
    with pytest.raises(ValueError, match=message):
        loss(points)


@pytest.mark.parametrize("shape", [(16, 15), (8, 8), (4, 16), (16,), (1, 16, 16)])
def test_maps_of_another_shape_are_refused(shape):
    labels, flags, points = np.zeros(shape, int), np.zeros(shape, bool), [[1.0, 1.0]]
    logits, embedding = torch.zeros(4, 4), torch.zeros(3, 4, 4)
    if shape != (8, 8):  # half as fine would do for an embedding
        with pytest.raises(ValueError, match="label_map: found .* pixels, but the network's"):
            exclusivity_loss(embedding, points, labels)
    with pytest.raises(ValueError, match="ignore: found"):
        exclusivity_loss(embedding, points, two_squares(), ignore=flags)
    for loss, flag in ((mask_constraint, "visible"), (point_mask_consistency, "ignore")):
        with pytest.raises(ValueError, match="label_map: found .* give a map of 16 x 16"):
            loss(logits, labels, points)
        with pytest.raises(ValueError, match=f"{flag}: found"):
            loss(logits, two_squares(), points, **{flag: flags})


# --- all of them -------------------------------------------------------------------------------

SHAPE, CELLS = (24, 28), (6, 7)
CROWDS = {
    "coincident heads": [(9.3, 8.1), (9.3, 8.1), (9.3, 8.1), (20.0, 15.0), (20.0, 15.0),
                         (4.6, 19.7)],
    "heads on the border": [(0, 0), (27, 23), (-0.5, 11.2), (27.4, 6.0), (13.1, 23.4), (14, 12)],
    "one head": [(13.3, 9.7)],
    "none": [],
}


def crowd(name):
    """(points, label map of discs, embedding (5, H, W), logits (h, w)), float64."""
    points = np.array(CROWDS[name], dtype=np.float64).reshape(-1, 2)
    head, pixel = incidence(points, 0.6 * exclusion_radii(points, SHAPE), SHAPE)
    labels = lowest_wins(head.astype(float), head, pixel, SHAPE)
    rng = np.random.default_rng(len(points))
    embedding = F.normalize(torch.from_numpy(rng.normal(size=(5, *SHAPE))), dim=0)
    return points, labels, embedding, torch.from_numpy(rng.normal(size=CELLS))


LOSSES = {
    "exclusivity": (
        lambda x, points, labels: exclusivity_loss(x, points, labels),
        lambda x, points, labels: reference.exclusivity(x, points, labels)),
    "p2r": (
        lambda x, points, labels: p2r_loss(x, points, 4),
        lambda x, points, labels: reference.p2r(x, points, 4)[0]),
    "constraint": (
        lambda x, points, labels: mask_constraint(
            x, labels, points[::2], background=0.7, foreground=0.5, one_point=0.3),
        lambda x, points, labels: reference.mask_constraint(
            x, labels, points[::2], 4, background=0.7, foreground=0.5, one_point=0.3)),
    "consistency": (
        lambda x, points, labels: point_mask_consistency(x, labels),
        lambda x, points, labels: reference.consistency(x, labels, 4)),
}


@pytest.mark.parametrize("name", CROWDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_the_slow_reference(loss, name):
    points, labels, embedding, logits = crowd(name)
    ours, slow = LOSSES[loss]
    x = embedding if loss == "exclusivity" else logits
    same_value_and_gradient(lambda v: ours(v, points, labels),
                            lambda v: slow(v, points, labels), x)
    single, double = x.float().requires_grad_(), x.clone().requires_grad_()
    value, wanted = ours(single, points, labels), slow(double, points, labels)
    value.backward()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-5)
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CROWDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_finite_differences(loss, name):
    points, labels, _, logits = crowd(name)
    if loss == "exclusivity":  # of a coarse embedding: upsampling, smoothing and centres included
        x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, *CELLS)))
        function = lambda v: exclusivity_loss(v, points, labels)  # noqa: E731
    elif loss == "constraint":  # the count moves in steps; its gradient is checked above
        x = logits
        function = lambda v: mask_constraint(  # noqa: E731
            v, labels, points, background=1.0, foreground=0.5)
    else:
        x = logits
        function = lambda v: LOSSES[loss][0](v, points, labels)  # noqa: E731
    assert torch.autograd.gradcheck(function, x.clone().requires_grad_())


def test_the_cost_that_picks_the_positive_cell_has_no_gradient():
    points, _, _, logits = crowd("heads on the border")
    x = logits.clone().requires_grad_()
    p2r_loss(x, points, 4).backward()
    target = p2r_target(logits, points, 4)
    wanted = (target + 1) * (torch.sigmoid(logits) - target) / logits.numel()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_instance_with_exactly_one_positive_cell_is_left_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # 1 + s - s is not always 1 in floating point
        logits = torch.full((4, 4), -2.0, dtype=dtype)
        logits[0, 1], logits[3, 2] = torch.rand(2, generator=generator).to(dtype) + 0.1
        logits.requires_grad_()
        value = mask_constraint(logits, two_squares(), one_point=1.0)
        value.backward()
        assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_leaves_losses_finite_and_close_to_single_precision(loss):
    points, labels, embedding, logits = crowd("heads on the border")
    ours = LOSSES[loss][0]
    start = (embedding[:, ::4, ::4] if loss == "exclusivity" else logits).bfloat16()
    half, single = start.clone().requires_grad_(), start.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, same = ours(half, points, labels), ours(single, points, labels)
    plain = start.float().requires_grad_()
    wanted = ours(plain, points, labels)
    for v in (value, same, wanted):
        assert v.dtype == torch.float32 and torch.isfinite(v)
        v.backward()
        torch.testing.assert_close(v, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single.grad, plain.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(half.grad.float(), plain.grad, rtol=1e-2, atol=1e-3)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_losses_run_with_deterministic_algorithms_and_repeat_exactly(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    embedding, points, labels = scene(10, 20, (32, 32), depth=8)
    start = embedding[:, ::4, ::4].float().to(device)
    labels = torch.from_numpy(labels).to(device)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = start.clone().requires_grad_()
            logits = x[0]
            loss = (exclusivity_loss(x, points, labels) + p2r_loss(logits, points, 4)
                    + mask_constraint(logits, labels, points, background=1.0, foreground=1.0,
                                      one_point=1.0)
                    + point_mask_consistency(logits, labels))
            loss.backward()
            results.append((loss.detach(), x.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
