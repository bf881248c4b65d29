"""EDP-SAM turns heads into an exclusive, connected label map, whatever the heads are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage.measure import label as connected_components

from xmask import edp_sam, nnec
from xmask.edp_sam import (
    COLUMNS,
    Candidate,
    check_label_map,
    generate_masks,
    local_head_radius,
    source_names,
)
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.segmenting.sam_segmenter import SamSegmenter


def picture(shape, seed=0):
    """Blocks of random colours: something for superpixels and contours to hold on to."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] // 6 + 1, shape[1] // 6 + 1, 3))
    image = blocks.repeat(6, axis=0).repeat(6, axis=1)[:shape[0], :shape[1]]
    return (image + rng.integers(-8, 9, image.shape)).clip(0, 255).astype(np.uint8)


def crowd_with_truth(seed=0, shape=(160, 200), people=24):
    """Ellipses of one size on a quiet ground; their label map and centres."""
    rng = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid(np.arange(20, 190, 30), np.arange(20, 150, 36)), -1)
    points = centres.reshape(-1, 2)[:people] + rng.uniform(-4, 4, (people, 2))
    y, x = np.indices(shape)
    image = rng.normal(100, 5, (*shape, 3))
    truth = np.zeros(shape, np.int32)
    for k, (cx, cy) in enumerate(points, start=1):
        inside = ((x - cx) / 6) ** 2 + ((y - cy) / 7.5) ** 2 <= 1
        image[inside] += rng.choice([-70, 80], 3)
        truth[inside] = k
    return image.clip(0, 255).astype(np.uint8), points, truth


def check_invariants(labels, table, points, shape, radii):
    points = np.asarray(points, float).reshape(-1, 2)
    assert labels.shape == shape and labels.dtype == np.int32
    assert labels.min() >= 0 and labels.max() <= len(points)
    y, x = np.nonzero(labels)
    k = labels[y, x] - 1
    assert ((x - points[k, 0]) ** 2 + (y - points[k, 1]) ** 2 <= radii[k] ** 2).all()
    pieces = connected_components(labels, background=0, connectivity=1)
    assert pieces.max() == len(np.unique(labels[labels > 0]))
    assert list(table.columns) == COLUMNS and len(table) == len(points)
    assert table["area"].tolist() == np.bincount(
        labels.ravel(), minlength=len(points) + 1)[1:].tolist()
    assert table["source"].isin(source_names(ClassicalSegmenter())).all()
    assert table["score"].between(0, 1).all()
    assert (table["source"].eq("disc") == table["flags"].str.contains("failed")).all()


halves = st.tuples(st.integers(-1, 78), st.integers(-1, 62)).map(lambda c: (c[0] / 2, c[1] / 2))


@settings(max_examples=30, deadline=None)
@example([(0, 0), (0, 0), (0, 1)], 0, True, "b")  # the second may not take the third's own pixel
@example([(0, 0)] * 9 + [(0, 0.5)], 0, True, "b")  # more heads than pixels
@given(st.lists(halves, max_size=25), st.integers(0, 3), st.booleans(), st.sampled_from("bps"))
def test_any_heads_give_an_exclusive_connected_map_inside_the_circles(heads, seed, circle, prompt):
    shape = (32, 40)
    points = np.array(heads, np.float32).reshape(-1, 2)
    labels, table = generate_masks(
        picture(shape, seed), points, ClassicalSegmenter(), nnec=circle,
        point_prompt=prompt != "s", superpixel_prompt=prompt != "p")
    radii = nnec.exclusion_radii(points.astype(float), shape)
    check_invariants(labels, table, points, shape, radii if circle else np.minimum(2 * radii, 16))
    # Everybody gets a pixel, unless so many heads share a circle that its pixels may run out.
    apart = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
    crowded = (apart <= 3).sum(axis=1) > 5
    assert (crowded | (table["area"] > 0)).all()
    assert (table["flags"].str.contains("empty") == (table["area"] == 0)).all()
    if not circle:
        return
    # A head that is alone on its pixel and nearer to it than anybody else owns it.
    column, row = np.rint(points).astype(int).T.clip(0, [[shape[1] - 1], [shape[0] - 1]])
    distance = np.hypot(*(np.stack([column, row], 1)[:, None] - points[None]).transpose(2, 0, 1))
    alone = (distance <= np.diag(distance)[:, None]).sum(axis=1) == 1
    assert (labels[row, column][alone] == np.flatnonzero(alone) + 1).all()


def test_coincident_heads_each_get_a_part_and_are_flagged():
    points = np.array([[20, 15], [20, 15], [20, 15], [33, 15]], np.float32)
    labels, table = generate_masks(picture((32, 40)), points, ClassicalSegmenter())
    assert (table["area"] > 0).all()
    assert table["flags"].str.contains("coincident").tolist() == [True, True, True, False]


def test_more_coincident_heads_than_pixels_are_all_in_the_table():
    points = np.full((40, 2), 9.0, np.float32)
    labels, table = generate_masks(picture((20, 20)), points, ClassicalSegmenter())
    assert len(table) == 40 and (labels > 0).sum() <= 29  # pixels of a circle of radius 3
    assert table["flags"].str.contains("empty").tolist() == table["area"].eq(0).tolist()
    check_invariants(labels, table, points, (20, 20), np.full(40, 3.0))


def test_heads_squeezed_into_one_pixel_each_get_one():
    points = np.array([[9.0, 9.0], [9.1, 9.0], [9.2, 9.0], [8.9, 9.1]], np.float32)
    _, table = generate_masks(picture((20, 20)), points, ClassicalSegmenter())
    assert (table["area"] > 0).all()


def test_no_heads_one_head_and_one_pixel():
    segmenter = ClassicalSegmenter()
    labels, table = generate_masks(picture((20, 30)), np.zeros((0, 2)), segmenter)
    assert not labels.any() and len(table) == 0 and list(table.columns) == COLUMNS
    labels, table = generate_masks(picture((20, 30)), np.array([[29.5, -0.5]]), segmenter)
    assert labels[0, 29] == 1 and table["radius"].tolist() == [10.0]
    labels, table = generate_masks(np.zeros((1, 1, 3), np.uint8), np.zeros((2, 2)), segmenter)
    assert labels.tolist() == [[1]]
    assert table["flags"].str.contains("empty").tolist() == [False, True]


def test_points_may_be_lists_and_results_repeat():
    image, points, _ = crowd_with_truth()
    first, table = generate_masks(image, points.tolist(), ClassicalSegmenter())
    second, again = generate_masks(image, points.astype(np.float64), ClassicalSegmenter())
    assert (first == second).all()
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.parametrize("points,found", [
    ([[5, 5], [30.6, 3]], r"index 1: \(x, y\) = \(30.6, 3\)"),
    ([[5, -1]], "index 0"),
    ([[np.nan, 3]], "index 0"),
    ([[1, 2, 3]], r"expected \(N, 2\)"),
])
def test_points_that_cannot_be_heads_are_named(points, found):
    with pytest.raises(ValueError, match=found):
        generate_masks(picture((20, 30)), np.array(points), ClassicalSegmenter())


def test_pictures_and_options_that_cannot_be_are_refused():
    grey, fractions, nothing = np.uint8(np.zeros((20, 30))), np.zeros((20, 30, 3)), picture((0, 3))
    for image in (grey, fractions, nothing):
        with pytest.raises(ValueError, match="image: expected uint8"):
            generate_masks(image, np.array([[1, 1]]), ClassicalSegmenter())
    with pytest.raises(ValueError, match="both are switched off"):
        generate_masks(picture((20, 30)), np.array([[1, 1]]), ClassicalSegmenter(),
                       point_prompt=False, superpixel_prompt=False)


def test_masks_follow_the_heads_better_than_discs_do():
    image, points, truth = crowd_with_truth()
    count = len(points)

    def mean_iou(labels):
        both = np.bincount(truth[labels == truth], minlength=count + 1)[1:]
        areas = [np.bincount(m.ravel(), minlength=count + 1)[1:] for m in (labels, truth)]
        return (both / (sum(areas) - both)).mean()

    labels, table = generate_masks(image, points, ClassicalSegmenter())
    check_invariants(labels, table, points, truth.shape, nnec.exclusion_radii(points, truth.shape))
    radii = nnec.exclusion_radii(points, truth.shape)
    head, pixel = nnec.incidence(points, 0.45 * radii, truth.shape)
    discs = nnec.lowest_wins(np.zeros(len(head)), head, pixel, truth.shape)
    assert mean_iou(labels) > 0.75
    assert mean_iou(labels) > mean_iou(discs) + 0.1
    assert (table["source"] == "merged").mean() > 0.5


def test_a_segmenter_that_finds_nothing_leaves_flagged_discs():
    class Blind(ClassicalSegmenter):
        def predict(self, prompts, head, pixel):
            logits, scores = super().predict(prompts, head, pixel)
            return np.full_like(logits, -5), scores

    image, points, truth = crowd_with_truth()
    labels, table = generate_masks(image, points, Blind())
    assert (table["source"] == "disc").all() and (table["flags"] == "failed").all()
    assert (table["area"] > 20).all()
    check_invariants(labels, table, points, truth.shape, nnec.exclusion_radii(points, truth.shape))


def test_a_segmenter_that_takes_everything_is_cut_at_the_circles():
    class Greedy(ClassicalSegmenter):
        def predict(self, prompts, head, pixel):
            logits, scores = super().predict(prompts, head, pixel)
            return np.full_like(logits, 5), np.ones_like(scores)

    image = picture((60, 80))
    points = np.random.default_rng(0).uniform((0, 0), (79, 59), (60, 2))
    labels, table = generate_masks(image, points, Greedy())
    check_invariants(labels, table, points, (60, 80), nnec.exclusion_radii(points, (60, 80)))
    assert table["flags"].str.contains("clipped").any()


@pytest.mark.parametrize("segmenter,name", [
    (SamSegmenter.bundled(), "sam"), (ClassicalSegmenter(), "classical")])
def test_the_record_says_which_prompt_of_which_segmenter_made_a_mask(segmenter, name):
    image, points, _ = crowd_with_truth()
    assert source_names(segmenter) == (f"{name}-point", f"{name}-superpixel", "merged", "disc")
    for prompt, options in (("point", {"superpixel_prompt": False}),
                            ("superpixel", {"point_prompt": False})):
        _, table = generate_masks(image, points, segmenter, **options)
        assert set(table["source"]) <= {f"{name}-{prompt}", "disc"}
        assert (table["source"] == f"{name}-{prompt}").any()
    _, table = generate_masks(image, points, segmenter)
    assert "merged" in set(table["source"]) <= set(source_names(segmenter))


# -- the rule that scores candidates and merges them, on candidates made by hand ---------------

class ByHand:
    """One head at (20, 20) of an image of 41 x 41 px, looked at within 14 px, and its candidates."""

    def __init__(self, region_radius=5.0):
        self.near = nnec.circles(np.array([[20.0, 20.0]]), np.array([14.0]), (41, 41))
        self.y, self.x = np.divmod(self.near.pixel, 41)
        self.region = self.near.squared <= region_radius**2

    def disc(self, radius, right=0):
        """Logits (M,) of a disc whose middle lies `right` px beside the head."""
        away = np.hypot(self.x - 20 - right, self.y - 20)
        return np.clip(radius + 0.5 - away, -5, 5)

    def fuse(self, *candidates, scale=5.0, superpixels=True):
        """Logits (M,), score and source of the head. candidates: source, logits, predicted IoU."""
        logit, score, source = edp_sam.fuse_candidates(
            [Candidate(name, logits, np.array([quality])) for name, logits, quality in candidates],
            self.region if superpixels else None,
            None if scale is None else np.array([scale]), self.near)
        return logit, score[0], source[0]


def test_two_prompts_that_agree_are_merged_and_the_superpixels_vote():
    one = ByHand()
    first, second = one.disc(5), one.disc(5, right=1)
    logit, score, source = one.fuse(("point", first, 0.8), ("superpixel", second, 0.6))
    assert source == "merged"
    vote = np.where(one.region, edp_sam._VOTE, -edp_sam._VOTE)
    np.testing.assert_allclose(logit, (first + second) / 2 + vote + edp_sam._DOUBT)
    # The score is the better one's; the more they agree, the higher.
    closer = one.fuse(("point", first, 0.8), ("superpixel", first, 0.6))[1]
    assert 0.4 * 0.8 < score <= closer <= 0.8


def test_of_two_prompts_that_disagree_the_better_one_stands_as_it_is():
    one = ByHand()
    large, small = one.disc(6), one.disc(3)  # IoU 1/4
    for qualities, found, kept in (((0.9, 0.3), "point", large), ((0.3, 0.9), "superpixel", small)):
        logit, _, source = one.fuse(
            ("point", large, qualities[0]), ("superpixel", small, qualities[1]), scale=None)
        assert source == found
        np.testing.assert_allclose(logit, kept + edp_sam._DOUBT)


def test_the_point_candidate_is_merged_that_agrees_best_with_the_superpixels():
    one = ByHand()
    logit, _, source = one.fuse(
        ("point", one.disc(12), 0.7), ("point", one.disc(5), 0.7), ("point", one.disc(2), 0.7),
        ("superpixel", one.disc(5), 0.7), scale=None)
    assert source == "merged" and ((logit > 0) == (one.disc(5) > 0)).mean() > 0.95


@pytest.mark.parametrize("scale,radius", [(5.0, 5), (10.0, 10), (None, 10)])
def test_a_mask_of_a_size_that_no_head_has_loses(scale, radius):
    one = ByHand()
    logit, _, source = one.fuse(("point", one.disc(5), 0.8), ("point", one.disc(10), 0.9),
                                  scale=scale, superpixels=False)
    assert source == "point"
    np.testing.assert_allclose(logit, one.disc(radius) + edp_sam._DOUBT)


def test_a_mask_beside_its_head_loses_to_a_much_less_certain_one_that_holds_it():
    one = ByHand()
    beside, around = one.disc(4, right=9), one.disc(4)
    logit, score, _ = one.fuse(("point", beside, 0.9), ("point", around, 0.3),
                                 scale=4.0, superpixels=False)
    np.testing.assert_allclose(logit, around + edp_sam._DOUBT)
    assert score == pytest.approx(0.3, rel=0.1)
    alone = one.fuse(("point", beside, 0.9), scale=4.0, superpixels=False)[1]
    assert alone == pytest.approx(0.09, rel=0.1)  # a tenth of what it would score on its head


def test_a_candidate_below_the_floor_is_not_merged_and_an_empty_one_scores_nothing():
    one = ByHand()
    disc = one.disc(5)
    logit, _, source = one.fuse(("point", disc, 0.8), ("superpixel", disc, 0.01))
    assert source == "point"
    np.testing.assert_allclose(logit, disc + edp_sam._DOUBT)
    assert one.fuse(("point", disc * 0 - 1, 1.0), superpixels=False)[1] == 0


@pytest.mark.parametrize("quality,failed", [(0.5 * edp_sam._FLOOR, True), (0.5, False)])
def test_a_head_whose_candidates_are_below_the_floor_gets_a_disc(quality, failed):
    points = np.array([[30.0, 40.0], [70.0, 40.0]])

    class Unsure(ClassicalSegmenter):
        def predict(self, prompts, head, pixel):
            y, x = np.divmod(pixel, 100)
            away = np.hypot(x - points[head, 0], y - points[head, 1])
            count = 3 if prompts.multimask else 1
            found = np.clip(8 - away, -5, 5).astype(np.float32)
            return (np.stack([found] * count),
                    np.full((len(prompts), count), quality, np.float32))

    labels, table = generate_masks(picture((80, 100)), points, Unsure(), superpixel_prompt=False)
    assert (table["source"] == "disc").eq(failed).all()
    assert table["flags"].str.contains("failed").eq(failed).all()
    assert (table["area"] > 0).all() and set(np.unique(labels)) == {0, 1, 2}


def test_an_isolated_head_is_judged_by_its_row_not_by_its_circle():
    grid = np.stack(np.meshgrid(np.arange(10, 100, 10.0), np.arange(60, 100, 10.0)), -1)
    points = np.concatenate([grid.reshape(-1, 2), [[300.0, 80.0]]])
    radii = nnec.exclusion_radii(points, (200, 400))
    scale = local_head_radius(points, radii, (200, 400))
    assert radii[-1] == 100 and scale[-1] < 6


def test_the_check_names_what_is_wrong():
    points, radii = np.array([[4.0, 4.0], [12.0, 4.0]]), np.array([3.0, 3.0])
    labels = np.zeros((9, 17), np.int32)
    labels[4, 3:6] = 1
    check_label_map(labels, points, radii)
    for (row, column, value), found in {
        (4, 8, 1): "outside their head's circle", (4, 7, 0): None, (2, 4, 1): "2 unconnected",
        (4, 12, 3): "values 0..3 for 2 points",
    }.items():
        wrong = labels.copy()
        wrong[row, column] = value
        if found is None:
            check_label_map(wrong, points, radii)
        else:
            with pytest.raises(ValueError, match=found):
                check_label_map(wrong, points, radii)


@pytest.mark.parametrize("by_size, distance, asked", [
    (False, 60, 1),  # sees no more of a head whose size is known better
    (True, 60, 2),  # heads far apart: their distance says too large a size
    (True, 15, 1),  # a crowd: their distance says it well
])
def test_a_segmenter_of_enlarged_crops_is_asked_again_when_sizes_change(by_size, distance, asked):
    class Listening(ClassicalSegmenter):
        crops_by_size, sizes = by_size, []

        def predict(self, prompts, head, pixel):
            if prompts.boxes is None:
                self.sizes.append(prompts.sizes)
            radius = 6.0  # every head is a disc of 6 px, whatever it looks like
            y, x = np.divmod(pixel, 200)
            away = np.hypot(x - points[head, 0], y - points[head, 1])
            found = np.clip(radius - away, -5, 5).astype(np.float32)
            count = 3 if prompts.multimask else 1
            return np.stack([found] * count), np.full((len(prompts), count), 0.9, np.float32)

    grid = np.arange(distance / 2, 200, distance)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    listening = Listening()
    generate_masks(picture((200, 200), 0), points, listening)
    assert len(listening.sizes) == asked
    if asked == 2:
        before, after = (np.abs(np.log(np.median(one) / 6)) for one in listening.sizes)
        assert after < before


# -- head sizes as a further prompt ----------------------------------------------------------

def test_annotated_head_sizes_tell_the_size_and_may_be_missing():
    image, points, truth = crowd_with_truth()
    sizes = np.tile([12.0, 15.0], (len(points), 1))
    sizes[3] = 0  # not annotated
    labels, table = generate_masks(image, points, ClassicalSegmenter(), boxes=sizes)
    check_invariants(labels, table, points, truth.shape,
                     nnec.exclusion_radii(points, truth.shape))
    assert (table["area"] > 0).all()
    wrong = generate_masks(image, points, ClassicalSegmenter(), boxes=sizes * 0.4)[0]
    known = np.arange(len(points)) != 3
    area = np.bincount(labels.ravel())[1:][known].mean()
    assert np.bincount(wrong.ravel(), minlength=len(points) + 1)[1:][known].mean() < area
    with pytest.raises(ValueError, match=r"boxes: shape \(2, 2\) for 24 heads"):
        generate_masks(image, points, ClassicalSegmenter(), boxes=sizes[:2])
    # Sizes that nobody knows change nothing.
    unknown = generate_masks(image, points, ClassicalSegmenter(), boxes=sizes * np.nan)[0]
    assert (unknown == generate_masks(image, points, ClassicalSegmenter())[0]).all()
