"""Annotation files: the head points (and head boxes) of one image, as the data sets store them.

Coordinates are taken as annotated, as everybody in the field does: no shift by half a pixel or
by one. (In ShanghaiTech they run from 0 to W, so the true place of a head is known to about
half a pixel anyway.)
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from xmask.data import mat_file

#: (points (N, 2) float64 as annotated, boxes (N, 2) float64 of width and height, or None)
Annotation = tuple[np.ndarray, "np.ndarray | None"]

MOST_HEADS = 65535  # of an image: what a 16-bit label map can number
_MOST_BYTES = 64 << 20  # of an annotation file; the largest of the benchmarks has under 1 MB


def read_shanghaitech(path: str | os.PathLike) -> Annotation:
    """Read `GT_IMG_n.mat` of ShanghaiTech: field `location` of the structure `image_info`."""
    return _shanghaitech(load_mat(path), path), None


def read_qnrf(path: str | os.PathLike) -> Annotation:
    """Read `img_nnnn_ann.mat` of UCF-QNRF: field `annPoints`."""
    return _qnrf(load_mat(path), path), None


def read_either(path: str | os.PathLike) -> np.ndarray:
    """The points of a file as ShanghaiTech's or UCF-QNRF's, (N, 2) float64."""
    contents = load_mat(path)
    if "image_info" in contents:
        return _shanghaitech(contents, path)
    if "annPoints" in contents:
        return _qnrf(contents, path)
    fields = ", ".join(name for name in contents if not name.startswith("__"))
    raise ValueError(f"{path}: the fields {fields[:80] or '(none)'}; expected image_info (as "
                     "ShanghaiTech) or annPoints (as UCF-QNRF)")


def _shanghaitech(contents: dict, path: str | os.PathLike) -> np.ndarray:
    info = _unwrap(_field(contents, "image_info", path))
    names = getattr(info, "dtype", np.dtype(float)).names or ()
    if "location" not in names:
        raise _unexpected_fields(path, "image_info.location", [f"image_info.{n}" for n in names])
    return _as_points(_unwrap(info["location"]), path, "image_info.location")


def _qnrf(contents: dict, path: str | os.PathLike) -> np.ndarray:
    return _as_points(_unwrap(_field(contents, "annPoints", path)), path, "annPoints")


def read_jhu(path: str | os.PathLike) -> Annotation:
    """Read `nnnn.txt` of JHU-CROWD++: a line `x y w h occlusion blur` per head; may be empty."""
    try:
        lines = read_content(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error}). Download it again.") from None
    check_number(len(lines), path)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = [float(value) for value in line.split()]
        except ValueError:
            row = []
        if len(row) != 6:
            raise ValueError(
                f"{path}, line {number}: expected six numbers 'x y w h occlusion blur', found "
                f"{line.strip()[:60]!r}. The file is cut short or damaged: download it again.")
        rows.append(row)
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return _as_points(table[:, :2], path, "x y"), table[:, 2:4]


def read_content(path: str | os.PathLike) -> bytes:
    """The bytes of an annotation file; FileNotFoundError, or ValueError if they are too many."""
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file. Check the path.") from None
    if not path.is_file():  # a pipe or a device may never end
        raise ValueError(f"{path}: no regular file; give a file of dots")
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: {size >> 20} MB, and dots need at most {_MOST_BYTES >> 20}. "
                         "Is this the file of the dots?")
    return path.read_bytes()


def check_number(heads: int, path: str | os.PathLike) -> None:
    """Raises ValueError, naming the file, for more heads than an image may have."""
    if heads > MOST_HEADS:
        raise ValueError(f"{path}: {heads} heads, and an image has at most {MOST_HEADS}. Cut the "
                         "image and its dots in parts")


def clip_points(
    points: np.ndarray, shape: tuple[int, int],
) -> tuple[np.ndarray, dict[str, int]]:
    """Move points outside an image of `shape` (H, W) to its border; count what was found.

    points: (N, 2) `(x, y)`. Returns them as float32 within [0, W-1] × [0, H-1], in the same
    order, and the counts "clipped" (points moved) and "duplicates" (points annotated at exactly
    the place of an earlier one; they are kept, because each is a head). Zero counts are left out.
    """
    height, width = shape
    inside = np.clip(points, 0, (width - 1, height - 1))
    found = {
        "clipped": int((inside != points).any(axis=1).sum()),
        "duplicates": len(points) - len(np.unique(points, axis=0)),
    }
    return inside.astype(np.float32), {name: count for name, count in found.items() if count}


def load_mat(path: str | os.PathLike) -> dict:
    """The fields of a MATLAB file, as of `mat_file.read`; errors as in `read_content`, too."""
    return mat_file.read(read_content(path), path)


def _field(contents: dict, name: str, path: str | os.PathLike) -> object:
    if name not in contents:
        raise _unexpected_fields(path, name, [n for n in contents if not n.startswith("__")])
    return contents[name]


def _unexpected_fields(path: str | os.PathLike, expected: str, found: list[str]) -> ValueError:
    return ValueError(
        f"{path}: no field {expected}; fields found: {', '.join(found) or 'none'}. Is this an "
        "annotation of the data set that was named? If so, download it again.")


def _unwrap(value: object) -> object:
    """Open the 1×1 cells that MATLAB wraps around values and structures."""
    while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.reshape(-1)[0]
    return value


def _as_points(value: object, path: str | os.PathLike, field: str) -> np.ndarray:
    """Bring MATLAB's shapes of no, one and many points to (N, 2) float64."""
    array = np.asarray(value)
    if array.dtype != object and array.size == 0:
        return np.zeros((0, 2))
    if array.dtype.kind in "iuf" and array.shape in ((2,), (2, 1)):
        array = array.reshape(1, 2)
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{path}: field {field} should be an N×2 array of numbers, found shape "
                         f"{array.shape} of {array.dtype}. Download the file again.")
    check_number(len(array), path)
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"{path}: field {field}, row {row + 1} is {array[row].tolist()}, not a "
                         "place in an image. Download the file again.")
    return array
