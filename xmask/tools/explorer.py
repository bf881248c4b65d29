"""Move the thresholds of the decoding and watch pixels change owner (paper: pseudo-masks).

`Explorer` holds one image and answers what theta, lambda and sigma make of it; it knows no
widgets. What no slider changes is computed once: circles, the incidence list, the geometric term,
and, for each step of the sigma slider, the distances in the smoothed embedding. A move is then
one multiply-add over the list, the minimum per pixel and one painting. `explore` puts sliders on
it in a notebook.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from xmask import decode, nnec
from xmask.features import flat_features, sample_at, smooth, upsample
from xmask.predict import Predictor, scaled
from xmask.tools.overlay import mark, overlay

if TYPE_CHECKING:
    import ipywidgets

_PAIRS = 1 << 15  # pairs whose features are gathered at once: a few MB
SIGMAS = (0.0, 0.75, 1.5, 2.25, 3.0, 4.0)  # px; the paper smooths with 1.5 in training, 3 after
PICTURES = ("masks", "ownership", "energy", "image")
_TOP = 2.0  # energy that has the lightest colour; theta is 0.8 to 1.1 in the paper


@dataclass(frozen=True)
class ExplorerSettings:
    """What is looked at: thresholds, and what is painted.

    theta: energy from which a pixel is background. geometry_weight: lambda, weight of the
    distance to the head. sigma: px, one of `Explorer.sigmas`. show: "masks", "ownership" (the head
    of lowest energy, whatever theta says), "energy" (that energy) or "image". circles, points:
    draw exclusion circles and heads on top.
    """

    theta: float = 1.1
    geometry_weight: float = 0.8
    sigma: float = 3.0
    show: str = "masks"
    circles: bool = False
    points: bool = True


class Explorer:
    """One image with its heads and its embedding.

    image: (H, W, 3) uint8. points: (N, 2) (x, y) px. embedding: (D, h, w) tensor at stride 4 that
    covers the image. sigmas: the smoothings to prepare, px.
    """

    def __init__(self, image: np.ndarray, points: np.ndarray, embedding: torch.Tensor, *,
                 sigmas: tuple[float, ...] = SIGMAS):
        self.image, self.points, self.sigmas = image, np.asarray(points, np.float32), sigmas
        shape = self.shape = image.shape[:2]
        heads = torch.from_numpy(self.points).double()
        self.radii = nnec.exclusion_radii(heads, shape, lone=decode.LONE_RADIUS)
        self._pairs = nnec.circles(heads, self.radii, shape)
        reach = self.radii[self._pairs.head]
        full = upsample(embedding.cpu(), 4)[:, :shape[0], :shape[1]]
        self._spread = (self._pairs.squared / reach.square()).to(full.dtype)
        self._distance = {sigma: self._to_head(smooth(full, sigma), heads) for sigma in sigmas}
        self._last: tuple[tuple[float, float], tuple[np.ndarray, np.ndarray]] | None = None
        self._rim = self._pairs.pixel[self._pairs.squared.sqrt() > reach - 0.72].numpy()

    @classmethod
    def of(cls, model: Predictor, image: np.ndarray) -> Explorer:
        """The heads and the embedding that a model finds in an image, which it may resize first."""
        image = scaled(image, model.decoding.scale)
        logits, embedding = model.maps(image)
        found = decode.predict(logits, embedding, image.shape[:2], model.decoding)
        return cls(image, found.points, embedding)

    def _to_head(self, features: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """(M,) |f(u) - f(p_i)| of every pair, of smoothed features (D, H, W) and heads (N, 2)."""
        flat, centres = flat_features(features), sample_at(features, heads)
        parts = zip(self._pairs.pixel.split(_PAIRS), self._pairs.head.split(_PAIRS))
        return torch.cat([torch.linalg.vector_norm(flat[pixel] - centres[head], dim=1)
                          for pixel, head in parts])

    @property
    def pairs(self) -> int:
        """Length of the incidence list: (head, pixel) pairs with the pixel in the head's circle."""
        return len(self._pairs)

    def assign(self, geometry_weight: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """(owner, energy), (H, W) int32 and float32: per pixel the head, from 1, that claims it
        with the lowest energy, and that energy; 0 and infinity outside of all circles. Kept until
        others are asked for: a picture and the line below it ask for the same.

        Raises ValueError for a sigma that was not prepared.
        """
        if sigma not in self._distance:
            raise ValueError(f"sigma: {sigma} was not prepared; choose one of "
                             f"{', '.join(map(str, self.sigmas))}, or give sigmas to Explorer")
        if self._last is not None and self._last[0] == (geometry_weight, sigma):
            return self._last[1]
        energy = self._distance[sigma] + geometry_weight * self._spread
        lowest = torch.full((self.shape[0] * self.shape[1],), torch.inf)
        lowest.scatter_reduce_(0, self._pairs.pixel, energy, "amin")
        found = self._pairs.lowest_wins(energy).numpy(), lowest.view(self.shape).numpy()
        for array in found:
            array.setflags(write=False)
        self._last = (geometry_weight, sigma), found
        return found

    def label_map(self, settings: ExplorerSettings) -> np.ndarray:
        """(H, W) int32: what `decode.instance_map` gives with these thresholds."""
        owner, lowest = self.assign(settings.geometry_weight, settings.sigma)
        return owner * (lowest < settings.theta)

    def paint(self, settings: ExplorerSettings) -> np.ndarray:
        """(H, W, 3) uint8 picture with these settings."""
        if settings.show not in PICTURES:
            raise ValueError(f"show: {settings.show!r} is not one of {', '.join(PICTURES)}")
        owner, lowest = self.assign(settings.geometry_weight, settings.sigma)
        if settings.show == "image":
            painted = self.image.copy()
        elif settings.show == "energy":  # made for colour-blind readers: dark to light
            painted = colormaps["cividis"](lowest / _TOP, bytes=True)[..., :3].copy()
            painted[owner == 0] = 255
        else:
            labels = owner * (lowest < settings.theta) if settings.show == "masks" else owner
            painted = overlay(self.image, labels, opacity=0.45)
        if settings.circles:
            painted.reshape(-1, 3)[self._rim] = 0 if settings.show == "energy" else 255
        if settings.points:
            mark(painted, self.points)
        return painted

    def summary(self, settings: ExplorerSettings) -> dict[str, float]:
        """heads; with_mask: heads that own a pixel; covered: share of pixels in masks; median
        area of a mask, px."""
        area = np.bincount(self.label_map(settings).ravel(), minlength=len(self.points) + 1)[1:]
        return {"heads": len(self.points), "with_mask": int((area > 0).sum()),
                "covered": float(area.sum() / (self.shape[0] * self.shape[1])),
                "median_area": float(np.median(area[area > 0])) if area.any() else 0.0}


def jpeg(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as JPEG, for the browser: faster to encode than PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def explore(explorer: Explorer, settings: ExplorerSettings | None = None) -> ipywidgets.Widget:
    """Sliders for theta, lambda and sigma, a choice of picture, and the picture.

    Show it in a notebook by making it the last value of a cell. `settings` is where it starts.
    """
    import ipywidgets as w

    settings = settings or ExplorerSettings()
    style = {"description_width": "9em"}
    wide = w.Layout(width="32em", max_width="98%")
    slider = dict(min=0, max=2, step=0.05, style=style, layout=wide, readout_format=".2f")
    controls = {
        "theta": w.FloatSlider(settings.theta, description="θ, threshold", **slider),
        "geometry_weight": w.FloatSlider(settings.geometry_weight, description="λ, geometry",
                                         **slider),
        "sigma": w.SelectionSlider(options=explorer.sigmas, value=settings.sigma, style=style,
                                   layout=wide, description="σ, smoothing (px)"),
        "show": w.ToggleButtons(options=PICTURES, value=settings.show,
                                style={"button_width": "7em"}),
        "circles": w.Checkbox(settings.circles, description="exclusion circles", indent=False,
                              layout=w.Layout(width="12em")),
        "points": w.Checkbox(settings.points, description="heads", indent=False,
                             layout=w.Layout(width="8em")),
    }
    picture = w.Image(format="jpeg", layout=w.Layout(max_width="100%", object_fit="contain"))
    line = w.HTML()

    def refresh(_=None) -> None:
        now = ExplorerSettings(**{name: control.value for name, control in controls.items()})
        picture.value = jpeg(explorer.paint(now))
        line.value = describe(explorer, now)

    for control in controls.values():
        control.observe(refresh, names="value")
    refresh()
    box = w.VBox([controls["theta"], controls["geometry_weight"], controls["sigma"],
                  controls["show"], w.HBox([controls["circles"], controls["points"]]), line,
                  picture])
    box.controls = controls  # for tests, and for notebooks that set a slider
    return box


def describe(explorer: Explorer, settings: ExplorerSettings) -> str:
    """One line about what these settings show."""
    s = explorer.summary(settings)
    scale = f"; dark is energy 0, light {_TOP:g}, white no circle" * (settings.show == "energy")
    return (f"{s['heads']} heads, {s['with_mask']} with a mask; masks cover "
            f"{100 * s['covered']:.1f}% of the image, median {s['median_area']:.0f} px{scale}")
