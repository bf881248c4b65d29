"""The nearest-neighbour exclusion circle (NNEC) and its incidence list: paper section on NNEC.

For heads p_1..p_N of one image, the circle of head i reaches to its nearest neighbour:

    r_i = min over j != i of |p_i - p_j|,      C_i = {u : |u - p_i| <= r_i}

so no other head lies inside it. If a pixel u lies in the circles of i and j, the two heads are
at least as far from each other as either is from u; u then sees them at 60 degrees or more, and
at most five circles cover any pixel, however dense the crowd; only exact ties give more (a hexagon
around u, or a head at u whose circle comes on top of those that end there: seven at most). A sparse
list of (head, pixel) pairs therefore replaces every N x H x W array: decoding, losses and mask
generation are gathers and segment reductions over it.

Points are (x, y) in pixels with the origin at the centre of the top-left pixel; a pixel's flat
index is y * W + x. NumPy arrays in give NumPy arrays out; tensors in give tensors out on the
same device. Nothing here loops over heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

Array = Any  # np.ndarray or torch.Tensor: what comes in decides what comes out

_DISTANCES_AT_ONCE = 1 << 24  # where an accelerator computes radii (128 MB of float64; ours)


def exclusion_radii(points: Array, shape: tuple[int, int], min_radius: float = 3.0, *,
                    lone: float = 0.5, image: torch.Tensor | None = None) -> Array:
    """Radius of every head's exclusion circle, in pixels.

    points: (N, 2) float, (x, y) pixels. shape: (H, W) of the image.
    min_radius: lower clip in pixels (paper: 3). The upper clip is min(H, W) / 2 (paper).
    lone: a single head has no neighbour; its radius is lone * min(H, W)
        (paper: 0.5 in training, 0.25 in decoding).
    image: (N,) int64, the image of each head in a batch of images of one shape, whose heads do
        not see each other; None for one image.
    Returns (N,) float64. Coincident heads are each other's neighbour at distance 0 and get
    `min_radius`; `circles` shares their circle out.
    Raises ValueError if points are not (N, 2) or not finite.
    """
    points, numpy_out = point_tensor(points)
    side, count = float(min(shape)), len(points)
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
    return _as_given(radii.clamp(max=0.5 * side).clamp(min=min_radius), numpy_out)


def equal_radii(radii: torch.Tensor, shape: tuple[int, int], image: torch.Tensor, count: int
                ) -> torch.Tensor:
    """One radius (N,) px for all heads of an image, twice their median exclusion radius, for
    ablations (ours; the release's alternative, the whole image, is not sparse).

    radii: (N,) of `exclusion_radii`, sorted by image. image: (N,) int64 of `count` images.
    """
    crowds = radii.split(torch.bincount(image, minlength=count).tolist())
    typical = torch.stack([r.median() if len(r) else r.new_zeros(()) for r in crowds])
    return (2 * typical).clamp(max=min(shape) / 2)[image]


@dataclass(frozen=True)
class Incidence:
    """The pixels inside the circles of heads, pair by pair, made by `circles`.

    head: (M,) int64, index of the head. pixel: (M,) int64, flat index y * W + x. squared: (M,)
    float64, squared distance of the pixel's centre from the head, px^2. shape: (H, W) of the
    image. All arrays or all tensors; sorted by head, then by pixel.
    """

    head: Array
    pixel: Array
    squared: Array
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.head)

    def select(self, chosen: Array) -> Incidence:
        """Some of the pairs. chosen: (M,) bool, a slice, or int64 indices of pairs."""
        return Incidence(*(one[chosen] for one in (self.head, self.pixel, self.squared)),
                         self.shape)

    def lowest_wins(self, energy: Array, threshold: float = math.inf) -> Array:
        """`lowest_wins` of these pairs: the (H, W) int32 label map of energy (M,)."""
        return lowest_wins(energy, self.head, self.pixel, self.shape, threshold)


class Spans(NamedTuple):
    """Circles row by row, (S,) int64 tensors sorted by head, then by row: in `row` the circle of
    `head` holds the columns first..last, at least one."""

    head: torch.Tensor
    row: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    def select(self, chosen: torch.Tensor) -> Spans:
        """Some of the spans. chosen: (S,) bool or int64 indices of spans."""
        return Spans(*(value[chosen] for value in self))

    def pixels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(head, row, column) of every pixel of the spans, three (M,) int64 tensors, in order."""
        span, column = _integers(self.first, self.last)
        return self.head.index_select(0, span), self.row.index_select(0, span), column


def circles(points: Array, radii: Array, shape: tuple[int, int], *, split: bool = True
            ) -> Incidence:
    """Every pixel inside every circle, with its distance.

    points: (N, 2) float, (x, y) pixels. radii: (N,) float, pixels. shape: (H, W).
    split: heads at exactly the same place share their circle, see `row_spans`; False: each has all.
    A pixel is inside if its centre is at distance <= radius, decided in float64 as
    dx*dx + dy*dy <= r*r. Circles are cut at the image border; a head may lie outside the image.
    Time and memory are proportional to the number of pairs.
    Raises ValueError if points are not (N, 2), not finite, or radii do not match them.
    """
    points, numpy_out = point_tensor(points)
    head, row, column = row_spans(points, radii, shape, split=split).pixels()
    dx, dy = column - points[:, 0][head], row - points[:, 1][head]
    pixel, squared = row.mul_(shape[1]).add_(column), dx.mul_(dx).add_(dy.mul_(dy))
    return Incidence(*(_as_given(one, numpy_out) for one in (head, pixel, squared)), shape)


def incidence(points: Array, radii: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
    """(head, pixel) of `circles` without sharing: every pixel inside every circle, two (M,) int64
    arrays sorted by head, then by pixel. Arguments and errors are those of `circles`."""
    points, numpy_out = point_tensor(points)
    head, row, column = row_spans(points, radii, shape, split=False).pixels()
    return _as_given(head, numpy_out), _as_given(row.mul_(shape[1]).add_(column), numpy_out)


def row_spans(points: Array, radii: Array, shape: tuple[int, int], *, split: bool = True,
              image: torch.Tensor | None = None) -> Spans:
    """The circles row by row, on the points' device; arguments and errors as in `circles`.

    split: share the circle of heads at exactly the same place among them (our rule; real
        annotations hold duplicates). k coincident heads cut the pixels of their common circle,
        ordered by angle around the head, into k sectors of equal size (to one pixel), given out
        in index order; the pixel exactly at the centre goes to the first. Equal in visible pixels
        rather than in degrees, they leave every head its part of a circle cut by the image border.
    image: (N,) int64, for a batch: only heads of one image share; rows count within their image.
    """
    points, _ = point_tensor(points)
    radii = to_tensor(radii)[0].to(points.device, torch.float64).reshape(-1)
    if len(radii) != len(points):
        raise ValueError(f"radii: {len(radii)} values for {len(points)} points; give one each")
    height, width = shape
    x, y, squared = points[:, 0], points[:, 1], radii * radii

    # Rows first, one wider on each side than the circle: the test below is the exact one.
    top = (torch.ceil(y - radii) - 1).clamp(0, height).long()
    bottom = (torch.floor(y + radii) + 1).clamp(-1, height - 1).long()
    head, row = _integers(top, bottom)
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
    spans = Spans(head, row, first, last).select(torch.nonzero(first <= last).squeeze(1))
    places = _shared_places(points, image) if split else None
    return spans if places is None else _share_out(points, spans, *places)


def _integers(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every integer of the ranges first[k]..last[k] (both (S,) int64), and before it the k it
    comes from: two (M,) int64 tensors, in order."""
    length = (last - first + 1).clamp(min=0)
    end = torch.cumsum(length, 0)
    index = torch.repeat_interleave(length, output_size=int(end[-1]) if len(end) else 0)
    value = torch.arange(len(index), device=first.device)
    return index, value.add_((first - end + length).index_select(0, index))


def _share_out(points: torch.Tensor, spans: Spans, place: torch.Tensor, sharers: torch.Tensor
               ) -> Spans:
    """The spans that heads keep of circles they share, see `row_spans`; place: (N,) int64, the
    place of each head; sharers: the number of heads at each place."""
    share = sharers[place]
    shared = share[spans.head] > 1
    head, row, column = spans.select(shared).pixels()

    # A head's turn is its rank, by index, among the heads at its place.
    turn = torch.empty_like(place)
    by_place, rank = ranks(place, torch.arange(len(place), device=place.device), sharers)
    turn[by_place] = rank

    dx, dy = column - points[head, 0], row - points[head, 1]
    angle = torch.atan2(dy, dx) % (2 * math.pi)
    angle = angle.masked_fill((dx == 0) & (dy == 0), -1.0)
    size = torch.bincount(head, minlength=len(points))
    order, rank = ranks(head, angle, size)
    owner = head[order]
    sector = torch.div(rank * share[owner], size[owner], rounding_mode="floor")
    kept = order[sector == turn[owner]].sort().values

    pixels = Spans(head[kept], row[kept], column[kept], column[kept])
    together = Spans(*map(torch.cat, zip(spans.select(~shared), pixels)))
    return together.select(torch.argsort(together.head, stable=True))


def ranks(group: torch.Tensor, value: torch.Tensor, size: torch.Tensor
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, rank), both (M,) int64: `order` sorts by group, within a group by value, and then
    by position; `rank` counts from 0 in each group, in that order. size: members of each group."""
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    start = torch.cumsum(size, 0) - size
    return order, torch.arange(len(group), device=group.device) - start[group[order]]


def _shared_places(points: torch.Tensor, image: torch.Tensor | None
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


def lowest_wins(energy: Array, head: Array, pixel: Array, shape: tuple[int, int],
                threshold: float = math.inf) -> Array:
    """Exclusive label map: every pixel goes to the head that claims it with the lowest energy.

    energy: (M,) float, one value per pair. head, pixel: (M,) int64, an incidence list.
    threshold: pairs with energy >= threshold claim nothing.
    Returns (H, W) int32: head index + 1, or 0 where nobody claims the pixel. Of equal energies
    the lowest head index wins, so the result does not depend on the order of the list.
    """
    energy, numpy_out = to_tensor(energy)
    energy = energy.detach()
    head, pixel = to_tensor(head)[0].to(energy.device), to_tensor(pixel)[0].to(energy.device)
    pixels = shape[0] * shape[1]
    if energy.dtype == torch.float32:
        labels = _lowest_packed(energy, head, pixel, pixels, threshold)
        return _as_given(labels.reshape(shape), numpy_out)
    claims = energy < threshold
    energy, head, pixel = energy[claims], head[claims], pixel[claims]
    lowest = torch.full((pixels,), math.inf, dtype=energy.dtype, device=energy.device)
    lowest.scatter_reduce_(0, pixel, energy, "amin")
    won = energy == lowest[pixel]
    nobody = torch.iinfo(torch.int32).max
    winner = torch.full((pixels,), nobody, dtype=torch.int32, device=energy.device)
    winner.scatter_reduce_(0, pixel[won], head[won].to(torch.int32), "amin")
    labels = torch.where(winner == nobody, 0, winner + 1)
    return _as_given(labels.reshape(shape), numpy_out)


def _lowest_packed(energy: torch.Tensor, head: torch.Tensor, pixel: torch.Tensor, pixels: int,
                   threshold: float) -> torch.Tensor:
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
    if points.device.type != "cpu":
        return _nearest_by_slabs(points)
    tree = cKDTree(points.numpy(), balanced_tree=False, compact_nodes=False)
    return torch.from_numpy(tree.query(points.numpy(), k=2)[0][:, 1].copy())


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


def point_tensor(points: Array) -> tuple[torch.Tensor, bool]:
    """(N, 2) float64 tensor of the points, and whether they came as NumPy."""
    points, numpy_out = to_tensor(points)
    points = points.reshape(0, 2) if points.numel() == 0 else points
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


def _as_given(value: torch.Tensor, numpy_out: bool) -> Array:
    return value.numpy() if numpy_out else value
