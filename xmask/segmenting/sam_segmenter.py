"""SAM as a segmenter of EDP-SAM: heads prompted in enlarged crops, read at the incidences only."""

from __future__ import annotations

import copyreg
import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from xmask.segmenters import NEGATIVE, PADDING, Prompts, check_image
from xmask.segmenting import checkpoints, sam
from xmask.segmenting.crops import View, plan_crops
from xmask.segmenting.sam_decoder import HeadDecoder
from xmask.segmenting.sam_encoder import encode

_ENCODER_BATCH, _ENCODER_SIDE = 4, 256  # crops per encoder call, for inputs up to so many px
# Where nobody says how large a head is, its radius is this share of its circle's diameter: in a
# crowd, circles are 2.3 heads wide.
_OF_CIRCLE = 7 / 32
_ZOOM = 4  # at most 1 + 9 + 36 crops: the encoder of an original SAM takes seconds on a CPU
_ZOOM_BUNDLED = 64
_OUTSIDE_VIEW = -20.0  # logit of an incidence that the head's crop does not show


class SamSegmenter:
    """The Segment Anything Model, original or bundled.

    Heads are prompted in crops of the image, enlarged until a head is large enough for the
    model's masks (`crops`); a crop is encoded when first needed, and kept until the next image.
    `max_zoom` limits how small crops get; 1 keeps to the whole image.

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
        max_zoom: float = _ZOOM,
    ) -> None:
        path, checksum = checkpoints.locate(checkpoint)
        model, model_type = sam.load_original(path, model_type)
        self._attach(model, device, max_zoom)
        self._description = _description(model_type, path.name, checksum, max_zoom)
        self._file = str(path.absolute())

    @classmethod
    def bundled(cls, device: str | torch.device = "cpu", *, max_zoom: float = _ZOOM_BUNDLED
                ) -> SamSegmenter:
        """The small SAM that comes with the package, trained on synthetic crowds only."""
        model, record = sam.load_bundled()
        self = cls.from_model(model, device, max_zoom=max_zoom)
        self._description = _description("bundled", record["file"], record["sha256"], max_zoom)
        self._file = "bundled"
        return self

    @classmethod
    def from_model(
        cls, model: torch.nn.Module, device: str | torch.device = "cpu", *, max_zoom: float = _ZOOM
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
        self._file: str | None = None  # where its weights are, if they are in a file
        self._forget()

    def _forget(self) -> None:
        self._image: np.ndarray | None = None
        self._features: dict[View, torch.Tensor] = {}
        self.seconds = {"encoder": 0.0, "prompts": 0.0}

    def __reduce__(self) -> tuple:
        """Sent to another process without the image it is looking at, and as the name of its file
        where there is one. That process chooses a device where this one had no choice."""
        if self._file is None:
            state = self.__dict__ | {"_image": None, "_features": {}}
            return copyreg.__newobj__, (type(self),), state  # what pickle itself would do
        device = str(self.device) if torch.cuda.is_available() else None
        return _open, (self._file, self._description["model_type"], device, self._max_zoom)

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

    @torch.inference_mode()
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
        decoder = self._decoder()
        corner = np.array([(view.left, view.top) for view in views])[view_of]
        size_of = np.array([(view.height, view.width) for view in views])[view_of]
        # Heads go together whose crops are of one size: there are few in one crop.
        for size in np.unique(size_of, axis=0):
            members = np.flatnonzero((size_of == size).all(axis=1))
            for start in range(0, len(members), decoder.at_once):
                rows = members[start:start + decoder.at_once]
                lengths = first[rows + 1] - first[rows]
                local = np.repeat(np.arange(len(rows)), lengths)
                where = np.arange(lengths.sum()) + np.repeat(
                    first[rows] - np.cumsum(lengths) + lengths, lengths)
                y, x = np.divmod(pixel[where], self._image.shape[1])
                x, y = x - corner[rows, 0][local], y - corner[rows, 1][local]
                shown = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
                taps = self._taps(local[shown], y[shown], x[shown], size)
                low, quality = decoder(
                    torch.stack([self._features[views[number]] for number in view_of[rows]]),
                    self._embed(prompts, rows, corner[rows], size), prompts.multimask,
                    self._wanted(len(rows), taps))
                scores[rows] = quality.clamp(0, 1).cpu().numpy()
                logits[:, where[shown]] = self._read(low, taps).cpu().numpy()
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

    def _encode(self, views: list[View]) -> None:
        """SAM's image embeddings of crops, kept until the next image."""
        began = time.perf_counter()
        missing = [view for view in dict.fromkeys(views) if view not in self._features]
        order = 1 if self.model.image_format == "RGB" else -1
        image = Image.fromarray(np.ascontiguousarray(self._image[..., ::order]))
        batch = _ENCODER_BATCH if self._input_side <= _ENCODER_SIDE else 1
        for start in range(0, len(missing), batch):
            part = missing[start:start + batch]
            pixels = []
            for view in part:
                size = self._resize.get_preprocess_shape(view.height, view.width, self._input_side)
                crop = image.crop((view.left, view.top, view.left + view.width,
                                   view.top + view.height))
                # as SAM's own `apply_image` does it, without its checks and copies
                resized = np.array(crop.resize(size[::-1], Image.Resampling.BILINEAR))
                pixels.append(self.model.preprocess(
                    torch.as_tensor(resized, device=self.device).permute(2, 0, 1)))
            for view, features in zip(part, encode(self.model.image_encoder, torch.stack(pixels))):
                self._features[view] = features
        self.seconds["encoder"] += time.perf_counter() - began

    def _decoder(self) -> HeadDecoder:
        prompt_encoder = self.model.prompt_encoder
        return HeadDecoder(self.model.mask_decoder, prompt_encoder.get_dense_pe(),
                           prompt_encoder.no_mask_embed.weight[0])

    def _embed(
        self, prompts: Prompts, rows: np.ndarray, corner: np.ndarray, size: np.ndarray
    ) -> torch.Tensor:
        """SAM's tokens (b, K, D) of some prompts; corner: (b, 2) x, y of their crops; size: of the
        crops, height and width."""
        points = prompts.points[rows] - corner[:, None]
        labels = prompts.labels[rows].copy()
        seen = ((points > -1) & (points < size[::-1])).all(-1)
        labels[~seen & (labels == NEGATIVE)] = PADDING
        points = self._to_device(self._resize.apply_coords(points, size))
        boxes = None
        if prompts.boxes is not None:
            corners = (prompts.boxes[rows].reshape(-1, 2, 2) - corner[:, None]).clip(
                0, size[::-1] - 1)
            boxes = self._to_device(self._resize.apply_coords(corners, size)).reshape(-1, 4)
        return self.model.prompt_encoder(
            points=(points, torch.as_tensor(labels, device=self.device)), boxes=boxes,
            masks=None)[0]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    def _taps(self, local: np.ndarray, y: np.ndarray, x: np.ndarray, size: np.ndarray) -> _Taps:
        """Where the logits of pixels (y, x) in the crops of heads `local` come from."""
        side = self._resize.get_preprocess_shape(*size, self._input_side)
        row, row_weight, column, column_weight = (
            table[place] for axis, place in enumerate((y, x))
            for table in resize_taps(self._cells, self._input_side, side[axis], int(size[axis])))
        return _Taps(local, row, column, row_weight, column_weight)

    def _wanted(self, count: int, taps: _Taps) -> torch.Tensor:
        """The cells of the image embedding that logits are read from, (n,) int64, in order: flat
        indices of (heads, rows, columns)."""
        side = self._cells // 4
        wanted = np.zeros(count * side * side, dtype=bool)
        # the taps of a pixel lie in at most two cells along each axis
        for row in (taps.row, taps.row + taps.row_weight.shape[1] - 1):
            for column in (taps.column, taps.column + taps.column_weight.shape[1] - 1):
                wanted[(taps.head * side + row // 4) * side + column // 4] = True
        return torch.as_tensor(np.flatnonzero(wanted), device=self.device)

    def _read(self, low: torch.Tensor, taps: _Taps) -> torch.Tensor:
        """Logits (C, m), as if the low-resolution masks (C, b, h, w) had been fully upsampled."""
        flat = low.flatten(1)
        corner = (taps.head * self._cells + taps.row) * self._cells + taps.column
        corner = torch.as_tensor(corner, device=self.device)
        row_weight = self._to_device(taps.row_weight.T)
        column_weight = self._to_device(taps.column_weight.T)
        value = low.new_zeros(len(flat), len(corner))
        for i, down in enumerate(row_weight):
            for j, across in enumerate(column_weight):
                value.addcmul_(flat.index_select(1, corner + (i * self._cells + j)), down * across)
        return value


class _Taps(NamedTuple):
    """Pixel by pixel, the cells of a low-resolution mask that its logit is a weighted sum of.

    head, row, column: (m,) int64, of the mask's cell up left; row_weight, column_weight:
    (m, taps) of this and the next cells.
    """

    head: np.ndarray
    row: np.ndarray
    column: np.ndarray
    row_weight: np.ndarray
    column_weight: np.ndarray


def describe(name: str) -> dict[str, Any]:
    """What `describe()` says of the SAM `name`, "bundled", "vit_b" or a path, once it is open."""
    if name == "bundled":
        record = sam.bundled_record()
        return _description("bundled", record["file"], record["sha256"], _ZOOM_BUNDLED)
    path, checksum = checkpoints.locate(name)
    return _description(sam.model_type(path), path.name, checksum, _ZOOM)


def _description(model_type: str, file: str, sha256: str, max_zoom: float) -> dict[str, Any]:
    return {"kind": "sam", "model_type": model_type, "checkpoint": file, "sha256": sha256,
            "max_zoom": max_zoom}


def _checksum(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


@lru_cache(maxsize=64)  # there are two for each octave of crops
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
    taps = int(np.ptp(cells, axis=1).max()) + 1
    first = np.minimum(cells.min(axis=1), low - taps)  # cells beyond the last are not there
    weight = np.zeros((size, taps))
    np.add.at(weight, (np.arange(size)[:, None], cells - first[:, None]), weights)
    return first, weight


def _open(file: str, model_type: str, device: str | None, max_zoom: float) -> SamSegmenter:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if file == "bundled":
        return SamSegmenter.bundled(device, max_zoom=max_zoom)
    return SamSegmenter(file, model_type, device, max_zoom=max_zoom)
