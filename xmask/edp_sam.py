"""EDP-SAM, exclusion-constrained dual-prompt SAM: head points -> exclusive instance label map.

Implements the mask generation of the paper (its section on EDP-SAM). Known from the paper: each
head prompts the Segment Anything Model twice, with its point and with the superpixel around it,
and the nearest-neighbour exclusion circle cuts leakage between persons. The rest is our reading:

1. Every head gets its circle C_i (radius r_i), and from the circles of heads at similar height
   in the image a robust local head radius s_i: an isolated head has a huge circle, not a huge
   head. Masks are looked for inside C_i and within 4 s_i.
2. Point prompt: the head as positive point, its nearest neighbours as negative points, three
   candidate masks. Their sizes, over all heads at similar height, correct s_i by vote; if that
   moves s_i a lot, a segmenter that enlarges crops by s_i is asked once more.
   Superpixel prompt: SLIC at up to three scales that follow s_i, finer than a head, because
   hair and face rarely fall into one superpixel; the superpixels around the head, cut to C_i,
   give a box, prompted together with the same points.
3. A candidate's score is the segmenter's predicted IoU, times agreement with the other prompt,
   times plausibility of its size against s_i, times whether it holds the head.
4. Two prompts that agree are merged (mean logits, and the superpixels vote); else the better one
   stands. The doubtful pixels at the rim are taken, too: they raise the expected IoU. If no
   candidate is good enough the head gets a disc inside C_i, and the table says so.
5. Contested pixels go to the lowest energy softplus(-logit) + d^2 / r^2, so the map is
   exclusive by construction; each head then keeps the one component connected to it.

Candidates live on the sparse list of (head, pixel) pairs; there is never an N x H x W array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from skimage.color import rgb2lab
from skimage.measure import label as connected_components
from skimage.segmentation import slic

from xmask import nnec as circles
from xmask.segmenters import NEGATIVE, PADDING, POSITIVE, Prompts, Segmenter, check_image

# Where a head's mask comes from. On record, the first two carry the segmenter's name: see
# `source_names`.
SOURCES = ("point", "superpixel", "merged", "disc")
COLUMNS = ["head", "x", "y", "radius", "score", "source", "area", "flags"]

# Raised whenever masks or their records change for the same input: stored ones are made anew.
ALGORITHM = 4

# All constants are ours unless said otherwise, set on drawn scenes (seeds 1000 to 1005).
_WINDOW = 25  # heads at similar image height that tell the local head radius
_QUANTILE = 0.3  # of their circles' radii ...
_SHRINK = 0.44  # ... times this is a head's radius: neighbours in a crowd do not quite touch
_SMALLEST_HEAD, _LARGEST_HEAD = 2.0, 0.08  # px; of min(H, W): limits of the local head radius
REACH = 4.0  # masks are looked for within this many local head radii
# Negative points: at most so many nearest neighbours, within so many r_i; others are measured in
# results/edp_sam/negatives.csv.
NEIGHBOURS = (4, 3.0)
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
    image: np.ndarray,
    points: np.ndarray,
    segmenter: Segmenter,
    *,
    nnec: bool = True,
    point_prompt: bool = True,
    superpixel_prompt: bool = True,
    negatives: bool = True,
    neighbours: tuple[int, float] = NEIGHBOURS,
    size_agreement: bool = True,
    boxes: np.ndarray | None = None,
    compactness: float = 10.0,
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
    points = _check_points(points, shape)
    if len(points) == 0:
        return np.zeros(shape, np.int32), _table(points, *[np.zeros(0)] * 3, [], [])

    radii = circles.exclusion_radii(points, shape)
    limit = radii if nnec else np.minimum(2 * radii, max(0.5 * min(shape), 3.0))
    scale = local_head_radius(points, radii, shape)
    sized = np.zeros(len(points), dtype=bool)
    if boxes is not None:
        boxes, sized = _check_boxes(boxes, len(points))
        known = np.sqrt(boxes[sized].prod(axis=1)) / 2
        scale[sized] = known.clip(_SMALLEST_HEAD, limit[sized])
    head, pixel, squared = _within_reach(points, scale, limit, shape)
    segmenter.set_image(image)
    to_neighbours = radii if negatives else np.zeros_like(radii)
    dots = point_prompts(points, to_neighbours, scale, neighbours)
    candidates: list[tuple[str, np.ndarray, np.ndarray]] = []  # source, logits (M,), score (N,)
    if point_prompt:
        candidates, voted = _point_candidates(segmenter, dots, points, scale, head, pixel)
        if size_agreement:
            voted = np.where(sized, scale, np.minimum(voted, limit))
            moved = float(np.abs(np.log(voted / scale)).mean())
            scale = voted
            if segmenter.crops_by_size and moved > _MOVED:
                head, pixel, squared = _within_reach(points, scale, limit, shape)
                dots = point_prompts(points, to_neighbours, scale, neighbours)
                candidates, voted = _point_candidates(
                    segmenter, dots, points, scale, head, pixel)
                scale = np.where(sized, scale, np.minimum(voted, limit))
        if sized.any():
            prompts = replace(dots, sizes=scale)
            candidates += _sized_candidates(segmenter, prompts, boxes, sized, head, pixel)
    region = None
    if superpixel_prompt:
        region = superpixel_regions(image, points, scale, head, pixel, compactness=compactness)
        prompts = superpixel_prompts(
            replace(dots, sizes=scale), head[region], pixel[region], shape)
        logits, predicted = segmenter.predict(prompts, head, pixel)
        candidates += [("superpixel", *one) for one in zip(logits, predicted.T)]

    logit, score, source = choose(
        candidates, region, scale if size_agreement else None, head, squared)

    failed = score < _FLOOR
    source = np.where(failed, "disc", source)
    on_record = dict(zip(SOURCES, source_names(segmenter)))
    disc = np.minimum(scale, 0.5 * limit)
    in_disc = 4.0 * (1 - np.sqrt(squared) / np.maximum(disc, 1.0)[head])
    logit = np.where(failed[head], in_disc, logit)

    labels = _assign(logit, points, scale, limit, head, pixel, squared, shape)
    area = np.bincount(labels.ravel(), minlength=len(points) + 1)[1:]
    check_label_map(labels, points, limit)
    flags = _flags(labels, points, limit, failed, area)
    return labels, _table(points, radii, score, area, [on_record[one] for one in source], flags)


def _within_reach(
    points: np.ndarray, scale: np.ndarray, limit: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The incidences in which masks are looked for: head, pixel, squared distance (px^2), (M,)."""
    reach = np.minimum(limit, np.maximum(REACH * scale, 3.0))
    head, pixel = circles.incidence(points, reach, shape)
    kept = circles.split_coincident(points, head, pixel, shape)
    head, pixel = head[kept], pixel[kept]
    return head, pixel, _squared_distance(points, head, pixel, shape)


def _point_candidates(
    segmenter: Segmenter, dots: Prompts, points: np.ndarray, scale: np.ndarray, head: np.ndarray,
    pixel: np.ndarray,
) -> tuple[list[tuple[str, np.ndarray, np.ndarray]], np.ndarray]:
    """What the segmenter answers to the point prompts, and the head radii (N,), px, that the
    sizes of its masks vote for."""
    logits, predicted = segmenter.predict(replace(dots, sizes=scale), head, pixel)
    radius = np.stack([_mask_radius(one > 0, head, len(points)) for one in logits])
    voted = _voted_scale(points, scale, radius, predicted.T**2 * (radius > 0))
    return [("point", *one) for one in zip(logits, predicted.T)], voted


def source_names(segmenter: Segmenter) -> tuple[str, ...]:
    """What the table's source says for masks of this segmenter, in the order of SOURCES.

    One prompt alone answered: "<name>-point" or "<name>-superpixel", with the segmenter's name
    ("sam" for every Segment Anything model, "classical" for the one without a network), so that
    a record never claims a network that was not there. Both answered and agreed: "merged".
    Neither was good enough: "disc".
    """
    return (*(f"{segmenter.name}-{prompt}" for prompt in SOURCES[:2]), *SOURCES[2:])


def local_head_radius(
    points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """How large a head is about here, in pixels, from the points alone: (N,) float64.

    Perspective makes heads at the same height in the image about equally large, and in a crowd
    the tighter pairs stand about a head apart: a low quantile of r over the heads at similar
    height. r_i itself would be far too large for isolated heads.
    """
    count = len(points)
    window = min(_WINDOW, count)
    order = np.argsort(points[:, 1], kind="stable")
    windows = np.lib.stride_tricks.sliding_window_view(radii[order], window)
    quantile = np.quantile(windows, _QUANTILE, axis=1)
    local = np.empty(count)
    local[order] = quantile[(np.arange(count) - window // 2).clip(0, count - window)]
    # A head is no larger than its own circle: the other one of a close pair is as near as r_i.
    largest = max(_LARGEST_HEAD * min(shape), _SMALLEST_HEAD)
    return np.minimum(_SHRINK * local, np.maximum(radii, 3.0)).clip(_SMALLEST_HEAD, largest)


def superpixel_regions(
    image: np.ndarray, points: np.ndarray, scale: np.ndarray,
    head: np.ndarray, pixel: np.ndarray, *, compactness: float = 10.0,
) -> np.ndarray:
    """Which incidences lie in the superpixels of their head: (M,) bool.

    The superpixels of a head are the one that holds it and those whose middle is within the
    head's local radius `scale`. Heads are grouped by octave of that radius, at most three
    groups, and each group reads its own SLIC, with superpixels a little smaller than its heads.
    Coarse superpixels are computed on a smaller image: cost does not grow with their size.
    """
    height, width = image.shape[:2]
    lab = rgb2lab(image).astype(np.float32)
    octave = np.floor(np.log2(scale))
    octave = np.maximum(octave, octave.max() - _SLIC_SCALES + 1)
    column, row = _home(points, (height, width))
    region = np.zeros(len(head), dtype=bool)
    y, x = np.divmod(pixel, width)
    for one in np.unique(octave):
        members = octave == one
        spacing = _SLIC_SPACING * float(np.median(scale[members]))
        shrink = max(1, int(spacing // _SLIC_PIXELS))
        small = gaussian_filter(lab, (shrink / 2, shrink / 2, 0)) if shrink > 1 else lab
        small = np.ascontiguousarray(small[shrink // 2::shrink, shrink // 2::shrink])
        if small.size == 0:
            small = lab[:1, :1]
        # scikit-image stretches its input to 0..1; the same factor on the compactness keeps it
        # in units of Lab.
        stretch = max(float(np.ptp(small)), 1e-6)
        regions = slic(
            small, n_segments=max(1, round(height * width / spacing**2)),
            compactness=compactness / stretch, max_num_iter=_SLIC_STEPS, convert2lab=False)
        rows = np.minimum(np.arange(height) // shrink, small.shape[0] - 1)
        columns = np.minimum(np.arange(width) // shrink, small.shape[1] - 1)
        at_head = regions[rows[row], columns[column]]
        mine = members[head]
        own = regions[rows[y[mine]], columns[x[mine]]]
        # Middle of every superpixel, in pixels of the image.
        size = np.bincount(regions.ravel())
        grid_y, grid_x = np.indices(regions.shape)
        middle = [
            (np.bincount(regions.ravel(), grid.ravel()) / np.maximum(size, 1) + 0.5) * shrink - 0.5
            for grid in (grid_x, grid_y)]
        away = np.hypot(*(middle[axis][own] - points[head[mine], axis] for axis in (0, 1)))
        region[mine] = (own == at_head[head[mine]]) | (away <= _SLIC_NEAR * scale[head[mine]])
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
    pixel = np.flatnonzero(label_map)
    owner = label_map.ravel()[pixel].astype(np.int64) - 1
    squared = _squared_distance(points, owner, pixel, label_map.shape)
    outside = squared > np.asarray(radii, dtype=np.float64)[owner] ** 2
    if outside.any():
        first = owner[outside.argmax()]
        raise ValueError(
            f"label map: {int(outside.sum())} pixels lie outside their head's circle, the first "
            f"of head {first + 1} at {points[first].tolist()} with radius {radii[first]:.2f} px")
    pieces = connected_components(label_map, background=0, connectivity=1)
    _, at = np.unique(pieces.ravel()[pixel], return_index=True)
    count = np.bincount(owner[at], minlength=len(points))
    if (count > 1).any():
        first = int(count.argmax())
        raise ValueError(
            f"label map: head {first + 1} has {count[first]} unconnected pieces, expected one")


# -- prompts ---------------------------------------------------------------------------------

def point_prompts(
    points: np.ndarray, radii: np.ndarray, scale: np.ndarray,
    neighbours: tuple[int, float] = NEIGHBOURS,
) -> Prompts:
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
        distance, neighbour = cKDTree(points).query(points, k=wanted + 1)
        # Among coincident heads the query may name the head itself at any rank: distances of
        # less than a pixel are no negatives, whoever they belong to.
        near = (distance >= 1) & (distance <= within * radii[:, None])
        coordinates[:, 1:] = np.where(near[:, 1:, None], points[neighbour[:, 1:]], points[:, None])
        labels[:, 1:][near[:, 1:]] = NEGATIVE
    return Prompts(coordinates, labels, multimask=True, sizes=scale)


def superpixel_prompts(
    dots: Prompts, head: np.ndarray, pixel: np.ndarray, shape: tuple[int, int]
) -> Prompts:
    """The prompts `dots`, one mask each, with boxes (N, 4) x0, y0, x1, y1 px around superpixels.

    head, pixel: (M,), the superpixels' incidences; shape: (H, W). A head without a superpixel gets
    a square of its size.
    """
    points, sizes = dots.points[:, 0], dots.sizes[:, None]
    boxes = np.concatenate([points - sizes, points + sizes], axis=1)
    if len(head):
        present, start = np.unique(head, return_index=True)
        y, x = np.divmod(pixel, shape[1])
        boxes[present] = np.stack([
            np.minimum.reduceat(x, start) - 0.5, np.minimum.reduceat(y, start) - 0.5,
            np.maximum.reduceat(x, start) + 0.5, np.maximum.reduceat(y, start) + 0.5], axis=1)
    return replace(dots, boxes=boxes, multimask=False)


def _sized_candidates(
    segmenter: Segmenter, dots: Prompts, boxes: np.ndarray, sized: np.ndarray, head: np.ndarray,
    pixel: np.ndarray,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The candidate that annotated head sizes give; heads without a size have none."""
    points = dots.points[:, 0]
    corners = np.concatenate([points - boxes / 2, points + boxes / 2], axis=1)
    prompts = replace(dots, boxes=corners, multimask=False)
    logits, predicted = segmenter.predict(prompts, head, pixel)
    logits[:, ~sized[head]] = -np.abs(logits[:, ~sized[head]])
    return [("point", logits[0], predicted[:, 0] * sized)]


# -- scoring and merging ---------------------------------------------------------------------

def choose(
    candidates: list[tuple[str, np.ndarray, np.ndarray]], region: np.ndarray | None,
    scale: np.ndarray | None, head: np.ndarray, squared: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each head's mask from its candidates: logit (M,), score (N,), source (N,), one of SOURCES.

    candidates: of every prompt its name ("point" or "superpixel"), logits (M,) and predicted IoU
    (N,). region: (M,) bool, the heads' superpixels, or None. scale: (N,) px, the head radius that
    candidates are judged by, or None. head, squared: (M,) head and squared distance from it.
    """
    count = len(candidates[0][2])
    sources = np.array([source for source, _, _ in candidates])
    masks = [one > 0 for _, one, _ in candidates]
    predicted = np.stack([quality for _, _, quality in candidates])  # (C, N)
    areas = np.stack([np.bincount(head[mask], minlength=count) for mask in masks])
    holds = np.stack([_holds_head(mask, head, squared, count) for mask in masks])

    agreement = np.ones(predicted.shape)
    overlap: dict[tuple[int, int], np.ndarray] = {}
    of_point, of_superpixel = np.flatnonzero(sources == "point"), np.flatnonzero(
        sources == "superpixel")
    for i in of_point:
        for j in of_superpixel:
            overlap[i, j] = _iou(masks[i], masks[j], areas[i], areas[j], head, count)
    if overlap:
        for i in of_point:
            agreement[i] = np.max([overlap[i, j] for j in of_superpixel], axis=0)
        for j in of_superpixel:
            agreement[j] = np.max([overlap[i, j] for i in of_point], axis=0)
    if region is not None:
        region_area = np.bincount(head[region], minlength=count)
        with_region = np.stack([
            _iou(mask, region, area, region_area, head, count)
            for mask, area in zip(masks, areas)])
        agreement = np.maximum(agreement, with_region) if overlap else with_region

    radius = np.sqrt(np.maximum(areas, 0.5) / np.pi)
    base = predicted * (0.4 + 0.6 * agreement) * np.where(holds, 1.0, 0.1) * (areas > 0)
    rows = np.arange(count)
    score = base if scale is None else base * _plausible(radius, scale, _SPREAD)
    best = score.argmax(axis=0)
    source = sources[best]
    chosen = score[best, rows]
    logits = [one for _, one, _ in candidates]
    logit = np.choose(best[head], logits)
    if overlap:
        i = of_point[score[of_point].argmax(axis=0)]
        j = of_superpixel[score[of_superpixel].argmax(axis=0)]
        shared = np.select(
            [(i == a) & (j == b) for a, b in overlap], list(overlap.values()), 0.0)
        merge = (shared >= _AGREE) & (np.minimum(score[i, rows], score[j, rows]) >= _FLOOR)
        mean = (np.choose(i[head], logits) + np.choose(j[head], logits)) / 2
        mean = mean + np.where(region, _VOTE, -_VOTE)
        logit = np.where(merge[head], mean, logit)
        source = np.where(merge, "merged", source)
    return logit + _DOUBT, chosen.clip(0, 1), source


def _mask_radius(mask: np.ndarray, head: np.ndarray, count: int) -> np.ndarray:
    """Radius of the disc as large as each head's mask: (N,) px."""
    return np.sqrt(np.bincount(head[mask], minlength=count) / np.pi)


def _plausible(radius: np.ndarray, expected: np.ndarray, spread: float) -> np.ndarray:
    """1 for a mask as large as expected, falling off in log radius."""
    return np.exp(-0.5 * (np.log(radius / expected) / spread) ** 2)


def _voted_scale(
    points: np.ndarray, scale: np.ndarray, radius: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Local head radius from the sizes of candidate masks: (N,) px.

    radius, weight: (C, N) of the candidates; a weight of 0 does not vote. A head's true outline
    turns up in most candidates of the heads at its height, its wrong outlines at all sizes: the
    most voted size wins. The radius from geometry, `scale`, counts as a broad prior.
    """
    count = len(points)
    log_radius = np.log(np.maximum(radius, 0.5))
    grid = np.linspace(np.log(1.0), np.log(max(4 * scale.max(), 8.0)), _VOTE_BINS)
    votes = np.zeros((count, _VOTE_BINS))
    for one, strength in zip(log_radius, weight):
        votes += strength[:, None] * np.exp(-0.5 * ((grid - one[:, None]) / _VOTE_WIDTH) ** 2)
    order = np.argsort(points[:, 1], kind="stable")
    window = min(_WINDOW, count)
    total = np.concatenate([np.zeros((1, _VOTE_BINS)), np.cumsum(votes[order], axis=0)])
    start = (np.arange(count) - window // 2).clip(0, count - window)
    near = np.empty_like(votes)
    near[order] = total[start + window] - total[start]
    near += _VOTE_OWN * votes
    near *= np.exp(-0.5 * ((grid - np.log(scale)[:, None]) / _VOTE_PRIOR) ** 2)
    # The mean of what lies around the highest bin is finer than a bin.
    best = grid[near.argmax(axis=1)]
    near *= np.exp(-0.5 * ((grid - best[:, None]) / _VOTE_WIDTH) ** 2)
    mass = near.sum(axis=1)
    voted = np.exp((near * grid).sum(axis=1) / np.maximum(mass, 1e-300))
    return np.where(mass > 0, voted, scale)


def _holds_head(mask: np.ndarray, head: np.ndarray, squared: np.ndarray, count: int) -> np.ndarray:
    """Whether the incidence nearest to each head is in the mask: (N,) bool."""
    nearest = np.full(count, np.inf)
    np.minimum.at(nearest, head, squared)
    holds = np.zeros(count, dtype=bool)
    holds[head[mask & (squared == nearest[head])]] = True
    return holds


def _iou(
    a: np.ndarray, b: np.ndarray, area_a: np.ndarray, area_b: np.ndarray,
    head: np.ndarray, count: int,
) -> np.ndarray:
    """IoU per head of two masks given on the incidences: (N,), 0 where both are empty."""
    both = np.bincount(head[a & b], minlength=count)
    return both / np.maximum(area_a + area_b - both, 1)


# -- from logits to a label map --------------------------------------------------------------

def _assign(
    logit: np.ndarray, points: np.ndarray, scale: np.ndarray, limit: np.ndarray,
    head: np.ndarray, pixel: np.ndarray, squared: np.ndarray, shape: tuple[int, int],
) -> np.ndarray:
    """Exclusive, connected label map: (H, W) int32."""
    energy = np.logaddexp(0, -logit.astype(np.float64)) + squared / limit[head] ** 2
    energy[logit <= 0] = np.inf
    # A head keeps the pixels around it that are nearer to it than to any other head, so that no
    # neighbour's mask can swallow it.
    core = np.maximum(_CORE * np.minimum(scale, limit), 1.0)
    in_core = squared <= core[head] ** 2
    owner = circles.lowest_wins(squared[in_core], head[in_core], pixel[in_core], shape).ravel()
    column, row = _home(points, shape)
    _give_pixels(owner, row * shape[1] + column, head, pixel, squared)
    energy[owner[pixel] == head + 1] = -1.0
    energy[(owner[pixel] != head + 1) & (owner[pixel] > 0)] = np.inf
    return keep_connected(circles.lowest_wins(energy, head, pixel, shape), points)


def _give_pixels(
    owner: np.ndarray, home: np.ndarray, head: np.ndarray, pixel: np.ndarray,
    squared: np.ndarray,
) -> None:
    """Give each head without a core pixel the nearest one that costs nobody the last, and rather
    not the pixel `home` (N,) on which its owner stands; in place.

    Only heads crowded into one pixel come here, so this is the one loop over heads.
    """
    size = np.bincount(owner, minlength=len(home) + 1)
    for k in np.flatnonzero(size[1:] == 0):
        mine = slice(*np.searchsorted(head, [k, k + 1]))
        near = pixel[mine][np.argsort(squared[mine], kind="stable")]
        now = owner[near]
        spare = (now == 0) | (size[now] > 1)
        best = spare & ((now == 0) | (home[now - 1] != near))
        for at in near[best if best.any() else spare][:1]:
            size[owner[at]] -= 1
            size[k + 1] += 1
            owner[at] = k + 1


def keep_connected(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Of every instance of a label map (H, W) only the 4-connected piece that comes nearest to its
    head; points: (N, 2) px."""
    pieces = connected_components(labels, background=0, connectivity=1).ravel()
    pixel = np.flatnonzero(pieces)
    piece = pieces[pixel]
    owner = labels.ravel()[pixel].astype(np.int64) - 1
    squared = _squared_distance(points, owner, pixel, labels.shape)
    nearest = np.full(len(points), np.inf)
    np.minimum.at(nearest, owner, squared)
    at_head = squared == nearest[owner]
    kept = np.full(len(points), np.iinfo(np.int64).max)
    np.minimum.at(kept, owner[at_head], piece[at_head])
    result = np.zeros(labels.size, dtype=np.int32)
    stays = piece == kept[owner]
    result[pixel[stays]] = owner[stays] + 1
    return result.reshape(labels.shape)


def _flags(
    labels: np.ndarray, points: np.ndarray, limit: np.ndarray, failed: np.ndarray,
    area: np.ndarray,
) -> list[str]:
    """The words of the table's last column."""
    _, place, sharers = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    pixel = np.flatnonzero(labels)
    owner = labels.ravel()[pixel] - 1
    squared = _squared_distance(points, owner, pixel, labels.shape)
    # A mask whose outer ring (the last pixel inside the circle) is more than a quarter full
    # was cut there; 2 pi r is the ring's area.
    ring = squared > np.maximum(limit - 1, 0)[owner] ** 2
    clipped = np.bincount(owner[ring], minlength=len(points)) > 0.25 * 2 * np.pi * limit
    columns = {
        "coincident": sharers[place.reshape(-1)] > 1, "failed": failed, "clipped": clipped,
        "empty": area == 0}
    return [" ".join(word for word, rows in columns.items() if rows[k])
            for k in range(len(points))]


def _table(
    points: np.ndarray, radii: np.ndarray, score: np.ndarray, area: np.ndarray,
    source: Iterable[str], flags: Iterable[str],
) -> pd.DataFrame:
    return pd.DataFrame({
        "head": np.arange(1, len(points) + 1), "x": points[:, 0], "y": points[:, 1],
        "radius": np.asarray(radii, float), "score": np.asarray(score, float),
        "source": pd.Series(list(source), dtype=object),
        "area": np.asarray(area).astype(np.int64),
        "flags": pd.Series(list(flags), dtype=object),
    }, columns=COLUMNS)


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


def _check_boxes(boxes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) float64 widths and heights, 1 where unknown, and which are known (N,)."""
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.shape != (count, 2):
        raise ValueError(
            f"boxes: shape {boxes.shape} for {count} heads; expected ({count}, 2), width and "
            "height of each")
    known = (np.isfinite(boxes) & (boxes > 0)).all(axis=1)
    return np.where(known[:, None], boxes, 1.0), known


def _home(points: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(column, row) of the pixel each head lies on."""
    height, width = shape
    return (np.rint(points[:, 0]).astype(np.int64).clip(0, width - 1),
            np.rint(points[:, 1]).astype(np.int64).clip(0, height - 1))


def _squared_distance(
    points: np.ndarray, head: np.ndarray, pixel: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """(M,) float64: squared distance of each incidence's pixel from its head."""
    y, x = np.divmod(pixel, shape[1])
    dx, dy = x - points[head, 0], y - points[head, 1]
    return dx * dx + dy * dy
