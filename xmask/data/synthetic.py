"""Drawn crowds with an exact mask per head: truth for what no crowd dataset annotates.

The paper scores masks against annotated instances (section 7); the public crowd datasets have
dots only. Here a scene is painted person by person, back to front, so the visible head (hair,
hat and face: the thing a dot marks) of everybody is known to the pixel. `draw_scene` paints one
picture, `write_dataset` a dataset in the layout of ShanghaiTech A, UCF-QNRF or JHU-CROWD++.

Every picture depends on its own seed alone. All sizes below, unless said otherwise, are in units
of the head's half height, which is how figure drawing books give proportions; all colours are
ours and in 0..1. Nothing here claims to replace photographs.
"""

from __future__ import annotations

import io
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError
from scipy.io import savemat
from tqdm.auto import tqdm

from xmask import files
from xmask.data.sample import Sample

VERSION = 1  # of the drawing; a new number marks old pictures as made by other code
SMALLEST_HEAD, LARGEST_HEAD = 6.0, 60.0  # diameters in px, the range heads of crowd photos span
VISIBLE = 0.3  # a head that shows less than this share is not annotated
HIDDEN_SHARE = 0.02  # at most this share of people may stand there without an annotation
LEAST_AREA = 4  # px of a visible head
PIXELS_PER_PERSON = 64  # draw_scene refuses denser scenes: heads of 6 px would not stay apart
PACKING = 0.7  # people per spacing² where random placement jams (0.547·4/π)
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Character:
    """How the pictures of one dataset differ from those of another.

    shapes: smallest and largest (H, W); counts: fewest and most people; heads: range of
    diameters, px; fill: share of the room that people take; weather: chances of fog, rain and
    snow; blur: chance of a blurred picture; empty: share of pictures without people.
    """

    folder: str
    splits: tuple[str, ...]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    counts: tuple[int, int]
    heads: tuple[float, float]
    fill: tuple[float, float]
    kinds: tuple[str, ...]
    weather: tuple[float, float, float] = (0.0, 0.0, 0.0)
    blur: float = 0.25
    empty: float = 0.0


# a kind named twice is twice as frequent
KINDS = ("street", "street", "park", "park", "square", "square", "stands", "concert", "hall")
CHARACTERS = {
    "sha": Character(
        "ShanghaiTech/part_A", ("train", "test"), ((336, 448), (416, 544)), (20, 500),
        (SMALLEST_HEAD, LARGEST_HEAD), (0.2, 0.85), KINDS, (0.05, 0.0, 0.0)),
    "qnrf": Character(
        "UCF-QNRF_ECCV18", ("train", "test"), ((416, 560), (480, 656)), (40, 1500),
        (SMALLEST_HEAD, 32.0), (0.35, 0.9),
        ("street", "park", "square", "square", "stands", "concert"), (0.08, 0.0, 0.0)),
    "jhu": Character(
        "jhu_crowd_v2.0", ("train", "val", "test"), ((288, 432), (352, 528)), (1, 400),
        (SMALLEST_HEAD, LARGEST_HEAD), (0.12, 0.8), KINDS, (0.16, 0.12, 0.1), blur=0.4,
        empty=0.06),
}
WEATHER = ("clear", "fog", "rain", "snow")  # the order of the codes in JHU-CROWD++

SKIN = np.array([
    (.96, .80, .69), (.91, .72, .58), (.87, .66, .51), (.78, .56, .41), (.68, .47, .33),
    (.55, .37, .26), (.42, .28, .20), (.31, .20, .15)], np.float32)
HAIR = np.array([
    (.06, .05, .05), (.09, .07, .06), (.15, .10, .07), (.24, .15, .09), (.36, .23, .13),
    (.55, .40, .22), (.76, .62, .38), (.45, .18, .08), (.55, .54, .53), (.85, .84, .82),
    (.45, .20, .50), (.15, .35, .50)], np.float32)
HAIR_WEIGHTS = np.array([.2, .2, .17, .13, .09, .06, .05, .02, .04, .02, .01, .01])
CLOTH_WEIGHTS = np.array(
    [12, 11, 8, 7, 8, 7, 10, 7, 6, 4, 3, 2, 2, 3, 3, 5, 5, 5, 3, 2, 3, 4]) / 120
CLOTH = np.array([
    (.08, .08, .09), (.14, .14, .17), (.25, .25, .28), (.45, .45, .47), (.85, .85, .84),
    (.95, .94, .92), (.12, .16, .30), (.20, .30, .52), (.45, .60, .78), (.62, .12, .13),
    (.80, .22, .18), (.88, .50, .18), (.92, .80, .30), (.18, .36, .22), (.40, .48, .26),
    (.75, .60, .46), (.55, .40, .29), (.30, .20, .14), (.86, .66, .68), (.48, .28, .52),
    (.30, .55, .55), (.90, .78, .66)], np.float32)


@dataclass(frozen=True)
class Scene:
    """What is fixed before anybody stands in the scene."""

    shape: tuple[int, int]
    kind: str
    weather: int  # index into WEATHER
    blurred: bool
    top: float  # row of the farthest heads
    far: float  # head diameter there, px
    near: float  # head diameter at the bottom row, px
    spacing: float  # between heads, in diameters
    fill: float  # share of the room that is taken
    tilt: float  # vertical foreshortening of bodies: 1 seen from the front, lower from above
    facing: tuple[float, float]  # direction most people face (0 = to us, pi = away), and spread
    light: np.ndarray  # (3,) unit vector to the light, x right, y down, z to us
    ambient: float
    team: np.ndarray | None  # (2, 3) colours that most wear, or None

    def diameter(self, y: np.ndarray) -> np.ndarray:
        """Head diameter in px at image row y: one perspective, linear in the row."""
        share = np.clip((y - self.top) / (self.shape[0] - self.top), 0.0, 1.0)
        return self.far + (self.near - self.far) * share


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


# ---------------------------------------------------------------------------- scene

def draw_scene(seed: int | np.random.SeedSequence, *, shape: tuple[int, int] = (384, 512),
               people: int = 200, character: str = "sha") -> Sample:
    """Draw one scene with exactly `people` annotated people.

    seed: an integer or a SeedSequence; the same seed, shape, count and character give the same
    picture. shape: (H, W) px, each at least 64. character: `sha`, `qnrf` or `jhu`.

    Returns a Sample: image uint8 (H, W, 3), points float32 (N, 2) as (x, y), one per person, on
    the person's visible head near its centre; instances int32 (H, W) of visible heads; boxes
    float32 (N, 2), width and height of the visible head. People whose head shows less than 30 %
    are painted, but belong to the background; they are at most 2 % of the crowd.

    Raises ValueError for a negative count, an unknown character, a picture that is too small,
    or more than one person per 64 px.
    """
    if character not in CHARACTERS:
        raise ValueError(f"character: {character!r} is unknown; choose from {sorted(CHARACTERS)}")
    return _draw(seed, shape, people, CHARACTERS[character], "scene")[0]


def _draw(seed, shape, people: int, character: Character, name: str) -> tuple[Sample, dict]:
    """Draw a scene; also return what a dataset says about it besides the dots."""
    height, width = (int(side) for side in shape)
    if min(height, width) < 64:
        raise ValueError(f"shape: {height}x{width} is too small to draw in; take 64x64 or more")
    if people < 0:
        raise ValueError(f"people: {people} is negative; take 0 for an empty scene")
    if people * PIXELS_PER_PERSON > height * width:
        raise ValueError(
            f"people: {people} do not fit into {height}x{width} px; take at most "
            f"{height * width // PIXELS_PER_PERSON} or a larger shape")
    rng = np.random.default_rng(seed)
    scene = _plan(rng, (height, width), people, character)
    figures, instances, shares = _populate(rng, scene, people)

    canvas = _background(rng, scene)
    _ground_shadows(canvas, scene, figures)
    for figure in figures:
        for sprite in figure.sprites:
            _blend(canvas, sprite)
    image = _photograph(rng, scene, canvas)
    points, boxes = _annotate(rng, instances, people)
    sample = Sample(image=image, points=points, instances=instances, name=name, boxes=boxes)
    facts = {"kind": scene.kind, "weather": scene.weather, "blurred": scene.blurred,
             "visible": shares, "figures": sum(f.person for f in figures)}
    return sample, facts


def _plan(rng, shape: tuple[int, int], people: int, character: Character) -> Scene:
    """Choose place, light and a perspective in which `people` heads find room."""
    height, width = shape
    kind = str(rng.choice(character.kinds))
    weather = int(rng.choice(4, p=(1 - sum(character.weather), *character.weather)))
    if kind in ("hall", "concert"):
        weather = min(weather, 1)  # haze there is, rain there is not
    tops = {"street": (.25, .5), "park": (.25, .5), "square": (.0, .12), "stands": (.02, .2),
            "concert": (.25, .45), "hall": (.2, .4)}
    tilts = {"street": (.75, 1.), "park": (.75, 1.), "square": (.4, .7), "stands": (.7, .95),
             "concert": (.65, .95), "hall": (.7, 1.)}
    top = height * rng.uniform(*tops[kind])
    ratio = math.exp(rng.uniform(math.log(1.15), math.log(2.0 if kind == "stands" else 6.0)))
    fill = rng.uniform(*character.fill)
    spacing = rng.uniform(0.95, 1.15)
    smallest, largest = character.heads
    rows = np.arange(height) + 0.5
    while True:
        share = np.clip((rows - top) / (height - top), 0, 1)
        relative = 1 + (ratio - 1) * share
        room = width * np.sum((rows >= top) / relative ** 2)
        far = math.sqrt(fill * PACKING * room / (max(people, 8) * spacing ** 2))
        far = min(max(far, smallest), largest / ratio)
        far = max(far, smallest)
        diameter = np.minimum(far * relative, largest)
        apart = np.maximum(spacing * diameter, 5.0)
        load = people / (PACKING * width * np.sum((rows >= top) / apart ** 2))
        if load <= 0.9:
            break
        # too many for this view: look less far, from higher up, and move closer together
        ratio, top, spacing = 1 + (ratio - 1) * 0.8, top * 0.8, max(0.9, spacing * 0.98)
    azimuth, height_of_light = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.9)
    flat = math.sqrt(1 - height_of_light ** 2)
    light = np.array([flat * math.cos(azimuth), -height_of_light, 0.35 + flat * .3], np.float32)
    facing = {"street": (rng.choice([0., math.pi, .8]), 1.0), "park": (0., 3.), "square": (0., 3.),
              "stands": (rng.choice([0., .7, -.7]), .5), "concert": (math.pi, .7),
              "hall": (rng.choice([math.pi, 0., 1.2]), 1.1)}[kind]
    team = None
    if rng.random() < {"stands": .6, "street": .2}.get(kind, .08):
        team = CLOTH[rng.choice(len(CLOTH), 2)]
    return Scene(
        shape=shape, kind=kind, weather=weather, blurred=bool(rng.random() < character.blur),
        top=top, far=far, near=min(far * ratio, largest), spacing=spacing, fill=load,
        tilt=rng.uniform(*tilts[kind]), facing=(float(facing[0]), float(facing[1])),
        light=light / np.linalg.norm(light),
        ambient=rng.uniform(.6, .85) if weather or kind == "hall" else rng.uniform(.45, .7),
        team=team)


# ---------------------------------------------------------------------------- who stands where

@lru_cache(maxsize=512)
def _disc(across: int, down: int) -> np.ndarray:
    """Filled ellipse, half axes in quarter pixels, as a boolean patch."""
    rx, ry = across / 4, down / 4
    y, x = np.ogrid[-int(ry):int(ry) + 1, -int(rx):int(rx) + 1]
    return (x / rx) ** 2 + (y / ry) ** 2 < 1


class _Room:
    """Free and taken ground: a pixel map in which every head blocks an ellipse of its own."""

    def __init__(self, rng, scene: Scene):
        self.rng, self.scene = rng, scene
        self.crowding = _clouds(rng, scene.shape, 5)
        self.taken = np.zeros(scene.shape, bool)
        self.spacing = scene.spacing
        self.places: list[tuple[float, float, float]] = []

    def _block(self, x: float, y: float, diameter: float) -> None:
        apart = max(self.spacing * diameter, 5.0)
        disc = _disc(round(4 * apart), round(4 * max(0.9 * apart, 5.0)))
        top, left = round(y) - disc.shape[0] // 2, round(x) - disc.shape[1] // 2
        rows, columns, inside = _window(top, left, disc.shape, self.taken.shape)
        self.taken[rows, columns] |= disc[inside]

    def _candidates(self, number: int) -> np.ndarray:
        """Random places (x, y): as many per ground area near and far, thinner in some parts."""
        scene, rng = self.scene, self.rng
        height, width = scene.shape
        rows = np.arange(height)
        weight = (rows >= max(scene.top, scene.far * .4)) / scene.diameter(rows) ** 2
        weight[-2:] = 0
        y = rng.choice(rows, number, p=weight / weight.sum()) + rng.uniform(-.5, .5, number)
        x = rng.uniform(1, width - 2, number)
        if scene.kind == "stands":  # rows of seats
            steps = np.arange(400)
            seat_rows = scene.top + scene.far * .6 + steps * 1.3 * scene.far
            if scene.near > scene.far * 1.01:
                rate = (scene.near - scene.far) / (height - scene.top)
                growth = 1 + 1.3 * rate
                seat_rows = scene.top + scene.far * .6 + scene.far / rate * (growth ** steps - 1)
            seat_rows = seat_rows[seat_rows < height - 2]
            if len(seat_rows):
                nearest = np.abs(y[:, None] - seat_rows[None]).argmin(1)
                seated = seat_rows[nearest] + rng.normal(0, .08, number) * scene.diameter(y)
                loose = scene.fill > 0.6  # a full stand has people on the steps as well
                y = np.where((np.arange(number) % 4 == 0) & loose, y, seated)
        else:  # friends stand together
            friend = np.flatnonzero(rng.random(number) < .35)
            friend = friend[friend > 0]
            step = rng.normal(0, .3, (len(friend), 2)) + [1.35, 0]
            step *= rng.choice([-1, 1], (len(friend), 1)) * scene.diameter(y[friend - 1])[:, None]
            x[friend], y[friend] = x[friend - 1] + step[:, 0], y[friend - 1] + step[:, 1]
        x = np.clip(x, 1, width - 2)
        y = np.clip(y, max(scene.top, 2), height - 3)
        keep = self.crowding[y.astype(int), x.astype(int)] > rng.normal(-.9, .8, number)
        return np.stack([x, y], 1)[keep | (scene.fill > .7)]

    def take(self, number: int) -> np.ndarray:
        """Give (number, 3) new places: x, y and diameter in px. Narrows the spacing if it must."""
        start, target = len(self.places), len(self.places) + number
        tries = 0
        while len(self.places) < target:
            for x, y in self._candidates(40 + 8 * number).tolist():
                if self.taken[int(y + .5), int(x + .5)]:
                    continue
                base = self.scene.diameter(np.float64(y))
                # ages and builds differ; children are the lower tail
                size = base * min(max(self.rng.normal(1, .07), .78), 1.2)
                size = min(max(size, SMALLEST_HEAD), LARGEST_HEAD)
                self.places.append((x, y, size))
                self._block(x, y, size)
                if len(self.places) == target:
                    break
            else:
                tries += 1
                if tries > 2:
                    self.spacing *= 0.93
                    self.taken[:] = False
                    for place in self.places:
                        self._block(*place)
        return np.array(self.places[start:], np.float64).reshape(number, 3)


def _populate(rng, scene: Scene, people: int):
    """Place people until exactly `people` heads are visible enough.

    Returns the figures from back to front, the label map int32 (H, W) and the visible share of
    each annotated head. A head is judged after everything in front of it is there: surplus
    people leave, missing ones come, and people hidden beyond HIDDEN_SHARE leave as well.
    """
    room = _Room(rng, scene)
    figures: list[Figure] = []
    if people:
        figures += _people(rng, scene, room.take(people + people // 50 + 1))
    figures += _things(rng, scene, room)
    allowed = HIDDEN_SHARE
    for attempt in range(200):
        if attempt == 12:
            allowed = 0.0  # without hidden people, one who leaves uncovers nobody: it must settle
        figures.sort(key=lambda figure: figure.depth)
        label, shares = _visibility(figures, scene.shape)
        standing = np.array([i for i, f in enumerate(figures) if f.person], int)
        seen = shares[standing] >= VISIBLE
        hidden = standing[~seen]
        excess = len(hidden) - int(allowed * people)
        surplus = int(seen.sum()) - people
        leave: set[int] = set()
        if excess > 0:
            leave.update(rng.choice(hidden, excess, replace=False).tolist())
        elif surplus > 0:
            leave.update(rng.choice(standing[seen], surplus, replace=False).tolist())
        elif surplus == 0:
            return figures, *_renumber(label, figures, shares)
        figures = [f for i, f in enumerate(figures) if i not in leave]
        if surplus < 0:
            figures += _people(rng, scene, room.take(max(1, -surplus)))
    raise RuntimeError(
        f"no arrangement of {people} visible heads in {scene.shape[0]}x{scene.shape[1]} px found; "
        "draw fewer people, a larger shape or another seed")


def _visibility(figures: list[Figure], shape) -> tuple[np.ndarray, np.ndarray]:
    """Painter's algorithm on labels only: index + 1 of the figure whose head shows, else 0.

    Returns the map int32 (H, W) and per figure the visible share of its head; heads of fewer
    than LEAST_AREA visible px have share 0, and so have things that are no people.
    """
    label = np.zeros(shape, np.int32)
    whole = np.ones(len(figures))
    for i, figure in enumerate(figures):
        for j, sprite in enumerate(figure.sprites):
            is_head = figure.person and j == len(figure.sprites) - 1
            rows, columns, inside = _window(sprite.y, sprite.x, sprite.alpha.shape, shape)
            label[rows, columns][sprite.solid[inside]] = i + 1 if is_head else 0
            if is_head:
                whole[i] = max(np.count_nonzero(sprite.solid), 1)
    area = np.bincount(label.ravel(), minlength=len(figures) + 1)[1:]
    return label, np.where(area >= LEAST_AREA, area / whole, 0.0)


def _renumber(label, figures, shares) -> tuple[np.ndarray, np.ndarray]:
    """Number the annotated heads 1..N, back to front; everything else becomes 0."""
    keep = np.array([f.person for f in figures], bool) & (shares >= VISIBLE)
    number = np.zeros(len(figures) + 1, np.int32)
    number[1:][keep] = np.arange(1, keep.sum() + 1)
    return number[label], shares[keep]


def _annotate(rng, instances: np.ndarray, people: int) -> tuple[np.ndarray, np.ndarray]:
    """Dots and box sizes of the visible heads: points (N, 2) x y, boxes (N, 2) w h, float32.

    The dot starts at the head's pixel nearest to the centroid of what is visible; an annotator's
    hand moves it by about 6 % of the head size, but its nearest pixel stays on the head. So no
    two dots coincide.
    """
    if not people:
        return np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    y, x = np.nonzero(instances)
    head = instances[y, x] - 1
    area = np.bincount(head, minlength=people)
    centre_x = np.bincount(head, x, people) / area
    centre_y = np.bincount(head, y, people) / area
    distance = (x - centre_x[head]) ** 2 + (y - centre_y[head]) ** 2
    order = np.lexsort((distance, head))
    first = order[np.r_[0, np.cumsum(area)[:-1]]]
    pixel = np.stack([x[first], y[first]], 1).astype(np.float64)
    moved = pixel + rng.normal(0, .06, (people, 2)) * np.sqrt(area)[:, None]
    limit = np.array(instances.shape[::-1]) - 1
    moved = np.clip(moved, 0, limit).astype(np.float32)
    nearest = np.rint(moved).astype(int)
    strayed = instances[nearest[:, 1], nearest[:, 0]] != np.arange(1, people + 1)
    shift = rng.uniform(-.3, .3, (people, 2))
    moved[strayed] = np.clip(pixel + shift, 0, limit)[strayed]
    low = np.full((people, 2), 10 ** 6)
    high = np.full((people, 2), -1)
    np.minimum.at(low, head, np.stack([x, y], 1))
    np.maximum.at(high, head, np.stack([x, y], 1))
    return moved, (high - low + 1).astype(np.float32)


# ---------------------------------------------------------------------------- painting tools

def _window(y: int, x: int, patch, shape):
    """Slices (rows, columns) of the picture and (rows, columns) of a patch whose corner is y, x."""
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + patch[0], shape[0]), min(x + patch[1], shape[1])
    bottom, right = max(bottom, top), max(right, left)
    return (slice(top, bottom), slice(left, right),
            (slice(top - y, bottom - y), slice(left - x, right - x)))


def _blend(canvas: np.ndarray, sprite: Sprite) -> None:
    rows, columns, inside = _window(sprite.y, sprite.x, sprite.alpha.shape, canvas.shape[1:])
    part = canvas[:, rows, columns]
    part *= 1 - sprite.alpha[inside]
    part += sprite.rgb[(slice(None), *inside)]


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """One 256x256 tile of cloud noise that wraps round, mean 0, standard deviation 1."""
    white = np.fft.fft2(np.random.default_rng(0).standard_normal((256, 256)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    frequency[0, 0] = 1
    tile = np.fft.ifft2(white / frequency ** 0.8).real
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def _clouds(rng, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Slowly varying noise (H, W), about standard normal, some `cells` blobs across."""
    small = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))


def _column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


class _Batch:
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
        self.r = _column(radius)
        u = (self.x0 - x)[:, None, None] + np.arange(width)[None, None]
        v = (self.y0 - y)[:, None, None] + np.arange(height)[None, :, None]
        u, v = (u / self.r).astype(np.float32), (v / self.r).astype(np.float32)
        if lean is None:
            self.u, self.v = np.broadcast_arrays(u, v)
        else:
            c, s = np.cos(_column(lean)), np.sin(_column(lean))
            self.u, self.v = u * c + v * s, v * c - u * s
        self.alpha = np.zeros((len(radius), height, width), np.float32)
        self.rgb = np.zeros((3, *self.alpha.shape), np.float32)

    def ellipse(self, k, cu, cv, a, b, square=False) -> np.ndarray:
        """Share of each pixel that an ellipse (or a squarer superellipse) covers, persons k."""
        cu, cv, a, b = (_column(value) for value in (cu, cv, a, b))
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
        return np.clip(.5 + (_column(line) + bend * self.u[k] ** 2 - self.v[k]) * self.r[k], 0, 1)

    def capsule(self, k, start, end, half) -> np.ndarray:
        """Share of each pixel within `half` of the segment from start to end, both (n, 2)."""
        p, q = self.u[k] - _column(start[:, 0]), self.v[k] - _column(start[:, 1])
        du, dv = _column(end[:, 0] - start[:, 0]), _column(end[:, 1] - start[:, 1])
        along = np.clip((p * du + q * dv) / (du * du + dv * dv), 0, 1)
        distance = np.sqrt((p - along * du) ** 2 + (q - along * dv) ** 2)
        return np.clip(.5 + (_column(half) - distance) * self.r[k], 0, 1)

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
        tile = _noise()
        n = len(self.alpha)
        # at least one step of the tile per pixel: large heads shall show no blocks
        across, down = (max(scale, float(self.r.max())) for scale in (across, down))
        offset = rng.integers(0, 256, (2, n, 1, 1))
        columns = (self.u * across + offset[0]).astype(np.int32) & 255
        rows = (self.v * down + offset[1]).astype(np.int32) & 255
        return tile[rows, columns]

    def sprites(self, solid: np.ndarray | None = None) -> list[Sprite]:
        solid = self.alpha > 0.5 if solid is None else solid
        return [Sprite(int(y), int(x), self.rgb[:, i], self.alpha[i], solid[i])
                for i, (y, x) in enumerate(zip(self.y0, self.x0))]


def _chunks(radius: np.ndarray, area: float) -> list[np.ndarray]:
    """Indices in groups of similar size, small enough for the processor's cache."""
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


# ---------------------------------------------------------------------------- people

def _people(rng, scene: Scene, places: np.ndarray) -> list[Figure]:
    """Draw one figure per place (n, 3): x, y, head diameter in px."""
    n = len(places)
    yaw = scene.facing[0] + rng.normal(0, scene.facing[1], n)
    if scene.facing[1] > 2:
        yaw = rng.uniform(-math.pi, math.pi, n)
    cloth = CLOTH[rng.choice(len(CLOTH), n, p=CLOTH_WEIGHTS)]
    if scene.kind == "concert":
        cloth = np.where(rng.random((n, 1)) < .6, cloth * .35, cloth)
    if scene.team is not None:
        cloth = np.where(rng.random((n, 1)) < .55, scene.team[rng.integers(0, 2, n)], cloth)
    look = {
        "x": places[:, 0], "y": places[:, 1], "r": places[:, 2] / 2, "yaw": yaw,
        "lean": rng.normal(0, .12, n),
        "a": rng.uniform(.74, .88, n), "b": rng.uniform(.94, 1.06, n),
        "skin": np.clip(SKIN[rng.choice(8, n, p=(.16, .18, .17, .15, .12, .09, .08, .05))]
                        * rng.normal(1, .05, (n, 1)), 0, 1),
        "hair": np.clip(HAIR[rng.choice(len(HAIR), n, p=HAIR_WEIGHTS)]
                        * rng.normal(1, .15, (n, 1)), .02, 1),
        "cloth": np.clip(cloth * rng.normal(1, .12, (n, 1)) + rng.normal(0, .02, (n, 3)), .02, 1),
        "second": CLOTH[rng.choice(len(CLOTH), n, p=CLOTH_WEIGHTS)],
        "hat": CLOTH[rng.choice(len(CLOTH), n, p=CLOTH_WEIGHTS)],
        "style": rng.choice(6, n, p=(.07, .49, .25, .05, .08, .06)),  # see _heads
        "hats": rng.choice(6, n, p=(.79, .08, .05, .03, .02, .03)),
        "extra": rng.random(n), "face": rng.random(n),
    }
    bodies, props, heads = _bodies(rng, scene, look), _props(rng, scene, look), _heads(
        rng, scene, look)
    # who stands in front is decided by the ground, not by the head: tall people hide more
    depth = look["y"] + rng.normal(0, .25, n) * places[:, 2]
    figures = []
    for i in range(n):
        parts = [bodies[i], *([props[i]] if i in props else []), heads[i]]
        figures.append(Figure(float(depth[i]), parts))
    return figures


def _pick(look: dict, k: np.ndarray) -> dict:
    return {name: values[k] for name, values in look.items()}


def _heads(rng, scene: Scene, everyone: dict) -> list[Sprite]:
    """Heads: skull, hair, face, hat.

    style: 0 bald, 1 short, 2 long, 3 afro, 4 bun or tail, 5 headscarf.
    hats: 0 none, 1 cap, 2 beanie, 3 brimmed hat, 4 helmet, 5 hood.
    """
    made: list[Sprite | None] = [None] * len(everyone["r"])
    for members in _chunks(everyone["r"], 3.8 * 4.2):
        p = _pick(everyone, members)
        b = _Batch(p["x"], p["y"], p["r"], (-1.75, -1.75, 1.75, 1.85), p["lean"])
        every = slice(None)
        n, zero = len(members), np.zeros(len(members))
        a, h, style, hats = p["a"], p["b"], p["style"], p["hats"]
        turned, toward = np.sin(p["yaw"]), np.cos(p["yaw"])
        noise = b.grain(rng, 22, 7)
        above_view = 1 - scene.tilt  # seen from above, hair takes more of the head

        k = np.flatnonzero(style == 2)
        if len(k):
            down = .1 + .5 * p["extra"][k]
            b.paint(k, b.ellipse(k, -.08 * turned[k], down, a[k] + .14, h[k] + .02 + down * .5,
                                 True), p["hair"][k] * .85)
        k = np.flatnonzero((style == 3) & (hats == 0))
        if len(k):
            cover = b.ellipse(k, zero[k], zero[k] - .18, a[k] + .38, h[k] + .16)
            b.paint(k, np.clip(cover + .6 * noise[k] * (cover > 0) * (cover < 1), 0, 1),
                    p["hair"][k])
        k = np.flatnonzero((style == 4) & (hats == 0))
        if len(k):
            up = p["extra"][k] < .5
            b.paint(k, b.ellipse(k, -.5 * turned[k], np.where(up, -1.08, .5), .3 + .1 * up,
                                 np.where(up, .34, .9)), p["hair"][k])
        k = np.flatnonzero(style == 5)
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] + .12, a[k] + .17, h[k] + .2), p["hat"][k])
            b.paint(k, b.ellipse(k, zero[k] + .15 * turned[k], zero[k] + .95, a[k] + .05,
                                 zero[k] + .45), p["hat"][k] * .9)
        k = np.flatnonzero(hats == 5)
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .02, a[k] + .26, h[k] + .17),
                    p["cloth"][k] * .9)
        k = np.flatnonzero((style <= 1) & (hats < 4))
        for side in (-1, 1):
            shift = np.where(side * turned[k] > .5, .45, 1.0)
            b.paint(k, b.ellipse(k, side * a[k] * shift, zero[k] + .1, zero[k] + .15,
                                 zero[k] + .24), p["skin"][k] * .88)
        covered = (style == 5) | (hats == 5)
        base = np.where((style == 0)[:, None], p["skin"], p["hair"])
        base = np.where((style == 5)[:, None], p["hat"], base)
        base = np.where((hats == 5)[:, None], p["cloth"] * .75, base)
        skull = b.ellipse(every, zero, zero, a, h)
        b.paint(every, skull, base)
        k = np.flatnonzero((style == 1) & ~covered)
        if len(k):
            nape = skull[k] * (1 - b.above(k, .52 + .12 * p["extra"][k], -.25))
            b.paint(k, nape, p["skin"][k] * .8, inside=True)

        # the face turns with the head: it narrows and moves to the side, and is gone from behind
        wide = a * np.clip(.44 + .40 * toward, 0, .82) * np.where(style <= 1, 1.1, 1.0)
        k = np.flatnonzero(wide > .12)
        if len(k):
            middle = a[k] * .78 * turned[k]
            low = .2 + .35 * above_view - .1 * (style[k] == 0)
            cover = b.ellipse(k, middle, low, wide[k], .86 * h[k]) * skull[k]
            b.paint(k, cover, p["skin"][k], inside=True)
            self_hair = np.where(p["hair"][k].mean(1, keepdims=True) < .5, p["hair"][k], .3)
            beard = np.flatnonzero((p["face"][k] < .16) & (style[k] != 5))
            if len(beard):
                j = k[beard]
                cut = 1 - b.above(j, low[beard] + .28, .1)
                b.paint(j, cover[beard] * cut, self_hair[beard], inside=True)
            masked = np.flatnonzero(p["face"][k] > .93)
            if len(masked):
                j = k[masked]
                cut = 1 - b.above(j, low[masked] + .12)
                b.paint(j, cover[masked] * cut, np.tile([[.75, .85, .9]], (len(j), 1)),
                        inside=True)
            if b.r.max() > 4:
                for side in (-1, 1):
                    b.paint(k, .85 * b.ellipse(k, middle + side * .46 * wide[k], low - .12,
                                               .16 * wide[k] + .02, .07 + 0 * middle)
                            * cover, p["skin"][k] * .22, inside=True)
                    b.paint(k, .6 * b.ellipse(k, middle + side * .46 * wide[k], low - .3,
                                              .26 * wide[k] + .02, .05 + 0 * middle)
                            * cover, self_hair * .8, inside=True)
                b.paint(k, .35 * b.ellipse(k, middle + .1 * wide[k] * np.sign(scene.light[0]) * -1,
                                           low + .15, .14 * wide[k] + .02, .16 + 0 * middle)
                        * cover, p["skin"][k] * .6, inside=True)
                lips = np.flatnonzero((p["face"][k] > .16) & (p["face"][k] <= .93))
                if len(lips):
                    j = k[lips]
                    b.paint(j, .6 * b.ellipse(j, middle[lips], low[lips] + .42,
                                              .36 * wide[j] + .02, .06 + 0 * a[j]) * skull[j],
                            p["skin"][j] * [.72, .45, .42], inside=True)
                glasses = np.flatnonzero((p["face"][k] > .3) & (p["face"][k] < .42))
                if len(glasses):
                    j = k[glasses]
                    for side in (-1, 1):
                        b.paint(j, .9 * b.ellipse(j, middle[glasses] + side * .42 * wide[j],
                                                  low[glasses] - .12, .34 * wide[j] + .03,
                                                  .15 + 0 * a[j]) * cover[glasses],
                                np.full((len(j), 3), .07), inside=True)

        k = np.flatnonzero(hats == 1)
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .1, a[k] + .08, h[k] + .02)
                    * b.above(k, zero[k] - .22, .12), p["hat"][k])
            front = toward[k] > -.3
            b.paint(k, b.ellipse(k, turned[k] * .75, zero[k] - .2 + .1 * toward[k],
                                 np.where(front, .5 + .22 * np.abs(toward[k]), .05),
                                 np.where(front, .15, .03)), p["hat"][k] * .7)
        k = np.flatnonzero(hats == 2)
        if len(k):
            cap = b.ellipse(k, zero[k], zero[k] - .1, a[k] + .09, h[k] + .12)
            b.paint(k, cap * b.above(k, zero[k] - .12, .1), p["hat"][k])
            b.paint(k, cap * b.above(k, zero[k] - .12, .1) * (1 - b.above(k, zero[k] - .42, .1)),
                    p["second"][k], inside=True)
            j = k[p["extra"][k] < .4]
            b.paint(j, b.ellipse(j, zero[j], zero[j] - 1.25, zero[j] + .27, zero[j] + .25),
                    p["second"][j])
        k = np.flatnonzero(hats == 3)
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .34, a[k] + .68,
                                 .28 + .5 * above_view + zero[k]), p["hat"][k] * .85)
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .62, a[k], zero[k] + .6),
                    p["hat"][k])
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .36, a[k], zero[k] + .16),
                    p["second"][k], inside=True)
        k = np.flatnonzero(hats == 4)
        if len(k):
            hard = np.array([(.92, .75, .15), (.9, .9, .88), (.85, .3, .15), (.15, .15, .17)])
            b.paint(k, b.ellipse(k, zero[k], zero[k] - .12, a[k] + .16, h[k] + .08)
                    * b.above(k, zero[k] - .12, .08), hard[(p["extra"][k] * 4).astype(int)])
        # light on a ball; hair and cloth have a grain
        depth = np.sqrt(np.clip(1.15 - b.u ** 2 - b.v ** 2, 0, 1))
        lit = np.clip(b.u * scene.light[0] + b.v * scene.light[1] + depth * scene.light[2], 0, 1)
        shade = scene.ambient + (1.25 - scene.ambient) * lit
        shade *= 1 + .07 * noise
        shine = np.clip(lit - .86, 0, 1) * (.7 * (hats == 4) + .35)[:, None, None]
        b.rgb *= shade
        b.rgb += shine * b.alpha
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        for i, sprite in zip(members, b.sprites()):
            made[i] = sprite
    return made


def _bodies(rng, scene: Scene, everyone: dict) -> list[Sprite]:
    """Neck, trunk, arms and, where people stand loosely, legs; with a soft shadow round them."""
    made: list[Sprite | None] = [None] * len(everyone["r"])
    seated, whole = scene.kind == "stands", scene.fill < .75
    q = scene.tilt
    length = (8.6 if seated else 13.6 if whole else 7.5) * q
    for members in _chunks(everyone["r"], 5.6 * length):
        p = _pick(everyone, members)
        # nothing below the picture needs painting
        lowest = float(np.max((scene.shape[0] - p["y"]) / p["r"])) + .5
        b = _Batch(p["x"], p["y"], p["r"], (-2.7, .35, 2.7, max(min(length, lowest), 1.4)))
        every = slice(None)
        zero = np.zeros(len(members))
        toward = np.cos(p["yaw"])
        wide = (1.62 + .4 * p["extra"]) * (.68 + .32 * np.abs(toward))
        noise = b.grain(rng, 9, 5)
        distance = np.sqrt((b.u / 2.7) ** 2 + ((b.v - 3.2 * q) / (3.4 * q)) ** 2)
        halo = .5 * np.clip(1.25 - distance, 0, .6)
        if seated:
            for side in (-1, 1):
                knee = side * (.7 + .25 * p["face"])
                b.paint(every, b.ellipse(every, knee, zero + 7.0 * q, zero + .5, zero + 1.5 * q,
                                         True), p["second"] * .5)
                b.paint(every, b.ellipse(every, knee, zero + 5.7 * q, zero + .6, zero + .6 * q),
                        p["second"] * .65)
        elif whole:
            for side in (-1, 1):
                stride = rng.normal(0, .25, len(members))
                b.paint(every, b.ellipse(every, side * .55 * wide / 1.8 + stride * .3,
                                         zero + 9.3 * q, zero + .62, zero + 4.1 * q, True),
                        p["second"] * .6)
                b.paint(every, b.ellipse(every, side * .6 + stride * .6, zero + 13.1 * q,
                                         zero + .6, zero + .4 * q), p["hair"] * .6)
        for side in (-1, 1):
            swing = rng.normal(0, .12, len(members))
            start = np.stack([side * (wide - .42), zero + 2.1 * q], 1)
            elbow = np.stack([side * (wide + .02) + swing, zero + 4.2 * q], 1)
            hand = np.stack([side * (wide - (.9 if seated else .25)) + 2 * swing,
                             zero + (5.4 if seated else 6.6) * q], 1)
            b.paint(every, b.capsule(every, elbow, hand, zero + .33), p["skin"] * .85)
            sleeve = np.where((p["face"] > .45)[:, None], hand, elbow)
            b.paint(every, b.capsule(every, start, sleeve, zero + .46), p["cloth"] * .8)
        middle, half = (3.6 if seated else 3.9) * q, (2.5 if seated else 2.8) * q
        trunk = b.ellipse(every, zero, zero + middle, wide, zero + half, True)
        outward = np.abs(b.u) / _column(wide)
        shoulder = .9 * q + .12 + (.3 * outward + .85 * outward ** 4) * (.4 + .6 * q)
        trunk = trunk * np.clip(.5 + (b.v - shoulder) * b.r, 0, 1)
        trunk *= np.clip(.5 + (_column(wide) * (1.06 - .06 * b.v / q) - np.abs(b.u)) * b.r, 0, 1)
        b.paint(every, trunk, p["cloth"])
        pattern = (p["extra"] * 97) % 1
        k = np.flatnonzero(pattern < .14)  # stripes
        if len(k):
            wave = np.sin(b.v[k] * _column(3 + 5 * p["face"][k])) > .2
            b.paint(k, .9 * wave * trunk[k], p["second"][k], inside=True)
        k = np.flatnonzero((pattern > .14) & (pattern < .22))  # checks
        if len(k):
            wave = (np.sin(b.v[k] * 5) > .3) | (np.sin(b.u[k] * 5) > .3)
            b.paint(k, .5 * wave * trunk[k], p["second"][k], inside=True)
        k = np.flatnonzero((pattern > .22) & (pattern < .45) & (toward > 0))  # open jacket
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] + 3.6 * q, .2 + .3 * p["face"][k],
                                 zero[k] + 3.2 * q) * trunk[k], p["second"][k], inside=True)
        k = np.flatnonzero((pattern > .45) & (pattern < .6))  # print on the chest
        if len(k):
            b.paint(k, .85 * b.ellipse(k, zero[k], zero[k] + 2.9 * q, zero[k] + .7,
                                       .3 + .5 * p["face"][k]) * trunk[k],
                    p["second"][k], inside=True)
        k = np.flatnonzero((pattern > .85) & (toward < .2))  # rucksack
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] + 3.3 * q, zero[k] + 1.05,
                                 zero[k] + 1.7 * q, True), p["second"][k])
            b.paint(k, b.ellipse(k, zero[k], zero[k] + 3.9 * q, zero[k] + .75,
                                 zero[k] + .7 * q, True), p["second"][k] * .75)
        k = np.flatnonzero((pattern > .85) & (toward >= .2))  # straps
        for side in (-1, 1):
            b.paint(k, b.ellipse(k, side * .8 + zero[k], zero[k] + 2.6 * q, zero[k] + .17,
                                 zero[k] + 1.9 * q, True) * trunk[k], p["second"][k], inside=True)
        neck = b.ellipse(every, zero, zero + .95 * q + .15, zero + .42, zero + .62)
        b.paint(every, neck, p["skin"] * .7)
        k = np.flatnonzero((pattern > .6) & (pattern < .68))  # scarf
        if len(k):
            b.paint(k, b.ellipse(k, zero[k], zero[k] + 1.2 * q + .1, zero[k] + .85,
                                 zero[k] + .42), p["second"][k])
        # round trunk, darker below and under the chin, folds
        side_light = 1 - .3 * (b.u / _column(wide)) ** 2 + .28 * scene.light[0] * b.u
        chin = 1 - .4 * np.clip(1.6 - np.sqrt(b.u ** 2 + (b.v - .7) ** 2), 0, 1)
        shade = (scene.ambient * .55 + .5) * np.clip(side_light, .35, 1.5) * chin
        shade *= (1 + .12 * noise) * np.clip(1.08 - .035 * b.v, .6, 1.1)
        b.rgb *= shade
        solid = b.alpha > .5
        b.alpha += halo * (1 - b.alpha)  # black, so rgb stays
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        for i, sprite in zip(members, b.sprites(solid)):
            made[i] = sprite
    return made


def _props(rng, scene: Scene, everyone: dict) -> dict[int, Sprite]:
    """Raised arms, some with a phone, and placards: they hide heads behind, never one's own."""
    n = len(everyone["r"])
    share = {"concert": .14, "stands": .1, "street": .05, "park": .03}.get(scene.kind, .02)
    chosen = np.flatnonzero(rng.random(n) < share)
    made: dict[int, Sprite] = {}
    if not len(chosen):
        return made
    for group in _chunks(everyone["r"][chosen], 5.6 * 7):
        members = chosen[group]
        p = _pick(everyone, members)
        b = _Batch(p["x"], p["y"], p["r"], (-2.9, -4.2, 2.9, 2.4))
        every, m = slice(None), len(members)
        side = rng.choice([-1, 1], m)
        for both in (False, True):
            k = np.flatnonzero(rng.random(m) < .4) if both else np.arange(m)
            sign = side[k] * (-1 if both else 1)
            shoulder = np.stack([sign * 1.4, 1.9 + 0 * sign], 1)
            out, up = rng.uniform(1.6, 2.3, len(k)), rng.uniform(-.2, .6, len(k))
            elbow = np.stack([sign * out, up], 1)
            out, up = rng.uniform(1.2, 2.0, len(k)), rng.uniform(-2.3, -1.2, len(k))
            hand = np.stack([sign * out, up], 1)
            b.paint(k, b.capsule(k, shoulder, elbow, .42 + 0 * sign), p["cloth"][k] * .85)
            b.paint(k, b.capsule(k, elbow, hand, .3 + 0 * sign), p["skin"][k] * .9)
            b.paint(k, b.ellipse(k, hand[:, 0], hand[:, 1] - .15, .36 + 0 * sign, .42 + 0 * sign),
                    p["skin"][k])
            if both:
                continue
            phone = np.flatnonzero(p["face"] < .3)
            b.paint(phone, b.ellipse(phone, hand[phone, 0], hand[phone, 1] - .5,
                                     .34 + 0 * side[phone], .6 + 0 * side[phone], True),
                    np.full((len(phone), 3), .06))
            if scene.kind in ("street", "stands"):
                k = np.flatnonzero(p["face"] > .82)
                b.paint(k, b.ellipse(k, .6 * hand[k, 0], hand[k, 1] - 1.1, 1.5 + 0 * side[k],
                                     .85 + 0 * side[k], True), p["second"][k] * .5 + .45)
                script = (np.sin(b.v[k] * 9) > .3) & (b.grain(rng, 14, 1)[k] > -.3)
                b.paint(k, .8 * script * b.ellipse(k, .6 * hand[k, 0], hand[k, 1] - 1.1,
                                                   1.2 + 0 * side[k], .6 + 0 * side[k], True),
                        p["cloth"][k] * .5, inside=True)
        b.rgb *= (scene.ambient * .5 + .5) * (1 + .1 * b.grain(rng, 9, 9))
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        for i, sprite in zip(members, b.sprites()):
            made[int(i)] = sprite
    return made


def _things(rng, scene: Scene, room: _Room) -> list[Figure]:
    """Round things in the colours of heads: balls, knobs on posts, sacks, plants in pots."""
    loose = 1 - scene.fill
    number = int(rng.integers(3, 8 + int(18 * max(loose, 0))))
    places = room.take(number)
    colours = np.concatenate([SKIN, HAIR[:9], HAIR[:9], CLOTH])
    r = places[:, 2] / 2 * rng.uniform(.6, 1.25, number)
    first = colours[rng.integers(0, len(colours), number)]
    second = CLOTH[rng.integers(0, len(CLOTH), number)]
    sort = rng.integers(0, 5, number)
    made: list[Figure | None] = [None] * number
    for group in _chunks(r, 3.4 * 5):
        b = _Batch(places[group, 0], places[group, 1], r[group], (-1.7, -1.7, 1.7, 4.0))
        m = len(group)
        zero, every = np.zeros(m), slice(None)
        kind = sort[group]
        k = np.flatnonzero(kind == 1)  # post under a knob or lamp
        b.paint(k, b.ellipse(k, zero[k], zero[k] + 2.2, zero[k] + .3, zero[k] + 1.8, True),
                first[group][k] * .6)
        k = np.flatnonzero(kind == 2)  # pot under a plant
        b.paint(k, b.ellipse(k, zero[k], zero[k] + 1.5, zero[k] + .75, zero[k] + .8, True),
                SKIN[4] * np.ones((len(k), 1)))
        flat = np.where(kind == 4, .55, 1.0)  # a sack on the ground
        ball = b.ellipse(every, zero, zero, rng.uniform(.8, 1.05, m) / flat ** .5,
                         rng.uniform(.8, 1.1, m) * flat)
        noise = b.grain(rng, 16, 16)
        plant = (kind == 2)[:, None, None]
        ball = np.where(plant, np.clip(ball + .5 * noise * (ball > 0), 0, 1) * (ball > 0), ball)
        b.paint(every, ball, first[group])
        k = np.flatnonzero(kind == 2)
        b.paint(k, .8 * ball[k] * (noise[k] > .1), np.tile([[.2, .35, .15]], (len(k), 1)),
                inside=True)
        k = np.flatnonzero(kind == 3)  # two-coloured ball
        b.paint(k, ball[k] * (1 - b.above(k, zero[k] + .1, .4)), second[group][k], inside=True)
        depth = np.sqrt(np.clip(1.1 - b.u ** 2 - b.v ** 2, 0, 1))
        lit = np.clip(b.u * scene.light[0] + b.v * scene.light[1] + depth * scene.light[2], 0, 1)
        b.rgb *= (scene.ambient + (1.2 - scene.ambient) * lit) * (1 + .08 * noise)
        b.rgb += .5 * np.clip(lit - .85, 0, 1) * b.alpha
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        for i, sprite in zip(group, b.sprites()):
            made[i] = Figure(float(places[i, 1]), [sprite], person=False)
    return made


# ---------------------------------------------------------------------------- place and camera

def _background(rng, scene: Scene) -> np.ndarray:
    """Ground, and above it what the place has: sky, houses, trees, a stage, a wall. (3, H, W)."""
    height, width = scene.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    tile = _noise()
    colours = {
        "street": [(.38, .38, .39), (.5, .48, .46), (.3, .3, .32)],
        "park": [(.33, .42, .19), (.45, .47, .25), (.62, .53, .38)],
        "square": [(.62, .58, .52), (.5, .5, .5), (.7, .56, .44), (.42, .36, .32)],
        "stands": [(.5, .5, .5), (.25, .32, .5), (.55, .3, .25)],
        "concert": [(.1, .1, .12), (.2, .17, .15)], "hall": [(.5, .4, .3), (.45, .45, .47)]}
    options = colours[scene.kind]
    base = np.array(options[rng.integers(len(options))], np.float32)
    horizon = scene.top - .6 * scene.far
    # ground coordinates of each pixel, in heads, for a flat floor seen in this perspective
    grow = max((scene.near - scene.far) / max(height - scene.top, 1), 1e-3)
    scale = np.maximum(scene.far + grow * (y - scene.top), .3 * scene.far) / 2
    across = (x - width * rng.uniform(.3, .7)) / scale
    along = np.log(scale) / grow * 2
    fine = tile[(along * 24).astype(int) & 255, (across * 24).astype(int) & 255]
    rough = tile[(along * 6).astype(int) & 255, (across * 6).astype(int) & 255]
    value = 1 + .09 * fine + .10 * rough + .08 * _clouds(rng, scene.shape, 6)
    canvas = base[:, None, None] * value
    if scene.kind in ("square", "street", "hall") and rng.random() < .8:  # joints of the paving
        size = rng.uniform(2.5, 7)
        joint = (np.mod(across, size) < .12 * size ** .5) | (np.mod(along, size) < .1 * size ** .5)
        canvas *= 1 - .22 * joint
    if scene.kind == "stands":  # rows of seats, some coloured
        seat = np.array(CLOTH[rng.integers(len(CLOTH))])[:, None, None]
        step = 1.3 * 2
        row, column = np.mod(along, step) / step, np.mod(across, 2.3) / 2.3
        back = (row > .35) & (row < .85) & (column > .1) & (column < .9)
        number = tile[(along / step).astype(int) * 7 & 255, (across / 2.3).astype(int) * 13 & 255]
        step_edge = .6 + .4 * (row > .2)
        canvas = np.where(back, seat * (.85 + .12 * number) * value, canvas * step_edge)
    if scene.kind == "street" and rng.random() < .6:  # lane markings
        canvas = np.where(np.abs(np.mod(across + .02 * along, 24)) < .5, .75 * value, canvas)
    if horizon > 3:
        canvas[:, :int(horizon)] = _far_side(rng, scene, int(horizon))
    return np.clip(canvas, 0, 1).astype(np.float32)


def _far_side(rng, scene: Scene, height: int) -> np.ndarray:
    """What stands behind the crowd, (3, height, W)."""
    width, unit = scene.shape[1], scene.far
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    clouds = _clouds(rng, (height, width), 7) + .5 * _clouds(rng, (height, width), 20)
    if scene.kind in ("concert", "hall", "stands"):
        wall = np.array({"concert": (.06, .06, .09), "hall": (.6, .56, .5),
                         "stands": (.4, .42, .46)}[scene.kind])
        back = wall[:, None, None] * (1 + .03 * clouds) * (.8 + .4 * y / height)
        panel = rng.uniform(5, 14) * unit
        back *= 1 - .15 * (np.mod(x, panel) < 2)
        for _ in range(int(rng.integers(3, 14))):  # lamps and spotlights
            cx, cy = rng.uniform(0, width), rng.uniform(0, height)
            size = unit * rng.uniform(.25, .7)
            colour = (CLOTH[rng.integers(len(CLOTH))] * .5 + .5)[:, None, None]
            distance = np.hypot(x - cx, y - cy)
            glow = .6 * np.exp(-distance / (3 * size)) + np.clip(size - distance + .5, 0, 1)
            back = back + colour * np.minimum(glow, 1) * (1.0 if scene.kind == "concert" else .6)
        return back
    pale, deep = np.array([.86, .89, .92]), np.array([.45, .62, .85])
    if scene.weather or rng.random() < .4:
        deep = np.array([.74, .77, .8])
    mix = np.clip(y / height + .12 * clouds, 0, 1)
    back = deep[:, None, None] * (1 - mix) + pale[:, None, None] * mix
    walls = np.array([(.62, .50, .40), (.74, .66, .54), (.45, .30, .24), (.55, .55, .57),
                      (.80, .76, .70), (.36, .38, .42)])
    left = -rng.uniform(0, 40)
    built = rng.random() < (.9 if scene.kind == "street" else .35)
    while built and left < width:
        wide, high = rng.uniform(5, 16) * unit, height * rng.uniform(.35, 1.1)
        lo, hi, roof = max(int(left), 0), min(int(left + wide), width), max(int(height - high), 0)
        if hi > lo:
            ys, xs = y[roof:, lo:hi], x[roof:, lo:hi]
            wall = walls[rng.integers(len(walls))][:, None, None]
            tall, broad = rng.uniform(1.8, 3) * unit, rng.uniform(1.3, 2.4) * unit
            row, column = np.mod(ys - roof, tall) / tall, np.mod(xs - lo, broad) / broad
            pane = (row > .25) & (row < .75) & (column > .28) & (column < .72)
            glass = np.array([.2, .24, .3])[:, None, None] * (1 + .5 * clouds[roof:, lo:hi])
            part = wall * (1 + .05 * clouds[roof:, lo:hi]) * (1 - .06 * (row < .06))
            back[:, roof:, lo:hi] = np.where(pane, glass, part)
        left += wide * rng.uniform(.95, 1.25)
    tile = _noise()
    for _ in range(int(rng.integers(0, 4) if built else rng.integers(4, 12))):  # trees
        cx, crown = rng.uniform(0, width), rng.uniform(2.5, 7) * unit
        cy = height - crown * rng.uniform(.4, 1.3)
        leaf = tile[(y * 3).astype(int) & 255, (x * 3 + int(cx)).astype(int) & 255]
        inside = np.hypot((x - cx), (y - cy) * 1.2) / crown + .16 * leaf < .95
        shade = 1 + .25 * leaf - .3 * (y - cy) / crown
        green = np.array([.22, .34, .14]) * rng.uniform(.6, 1.3, 3)
        trunk = (np.abs(x - cx) < .12 * crown) & (y > cy)
        back = np.where(trunk & ~inside, np.array([.28, .21, .15])[:, None, None], back)
        back = np.where(inside, green[:, None, None] * shade, back)
    return back


def _ground_shadows(canvas: np.ndarray, scene: Scene, figures: list[Figure]) -> None:
    """Where people stand loosely in the open, each throws a shadow on the ground at the feet."""
    if scene.fill >= .35 or scene.weather:
        return
    for figure in figures:
        body = figure.sprites[0]
        if not figure.person or body.y + body.alpha.shape[0] > canvas.shape[1]:
            continue
        wide = body.alpha.shape[1]
        foot = body.y + body.alpha.shape[0] - 3
        half_x, half_y = .55 * wide, max(.12 * wide, 1.0)
        centre = body.x + wide / 2 - scene.light[0] * .5 * wide
        top, left = int(foot - half_y), int(centre - half_x)
        y, x = np.ogrid[0:int(2 * half_y) + 1, 0:int(2 * half_x) + 1]
        patch = np.clip(1.3 - np.hypot((x + left - centre) / half_x, (y + top - foot) / half_y),
                        0, 1).astype(np.float32)
        rows, columns, inside = _window(top, left, patch.shape, canvas.shape[1:])
        canvas[:, rows, columns] *= 1 - .5 * patch[inside]


def _photograph(rng, scene: Scene, canvas: np.ndarray) -> np.ndarray:
    """The camera: haze, rain or snow, colour cast, exposure, blur, noise, JPEG; uint8 (H, W, 3)."""
    height, width = scene.shape
    rows = np.arange(height, dtype=np.float32)
    if scene.weather:
        depth = scene.near / scene.diameter(rows) - .5
        depth[:max(int(scene.top), 0)] += .6
        through = np.exp(-rng.uniform(.1, .4) * depth).astype(np.float32)[None, :, None]
        haze = (np.array([.8, .82, .84]) * rng.uniform(.75, 1.0))[:, None, None]
        if scene.kind == "concert":
            haze = (CLOTH[rng.integers(len(CLOTH))] * .5 + .1)[:, None, None]
        canvas = canvas * through + haze.astype(np.float32) * (1 - through)
    if scene.kind == "concert":  # coloured light
        for _ in range(2):
            colour = np.clip(rng.uniform(.3, 1.2, 3), 0, 1).astype(np.float32)[:, None, None]
            field_ = np.clip(.5 + .5 * _clouds(rng, scene.shape, 3), 0, 1)
            canvas = canvas * (1 - .45 * field_ * (1 - colour))
    light = 1 + .07 * _clouds(rng, scene.shape, 3)  # clouds, vignetting
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    light = light * (1 - rng.uniform(0, .18) * (x * x + y * y))
    canvas = canvas * light.astype(np.float32)
    cast = rng.normal(1, .05, 3).astype(np.float32)
    gain = rng.uniform(.34, .5) / max(float(canvas.mean()), .05)  # the camera's exposure
    if scene.kind == "concert":
        gain *= .65
    gain = min(gain, 1.1 / float(np.percentile(canvas[:, ::4, ::4], 98)))
    canvas = np.clip(canvas * (cast * gain)[:, None, None], 0, 1)
    canvas = canvas ** np.float32(rng.uniform(.85, 1.1))
    level = rng.uniform(.6, 1.0)  # greyer or more colourful
    grey = canvas.mean(0, keepdims=True)
    canvas = grey + (canvas - grey) * np.float32(level)
    if scene.weather >= 2:
        canvas = _precipitation(rng, scene, canvas)
    image = np.ascontiguousarray(np.clip(canvas * 255, 0, 255).transpose(1, 2, 0)).astype(np.uint8)
    picture = Image.fromarray(image)
    sigma = rng.uniform(.7, 1.3) if scene.blurred else rng.uniform(.25, .55)
    picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    noisy = np.asarray(picture, np.float32)
    strength = rng.uniform(1.0, 5.0)
    grain = rng.standard_normal(noisy.shape, np.float32)
    grain += .7 * rng.standard_normal(noisy.shape[:2], np.float32)[..., None]
    noisy = noisy + strength * (.5 + np.sqrt(noisy / 255)) * grain
    picture = Image.fromarray(np.clip(noisy + .5, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(65, 96)))
    return np.array(Image.open(buffer).convert("RGB"))


def _precipitation(rng, scene: Scene, canvas: np.ndarray) -> np.ndarray:
    """Streaks of rain or flakes of snow over everything."""
    height, width = scene.shape
    drops = np.zeros((height, width), np.float32)
    number = int(height * width * rng.uniform(.0015, .004))
    y, x = rng.integers(0, height, number), rng.integers(0, width, number)
    if WEATHER[scene.weather] == "rain":
        slant, length = rng.uniform(-.4, .4), int(rng.integers(7, 16))
        for i in range(length):
            drops[(y + i) % height, (x + int(round(slant * i))) % width] += .3
        return canvas + np.clip(drops, 0, .6) * (.85 - canvas)
    drops[y, x] = 1
    big = rng.random(number) < .25
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        drops[(y[big] + dy) % height, (x[big] + dx) % width] = 1
    return canvas + .8 * drops * (.97 - canvas)


# ---------------------------------------------------------------------------- datasets

def write_dataset(layout: str, root: str | os.PathLike, *, train: int, test: int, seed: int,
                  jobs: int = 1, progress: bool = True) -> Path:
    """Draw a dataset of `train` + `test` images in the layout of a real one; return its folder.

    layout: `sha`, `qnrf` or `jhu` (which also gets ceil(test / 2) images of a `val` split). root:
    the folder that shall hold `ShanghaiTech/part_A`, `UCF-QNRF_ECCV18` or `jhu_crowd_v2.0`.
    jobs: processes that draw; the files do not depend on it. A script that sets jobs above 1
    needs the usual `if __name__ == "__main__":`, because processes are spawned.

    Beside every image lies its true label map, a 16-bit PNG. `synthetic.json`, written last,
    marks a whole dataset and holds the settings. Images that are already there are kept, so an
    interrupted call can be repeated. Each image carries its settings as a JPEG comment.

    Raises ValueError for an unknown layout or numbers that make no sense, and if the folder
    holds images that this call would not draw: nothing is ever overwritten.
    """
    if layout not in CHARACTERS:
        raise ValueError(f"layout: {layout!r} is unknown; choose from {sorted(CHARACTERS)}")
    for name, number, least in (("train", train, 1), ("test", test, 1), ("seed", seed, 0),
                                ("jobs", jobs, 1)):
        if number < least:
            raise ValueError(f"{name}: {number} is too small; give {least} or more")
    images = {"train": train, "test": test}
    if layout == "jhu":
        images = {"train": train, "val": -(-test // 2), "test": test}
    folder = Path(root) / CHARACTERS[layout].folder
    settings = {"generator": __name__, "version": VERSION, "layout": layout, "seed": seed,
                "images": images}
    marker = folder / "synthetic.json"
    if marker.exists() and (found := files.read_json(marker)) != settings:
        raise ValueError(f"{marker}: drawn with {found}, but {settings} was asked for; "
                         "delete the folder or choose another root")
    tasks = _tasks(layout, folder, images, seed)
    missing = _missing(tasks, folder)
    if missing:
        marker.unlink(missing_ok=True)
        bar = tqdm(total=len(missing), desc=f"drawing {layout}", unit="image",
                   disable=not progress)
        with bar:
            if jobs == 1:
                for task in missing:
                    _write_image(task)
                    bar.update()
            else:
                with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                    for _ in pool.map(_write_image, missing):
                        bar.update()
    if layout == "jhu":
        _write_image_labels(tasks, folder)
    files.write_json(marker, settings)
    return folder


@dataclass(frozen=True)
class Task:
    """One image to draw and the files it goes to."""

    layout: str
    name: str
    people: int
    seeds: tuple[int, ...]
    image: Path
    mask: Path
    annotation: Path

    @property
    def scene_seed(self) -> np.random.SeedSequence:
        return np.random.SeedSequence((*self.seeds, 0))

    @property
    def shape(self) -> tuple[int, int]:
        rng = np.random.default_rng(np.random.SeedSequence((*self.seeds, 1)))
        smallest, largest = CHARACTERS[self.layout].shapes
        return tuple(int(rng.integers(low, high + 1)) for low, high in zip(smallest, largest))

    @property
    def comment(self) -> bytes:
        """What the image says about itself: enough to draw it again."""
        return (f"synthetic crowd, {__name__} {VERSION}, {self.layout}, seed "
                f"{'-'.join(map(str, self.seeds))}, {self.people} people").encode()


def _tasks(layout: str, folder: Path, images: dict[str, int], seed: int) -> list[Task]:
    character = CHARACTERS[layout]
    tasks, total = [], 0
    for split in character.splits:
        split_number = character.splits.index(split)
        base = (seed, sorted(CHARACTERS).index(layout), split_number)
        counts = stratified_counts(np.random.SeedSequence(base), images[split], character)
        for index, people in enumerate(counts):
            number = index + 1
            if layout == "sha":
                place, name = folder / f"{split}_data", f"IMG_{number}"
                paths = (place / "images" / f"{name}.jpg", place / "instances" / f"{name}.png",
                         place / "ground-truth" / f"GT_{name}.mat")
            elif layout == "qnrf":
                place, name = folder / split.capitalize(), f"img_{number:04d}"
                paths = (place / f"{name}.jpg", place / f"{name}_instances.png",
                         place / f"{name}_ann.mat")
            else:  # numbers run through all splits
                place, name = folder / split, f"{total + number:04d}"
                paths = (place / "images" / f"{name}.jpg", place / "instances" / f"{name}.png",
                         place / "gt" / f"{name}.txt")
            tasks.append(Task(layout, name, people, (*base, number), *paths))
        total += images[split]
    return tasks


def stratified_counts(seed: np.random.SeedSequence, images: int, character: Character
                      ) -> list[int]:
    """People per image: log-uniform over the range, one image per equal part of it, shuffled.

    The share `character.empty` of the images, rounded (at least one of 8 or more), is empty.
    """
    rng = np.random.default_rng(seed)
    empty = round(character.empty * images)
    if character.empty and images >= 8:
        empty = max(empty, 1)
    low, high = (math.log(count) for count in character.counts)
    parts = (np.arange(images - empty) + rng.random(images - empty)) / max(images - empty, 1)
    counts = np.rint(np.exp(low + (high - low) * parts)).astype(int)
    return rng.permutation(np.r_[counts, np.zeros(empty, int)]).tolist()


def _missing(tasks: list[Task], folder: Path) -> list[Task]:
    """Tasks still to do; ValueError if there are images that none of the tasks would draw."""
    expected = {task.image: task.comment for task in tasks}
    for path in sorted(folder.rglob("*.jpg")):
        if path.name.startswith("."):
            continue
        try:
            with Image.open(path) as picture:
                found = picture.info.get("comment")
        except UnidentifiedImageError:
            found = None
        if found is None or found != expected.get(path):
            said = found.decode(errors="replace") if found else "no comment of this generator"
            raise ValueError(f"{path}: this image was not drawn by these settings (it says: "
                             f"{said}); choose another root, or delete it if it is not needed")
    return [task for task in tasks
            if not (task.image.exists() and task.mask.exists() and task.annotation.exists())]


def _write_image(task: Task) -> None:
    """Draw one image and write its files, the image last: where it is, the rest is too."""
    sample, facts = _draw(task.scene_seed, task.shape, task.people, CHARACTERS[task.layout],
                          task.name)
    files.write_png(task.mask, sample.instances.astype(np.uint16))
    if task.layout == "sha":
        cell = np.empty((1, 1), object)
        cell[0, 0] = {"location": sample.points.astype(np.float64),
                      "number": np.array([[task.people]], np.uint16)}
        _write_mat(task.annotation, {"image_info": cell})
    elif task.layout == "qnrf":
        _write_mat(task.annotation, {"annPoints": sample.points.astype(np.float64)})
    else:
        _write_jhu(task.annotation, sample, facts)
    with files.replacing(task.image) as temporary:
        Image.fromarray(sample.image).save(
            temporary, "JPEG", quality=JPEG_QUALITY, comment=task.comment)


def _write_mat(path: Path, content: dict) -> None:
    """Write a .mat without the date that scipy puts into the first 116 bytes."""
    buffer = io.BytesIO()
    savemat(buffer, content)
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"MATLAB 5.0 MAT-file, drawn by xmask".ljust(116)
                              + buffer.getvalue()[116:])


def _write_jhu(path: Path, sample: Sample, facts: dict) -> None:
    """Lines `x y w h occlusion blur` as JHU-CROWD++ has them: whole pixels; occlusion 1 visible,
    2 partly hidden, 3 mostly hidden; blur 1 for a blurred head."""
    level = np.digitize(-facts["visible"], [-.9, -.5]) + 1
    rows = [f"{x:.0f} {y:.0f} {w:.0f} {h:.0f} {occlusion} {int(facts['blurred'])}\n"
            for (x, y), (w, h), occlusion in zip(sample.points, sample.boxes, level)]
    files.write_text(path, "".join(rows))


def _write_image_labels(tasks: list[Task], folder: Path) -> None:
    """`image_labels.txt` of each split: `0001,count,scene,weather,distractor` a line.

    Weather: 0 clear, 1 fog, 2 rain, 3 snow; distractor: 1 for a picture without people.
    """
    rows: dict[str, list[str]] = {split: [] for split in CHARACTERS["jhu"].splits}
    for task in tasks:
        scene = _plan(np.random.default_rng(task.scene_seed), task.shape, task.people,
                      CHARACTERS["jhu"])
        rows[task.image.parent.parent.name].append(
            f"{task.name},{task.people},{scene.kind},{scene.weather},{int(task.people == 0)}\n")
    for split, lines in rows.items():
        files.write_text(folder / split / "image_labels.txt", "".join(lines))
