"""Image files as the method wants them: upright 8-bit RGB, or an error naming the file."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

#: All formats that are opened, whatever a file is called: their decoders run inside this process.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
MAX_PIXELS = 100_000_000  # of an image, unless XMASK_MAX_PIXELS (--max-pixels) says otherwise

#: What Pillow raises on a file that is not an image, is cut short, or is damaged.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError,
           OverflowError, struct.error, zlib.error, RuntimeError, MemoryError)

_NO_IMAGE = ("cannot be read as an image ({}). The file is cut short, damaged or none of "
             f"{', '.join(FORMATS)}: convert, copy or download it again.")
_ORIENTATION = 0x0112  # EXIF tag "Orientation"


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as it lies in its file.

    rgb: (H, W, 3) uint8 as stored, not turned.
    orientation: the EXIF value, 1 to 8; 1 is upright.
    mode: the colour mode of the file in Pillow's words ("RGB", "L", "CMYK", ...).
    """

    rgb: np.ndarray
    orientation: int
    mode: str


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Grey is copied to three channels; 16-bit grey keeps its high byte (65535 becomes 255);
    palettes are looked up; transparent parts are laid over white; CMYK is converted by
    Pillow's formula, without colour profiles. Of an animation, the first frame is read.

    Raises FileNotFoundError if there is no such file, ValueError if it is cut short, damaged,
    no image, or holds numbers without a natural 8-bit range (32-bit or floating point).
    """
    image = decode(path)
    return np.ascontiguousarray(upright(image.rgb, image.orientation))


def check_header(path: str | os.PathLike) -> None:
    """Raises as `read_image` does where a file does not begin as an image; reads no more of it."""
    with _opened(path):
        pass


def decode(path: str | os.PathLike) -> Decoded:
    """Read an image file as stored, with its EXIF orientation; errors as in `read_image`."""
    path = Path(path)
    with _opened(path) as image:
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        rgb, mode = _to_rgb(image, path), image.mode
    return Decoded(rgb, orientation if orientation in range(1, 9) else 1, mode)


@contextmanager
def _opened(path: str | os.PathLike, wrong: str = _NO_IMAGE) -> Iterator[Image.Image]:
    """An image of one of `FORMATS`, not decoded yet; _Unusable if it has too many pixels.

    Whatever Pillow raises here or within is a ValueError that names the file; wrong: what it says,
    with {} for Pillow's words.
    """
    limit = max_pixels()
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise _Unusable(f"{path}: is a folder or a device, no image. Move it elsewhere.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; errors are raised
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit is our own
            try:
                image = Image.open(path, formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = before
            with image:
                if image.width * image.height > limit:
                    raise _Unusable(
                        f"{path}: {image.width} x {image.height} px, more than the {limit:,} "
                        "allowed. Make it smaller or cut it in parts, or allow more with "
                        "--max-pixels.")
                yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image. Check the path.") from None
    except (_Unusable, PermissionError):
        raise
    except _BROKEN as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: {wrong.format(said)}") from None


def max_pixels() -> int:
    """How many pixels an image may have: XMASK_MAX_PIXELS where it is set, else `MAX_PIXELS`.

    An environment variable, because the processes that make masks side by side inherit it.
    """
    text = os.environ.get("XMASK_MAX_PIXELS", str(MAX_PIXELS))
    if not text.isdecimal() or not int(text):
        raise ValueError(f"XMASK_MAX_PIXELS (--max-pixels): {text!r} is no number of pixels")
    return int(text)


def is_image(path: Path) -> bool:
    """Whether this is an image file by its suffix; hidden ones, as macOS makes them, are not."""
    return (path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file())


def conversion(mode: str) -> str:
    """What making RGB of an image in another of Pillow's colour modes is called in records."""
    if mode.startswith("I"):
        return "16_bit_grey"
    return {"1": "grey", "L": "grey", "LA": "grey", "P": "palette"}.get(mode, mode.lower())


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(H, W) as stored, from the head of the file, without decoding it."""
    with _opened(path) as image:
        return image.height, image.width


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an (H, W, ...) array as EXIF orientation 1 to 8 asks; 5 to 8 swap H and W."""
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    return turns[orientation](array)


def resize_image(rgb: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample an (H, W, 3) uint8 image to `shape` = (H', W') with the LANCZOS filter."""
    height, width = shape
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def resize_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample an (H, W) label map to `shape` by nearest pixel centre: labels never blend."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(shape, labels.shape))
    return labels[np.ix_(rows, columns)]


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Read a label map, a grey PNG of 8 or 16 bits, as (H, W) int32; ValueError otherwise."""
    with _opened(path, "cannot be read as a label map ({}). Delete it and make it again.") as image:
        image.load()
        mode, labels = image.mode, np.array(image)
    if mode not in ("L", "I", "I;16", "I;16B"):
        raise ValueError(f"{path}: a label map is a grey PNG of 8 or 16 bits, found colour mode "
                         f"{mode!r}. Delete it and make it again.")
    return labels.astype(np.int32)


class _Unusable(ValueError):
    """The file is whole, but too large, or its numbers have no natural 8-bit range."""


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise _Unusable(
                f"{path}: grey values from {values.min()} to {values.max()} have no natural "
                "8-bit range. Convert the file to 8 or 16 bits.")
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise _Unusable(f"{path}: floating-point pixels have no natural 8-bit range. "
                                "Convert the file to 8 or 16 bits.")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(ground, layer).convert("RGB"))
    return np.array(image.convert("RGB"))
