"""Promptable segmenters behind one protocol: the "S" of EDP-SAM (paper section on EDP-SAM).

A segmenter looks at an image once and then answers prompts. EDP-SAM only ever needs a head's
mask inside the head's exclusion circle, so a segmenter is asked for logits at a list of
(head, pixel) incidences and never makes a full image per head: memory follows the number of
incidences, which is O(H*W) however many heads there are.

Two segmenters live here. `SamSegmenter` is the Segment Anything Model, through the
`segment_anything` package: the original release, or the small bundled one. `ClassicalSegmenter` is a star-convex contour search without any
network: it makes every step of the study runnable, and testable, without downloaded weights.
It is a stand-in for SAM and says so in `describe()`.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2lab

from xmask.segmenting import checkpoints, sam
from xmask.segmenting.crops import View, plan_crops
from xmask.segmenting.sam_decoder import HeadDecoder

POSITIVE, NEGATIVE, PADDING = 1, 0, -1  # labels of prompt points, as in SAM


@dataclass(frozen=True)
class Prompts:
    """One prompt per head, B heads, in pixels of the image (origin at the top-left pixel's centre).

    points: (B, K, 2) float, (x, y). labels: (B, K) int, 1 on the object, 0 off it, -1 padding.
    boxes: (B, 4) float x0, y0, x1, y1, or None.
    multimask: three candidate masks for an ambiguous prompt (True) or the single best (False).
    sizes: (B,) float px, about the radius of each object, or None; a segmenter may use it to
        decide how closely to look, and takes the incidences' extent for it where it is None.
    """

    points: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray | None = None
    multimask: bool = True
    sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, each = self.labels.shape if self.labels.ndim == 2 else (-1, -1)
        if self.points.shape != (count, each, 2):
            raise ValueError(
                f"prompts: points {self.points.shape} and labels {self.labels.shape} do not "
                "match; expected (B, K, 2) and (B, K)")
        if self.boxes is not None and self.boxes.shape != (count, 4):
            raise ValueError(
                f"prompts: boxes {self.boxes.shape} do not match {count} heads; expected (B, 4)")
        if self.sizes is not None and self.sizes.shape != (count,):
            raise ValueError(
                f"prompts: sizes {self.sizes.shape} do not match {count} heads; expected (B,)")

    def __len__(self) -> int:
        return len(self.labels)


class Segmenter(Protocol):
    """What EDP-SAM asks of a segmenter.

    crops_by_size: whether what it sees of a head depends on `Prompts.sizes`, so that a better
    size is worth a second look.
    """

    name: str
    crops_by_size: bool

    def describe(self) -> dict[str, Any]:
        """What is needed to know which segmenter made a mask: kind, weights' sha256, settings."""

    def set_image(self, image: np.ndarray) -> None:
        """Look at an image: (H, W, 3) uint8, RGB. Everything that is not per head happens here."""

    def predict(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidate masks of B heads, read at the incidences only.

        head, pixel: (M,) int64, sorted by head; head in 0..B-1 is the row of the prompts, pixel
        the flat index y * W + x.
        Returns (logits (C, M) float32, positive on the object; scores (B, C) float32, the
        segmenter's own estimate of the masks' IoU, 0..1). C is 3 with multimask, else 1.
        """


def open_segmenter(spec: str, device: str = "cpu") -> Segmenter:
    """A segmenter from the command line's words: "bundled", "classical", the name of a published
    SAM ("vit_b", "vit_l", "vit_h"; `xmask.segmenting.checkpoints`), or a checkpoint's path.

    Raises FileNotFoundError if there is no such file and ValueError if it is not a SAM.
    """
    if spec == "classical":
        return ClassicalSegmenter()
    if spec == "bundled":
        return SamSegmenter.bundled(device)
    return SamSegmenter(spec, device=device)


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless the image is (H, W, 3) uint8 with at least one pixel."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected uint8 (H, W, 3) RGB, found {image.dtype} {image.shape}; convert "
            "it, for example with PIL.Image.open(path).convert('RGB')")


# --------------------------------------------------------------------------------------------
# Segment Anything
# --------------------------------------------------------------------------------------------

_DECODER_BATCH = 64  # heads per decoder call, SAM's own habit for grids of points
_ENCODER_BATCH, _ENCODER_SIDE = 16, 256  # crops per encoder call, for inputs up to so many px
# Where nobody says how large a head is, its radius is this share of its circle's diameter: in a
# crowd, circles are 2.3 heads wide.
_OF_CIRCLE = 7 / 32
_OUTSIDE_VIEW = -20.0  # logit of an incidence that the head's crop does not show


class SamSegmenter:
    """The Segment Anything Model, original or bundled.

    Heads are prompted in crops of the image, enlarged until a head is large enough for the
    model's masks (`xmask.segmenting.crops`); a crop is encoded when first needed, and kept until the next
    image. `max_zoom` limits how small crops get; 1 keeps to the whole image.

    checkpoint: a state dict of the original release: its path, or the name of a published one
        ("vit_b", "vit_l", "vit_h"), as `xmask.segmenting.checkpoints` finds it.
    model_type: "vit_b", "vit_l" or "vit_h"; inferred from the weights if None.
    device: where the model runs.
    Raises FileNotFoundError, or ValueError that says what the file is instead.

    `seconds` holds the time spent since `set_image`, in "encoder" and "prompts"; `encoded` the
    number of crops.
    """

    name, crops_by_size = "sam", True

    def __init__(
        self,
        checkpoint: str | Path,
        model_type: str | None = None,
        device: str | torch.device = "cpu",
        *,
        max_zoom: float = 4,  # at most 1 + 9 + 36 crops: its encoder takes seconds on a CPU
    ) -> None:
        path, checksum = checkpoints.locate(checkpoint)
        model, model_type = sam.load_original(path, model_type)
        self._attach(model, device, max_zoom)
        self._description = {
            "kind": "sam",
            "model_type": model_type,
            "checkpoint": path.name,
            "sha256": checksum,
            "max_zoom": max_zoom,
        }

    @classmethod
    def bundled(cls, device: str | torch.device = "cpu", *, max_zoom: float = 64) -> SamSegmenter:
        """The small SAM that comes with the package, trained on synthetic crowds only."""
        model, record = sam.load_bundled()
        self = cls.from_model(model, device, max_zoom=max_zoom)
        self._description |= {
            "model_type": "bundled", "checkpoint": record["file"], "sha256": record["sha256"]}
        return self

    @classmethod
    def from_model(
        cls, model: torch.nn.Module, device: str | torch.device = "cpu", *, max_zoom: float = 4
    ) -> SamSegmenter:
        """A segmenter around a `segment_anything.modeling.Sam` that is already in memory.

        `describe()` names it by a checksum of its weights, so that it is another one once it
        has learned more.
        """
        self = cls.__new__(cls)
        self._attach(model, device, max_zoom)
        self._description = {"kind": "sam", "model_type": "in-memory", "max_zoom": max_zoom}
        return self

    def _attach(
        self, model: torch.nn.Module, device: str | torch.device, max_zoom: float
    ) -> None:
        from segment_anything.utils.transforms import ResizeLongestSide

        if max_zoom < 1:
            raise ValueError(f"max_zoom: expected 1 or more, found {max_zoom}")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self._input_side = model.image_encoder.img_size
        self._cells = 4 * model.prompt_encoder.image_embedding_size[0]
        self._resize = ResizeLongestSide(self._input_side)
        self._max_zoom = max_zoom
        self._forget()

    def _forget(self) -> None:
        self._image: np.ndarray | None = None
        self._features: dict[View, torch.Tensor] = {}
        self.seconds = {"encoder": 0.0, "prompts": 0.0}

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process without the image it is looking at."""
        return self.__dict__ | {"_image": None, "_features": {}}

    @property
    def encoded(self) -> int:
        return len(self._features)

    def describe(self) -> dict[str, Any]:
        # Those from a file bring its checksum; one in memory can be trained between two calls.
        if "sha256" in self._description:
            return dict(self._description)
        return {**self._description, "sha256": _checksum(self.model)}

    def set_image(self, image: np.ndarray) -> None:
        check_image(image)
        if self._image is not None and np.array_equal(image, self._image):
            self.seconds = {"encoder": 0.0, "prompts": 0.0}  # its crops are encoded already
            return
        self._forget()
        self._image = np.array(image)

    def predict(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._image is None:
            raise RuntimeError("no image yet: call set_image(image) before predict")
        candidates = 3 if prompts.multimask else 1
        logits = np.full((candidates, len(head)), _OUTSIDE_VIEW, dtype=np.float32)
        scores = np.zeros((len(prompts), candidates), dtype=np.float32)
        if len(prompts) == 0:
            return logits, scores
        first = np.searchsorted(head, np.arange(len(prompts) + 1))
        views, view_of = plan_crops(
            prompts.points[:, 0], self._sizes(prompts, head, pixel, first),
            self._image.shape[:2], cells=self._cells, side=self._input_side,
            max_zoom=self._max_zoom)
        self._encode(views)
        began = time.perf_counter()
        for number in np.unique(view_of):
            view, members = views[number], np.flatnonzero(view_of == number)
            decoder = self._decoder(view)
            for start in range(0, len(members), _DECODER_BATCH):
                rows = members[start:start + _DECODER_BATCH]
                lengths = first[rows + 1] - first[rows]
                local = np.repeat(np.arange(len(rows)), lengths)
                where = np.arange(lengths.sum()) + np.repeat(
                    first[rows] - np.cumsum(lengths) + lengths, lengths)
                y, x = np.divmod(pixel[where], self._image.shape[1])
                y, x = y - view.top, x - view.left
                shown = (y >= 0) & (y < view.height) & (x >= 0) & (x < view.width)
                local, y, x = local[shown], y[shown], x[shown]
                low, quality = self._decode(decoder, prompts, rows, view, local, y, x)
                scores[rows] = quality.clamp(0, 1).cpu().numpy()
                logits[:, where[shown]] = self._read(low, local, y, x, view).cpu().numpy()
        self.seconds["prompts"] += time.perf_counter() - began
        return logits, scores

    def _sizes(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray, first: np.ndarray
    ) -> np.ndarray:
        """(B,) px: how large each head is, as far as anybody knows."""
        if prompts.sizes is not None:
            return prompts.sizes
        sizes = np.full(len(prompts), np.inf)
        filled = np.flatnonzero(first[1:] > first[:-1])
        if len(filled):
            starts = first[:-1][filled]
            sizes[filled] = _OF_CIRCLE * (1 + np.maximum.reduce([
                np.maximum.reduceat(one, starts) - np.minimum.reduceat(one, starts)
                for one in np.divmod(pixel, self._image.shape[1])]))
        return sizes

    @torch.no_grad()
    def _encode(self, views: list[View]) -> None:
        """SAM's image embeddings of crops, kept until the next image."""
        began = time.perf_counter()
        missing = [view for view in dict.fromkeys(views) if view not in self._features]
        batch = _ENCODER_BATCH if self._input_side <= _ENCODER_SIDE else 1
        for start in range(0, len(missing), batch):
            part = missing[start:start + batch]
            pixels = []
            for view in part:
                crop = self._image[view.top:view.top + view.height,
                                   view.left:view.left + view.width]
                if self.model.image_format != "RGB":
                    crop = crop[..., ::-1]
                resized = torch.as_tensor(self._resize.apply_image(crop), device=self.device)
                pixels.append(self.model.preprocess(resized.permute(2, 0, 1)))
            for view, features in zip(part, self.model.image_encoder(torch.stack(pixels))):
                self._features[view] = features
        self.seconds["encoder"] += time.perf_counter() - began

    @torch.no_grad()
    def _decoder(self, view: View) -> HeadDecoder:
        prompt_encoder = self.model.prompt_encoder
        return HeadDecoder(
            self.model.mask_decoder, self._features[view][None], prompt_encoder.get_dense_pe(),
            prompt_encoder.no_mask_embed.weight[0])

    @torch.no_grad()
    def _decode(
        self, decoder: HeadDecoder, prompts: Prompts, rows: np.ndarray, view: View,
        local: np.ndarray, y: np.ndarray, x: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's decoder on some heads: low-resolution logits (b, C, h, w), predicted IoU (b, C).

        Logits are made where `_read` reads them for pixels (y, x) of heads `local` only.
        """
        size = (view.height, view.width)
        offset = np.array([view.left, view.top])
        points = prompts.points[rows] - offset
        labels = prompts.labels[rows].copy()
        seen = ((points > -1) & (points < (view.width, view.height))).all(-1)
        labels[~seen & (labels == NEGATIVE)] = PADDING
        points = self._to_device(self._resize.apply_coords(points, size))
        labels = torch.as_tensor(labels, device=self.device)
        boxes = None
        if prompts.boxes is not None:
            corners = (prompts.boxes[rows].reshape(-1, 2, 2) - offset).clip(
                0, (view.width - 1, view.height - 1))
            boxes = self._to_device(self._resize.apply_coords(corners, size)).reshape(-1, 4)
        sparse, _ = self.model.prompt_encoder(
            points=(points, labels), boxes=boxes, masks=None)
        cells = self.model.prompt_encoder.image_embedding_size
        side = self._resize.get_preprocess_shape(view.height, view.width, self._input_side)
        taken = []
        for axis, place in enumerate((y, x)):
            tap, weight = resize_taps(4 * cells[axis], self._input_side, side[axis], size[axis])
            last = np.minimum(tap[place] + weight.shape[1] - 1, 4 * cells[axis] - 1)
            taken.append((tap[place] // 4, last // 4))
        (top, bottom), (left, right) = taken
        # the taps of a pixel lie in at most two cells along each axis
        wanted = np.unique(np.concatenate([
            (local * cells[0] + row) * cells[1] + column
            for row in (top, bottom) for column in (left, right)]))
        head, row, column = np.unravel_index(wanted, (len(rows), *cells))
        return decoder(sparse, prompts.multimask, *(
            torch.as_tensor(index, device=self.device) for index in (head, row, column)))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    def _read(
        self, low: torch.Tensor, local: np.ndarray, y: np.ndarray, x: np.ndarray, view: View
    ) -> torch.Tensor:
        """Logits (C, m) at pixels (y, x) of a crop, as if the masks had been fully upsampled."""
        count, candidates, rows, columns = low.shape
        new_height, new_width = self._resize.get_preprocess_shape(
            view.height, view.width, self._input_side)
        first_row, row_weight = resize_taps(rows, self._input_side, new_height, view.height)
        first_column, column_weight = resize_taps(
            columns, self._input_side, new_width, view.width)
        row = torch.as_tensor(first_row[y], device=self.device)
        column = torch.as_tensor(first_column[x], device=self.device)
        row_weight = self._to_device(row_weight[y])
        column_weight = self._to_device(column_weight[x])
        local = torch.as_tensor(local, device=self.device)
        flat = low.transpose(0, 1).reshape(candidates, -1)
        value = torch.zeros((candidates, len(local)), device=self.device)
        for i in range(row_weight.shape[1]):
            for j in range(column_weight.shape[1]):
                # A tap beyond the last cell has weight 0; the clamp only keeps it readable.
                at = (local * rows + (row + i).clamp(max=rows - 1)) * columns
                at = at + (column + j).clamp(max=columns - 1)
                value += flat[:, at] * (row_weight[:, i] * column_weight[:, j])
        return value


def _checksum(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def resize_taps(
    low: int, side: int, kept: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One axis of SAM's two-step mask upsampling, composed into one weighted sum.

    `Sam.postprocess_masks` resizes low -> side bilinearly, keeps the first `kept` values (the
    rest is padding), and resizes those -> size; align_corners is False in both steps. Both are
    separable, so each output pixel of an axis is a sum over at most four neighbouring cells.
    Returns (first (S,) int64, weight (S, taps) float64), S = size: output u is the sum over t of
    weight[u, t] * cell[first[u] + t].
    """
    def bilinear(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.maximum((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0)
        below = np.minimum(position.astype(np.int64), inputs - 1)
        return below, np.minimum(below + 1, inputs - 1), position - below

    inner_below, inner_above, inner_part = bilinear(low, side)
    below, above, part = bilinear(kept, size)
    cells = np.stack([inner_below[below], inner_above[below],
                      inner_below[above], inner_above[above]], axis=1)
    weights = np.stack([(1 - part) * (1 - inner_part[below]), (1 - part) * inner_part[below],
                        part * (1 - inner_part[above]), part * inner_part[above]], axis=1)
    first = cells.min(axis=1)
    taps = int((cells - first[:, None]).max()) + 1
    weight = np.zeros((size, taps))
    np.add.at(weight, (np.arange(size)[:, None], cells - first[:, None]), weights)
    return first, weight


# --------------------------------------------------------------------------------------------
# Classical: active rays
# --------------------------------------------------------------------------------------------

# All constants of this part are ours, set on drawn scenes with seeds 1000 to 1005 and reported
# on seeds 2000 to 2005 (xmask.synthetic.draw_scene).
_RAYS = 32
_STEPS = 24  # candidate radii on a ray, in geometric progression
_SMALLEST = 1.5  # px, the smallest radius searched
_LARGEST = 0.15  # of min(H, W): no head is wider than 0.3 of the image's smaller side
_HEADS_AT_ONCE = 128
_BLURS = (0.7, 1.4, 2.8)  # px, sigma; a longer step between radii reads a smoother image
_HALF_CONTRAST = 12.0  # Lab units: a colour step of this size has edge strength 1/2
_BEND = 0.08  # cost of one step of radius between neighbouring rays
_REACH = 2  # steps of radius that neighbouring rays may differ by
_MIDLINE = 4.0  # cost per unit of log radius beyond the midline to a negative point
_SIZE_PRIOR = 0.4  # cost per squared log distance to a candidate's own radius
_BOX_PRIOR = 1.0  # the same for the radius of a box
_LOGIT_SLOPE = 8.0


class ClassicalSegmenter:
    """Active rays: a star-convex contour around the prompt, found by dynamic programming.

    For every head, 32 rays leave the prompt point. On each ray the colour (Lab, smoothed) is
    read at 24 radii between 1.5 px and the radius of the incidence circle. A radius is a good
    place for the contour if colour changes there, if it is near the size looked for, and if
    neighbouring rays agree; the best closed contour is the cheapest cycle through the rays. One
    point leaves the size open, so up to three contours of different size come back, as SAM
    returns three masks; a box fixes centre and size, and one contour comes back. The contour
    may cross the midline to a negative point only at a cost. Cost per head does not depend on
    the number of pixels, except for reading the result at the incidences.

    This is not SAM and does not reach its quality; it stands in for it where no weights are at
    hand. The score is the mean edge strength along the contour times how smoothly it closes.
    """

    name, crops_by_size = "classical", False

    def __init__(self) -> None:
        self._levels: np.ndarray | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "classical", "algorithm": "active rays", "rays": _RAYS, "steps": _STEPS}

    def set_image(self, image: np.ndarray) -> None:
        check_image(image)
        lab = rgb2lab(np.ascontiguousarray(image)).astype(np.float32)
        self._levels = np.stack([gaussian_filter(lab, (s, s, 0)) for s in _BLURS])

    def predict(
        self, prompts: Prompts, head: np.ndarray, pixel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._levels is None:
            raise RuntimeError("no image yet: call set_image(image) before predict")
        count = len(prompts)
        candidates = 3 if prompts.multimask else 1
        logits = np.full((candidates, len(head)), -_LOGIT_SLOPE, dtype=np.float32)
        scores = np.zeros((count, candidates), dtype=np.float32)
        first = np.searchsorted(head, np.arange(count + 1))
        for start in range(0, count, _HEADS_AT_ONCE):
            stop = min(start + _HEADS_AT_ONCE, count)
            part = slice(first[start], first[stop])
            rows = slice(start, stop)
            logits[:, part], scores[rows] = self._contours(
                prompts.points[rows], prompts.labels[rows],
                None if prompts.boxes is None else prompts.boxes[rows],
                candidates, head[part] - start, pixel[part])
        return logits, scores

    def _contours(
        self, points: np.ndarray, labels: np.ndarray, boxes: np.ndarray | None,
        candidates: int, head: np.ndarray, pixel: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (C, m) at the incidences of a chunk of heads, and scores (b, C)."""
        height, width = self._levels.shape[1:3]
        count = len(points)
        rows = np.arange(count)
        origin = points[rows, (labels == POSITIVE).argmax(axis=1)].astype(np.float64)
        y, x = np.divmod(pixel, width)
        dx, dy = x - origin[head, 0], y - origin[head, 1]
        distance = np.hypot(dx, dy)
        reach = np.zeros(count)
        np.maximum.at(reach, head, distance)
        reach = reach.clip(2 * _SMALLEST, max(_LARGEST * min(height, width), 2 * _SMALLEST))

        radius = _SMALLEST * (reach / _SMALLEST)[:, None] ** np.linspace(0, 1, _STEPS)  # (b, T)
        angle = np.arange(_RAYS) * (2 * np.pi / _RAYS)
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (K, 2)
        edge = self._edge_strength(origin, unit, radius)  # (b, K, T)
        limit = _midlines(origin, unit, points, labels)  # (b, K)
        log_radius = np.log(radius)
        past = np.maximum(log_radius[:, None, :] - np.log(limit)[:, :, None], 0)
        cost = 1 - edge + _MIDLINE * past

        if boxes is not None:
            # An ellipse with the box's axes is the size looked for.
            axes = np.maximum((boxes[:, 2:] - boxes[:, :2]) / 2, _SMALLEST)
            wanted = 1 / np.hypot(unit[:, 0] / axes[:, :1], unit[:, 1] / axes[:, 1:])  # (b, K)
            wanted = np.repeat(np.log(wanted)[:, None], candidates, axis=1)
            weight = _BOX_PRIOR
        else:
            profile = -cost.mean(axis=1)  # (b, T)
            wanted = np.empty((count, candidates, _RAYS))
            for c in range(candidates):
                best = log_radius[rows, profile.argmax(axis=1)]
                wanted[:, c] = best[:, None]
                # A ring much like one already taken is not another answer.
                profile = profile - np.exp(-(((log_radius - best[:, None]) / 0.35) ** 2))
            weight = _SIZE_PRIOR
        cost = cost[:, None] + weight * (log_radius[:, None, None] - wanted[..., None]) ** 2

        index = _cheapest_cycle(cost.reshape(count * candidates, _RAYS, _STEPS))
        index = index.reshape(count, candidates, _RAYS)
        rho = np.take_along_axis(radius[:, None], index.reshape(count, 1, -1), axis=2)
        rho = rho.reshape(index.shape)
        rho = (np.roll(rho, 1, 2) + 2 * rho + np.roll(rho, -1, 2)) / 4
        along = np.take_along_axis(edge[:, None], index[..., None], axis=3)[..., 0]
        bend = np.abs(np.diff(np.log(rho), axis=2, append=np.log(rho[..., :1]))).mean(axis=2)
        scores = along.mean(axis=2) * np.exp(-4 * bend)

        turn = np.arctan2(dy, dx) * (_RAYS / (2 * np.pi)) % _RAYS
        ray = np.minimum(turn.astype(np.int64), _RAYS - 1)
        part = turn - ray
        logits = np.empty((candidates, len(head)), dtype=np.float32)
        for c in range(candidates):
            border = rho[head, c, ray] * (1 - part) + rho[head, c, (ray + 1) % _RAYS] * part
            logits[c] = _LOGIT_SLOPE * (1 - distance / border)
        return logits.clip(-_LOGIT_SLOPE, _LOGIT_SLOPE), scores.astype(np.float32)

    def _edge_strength(
        self, origin: np.ndarray, unit: np.ndarray, radius: np.ndarray
    ) -> np.ndarray:
        """How much the colour changes across each radius of each ray: (b, K, T), 0..1."""
        step = np.maximum(0.15 * radius, 1.0)  # (b, T)
        level = np.searchsorted(np.array(_BLURS[1:]), step * 0.7)  # (b, T)
        inside = self._sample(origin, unit, np.maximum(radius - step, 0), level)
        outside = self._sample(origin, unit, radius + step, level)
        core = np.cumsum(inside, axis=2) / np.arange(1, _STEPS + 1)[:, None]
        local = np.linalg.norm(outside - inside, axis=3)
        region = np.linalg.norm(outside - core, axis=3)
        contrast = (local + region) / 2
        return contrast / (contrast + _HALF_CONTRAST)

    def _sample(
        self, origin: np.ndarray, unit: np.ndarray, radius: np.ndarray, level: np.ndarray
    ) -> np.ndarray:
        """Colour at every radius of every ray, bilinear, edge pixels repeated: (b, K, T, 3)."""
        _, height, width, _ = self._levels.shape
        x = (origin[:, :1, None] + unit[:, 0, None] * radius[:, None]).clip(0, width - 1)
        y = (origin[:, 1:, None] + unit[:, 1, None] * radius[:, None]).clip(0, height - 1)
        left, top = x.astype(np.int64), y.astype(np.int64)
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        u = (x - left).astype(np.float32)[..., None]
        v = (y - top).astype(np.float32)[..., None]
        flat = self._levels.reshape(-1, 3)
        base = level[:, None] * (height * width)
        upper, lower = base + top * width, base + bottom * width
        above = flat[upper + left] * (1 - u) + flat[upper + right] * u
        below = flat[lower + left] * (1 - u) + flat[lower + right] * u
        return above * (1 - v) + below * v


def _midlines(
    origin: np.ndarray, unit: np.ndarray, points: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """How far each ray runs before it is nearer to a negative point than to its origin: (b, K)."""
    toward = points - origin[:, None]  # (b, P, 2)
    along = np.einsum("bpd,kd->bkp", toward, unit)
    squared = (toward**2).sum(axis=2)[:, None]
    meets = (labels == NEGATIVE)[:, None] & (along > 1e-9)
    where = np.where(meets, squared / (2 * np.where(meets, along, 1)), np.inf)
    return np.maximum(where.min(axis=2, initial=np.inf), _SMALLEST)


def _cheapest_cycle(cost: np.ndarray) -> np.ndarray:
    """The radius index of every ray that makes a cheap closed contour: (n, K, T) -> (n, K).

    Dynamic programming around the ring twice: the middle of the unrolled path has forgotten
    where it began, so that its two ends meet (almost always) within the allowed step.
    """
    count, rays, steps = cost.shape
    total = cost[:, 0]
    came_from = np.empty((2 * rays, count, steps), dtype=np.int8)
    for k in range(1, 2 * rays):
        padded = np.pad(total, ((0, 0), (_REACH, _REACH)), constant_values=np.inf)
        arrivals = np.stack([
            padded[:, _REACH + s:_REACH + s + steps] + _BEND * abs(s)
            for s in range(-_REACH, _REACH + 1)])
        came_from[k] = arrivals.argmin(axis=0) - _REACH
        total = arrivals.min(axis=0) + cost[:, k % rays]
    index = np.empty((count, 2 * rays), dtype=np.int64)
    index[:, -1] = total.argmin(axis=1)
    rows = np.arange(count)
    for k in range(2 * rays - 1, 0, -1):
        index[:, k - 1] = index[:, k] + came_from[k, rows, index[:, k]]
    half = rays // 2
    return np.roll(index[:, half:half + rays], half, axis=1)
