"""One scene from its seed: plan, crowd, background and photograph."""

from __future__ import annotations

import numpy as np

from xmask.data.sample import Sample
from xmask.synthetic.background import paint_background, paint_ground_shadows
from xmask.synthetic.camera import photograph
from xmask.synthetic.crowd import annotate, populate
from xmask.synthetic.scene import CHARACTERS, Character, plan_scenery
from xmask.synthetic.sprites import blend

PIXELS_PER_PERSON = 64  # draw_scene refuses denser scenes: heads of 6 px would not stay apart


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
    return draw(seed, shape, people, CHARACTERS[character], "scene")[0]


def draw(seed, shape, people: int, character: Character, name: str) -> tuple[Sample, dict]:
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
    scene = plan_scenery(rng, (height, width), people, character)
    figures, instances, shares = populate(rng, scene, people)

    canvas = paint_background(rng, scene)
    paint_ground_shadows(canvas, scene, figures)
    for figure in figures:
        for sprite in figure.sprites:
            blend(canvas, sprite)
    image = photograph(rng, scene, canvas)
    points, boxes = annotate(rng, instances, people)
    sample = Sample(image=image, points=points, instances=instances, name=name, boxes=boxes)
    facts = {"kind": scene.kind, "weather": scene.weather, "blurred": scene.blurred,
             "visible": shares, "figures": sum(f.person for f in figures),
             "things": sum(not f.person for f in figures)}
    return sample, facts
