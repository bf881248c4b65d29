"""The benchmarks as sequences of samples, read one at a time (section 7, data)."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from xmask import files
from xmask.data import images
from xmask.data.annotations import clip_points
from xmask.data.layouts import (
    MARKER,
    Layout,
    Listing,
    find_folder,
    layout_of,
    list_split,
    mask_path,
    no_folder,
    number_of,
)
from xmask.data.sample import Sample

#: Size of the set that is drawn where `open_dataset("synthetic", root)` finds none (ours):
#: enough for a lesson, drawn in seconds.
DRAWN = {"train": 24, "test": 12, "seed": 0}


def open_dataset(
    name: str, root: str | os.PathLike, split: str = "train", *,
    max_side: int | None = None, allow_partial: bool = False, draw: bool = True,
) -> CrowdDataset:
    """Open a split of a data set: its files are listed and paired, none is read yet.

    name: "sha", "shb" (ShanghaiTech A, B), "qnrf" (UCF-QNRF), "jhu" (JHU-CROWD++), or
        "synthetic": a small drawn set in the layout of ShanghaiTech A, drawn into `root` first
        if it is not there, and `root` is new, empty, or holds other drawn sets only.
    root: the data set's folder (part_A, UCF-QNRF_ECCV18, jhu_crowd_v2.0), or one that holds it,
        directly or one level down.
    split: "train" or "test"; "jhu" also has "val".
    max_side: images whose longer side exceeds this many pixels are shrunk to it, with points,
        boxes and masks. None takes the usual limit of the field (qnrf 1920, jhu 2048, others
        none); 0 never shrinks.
    allow_partial: take the pairs that are there where files are missing.
    draw: False raises FileNotFoundError where "synthetic" would be drawn.

    Raises FileNotFoundError if the data set or the split is not there; ValueError for an unknown
    name or split, for images without annotation or the reverse, and for another number of images
    than the data set has, so that a half-downloaded one is never taken for a whole one.
    """
    layout = layout_of(name)
    if max_side is not None and operator.index(max_side) < 0:
        raise ValueError(f"max_side is a number of pixels, or 0 for no limit; found {max_side}.")
    folder = find_folder(layout, root)
    if name == "synthetic":
        folder = _draw_if_missing(folder, Path(root), draw)
    if folder is None:
        raise no_folder(layout, root)
    listing = list_split(layout, folder, split)
    generator = read_marker(folder)
    expected = expected_images(layout, generator, split)
    _require_whole(layout, listing, split, expected, allow_partial)
    return CrowdDataset(
        name, split, layout, listing, listing.pairs, generator=generator,
        max_side=(layout.max_side if max_side is None else int(max_side)) or None)


class CrowdDataset(Sequence):
    """A sequence of `Sample`, read from disk when asked for: `dataset[i]`.

    A slice is a smaller dataset and reads nothing. Attributes: `name`, `split`, `ids` (image
    names, in numeric order), `numbers` (their numbers), `synthetic` (drawn, not photographed),
    `generator` (settings it was drawn with, or None), `max_side` (pixels, or None).
    """

    def __init__(
        self, name: str, split: str, layout: Layout, listing: Listing, ids: Iterable[str], *,
        generator: dict | None, max_side: int | None,
    ) -> None:
        self.name = name
        self.split = split
        self.layout = layout
        self.ids = list(ids)
        self.numbers = [number_of(image) for image in self.ids]
        self.generator = generator
        self.synthetic = generator is not None
        self.max_side = max_side
        self._listing = listing

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kind = "drawn" if self.synthetic else "real"
        return (f"<{self.layout.title} ({kind}), {self.split}: {len(self)} images "
                f"in {self._listing.folder}>")

    def __getitem__(self, index):
        """Read sample `index`, or give the smaller dataset of a slice.

        Raises ValueError naming the file if the image or the annotation cannot be read.
        """
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        i = self._position(index)
        points, boxes = self.layout.read(self.annotation_path(i))
        return read_sample(
            self.image_path(i), points, boxes, self._mask_path(i), self.ids[i], self.max_side)

    def subset(self, indices: Iterable[int]) -> CrowdDataset:
        """The dataset of the images at `indices`, in that order; reads nothing."""
        chosen = [self.ids[self._position(i)] for i in indices]
        return CrowdDataset(self.name, self.split, self.layout, self._listing, chosen,
                            generator=self.generator, max_side=self.max_side)

    def image_path(self, index: int) -> Path:
        """The file of an image."""
        return self._listing.images[self.ids[index]]

    def annotation_path(self, index: int) -> Path:
        """The file that holds the points of an image."""
        return self._listing.annotations[self.ids[index]]

    def paths(self) -> list[Path]:
        """The files of all splits: images, annotations and, if any, true masks."""
        found, folder = [], self._listing.folder.parent
        for split in self.layout.splits:
            if (folder / self.layout.splits[split]).is_dir():
                one = list_split(self.layout, folder, split)
                found += [*one.images.values(), *one.annotations.values(),
                          *(mask_path(self.layout, one, name) for name in one.images)]
        return [path for path in found if path.exists()]

    def counts(self) -> np.ndarray:
        """(N,) int64, N images: annotated heads of every image; reads annotations, no images."""
        return self._counts.copy()

    @cached_property
    def _counts(self) -> np.ndarray:
        counts = [len(self.layout.read(self.annotation_path(i))[0]) for i in range(len(self))]
        return np.array(counts, dtype=np.int64)

    def checksum(self) -> str:
        """SHA-256 over names, annotation bytes and stored image sizes, in order.

        Images are not decoded (what cannot be read counts as 0x0 and empty): it says which data a
        run has seen, not whether pixels are intact (for that see `check_dataset`).
        """
        return hashlib.sha256(b"".join(map(self._identity, range(len(self))))).hexdigest()

    def image_checksum(self, index: int) -> str:
        """SHA-256 over what `checksum` sees of one image: name, annotation, stored size."""
        return hashlib.sha256(self._identity(self._position(index))).hexdigest()

    def _identity(self, i: int) -> bytes:
        # one broken image shall not hide the others; reading it says why
        height, width, annotation, path = 0, 0, b"", self.annotation_path(i)
        with suppress(OSError, ValueError):
            height, width = images.image_size(self.image_path(i))
        with suppress(OSError):
            annotation = path.read_bytes() if path.is_file() else b""
        return f"{self.ids[i]} {height}x{width} {len(annotation)}\n".encode() + annotation

    @property
    def settings(self) -> dict:
        """What has to be recorded with every number made from this dataset (JSON values)."""
        return {
            "name": self.name,
            "split": self.split,
            "images": len(self),
            "synthetic": self.synthetic,
            "generator": self.generator,
            "max_side": self.max_side,
            "resized": "longer side shrunk to max_side, LANCZOS" if self.max_side else "never",
            "points": "as annotated, clipped to the image; origin at the centre of the top-left "
                      "pixel",
            "orientation": "EXIF applied unless the points fit the stored image better",
        }

    def _position(self, index: int) -> int:
        try:
            i = operator.index(index)
        except TypeError:
            raise TypeError(f"a dataset is indexed by a number or a slice, not by {index!r}; "
                            "of an image name, dataset.ids.index(name) is the number.") from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} in {self!r}")
        return i % len(self)

    def _mask_path(self, i: int) -> Path | None:
        path = mask_path(self.layout, self._listing, self.ids[i])
        if path.exists():
            return path
        if self.synthetic:
            raise ValueError(f"{path}: the true masks of this drawn image are missing. "
                             "Delete the drawn data set and draw it again.")
        return None


def read_sample(
    image_path: Path, points: np.ndarray, boxes: np.ndarray | None, masks: Path | None,
    name: str, max_side: int | None,
) -> Sample:
    """Bring an image and its annotation together: turned, clipped, shrunk, and counted.

    points: (N, 2) as annotated; boxes: (N, 2) widths and heights or None; masks: file of the
    true label map or None; max_side: limit of the longer side in pixels or None.
    """
    image = images.decode(image_path)
    turn = turns_upright(points, image.rgb.shape[:2], image.orientation)
    rgb = np.ascontiguousarray(images.upright(image.rgb, image.orientation if turn else 1))
    shape = rgb.shape[:2]
    points, repairs = clip_points(points, shape)
    if image.orientation != 1:
        repairs["exif_rotated" if turn else "exif_ignored"] = 1
    if image.mode != "RGB":
        repairs[images.conversion(image.mode)] = 1
    boxes = None if boxes is None else boxes.astype(np.float32)
    labels = None if masks is None else read_true_masks(masks, shape, len(points))
    if max_side and max(shape) > max_side:
        new = tuple(max(1, round(side * max_side / max(shape))) for side in shape)
        scale = np.array([new[1] / shape[1], new[0] / shape[0]])
        rgb = images.resize_image(rgb, new)
        labels = None if labels is None else images.resize_labels(labels, new)
        boxes = None if boxes is None else (boxes * scale).astype(np.float32)
        # A pixel is a square around its centre, so it is the corners that scale.
        points = clip_points((points + 0.5) * scale - 0.5, new)[0]
    return Sample(rgb, points, labels, name, boxes, repairs)


def turns_upright(points: np.ndarray, shape: tuple[int, int], orientation: int) -> bool:
    """Whether EXIF `orientation` is to be applied to an image stored as `shape` (H, W).

    It is, unless more points would then lie outside: such an annotation was made on the image
    as stored. Turns by 180° and mirrors keep the shape, so points cannot tell: applied.
    """
    if orientation < 5:
        return True
    height, width = shape
    outside_stored = ((points < 0) | (points > (width, height))).any(axis=1).sum()
    outside_turned = ((points < 0) | (points > (height, width))).any(axis=1).sum()
    return bool(outside_turned <= outside_stored)


def read_true_masks(path: Path, shape: tuple[int, int], people: int) -> np.ndarray:
    """Read the true label map of an image of `shape` with so many `people`, as (H, W) int32.

    Raises ValueError if it is of another shape, or has labels above `people`.
    """
    labels = images.read_labels(path)
    highest = int(labels.max(initial=0))
    if labels.shape != shape or highest > people:
        raise ValueError(
            f"{path}: a label map of shape {labels.shape} with labels up to {highest}, for an "
            f"image of shape {shape} with {people} heads. Delete the drawn data set and draw it "
            "again.")
    return labels


def read_marker(folder: Path) -> dict | None:
    """Generator settings of a drawn data set; None for a real one."""
    marker = folder / MARKER
    if not marker.exists():
        return None
    settings = files.read_json(marker)
    counts = settings.get("images", {})
    if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
        raise ValueError(f"{marker}: field images should say how many images each split has, found "
                         f"{str(counts)[:60]}. Delete the drawn data set and draw it again.")
    return settings


def expected_images(layout: Layout, generator: dict | None, split: str) -> int | None:
    """How many images a whole split has: the published number, or the number drawn."""
    if generator is None:
        return layout.official[split]
    return generator.get("images", {}).get(split)


def first_few(names: Sequence[object]) -> str:
    """The first five of some names or numbers, for messages."""
    return ", ".join([*map(str, names[:5])] + ["..."] * (len(names) > 5))


def _draw_if_missing(folder: Path | None, root: Path, draw: bool) -> Path:
    if folder is None:
        if not draw:
            raise FileNotFoundError(f"{root}: holds no drawn data set. Draw one first, into a "
                                    "folder of its own: `xmask data draw --layout sha --out DIR`")
        others = sorted(one.name for one in (root.iterdir() if root.is_dir() else ())
                        if not one.name.startswith(".") and not _is_drawn(one))
        if others:
            raise ValueError(f"{root}: holds {first_few(others)} and no drawn data set, and none "
                             "is drawn beside files of yours. Give a new or empty folder")
        from xmask.synthetic import write_dataset  # the generator is not needed to read

        return Path(write_dataset("sha", root, **DRAWN))
    if not (folder / MARKER).exists():
        raise ValueError(f"{folder}: has no {MARKER}, so it is not a (fully) drawn data set. If it "
                         "is a real one, name it 'sha'; if drawing was interrupted, delete it; "
                         "or give another folder.")
    return folder


def _is_drawn(path: Path) -> bool:
    """Whether this is the folder of a drawn data set, or one that holds such a folder."""
    return (path / MARKER).is_file() or any(path.glob(f"*/{MARKER}"))


def _require_whole(
    layout: Layout, listing: Listing, split: str, expected: int | None, allow_partial: bool,
) -> None:
    """Raises ValueError where a split has not the files it should have."""
    rest = "or pass allow_partial=True to use"
    for paths, what in ((listing.without_annotation, "images without an annotation"),
                        (listing.without_image, "annotations without an image")):
        if paths and not allow_partial:
            raise ValueError(
                f"{listing.folder}: {len(paths)} {what}: {first_few([one.name for one in paths])}. "
                f"The data set is incomplete: download it again from {layout.source}, {rest} the "
                "pairs that are there.")
    found = len(listing.pairs)
    if found == 0:
        raise ValueError(f"{listing.folder}: no pair of an image and its annotation. "
                         f"Looked for {layout.describe()}.")
    title = f"{listing.folder}: {found} images, but the {split} split of {layout.title} has"
    if expected and found < expected and not allow_partial:
        raise ValueError(f"{title} {expected}. The data set is incomplete: download (or draw) it "
                         f"again, {rest} what is there.")
    if expected is not None and found > expected:
        raise ValueError(f"{title} only {expected}. Is it another data set, or were files added? "
                         "Remove what does not belong.")
