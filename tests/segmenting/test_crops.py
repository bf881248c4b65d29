"""The plan of crops follows the heads, crops overlap, and a head sits where it is most central."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xmask.segmenting import crops
from xmask.segmenting.crops import View, plan_crops


def plan(points, radius, shape, **options):
    points = np.asarray(points, float).reshape(-1, 2)
    radius = np.broadcast_to(np.asarray(radius, float), len(points))
    return plan_crops(points, radius, shape, **{"cells": 64, "side": 128, "max_zoom": 64,
                                                **options})


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 900), st.integers(40, 900), st.floats(1.5, 60), st.integers(0, 99))
def test_every_head_is_large_enough_and_away_from_the_edge_of_its_crop(height, width, radius,
                                                                       seed):
    points = np.random.default_rng(seed).uniform(0, (width - 1, height - 1), (30, 2))
    views, view_of = plan(points, radius, (height, width))
    assert set(view_of) == set(range(len(views)))  # no crop that nobody asked for
    for (x, y), view in zip(points, (views[k] for k in view_of)):
        assert 0 <= view.top and view.top + view.height <= height
        assert 0 <= view.left and view.left + view.width <= width
        side = max(view.height, view.width)
        span = 2 * radius * 64 / side  # mask cells
        most = min(max(height, width), max(128 / crops.MOST_ENLARGED, 64 / 7 * 2 * radius))
        # Large enough, and not closer than needed, unless the image's size or resolution ends it.
        assert side <= 2 * most + 1 and (span <= 14.5 or side == max(height, width))
        assert side >= 128 / crops.MOST_ENLARGED - 1
        margin = 0.2 * side - 1
        for at, start, length, whole in ((x, view.left, view.width, width),
                                         (y, view.top, view.height, height)):
            assert at - start >= margin or start == 0
            assert start + length - 1 - at >= margin or start + length == whole


def test_a_head_is_decided_in_the_crop_where_it_is_most_central():
    points = np.random.default_rng(0).uniform(0, 399, (200, 2))
    views, view_of = plan(points, 5.0, (400, 400))
    middle = np.array([(v.left + (v.width - 1) / 2, v.top + (v.height - 1) / 2) for v in views])
    away = np.abs(points[:, None] - middle).max(axis=2)
    assert (away[np.arange(200), view_of] <= away.min(axis=1) + 1).all()


def test_the_plan_follows_the_radii_and_not_a_fixed_grid():
    far, near = [[50, 20], [90, 25], [130, 22]], [[60, 280], [250, 290]]
    views, view_of = plan(far + near, [3, 3, 3, 40, 40], (300, 400))
    sides = np.array([views[k].width for k in view_of])
    assert (sides[:3] == 50).all() and (sides[3:] == 400).all()
    assert all(view.top < 60 for view in views[:-1] if view.width == 50)  # none where nobody is
    assert plan(far + near, [3, 3, 3, 40, 40], (300, 400), max_zoom=1)[0] == [View(0, 0, 300, 400)]


def test_neighbouring_crops_overlap_by_two_fifths():
    starts, side = crops.crop_starts(np.arange(0.0, 500.0), 500, 100)
    assert side == 100 and set(np.diff(np.unique(starts))) <= {57, 58}


def test_an_original_sam_sees_46_crops_of_an_image_at_most():
    grid = np.stack(np.meshgrid(np.arange(0, 400, 5), np.arange(0, 400, 5)), -1).reshape(-1, 2)
    views = {view for radius in (30, 15, 1)
             for view in plan(grid, radius, (400, 400), max_zoom=4, side=1024, cells=256)[0]}
    assert len(views) <= 1 + 9 + 36
    small = list(plan(grid, 1, (400, 400), max_zoom=4, side=128, cells=64)[0])
    assert len(small) == 36 and 2 * 1 * 64 / small[0].width < crops.HEAD_CELLS
