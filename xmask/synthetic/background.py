"""The place itself: ground, what stands behind the crowd, and shadows on the ground."""

from __future__ import annotations

import numpy as np

from xmask.synthetic.colours import CLOTH
from xmask.synthetic.scene import Scenery
from xmask.synthetic.sprites import Figure, cloud_field, cloud_tile, window


def paint_background(rng, scene: Scenery) -> np.ndarray:
    """Ground, and above it what the place has: sky, houses, trees, a stage, a wall. (3, H, W)."""
    height, width = scene.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    tile = cloud_tile()
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
    value = 1 + .09 * fine + .10 * rough + .08 * cloud_field(rng, scene.shape, 6)
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


def _far_side(rng, scene: Scenery, height: int) -> np.ndarray:
    """What stands behind the crowd, (3, height, W)."""
    width, unit = scene.shape[1], scene.far
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    clouds = cloud_field(rng, (height, width), 7) + .5 * cloud_field(rng, (height, width), 20)
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
    tile = cloud_tile()
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


def paint_ground_shadows(canvas: np.ndarray, scene: Scenery, figures: list[Figure]) -> None:
    """Where people stand loosely in the open, each throws a shadow on the ground at the feet.

    canvas: (3, H, W) float32, painted in place.
    """
    if scene.load >= .5 or scene.weather:
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
        rows, columns, inside = window(top, left, patch.shape, canvas.shape[1:])
        canvas[:, rows, columns] *= 1 - .5 * patch[inside]
