"""Move the thresholds of the decoding and watch pixels change owner (paper: pseudo-masks).

`Explorer` holds one image and answers what theta, lambda and sigma make of it; it knows no
widgets. What no slider changes is computed once: circles, the incidence list, the geometric term,
and, for each step of the sigma slider, the distances in the smoothed embedding. A move is then
one multiply-add over the list, one minimum per pixel and one painting. `explore` puts sliders on
it in a notebook.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from xmask import decode, nnec
from xmask.features import flat_features, sample_at, smooth, upsample
from xmask.predict import Predictor
from xmask.tools.overlay import INSTANCES

if TYPE_CHECKING:
    import ipywidgets

_PAIRS = 1 << 15  # pairs whose features are gathered at once: a few MB
SIGMAS = (0.0, 0.75, 1.5, 2.25, 3.0, 4.0)  # px; the paper smooths with 1.5 in training, 3 after
PICTURES = ("masks", "ownership", "energy", "image")
_TOP = 2.0  # energy that has the lightest colour; theta is 0.8 to 1.1 in the paper
_OPACITY = 0.45


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
    Preparing costs a smoothing and a pass over the incidence list for each sigma.
    """

    def __init__(self, image: np.ndarray, points: np.ndarray, embedding: torch.Tensor, *,
                 sigmas: tuple[float, ...] = SIGMAS):
        self.image, self.points, self.sigmas = image, np.asarray(points, np.float32), sigmas
        shape = self.shape = image.shape[:2]
        heads = torch.from_numpy(self.points).double()
        self.radii = nnec.exclusion_radii(heads, shape, lone=decode.LONE_RADIUS)
        pairs = nnec.circles(heads, self.radii, shape)
        order, self._layers = _layers(pairs.pixel.numpy())
        pairs = pairs.select(order)
        self._owner = (pairs.head + 1).to(torch.int32).numpy()
        self._pixel = pairs.pixel.numpy()
        full = upsample(embedding.cpu(), 4)[:, :shape[0], :shape[1]]
        self._distance: dict[float, np.ndarray] = {}
        for sigma in sigmas:
            features = smooth(full, sigma)
            distance, spread = _pair_terms(
                features, sample_at(features, heads), self.radii, pairs)
            self._distance[sigma], self._spread = distance.numpy(), spread.numpy()
        # pictures are painted as one number a pixel: four times fewer steps than by channel
        self._image = _packed(image)
        self._dimmed = _packed(((1 - _OPACITY) * image).astype(np.uint8))
        colours = INSTANCES[np.arange(len(points)) % len(INSTANCES)]
        colours = np.concatenate([np.zeros((1, 3)), colours])[None]
        self._fill = _packed((_OPACITY * colours).astype(np.uint8))[0]
        self._line = _packed(colours.astype(np.uint8))[0]
        self._circles = _circle_pixels(self.points, self.radii.numpy(), shape)
        self._assigned: tuple[tuple, np.ndarray, np.ndarray] | None = None
        self._labels: tuple[tuple, np.ndarray] | None = None

    @classmethod
    def of(cls, model: Predictor, image: np.ndarray) -> Explorer:
        """The heads and the embedding that a model finds in an image."""
        logits, embedding = model.maps(image)
        found = decode.predict(logits, embedding, image.shape[:2], model.decoding)
        return cls(image, found.points, embedding)

    @property
    def pairs(self) -> int:
        """Length of the incidence list: (head, pixel) pairs with the pixel in the head's circle."""
        return len(self._pixel)

    def assign(self, geometry_weight: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """(owner, energy), (H, W) int32 and float32: per pixel the head, from 1, that claims it
        with the lowest energy, and that energy; 0 and infinity outside of all circles.

        Raises ValueError for a sigma that was not prepared.
        """
        if sigma not in self._distance:
            raise ValueError(f"sigma: {sigma} was not prepared; choose one of "
                             f"{', '.join(map(str, self.sigmas))}, or give sigmas to Explorer")
        key = geometry_weight, sigma
        if self._assigned is None or self._assigned[0] != key:  # theta alone moves for free
            claimed = self._distance[sigma] + np.float32(geometry_weight) * self._spread
            size = self.shape[0] * self.shape[1]
            owner, lowest = np.zeros(size, np.int32), np.full(size, np.inf, np.float32)
            for layer in self._layers:
                pixel, mine, head = self._pixel[layer], claimed[layer], self._owner[layer]
                if layer.start:  # a second, third, ... circle over these pixels
                    lower = mine < lowest[pixel]
                    pixel, mine, head = pixel[lower], mine[lower], head[lower]
                lowest[pixel], owner[pixel] = mine, head
            self._assigned = key, owner.reshape(self.shape), lowest.reshape(self.shape)
        return self._assigned[1:]

    def label_map(self, settings: ExplorerSettings) -> np.ndarray:
        """(H, W) int32: what `decode.instance_map` gives with these thresholds."""
        key = settings.theta, settings.geometry_weight, settings.sigma
        if self._labels is None or self._labels[0] != key:
            owner, lowest = self.assign(settings.geometry_weight, settings.sigma)
            self._labels = key, owner * (lowest < settings.theta)
        return self._labels[1]

    def paint(self, settings: ExplorerSettings) -> np.ndarray:
        """(H, W, 3) uint8 picture with these settings."""
        if settings.show not in PICTURES:
            raise ValueError(f"show: {settings.show!r} is not one of {', '.join(PICTURES)}")
        if settings.show == "image":
            painted = self._image.copy()
        elif settings.show == "energy":
            _, lowest = self.assign(settings.geometry_weight, settings.sigma)
            step = np.minimum(lowest * (254 / _TOP), 254).astype(np.uint8)
            step[np.isinf(lowest)] = 255
            painted = _HEAT.take(step)
        else:
            labels = (self.label_map(settings) if settings.show == "masks"
                      else self.assign(settings.geometry_weight, settings.sigma)[0])
            painted = np.where(labels > 0, self._dimmed + self._fill.take(labels), self._image)
            edge = np.flatnonzero(_edges(labels))
            painted.ravel()[edge] = self._line.take(labels.ravel()[edge])
        if settings.circles:
            painted.ravel()[self._circles] = _BLACK if settings.show == "energy" else _WHITE
        if settings.points:
            _dots(painted, self.points)
        return np.ascontiguousarray(painted.view(np.uint8).reshape(*self.shape, 4)[..., :3])

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
    slider = dict(style=style, layout=wide, continuous_update=True, readout_format=".2f")
    controls = {
        "theta": w.FloatSlider(settings.theta, min=0, max=2, step=0.05,
                               description="θ, threshold", **slider),
        "geometry_weight": w.FloatSlider(settings.geometry_weight, min=0, max=2, step=0.05,
                                         description="λ, geometry", **slider),
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


def _layers(pixel: np.ndarray) -> tuple[np.ndarray, list[slice]]:
    """An order of the incidence list in which every layer holds a pixel at most once, and the
    layers: first the first circle of every pixel, then the second of those that have one, ...

    At most five circles cover a pixel, so there are few layers, and the minimum per pixel is one
    plain assignment for each. Within a pixel the order of heads stays, as ties are decided by it.
    """
    by_pixel = np.argsort(pixel, kind="stable")
    new = np.diff(pixel[by_pixel], prepend=-1) != 0
    rank = np.arange(len(pixel)) - np.maximum.accumulate(np.where(new, np.arange(len(pixel)), 0))
    order = by_pixel[np.argsort(rank, kind="stable")]
    ends = np.cumsum(np.bincount(rank))
    return order, [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends)]


def _packed(picture: np.ndarray) -> np.ndarray:
    """(H, W) uint32 of (H, W, 3) uint8: a pixel's three bytes and one of 0."""
    wide = np.zeros((*picture.shape[:2], 4), np.uint8)
    wide[..., :3] = picture
    return wide.view(np.uint32)[..., 0]


def _heat() -> np.ndarray:
    """(256,) packed colours of energies; the last is white, for no energy."""
    from matplotlib import colormaps

    colours = (colormaps["cividis"](np.arange(256))[None, :, :3] * 255).round().astype(np.uint8)
    colours[0, 255] = 255
    return _packed(colours)[0]


_HEAT = _heat()  # made for colour-blind readers: one hue to the next by lightness
_BLACK, _WHITE = _packed(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))[0]


def _edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of an instance with another owner to the right, left, above or below."""
    edge = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge & (labels > 0)


def _circle_pixels(points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Flat indices of the pixels under the circles' lines, one point at least every pixel."""
    found = [np.zeros(0, np.int64)]
    for (x, y), radius in zip(points, radii):
        angle = np.linspace(0, 2 * np.pi, int(8 * radius) + 8)
        column = np.rint(x + radius * np.cos(angle)).astype(np.int64)
        row = np.rint(y + radius * np.sin(angle)).astype(np.int64)
        inside = (column >= 0) & (column < shape[1]) & (row >= 0) & (row < shape[0])
        found.append(row[inside] * shape[1] + column[inside])
    return np.unique(np.concatenate(found))


def _dots(picture: np.ndarray, points: np.ndarray) -> None:
    """White dots with a black rim, 3 x 3 px, in a packed picture."""
    height, width = picture.shape
    place = np.rint(points).astype(np.int64)
    for reach, value in ((1, _BLACK), (0, _WHITE)):
        for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):
            x = np.clip(place[:, 0] + dx - reach, 0, width - 1)
            y = np.clip(place[:, 1] + dy - reach, 0, height - 1)
            picture[y, x] = value


def _pair_terms(features: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor,
                pairs: nnec.Incidence) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the energy of `xmask.decode` apart, as lambda moves: |f(u) - f(p_i)| and
    |u - p_i|^2 / r_i^2 of every pair, each (M,) of the features' type.

    features: (D, H, W), smoothed. centres: (N, D), theirs at the heads. radii: (N,) px. pairs:
    of `nnec.circles`, tensors.
    """
    flat = flat_features(features)
    distance = torch.cat([
        torch.linalg.vector_norm(
            flat.index_select(0, pixel) - centres.index_select(0, head), dim=1)
        for pixel, head in zip(pairs.pixel.split(_PAIRS), pairs.head.split(_PAIRS))])
    return distance, (pairs.squared / radii[pairs.head].square()).to(flat.dtype)
