"""Is a data set whole and sound? Every file is opened and every finding becomes a table row."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

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
)
from xmask.data.readers import expected_images, read_marker, read_true_masks, turns_upright

COLUMNS = ["split", "item", "found", "expected", "status", "remedy"]

#: A head further outside than this is more than an annotator's slip at the border: in
#: ShanghaiTech A, whose coordinates run to W and H, none is further out than 1 pixel (ours).
FAR_OUTSIDE = 1.0


def check_dataset(
    name: str, root: str | os.PathLike, *, progress: bool = True,
) -> pd.DataFrame:
    """Check a data set file by file, decoding every image, and report; nothing is changed.

    name, root: as in `open_dataset`. A broken data set is reported, never raised; only an
    unknown `name` raises ValueError. A drawn set that is not there yet is not drawn.

    Returns a table with one row per finding: split; item; found and expected (counts, expected
    is <NA> where no number is known); status: "ok", "warning" (usable, but look at it) or
    "error" (`open_dataset` or reading fails, or the data are not the published ones); remedy:
    what to do, or what the reader does about it by itself.
    """
    layout = layout_of(name)
    rows: list[tuple] = []
    try:
        folder = find_folder(layout, root)
        if folder is None:
            raise no_folder(layout, root)
        generator = read_marker(folder)
        if name == "synthetic" and generator is None:
            raise ValueError(f"{folder}: has no {MARKER}, so it is not a (fully) drawn data set.")
    except (FileNotFoundError, ValueError) as error:
        rows.append(("", "data set folder", 0, 1, "error", str(error)))
        return _table(rows)
    drawn = generator is not None
    for split in layout.splits:
        expected = expected_images(layout, generator, split)
        if drawn and not (folder / layout.splits[split]).is_dir() and not expected:
            continue  # drawn without this split
        try:
            listing = list_split(layout, folder, split)
        except FileNotFoundError as error:
            rows.append((split, "split folder", 0, 1, "error", str(error)))
            continue
        rows += _file_rows(layout, listing, split, expected, drawn)
        rows += _content_rows(layout, listing, split, drawn, progress)
    return _table(rows)


def _table(rows: list[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"found": "Int64", "expected": "Int64"})


def _again(layout: Layout, drawn: bool) -> str:
    if drawn:
        return "Delete the drawn data set and draw it again."
    return f"Download {layout.title} again from {layout.source}."


def _file_rows(
    layout: Layout, listing: Listing, split: str, expected: int | None, drawn: bool,
) -> list[tuple]:
    again = _again(layout, drawn)
    rows = []
    for item, found in (("images", len(listing.images)), ("annotations", len(listing.annotations))):
        remedy = ""
        if found == 0 or (expected is not None and found < expected):
            remedy = again
        elif expected is not None and found > expected:
            remedy = "Remove the files that do not belong to the data set."
        rows.append((split, item, found, expected, "error" if remedy else "ok", remedy))
    for item, paths in (("images without annotation", listing.without_annotation),
                        ("annotations without image", listing.without_image)):
        rows.append(_faults(split, item, paths, again))
    return rows


def _content_rows(
    layout: Layout, listing: Listing, split: str, drawn: bool, progress: bool,
) -> list[tuple]:
    bad_images: list[str] = []
    bad_annotations: list[str] = []
    bad_masks: list[str] = []
    far: list[Path] = []
    seen: Counter[str] = Counter()
    names = list(dict.fromkeys([*listing.images, *listing.annotations]))
    for name in tqdm(names, desc=f"checking {split}", unit="image", disable=not progress):
        points = image = None
        if name in listing.annotations:
            try:
                points, _ = layout.read(listing.annotations[name])
                seen["heads"] += len(points)
                seen["empty"] += len(points) == 0
            except (OSError, ValueError) as error:
                bad_annotations.append(str(error))
        if name in listing.images:
            try:
                image = images.decode(listing.images[name])
                seen["grey"] += image.mode in ("1", "L", "LA") or image.mode.startswith("I")
                seen["cmyk"] += image.mode == "CMYK"
            except (OSError, ValueError) as error:
                bad_images.append(str(error))
        if points is None or image is None:
            continue
        turn = turns_upright(points, image.rgb.shape[:2], image.orientation)
        if image.orientation != 1:
            seen["turned" if turn else "left"] += 1
        shape = images.upright(image.rgb, image.orientation if turn else 1).shape[:2]
        _, repairs = clip_points(points, shape)
        seen["outside"] += repairs.get("clipped", 0)
        seen["images outside"] += "clipped" in repairs
        seen["duplicates"] += repairs.get("duplicates", 0)
        limit = np.array([shape[1] - 1, shape[0] - 1])
        if ((points < -FAR_OUTSIDE) | (points > limit + FAR_OUTSIDE)).any():
            far.append(listing.images[name])
        masks = mask_path(layout, listing, name)
        if drawn or masks.exists():
            try:
                read_true_masks(masks, shape, len(points))
            except (OSError, ValueError) as error:
                bad_masks.append(str(error))

    again = _again(layout, drawn)
    expected_heads = None if drawn else (layout.heads or {}).get(split)
    heads_differ = expected_heads not in (None, seen["heads"])
    return [
        _faults(split, "unreadable images", bad_images, again),
        _faults(split, "unreadable annotations", bad_annotations, again),
        _faults(split, "unreadable masks", bad_masks, again),
        (split, "heads", seen["heads"], expected_heads, "warning" if heads_differ else "ok",
         f"Not the annotations results are compared on. {again}" if heads_differ else ""),
        _note(split, "images without heads", seen["empty"], "read as an image with no points"),
        _note(split, "greyscale images", seen["grey"], "read as RGB"),
        _note(split, "CMYK images", seen["cmyk"], "read as RGB"),
        _note(split, "images turned by EXIF", seen["turned"], "turned upright when read"),
        _note(split, "images not turned despite EXIF", seen["left"],
              "read as stored: only so do the points fit"),
        _note(split, "points outside", seen["outside"], "moved to the border when read"),
        _note(split, "images with points outside", seen["images outside"],
              "points moved to the border when read"),
        _faults(split, f"images with points over {FAR_OUTSIDE:g} px outside", far,
                "Does the annotation belong to the image?", status="warning"),
        _note(split, "duplicate points", seen["duplicates"], "kept: each is a head"),
    ]


def _note(split: str, item: str, found: int, handled: str) -> tuple:
    """A row about what the reader handles by itself: never a fault."""
    return (split, item, found, None, "ok", handled if found else "")


def _faults(
    split: str, item: str, faults: list, remedy: str, *, status: str = "error",
) -> tuple:
    """A row about things that should not be: none expected; each is named on its own line."""
    if not faults:
        return (split, item, 0, 0, "ok", "")
    named = [one.name if isinstance(one, Path) else one for one in faults]
    return (split, item, len(faults), 0, status, "\n".join([remedy, *named]))


def as_text(table: pd.DataFrame, width: int = 120) -> str:
    """The report for a terminal: a line per finding, below it what to do and every file, none
    longer than `width` characters."""
    lines = []
    for row in table.itertuples():
        number = "" if pd.isna(row.expected) else f" of {row.expected}"
        title = f"{row.status:8}{row.split} {row.item}: {row.found}{number}"
        if row.status == "ok" and row.remedy:
            title += f" ({row.remedy})"
        lines.append(title)
        if row.status != "ok":
            for line in row.remedy.splitlines():
                lines += textwrap.wrap(line, width, initial_indent=" " * 8,
                                       subsequent_indent=" " * 12)
    return "\n".join(lines)
