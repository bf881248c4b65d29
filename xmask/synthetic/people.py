"""People and things that could be taken for heads, as sprites from back to front.

Sizes are in units of the head's half height, which is how figure drawing books give proportions.
"""

from __future__ import annotations

import math

import numpy as np

from xmask.synthetic.colours import CLOTH, CLOTH_WEIGHTS, HAIR, HAIR_WEIGHTS, SKIN
from xmask.synthetic.places import Room
from xmask.synthetic.scene import Scenery
from xmask.synthetic.sprites import Figure, Patches, Sprite, chunks, per_person

THINGS = 0.03  # things that could be taken for heads, per person; two more are allowed


def draw_people(rng, scene: Scenery, places: np.ndarray) -> list[Figure]:
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
    bodies, props, heads = (paint(rng, scene, look) for paint in (_bodies, _props, _heads))
    # who stands in front is decided by the ground, not by the head: tall people hide more
    depth = look["y"] + rng.normal(0, .25, n) * places[:, 2]
    return [Figure(float(depth[i]), [bodies[i], *([props[i]] if i in props else []), heads[i]])
            for i in range(n)]


def _pick(look: dict, k: np.ndarray) -> dict:
    return {name: values[k] for name, values in look.items()}


def _heads(rng, scene: Scenery, everyone: dict) -> dict[int, Sprite]:
    """Heads: skull, hair, face, hat.

    style: 0 bald, 1 short, 2 long, 3 afro, 4 bun or tail, 5 headscarf.
    hats: 0 none, 1 cap, 2 beanie, 3 brimmed hat, 4 helmet, 5 hood.
    """
    made: dict[int, Sprite] = {}
    for members in chunks(everyone["r"], 3.8 * 4.2):
        p = _pick(everyone, members)
        b = Patches(p["x"], p["y"], p["r"], (-1.75, -1.75, 1.75, 1.85), p["lean"])
        noise = b.grain(rng, 22, 7)
        p |= {"turned": np.sin(p["yaw"]), "toward": np.cos(p["yaw"])}
        above_view = 1 - scene.tilt  # seen from above, hair takes more of the head
        _paint_behind_skull(b, p, noise)
        skull = _paint_skull(b, p)
        _paint_face(b, p, skull, above_view, scene)
        _paint_hat(b, p, above_view)
        # light on a ball; hair and cloth have a grain
        depth = np.sqrt(np.clip(1.15 - b.u ** 2 - b.v ** 2, 0, 1))
        lit = np.clip(b.u * scene.light[0] + b.v * scene.light[1] + depth * scene.light[2], 0, 1)
        shade = scene.ambient + (1.25 - scene.ambient) * lit
        shade *= 1 + .07 * noise
        shine = np.clip(lit - .86, 0, 1) * (.7 * (p["hats"] == 4) + .35)[:, None, None]
        b.rgb *= shade
        b.rgb += shine * b.alpha
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        made.update(zip(members.tolist(), b.sprites()))
    return made


def _paint_behind_skull(b: Patches, p: dict, noise: np.ndarray) -> None:
    """Long hair, afro, bun, scarf, hood, ears."""
    a, h, style, hats, turned = (p[name] for name in ("a", "b", "style", "hats", "turned"))
    k = np.flatnonzero(style == 2)
    down = .1 + .5 * p["extra"][k]
    b.paint(k, b.ellipse(k, -.08 * turned[k], down, a[k] + .14, h[k] + .02 + down * .5, True),
            p["hair"][k] * .85)
    k = np.flatnonzero((style == 3) & (hats == 0))
    cover = b.ellipse(k, 0, -.18, a[k] + .38, h[k] + .16)
    b.paint(k, np.clip(cover + .6 * noise[k] * (cover > 0) * (cover < 1), 0, 1), p["hair"][k])
    k = np.flatnonzero((style == 4) & (hats == 0))
    up = p["extra"][k] < .5
    b.paint(k, b.ellipse(k, -.5 * turned[k], np.where(up, -1.08, .5), .3 + .1 * up,
                         np.where(up, .34, .9)), p["hair"][k])
    k = np.flatnonzero(style == 5)
    b.paint(k, b.ellipse(k, 0, .12, a[k] + .17, h[k] + .2), p["hat"][k])
    b.paint(k, b.ellipse(k, .15 * turned[k], .95, a[k] + .05, .45), p["hat"][k] * .9)
    k = np.flatnonzero(hats == 5)
    b.paint(k, b.ellipse(k, 0, -.02, a[k] + .26, h[k] + .17), p["cloth"][k] * .9)
    k = np.flatnonzero((style <= 1) & (hats < 4))
    for side in (-1, 1):
        shift = np.where(side * turned[k] > .5, .45, 1.0)
        b.paint(k, b.ellipse(k, side * a[k] * shift, .1, .15, .24), p["skin"][k] * .88)


def _paint_skull(b: Patches, p: dict) -> np.ndarray:
    """Skull with its hair; returns the share of each pixel that it covers."""
    a, h, style, hats = (p[name] for name in ("a", "b", "style", "hats"))
    every = slice(None)
    covered = (style == 5) | (hats == 5)
    base = np.where((style == 0)[:, None], p["skin"], p["hair"])
    base = np.where((style == 5)[:, None], p["hat"], base)
    base = np.where((hats == 5)[:, None], p["cloth"] * .75, base)
    skull = b.ellipse(every, 0, 0, a, h)
    b.paint(every, skull, base)
    k = np.flatnonzero((style == 1) & ~covered)
    nape = skull[k] * (1 - b.above(k, .52 + .12 * p["extra"][k], -.25))
    b.paint(k, nape, p["skin"][k] * .8, inside=True)
    return skull


def _paint_face(b: Patches, p: dict, skull: np.ndarray, above_view: float, scene: Scenery) -> None:
    """The face turns with the head: it narrows and moves to the side, and is gone from behind."""
    a, h, style, turned, toward = (p[name] for name in ("a", "b", "style", "turned", "toward"))
    wide = a * np.clip(.44 + .40 * toward, 0, .82) * np.where(style <= 1, 1.1, 1.0)
    k = np.flatnonzero(wide > .12)
    middle = a[k] * .78 * turned[k]
    low = .2 + .35 * above_view - .1 * (style[k] == 0)
    cover = b.ellipse(k, middle, low, wide[k], .86 * h[k]) * skull[k]
    b.paint(k, cover, p["skin"][k], inside=True)
    self_hair = np.where(p["hair"][k].mean(1, keepdims=True) < .5, p["hair"][k], .3)
    beard = np.flatnonzero((p["face"][k] < .16) & (style[k] != 5))
    j = k[beard]
    cut = 1 - b.above(j, low[beard] + .28, .1)
    b.paint(j, cover[beard] * cut, self_hair[beard], inside=True)
    masked = np.flatnonzero(p["face"][k] > .93)
    j = k[masked]
    cut = 1 - b.above(j, low[masked] + .12)
    b.paint(j, cover[masked] * cut, np.array([[.75, .85, .9]]), inside=True)
    _paint_features(b, p, k, skull, cover, middle, low, wide, self_hair, scene)


def _paint_features(b: Patches, p: dict, k: np.ndarray, skull: np.ndarray, cover: np.ndarray,
                    middle: np.ndarray, low: np.ndarray, wide: np.ndarray, self_hair: np.ndarray,
                    scene: Scenery) -> None:
    """Eyes, brows, nose, lips and glasses of the faces of persons k, where heads are large enough
    to show them; middle, low: where the face is; cover: what it covers."""
    if b.r.max() <= 4:
        return
    for side in (-1, 1):
        eye = middle + side * .46 * wide[k]
        b.paint(k, .85 * b.ellipse(k, eye, low - .12, .16 * wide[k] + .02, .07) * cover,
                p["skin"][k] * .22, inside=True)
        b.paint(k, .6 * b.ellipse(k, eye, low - .3, .26 * wide[k] + .02, .05) * cover,
                self_hair * .8, inside=True)
    nose = middle + .1 * wide[k] * np.sign(scene.light[0]) * -1
    b.paint(k, .35 * b.ellipse(k, nose, low + .15, .14 * wide[k] + .02, .16) * cover,
            p["skin"][k] * .6, inside=True)
    lips = np.flatnonzero((p["face"][k] > .16) & (p["face"][k] <= .93))
    j = k[lips]
    mouth = b.ellipse(j, middle[lips], low[lips] + .42, .36 * wide[j] + .02, .06)
    b.paint(j, .6 * mouth * skull[j], p["skin"][j] * [.72, .45, .42], inside=True)
    glasses = np.flatnonzero((p["face"][k] > .3) & (p["face"][k] < .42))
    j = k[glasses]
    for side in (-1, 1):
        glass = b.ellipse(j, middle[glasses] + side * .42 * wide[j], low[glasses] - .12,
                          .34 * wide[j] + .03, .15)
        b.paint(j, .9 * glass * cover[glasses], np.full((1, 3), .07), inside=True)


def _paint_hat(b: Patches, p: dict, above_view: float) -> None:
    """Cap, beanie, brimmed hat or helmet."""
    a, h, hats, turned, toward = (p[name] for name in ("a", "b", "hats", "turned", "toward"))
    k = np.flatnonzero(hats == 1)
    b.paint(k, b.ellipse(k, 0, -.1, a[k] + .08, h[k] + .02) * b.above(k, -.22, .12), p["hat"][k])
    front = toward[k] > -.3
    b.paint(k, b.ellipse(k, turned[k] * .75, -.2 + .1 * toward[k],
                         np.where(front, .5 + .22 * np.abs(toward[k]), .05),
                         np.where(front, .15, .03)), p["hat"][k] * .7)
    k = np.flatnonzero(hats == 2)
    cap = b.ellipse(k, 0, -.1, a[k] + .09, h[k] + .12)
    b.paint(k, cap * b.above(k, -.12, .1), p["hat"][k])
    b.paint(k, cap * b.above(k, -.12, .1) * (1 - b.above(k, -.42, .1)), p["second"][k], inside=True)
    j = k[p["extra"][k] < .4]
    b.paint(j, b.ellipse(j, 0, -1.25, .27, .25), p["second"][j])
    k = np.flatnonzero(hats == 3)
    b.paint(k, b.ellipse(k, 0, -.34, a[k] + .68, .28 + .5 * above_view), p["hat"][k] * .85)
    b.paint(k, b.ellipse(k, 0, -.62, a[k], .6), p["hat"][k])
    b.paint(k, b.ellipse(k, 0, -.36, a[k], .16), p["second"][k], inside=True)
    k = np.flatnonzero(hats == 4)
    hard = np.array([(.92, .75, .15), (.9, .9, .88), (.85, .3, .15), (.15, .15, .17)])
    b.paint(k, b.ellipse(k, 0, -.12, a[k] + .16, h[k] + .08) * b.above(k, -.12, .08),
            hard[(p["extra"][k] * 4).astype(int)])


def _bodies(rng, scene: Scenery, everyone: dict) -> dict[int, Sprite]:
    """Neck, trunk, arms and, where people stand loosely, legs; with a soft shadow round them."""
    made: dict[int, Sprite] = {}
    seated, q = scene.kind == "stands", scene.tilt
    for members in chunks(everyone["r"], 5.6 * 10 * q):
        p = _pick(everyone, members)
        # where people stand close nobody's legs are seen
        whole = scene.load * 2 * float(p["r"].mean()) / scene.near < .7
        length = (8.6 if seated else 13.6 if whole else 7.5) * q
        # nothing below the picture needs painting
        lowest = float(np.max((scene.shape[0] - p["y"]) / p["r"])) + .5
        b = Patches(p["x"], p["y"], p["r"], (-2.7, .35, 2.7, max(min(length, lowest), 1.4)))
        every = slice(None)
        wide = (1.62 + .4 * p["extra"]) * (.68 + .32 * np.abs(np.cos(p["yaw"])))
        noise = b.grain(rng, 9, 5)
        distance = np.sqrt((b.u / 2.7) ** 2 + ((b.v - 3.2 * q) / (3.4 * q)) ** 2)
        halo = .5 * np.clip(1.25 - distance, 0, .6)
        _paint_limbs(rng, b, p, wide, q, seated, whole)
        middle, half = (3.6 if seated else 3.9) * q, (2.5 if seated else 2.8) * q
        trunk = b.ellipse(every, 0, middle, wide, half, True)
        outward = np.abs(b.u) / per_person(wide)
        shoulder = .9 * q + .12 + (.3 * outward + .85 * outward ** 4) * (.4 + .6 * q)
        trunk = trunk * np.clip(.5 + (b.v - shoulder) * b.r, 0, 1)
        trunk *= np.clip(.5 + (per_person(wide) * (1.06 - .06 * b.v / q) - np.abs(b.u)) * b.r, 0, 1)
        b.paint(every, trunk, p["cloth"])
        pattern = (p["extra"] * 97) % 1
        _paint_clothes(b, p, pattern, trunk, q)
        neck = b.ellipse(every, 0, .95 * q + .15, .42, .62)
        b.paint(every, neck, p["skin"] * .7)
        k = np.flatnonzero((pattern > .6) & (pattern < .68))  # scarf
        b.paint(k, b.ellipse(k, 0, 1.2 * q + .1, .85, .42), p["second"][k])
        # round trunk, darker below and under the chin, folds
        side_light = 1 - .3 * (b.u / per_person(wide)) ** 2 + .28 * scene.light[0] * b.u
        chin = 1 - .4 * np.clip(1.6 - np.sqrt(b.u ** 2 + (b.v - .7) ** 2), 0, 1)
        shade = (scene.ambient * .55 + .5) * np.clip(side_light, .35, 1.5) * chin
        shade *= (1 + .12 * noise) * np.clip(1.08 - .035 * b.v, .6, 1.1)
        b.rgb *= shade
        solid = b.alpha > .5
        b.alpha += halo * (1 - b.alpha)  # black, so rgb stays
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        made.update(zip(members.tolist(), b.sprites(solid)))
    return made


def _paint_limbs(rng, b: Patches, p: dict, wide: np.ndarray, q: float, seated: bool, whole: bool
                 ) -> None:
    """Knees or legs, and arms. wide: (n,) half widths of the trunks; q: tilt of the scene."""
    every, zero = slice(None), np.zeros(len(wide))
    if seated:
        for side in (-1, 1):
            knee = side * (.7 + .25 * p["face"])
            b.paint(every, b.ellipse(every, knee, 7.0 * q, .5, 1.5 * q, True), p["second"] * .5)
            b.paint(every, b.ellipse(every, knee, 5.7 * q, .6, .6 * q), p["second"] * .65)
    elif whole:
        for side in (-1, 1):
            stride = rng.normal(0, .25, len(wide))
            leg = side * .55 * wide / 1.8 + stride * .3
            b.paint(every, b.ellipse(every, leg, 9.3 * q, .62, 4.1 * q, True), p["second"] * .6)
            b.paint(every, b.ellipse(every, side * .6 + stride * .6, 13.1 * q, .6, .4 * q),
                    p["hair"] * .6)
    for side in (-1, 1):
        swing = rng.normal(0, .12, len(wide))
        start = np.stack([side * (wide - .42), zero + 2.1 * q], 1)
        elbow = np.stack([side * (wide + .02) + swing, zero + 4.2 * q], 1)
        hand = np.stack([side * (wide - (.9 if seated else .25)) + 2 * swing,
                        zero + (5.4 if seated else 6.6) * q], 1)
        b.paint(every, b.capsule(every, elbow, hand, .33), p["skin"] * .85)
        sleeve = np.where((p["face"] > .45)[:, None], hand, elbow)
        b.paint(every, b.capsule(every, start, sleeve, .46), p["cloth"] * .8)


def _paint_clothes(b: Patches, p: dict, pattern: np.ndarray, trunk: np.ndarray, q: float) -> None:
    """What is on or over the trunk: stripes, checks, a jacket, a print, a rucksack.

    pattern: (n,) in 0..1, who wears what; trunk: (n, h, w), the share of each pixel it covers.
    """
    toward = np.cos(p["yaw"])
    k = np.flatnonzero(pattern < .14)  # stripes
    wave = np.sin(b.v[k] * per_person(3 + 5 * p["face"][k])) > .2
    b.paint(k, .9 * wave * trunk[k], p["second"][k], inside=True)
    k = np.flatnonzero((pattern > .14) & (pattern < .22))  # checks
    wave = (np.sin(b.v[k] * 5) > .3) | (np.sin(b.u[k] * 5) > .3)
    b.paint(k, .5 * wave * trunk[k], p["second"][k], inside=True)
    k = np.flatnonzero((pattern > .22) & (pattern < .45) & (toward > 0))  # open jacket
    b.paint(k, b.ellipse(k, 0, 3.6 * q, .2 + .3 * p["face"][k], 3.2 * q) * trunk[k], p["second"][k],
            inside=True)
    k = np.flatnonzero((pattern > .45) & (pattern < .6))  # print on the chest
    b.paint(k, .85 * b.ellipse(k, 0, 2.9 * q, .7, .3 + .5 * p["face"][k]) * trunk[k],
            p["second"][k], inside=True)
    k = np.flatnonzero((pattern > .85) & (toward < .2))  # rucksack
    b.paint(k, b.ellipse(k, 0, 3.3 * q, 1.05, 1.7 * q, True), p["second"][k])
    b.paint(k, b.ellipse(k, 0, 3.9 * q, .75, .7 * q, True), p["second"][k] * .75)
    k = np.flatnonzero((pattern > .85) & (toward >= .2))  # straps
    for side in (-1, 1):
        b.paint(k, b.ellipse(k, side * .8, 2.6 * q, .17, 1.9 * q, True) * trunk[k], p["second"][k],
                inside=True)


def _props(rng, scene: Scenery, everyone: dict) -> dict[int, Sprite]:
    """Raised arms, some with a phone, and placards: they hide heads behind, never one's own."""
    n = len(everyone["r"])
    share = {"concert": .14, "stands": .1, "street": .05, "park": .03}.get(scene.kind, .02)
    chosen = np.flatnonzero(rng.random(n) < share)
    made: dict[int, Sprite] = {}
    for group in chunks(everyone["r"][chosen], 5.6 * 7):
        members = chosen[group]
        p = _pick(everyone, members)
        b = Patches(p["x"], p["y"], p["r"], (-2.9, -4.2, 2.9, 2.4))
        m = len(members)
        side = rng.choice([-1, 1], m)
        for both in (False, True):
            k = np.flatnonzero(rng.random(m) < .4) if both else np.arange(m)
            sign = side[k] * (-1 if both else 1)
            shoulder = np.stack([sign * 1.4, 1.9 + 0 * sign], 1)
            out, up = rng.uniform(1.6, 2.3, len(k)), rng.uniform(-.2, .6, len(k))
            elbow = np.stack([sign * out, up], 1)
            out, up = rng.uniform(1.2, 2.0, len(k)), rng.uniform(-2.3, -1.2, len(k))
            hand = np.stack([sign * out, up], 1)
            b.paint(k, b.capsule(k, shoulder, elbow, .42), p["cloth"][k] * .85)
            b.paint(k, b.capsule(k, elbow, hand, .3), p["skin"][k] * .9)
            b.paint(k, b.ellipse(k, hand[:, 0], hand[:, 1] - .15, .36, .42), p["skin"][k])
            if both:
                continue
            phone = np.flatnonzero(p["face"] < .3)
            b.paint(phone, b.ellipse(phone, hand[phone, 0], hand[phone, 1] - .5, .34, .6, True),
                    np.full((1, 3), .06))
            if scene.kind in ("street", "stands"):
                k = np.flatnonzero(p["face"] > .82)
                x, y = .6 * hand[k, 0], hand[k, 1] - 1.1
                b.paint(k, b.ellipse(k, x, y, 1.5, .85, True), p["second"][k] * .5 + .45)
                script = (np.sin(b.v[k] * 9) > .3) & (b.grain(rng, 14, 1)[k] > -.3)
                b.paint(k, .8 * script * b.ellipse(k, x, y, 1.2, .6, True), p["cloth"][k] * .5,
                        inside=True)
        b.rgb *= (scene.ambient * .5 + .5) * (1 + .1 * b.grain(rng, 9, 9))
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        made.update(zip(members.tolist(), b.sprites()))
    return made


def draw_things(rng, scene: Scenery, room: Room, people: int) -> list[Figure]:
    """Round things in the colours of heads: balls, knobs on posts, sacks, plants in pots."""
    number = int(rng.integers(0, 3 + int(THINGS * people)))
    places = room.take(number)
    colours = np.concatenate([SKIN, HAIR[:9], HAIR[:9], CLOTH])
    r = places[:, 2] / 2 * rng.uniform(.6, 1.25, number)
    first = colours[rng.integers(0, len(colours), number)]
    second = CLOTH[rng.integers(0, len(CLOTH), number)]
    sort = rng.integers(0, 5, number)
    made: list[Figure | None] = [None] * number
    for group in chunks(r, 3.4 * 5):
        b = Patches(places[group, 0], places[group, 1], r[group], (-1.7, -1.7, 1.7, 4.0))
        m = len(group)
        every = slice(None)
        kind = sort[group]
        k = np.flatnonzero(kind == 1)  # post under a knob or lamp
        b.paint(k, b.ellipse(k, 0, 2.2, .3, 1.8, True), first[group][k] * .6)
        k = np.flatnonzero(kind == 2)  # pot under a plant
        b.paint(k, b.ellipse(k, 0, 1.5, .75, .8, True), SKIN[4:5])
        flat = np.where(kind == 4, .55, 1.0)  # a sack on the ground
        ball = b.ellipse(every, 0, 0, rng.uniform(.8, 1.05, m) / flat ** .5,
                         rng.uniform(.8, 1.1, m) * flat)
        noise = b.grain(rng, 16, 16)
        plant = (kind == 2)[:, None, None]
        ball = np.where(plant, np.clip(ball + .5 * noise * (ball > 0), 0, 1) * (ball > 0), ball)
        b.paint(every, ball, first[group])
        k = np.flatnonzero(kind == 2)
        b.paint(k, .8 * ball[k] * (noise[k] > .1), np.array([[.2, .35, .15]]), inside=True)
        k = np.flatnonzero(kind == 3)  # two-coloured ball
        b.paint(k, ball[k] * (1 - b.above(k, .1, .4)), second[group][k], inside=True)
        depth = np.sqrt(np.clip(1.1 - b.u ** 2 - b.v ** 2, 0, 1))
        lit = np.clip(b.u * scene.light[0] + b.v * scene.light[1] + depth * scene.light[2], 0, 1)
        b.rgb *= (scene.ambient + (1.2 - scene.ambient) * lit) * (1 + .08 * noise)
        b.rgb += .5 * np.clip(lit - .85, 0, 1) * b.alpha
        np.clip(b.rgb, 0, b.alpha, out=b.rgb)
        for i, sprite in zip(group, b.sprites()):
            made[i] = Figure(float(places[i, 1]), [sprite], person=False)
    return made
