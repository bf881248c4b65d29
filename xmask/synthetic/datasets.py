"""Whole datasets of drawn scenes, in the layouts of the public ones, with label maps beside."""

from __future__ import annotations

import io
import math
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.io import savemat
from tqdm.auto import tqdm

from xmask import files
from xmask.data.layouts import LAYOUTS, MARKER
from xmask.data.sample import Sample
from xmask.synthetic.drawing import draw
from xmask.synthetic.scene import CHARACTERS, Character, plan_scenery

GENERATOR = "xmask.synthetic"
VERSION = 3  # of the drawing; a new number marks old pictures as made by other code
PORTRAIT = 0.15  # share of a dataset's pictures that are higher than wide
JPEG_QUALITY = 92
# the name of an image by its number, and of its annotation by its name
NAMES = {"sha": ("IMG_{}", "GT_{}.mat"), "qnrf": ("img_{:04d}", "{}_ann.mat"),
         "jhu": ("{:04d}", "{}.txt")}


def write_dataset(layout: str, root: str | os.PathLike, *, train: int, test: int, seed: int,
                  jobs: int = 1, progress: bool = True) -> Path:
    """Draw a dataset of `train` + `test` images in the layout of a real one; return its folder.

    layout: `sha`, `qnrf` or `jhu` (which also gets ceil(test / 2) images of a `val` split). root:
    the folder that shall hold `ShanghaiTech/part_A`, `UCF-QNRF_ECCV18` or `jhu_crowd_v2.0`.
    jobs: processes that draw; the files do not depend on it. A script that sets jobs above 1
    needs the usual `if __name__ == "__main__":`, because processes are spawned.

    Beside every image lies its true label map, a 16-bit PNG. `synthetic.json`, written last,
    marks a whole dataset and holds the settings. Images that are already there are kept, so an
    interrupted call can be repeated. Each image carries its settings as a JPEG comment.

    Raises ValueError for an unknown layout or numbers that make no sense, and if the folder
    holds images or annotations that this call would not write: nothing is ever overwritten.
    """
    if layout not in CHARACTERS:
        raise ValueError(f"layout: {layout!r} is unknown; choose from {sorted(CHARACTERS)}")
    for name, number, least in (("train", train, 1), ("test", test, 1), ("seed", seed, 0),
                                ("jobs", jobs, 1)):
        if number < least:
            raise ValueError(f"{name}: {number} is too small; give {least} or more")
    images = {"train": train, "test": test}
    if layout == "jhu":
        images = {"train": train, "val": -(-test // 2), "test": test}
    folder = Path(root) / CHARACTERS[layout].folder
    settings = {"generator": GENERATOR, "version": VERSION, "layout": layout, "seed": seed,
                "images": images}
    marker = folder / MARKER
    if marker.exists() and (found := files.read_json(marker)) != settings:
        raise ValueError(f"{marker}: drawn with {found}, but {settings} was asked for; "
                         "delete the folder or choose another root")
    tasks = _tasks(layout, folder, images, seed)
    missing = _missing(tasks, folder)
    if missing:
        marker.unlink(missing_ok=True)
        with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else nullcontext() as pool:
            drawn = (pool.map if pool else map)(_write_image, missing)
            for _ in tqdm(drawn, desc=f"drawing {layout}", unit="image", total=len(missing),
                          disable=not progress):
                pass
    if layout == "jhu":
        _write_image_labels(tasks, folder)
    files.write_json(marker, settings)
    return folder


@dataclass(frozen=True)
class Task:
    """One image to draw and the files it goes to."""

    layout: str
    name: str
    people: int
    shape: tuple[int, int]
    seeds: tuple[int, ...]
    image: Path
    mask: Path
    annotation: Path

    @property
    def scene_seed(self) -> np.random.SeedSequence:
        return np.random.SeedSequence((*self.seeds, 0))

    @property
    def comment(self) -> bytes:
        """What the image says about itself: enough to draw it again."""
        return (f"synthetic crowd, {GENERATOR} {VERSION}, {self.layout}, seed "
                f"{'-'.join(map(str, self.seeds))}, {self.people} people").encode()


def _tasks(layout: str, folder: Path, images: dict[str, int], seed: int) -> list[Task]:
    character, lies = CHARACTERS[layout], LAYOUTS[layout]
    image_name, annotation_name = NAMES[layout]
    tasks, total = [], 0
    for split_number, (split, below) in enumerate(lies.splits.items()):
        place = folder / below
        base = (seed, sorted(CHARACTERS).index(layout), split_number)
        counts = stratified_counts(np.random.SeedSequence(base), images[split], character)
        if character.giant and split == "train":
            for index in np.argsort(counts)[::-1][:min(2, images[split] // 20)].tolist():
                rng = np.random.default_rng(np.random.SeedSequence((*base, index + 1, 2)))
                counts[index] = int(rng.integers(character.counts[1], character.giant + 1))
        for index, people in enumerate(counts):
            number = index + 1
            # numbers of jhu run through all splits
            name = image_name.format(number + total * (layout == "jhu"))
            paths = (place / lies.images / f"{name}.jpg",
                     place / lies.masks / lies.mask.format(name),
                     place / lies.annotations[0] / annotation_name.format(name))
            seeds = (*base, number)
            shape = _shape(np.random.SeedSequence((*seeds, 1)), people, character)
            tasks.append(Task(layout, name, people, shape, seeds, *paths))
        total += images[split]
    return tasks


def _shape(seed: np.random.SeedSequence, people: int, character: Character) -> tuple[int, int]:
    """(H, W) of a picture of so many people: more people fill a larger one."""
    rng = np.random.default_rng(seed)
    fewest, most = character.counts
    share = min(math.log(max(people, fewest) / fewest) / math.log(most / fewest), 1.2)
    height, width = (round(low + (high - low) * (.25 * rng.random() + .75 * share))
                     for low, high in zip(*character.shapes))
    return (width, height) if rng.random() < PORTRAIT else (height, width)


def stratified_counts(seed: np.random.SeedSequence, images: int, character: Character
                      ) -> list[int]:
    """People per image: log-uniform over the range, one image per equal part of it, shuffled.

    The share `character.empty` of the images, rounded (at least one of 8 or more), is empty.
    """
    rng = np.random.default_rng(seed)
    empty = round(character.empty * images)
    if character.empty and images >= 8:
        empty = max(empty, 1)
    low, high = (math.log(count) for count in character.counts)
    parts = (np.arange(images - empty) + rng.random(images - empty)) / max(images - empty, 1)
    counts = np.rint(np.exp(low + (high - low) * parts)).astype(int)
    return rng.permutation(np.r_[counts, np.zeros(empty, int)]).tolist()


def _missing(tasks: list[Task], folder: Path) -> list[Task]:
    """Tasks still to do; ValueError if there are images that none of the tasks would draw."""
    expected = {task.image: task.comment for task in tasks}
    places = {task.image.parent for task in tasks}  # `rglob` does not look into linked folders
    for path in sorted({*folder.rglob("*.jpg"), *chain(*(one.glob("*.jpg") for one in places))}):
        if path.name.startswith("."):
            continue
        try:
            with Image.open(path) as picture:
                found = picture.info.get("comment")
        except (UnidentifiedImageError, FileNotFoundError):  # the latter: a link to nowhere
            found = None
        if found is None or found != expected.get(path):
            said = found.decode(errors="replace") if found else "no comment of this generator"
            raise ValueError(f"{path}: this image was not drawn by these settings (it says: "
                             f"{said}); choose another root, or delete it if it is not needed")
    return [task for task in tasks
            if not (task.image.exists() and task.mask.exists() and task.annotation.exists())]


def _write_image(task: Task) -> None:
    """Draw one image and write its files, the image last: where it is, the rest is too."""
    sample, facts = draw(task.scene_seed, task.shape, task.people, CHARACTERS[task.layout],
                          task.name)
    mask = io.BytesIO()
    Image.fromarray(sample.instances.astype(np.uint16)).save(mask, "PNG")
    _write(task.mask, mask.getvalue())
    if task.layout == "sha":
        cell = np.empty((1, 1), object)
        cell[0, 0] = {"location": sample.points.astype(np.float64),
                      "number": np.array([[task.people]], np.uint16)}
        _write_mat(task.annotation, {"image_info": cell})
    elif task.layout == "qnrf":
        _write_mat(task.annotation, {"annPoints": sample.points.astype(np.float64)})
    else:
        _write_jhu(task.annotation, sample, facts)
    with files.replacing(task.image) as temporary:
        Image.fromarray(sample.image).save(
            temporary, "JPEG", quality=JPEG_QUALITY, comment=task.comment)


def _write_mat(path: Path, content: dict) -> None:
    """Write a .mat without the date that scipy puts into the first 116 bytes."""
    buffer = io.BytesIO()
    savemat(buffer, content)
    _write(path, b"MATLAB 5.0 MAT-file, drawn by xmask".ljust(116) + buffer.getvalue()[116:])


def _write(path: Path, content: bytes) -> None:
    """Write a file that is not there; one that is there has to be the same."""
    if not os.path.lexists(path):
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)
    elif not path.is_file() or path.read_bytes() != content:
        raise ValueError(f"{path}: was not drawn by these settings, and stays as it is; choose "
                         "another root, or delete it if it is not needed")


def _write_jhu(path: Path, sample: Sample, facts: dict) -> None:
    """Lines `x y w h occlusion blur` as JHU-CROWD++ has them: whole pixels; occlusion 1 visible,
    2 partly hidden, 3 mostly hidden; blur 1 for a blurred head."""
    level = np.digitize(-facts["visible"], [-.9, -.5]) + 1
    rows = [f"{x:.0f} {y:.0f} {w:.0f} {h:.0f} {occlusion} {int(facts['blurred'])}\n"
            for (x, y), (w, h), occlusion in zip(sample.points, sample.boxes, level)]
    _write(path, "".join(rows).encode())


def _write_image_labels(tasks: list[Task], folder: Path) -> None:
    """`image_labels.txt` of each split: `0001,count,scene,weather,distractor` a line.

    Weather: 0 clear, 1 fog, 2 rain, 3 snow; distractor: 1 for a picture without people.
    """
    rows: dict[str, list[str]] = {split: [] for split in LAYOUTS["jhu"].splits}
    for task in tasks:
        scene = plan_scenery(np.random.default_rng(task.scene_seed), task.shape, task.people,
                               CHARACTERS["jhu"])
        rows[task.image.parent.parent.name].append(
            f"{task.name},{task.people},{scene.kind},{scene.weather},{int(task.people == 0)}\n")
    for split, lines in rows.items():
        _write(folder / split / "image_labels.txt", "".join(lines).encode())
