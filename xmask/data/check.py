"""Is a data set whole and sound? Every file is opened and every finding becomes a table row."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

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
from xmask.data.readers import CrowdDataset, expected_images, read_marker

COLUMNS = ["split", "item", "found", "expected", "status", "remedy"]

#: A head further outside than this is more than an annotator's slip at the border: in
#: ShanghaiTech A, whose coordinates run to W and H, none is further out than 1 pixel (ours).
FAR_OUTSIDE = 1.0
#: What the reader handles by itself, never a fault: (a sample's repair, its row, what is done).
HANDLED = (
    ("empty", "images without heads", "read as an image with no points"),
    ("grey", "greyscale images", "read as RGB"),
    ("cmyk", "CMYK images", "read as RGB"),
    ("exif_rotated", "images turned by EXIF", "turned upright when read"),
    ("exif_ignored", "images not turned despite EXIF",
     "read as stored: only so do the points fit"),
    ("clipped", "points outside", "moved to the border when read"),
    ("outside", "images with points outside", "points moved to the border when read"),
    ("duplicates", "duplicate points", "kept: each is a head"),
)


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
    """Every pair is read as for training; the sample's `repairs` say what was done for that."""
    dataset = CrowdDataset("", split, layout, listing, listing.pairs,
                           generator={} if drawn else None, max_side=None)
    seen: Counter[str] = Counter()
    bad: dict[str, list] = {"images": [], "annotations": [], "masks": []}
    far: list[Path] = []
    for i, name in enumerate(tqdm(dataset.ids, desc=f"checking {split}", unit="image",
                                  disable=not progress)):
        kind = "annotations"
        try:
            points, _ = layout.read(dataset.annotation_path(i))
            seen["heads"] += len(points)
            seen["empty"] += len(points) == 0
            kind = "images"
            sample = dataset[i]
        except (OSError, ValueError) as error:
            mask = str(mask_path(layout, listing, name)) in str(error)
            bad["masks" if mask else kind].append(str(error))
            continue
        seen.update(sample.repairs)
        seen["outside"] += "clipped" in sample.repairs
        limit = np.array([sample.shape[1] - 1, sample.shape[0] - 1])
        if (np.abs(points - points.clip(0, limit)) > FAR_OUTSIDE).any():
            far.append(dataset.image_path(i))
    seen["grey"] += seen["16_bit_grey"]

    again = _again(layout, drawn)
    expected_heads = None if drawn else (layout.heads or {}).get(split)
    heads_differ = expected_heads not in (None, seen["heads"])
    return [
        *(_faults(split, f"unreadable {what}", faults, again) for what, faults in bad.items()),
        (split, "heads", seen["heads"], expected_heads, "warning" if heads_differ else "ok",
         f"Not the annotations results are compared on. {again}" if heads_differ else ""),
        *((split, item, seen[repair], None, "ok", handled if seen[repair] else "")
          for repair, item, handled in HANDLED),
        _faults(split, f"images with points over {FAR_OUTSIDE:g} px outside", far,
                "Does the annotation belong to the image?", status="warning"),
    ]


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
