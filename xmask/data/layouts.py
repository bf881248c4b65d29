"""Where each data set keeps its files, and how many images it has when it is whole (section 7)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xmask.data.annotations import Annotation, read_jhu, read_qnrf, read_shanghaitech

#: Marks a drawn data set and holds the settings of its generator.
MARKER = "synthetic.json"


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    folders: names its own folder goes by; the first one is shown in messages.
    not_folders: beginnings of folder names that are surely another data set.
    splits: split name -> folder in it. images, annotations, masks: folders within a split
    (for annotations, the spellings in use). image, annotation: file name patterns, whose first
    group is the image's id, and the second one its number. mask: the label map's file name.
    official: number of images per split as published by its makers. heads: number of annotated
    heads per split, where it could be confirmed by counting the distributed files.
    max_side: the usual limit of the longer side in pixels, None for full size.
    """

    title: str
    folders: tuple[str, ...]
    splits: dict[str, str]
    images: str
    annotations: tuple[str, ...]
    masks: str
    image: str
    annotation: str
    mask: str
    read: Callable[[str | os.PathLike], Annotation]
    official: dict[str, int]
    source: str
    not_folders: tuple[str, ...] = ()
    heads: dict[str, int] | None = None
    max_side: int | None = None

    def describe(self) -> str:
        """The expected files, for messages."""
        image, annotation = (re.sub(r"[()]", "", pattern).replace(r"\d+", "<n>")
                             for pattern in (self.image, self.annotation))
        splits = ",".join(self.splits.values())
        return (f"{self.folders[0]}/{{{splits}}}/{{{PurePosixPath(self.images, image)}, "
                f"{PurePosixPath(self.annotations[0], annotation)}}}").replace("\\", "")


_SHANGHAITECH = {
    "splits": {"train": "train_data", "test": "test_data"},
    "images": "images", "annotations": ("ground-truth", "ground_truth"), "masks": "instances",
    "image": r"(IMG_(\d+))\.jpg", "annotation": r"GT_(IMG_\d+)\.mat", "mask": "{}.png",
    "read": read_shanghaitech, "source": "github.com/desenzhou/ShanghaiTechDataset"}

#: Image counts: the makers' papers. Heads of ShanghaiTech A: counted in the distributed files.
#: Longer sides: the usual preprocessing of the field.
LAYOUTS: dict[str, Layout] = {
    "sha": Layout(
        "ShanghaiTech A", ("part_A", "part_A_final"), official={"train": 300, "test": 182},
        heads={"train": 162413, "test": 78862}, not_folders=("part_b",), **_SHANGHAITECH),
    "shb": Layout(
        "ShanghaiTech B", ("part_B", "part_B_final"), official={"train": 400, "test": 316},
        not_folders=("part_a",), **_SHANGHAITECH),
    "qnrf": Layout(
        "UCF-QNRF", ("UCF-QNRF_ECCV18", "UCF-QNRF"), {"train": "Train", "test": "Test"},
        images="", annotations=("",), masks="",
        image=r"(img_(\d+))\.jpg", annotation=r"(img_\d+)_ann\.mat", mask="{}_instances.png",
        read=read_qnrf, official={"train": 1201, "test": 334},
        source="www.crcv.ucf.edu/data/ucf-qnrf", max_side=1920),
    "jhu": Layout(
        "JHU-CROWD++", ("jhu_crowd_v2.0",), {"train": "train", "val": "val", "test": "test"},
        images="images", annotations=("gt",), masks="instances",
        image=r"((\d+))\.jpg", annotation=r"(\d+)\.txt", mask="{}.png",
        read=read_jhu, official={"train": 2272, "val": 500, "test": 1600},
        source="www.crowd-counting.com", max_side=2048),
}


def layout_of(name: str) -> Layout:
    """The layout of data set `name`; a drawn set named "synthetic" looks like ShanghaiTech A."""
    if name == "synthetic":
        return LAYOUTS["sha"]
    if name not in LAYOUTS:
        raise ValueError(f"no data set {name!r}; known: {', '.join(LAYOUTS)}, synthetic.")
    return LAYOUTS[name]


def find_folder(layout: Layout, root: str | os.PathLike) -> Path | None:
    """The data set's own folder: `root` itself, or one at most two levels below it.

    Returns None if there is none; raises ValueError if there are several to choose from, or if
    `root` is the folder of another data set with the same layout.
    """
    root = Path(root)

    def fits(folder: Path) -> bool:
        return any((folder / split).is_dir() for split in layout.splits.values())

    if fits(root):
        name = root.resolve().name
        if name.lower().startswith(layout.not_folders or ("\0",)):
            raise ValueError(f"{root}: this is {name}, not {layout.title}. "
                             f"Give the folder {layout.folders[0]}, or name the other data set.")
        return root
    below = [root / name for name in layout.folders]
    below += [path for name in layout.folders for path in sorted(root.glob(f"*/{name}"))]
    found = [folder for folder in below if fits(folder)]
    if len(found) > 1:
        raise ValueError(f"{root}: {len(found)} folders look like {layout.title}: "
                         f"{', '.join(map(str, found))}. Give the one to use.")
    return found[0] if found else None


def no_folder(layout: Layout, root: str | os.PathLike) -> FileNotFoundError:
    """The error of a data set that is not there: what was looked for, and where to put it."""
    state = "holds no such folder" if Path(root).is_dir() else "does not exist"
    return FileNotFoundError(
        f"{layout.title} not found: {root} {state}. Looked for {layout.describe()} at {root}, in "
        f"it and one level below. Get the data from {layout.source} and unpack it to "
        f"{Path(root) / layout.folders[0]}, or give the folder that holds it.")


@dataclass(frozen=True)
class Listing:
    """The files of one split: image id -> path, images in numeric order."""

    folder: Path
    images: dict[str, Path]
    annotations: dict[str, Path]

    @property
    def without_annotation(self) -> list[Path]:
        return [path for name, path in self.images.items() if name not in self.annotations]

    @property
    def without_image(self) -> list[Path]:
        return [path for name, path in self.annotations.items() if name not in self.images]

    @property
    def pairs(self) -> list[str]:
        """Ids that have both files, in numeric order."""
        return [name for name in self.images if name in self.annotations]


def list_split(layout: Layout, folder: Path, split: str) -> Listing:
    """List the files of `split` in the data set `folder`; nothing is opened.

    Raises ValueError for a split the data set does not have, FileNotFoundError if its folder is
    not there.
    """
    if split not in layout.splits:
        raise ValueError(f"{layout.title} has no split {split!r}; "
                         f"it has: {', '.join(layout.splits)}.")
    place = folder / layout.splits[split]
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place}: the folder of the {split} split is missing. Looked for "
            f"{layout.describe()}. Download {layout.title} again from {layout.source}.")
    annotations = next((place / name for name in layout.annotations if (place / name).is_dir()),
                       place / layout.annotations[0])
    return Listing(place, _matching(place / layout.images, layout.image),
                   _matching(annotations, layout.annotation))


def mask_path(layout: Layout, listing: Listing, name: str) -> Path:
    """Where the true label map of image `name` lies, if the data set has masks."""
    return listing.folder / layout.masks / layout.mask.format(name)


def number_of(name: str) -> int:
    """The image number in an id: 12 for "IMG_12", 1 for "img_0001" and for "0001"."""
    return int(name.rsplit("_", 1)[-1])


def _matching(folder: Path, pattern: str) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(pattern, path.name, flags=re.IGNORECASE)
        if match:
            found[match.group(1)] = path
    return {name: found[name] for name in sorted(found, key=lambda n: (number_of(n), n))}
