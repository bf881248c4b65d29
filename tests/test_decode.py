"""Statements about decoding: energies, exclusivity, points, and what a prediction holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from xmask import decode, features, metrics
from xmask.config import Evaluation
from xmask.decode import instance_map, points_from_logits
from xmask.features import sample_at, smooth, upsample, upsample_smooth
from xmask.nnec import exclusion_radii, incidence


def predict(logits, embedding, shape, **thresholds):
    """`decode.predict` with the thresholds of the paper's evaluation, some of them changed."""
    usual = dict(point_threshold=0.5, theta=1.1, geometry_weight=0.8, sigma=3.0)
    return decode.predict(logits, embedding, shape, Evaluation(**usual | thresholds))


def unit(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*size, generator=generator, dtype=torch.float64), dim=0)


def random_points(seed, count, shape):
    rng = np.random.default_rng(seed)
    points = rng.uniform([-0.5, -0.5], [shape[1] - 0.5, shape[0] - 0.5], (count, 2))
    return points.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.integers(4, 30), st.integers(4, 30),
       st.sampled_from([None, 1.5, 3.0]), st.floats(0.3, 1.6), st.floats(0, 1.5))
def test_label_map_equals_the_dense_rule(seed, count, height, width, sigma, threshold, weight):
    shape = (height, width)
    embedding = unit(6, *shape, seed=seed)
    points = random_points(seed, count, shape)
    labels = instance_map(
        embedding, points, threshold=threshold, geometry_weight=weight, sigma=sigma)
    assert labels.dtype == torch.int32 and labels.shape == shape
    energy = reference.energies(embedding, points, weight, sigma, shape)
    energy[energy >= threshold] = np.inf
    free = np.full((1, *shape), np.inf)
    expected = np.argmin(np.concatenate([free, energy]), axis=0)
    np.testing.assert_array_equal(labels.numpy(), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_without_nnec_all_heads_of_an_image_have_one_circle(seed, counts):
    shape = (24, 30)
    points = [random_points(seed + k, count, shape) for k, count in enumerate(counts)]
    embedding = torch.stack([unit(6, *shape, seed=seed + k) for k in range(len(points))])
    labels = decode.instance_maps(embedding, points, nnec=False)
    for one, maps, found in zip(points, embedding, labels):
        radii = exclusion_radii(one, shape, lone=0.25)
        # the lower of the two middle ones where they are as many
        radius = min(2 * np.sort(radii)[(len(one) - 1) // 2], 12) if len(one) else 0.0
        energy = reference.energies(maps, one, 0.8, 3.0, shape, np.full(len(one), radius))
        expected = np.argmin(np.concatenate([np.full((1, *shape), 1.1), energy]), axis=0)
        np.testing.assert_array_equal(found.numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_pixels_of_an_instance_lie_in_its_circle(seed, count):
    shape = (33, 41)
    points = random_points(seed, count, shape)
    labels = instance_map(unit(4, *shape, seed=seed).float(), points, threshold=9.0).numpy()
    inside = reference.circles(points, exclusion_radii(points, shape, lone=0.25), shape)
    for k in range(count):
        assert inside[k][labels == k + 1].all()
    # With a threshold that nobody misses, every covered pixel has an owner.
    np.testing.assert_array_equal(labels > 0, inside.any(0))


def test_every_head_gets_a_mask_on_a_uniform_embedding():
    shape = (96, 128)
    points = random_points(3, 400, shape)
    labels = instance_map(torch.ones(4, *shape), points)
    assert len(np.unique(labels[labels > 0])) == 400


@pytest.mark.parametrize("place", [(20.0, 20.0), (13.7, 8.2), (0.0, 0.0)])
def test_coincident_heads_both_own_pixels(place):
    points = np.array([place, place, (33.0, 30.0)])
    labels = instance_map(unit(4, 40, 40), points, threshold=5.0)
    owned = torch.bincount(labels.reshape(-1).long(), minlength=4)
    assert (owned[1:] > 0).all()


@pytest.mark.parametrize("points", [
    [(9.3, 8.1)] * 3 + [(20.0, 15.0)] * 2 + [(4.6, 19.7)],
    [(0, 0), (27, 23), (-0.5, 11.2), (27.4, 6.0), (13.1, 23.4), (14, 12)],
    [(13.3, 9.7)],
])
def test_coincident_border_and_lone_heads_own_what_the_dense_rule_gives_their_place(points):
    points, shape = np.array(points), (24, 28)
    embedding = unit(5, *shape)
    labels = instance_map(embedding, points).numpy()
    energy = reference.energies(embedding, points, 0.8, 3.0, shape)
    wanted = np.where(energy.min(0) < 1.1, energy.argmin(0) + 1, 0)
    # heads at one place have equal energies: the dense rule names the first of them
    first = [0] + [1 + int((points == p).all(1).argmax()) for p in points]
    np.testing.assert_array_equal(np.array(first)[labels], wanted)
    assert wanted.any()


def test_a_lone_head_has_a_quarter_of_the_shorter_side():
    labels = instance_map(torch.ones(2, 40, 60), [[30.0, 20.0]], threshold=9.0)
    rows, columns = torch.nonzero(labels, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 30, 20, 40)


def test_no_heads_give_an_empty_map():
    labels = instance_map(unit(4, 9, 12), np.zeros((0, 2), np.float32))
    assert labels.shape == (9, 12) and not labels.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_is_decoded_in_single_precision(dtype):
    embedding, points = unit(8, 32, 32).to(dtype), random_points(0, 9, (32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        labels = instance_map(embedding, points)
    assert torch.equal(labels, instance_map(embedding.float(), points))


@pytest.mark.parametrize("gate", [False, True])
def test_a_prediction_under_autocast_is_that_of_single_precision(gate):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 8, generator=generator).bfloat16()
    embedding = unit(6, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = predict(logits, embedding, (32, 32), density_gate=gate)
    wanted = predict(logits.float(), embedding.float(), (32, 32), density_gate=gate)
    np.testing.assert_array_equal(got.points, wanted.points)
    np.testing.assert_array_equal(got.instances, wanted.instances)
    np.testing.assert_allclose(got.scores, wanted.scores)
    assert got.instances.any() and np.isfinite(got.scores).all()


def test_a_batch_instead_of_one_image_is_refused():
    with pytest.raises(ValueError, match=r"\(D, H, W\)"):
        instance_map(torch.zeros(1, 4, 9, 9), np.zeros((0, 2)))


@pytest.mark.parametrize("shape", [(9, 13), (4, 20)])
@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_smoothing_is_a_reflected_normalised_gaussian(shape, sigma):
    x = unit(5, *shape)
    torch.testing.assert_close(smooth(x, sigma), reference.smooth(x, sigma))
    torch.testing.assert_close(smooth(torch.ones_like(x), sigma), torch.ones_like(x))
    torch.testing.assert_close(smooth(x[None], sigma)[0], smooth(x, sigma))
    assert smooth(x, None) is x and smooth(x, 0) is x


def test_smoothing_of_sides_too_short_to_reflect_repeats_the_border():
    torch.testing.assert_close(smooth(torch.ones(3, 2, 1), 1.5), torch.ones(3, 2, 1))
    x = unit(3, 3, 8)
    padded = F.pad(x[None], (3, 3, 3, 3), mode="replicate")[0]
    torch.testing.assert_close(smooth(x, 1.5)[:, :, 3:5], smooth(padded, 1.5)[:, 3:6, 6:8])


def test_smoothing_and_sampling_have_true_gradients():
    x = unit(2, 5, 6).requires_grad_()
    points = np.array([[0.3, 1.7], [4.9, 3.1], [-2.0, 9.0], [5.0, 4.0]])
    assert torch.autograd.gradcheck(lambda e: smooth(e, 1.5), x)
    assert torch.autograd.gradcheck(lambda e: sample_at(e, points), x)


@pytest.mark.parametrize("sigma", [None, 1.5, 3.0])
@pytest.mark.parametrize("cells, shape", [
    ((8, 10), (32, 40)), ((5, 40), (7, 160)), ((1, 2), (4, 8)), ((150, 9), (150, 9)),
    ((33, 20), (130, 81))])
def test_upsample_smooth_is_upsampling_and_then_smoothing(cells, shape, sigma):
    x = torch.randn(2, 3, *cells, dtype=torch.float64, generator=torch.Generator().manual_seed(4),
                    requires_grad=True)
    expected, found = smooth(upsample(x, shape), sigma), upsample_smooth(x, shape, sigma)
    tolerance = {"rtol": 0, "atol": 1e-4}  # the library's weights are those of float32
    torch.testing.assert_close(found, expected, **tolerance)
    slope = torch.randn(found.shape, dtype=found.dtype)
    torch.testing.assert_close(torch.autograd.grad(found, x, slope),
                               torch.autograd.grad(expected, x, slope), **tolerance)


@pytest.mark.parametrize("shape", [(7, 9), (1, 5), (6, 1), (1, 1)])
def test_sampling_is_bilinear_and_clamped_to_the_map(shape):
    x = unit(3, *shape)
    points = np.random.default_rng(0).uniform(-2, 10, (30, 2))
    points[:5] = points[:5].round()
    expected = torch.stack([reference.bilinear(x, p) for p in points])
    torch.testing.assert_close(sample_at(x, points), expected)
    assert sample_at(x, np.zeros((0, 2))).shape == (0, 3)


def test_upsampling_puts_cells_where_their_points_are():
    x = unit(2, 5, 6)
    torch.testing.assert_close(upsample(x, 4), reference.upsample(x, 4))
    points, _ = points_from_logits(torch.ones(5, 6))
    # Bilinear upsampling of x is linear around a cell: sampled at its centre it is nearly x.
    ramp = torch.arange(6.0).expand(1, 5, 6)
    torch.testing.assert_close(
        sample_at(upsample(ramp, 4), points)[:, 0].reshape(5, 6)[:, 1:-1], ramp[0, :, 1:-1])


def test_points_are_cells_with_a_logit_above_zero():
    logits = torch.full((3, 4), -5.0)
    logits[1, 2], logits[2, 0], logits[0, 0] = 3.0, 1e-9, 0.0
    points, scores = points_from_logits(logits)
    assert points.tolist() == [[9.5, 5.5], [1.5, 9.5]]
    torch.testing.assert_close(scores, torch.sigmoid(torch.tensor([3.0, 1e-9])))
    low, _ = points_from_logits(logits, threshold=0.1)
    assert len(low) == 3  # the logit of zero, too
    high, _ = points_from_logits(logits, threshold=0.9)
    assert high.tolist() == [[9.5, 5.5]]


def test_a_prediction_holds_points_scores_and_their_map():
    logits = torch.full((8, 10), -4.0)
    logits[2, 3], logits[5, 7] = 4.0, 2.0
    prediction = predict(logits, torch.ones(3, 8, 10), (32, 40))
    assert prediction.points.dtype == np.float32 and prediction.scores.dtype == np.float32
    np.testing.assert_array_equal(prediction.points, [[13.5, 9.5], [29.5, 21.5]])
    assert prediction.instances.shape == (32, 40) and prediction.instances.dtype == np.int32
    assert prediction.instances[9, 13] == 1 and prediction.instances[21, 29] == 2
    same = instance_map(upsample(torch.ones(3, 8, 10), 4), prediction.points)
    np.testing.assert_array_equal(prediction.instances, same.numpy())


def test_points_from_the_point_threshold_have_masks_and_those_above_the_count_threshold_count():
    logits = torch.full((8, 10), -4.0)
    logits[2, 3], logits[5, 7], logits[6, 1], logits[0, 9] = 4.0, -1.5, 1e-9, 0.0
    found = predict(logits, torch.ones(3, 8, 10), (32, 40), point_threshold=0.1)
    np.testing.assert_array_equal(found.counted, [False, True, False, True])
    assert found.count == 2 and len(found.points) == len(found.scores) == 4
    np.testing.assert_array_equal(found.heads, [[13.5, 9.5], [5.5, 25.5]])
    assert set(np.unique(found.instances)) == {0, 1, 2, 3, 4}  # uncounted points keep their masks
    assert predict(logits, torch.ones(3, 8, 10), (32, 40), point_threshold=0.1,
                   count_threshold=0.9).count == 1
    same = predict(logits, torch.ones(3, 8, 10), (32, 40))
    assert same.counted.all() and same.count == len(same.points) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_peaks_are_the_cells_that_no_neighbour_exceeds_the_first_of_equal_ones(
        seed, height, width, values):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, values, (2, height, width)).astype(np.float32))
    kept = decode.peaks(logits)
    for b, y, x in np.ndindex(*logits.shape):
        beside = [(logits[b, v, u].item(), (v, u)) for v in range(max(y - 1, 0), min(y + 2, height))
                  for u in range(max(x - 1, 0), min(x + 2, width)) if (v, u) != (y, x)]
        mine = logits[b, y, x].item()
        beaten = any(other > mine or (other == mine and place < (y, x)) for other, place in beside)
        assert kept[b, y, x] == (-torch.inf if beaten else mine)
    alone = torch.isfinite(kept)
    assert alone.any() and (F.avg_pool2d(alone.float(), 3, 1, 1) * 9)[alone].max() < 1.5


def test_a_prediction_of_peaks_has_one_head_where_two_cells_meet():
    logits = torch.full((8, 10), -4.0)
    logits[2, 3], logits[3, 4], logits[6, 8] = 2.0, 1.5, 1.0  # one head, marked twice, and another
    both = predict(logits, torch.ones(3, 8, 10), (32, 40))
    one = predict(logits, torch.ones(3, 8, 10), (32, 40), peaks=True)
    assert both.count == 3 and one.count == 2
    np.testing.assert_array_equal(one.heads, [[13.5, 9.5], [33.5, 25.5]])
    assert set(np.unique(one.instances)) == {0, 1, 2}
    every = predict(logits, torch.ones(3, 8, 10), (32, 40), peaks=True, point_threshold=0.0)
    assert np.isfinite(every.scores).all() and every.scores.min() > 0  # no cell that is no peak


@pytest.mark.parametrize("points", [np.zeros((2, 5)), np.array([[1.0, np.nan]]), np.zeros(4)])
def test_points_that_are_no_places_are_refused(points):
    for call in (lambda: instance_map(torch.ones(2, 9, 9), points),
                 lambda: sample_at(torch.ones(2, 9, 9), points)):
        with pytest.raises(ValueError, match=r"points: (expected an \(N, 2\)|some coordin)"):
            call()


def test_padding_of_the_network_input_is_cropped_off():
    logits = torch.full((8, 10), 4.0)
    prediction = predict(logits, unit(3, 8, 10), (21, 33))  # 6 x 9 cells hold image pixels
    assert len(prediction.points) == 54
    assert prediction.instances.shape == (21, 33)
    assert prediction.points[:, 0].max() == 32 and prediction.points[:, 1].max() == 20


def test_no_points_no_instances():
    prediction = predict(torch.full((8, 8), -1.0), unit(3, 8, 8), (32, 32))
    assert prediction.points.shape == (0, 2) and prediction.scores.shape == (0,)
    assert not prediction.instances.any()


def test_density_gate_whole_circle_between_energy_above_nothing_below():
    logits = torch.full((16, 16), -8.0)
    logits[8, :] = -0.9  # sigmoid 0.29, a row of cells 32..35
    logits[8, 8] = 6.0
    embedding = unit(8, 16, 16)
    arguments = dict(theta=0.4, geometry_weight=0.6, sigma=1.5, point_threshold=0.9,
                     count_threshold=0.9)
    plain = predict(logits, embedding, (64, 64), **arguments).instances
    gated = predict(logits, embedding, (64, 64), density_gate=True, **arguments)
    density = upsample(torch.sigmoid(logits)[None], 4)[0].numpy().astype(np.float64)
    circle = reference.circles(gated.points, [16.0], (64, 64))[0]
    between = (density >= 0.1) & (density <= 0.5)
    expected = (between & circle) | ((density > 0.5) & (plain > 0))
    assert (between & circle & (plain == 0)).any()
    np.testing.assert_array_equal(gated.instances > 0, expected)


@pytest.mark.parametrize("shape", [(3, 70), (8, 8), (37, 50), (64, 200), (333, 45)])
@pytest.mark.parametrize("gate", [False, True])
def test_decoding_in_bands_of_rows_is_exact(shape, gate, monkeypatch):
    generator = torch.Generator().manual_seed(shape[0])
    cells = [-(-side // 32) * 8 for side in shape]
    logits = torch.randn(cells, generator=generator) * 2 - 2
    embedding = F.normalize(torch.randn(6, *cells, generator=generator), dim=0)
    expected = predict(logits, embedding, shape, density_gate=gate)
    monkeypatch.setattr(features, "_BAND", 1)
    monkeypatch.setattr(features, "_ROWS", 1)
    found = predict(logits, embedding, shape, density_gate=gate)
    np.testing.assert_array_equal(found.points, expected.points)
    assert (found.instances != expected.instances).mean() < 1e-3  # ties, to rounding
    # every head keeps its mask: nobody is lost on a seam, nobody is there twice
    assert metrics.segmentation(found.instances, expected.instances)["mean_iou"] > 0.999


def test_maps_that_do_not_fit_the_image_are_refused():
    with pytest.raises(ValueError, match="cover"):
        predict(torch.zeros(4, 4), torch.zeros(2, 4, 4), (17, 16))
    with pytest.raises(ValueError, match="embedding"):
        predict(torch.zeros(4, 4), torch.zeros(2, 8, 8), (16, 16))


def test_a_crowd_of_thousands_needs_no_dense_array():
    # 3,000 x 768 x 1024 floats would be 9 GB; coverage stays near one circle per pixel.
    shape = (768, 1024)
    points = random_points(0, 3000, shape)
    head, _ = incidence(points, exclusion_radii(points, shape), shape)
    assert len(head) < 1.5 * shape[0] * shape[1]
    labels = instance_map(torch.ones(4, *shape), points)
    assert len(torch.unique(labels)) == 3001
