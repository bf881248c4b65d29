"""The nearest-neighbour exclusion circle (NNEC) and its incidence list: paper section on NNEC.

For heads p_1..p_N of one image, the circle of head i reaches to its nearest neighbour:

    r_i = min over j != i of |p_i - p_j|,      C_i = {u : |u - p_i| <= r_i}

so no other head lies inside it. If a pixel u lies in the circles of i and j, the two heads are
at least as far from each other as either is from u; u then sees them at 60 degrees or more, and
at most five circles cover any pixel (six only on exact ties), however dense the crowd. The
method therefore needs no N x H x W array: a sparse list of (head, pixel) pairs holds everything,
and decoding, losses and mask generation are gathers and segment reductions over that list.

Points are (x, y) in pixels with the origin at the centre of the top-left pixel; a pixel's flat
index is y * W + x. NumPy arrays in give NumPy arrays out; tensors in give tensors out on the
same device. Nothing here loops over heads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree

Array = Any  # np.ndarray or torch.Tensor: what comes in decides what comes out

# Distances held at once when radii are computed on an accelerator (128 MB of float64; ours).
_DISTANCES_AT_ONCE = 1 << 24


def exclusion_radii(
    points: Array, shape: tuple[int, int], min_radius: float = 3.0, *, lone: float = 0.5,
    image: torch.Tensor | None = None,
) -> Array:
    """Radius of every head's exclusion circle, in pixels.

    points: (N, 2) float, (x, y) pixels. shape: (H, W) of the image.
    min_radius: lower clip in pixels (paper: 3). The upper clip is min(H, W) / 2 (paper).
    lone: a single head has no neighbour; its radius is lone * min(H, W)
        (paper: 0.5 in training, 0.25 in decoding).
    image: (N,) int64, the image of each head in a batch of images of one shape, whose heads do
        not see each other; None for one image.
    Returns (N,) float64. Coincident heads are each other's neighbour at distance 0 and get
    `min_radius`; `split_coincident` shares their circle out.
    Raises ValueError if points are not (N, 2) or not finite.
    """
    points, numpy_out = _points(points)
    side = float(min(shape))
    count = len(points)
    if image is not None and count:
        # Images a side apart along a third axis: nobody's nearest neighbour is in another one,
        # and within one the third axis adds exactly nothing.
        apart = points.amax() - points.amin() + side
        points = torch.cat([points, (image * apart)[:, None]], dim=1)
    if count < 2:
        radii = torch.full((count,), lone * side, dtype=torch.float64, device=points.device)
    else:
        radii = _nearest_distance(points)
        if image is not None:
            single = torch.bincount(image).index_select(0, image) == 1
            radii = radii.masked_fill(single, lone * side)
    return _give(radii.clamp(max=0.5 * side).clamp(min=min_radius), numpy_out)


def incidence(points: Array, radii: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Every pixel inside every circle, as a list of (head, pixel) pairs.

    points: (N, 2) float, (x, y) pixels. radii: (N,) float, pixels. shape: (H, W).
    Returns (head, pixel), two (M,) int64 arrays sorted by head, then by pixel: `pixel` is the
    flat index y * W + x of a pixel whose centre is at distance <= radius, decided in float64 as
    dx*dx + dy*dy <= r*r. Circles are cut at the image border; a head may lie outside the image.
    Time and memory are proportional to the number of pairs.
    Raises ValueError if points are not (N, 2), not finite, or radii do not match them.
    """
    points, numpy_out = _points(points)
    head, row, column = incidence_rows(points, radii, shape)
    return _give(head, numpy_out), _give(row.mul_(shape[1]).add_(column), numpy_out)


def incidence_rows(
    points: torch.Tensor, radii: Array, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`incidence` as (head, row, column), three (M,) int64 tensors on the points' device."""
    head, row, first, last = incidence_spans(points, radii, shape)
    span, column = expand(first, last)
    return head.index_select(0, span), row.index_select(0, span), column


def incidence_spans(
    points: torch.Tensor, radii: Array, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`incidence` row by row: (head, row, first, last), four (S,) int64 tensors on the points'
    device, sorted by head, then by row. In that row the circle holds columns first..last; rows of
    which it holds none are left out. `expand` gives the columns one by one."""
    points, _ = _points(points)
    radii = to_tensor(radii)[0].to(points.device, torch.float64).reshape(-1)
    if len(radii) != len(points):
        raise ValueError(f"radii: {len(radii)} values for {len(points)} points; give one each")
    height, width = shape
    x, y, squared = points[:, 0], points[:, 1], radii * radii

    # Rows first, one wider on each side than the circle: the test below is the exact one.
    top = (torch.ceil(y - radii) - 1).clamp(0, height).long()
    bottom = (torch.floor(y + radii) + 1).clamp(-1, height - 1).long()
    head, row = expand(top, bottom)
    centre, limit = x.index_select(0, head), squared.index_select(0, head)
    dy = row.double() - y.index_select(0, head)
    dy2 = dy * dy
    half = torch.sqrt((limit - dy2).clamp(min=0))

    # Then the span of columns in each row. Rounding may put an end off by one column, and
    # dx*dx + dy*dy grows with |dx| also in floating point: testing the columns around each end
    # decides the whole span.
    def inside(column: torch.Tensor) -> torch.Tensor:
        return (column - centre).square() + dy2 <= limit

    left = torch.ceil(centre - half) - 1
    right = torch.floor(centre + half) + 1
    for _ in range(2):
        left = torch.where(inside(left), left, left + 1)
        right = torch.where(inside(right), right, right - 1)
    left = torch.where(inside(left), left, right + 1)  # an empty row of the widened box
    first = left.clamp(0, width).long()
    last = right.clamp(-1, width - 1).long()
    held = torch.nonzero(first <= last).squeeze(1)
    return tuple(value.index_select(0, held) for value in (head, row, first, last))


def expand(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All integers of the ranges first[k]..last[k] (both (S,) int64): (range index, integer), two
    (M,) int64 tensors, in order."""
    length = (last - first + 1).clamp(min=0)
    end = torch.cumsum(length, 0)
    total = int(end[-1]) if len(end) else 0
    index = torch.repeat_interleave(length, output_size=total)
    value = torch.arange(total, device=first.device)
    value += (first - end + length).index_select(0, index)
    return index, value


def split_coincident(
    points: Array, head: Array, pixel: Array, shape: tuple[int, int], *,
    image: torch.Tensor | None = None,
) -> Array:
    """Share the circle of heads at exactly the same place among them (our rule).

    Real annotations hold exact duplicates. k coincident heads cut the pixels of their common
    circle, ordered by angle around the head, into k sectors of equal size (to one pixel), given
    out in index order; the pixel exactly at the centre goes to the first. Sectors are equal in
    visible pixels rather than in degrees, so that a circle cut by the image border, too, gives
    every head its part.

    points: (N, 2) float. head, pixel: (M,) int64, an incidence list sorted by head.
    image: (N,) int64, for a batch: only heads of one image share; pixels then count on from
        image to image, (image * H + y) * W + x.
    Returns (M,) bool, True where the pair is kept; heads with a place of their own keep all.
    """
    points, numpy_out = _points(points)
    head = to_tensor(head)[0].to(points.device)
    pixel = to_tensor(pixel)[0].to(points.device)
    keep = torch.ones(len(head), dtype=torch.bool, device=points.device)
    shared_places = _shared_places(points, image)
    if shared_places is None:
        return _give(keep, numpy_out)

    # A head's turn is its rank, by index, among the heads at its place.
    place, sharers = shared_places
    by_place = torch.argsort(place, stable=True)
    first_of_place = torch.cumsum(sharers, 0) - sharers
    turn = torch.empty_like(place)
    index = torch.arange(len(points), device=points.device)
    turn[by_place] = index - first_of_place[place[by_place]]

    share = sharers[place]
    shared = torch.nonzero(share[head] > 1).squeeze(1)
    owner, where = head[shared], pixel[shared]
    dx = (where % shape[1]).double() - points[owner, 0]
    row = torch.div(where, shape[1], rounding_mode="floor") % shape[0]
    dy = row.double() - points[owner, 1]
    angle = torch.atan2(dy, dx) % (2 * math.pi)
    angle = torch.where((dx == 0) & (dy == 0), torch.full_like(angle, -1.0), angle)

    # Sort by head, then angle (two stable sorts), and read off each pair's rank in its circle.
    order = torch.argsort(angle, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    owner = owner[order]
    size = torch.bincount(owner, minlength=len(points))
    start = torch.cumsum(size, 0) - size
    rank = torch.arange(len(owner), device=owner.device) - start[owner]
    sector = torch.div(rank * share[owner], size[owner], rounding_mode="floor")
    keep[shared[order]] = sector == turn[owner]
    return _give(keep, numpy_out)


def split_spans(
    points: torch.Tensor, head: torch.Tensor, row: torch.Tensor, first: torch.Tensor,
    last: torch.Tensor, shape: tuple[int, int], *, image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`split_coincident` of `incidence_spans`: the spans (head, row, first, last) that are kept.

    What heads keep of a circle that they share comes as spans of one pixel. Sorted by head.
    image: (N,) int64, for a batch; rows count within their image.
    """
    places = _shared_places(points, image)
    if places is None:
        return head, row, first, last
    place, sharers = places
    shared = (sharers[place] > 1)[head]
    span, column = expand(first[shared], last[shared])
    owner, y = head[shared][span], row[shared][span]
    keep = split_coincident(points, owner, y * shape[1] + column, shape, image=image)
    owner, y, column = owner[keep], y[keep], column[keep]
    order = torch.argsort(torch.cat([head[~shared], owner]), stable=True)
    return tuple(torch.cat([own[~shared], part])[order] for own, part in (
        (head, owner), (row, y), (first, column), (last, column)))


def _shared_places(
    points: torch.Tensor, image: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(place (N,) int64 of each head, number of heads at each place), or None if no two heads
    (of one image) are at the same place."""
    if len(points) < 2:
        return None
    # Heads at one place agree in any function of it; mostly no two agree, and a sort of one number
    # a head has said so.
    key = points[:, 0] + 0.7548776662466927 * points[:, 1]
    key = (key if image is None else key + image * 1e6).sort().values
    if not bool((key[1:] == key[:-1]).any()):
        return None
    places = points if image is None else torch.cat([points, image[:, None].double()], dim=1)
    _, place, sharers = torch.unique(places, dim=0, return_inverse=True, return_counts=True)
    return None if int(sharers.max()) == 1 else (place, sharers)


def lowest_wins(
    energy: Array, head: Array, pixel: Array, shape: tuple[int, int], threshold: float = math.inf
) -> Array:
    """Exclusive label map: every pixel goes to the head that claims it with the lowest energy.

    energy: (M,) float, one value per pair. head, pixel: (M,) int64, an incidence list.
    threshold: pairs with energy >= threshold claim nothing.
    Returns (H, W) int32: head index + 1, or 0 where nobody claims the pixel. Of equal energies
    the lowest head index wins, so the result does not depend on the order of the list.
    """
    energy, numpy_out = to_tensor(energy)
    energy = energy.detach()
    head, pixel = to_tensor(head)[0].to(energy.device), to_tensor(pixel)[0].to(energy.device)
    height, width = shape
    if energy.dtype == torch.float32:
        labels = _lowest_packed(energy, head, pixel, height * width, threshold)
        return _give(labels.reshape(height, width), numpy_out)
    claims = energy < threshold
    if not bool(claims.all()):
        energy, head, pixel = energy[claims], head[claims], pixel[claims]
    lowest = torch.full((height * width,), math.inf, dtype=energy.dtype, device=energy.device)
    lowest.scatter_reduce_(0, pixel, energy, "amin")
    won = energy == lowest[pixel]
    nobody = torch.iinfo(torch.int32).max
    winner = torch.full((height * width,), nobody, dtype=torch.int32, device=energy.device)
    winner.scatter_reduce_(0, pixel[won], head[won].to(torch.int32), "amin")
    labels = torch.where(winner == nobody, torch.zeros_like(winner), winner + 1)
    return _give(labels.reshape(height, width), numpy_out)


def _lowest_packed(
    energy: torch.Tensor, head: torch.Tensor, pixel: torch.Tensor, pixels: int, threshold: float
) -> torch.Tensor:
    """(pixels,) int32 labels of `lowest_wins` for float32 energies, by one scatter.

    Energy and head are packed into one int64, whose order is that of (energy, head): the bits of
    a float, read as an integer, are in order once those of negative floats are turned over.
    """
    limit = np.float32(threshold)
    if float(limit) < threshold:  # the smallest float32 that is not below the threshold
        limit = np.nextafter(limit, np.float32(math.inf))
    limit = int((limit + np.float32(0)).view(np.int32))
    limit ^= 0x7FFFFFFF if limit < 0 else 0
    # NaN claims nothing, as infinity; and -0 becomes 0, they are equal energies.
    bits = torch.nan_to_num(energy, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    bits = bits.add_(0.0).view(torch.int32)
    if len(bits) and int(bits.amin()) < 0:
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = bits.long().bitwise_left_shift_(32).bitwise_or_(head)
    # To start with, just below the threshold with any head, and with -1 for a head.
    lowest = torch.full((pixels,), (limit << 32) - 1, device=energy.device)
    lowest.scatter_reduce_(0, pixel, key, "amin")
    return lowest.to(torch.int32).add_(1)  # of 64 bits the lower half stays, the head


def _nearest_distance(points: torch.Tensor) -> torch.Tensor:
    """(N,) float64 distance of every point to its nearest other point, N >= 2, in 2 or 3 axes."""
    if points.device.type == "cpu":
        tree = cKDTree(points.numpy(), balanced_tree=False, compact_nodes=False)
        distance, _ = tree.query(points.numpy(), k=2)
        return torch.from_numpy(np.ascontiguousarray(distance[:, 1]))
    return _nearest_by_slabs(points)


def _nearest_by_slabs(points: torch.Tensor) -> torch.Tensor:
    """The same by brute force, for an accelerator: it stays there, in slabs of bounded memory,
    and takes differences, since a matrix product would lose the last digits."""
    slab = max(1, _DISTANCES_AT_ONCE // len(points))
    nearest = []
    for start in range(0, len(points), slab):
        part = points[start:start + slab]
        distance = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.arange(len(part), device=points.device)
        distance[rows, rows + start] = math.inf
        nearest.append(distance.amin(dim=1))
    return torch.cat(nearest)


def _points(points: Array) -> tuple[torch.Tensor, bool]:
    """(N, 2) float64 tensor of the points, and whether they came as NumPy."""
    points, numpy_out = to_tensor(points)
    if points.numel() == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f"points: expected an (N, 2) array of (x, y), found shape {tuple(points.shape)}")
    points = points.detach().double()
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points: some coordinates are NaN or infinite; remove those points")
    return points, numpy_out


def to_tensor(value: Array) -> tuple[torch.Tensor, bool]:
    """(tensor, was it NumPy?) of an array of any shape: no copy where memory can be shared."""
    if isinstance(value, torch.Tensor):
        return value, False
    value = np.ascontiguousarray(value)
    # A read-only array cannot be shared with torch: one copy.
    return torch.from_numpy(value if value.flags.writeable else value.copy()), True


def _give(value: torch.Tensor, numpy_out: bool) -> Array:
    return value.numpy() if numpy_out else value
