"""Active rays: the segmenter without a network, which makes every step of the study runnable, and
testable, without weights. It is a stand-in for SAM and says so in `describe()`."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2lab

from xmask.segmenters import NEGATIVE, POSITIVE, Prompts, check_image

# All constants of this part are ours, set on drawn scenes with seeds 1000 to 1005 and reported
# on seeds 2000 to 2005 (xmask.synthetic.draw_scene).
_RAYS = 32
_STEPS = 24  # candidate radii on a ray, in geometric progression
_SMALLEST = 1.5  # px, the smallest radius searched
_LARGEST = 0.15  # of min(H, W): no head is wider than 0.3 of the image's smaller side
_HEADS_AT_ONCE = 128
_BLURS = (0.7, 1.4, 2.8)  # px, sigma; a longer step between radii reads a smoother image
_HALF_CONTRAST = 12.0  # Lab units: a colour step of this size has edge strength 1/2
_BEND = 0.08  # cost of one step of radius between neighbouring rays
_REACH = 2  # steps of radius that neighbouring rays may differ by
_MIDLINE = 4.0  # cost per unit of log radius beyond the midline to a negative point
_SIZE_PRIOR = 0.4  # cost per squared log distance to a candidate's own radius
_BOX_PRIOR = 1.0  # the same for the radius of a box
_LOGIT_SLOPE = 8.0


class ClassicalSegmenter:
    """Active rays: a star-convex contour around the prompt, found by dynamic programming.

    For every head, 32 rays leave the prompt point. On each ray the colour (Lab, smoothed) is
    read at 24 radii between 1.5 px and the radius of the incidence circle. A radius is a good
    place for the contour if colour changes there, if it is near the size looked for, and if
    neighbouring rays agree; the best closed contour is the cheapest cycle through the rays. One
    point leaves the size open, so up to three contours of different size come back, as SAM
    returns three masks; a box fixes centre and size, and one contour comes back. The contour
    may cross the midline to a negative point only at a cost. Cost per head does not depend on
    the number of pixels, except for reading the result at the incidences.

    This is not SAM and does not reach its quality; it stands in for it where no weights are at
    hand. The score is the mean edge strength along the contour times how smoothly it closes.
    """

    name, crops_by_size = "classical", False

    def __init__(self) -> None:
        self._levels: np.ndarray | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "classical", "algorithm": "active rays", "rays": _RAYS, "steps": _STEPS}

    def set_image(self, image: np.ndarray) -> None:
        check_image(image)
        lab = rgb2lab(np.ascontiguousarray(image)).astype(np.float32)
        self._levels = np.stack([gaussian_filter(lab, (s, s, 0)) for s in _BLURS])

    def predict(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._levels is None:
            raise RuntimeError("no image yet: call set_image(image) before predict")
        count = len(prompts)
        candidates = 3 if prompts.multimask else 1
        logits = np.full((candidates, len(head)), -_LOGIT_SLOPE, dtype=np.float32)
        scores = np.zeros((count, candidates), dtype=np.float32)
        first = np.searchsorted(head, np.arange(count + 1))
        for start in range(0, count, _HEADS_AT_ONCE):
            stop = min(start + _HEADS_AT_ONCE, count)
            part = slice(first[start], first[stop])
            rows = slice(start, stop)
            logits[:, part], scores[rows] = self._contours(
                prompts.points[rows], prompts.labels[rows],
                None if prompts.boxes is None else prompts.boxes[rows],
                candidates, head[part] - start, pixel[part])
        return logits, scores

    def _contours(
        self, points: np.ndarray, labels: np.ndarray, boxes: np.ndarray | None,
        candidates: int, head: np.ndarray, pixel: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (C, m) at the incidences of a chunk of heads, and scores (b, C)."""
        height, width = self._levels.shape[1:3]
        count = len(points)
        rows = np.arange(count)
        origin = points[rows, (labels == POSITIVE).argmax(axis=1)].astype(np.float64)
        y, x = np.divmod(pixel, width)
        dx, dy = x - origin[head, 0], y - origin[head, 1]
        distance = np.hypot(dx, dy)
        reach = np.zeros(count)
        np.maximum.at(reach, head, distance)
        reach = reach.clip(2 * _SMALLEST, max(_LARGEST * min(height, width), 2 * _SMALLEST))

        radius = _SMALLEST * (reach / _SMALLEST)[:, None] ** np.linspace(0, 1, _STEPS)  # (b, T)
        angle = np.arange(_RAYS) * (2 * np.pi / _RAYS)
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (K, 2)
        edge = self._edge_strength(origin, unit, radius)  # (b, K, T)
        limit = _midlines(origin, unit, points, labels)  # (b, K)
        log_radius = np.log(radius)
        past = np.maximum(log_radius[:, None, :] - np.log(limit)[:, :, None], 0)
        cost = 1 - edge + _MIDLINE * past

        if boxes is not None:
            # An ellipse with the box's axes is the size looked for.
            axes = np.maximum((boxes[:, 2:] - boxes[:, :2]) / 2, _SMALLEST)
            wanted = 1 / np.hypot(unit[:, 0] / axes[:, :1], unit[:, 1] / axes[:, 1:])  # (b, K)
            wanted = np.repeat(np.log(wanted)[:, None], candidates, axis=1)
            weight = _BOX_PRIOR
        else:
            profile = -cost.mean(axis=1)  # (b, T)
            wanted = np.empty((count, candidates, _RAYS))
            for c in range(candidates):
                best = log_radius[rows, profile.argmax(axis=1)]
                wanted[:, c] = best[:, None]
                # A ring much like one already taken is not another answer.
                profile = profile - np.exp(-(((log_radius - best[:, None]) / 0.35) ** 2))
            weight = _SIZE_PRIOR
        cost = cost[:, None] + weight * (log_radius[:, None, None] - wanted[..., None]) ** 2

        index = _cheapest_cycle(cost.reshape(count * candidates, _RAYS, _STEPS))
        index = index.reshape(count, candidates, _RAYS)
        rho = np.take_along_axis(radius[:, None], index.reshape(count, 1, -1), axis=2)
        rho = rho.reshape(index.shape)
        rho = (np.roll(rho, 1, 2) + 2 * rho + np.roll(rho, -1, 2)) / 4
        along = np.take_along_axis(edge[:, None], index[..., None], axis=3)[..., 0]
        bend = np.abs(np.diff(np.log(rho), axis=2, append=np.log(rho[..., :1]))).mean(axis=2)
        scores = along.mean(axis=2) * np.exp(-4 * bend)

        turn = np.arctan2(dy, dx) * (_RAYS / (2 * np.pi)) % _RAYS
        ray = np.minimum(turn.astype(np.int64), _RAYS - 1)
        part = turn - ray
        logits = np.empty((candidates, len(head)), dtype=np.float32)
        for c in range(candidates):
            border = rho[head, c, ray] * (1 - part) + rho[head, c, (ray + 1) % _RAYS] * part
            logits[c] = _LOGIT_SLOPE * (1 - distance / border)
        return logits.clip(-_LOGIT_SLOPE, _LOGIT_SLOPE), scores.astype(np.float32)

    def _edge_strength(
        self, origin: np.ndarray, unit: np.ndarray, radius: np.ndarray
    ) -> np.ndarray:
        """How much the colour changes across each radius of each ray: (b, K, T), 0..1."""
        step = np.maximum(0.15 * radius, 1.0)  # (b, T)
        level = np.searchsorted(np.array(_BLURS[1:]), step * 0.7)  # (b, T)
        inside = self._sample(origin, unit, np.maximum(radius - step, 0), level)
        outside = self._sample(origin, unit, radius + step, level)
        core = np.cumsum(inside, axis=2) / np.arange(1, _STEPS + 1)[:, None]
        local = np.linalg.norm(outside - inside, axis=3)
        region = np.linalg.norm(outside - core, axis=3)
        contrast = (local + region) / 2
        return contrast / (contrast + _HALF_CONTRAST)

    def _sample(
        self, origin: np.ndarray, unit: np.ndarray, radius: np.ndarray, level: np.ndarray
    ) -> np.ndarray:
        """Colour at every radius of every ray, bilinear, edge pixels repeated: (b, K, T, 3)."""
        _, height, width, _ = self._levels.shape
        x = (origin[:, :1, None] + unit[:, 0, None] * radius[:, None]).clip(0, width - 1)
        y = (origin[:, 1:, None] + unit[:, 1, None] * radius[:, None]).clip(0, height - 1)
        left, top = x.astype(np.int64), y.astype(np.int64)
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        u = (x - left).astype(np.float32)[..., None]
        v = (y - top).astype(np.float32)[..., None]
        flat = self._levels.reshape(-1, 3)
        base = level[:, None] * (height * width)
        upper, lower = base + top * width, base + bottom * width
        above = flat[upper + left] * (1 - u) + flat[upper + right] * u
        below = flat[lower + left] * (1 - u) + flat[lower + right] * u
        return above * (1 - v) + below * v


def _midlines(
    origin: np.ndarray, unit: np.ndarray, points: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """How far each ray runs before it is nearer to a negative point than to its origin: (b, K)."""
    toward = points - origin[:, None]  # (b, P, 2)
    along = np.einsum("bpd,kd->bkp", toward, unit)
    squared = (toward**2).sum(axis=2)[:, None]
    meets = (labels == NEGATIVE)[:, None] & (along > 1e-9)
    where = np.where(meets, squared / (2 * np.where(meets, along, 1)), np.inf)
    return np.maximum(where.min(axis=2, initial=np.inf), _SMALLEST)


def _cheapest_cycle(cost: np.ndarray) -> np.ndarray:
    """The radius index of every ray that makes a cheap closed contour: (n, K, T) -> (n, K).

    Dynamic programming around the ring twice: the middle of the unrolled path has forgotten
    where it began, so that its two ends meet (almost always) within the allowed step.
    """
    count, rays, steps = cost.shape
    total = cost[:, 0]
    came_from = np.empty((2 * rays, count, steps), dtype=np.int8)
    for k in range(1, 2 * rays):
        padded = np.pad(total, ((0, 0), (_REACH, _REACH)), constant_values=np.inf)
        arrivals = np.stack([
            padded[:, _REACH + s:_REACH + s + steps] + _BEND * abs(s)
            for s in range(-_REACH, _REACH + 1)])
        came_from[k] = arrivals.argmin(axis=0) - _REACH
        total = arrivals.min(axis=0) + cost[:, k % rays]
    index = np.empty((count, 2 * rays), dtype=np.int64)
    index[:, -1] = total.argmin(axis=1)
    rows = np.arange(count)
    for k in range(2 * rays - 1, 0, -1):
        index[:, k - 1] = index[:, k] + came_from[k, rows, index[:, k]]
    half = rays // 2
    return np.roll(index[:, half:half + rays], half, axis=1)
