"""Who stands where: free and taken ground, and groups of people who stand together."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from xmask.synthetic.scene import LARGEST_HEAD, SMALLEST_HEAD, Scenery
from xmask.synthetic.sprites import cloud_field, window

GROUPS = (1, 1, 1, 2, 2, 2, 3, 3, 4, 5)  # sizes of the groups in which people stand together


@lru_cache(maxsize=512)
def _disc(across: int, down: int) -> np.ndarray:
    """Filled ellipse, half axes in quarter pixels, as a boolean patch."""
    rx, ry = across / 4, down / 4
    y, x = np.ogrid[-int(ry):int(ry) + 1, -int(rx):int(rx) + 1]
    return (x / rx) ** 2 + (y / ry) ** 2 < 1


def _seat_rows(scene: Scenery) -> np.ndarray:
    """Image rows of the heads of people who sit in rows 1.3 heads apart."""
    steps = np.arange(400)
    rate = (scene.near - scene.far) / (scene.shape[0] - scene.top)
    grown = steps * 1.3 if rate < 1e-4 else ((1 + 1.3 * rate) ** steps - 1) / rate
    rows = scene.top + scene.far * (.6 + grown)
    return rows[rows < max(scene.shape[0] - 2, rows[0] + 1)]


class Room:
    """Free and taken ground: a pixel map in which every head blocks an ellipse of its own."""

    def __init__(self, rng, scene: Scenery):
        self.rng, self.scene = rng, scene
        self.crowding = cloud_field(rng, scene.shape, 5)
        self.taken = np.zeros(scene.shape, bool)
        self.spacing = scene.spacing
        self.places: list[tuple[float, float, float]] = []
        self.seats = _seat_rows(scene)

    def _block(self, x: float, y: float, diameter: float) -> None:
        apart = max(self.spacing * diameter, 5.0)
        disc = _disc(round(4 * apart), round(4 * max(0.9 * apart, 5.0)))
        top, left = round(y) - disc.shape[0] // 2, round(x) - disc.shape[1] // 2
        rows, columns, inside = window(top, left, disc.shape, self.taken.shape)
        self.taken[rows, columns] |= disc[inside]

    def _rows(self, number: int) -> np.ndarray:
        """Image rows (number,) for as many groups: evenly spread over the share of the people."""
        quantile = (np.arange(number) + self.rng.random(number)) / number
        row = np.searchsorted(np.cumsum(self.scene.rows), quantile)
        return self.rng.permutation(np.minimum(row, self.scene.shape[0] - 3))

    def _free(self, y: float, diameter: float) -> tuple[float, float] | None:
        """A free place near row y, rather where the crowd is dense; None if there is none."""
        rng, (height, width) = self.rng, self.scene.shape
        reach = .5 * diameter
        if self.scene.kind == "stands":
            y = self.seats[np.abs(self.seats - y).argmin()]
            reach = .12 * diameter
        lowest, highest = max(int(self.scene.top), 2), height - 3
        while True:
            start = min(max(round(y - reach), lowest), highest)
            stop = max(min(round(y + reach), highest), start) + 1
            free = np.flatnonzero(~self.taken[start:stop, 1:width - 1])
            if len(free):
                row, column = np.divmod(free[rng.integers(0, len(free), 5)], width - 2)
                row, column = row + start, column + 1
                liked = self.crowding[row, column] + rng.normal(0, .7, 5)
                best = int(liked.argmax())
                return column[best] + rng.uniform(-.5, .5), row[best] + rng.uniform(-.5, .5)
            if stop - start >= highest - lowest:
                return None
            reach = max(2 * reach, 2.0)

    def _beside(self, x: float, y: float) -> tuple[float, float] | None:
        """A free place at the side of somebody who stands at x, y; None if there is none."""
        height, width = self.scene.shape
        diameter = float(self.scene.diameter(np.float64(y)))
        for _ in range(4):
            side, step = self.rng.choice([-1, 1]), self.rng.normal([1.2, 0], [.12, .35])
            x2, y2 = x + side * step[0] * diameter, y + step[1] * diameter
            if not (1 <= x2 <= width - 2 and max(self.scene.top, 2) <= y2 <= height - 3):
                continue
            if not self.taken[int(y2 + .5), int(x2 + .5)]:
                return x2, y2
        return None

    def take(self, number: int) -> np.ndarray:
        """Give (number, 3) new places: x, y and diameter in px. Narrows the spacing if it must."""
        start, rng = len(self.places), self.rng
        sizes: list[int] = []  # of the groups in which people stand
        while sum(sizes) < number:
            sizes.append(min(int(rng.choice(GROUPS)), number - sum(sizes)))
        for size, row in zip(sizes, self._rows(len(sizes))):
            place = None
            for _ in range(size):
                place = self._beside(*place) if place else None
                while place is None:
                    place = self._free(row, float(self.scene.diameter(np.float64(row))))
                    if place is None:
                        self._move_closer()
                base = self.scene.diameter(np.float64(place[1]))
                # ages and builds differ; children are the lower tail
                diameter = base * min(max(rng.normal(1, .07), .78), 1.2)
                diameter = float(min(max(diameter, SMALLEST_HEAD), LARGEST_HEAD))
                self.places.append((*place, diameter))
                self._block(*self.places[-1])
        return np.array(self.places[start:], np.float64).reshape(number, 3)

    def _move_closer(self) -> None:
        self.spacing *= 0.93
        self.taken[:] = False
        for place in self.places:
            self._block(*place)
