"""What the walkthroughs draw and count with: figures with alternative text, circles, coverage.

A figure of a walkthrough has a white ground on any page, colours of Okabe and Ito, and says in
words what it shows: the words are stored with the picture, and a test compares them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable

import matplotlib.style
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Circle
from PIL import Image
from torch import nn

from xmask import nnec
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import GREY
from xmask.trainer import Trainer

DPI = 90
MOST_CIRCLES = 12  # coverage above this is counted as this; only heads closer than 3 px reach it


def axes(rows: int = 1, columns: int = 1, *, width: float = 4.0, height: float = 3.0
         ) -> tuple[DescribedFigure, np.ndarray]:
    """A figure of rows x columns panels, each `width` x `height` inches: (figure, axes (N,) row
    by row, N = rows * columns)."""
    with matplotlib.style.context("default"):
        figure = DescribedFigure((width * columns, height * rows), dpi=DPI)
        made = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in made:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, made


def picture(axis: Axes, image: np.ndarray, title: str = "", **options) -> None:
    """Show an image (H, W) or (H, W, 3) on an axis, without ticks; options of `Axes.imshow`."""
    axis.imshow(image, **{"interpolation": "nearest"} | options)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def circles(axis: Axes, points: np.ndarray, radii: np.ndarray, *, colour: str = GREY,
            width: float = 1.0) -> None:
    """Draw circles of `radii` (N,) px around `points` (N, 2) (x, y) px on an image's axis."""
    patches = [Circle((float(x), float(y)), float(r)) for (x, y), r in zip(points, radii)]
    axis.add_collection(PatchCollection(patches, facecolor="none", edgecolor=colour,
                                        linewidth=width))


def show(figure: DescribedFigure, alt: str) -> None:
    """Display a figure, with `alt`, what it shows in a sentence, for those who do not see it."""
    stream = io.BytesIO()
    with matplotlib.style.context("default"):
        figure.savefig(stream, format="png", dpi=DPI, facecolor="white", bbox_inches="tight",
                       pad_inches=0.06)
    with Image.open(stream) as full:
        small = full.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    display({"image/png": stream.getvalue(), "text/plain": f"Figure: {alt}"}, raw=True,
            metadata={"image/png": {"alt": alt}, "needs_background": "light"})


def embedding_colours(embeddings: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Embeddings (D, H, W) as pictures (H, W, 3) in 0..1: their three main directions as colours.

    The directions are those of all embeddings together, so that equal colours mean equal
    vectors across the pictures.
    """
    embeddings = [np.asarray(one, np.float64) for one in embeddings]
    flat = [one.reshape(len(one), -1).T for one in embeddings]
    everything = np.concatenate(flat)
    centre = everything.mean(0)
    _, vectors = np.linalg.eigh(np.cov((everything - centre).T))
    main = vectors[:, :-4:-1]
    main = main * np.sign(main[np.abs(main).argmax(0), np.arange(3)])  # eigenvectors have no sign
    low, high = np.quantile((everything - centre) @ main, (0.01, 0.99), axis=0)
    return [(((values - centre) @ main - low) / (high - low)).clip(0, 1)
            .reshape(*one.shape[1:], 3) for values, one in zip(flat, embeddings)]


def coverage(points: np.ndarray, shape: tuple[int, int], *, min_radius: float = 3.0
             ) -> np.ndarray:
    """How many exclusion circles cover each pixel: (H, W) int64.

    points: (N, 2) (x, y) px. shape: (H, W). min_radius: px, of `nnec.exclusion_radii`.
    """
    radii = nnec.exclusion_radii(points, shape, min_radius)
    _, pixel = nnec.incidence(points, radii, shape)
    return np.bincount(pixel, minlength=shape[0] * shape[1]).reshape(shape)


def coverage_table(annotated: Iterable[tuple[np.ndarray, tuple[int, int]]]) -> pd.DataFrame:
    """Pixels by the number of circles that cover them, summed over images.

    annotated: (points (N, 2), (H, W)) of every image. Returns the columns circles (0 to 12),
    pixels, and pixels_unclipped: the same without the 3 px below which a radius is never taken.
    """
    found = np.zeros((2, MOST_CIRCLES + 1), np.int64)
    for points, shape in annotated:
        for row, smallest in enumerate((3.0, 0.0)):
            counts = coverage(points, shape, min_radius=smallest).clip(0, MOST_CIRCLES)
            found[row] += np.bincount(counts.ravel(), minlength=MOST_CIRCLES + 1)
    return pd.DataFrame({"circles": np.arange(MOST_CIRCLES + 1), "pixels": found[0],
                         "pixels_unclipped": found[1]})


class WatchedTrainer(Trainer):
    """A trainer that keeps teacher and student as they were when epochs of `keep` began.

    At the end, `teachers` and `students` map each of these epochs, and the last one, to a
    network in evaluation mode. Other arguments: of `xmask.trainer.Trainer`.
    """

    def __init__(self, *arguments, keep: Iterable[int] = (), **options):
        super().__init__(*arguments, **options)
        self.keep = set(keep)
        self.teachers: dict[int, nn.Module] = {}
        self.students: dict[int, nn.Module] = {}

    def run_epoch(self) -> dict[str, float]:
        """See `Trainer.run_epoch`."""
        if self.epoch in self.keep:
            self._keep()
        row = super().run_epoch()
        if self.finished:
            self._keep()
        return row

    def _keep(self) -> None:
        for kept, network in ((self.teachers, self.teacher), (self.students, self.student)):
            kept[self.epoch] = copy.deepcopy(network).eval()
