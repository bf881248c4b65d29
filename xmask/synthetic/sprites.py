"""Painting tools: small soft-edged pictures of many people at a time, and clouds of noise.

Sizes are in units of the head's half height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image


@dataclass
class Sprite:
    """A small picture: rgb (3, h, w) multiplied by alpha, its corner, and where it is opaque."""

    y: int
    x: int
    rgb: np.ndarray
    alpha: np.ndarray
    solid: np.ndarray


@dataclass
class Figure:
    """One person or thing: sprites from back to front, the last of a person is the head."""

    depth: float
    sprites: list[Sprite] = field(default_factory=list)
    person: bool = True


def window(y: int, x: int, patch, shape):
    """Slices (rows, columns) of the picture and (rows, columns) of a patch whose corner is y, x."""
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + patch[0], shape[0]), min(x + patch[1], shape[1])
    bottom, right = max(bottom, top), max(right, left)
    return (slice(top, bottom), slice(left, right),
            (slice(top - y, bottom - y), slice(left - x, right - x)))


def blend(canvas: np.ndarray, sprite: Sprite) -> None:
    """Paint a sprite over a canvas (3, H, W), in place."""
    rows, columns, inside = window(sprite.y, sprite.x, sprite.alpha.shape, canvas.shape[1:])
    part = canvas[:, rows, columns]
    part *= 1 - sprite.alpha[inside]
    part += sprite.rgb[(slice(None), *inside)]


@lru_cache(maxsize=1)
def cloud_tile() -> np.ndarray:
    """One 256x256 tile of cloud noise that wraps round, mean 0, standard deviation 1."""
    white = np.fft.fft2(np.random.default_rng(0).standard_normal((256, 256)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    frequency[0, 0] = 1
    tile = np.fft.ifft2(white / frequency ** 0.8).real
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def cloud_field(rng, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Slowly varying noise (H, W), about standard normal, some `cells` blobs across."""
    small = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))


def per_person(values: np.ndarray) -> np.ndarray:
    """One value a person, (N,), as (N, 1, 1), to be multiplied with their pictures."""
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


class Patches:
    """A stack of n equally large patches that are painted together, one per person.

    u, v: coordinates in head units around each person's head centre (n, h, w); r: px per unit
    (n, 1, 1); rgb (3, n, h, w), multiplied by alpha (n, h, w).
    """

    def __init__(self, x, y, radius, extent, lean=None):
        left, top, right, bottom = extent
        largest = float(np.max(radius))
        self.x0 = np.floor(x + left * largest).astype(int) - 1
        self.y0 = np.floor(y + top * largest).astype(int) - 1
        width = int(math.ceil((right - left) * largest)) + 3
        height = int(math.ceil((bottom - top) * largest)) + 3
        self.r = per_person(radius)
        u = (self.x0 - x)[:, None, None] + np.arange(width)[None, None]
        v = (self.y0 - y)[:, None, None] + np.arange(height)[None, :, None]
        u, v = (u / self.r).astype(np.float32), (v / self.r).astype(np.float32)
        if lean is None:
            self.u, self.v = np.broadcast_arrays(u, v)
        else:
            c, s = np.cos(per_person(lean)), np.sin(per_person(lean))
            self.u, self.v = u * c + v * s, v * c - u * s
        self.alpha = np.zeros((len(radius), height, width), np.float32)
        self.rgb = np.zeros((3, *self.alpha.shape), np.float32)

    def ellipse(self, k, cu, cv, a, b, square=False) -> np.ndarray:
        """Share of each pixel that an ellipse (or a squarer superellipse) covers, persons k."""
        cu, cv, a, b = (per_person(value) for value in (cu, cv, a, b))
        p, q = (self.u[k] - cu) / a, (self.v[k] - cv) / b
        p *= p
        q *= q
        if square:
            p *= p
            q *= q
        p += q
        np.sqrt(p, out=p)
        if square:
            np.sqrt(p, out=p)
        # distance to the rim, exact on the axes; enough for a soft edge of one pixel
        return np.clip(0.5 + (1 - p) * (np.minimum(a, b) * self.r[k]), 0, 1)

    def above(self, k, line, bend=0.0) -> np.ndarray:
        """Share of each pixel above the line v = line + bend·u²."""
        edge = per_person(line) + bend * self.u[k] ** 2
        return np.clip(.5 + (edge - self.v[k]) * self.r[k], 0, 1)

    def capsule(self, k, start, end, half) -> np.ndarray:
        """Share of each pixel within `half` of the segment from start to end, both (n, 2)."""
        p, q = self.u[k] - per_person(start[:, 0]), self.v[k] - per_person(start[:, 1])
        du, dv = per_person(end[:, 0] - start[:, 0]), per_person(end[:, 1] - start[:, 1])
        along = np.clip((p * du + q * dv) / (du * du + dv * dv), 0, 1)
        distance = np.sqrt((p - along * du) ** 2 + (q - along * dv) ** 2)
        return np.clip(.5 + (per_person(half) - distance) * self.r[k], 0, 1)

    def paint(self, k, cover, colour, inside=False) -> None:
        """Lay colour (n, 3) or (3, n, h, w) over persons k; `inside` keeps to what is there."""
        if colour.ndim == 2:
            colour = colour.T[:, :, None, None]
        if inside:
            colour = colour * self.alpha[k]
        self.rgb[:, k] += cover * (colour - self.rgb[:, k])
        if not inside:
            self.alpha[k] += cover * (1 - self.alpha[k])

    def grain(self, rng, across: float, down: float) -> np.ndarray:
        """Noise (n, h, w), another piece for each person, stretched by head units."""
        tile = cloud_tile()
        n = len(self.alpha)
        # at least one step of the tile per pixel: large heads shall show no blocks
        across, down = (max(scale, float(self.r.max())) for scale in (across, down))
        offset = rng.integers(0, 256, (2, n, 1, 1))
        columns = (self.u * across + offset[0]).astype(np.int32) & 255
        rows = (self.v * down + offset[1]).astype(np.int32) & 255
        return tile[rows, columns]

    def sprites(self, solid: np.ndarray | None = None) -> list[Sprite]:
        """One sprite a person. solid: (n, h, w) bool, what hides others; None: alpha above 0.5."""
        solid = self.alpha > 0.5 if solid is None else solid
        return [Sprite(int(y), int(x), self.rgb[:, i], self.alpha[i], solid[i])
                for i, (y, x) in enumerate(zip(self.y0, self.x0))]


def chunks(radius: np.ndarray, area: float) -> list[np.ndarray]:
    """Indices (n,) int in groups of similar size, small enough for the processor's cache.

    radius: (N,) px, of the heads. area: of a sprite, in squared head radii.
    """
    order = np.argsort(radius, kind="stable")
    groups, start = [], 0
    for i in range(1, len(order) + 1):
        full = i == len(order)
        if not full:
            r = radius[order[i]]
            full = r > 1.12 * radius[order[start]] or (i - start) * area * r * r > 60_000
        if full:
            groups.append(order[start:i])
            start = i
    return groups
