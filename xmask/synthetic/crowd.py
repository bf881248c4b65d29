"""The crowd of a scene, until exactly as many heads as wanted show, and its annotation."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import find_objects

from xmask.synthetic.people import draw_people, draw_things
from xmask.synthetic.places import Room
from xmask.synthetic.scene import Scenery
from xmask.synthetic.sprites import Figure, window

VISIBLE = 0.3  # a head that shows less than this share is not annotated
HIDDEN_SHARE = 0.02  # at most this share of people may stand there without an annotation
LEAST_AREA = 4  # px of a visible head


def populate(rng, scene: Scenery, people: int):
    """Place people until exactly `people` heads are visible enough.

    Returns the figures from back to front, the label map int32 (H, W) and the visible share of
    each annotated head. A head is judged after everything in front of it is there: surplus
    people leave, missing ones come, and people hidden beyond HIDDEN_SHARE leave as well.
    """
    room = Room(rng, scene)
    figures: list[Figure] = []
    if people:
        figures += draw_people(rng, scene, room.take(people + people // 50 + 1))
    figures += draw_things(rng, scene, room, people)
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
            figures += draw_people(rng, scene, room.take(max(1, -surplus)))
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
            rows, columns, inside = window(sprite.y, sprite.x, sprite.alpha.shape, shape)
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


def annotate(rng, instances: np.ndarray, people: int) -> tuple[np.ndarray, np.ndarray]:
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
    sizes = [(across.stop - across.start, down.stop - down.start)
             for down, across in find_objects(instances)]
    return moved, np.array(sizes, np.float32)
