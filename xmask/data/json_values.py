"""Values of JSON files that other programs wrote: checked one by one, and named where wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import numpy as np

from xmask.data.annotations import check_number

#: (file name of an image, points (N, 2) float64) of every image that a file lists
Listed = list[tuple[str, np.ndarray]]

_FAR = 1e6  # px: no image is so large
_KINDS = {list: "a list", dict: "an object", str: "a text", int: "a number"}


def field(value: object, name: str, kind: type | tuple[type, ...],
          where: str | os.PathLike) -> Any:
    """A field of an object, if it is of this kind (dict, list, str, int or several of them).

    where: file and entry, for the message of the ValueError that is raised otherwise.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the field {name}, found {short(value)}")
    found = value.get(name)
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"{where}: field {name} should be "
                         f"{' or '.join(_KINDS[one] for one in kinds)}, found "
                         f"{short(found) if name in value else 'none'}")
    return found


def has(value: object, name: str) -> bool:
    """Whether something is an object with this field, and the field is neither empty nor false."""
    return isinstance(value, dict) and bool(value.get(name))


def numbers(values: object, number: int, where: str | os.PathLike) -> list[float]:
    """So many values that can be places or sizes in an image, in pixels or percent.

    Raises ValueError, naming `where`, for another number of them, for anything that is no number,
    and for NaN, infinities and numbers beyond any image.
    """
    if not (isinstance(values, list) and len(values) == number and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and -_FAR < v < _FAR
            for v in values)):
        raise ValueError(f"{where}: found {short(values)} where {number} numbers of a place in an "
                         "image should be. Correct or remove it")
    return [float(v) for v in values]


def as_points(places: Sequence[Sequence[float]], where: str | os.PathLike) -> np.ndarray:
    """Places of the heads of one image as (N, 2) float64; ValueError if they are too many."""
    check_number(len(places), where)
    return np.array(places, dtype=np.float64).reshape(-1, 2)


def file_name(path: str) -> str:
    """The last part of a path or address, as Windows or others write it."""
    return re.split(r"[/\\]", path)[-1]
