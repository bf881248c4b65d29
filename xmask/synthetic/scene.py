"""What is fixed before anybody stands in a scene: place, light, perspective, rows of people.

Most views are steep: heads of 6 px at the back, of 60 px in front, and as many people of each
size in between. A crowd of equal heads would make equal discs good instance masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xmask.synthetic.colours import CLOTH

SMALLEST_HEAD, LARGEST_HEAD = 6.0, 60.0  # diameters in px, the range heads of crowd photos span
NARROW = {"stands": 0.2, "square": 0.1}  # share of views in which heads are of similar size
NARROW_PEOPLE = 60  # such views show at most so many people
BACK = 1.0  # how many more people there are at the very back
MOVED = 0.25  # share of the people who may have to stand further back for want of room
FULL = 0.95  # of the room in the foreground may be taken
PACKING = 0.7  # people per spacing² where random placement jams (0.547·4/π)


@dataclass(frozen=True)
class Character:
    """How the pictures of one dataset differ from those of another.

    shapes: smallest and largest (H, W); counts: fewest and most people; weather: chances
    of fog, rain and snow; blur: chance of a blurred picture; empty: share of pictures without
    people; giant: most people in the one or two training pictures beyond `counts`, or None.
    """

    folder: str
    shapes: tuple[tuple[int, int], tuple[int, int]]
    counts: tuple[int, int]
    kinds: tuple[str, ...]
    weather: tuple[float, float, float] = (0.0, 0.0, 0.0)
    blur: float = 0.25
    empty: float = 0.0
    giant: int | None = None


# a kind named twice is twice as frequent
KINDS = ("street", "street", "park", "park", "square", "square", "stands", "concert", "hall")
CHARACTERS = {
    "sha": Character("ShanghaiTech/part_A", ((368, 492), (436, 582)), (20, 400), KINDS,
                     (0.05, 0.0, 0.0)),
    "qnrf": Character("UCF-QNRF_ECCV18", ((436, 640), (666, 966)), (40, 500),
                      ("street", "park", "square", "square", "stands", "concert"),
                      (0.08, 0.0, 0.0), giant=1500),
    "jhu": Character("jhu_crowd_v2.0", ((308, 414), (364, 482)), (10, 300), KINDS,
                     (0.16, 0.12, 0.1), blur=0.4, empty=0.06),
}
WEATHER = ("clear", "fog", "rain", "snow")  # the order of the codes in JHU-CROWD++


@dataclass(frozen=True)
class Scenery:
    """What is fixed before anybody stands in the scene."""

    shape: tuple[int, int]
    kind: str
    weather: int  # index into WEATHER
    blurred: bool
    top: float  # row of the farthest heads
    far: float  # head diameter there, px
    near: float  # head diameter at the bottom row, px
    spacing: float  # between heads, in diameters
    load: float  # share of the room in the foreground that is taken; less further away
    rows: np.ndarray  # (H,) share of the people in each image row
    tilt: float  # vertical foreshortening of bodies: 1 seen from the front, lower from above
    facing: tuple[float, float]  # direction most people face (0 = to us, pi = away), and spread
    light: np.ndarray  # (3,) unit vector to the light, x right, y down, z to us
    ambient: float
    team: np.ndarray | None  # (2, 3) colours that most wear, or None

    def diameter(self, y: np.ndarray) -> np.ndarray:
        """(N,) head diameters, px, at the image rows y (N,): one perspective, linear in the row."""
        share = np.clip((y - self.top) / (self.shape[0] - self.top), 0.0, 1.0)
        return self.far + (self.near - self.far) * share


def plan_scenery(rng, shape: tuple[int, int], people: int, character: Character) -> Scenery:
    """Choose place, light and a perspective in which `people` heads find room."""
    height, width = shape
    kind = str(rng.choice(character.kinds))
    weather = int(rng.choice(4, p=(1 - sum(character.weather), *character.weather)))
    if kind in ("hall", "concert"):
        weather = min(weather, 1)  # haze there is, rain there is not
    tops = {"street": (.2, .4), "park": (.2, .4), "square": (.0, .12), "stands": (.02, .15),
            "concert": (.2, .4), "hall": (.15, .35)}
    tilts = {"street": (.75, 1.), "park": (.75, 1.), "square": (.4, .7), "stands": (.7, .95),
             "concert": (.65, .95), "hall": (.7, 1.)}
    top = height * rng.uniform(*tops[kind])
    near, far = LARGEST_HEAD * rng.uniform(.85, 1.0), SMALLEST_HEAD * rng.uniform(1.1, 1.35)
    spacing = rng.uniform(0.9, 1.1)
    steepest, front = LARGEST_HEAD / SMALLEST_HEAD, rng.uniform(1.5, 3.0)
    if rng.random() < NARROW.get(kind, 0.0) and people <= NARROW_PEOPLE:  # seen from far away
        steepest = rng.uniform(1.8, 3.0)
        near = math.exp(rng.uniform(math.log(2 * SMALLEST_HEAD), math.log(.7 * LARGEST_HEAD)))
    while True:
        far = max(far, near / steepest)
        diameter = far + (near - far) * np.clip((np.arange(height) - top) / (height - top), 0, 1)
        most = FULL * PACKING * width / np.maximum(spacing * diameter, 5.0) ** 2 / max(people, 1)
        rows, without_room = _people_per_row(diameter, top, front, most)
        # too many for this view: stand closer, look down from higher up, then from further away
        if without_room > .05 and spacing > .82:
            spacing, top = spacing * .97, max(top * .9, min(top, .06 * height))
        elif without_room > MOVED and near > SMALLEST_HEAD:
            near, top = max(near * .97, SMALLEST_HEAD), top * .98
            far = min(far, near)
        else:
            break
    load = FULL * min(float(np.max(rows / most)), 1.0)
    azimuth, height_of_light = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.9)
    flat = math.sqrt(1 - height_of_light ** 2)
    light = np.array([flat * math.cos(azimuth), -height_of_light, 0.35 + flat * .3], np.float32)
    facing = {"street": (rng.choice([0., math.pi, .8]), 1.0), "park": (0., 3.), "square": (0., 3.),
              "stands": (rng.choice([0., .7, -.7]), .5), "concert": (math.pi, .7),
              "hall": (rng.choice([math.pi, 0., 1.2]), 1.1)}[kind]
    team = None
    if rng.random() < {"stands": .6, "street": .2}.get(kind, .08):
        team = CLOTH[rng.choice(len(CLOTH), 2)]
    return Scenery(
        shape=shape, kind=kind, weather=weather, blurred=bool(rng.random() < character.blur),
        top=top, far=far, near=near, spacing=spacing, load=load, rows=rows,
        tilt=rng.uniform(*tilts[kind]), facing=(float(facing[0]), float(facing[1])),
        light=light / np.linalg.norm(light),
        ambient=rng.uniform(.6, .85) if weather or kind == "hall" else rng.uniform(.45, .7),
        team=team)


def _people_per_row(diameter: np.ndarray, top: float, front: float, most: np.ndarray
                    ) -> tuple[np.ndarray, float]:
    """Share of the people in each image row (H,), given the head diameter and the most there.

    Among heads of d px, as many people per image area as 1 / d: where d grows linearly with the
    row, their number is the same in each octave of diameters. (A crowd that is packed to the
    horizon would have 1 / d²: nearly everybody far away and equally small.) More of them stand
    at the very back, and `front` times more at the very front; those who find no room there
    stand at the back, and their share is the second result.
    """
    rows = np.arange(len(diameter))
    inside = (rows >= max(top, 2)) & (rows <= len(rows) - 3)
    place = np.log(diameter / diameter[0]) / max(np.log(diameter[-1] / diameter[0]), 1e-6)
    share = inside / diameter * (
        1 + BACK * np.exp(-place / .07) + front * np.exp((place - 1) / .12))
    share /= share.sum()
    without_room = float(np.maximum(share - most, 0).sum())
    behind = inside / diameter * np.exp(-place / .1)
    for _ in range(20):
        share = np.minimum(share, most)
        share += (1 - share.sum()) / behind.sum() * behind
    return share, without_room
