"""Your own photos, beside some of them a CSV of dots: the datasets of whoever has no dataset."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xmask import files
from xmask.data.annotations import read_dots
from xmask.data.images import SUFFIXES, is_image
from xmask.data.readers import read_sample
from xmask.data.sample import Sample


class OwnPhotos(Sequence):
    """Photos and their dots as a dataset: `photos[i]` reads a `Sample` from disk, upright.

    pairs: (image, table) paths; table: a CSV with columns x and y in pixels, origin at the centre
    of the top-left pixel, a line a head; None for a photo without dots. `ids` are file names
    without suffix, or with it where two are alike.
    Raises FileNotFoundError for a file that is missing, ValueError for a table that cannot be
    read; reading a photo that is damaged raises ValueError, all naming the file.
    """

    synthetic = False
    settings = {"name": "own photos", "max_side": None}

    def __init__(self, pairs: Sequence[tuple[str | os.PathLike, str | os.PathLike | None]]) -> None:
        self._pairs = [(Path(image), None if table is None else Path(table))
                       for image, table in pairs]
        stems = Counter(image.stem.lower() for image, _ in self._pairs)
        self.ids = [image.name if stems[image.stem.lower()] > 1 else image.stem
                    for image, _ in self._pairs]
        self._heads: list[int] = []
        for image, table in self._pairs:
            if not image.is_file():
                raise FileNotFoundError(f"{image}: no such image. Check the path.")
            self._heads.append(0 if table is None else len(read_dots(table)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image, table = self._pairs[index]
        points = np.zeros((0, 2)) if table is None else read_dots(table)
        return read_sample(image, points, None, None, self.ids[index], None)

    def image_path(self, index: int) -> Path:
        """The file of a photo."""
        return self._pairs[index][0]

    def source(self, index: int) -> str:
        """The same as text, from the root: two photos of one name are not the same photo."""
        return os.fspath(self.image_path(index).absolute())

    def counts(self) -> np.ndarray:
        """(N,) int64: dots of every photo."""
        return np.array(self._heads, dtype=np.int64)

    def sound(self) -> tuple[OwnPhotos, list[str]]:
        """The photos that can be read, and what is wrong with each of the others."""
        good, wrong = [], []
        for index, pair in enumerate(self._pairs):
            try:
                self[index]
                good.append(pair)
            except (OSError, ValueError) as error:
                wrong.append(str(error))
        return (OwnPhotos(good) if wrong else self), wrong

    def image_checksum(self, index: int) -> str:
        """SHA-256 over a photo's name, its file, and its table."""
        parts = [self.ids[index].encode("utf-8", "surrogateescape")]
        parts += [files.sha256(path).encode() for path in self._pairs[index] if path]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()

    def checksum(self) -> str:
        """SHA-256 over all of them."""
        every = "".join(self.image_checksum(i) for i in range(len(self)))
        return hashlib.sha256(every.encode()).hexdigest()


def read_folder(folder: str | os.PathLike) -> tuple[OwnPhotos, OwnPhotos]:
    """Photos of a folder: (those with dots, those without), each in the order of their names.

    An image `a.jpg` has dots if `a.csv` lies beside it (see `OwnPhotos`; a table without lines is
    an empty scene). Dots outside the image are moved to its border, and the sample's `repairs`
    say how many. Hidden files are left out, and so is what xmask wrote into the folder.
    Raises FileNotFoundError for a folder without images; ValueError, naming the file, for a
    table that cannot be read, that has no image, or that has two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Check the path.")
    ours = files.read_record(folder)
    listed = sorted(p for p in folder.iterdir() if p.name not in ours)
    images = [p for p in listed if is_image(p)]
    if not images:
        raise FileNotFoundError(f"{folder}: no image in this folder ({', '.join(SUFFIXES)})")
    tables: dict[str, Path] = {}
    for path in listed:
        if path.suffix.lower() == ".csv" and not path.name.startswith(".") and path.is_file():
            if path.stem in tables:
                raise ValueError(f"{path}: {tables[path.stem].name} is beside it; keep one of them")
            tables[path.stem] = path
    for stem, table in tables.items():
        owners = [image.name for image in images if image.stem == stem]
        if not owners:
            raise ValueError(f"{table}: no image of this name beside it; rename one of the two, or "
                             "move the table elsewhere")
        if len(owners) > 1:
            raise ValueError(f"{table}: are these the dots of {' or of '.join(owners)}? Rename the "
                             "other image, or move it elsewhere")
    dotted = [(image, tables[image.stem]) for image in images if image.stem in tables]
    return OwnPhotos(dotted), OwnPhotos([(p, None) for p in images if p.stem not in tables])
