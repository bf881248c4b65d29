"""One picture of the whole method, on a drawn crowd: what EDP-SAM, network and teacher do.

Its pictures are computed, not sketched: EDP-SAM with the classical segmenter, and the package's
model of drawn crowds. `xmask docs --diagram` writes it for light and for dark pages.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from xmask import edp_sam, files, nnec, segmenters
from xmask.features import upsample
from xmask.model import STRIDE
from xmask.predict import network_maps
from xmask.study import illustrations
from xmask.synthetic import draw_scene
from xmask.tools import models
from xmask.tools.overlay import BLUE, GREEN, ORANGE, SKY, YELLOW, overlay

FOLDER = Path("figures") / "method"
THEMES = {"light": ("white", "#1F2328"), "dark": ("#0D1117", "#E6EDF3")}
WINDOW = slice(90, 186), slice(150, 278)  # rows and columns of the scene that are shown
SEED, SHAPE, PEOPLE = 41, (256, 384), 90
# (x, y, width, height, colour, text) of the lower part, in its own coordinates
BOXES = (
    (0.00, 0.60, 0.21, 0.36, GREEN, "5, 10 or 40% of the photos:\n"
     "dots on every head,\nmasks by EDP-SAM"),
    (0.00, 0.04, 0.21, 0.36, SKY, "all photos,\nas if without labels"),
    (0.30, 0.04, 0.20, 0.36, ORANGE, "teacher:\nmoving mean\nof the student"),
    (0.56, 0.04, 0.18, 0.36, YELLOW, "pseudo points,\npseudo masks"),
    (0.80, 0.30, 0.20, 0.40, BLUE, "student: the network above\n1 learns points\n2 learns masks\n"
     "3 points under the masks"),
)
ARROWS = (((0.21, 0.78), (0.80, 0.60)), ((0.21, 0.22), (0.30, 0.22)), ((0.50, 0.22), (0.56, 0.22)),
          ((0.74, 0.22), (0.82, 0.30)), ((0.80, 0.46), (0.42, 0.40)))


def panels() -> tuple[list[tuple[str, np.ndarray]], np.ndarray, np.ndarray]:
    """(title, picture (h, w, 3) uint8 or float) of the two upper rows, computed; and the circles of
    the second picture: centres (N, 2) and radii (N,), px in it."""
    scene = draw_scene(SEED, shape=SHAPE, people=PEOPLE)
    image, points = scene.image, scene.points.astype(float)
    radii = nnec.exclusion_radii(points, scene.shape)
    none = np.zeros(scene.shape, np.int32)
    size = edp_sam.local_head_radius(points, radii, scene.shape)
    near = nnec.circles(points, np.minimum(radii, edp_sam.REACH * size), scene.shape)
    region = edp_sam.superpixel_regions(image, points, size, near)
    superpixels = near.select(region).lowest_wins(near.squared[region])
    masks, _ = edp_sam.generate_masks(image, points, segmenters.open_segmenter("classical"))

    model = models.load("drawn", "cpu")
    logits, embedding = network_maps(model.network, image)
    height, width = scene.shape
    density = upsample(torch.sigmoid(logits)[None, None], STRIDE)[0, 0, :height, :width].numpy()
    colours, = illustrations.embedding_colours(
        [upsample(embedding[None], STRIDE)[0, :, :height, :width]])
    found = model.predict(image)
    shown = 0.5 * image / 255 + density[..., None] * np.array([1.0, 0.8, 0.1])
    every = [
        ("a dot on every head", overlay(image, none, points)),
        ("circles to the nearest head:\nnobody else is inside", overlay(image, none, points)),
        ("two prompts a head:\ndot and superpixel", overlay(image, superpixels, points)),
        ("one mask a head,\nno pixel has two", overlay(image, masks, points)),
        ("a photo", image),
        ("density: where heads are", shown.clip(0, 1)),
        ("embedding: whose pixel it is", colours),
        ("the lowest energy in each circle\nwins the pixel", overlay(
            image, found.instances, found.heads)),
    ]
    rows, columns = WINDOW
    return ([(title, picture[WINDOW]) for title, picture in every],
            points - (columns.start, rows.start), radii)


def draw(theme: str) -> Figure:
    """The diagram; theme: "light" or "dark"."""
    ground, ink = THEMES[theme]
    with matplotlib.style.context(["default", {"font.family": "DejaVu Sans", "text.color": ink}]):
        figure = Figure(figsize=(11.5, 7.6), dpi=130, facecolor=ground)
        names = ("Masks from dots\n(EDP-SAM)", "The network\n(XMask)", "Learning from\nfew labels")
        for place, name in zip((0.83, 0.53, 0.17), names):
            figure.text(0.055, place, name, fontsize=12, fontweight="bold", ha="center",
                        va="center", rotation=90)
        pictures, points, radii = panels()
        for k, (title, picture) in enumerate(pictures):
            row, column = divmod(k, 4)
            axis = figure.add_axes((0.10 + 0.225 * column, 0.69 - 0.31 * row, 0.205, 0.225))
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(title, fontsize=9.5, color=ink)
            if k == 1:
                illustrations.circles(axis, points, radii, colour=YELLOW, width=1.2)
            if column < 3:
                axis.annotate("", (1.10, 0.5), (1.01, 0.5), xycoords="axes fraction",
                              arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 1.6})
        _learning(figure.add_axes((0.10, 0.02, 0.88, 0.29)), ink)
    return figure


def _learning(axis: Axes, ink: str) -> None:
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_axis_off()
    for x, y, width, height, colour, text in BOXES:
        axis.add_patch(FancyBboxPatch(
            (x + 0.005, y), width - 0.01, height, boxstyle="round,pad=0,rounding_size=0.015",
            facecolor=colour, edgecolor=ink, alpha=0.35, mutation_aspect=3))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)
    for begin, end in ARROWS:
        axis.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=14, color=ink,
                                       lw=1.6))


def write(folder: str | Path = FOLDER) -> list[Path]:
    """Write light.png and dark.png into `folder`; the same bytes every time."""
    paths = []
    for theme, (ground, _) in THEMES.items():
        path = Path(folder) / f"{theme}.png"
        with files.replacing(path) as temporary:
            draw(theme).savefig(temporary, format="png", facecolor=ground, metadata={
                "Software": None, "Description": "The method in one picture, on a drawn crowd"})
        paths.append(path)
    return paths

