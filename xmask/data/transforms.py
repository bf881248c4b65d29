"""Training crops: random scale, crop and flip; strong augmentation of the student's view.

Every crop is a pure function of (samples, seed, index), so that training resumes exactly where
it stopped and does not depend on the number of loader processes. Constants: paper section on
implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from xmask.config import Augmentation
from xmask.data.sample import Sample


def random_crop(
    sample: Sample, size: int, scale: tuple[float, float], rng: np.random.Generator,
    flip: float = 0.5,
) -> Sample:
    """Cut a random square, resize it to `size` × `size` px, flip it with probability `flip`.

    The square's side is `size / s` px, s uniform in `scale`; an image smaller than it is padded
    with black on the right and below. Points outside are dropped; `instances` is renumbered so
    that label k stays the mask of points[k-1]. The pixels of persons whose point lies outside keep
    labels above the number of points: they are nobody's background, and the losses ask no head of
    them (`xmask.losses`).
    """
    height, width = sample.image.shape[:2]
    side = max(1, round(size / rng.uniform(*scale)))
    x0 = int(rng.integers(0, max(0, width - side) + 1))
    y0 = int(rng.integers(0, max(0, height - side) + 1))
    flipped = bool(rng.random() < flip)

    image = _resize(_window(sample.image, x0, y0, side), size, Image.Resampling.BILINEAR)
    # pixel centres: position p of the square maps to (p + 0.5) * size / side - 0.5
    points = (sample.points - (x0, y0) + 0.5) * (size / side) - 0.5
    inside = ((points > -0.5) & (points < size - 0.5)).all(1)
    points = np.clip(points[inside], 0, size - 1).astype(np.float32)
    instances = None
    if sample.instances is not None:
        cut = _resize(_window(sample.instances, x0, y0, side), size, Image.Resampling.NEAREST)
        instances = _renumber(cut, inside)
    if flipped:
        image = image[:, ::-1]
        points[:, 0] = size - 1 - points[:, 0]
        instances = None if instances is None else instances[:, ::-1]
    return Sample(
        image=np.ascontiguousarray(image),
        points=points,
        instances=None if instances is None else np.ascontiguousarray(instances),
        name=sample.name,
    )


def _window(array: np.ndarray, x0: int, y0: int, side: int) -> np.ndarray:
    cut = array[y0 : y0 + side, x0 : x0 + side]
    missing = [(0, side - cut.shape[0]), (0, side - cut.shape[1])]
    return np.pad(cut, missing + [(0, 0)] * (array.ndim - 2))


def _resize(array: np.ndarray, size: int, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((size, size), resampling))


def _renumber(instances: np.ndarray, kept: np.ndarray) -> np.ndarray:
    order = np.concatenate([np.flatnonzero(kept), np.flatnonzero(~kept)])
    new = np.zeros(len(kept) + 1, np.int32)
    new[order + 1] = np.arange(1, len(kept) + 1)
    return new[instances]


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float (3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def strong_view(
    image: Tensor, rng: np.random.Generator, how: Augmentation = Augmentation()
) -> tuple[Tensor, Tensor]:
    """The student's view of an unlabelled crop (3, H, W): colour, blur, one cut-out.

    Returns the view and the pixels that stay visible, (H, W) bool.
    """
    import torchvision.transforms.v2.functional as TF  # takes seconds, and only training needs it

    if rng.random() < how.jitter:
        image = _other_colours(image, rng, how, 1.0)
    if rng.random() < how.grey:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if rng.random() < how.blur:
        sigma = rng.uniform(how.blur_min, how.blur_max)
        image = TF.gaussian_blur(image, [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma] * 2)
    h, w = image.shape[-2:]
    ch, cw = (int(side * rng.uniform(how.cutout_min, how.cutout_max)) for side in (h, w))
    y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
    visible = torch.ones(h, w, dtype=torch.bool)
    visible[y : y + ch, x : x + cw] = False
    return image * visible, visible


def _other_colours(
    image: Tensor, rng: np.random.Generator, how: Augmentation, strength: float
) -> Tensor:
    """An image (3, H, W) with brightness, contrast, saturation and hue changed, in random order,
    by up to `strength` times what the section says."""
    import torchvision.transforms.v2.functional as TF

    for change, amount in zip(rng.permutation(4), rng.uniform(-strength, strength, 4)):
        if change == 0:
            image = TF.adjust_brightness(image, 1 + how.brightness * amount)
        elif change == 1:
            image = TF.adjust_contrast(image, 1 + how.contrast * amount)
        elif change == 2:
            image = TF.adjust_saturation(image, 1 + how.saturation * amount)
        else:
            image = TF.adjust_hue(image, how.hue * amount)
    return image


@dataclass(frozen=True)
class Batch:
    """Crops of one step: images (B, 3, S, S) in 0..1; per image points (N, 2) and label map
    (S, S) int or None; for unlabelled crops also the student's `strong` view (B, 3, S, S) and
    its `visible` pixels (B, S, S)."""

    images: Tensor
    points: list[Tensor]
    instances: list[Tensor | None]
    strong: Tensor | None = None
    visible: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which copies to a GPU do not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value):
            if isinstance(value, list):
                return [changed(one) for one in value]
            return None if value is None else change(value)

        return Batch(**{name: changed(value) for name, value in vars(self).items()})


class Crops(Dataset):
    """An endless, reproducible stream of crops; index i is the i-th crop ever drawn.

    Images are visited in a new seeded order in every pass, each equally often (ours; the authors
    draw labelled images at random with replacement).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        scale: tuple[float, float],
        seed: int,
        *,
        strong: bool,
        augmentation: Augmentation = Augmentation(),
    ):
        self.samples, self.size, self.scale = samples, size, scale
        self.seed, self.strong, self.augmentation = seed, strong, augmentation

    def __getitem__(self, index: int) -> tuple[Sample, Tensor | None, Tensor | None]:
        turn, position = divmod(index, len(self.samples))
        order = np.random.default_rng([self.seed, self.strong, turn]).permutation(
            len(self.samples)
        )
        rng = np.random.default_rng([self.seed, self.strong, turn, position])
        crop = random_crop(self.samples[int(order[position])], self.size, self.scale, rng,
                           self.augmentation.flip)
        if not self.strong:
            strength = self.augmentation.labelled_jitter
            if strength and rng.random() < self.augmentation.jitter:
                view = _other_colours(to_tensor(crop.image), rng, self.augmentation, strength)
                pixels = (view * 255).round().byte().permute(1, 2, 0)
                crop = replace(crop, image=np.ascontiguousarray(pixels))
            return crop, None, None
        return crop, *strong_view(to_tensor(crop.image), rng, self.augmentation)


def collate(items: list[tuple[Sample, Tensor | None, Tensor | None]]) -> Batch:
    """The crops of `Crops` as one `Batch`; images become (B, 3, S, S)."""
    crops, views, visible = zip(*items)
    return Batch(
        images=torch.stack([to_tensor(crop.image) for crop in crops]),
        points=[torch.from_numpy(crop.points) for crop in crops],
        instances=[
            None if crop.instances is None else torch.from_numpy(crop.instances)
            for crop in crops
        ],
        strong=None if views[0] is None else torch.stack(views),
        visible=None if visible[0] is None else torch.stack(visible),
    )
