"""MATLAB files of any hands: how much is in one is known before it is unpacked and built.

scipy builds what a file claims to hold, level by level, and a file of 300 bytes can claim
gigabytes. So the claims are read first (format 5, "MAT-File Format", MathWorks).
"""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import matfile_version

MOST_BYTES = 16 << 20  # unpacked; 65,535 heads have 1 MB
_MOST_VALUES = 4 << 20  # of all arrays that hold arrays
_DEEPEST = 16  # arrays within arrays; the benchmarks have four levels
_MATRIX, _PACKED = 14, 15  # the format's numbers of an array, and of a part that is packed
# its numbers of classes of arrays; holders hold arrays: cells, structures and objects (these two
# have fields), functions, and opaque ones, which have no shape
_HOLDERS, _STRUCTURES, _OPAQUE, _SPARSE = (1, 2, 3, 16, 17), (2, 3), 17, 5


def read(content: bytes, path: str | os.PathLike) -> dict:
    """The fields of a MATLAB file, up to version 7; ValueError, naming `path`, if it is none or
    claims to hold more than dots need."""
    try:
        _check(content)
        return loadmat(io.BytesIO(content))
    except NotImplementedError:
        raise ValueError(f"{path}: a MATLAB 7.3 (HDF5) file, which is not how the data set is "
                         "distributed. Download it again, or save it with MATLAB's -v7.") from None
    except _TooMuch as error:
        raise ValueError(f"{path}: {error}, and dots need far less. Save the dots alone") from None
    except Exception as error:  # scipy's parser raises nearly anything on damaged bytes
        raise ValueError(f"{path}: cannot be read as a MATLAB file ({type(error).__name__}: "
                         f"{error}). It is cut short or damaged: download it again.") from None


class _TooMuch(ValueError):
    """What a file holds or claims."""


def _check(content: bytes) -> None:
    """Raises _TooMuch where a file holds, or one of format 5 claims, too much."""
    if len(content) > MOST_BYTES:
        raise _TooMuch(f"it has {len(content) >> 20} MB")
    if matfile_version(io.BytesIO(content))[0] != 1:  # the values of format 4 lie in the file
        return
    order = "<" if content[126:128] == b"IM" else ">"  # as scipy reads it
    left, values = MOST_BYTES, 0
    parts = [(128, len(content), 0, memoryview(content))]
    while parts:
        at, end, depth, data = parts.pop()
        if depth > _DEEPEST:
            raise _TooMuch(f"it has arrays within arrays, more than {_DEEPEST} levels of them")
        while at + 8 <= end:
            kind, begin, size, at = _element(data, at, order)
            stop = min(begin + size, end)
            if kind == _PACKED and depth == 0:
                unpacked = zlib.decompressobj().decompress(data[begin:stop], left + 1)
                left -= len(unpacked)
                if left < 0:
                    raise _TooMuch(f"it unpacks to more than {MOST_BYTES >> 20} MB")
                parts.append((0, len(unpacked), 1, memoryview(unpacked)))
            elif kind == _MATRIX and size:
                holds = data[begin + (8 if order == "<" else 11)]
                claimed = _claimed(data, begin, holds, order)
                if holds in _HOLDERS:
                    values += claimed
                    parts.append((begin, stop, depth + 1, data))
                elif holds != _SPARSE and claimed > size:  # each takes a byte or more
                    raise _TooMuch(f"it claims {claimed:,} values in {size:,} bytes")
                if values > _MOST_VALUES:
                    raise _TooMuch(f"it claims more than {_MOST_VALUES >> 20} million arrays "
                                   "within arrays")


def _element(data: memoryview, at: int, order: str) -> tuple[int, int, int, int]:
    """Kind of the part at a place, where its value begins, its bytes, where the next part is."""
    kind, size = struct.unpack_from(order + "II", data, at)
    if kind >> 16:  # a small one: kind, size and value in eight bytes
        return kind & 0xffff, at + 4, kind >> 16, at + 8
    return kind, at + 8, size, at + 8 + size + (-size % 8 if kind != _PACKED else 0)


def _claimed(data: memoryview, begin: int, holds: int, order: str) -> int:
    """How many values an array of a class says it has, by its shape and its number of fields."""
    if holds == _OPAQUE:
        return 0
    _, at, size, place = _element(data, begin + 16, order)
    shape = np.frombuffer(data[at:at + size], order + "i4")
    fields = 1
    if holds in _STRUCTURES:
        for _ in range(holds - 1):  # the array's name, and an object's class
            place = _element(data, place, order)[3]
        _, at, _, place = _element(data, place, order)
        each = struct.unpack_from(order + "i", data, at)[0]  # bytes of a field's name
        fields = max(1, _element(data, place, order)[2] // max(1, each))
    return int(min(fields * np.prod(np.maximum(shape, 0), dtype=float), 2.0**62))
