"""EDP-SAM, exclusion-constrained dual-prompt SAM: head points -> exclusive instance label map.

Implements the mask generation of the paper (its section on EDP-SAM). Known from the paper: each
head prompts the Segment Anything Model twice, with its point and with the superpixel around it,
and the nearest-neighbour exclusion circle cuts leakage between persons. The rest is our reading:

1. Every head gets its circle C_i (radius r_i), and from how the crowd stands a local head radius
   s_i: an isolated head has a huge circle, not a huge head. Masks lie in C_i and within 4 s_i.
2. Point prompt: the head as positive point, its nearest neighbours as negative points, three
   candidate masks. Their sizes, over all heads at similar height, correct s_i by vote; if that
   moves s_i a lot, a segmenter that enlarges crops by s_i is asked once more.
   Superpixel prompt: SLIC at up to three scales that follow s_i, finer than a head, because hair
   and face rarely fall into one; the superpixels around the head give a box beside the points.
3. A candidate's score is the segmenter's predicted IoU, times agreement with the other prompt,
   times plausibility of its size against s_i, times whether it holds the head.
4. Two prompts that agree are merged (mean logits, and the superpixels vote); else the better one
   stands. The doubtful pixels at the rim are taken, too: they raise the expected IoU. If no
   candidate is good enough the head gets a disc inside C_i, and the table says so.
5. Contested pixels go to the lowest energy softplus(-logit) + d^2 / r^2, so the map is
   exclusive by construction; each head then keeps the one component connected to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree
from skimage.color import rgb2lab
from skimage.measure import label as connected_components
from skimage.segmentation import slic

from xmask import nnec as geometry
from xmask.nnec import Incidence
from xmask.segmenters import NEGATIVE, PADDING, POSITIVE, Prompts, Segmenter, check_image

# Where a head's mask comes from; `source_names` says what the record says.
SOURCES = ("point", "superpixel", "merged", "disc")
COLUMNS = ["head", "x", "y", "radius", "score", "source", "area", "flags"]

# Raised whenever masks or their records change for the same input: stored ones are made anew.
ALGORITHM = 6

# All constants are ours unless said otherwise, set on drawn scenes (seeds 1000 to 1005).
_WINDOW = 25  # heads at similar image height that tell each other their size
_SMALLEST_HEAD, _LARGEST_HEAD, _LARGEST_ALONE = 2.0, 0.12, 0.08  # px; of min(H, W) twice: limits
_QUANTILE = 0.3  # of log r over these heads: the tighter pairs
_FLAT = 0.06  # of the sum of squared rows, in image heights: how much a slope has to be shown
# log radius of a head = sum over the columns of `crowd_features`. Fitted to the share of heads
# within a factor of 1.5 of their annotated size: 89,425 heads of 232 photographs, odd-numbered ones
# of NWPU-Crowd's validation set, and a tenth as much drawn scenes. results/edp_sam/README.md says
# what cross-validation gives; the columns were chosen on the same photographs.
_HEAD_SIZE = {
    "log r": 1.0, "one": -0.972, "0.3 quantile of log r in the row": 0.739,
    "log of the image's shorter side": -0.422, "line through log r over y": 0.394,
    "0.8 quantile of log r": 0.244, "standard deviation of log r": 0.576,
    "slope of that line": 0.053, "mean direction of the nearest neighbour, 1 = below": 1.199,
    "(row - side + 3.5)²": 0.054, "log N (row - side)": -0.028}
REACH = 4.0  # masks are looked for within this many local head radii
NEIGHBOURS = (4, 3.0)  # as negative points: at most so many, within so many r_i (negatives.csv)
_SLIC_SCALES, _SLIC_STEPS = 3, 5
_SLIC_SPACING = 0.8  # distance of superpixel centres, in local head radii
_SLIC_NEAR = 1.0  # superpixels whose middle is within this many local head radii form the prompt
_SLIC_PIXELS = 8  # coarser superpixels are computed on a smaller image, so many px apart there
_VOTE_BINS, _VOTE_WIDTH = 64, 0.2  # of log radius: how finely sizes are told apart
_VOTE_OWN = 6.0  # further votes of a head in its own matter: people need not stand in rows
_VOTE_PRIOR = 0.6  # of log radius: how far the head radius from geometry is trusted
_SPREAD = 0.4  # of log radius: how sharply a candidate's size is judged
_AGREE = 0.4  # IoU of two prompts' masks from which they are merged
_VOTE = 0.7  # logit that the superpixels themselves add to a merged mask, or take away outside
# Logit added to every mask. A pixel raises the expected IoU of a mask if it is more likely on the
# object than J / (1 + J), J the IoU reached: at 0.76 that is 0.43, not one half. Tried 0 to 1.5 on
# drawn scenes (seeds 5000000 to 5000008), for both segmenters; at 0.5 nearly all is gained.
_DOUBT = 0.5
# Mean change of log radius by the vote from which a segmenter whose crops follow the heads' sizes
# is asked again: in sparse scenes distances between heads say little of their size. Tried on drawn
# scenes of 20 to 35 people (seeds 5300000 to 5300008, bundled): mean IoU 0.69 before, 0.75 after.
_MOVED = 0.15
_FLOOR = 0.02  # a lower score is a failure: disc
_CORE = 0.35  # of the local head radius: never given to another head unless that one is nearer


def generate_masks(
    image: np.ndarray, points: np.ndarray, segmenter: Segmenter, *, nnec: bool = True,
    point_prompt: bool = True, superpixel_prompt: bool = True, negatives: bool = True,
    neighbours: tuple[int, float] = NEIGHBOURS, size_agreement: bool = True,
    boxes: np.ndarray | None = None, compactness: float = 10.0,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Instance masks of the heads of one image.

    image: (H, W, 3) uint8, RGB. points: (N, 2) float, (x, y) pixels, inside the image; N may
        be 0.
    segmenter: from `xmask.segmenters.open_segmenter`.
    nnec: cut masks at the exclusion circle; False is the paper's ablation: masks may reach
        twice as far, and still do not overlap.
    point_prompt, superpixel_prompt: which of the two prompts to use (ablations), at least one.
        Without the point prompt the local head radius rests on geometry alone.
    negatives: whether a head's neighbours are negative points of its prompts (ablation).
    neighbours: how many of them at most, the nearest, and within how many r_i.
    size_agreement: whether heads at similar height tell each other their size: the vote on the
        local head radius, and candidates judged by it (ablation).
    boxes: (N, 2) float, width and height of each head as annotated, where a data set has them
        (JHU-CROWD++): they tell the head's size, and with the point they make one more prompt,
        whose candidate counts as the point's. A head without a size (0 or NaN) does without.
    compactness: of SLIC in Lab; higher makes squarer superpixels (scikit-image's default is 10).

    Returns the label map, (H, W) int32 with value k on the pixels of points[k - 1] and 0 on the
    background, and a table with one row per head: head (k), x, y, radius (r_i, px), score (the
    confidence, 0..1), source (one of `source_names`, with a SAM "sam-point", "sam-superpixel",
    "merged" or "disc"), area (px), flags ("" or words separated by a space: "coincident", shares
    its place with another head; "failed", no candidate was good enough; "clipped", more than a
    quarter of the mask's outline lies on the circle; "empty", there was no pixel left for it).
    Raises ValueError for an image or points that are not as described.
    """
    check_image(image)
    if not (point_prompt or superpixel_prompt):
        raise ValueError("prompts: both are switched off; switch on point_prompt or "
                         "superpixel_prompt")
    shape = image.shape[:2]
    points, none = _check_points(points, shape), np.zeros(0)
    if len(points) == 0:
        return np.zeros(shape, np.int32), _table(points, none, none, none, [], [])
    boxes, known = _check_boxes(boxes, len(points))
    radii = geometry.exclusion_radii(points, shape)
    limit = radii if nnec else np.minimum(2 * radii, max(0.5 * min(shape), 3.0))
    scale = local_head_radius(points, radii, shape)
    scale[known] = (np.sqrt(boxes[known].prod(axis=1)) / 2).clip(_SMALLEST_HEAD, limit[known])

    segmenter.set_image(image)
    prompts = point_prompts(points, radii if negatives else 0 * radii, scale, neighbours)
    near = _within_reach(points, scale, limit, shape)
    candidates: list[Candidate] = []
    if point_prompt:
        candidates, scale, near = _point_candidates(
            segmenter, prompts, near, limit, known, size_agreement)
        prompts = replace(prompts, sizes=scale)
        if known.any():
            candidates.append(_box_candidate(segmenter, prompts, near, boxes, known))
    region = None
    if superpixel_prompt:
        region = superpixel_regions(image, points, scale, near, compactness=compactness)
        candidates += ask(segmenter, "superpixel", superpixel_prompts(
            prompts, near.select(region)), near)
    logit, score, source = fuse_candidates(
        candidates, region, scale if size_agreement else None, near)

    failed = score < _FLOOR
    disc = np.maximum(np.minimum(scale, 0.5 * limit), 1.0)[near.head]
    logit = np.where(failed[near.head], 4.0 * (1 - np.sqrt(near.squared) / disc), logit)
    labels = _assign(logit, points, scale, limit, near)
    check_label_map(labels, points, limit)
    area = np.bincount(labels.ravel(), minlength=len(points) + 1)[1:]
    on_record = dict(zip(SOURCES, source_names(segmenter)))
    return labels, _table(
        points, radii, score, area, [on_record[one] for one in np.where(failed, "disc", source)],
        _flags(labels, points, limit, failed, area))


class Candidate(NamedTuple):
    """One mask of every head: the prompt it answers, "point" or "superpixel"; logits (M,) at the
    incidences; the IoU that the segmenter predicts for it (N,), 0..1."""

    source: str
    logits: np.ndarray
    predicted: np.ndarray


def ask(segmenter: Segmenter, source: str, prompts: Prompts, near: Incidence) -> list[Candidate]:
    """What a segmenter that has its image answers to prompts, N of one kind: 3 candidates or 1."""
    logits, predicted = segmenter.predict(prompts, near.head, near.pixel)
    return [Candidate(source, one, good) for one, good in zip(logits, predicted.T)]


def _within_reach(points: np.ndarray, scale: np.ndarray, limit: np.ndarray,
                  shape: tuple[int, int]) -> Incidence:
    """The incidences in which masks are looked for."""
    return geometry.circles(points, np.minimum(limit, np.maximum(REACH * scale, 3.0)), shape)


def _point_candidates(segmenter: Segmenter, prompts: Prompts, near: Incidence, limit: np.ndarray,
                      known: np.ndarray, agree: bool
                      ) -> tuple[list[Candidate], np.ndarray, Incidence]:
    """Answers to the point prompts, the local head radii (N,) px that they vote for, where masks
    are looked for from then on. known: (N,) bool, heads of annotated size; agree: vote at all."""
    points, scale = prompts.points[:, 0], np.asarray(prompts.sizes)
    candidates = ask(segmenter, "point", prompts, near)
    if not agree:
        return candidates, scale, near
    for last in (not segmenter.crops_by_size, True):
        before = scale
        voted = np.minimum(_voted_scale(candidates, scale, points, near), limit)
        scale = np.where(known, scale, voted)
        if last or np.abs(np.log(scale / before)).mean() <= _MOVED:
            break
        near = _within_reach(points, scale, limit, near.shape)
        candidates = ask(segmenter, "point", replace(prompts, sizes=scale), near)
    return candidates, scale, near


def source_names(segmenter: Segmenter) -> tuple[str, ...]:
    """What the table's source says for masks of this segmenter, in the order of SOURCES.

    One prompt alone answered: "<name>-point" or "<name>-superpixel", with the segmenter's name
    ("sam" for every Segment Anything model, "classical" for the one without a network), so that
    a record never claims a network that was not there. Both answered and agreed: "merged".
    Neither was good enough: "disc".
    """
    return (*(f"{segmenter.name}-{prompt}" for prompt in SOURCES[:2]), *SOURCES[2:])


def local_head_radius(points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How large a head is about here, in pixels, from the points alone: (N,) float64.

    points: (N, 2) px; radii: (N,) px, of the circles; shape: (H, W).
    Half the distance to the nearest neighbour is a head's size only where heads touch. How far
    apart they stand is told by the crowd: `crowd_features`, weighted by `_HEAD_SIZE`.
    """
    logarithm = crowd_features(points, radii, shape) @ np.array(list(_HEAD_SIZE.values()))
    # Circles that end at half the image tell nothing of heads: rather small than large.
    largest = np.where(radii < 0.5 * min(shape), _LARGEST_HEAD, _LARGEST_ALONE) * min(shape)
    # A head is no larger than its own circle: the other one of a close pair is as near as r_i.
    return np.minimum(np.exp(logarithm), np.maximum(radii, 3.0)).clip(
        _SMALLEST_HEAD, largest.clip(_SMALLEST_HEAD))


def crowd_features(points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What the points tell of a head's size: (N, 11), a column for each weight of `_HEAD_SIZE`.

    Arguments as for `local_head_radius`. Apart from the first column nothing changes when image
    and points are enlarged together, so the radius grows with them.
    """
    count, own, side = len(points), np.log(radii), np.log(min(shape))
    window = min(_WINDOW, count)
    order = np.argsort(points[:, 1], kind="stable")
    tight = np.quantile(
        np.lib.stride_tricks.sliding_window_view(own[order], window), _QUANTILE, axis=1)
    row = np.empty(count)
    row[order] = tight[(np.arange(count) - window // 2).clip(0, count - window)]
    # Perspective: a line through log r over the image row, held flat where rows hardly differ.
    height = (points[:, 1] - points[:, 1].mean()) / shape[0]
    slope = height @ (own - own.mean()) / (height @ height + _FLAT)
    neighbour = np.asarray(KDTree(points).query(points, k=2)[1])[:, 1].clip(max=count - 1)
    away = np.abs(points[neighbour] - points)
    columns = (
        own, 1, row - own, side - own, own.mean() + slope * height - own,
        np.quantile(own, 0.8) - own, own.std(), abs(slope),
        np.arctan2(away[:, 1], away[:, 0]).mean() / (np.pi / 2),
        (row - side + 3.5) ** 2, np.log(count) * (row - side))
    return np.stack([np.broadcast_to(one, count) for one in columns], axis=1)


def superpixel_regions(image: np.ndarray, points: np.ndarray, scale: np.ndarray, near: Incidence,
                       *, compactness: float = 10.0) -> np.ndarray:
    """Which incidences lie in the superpixels of their head: (M,) bool.

    image: (H, W, 3) uint8. points: (N, 2) px. scale: (N,) px, local head radii.
    A head's superpixels are the one that holds it and those whose middle is within its local
    radius. Heads form groups by octave of that radius, at most three, and each group reads a SLIC
    of its own part of the image, with superpixels a little smaller than its heads; coarse ones are
    computed on a smaller image.
    """
    lab = rgb2lab(image.astype(np.float32) / 255)
    octave = np.floor(np.log2(scale))
    octave = np.maximum(octave, octave.max() - _SLIC_SCALES + 1)
    places, heads = np.stack(np.divmod(near.pixel, near.shape[1])), points.T[::-1]  # rows, columns
    region = np.zeros(len(near), dtype=bool)
    for one in np.unique(octave[near.head]):
        mine = (octave == one)[near.head]
        head, place = near.head[mine], places[:, mine]
        first, last = place.min(axis=1), place.max(axis=1)
        part = lab[first[0]:last[0] + 1, first[1]:last[1] + 1]
        spacing = _SLIC_SPACING * float(np.median(scale[octave == one]))
        shrink = max(1, int(spacing // _SLIC_PIXELS))
        small = gaussian_filter(part, (shrink / 2, shrink / 2, 0)) if shrink > 1 else part
        row, column = np.minimum(shrink // 2, last - first)
        small = np.ascontiguousarray(small[row::shrink, column::shrink])
        # scikit-image stretches its input to 0..1: the compactness stays in units of Lab
        regions = slic(
            small, n_segments=max(1, round(part[..., 0].size / spacing**2)), convert2lab=False,
            compactness=compactness / max(float(np.ptp(small)), 1e-6), max_num_iter=_SLIC_STEPS)
        own, home = (
            regions[tuple(((at - start) // shrink).clip(0, cells - 1)
                          for at, start, cells in zip(where, first, regions.shape))]
            for where in (place, np.rint(heads).astype(int)))
        # Middle of every superpixel, in pixels of the image.
        size = np.bincount(regions.ravel()).clip(1)
        middle = [(np.bincount(regions.ravel(), grid.ravel()) / size + 0.5) * shrink - 0.5 + start
                  for grid, start in zip(np.indices(regions.shape), first)]
        away = np.hypot(*(there[own] - at[head] for there, at in zip(middle, heads)))
        region[mine] = (own == home[head]) | (away <= _SLIC_NEAR * scale[head])
    return region


def check_label_map(label_map: np.ndarray, points: np.ndarray, radii: np.ndarray) -> None:
    """Raise ValueError unless every instance lies in its circle and is one 4-connected piece.

    label_map: (H, W) int, 0 background, k the instance of points[k - 1]. radii: (N,) px.
    That no pixel has two owners needs no check: a label map cannot express it.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if label_map.min() < 0 or label_map.max() > len(points):
        raise ValueError(
            f"label map: values {label_map.min()}..{label_map.max()} for {len(points)} points; "
            f"expected 0..{len(points)}")
    pixel, owner, squared = _owned(label_map, points)
    outside = squared > np.asarray(radii, dtype=np.float64)[owner] ** 2
    if outside.any():
        first = owner[outside.argmax()]
        raise ValueError(
            f"label map: {int(outside.sum())} pixels lie outside their head's circle, the first "
            f"of head {first + 1} at {points[first].tolist()} with radius {radii[first]:.2f} px")
    pieces = np.asarray(connected_components(label_map, background=0, connectivity=1))
    _, at = np.unique(pieces.ravel()[pixel], return_index=True)
    count = np.bincount(owner[at], minlength=len(points))
    if (count > 1).any():
        first = int(count.argmax())
        raise ValueError(
            f"label map: head {first + 1} has {count[first]} unconnected pieces, expected one")


def point_prompts(points: np.ndarray, radii: np.ndarray, scale: np.ndarray,
                  neighbours: tuple[int, float] = NEIGHBOURS) -> Prompts:
    """The head as positive point, its nearest neighbours as negative points.

    points: (N, 2); radii: (N,) px, of the circles; scale: (N,) px, local head radii; neighbours:
    at most so many, within so many radii.
    """
    count = len(points)
    most, within = neighbours
    wanted = min(most, count - 1)
    coordinates = np.repeat(points[:, None], 1 + wanted, axis=1)
    labels = np.full((count, 1 + wanted), PADDING)
    labels[:, 0] = POSITIVE
    if wanted:
        distance, neighbour = map(np.asarray, KDTree(points).query(points, k=wanted + 1))
        # Among coincident heads the query may name the head itself at any rank: distances of
        # less than a pixel are no negatives, whoever they belong to.
        near = (distance >= 1) & (distance <= within * radii[:, None])
        coordinates[:, 1:] = np.where(near[:, 1:, None], points[neighbour[:, 1:]], points[:, None])
        labels[:, 1:][near[:, 1:]] = NEGATIVE
    return Prompts(coordinates, labels, multimask=True, sizes=scale)


def superpixel_prompts(dots: Prompts, region: Incidence) -> Prompts:
    """The prompts `dots`, one mask each, with boxes (N, 4) x0, y0, x1, y1 px around superpixels.

    region: the incidences in the heads' superpixels. A head without one gets a square of its size.
    """
    points, sizes = dots.points[:, 0], np.asarray(dots.sizes)[:, None]
    boxes = np.concatenate([points - sizes, points + sizes], axis=1)
    if len(region):
        present, start = np.unique(region.head, return_index=True)
        y, x = np.divmod(region.pixel, region.shape[1])
        boxes[present] = np.stack([
            np.minimum.reduceat(x, start) - 0.5, np.minimum.reduceat(y, start) - 0.5,
            np.maximum.reduceat(x, start) + 0.5, np.maximum.reduceat(y, start) + 0.5], axis=1)
    return replace(dots, boxes=boxes, multimask=False)


def _box_candidate(
    segmenter: Segmenter, dots: Prompts, near: Incidence, boxes: np.ndarray, known: np.ndarray
) -> Candidate:
    """The candidate that annotated head sizes give; heads without a size have none."""
    points = dots.points[:, 0]
    corners = np.concatenate([points - boxes / 2, points + boxes / 2], axis=1)
    answer, = ask(segmenter, "point", replace(dots, boxes=corners, multimask=False), near)
    logits = np.where(known[near.head], answer.logits, -np.abs(answer.logits))
    return Candidate("point", logits, answer.predicted * known)


def fuse_candidates(candidates: list[Candidate], region: np.ndarray | None,
                    scale: np.ndarray | None, near: Incidence
                    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each head's mask from its candidates: logit (M,), score (N,), source (N,), one of SOURCES.

    region: (M,) bool, the heads' superpixels, or None. scale: (N,) px, the head radius that
    candidates are judged by, or None.
    """
    sources, logits, predicted = zip(*candidates)
    sources, predicted = np.array(sources), np.stack(predicted)  # (C,), (C, N)
    count = predicted.shape[1]
    masks = [one > 0 for one in logits]
    areas = np.stack([np.bincount(near.head[mask], minlength=count) for mask in masks])
    holds = np.stack([_holds_head(mask, near, count) for mask in masks])
    kinds = [np.flatnonzero(sources == one) for one in SOURCES[:2]]
    overlap = {(i, j): _iou(masks[i], masks[j], areas[i], areas[j], near.head)
               for i in kinds[0] for j in kinds[1]}
    agreement = np.ones(predicted.shape)
    if overlap:  # the best IoU with a candidate of the other prompt
        for mine, k in ((kind, k) for kind in (0, 1) for k in kinds[kind]):
            agreement[k] = np.max([iou for pair, iou in overlap.items() if pair[mine] == k], axis=0)
    if region is not None:
        region_area = np.bincount(near.head[region], minlength=count)
        with_region = np.stack([_iou(mask, region, area, region_area, near.head)
                                for mask, area in zip(masks, areas)])
        agreement = np.maximum(agreement, with_region) if overlap else with_region

    score = predicted * (0.4 + 0.6 * agreement) * np.where(holds, 1.0, 0.1) * (areas > 0)
    if scale is not None:
        radius = np.sqrt(np.maximum(areas, 0.5) / np.pi)
        score = score * np.exp(-0.5 * (np.log(radius / scale) / _SPREAD) ** 2)
    best, rows = score.argmax(axis=0), np.arange(count)
    source, chosen = sources[best], score[best, rows]
    logit = np.choose(best[near.head], logits)
    if overlap and region is not None:  # the superpixel prompt brought both
        i, j = (kind[score[kind].argmax(axis=0)] for kind in kinds)
        shared = np.select([(i == a) & (j == b) for a, b in overlap], list(overlap.values()), 0.0)
        merge = (shared >= _AGREE) & (np.minimum(score[i, rows], score[j, rows]) >= _FLOOR)
        mean = (np.choose(i[near.head], logits) + np.choose(j[near.head], logits)) / 2
        mean = mean + np.where(region, _VOTE, -_VOTE)
        logit = np.where(merge[near.head], mean, logit)
        source = np.where(merge, "merged", source)
    return logit + _DOUBT, chosen.clip(0, 1), source


def _voted_scale(candidates: list[Candidate], scale: np.ndarray, points: np.ndarray,
                 near: Incidence) -> np.ndarray:
    """Local head radius from the sizes of candidate masks: (N,) px.

    A head's true outline turns up in most candidates of the heads at its height, its wrong
    outlines at all sizes: the most voted size wins. The radius from geometry, `scale`, counts as
    a broad prior.
    """
    count = len(points)
    radius = np.stack([np.sqrt(np.bincount(near.head[one.logits > 0], minlength=count) / np.pi)
                       for one in candidates])
    weight = np.stack([one.predicted for one in candidates])**2 * (radius > 0)
    log_radius = np.log(np.maximum(radius, 0.5))
    grid = np.linspace(np.log(1.0), np.log(max(4 * scale.max(), 8.0)), _VOTE_BINS)
    votes = np.zeros((count, _VOTE_BINS))
    for one, strength in zip(log_radius, weight):
        votes += strength[:, None] * np.exp(-0.5 * ((grid - one[:, None]) / _VOTE_WIDTH) ** 2)
    order = np.argsort(points[:, 1], kind="stable")
    window = min(_WINDOW, count)
    total = np.concatenate([np.zeros((1, _VOTE_BINS)), np.cumsum(votes[order], axis=0)])
    start = (np.arange(count) - window // 2).clip(0, count - window)
    local = np.empty_like(votes)
    local[order] = total[start + window] - total[start]
    local += _VOTE_OWN * votes
    local *= np.exp(-0.5 * ((grid - np.log(scale)[:, None]) / _VOTE_PRIOR) ** 2)
    # The mean of what lies around the highest bin is finer than a bin.
    best = grid[local.argmax(axis=1)]
    local *= np.exp(-0.5 * ((grid - best[:, None]) / _VOTE_WIDTH) ** 2)
    mass = local.sum(axis=1)
    voted = np.exp((local * grid).sum(axis=1) / np.maximum(mass, 1e-300))
    return np.where(mass > 0, voted, scale)


def _holds_head(mask: np.ndarray, near: Incidence, count: int) -> np.ndarray:
    """Whether the incidence nearest to each head is in the mask: (N,) bool."""
    nearest = np.full(count, np.inf)
    np.minimum.at(nearest, near.head, near.squared)
    holds = np.zeros(count, dtype=bool)
    holds[near.head[mask & (near.squared == nearest[near.head])]] = True
    return holds


def _iou(a: np.ndarray, b: np.ndarray, area_a: np.ndarray, area_b: np.ndarray, head: np.ndarray
         ) -> np.ndarray:
    """IoU per head of two masks given on the incidences: (N,), 0 where both are empty."""
    both = np.bincount(head[a & b], minlength=len(area_a))
    return both / np.maximum(area_a + area_b - both, 1)


def _assign(
    logit: np.ndarray, points: np.ndarray, scale: np.ndarray, limit: np.ndarray, near: Incidence
) -> np.ndarray:
    """Exclusive, connected label map: (H, W) int32."""
    energy = np.logaddexp(0, -logit.astype(np.float64)) + near.squared / limit[near.head] ** 2
    energy[logit <= 0] = np.inf
    # A head keeps the pixels around it that are nearer to it than to any other head, so that no
    # neighbour's mask can swallow it.
    core = np.maximum(_CORE * np.minimum(scale, limit), 1.0)
    inner = near.select(near.squared <= core[near.head] ** 2)
    owner = inner.lowest_wins(inner.squared).ravel()
    _give_pixels(owner, _home(points, near.shape), near)
    energy[owner[near.pixel] == near.head + 1] = -1.0
    energy[(owner[near.pixel] != near.head + 1) & (owner[near.pixel] > 0)] = np.inf
    return keep_connected(near.lowest_wins(energy), points)


def _give_pixels(owner: np.ndarray, home: np.ndarray, near: Incidence) -> None:
    """Give each head without a core pixel the nearest one that costs nobody the last, and rather
    not the pixel `home` (N,) on which its owner stands; in place.

    Only heads crowded into one pixel come here, so this is the one loop over heads.
    """
    size = np.bincount(owner, minlength=len(home) + 1)
    for k in np.flatnonzero(size[1:] == 0):
        mine = slice(*np.searchsorted(near.head, [k, k + 1]))
        around = near.pixel[mine][np.argsort(near.squared[mine], kind="stable")]
        now = owner[around]
        spare = (now == 0) | (size[now] > 1)
        best = spare & ((now == 0) | (home[now - 1] != around))
        for at in around[best if best.any() else spare][:1]:
            size[owner[at]] -= 1
            size[k + 1] += 1
            owner[at] = k + 1


def keep_connected(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Of every instance of a label map (H, W) only the 4-connected piece that comes nearest to its
    head; points: (N, 2) px."""
    pieces = np.asarray(connected_components(labels, background=0, connectivity=1)).ravel()
    pixel, owner, squared = _owned(labels, points)
    piece = pieces[pixel]
    nearest = np.full(len(points), np.inf)
    np.minimum.at(nearest, owner, squared)
    at_head = squared == nearest[owner]
    kept = np.full(len(points), np.iinfo(np.int64).max)
    np.minimum.at(kept, owner[at_head], piece[at_head])
    result = np.zeros(labels.size, dtype=np.int32)
    stays = piece == kept[owner]
    result[pixel[stays]] = owner[stays] + 1
    return result.reshape(labels.shape)


def _flags(labels: np.ndarray, points: np.ndarray, limit: np.ndarray, failed: np.ndarray,
           area: np.ndarray) -> list[str]:
    """The words of the table's last column."""
    _, place, sharers = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    _, owner, squared = _owned(labels, points)
    # A mask whose outer ring (the last pixel inside the circle) is more than a quarter full
    # was cut there; 2 pi r is the ring's area.
    ring = squared > np.maximum(limit - 1, 0)[owner] ** 2
    clipped = np.bincount(owner[ring], minlength=len(points)) > 0.25 * 2 * np.pi * limit
    columns = {
        "coincident": sharers[place.reshape(-1)] > 1, "failed": failed, "clipped": clipped,
        "empty": area == 0}
    return [" ".join(word for word, rows in columns.items() if rows[k]) for k in range(len(points))]


def _table(points: np.ndarray, radii: np.ndarray, score: np.ndarray, area: np.ndarray,
           source: Iterable[str], flags: Iterable[str]) -> pd.DataFrame:
    return pd.DataFrame({
        "head": np.arange(1, len(points) + 1), "x": points[:, 0], "y": points[:, 1],
        "radius": np.asarray(radii, float), "score": np.asarray(score, float),
        "source": pd.Series(list(source), dtype=object),
        "area": np.asarray(area).astype(np.int64), "flags": pd.Series(list(flags), dtype=object)})


def _check_points(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(N, 2) float64 points, all inside the image; ValueError otherwise."""
    points = np.asarray(points, dtype=np.float64)
    if points.size == 0:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points: expected (N, 2) with (x, y) rows, found shape {points.shape}")
    height, width = shape
    inside = ((points >= -0.5) & (points <= (width - 0.5, height - 0.5))).all(axis=1)
    if not inside.all():
        first = int((~inside).argmax())
        raise ValueError(
            f"points: {int((~inside).sum())} of {len(points)} lie outside the image of "
            f"{width} x {height} px, the first at index {first}: (x, y) = "
            f"({points[first, 0]:g}, {points[first, 1]:g}); clip or remove them")
    return points


def _check_boxes(boxes: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) float64 widths and heights, 1 where unknown, and which are known (N,)."""
    boxes = np.asarray(np.zeros((count, 2)) if boxes is None else boxes, dtype=np.float64)
    if boxes.shape != (count, 2):
        raise ValueError(
            f"boxes: shape {boxes.shape} for {count} heads; expected ({count}, 2), width and "
            "height of each")
    known = np.all(np.isfinite(boxes) & (boxes > 0), axis=1)
    return np.where(known[:, None], boxes, 1.0), known


def _home(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(N,) int64: the pixel each head lies on."""
    column, row = np.rint(points).astype(np.int64).clip(0, np.array(shape[::-1]) - 1).T
    return row * shape[1] + column


def _owned(labels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pixel of a label map that a head owns: its flat index, the owner's index, and the
    squared distance between the two, (M,) int64, int64, float64."""
    pixel = np.flatnonzero(labels)
    owner = labels.ravel()[pixel].astype(np.int64) - 1
    y, x = np.divmod(pixel, labels.shape[1])
    dx, dy = x - points[owner, 0], y - points[owner, 1]
    return pixel, owner, dx * dx + dy * dy
