"""Your own photos, some of them with dots: the datasets of whoever has no dataset."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from xmask import files
from xmask.data.check import FAR_OUTSIDE
from xmask.data.dot_formats import DOT_SUFFIXES, Dots, read_dot_file
from xmask.data.images import SUFFIXES, is_image
from xmask.data.masks import OWN_FILES
from xmask.data.readers import first_few, read_sample
from xmask.data.sample import Sample

_log = logging.getLogger("xmask")
_SLIPS = 0.1  # share of the dots that may lie outside the image: slips at its border (ours)


class OwnPhotos(Sequence):
    """Photos and their dots as a dataset: `photos[i]` reads a `Sample` from disk, upright.

    pairs: (image, dots). image: a path. dots: the file of its dots, or a file that lists it, as
    `read_dot_file` reads them, or what it has read; or the dots themselves, (N, 2) `(x, y)` in
    pixels, origin at the centre of the top-left pixel; or None for a photo without dots. `ids` are
    file names without suffix, or with it where two are alike. `files` are all files that were
    named.
    Raises FileNotFoundError for a file that is missing, ValueError for dots that cannot be
    read; reading a photo that is damaged, of another size than the file of the dots says, or of
    whose dots more than one and more than a tenth lie outside by more than 1 px, or all within the
    first pixel, raises ValueError, all naming the file.
    """

    synthetic = False
    settings = {"name": "own photos", "max_side": None}

    def __init__(self, pairs: Sequence[tuple[str | os.PathLike,
                                             str | os.PathLike | np.ndarray | Dots | None]],
                 ) -> None:
        self._pairs = [(Path(image), _dots(Path(image), dots)) for image, dots in pairs]
        stems = Counter(image.stem.lower() for image, _ in self._pairs)
        # with its suffix, too, where masks would have the name of a file beside them
        self.ids = [image.name if stems[image.stem.lower()] > 1 or image.stem.lower() in OWN_FILES
                    else image.stem for image, _ in self._pairs]
        self.files = [Path(one) for pair in pairs for one in pair
                      if isinstance(one, (str, os.PathLike))]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image, dots = self._pairs[index]
        dots = dots or Dots(np.zeros((0, 2)))
        points = dots.points
        sample = read_sample(image, points, None, None, self.ids[index], None)
        (height, width), turned = sample.shape, {"exif_rotated", "exif_ignored"} & {*sample.repairs}
        # some tools note the size of a photo as it is before its EXIF tag turns it
        if dots.size and dots.size not in ((width, height), (height, width) if turned else ()):
            raise ValueError(
                f"{image}: {width} x {height} px, and {dots.file} says {dots.size[0]:g} x "
                f"{dots.size[1]:g}. Take the photo that the dots were put on")
        if len(points) and ((points >= 0) & (points <= 1)).all() and (points % 1).any():
            raise ValueError(f"{image}: its dots all lie within the first pixel, the first at x "
                             f"{points[0, 0]:g}, y {points[0, 1]:g}. Are they shares of the image? "
                             "Give pixels")
        moved = (np.abs(points - sample.points) > FAR_OUTSIDE).any(axis=1)
        if moved.sum() > max(1, _SLIPS * len(points)):
            x, y = points[moved][0]
            raise ValueError(
                f"{image}: {moved.sum()} of its {len(points)} dots lie outside the image "
                f"({width} x {height} px), the first at x {x:g}, y {y:g}. Are they in pixels of "
                "this file, x before y? Correct the dots, or take the photo they were put on")
        return sample

    def image_path(self, index: int) -> Path:
        """The file of a photo."""
        return self._pairs[index][0]

    def source(self, index: int) -> str:
        """The same as text, from the root: two photos of one name are not the same photo."""
        return os.fspath(self.image_path(index).absolute())

    def counts(self) -> np.ndarray:
        """(N,) int64: dots of every photo."""
        return np.array([len(dots.points) if dots else 0 for _, dots in self._pairs],
                        dtype=np.int64)

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
        """SHA-256 over a photo's name, its file, and its dots, in whatever file they are."""
        image, dots = self._pairs[index]
        parts = [self.ids[index].encode("utf-8", "surrogateescape")]
        with suppress(OSError):  # reading it says why
            parts.append(files.sha256(image).encode())
        if dots is not None:
            parts.append(hashlib.sha256(dots.points.astype("<f8").tobytes()).hexdigest().encode())
        return hashlib.sha256(b"\n".join(parts)).hexdigest()

    def checksum(self) -> str:
        """SHA-256 over all of them."""
        every = "".join(self.image_checksum(i) for i in range(len(self)))
        return hashlib.sha256(every.encode()).hexdigest()


def _dots(image: Path, dots: str | os.PathLike | np.ndarray | Dots | None) -> Dots | None:
    """The dots of an image, from wherever they are."""
    if not image.is_file():
        raise FileNotFoundError(f"{image}: no such image. Check the path.")
    if dots is None or isinstance(dots, Dots):
        return dots
    if isinstance(dots, np.ndarray):
        if (dots.dtype.kind not in "iuf" or dots.ndim != 2 or dots.shape[1] != 2
                or not np.isfinite(dots).all()):
            raise ValueError(f"{image}: dots should be (N, 2) finite numbers, found shape "
                             f"{dots.shape} of {dots.dtype}")
        return Dots(dots.astype(np.float64))
    found, names = read_dot_file(dots), _Names([image])
    mine = [one for one in found if one.name is None or names.find(one.name)]
    if len(mine) != 1:
        raise ValueError(f"{os.fspath(dots)}: lists {image.name} {len(mine)} times among its "
                         f"{len(found)} images; expected once")
    return mine[0]


def read_folder(folder: str | os.PathLike) -> tuple[OwnPhotos, OwnPhotos]:
    """Photos of a folder: (those with dots, those without), each in the order of their names.

    An image `a.jpg` has dots if `a.csv`, `a.json` of LabelMe, `a.xml` of Pascal VOC, or `a.mat`,
    `GT_a.mat` or `a_ann.mat` lies beside it, or if a file in the folder lists it by its name: COCO,
    CVAT, VIA or Label Studio (see `dot_formats.read_dot_file`). Without a single dot there, it is
    an empty scene, and a warning says how many are. Folders in a listed name do not count, nor do
    the characters that Label Studio puts before it.
    Dots outside the image are moved to its border, and the sample's `repairs` say how many. Hidden
    files are left out, and so is what xmask wrote into the folder. Text files named like photos
    are not read, and a warning says so.
    Raises FileNotFoundError for a folder without images; ValueError, naming the file, for a
    .csv, .json, .xml or .mat that cannot be read, whose image is not there, or whose image has
    dots in another one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file. Give its folder" if folder.exists() else "no such folder. Check the path"
        raise FileNotFoundError(f"{folder}: {what}.")
    listed = files.without_ours(folder.iterdir())
    images = [p for p in listed if is_image(p)]
    if not images:
        raise FileNotFoundError(f"{folder}: no image in this folder ({', '.join(SUFFIXES)})")
    names, dots, origin = _Names(images), {}, {}
    stems = {image.stem for image in images}
    texts = [p.name for p in listed if p.suffix.lower() == ".txt" and p.stem in stems]
    if texts:
        _log.warning("%s: %s named like photos: %s. Dots in text files are not read; write a.csv "
                     "for a.jpg, the line x,y first, then one line a head, in pixels", folder,
                     f"{len(texts)} text file{'s' * (len(texts) > 1)}", first_few(texts))
    for path in listed:
        if (path.suffix.lower() not in DOT_SUFFIXES or path.name.startswith(".")
                or not path.is_file()):
            continue
        found = read_dot_file(path)
        empty = sum(one.name is not None and not len(one.points) for one in found)
        if empty:
            _log.warning("%s: %d of its %d images have no dot, and count as photos without people. "
                         "If nobody has dotted them yet, take them out of it", path, empty,
                         len(found))
        for image, points in names.of_file(path, found):
            if image in dots:
                other = origin[image]
                raise ValueError(f"{path}: lists {image.name} twice; keep one of them"
                                 if other == path else
                                 f"{path}: {other.name} beside it has dots of {image.name}, too; "
                                 "keep one of them")
            dots[image], origin[image] = points, path
    labels = sorted({label for one in dots.values() for label in one.labels})
    if len(labels) > 1:
        _log.warning("%s: shapes of %d labels, %s, and all of them count as heads. Take out what "
                     "is none", folder, len(labels), first_few([one[:40] for one in labels]))
    dotted = OwnPhotos([(p, dots[p]) for p in images if p in dots])
    dotted.files += origin.values()
    return dotted, OwnPhotos([(p, None) for p in images if p not in dots])


class _Names:
    """Which of some images is meant by the name of a file, or by a name in a file."""

    def __init__(self, images: Sequence[Path]) -> None:
        self._stems, self._names, self._alike = (defaultdict(list) for _ in range(3))
        for image in images:
            self._stems[image.stem].append(image)
            self._names[image.name].append(image)
            self._alike[_uploaded(image.name)].append(image)

    def beside(self, table: Path) -> Path:
        """The image of a file of dots for one image."""
        stems = [table.stem]
        if table.suffix.lower() == ".mat":  # ShanghaiTech's names, UCF-QNRF's names
            stems += [table.stem.removeprefix("GT_"), table.stem.removesuffix("_ann")]
        owners = next((self._stems[stem] for stem in stems if stem in self._stems), [])
        if not owners:
            raise ValueError(f"{table}: no image of this name beside it. Dots of one photo have "
                             "its name, a.csv for a.jpg: rename one of the two, or move the table "
                             "elsewhere")
        if len(owners) > 1:
            raise ValueError(f"{table}: are these the dots of "
                             f"{' or of '.join(one.name for one in owners)}? Rename the other "
                             "image, or move it elsewhere")
        return owners[0]

    def of_file(self, table: Path, dots: list[Dots]) -> list[tuple[Path, Dots]]:
        """The images that a file lists, or the one beside it."""
        found = [(self.beside(table) if one.name is None else self.find(one.name), one)
                 for one in dots]
        missing = [str(one.name) for image, one in found if image is None]
        if missing:
            raise ValueError(
                f"{table}: lists {len(missing)} images that are not beside it: "
                f"{first_few([name[:60] for name in missing])}; "
                "copy them there, or take them out of the file")
        return [(image, one) for image, one in found if image is not None]

    def find(self, name: str) -> Path | None:
        """The image of a listed name: of exactly this one, else the only one of a name alike."""
        name = name if name in self._names else unquote(name)  # of an address
        alike = (self._names.get(name) or self._alike.get(_uploaded(name))
                 or self._alike.get(_uploaded(re.sub("^[0-9a-f]{8}-", "", name))) or [])
        return alike[0] if len(alike) == 1 else None


def _uploaded(name: str) -> str:
    """A file name as Label Studio changes it, which is Django's way (`get_valid_filename`), with
    its suffix in small letters."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name).strip())
    return re.sub(r"[^-\w.]", "", stem.replace(" ", "_")) + suffix.lower()
