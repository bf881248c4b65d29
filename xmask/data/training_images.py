"""Training images as the trainer sees them: labelled ones with their masks, all ones bare."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from xmask.data.masks import read_masks
from xmask.data.sample import Sample


class MaskedImages(Sequence):
    """The labelled images: points from the dataset, masks from a folder of `mask_dataset`; true
    masks, where the dataset has them, are not read.

    images: all images of a dataset. indices: the labelled ones. ids: names of all.
    """

    def __init__(self, images: Sequence[Sample], indices: list[int], masks: Path, ids: list[str]):
        self.images, self.indices, self.masks, self.ids = images, indices, masks, ids

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        index = self.indices[position]
        sample, name = self.images[index], self.ids[index]
        mask = read_masks(self.masks, name)
        if mask.shape != sample.shape:
            raise ValueError(
                f"{self.masks / name}.png: {mask.shape[1]} x {mask.shape[0]} px, but its image "
                f"has {sample.shape[1]} x {sample.shape[0]}; delete {self.masks} and run the "
                "masks step again")
        return replace(sample, instances=mask)


class BareImages(Sequence):
    """The unlabelled images: every image of a dataset, the labelled ones too (as in the release),
    without points and masks, so that none can leak into training."""

    def __init__(self, images: Sequence[Sample]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Sample:
        sample = self.images[position]
        return Sample(sample.image, np.zeros((0, 2), np.float32), name=sample.name)


class Kept(Sequence):
    """Images of a sequence, the last ones read kept in memory, up to `limit` bytes of pixels and
    label maps: with a limit, a folder of any size trains in the same memory."""

    def __init__(self, images: Sequence[Sample], limit: float = math.inf):
        self.images, self.limit, self.held = images, limit, 0
        self.samples: OrderedDict[int, Sample] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Sample:
        if position in self.samples:
            self.samples.move_to_end(position)
            return self.samples[position]
        sample = self.images[position]
        self.samples[position] = sample
        self.held += _size(sample)
        while self.held > self.limit:
            self.held -= _size(self.samples.popitem(last=False)[1])
        return sample


def _size(sample: Sample) -> int:
    return sample.image.nbytes + (0 if sample.instances is None else sample.instances.nbytes)
