"""One photograph and its dots as a dataset of one, for whoever has no dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from xmask.data.readers import read_sample
from xmask.data.sample import Sample


class OneImage(Sequence):
    """image: path of a picture. points: path of a CSV with columns x and y, pixels, a row a head.

    Raises FileNotFoundError, or ValueError if the CSV has no such columns or holds no numbers.
    """

    synthetic = False

    def __init__(self, image: Path, points: Path) -> None:
        self._image, self._points = Path(image), Path(points)
        self.ids = [self._image.stem]
        self.settings = {"name": "one image", "image": self._image.name, "max_side": None}
        if not self._image.is_file():
            raise FileNotFoundError(f"{image}: no such image. Check the path.")
        self._heads = self._read_points()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        if index not in (0, -1):
            raise IndexError(f"image {index} of 1")
        return read_sample(self._image, self._heads, None, None, self.ids[0], None)

    def image_path(self, index: int) -> Path:
        """The image file."""
        return self._image

    def checksum(self) -> str:
        """SHA-256 over the image file and the table of points."""
        return hashlib.sha256(self._image.read_bytes() + self._points.read_bytes()).hexdigest()

    def image_checksum(self, index: int) -> str:
        """The same: there is one image."""
        return self.checksum()

    def _read_points(self) -> np.ndarray:
        """(N, 2) float64."""
        try:
            read = pd.read_csv(self._points)
            table = read[["x", "y"]]
        except FileNotFoundError:
            raise FileNotFoundError(f"{self._points}: no such file. Check the path.") from None
        except (KeyError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
            raise ValueError(f"{self._points}: expected a table with columns x and y "
                             f"({str(error)[:100]})") from None
        if len(read) and not isinstance(read.index, pd.RangeIndex):
            # pandas takes the first fields for names of the rows, and shifts the others
            raise ValueError(f"{self._points}: the rows have more fields than the header "
                             f"({', '.join(read.columns)}). Name every column, or remove what is "
                             "too much.")
        numbers = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        wrong = ~np.isfinite(numbers).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{self._points}: line {row + 2} is {table.iloc[row].tolist()}, not a "
                             "place in an image. Correct or remove it.")
        return numbers
