"""How large a head is, from the dots alone: on real photographs and on drawn crowds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xmask import nnec
from xmask.edp_sam import local_head_radius
from xmask.synthetic import draw_scene

# Positions and sizes of heads in real photographs; not ours to hand on, so not in the repository.
SIZES = Path(__file__).parents[2] / "shared" / "data" / "NWPU" / "val_gt_loc_odd.txt"


def predicted(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return local_head_radius(points, nnec.exclusion_radii(points, shape), shape)


def close(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Which heads' radii are within a factor of 1.5 of the truth."""
    return np.abs(np.log(found / true)) <= np.log(1.5)


def photographs():
    """Of every photograph with heads: points, true radii sqrt(w h) / 2, shape of what is known."""
    for line in SIZES.read_text().splitlines():
        heads = np.array(line.split()[2:], float).reshape(-1, 5)
        if len(heads):
            points, short = heads[:, :2], np.maximum(heads[:, 2], 0.5)
            long = np.sqrt(np.maximum(heads[:, 3] ** 2 - short**2, short**2))
            width, height = points.max(axis=0).astype(int) + 1
            yield points, np.sqrt(short * long), (int(height), int(width))


@pytest.mark.skipif(not SIZES.is_file(), reason=f"{SIZES} is not on this machine")
def test_three_of_four_heads_in_photographs_are_within_a_factor_of_one_and_a_half():
    found = [close(predicted(points, shape), true) for points, true, shape in photographs()]
    assert np.concatenate(found).mean() >= 0.74
    assert np.mean([one.mean() for one in found]) >= 0.63
    ratio = np.concatenate([predicted(p, shape) / true for p, true, shape in photographs()])
    assert 0.85 < np.median(ratio) < 1.15


@pytest.mark.parametrize("people, character, share", [
    (25, "sha", 0.4),  # who stands alone says little of his size: the vote of masks has to
    (120, "jhu", 0.9), (400, "qnrf", 0.9)])
def test_nearly_all_heads_of_drawn_crowds_are(people, character, share):
    found = []
    for seed in (5_450_000, 5_450_001):
        scene = draw_scene(seed, people=people, character=character)
        found.append(close(predicted(scene.points.astype(float), scene.shape),
                           np.sqrt(scene.boxes.prod(axis=1)) / 2))
    assert np.concatenate(found).mean() > share


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(2, 8))
def test_an_enlarged_image_has_enlarged_heads(seed, count, factor):
    points = np.random.default_rng(seed).uniform((0, 0), (1399, 999), (count, 2))
    # the smallest circle is 3 px in every image
    assume((nnec.exclusion_radii(points, (1000, 1400)) > 3).all())
    found = predicted(points, (1000, 1400))
    enlarged = predicted(points * factor, (1000 * factor, 1400 * factor))
    free = found > 2  # not at the lower limit
    np.testing.assert_allclose(enlarged[free], factor * found[free], rtol=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans(), st.tuples(
    st.integers(8, 900), st.integers(8, 900)))
def test_radii_keep_to_their_limits_whatever_the_points(seed, count, grid, shape):
    points = np.random.default_rng(seed).uniform((0, 0), (shape[1] - 1, shape[0] - 1), (count, 2))
    points = np.rint(points / 4) * 4 if grid else points  # coincident heads, and equal rows
    radii = nnec.exclusion_radii(points, shape)
    found = local_head_radius(points, radii, shape)
    assert found.shape == (count,) and np.isfinite(found).all()
    assert (found >= 2).all() and (found <= np.maximum(radii, 3)).all()
    assert (found <= max(0.12 * min(shape), 2)).all()
