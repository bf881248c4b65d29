"""The camera: haze, rain or snow, colour cast, exposure, blur, noise and JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from xmask.synthetic.colours import CLOTH
from xmask.synthetic.scene import WEATHER, Scenery
from xmask.synthetic.sprites import cloud_field


def photograph(rng, scene: Scenery, canvas: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) uint8 that the camera takes of a painted scene (3, H, W) float32."""
    height, width = scene.shape
    rows = np.arange(height, dtype=np.float32)
    if scene.weather:
        depth = 1 / scene.diameter(rows)  # distance, 0 at the nearest and 1 at the farthest heads
        depth = (depth - depth[-1]) / max(depth[0] - depth[-1], 1e-6)
        depth[:max(int(scene.top), 0)] += .4
        through = np.exp(-.1 - rng.uniform(.2, .9) * depth).astype(np.float32)[None, :, None]
        haze = (np.array([.8, .82, .84]) * rng.uniform(.75, 1.0))[:, None, None]
        if scene.kind == "concert":
            haze = (CLOTH[rng.integers(len(CLOTH))] * .5 + .1)[:, None, None]
        canvas = canvas * through + haze.astype(np.float32) * (1 - through)
    if scene.kind == "concert":  # coloured light
        for _ in range(2):
            colour = np.clip(rng.uniform(.3, 1.2, 3), 0, 1).astype(np.float32)[:, None, None]
            field_ = np.clip(.5 + .5 * cloud_field(rng, scene.shape, 3), 0, 1)
            canvas = canvas * (1 - .45 * field_ * (1 - colour))
    light = 1 + .07 * cloud_field(rng, scene.shape, 3)  # clouds, vignetting
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
    sigma = rng.uniform(.55, .85) if scene.blurred else rng.uniform(.25, .5)
    picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    noisy = np.asarray(picture, np.float32)
    strength = rng.uniform(1.0, 3.5)
    grain = rng.standard_normal(noisy.shape, np.float32)
    grain += .7 * rng.standard_normal(noisy.shape[:2], np.float32)[..., None]
    noisy = noisy + strength * (.5 + np.sqrt(noisy / 255)) * grain
    picture = Image.fromarray(np.clip(noisy + .5, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(78, 96)))
    return np.array(Image.open(buffer).convert("RGB"))


def _precipitation(rng, scene: Scenery, canvas: np.ndarray) -> np.ndarray:
    """Streaks of rain or flakes of snow over everything."""
    height, width = scene.shape
    drops = np.zeros((height, width), np.float32)
    number = int(height * width * rng.uniform(.0008, .0025))
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
