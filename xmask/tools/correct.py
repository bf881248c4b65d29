"""Correcting single masks by hand: drop, redraw as a disc, or prompt again (ours).

A correction is data: a list of edits per image, applied in order to the automatic label map.
Both the edits and the corrected map are saved in `corrected/` beside the automatic masks, which
stay as they are. `Corrector` is the tool for a notebook; everything below it works without one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from xmask import files, nnec, provenance
from xmask.data.images import read_labels
from xmask.data.masks import read_masks
from xmask.edp_sam import keep_connected, point_prompts
from xmask.segmenters import Prompts, Segmenter

ACTIONS = ("drop", "disc", "prompt")
PATIENCE = 5.0  # seconds to wait for another tool that is saving


def apply(labels: np.ndarray, points: np.ndarray, edits: list[dict[str, Any]],
          image: np.ndarray | None = None, segmenter: Segmenter | None = None) -> np.ndarray:
    """The label map after the edits: (H, W) int32; `labels` itself is left alone.

    labels: (H, W) int, 0 background, k the mask of points[k - 1]. An edit is a dictionary with
    "head" (k) and "action": "drop" (the mask becomes background), "disc" (with "radius", px) or
    "prompt" (with "box", [x0, y0, x1, y1] px; needs image and segmenter). New masks stay within
    the head's exclusion circle and in one piece, and take from another head only pixels that
    are nearer to this one; what others keep stays in one piece, too.
    Raises ValueError for an edit that cannot be, and for a prompt that finds nothing.
    """
    labels = np.array(labels, dtype=np.int32)
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    radii = nnec.exclusion_radii(points, labels.shape)
    for edit in edits:
        _check(edit, len(points))
        k = edit["head"]
        labels[labels == k] = 0
        if edit["action"] == "drop":
            continue
        centre, circle = points[k - 1:k], radii[k - 1:k]
        if edit["action"] == "disc":
            _, pixel = nnec.incidence(centre, np.minimum(circle, edit["radius"]), labels.shape)
        else:
            if image is None or segmenter is None:
                raise ValueError("edit: 'prompt' needs the image and a segmenter")
            pixel = _prompted(image, points, radii, k, np.array(edit["box"], float), segmenter)
        owner = labels.ravel()[pixel]
        y, x = np.divmod(pixel, labels.shape[1])
        away = (x - centre[0, 0]) ** 2 + (y - centre[0, 1]) ** 2
        other = points[np.maximum(owner, 1) - 1]
        nearer = away < (x - other[:, 0]) ** 2 + (y - other[:, 1]) ** 2
        taken = pixel[(owner == 0) | nearer]
        if edit["action"] == "prompt" and not len(taken):
            raise ValueError(f"edit: box {list(edit['box'])} of head {k}: the segmenter finds no "
                             "mask there; try another box, or 'disc', or 'drop' if that is meant")
        labels.ravel()[taken] = k
        labels = keep_connected(labels, points)
    return labels


def _prompted(image: np.ndarray, points: np.ndarray, radii: np.ndarray, k: int,
              box: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """Pixels (flat) of the segmenter's mask for a box around head k."""
    size = np.sqrt(np.maximum(box[2] - box[0], 1) * np.maximum(box[3] - box[1], 1)) / 2
    every = point_prompts(points, radii, np.full(len(points), size))
    prompt = Prompts(every.points[k - 1:k], every.labels[k - 1:k], box[None], multimask=False,
                     sizes=np.array([size]))
    head, pixel = nnec.incidence(points[k - 1:k], radii[k - 1:k], image.shape[:2])
    segmenter.set_image(image)
    logits, _ = segmenter.predict(prompt, head, pixel)
    return pixel[logits[0] > 0]


def _check(edit: dict[str, Any], heads: int) -> None:
    action, k = edit.get("action"), edit.get("head")
    if action not in ACTIONS:
        raise ValueError(f"edit: action {action!r}; expected one of {', '.join(ACTIONS)}")
    if not isinstance(k, int) or not 1 <= k <= heads:
        raise ValueError(f"edit: head {k!r} of {heads}; heads count from 1")
    if action == "disc" and not edit.get("radius", 0) > 0:
        raise ValueError(f"edit: radius {edit.get('radius')!r}; a disc needs one above 0 px")
    if action == "prompt":
        box = edit.get("box", ())
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"edit: box {list(box)}; expected [x0, y0, x1, y1] px, x0 < x1, "
                             "y0 < y1")


def save(folder: str | os.PathLike, name: str, labels: np.ndarray,
         edits: list[dict[str, Any]], *, since: list[dict[str, Any]] | None = None) -> Path:
    """Write corrected/<name>.png and .json (the edits) beside the automatic masks of `folder`.

    labels: (H, W) int label map. edits: as `apply` takes them; "segmenter" in a "prompt" says
    which one answered (its `describe()`). since: the edits that these go on from. Returns the
    path of the .png.
    Raises ValueError, writing nothing, if others than `since` are saved by now, and what
    `files.OutputFolder` does, which `corrected` is.
    """
    png = Path(folder) / "corrected" / f"{name}.png"
    with _corrections(Path(folder), name):
        if since is not None and _seal(since) != _seal(read_edits(folder, name)):
            raise ValueError(f"{name}: edited elsewhere since it was opened here, so nothing was "
                             "saved. Choose another image and this one again, or run the cell "
                             "again, to go on from those edits")
        files.write_png(png, labels.astype(np.uint16))
        files.write_json(png.with_suffix(".json"), {
            "image": name, "automatic": files.sha256(Path(folder) / f"{name}.png"),
            "edits": edits, "seal": _seal(edits, png)})
    return png


@contextmanager
def _corrections(folder: Path, name: str) -> Iterator[None]:
    """The folder of corrections, open for an image. Earlier versions kept no record: there, edits
    are known by what they say; a map that they do not seal may be a person's, and is set aside."""
    place = folder / "corrected"
    earlier = not files.read_record(place) and any(map(_noted, place.glob("*.json")))
    try:
        with files.OutputFolder(place, overwrite=earlier, wait=PATIENCE) as held:
            held.overwrite = False
            edits, png = (place / f"{name}.{kind}" for kind in ("json", "png"))
            if noted := _noted(edits):
                if png.is_file() and not held.is_listed(png):
                    if noted.get("seal") == _seal(noted["edits"], png):
                        held.note(png, files.sha256(png))
                    else:
                        held.set_aside(png, "of an earlier version, or changed")
                if not held.is_listed(edits):
                    held.note(edits, files.sha256(edits))
            yield
    except FileExistsError:
        raise FileExistsError(f"{place}: holds files of yours where corrections of {name} belong, "
                              "and nothing was saved. Move them elsewhere, then press again"
                              ) from None


def _noted(path: Path) -> dict[str, Any]:
    """What the file of an image's edits holds; {} if it is none."""
    try:
        noted = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return noted if {"image", "automatic", "edits"} <= set(noted) else {}


def _seal(edits: list[dict[str, Any]], png: Path | None = None) -> str:
    """A digest of edits and the map that they made: whether the two belong together."""
    return provenance.digest(edits, files.sha256(png) if png and png.is_file() else "")


def read_edits(folder: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """The edits of an image, [] if nobody made any.

    Raises ValueError if they were made on other automatic masks than are there now.
    """
    path = Path(folder) / "corrected" / f"{name}.json"
    if not path.is_file():
        return []
    noted = _noted(path)
    if not noted:
        raise ValueError(f"{path}: expected the edits of an image, found something else. Move it "
                         "elsewhere")
    if noted["automatic"] != files.sha256(Path(folder) / f"{name}.png"):
        raise ValueError(f"{path}: made for other automatic masks of {name} than {folder} holds "
                         "now; look at them again, or delete this file")
    edits = noted["edits"]
    if noted.get("segmenter"):  # older files name one for all prompts
        edits = [{"segmenter": noted["segmenter"], **edit} if edit["action"] == "prompt" else edit
                 for edit in edits]
    return edits


def read_corrected(folder: str | os.PathLike, name: str) -> np.ndarray:
    """The corrected label map where there is one, else the automatic one: (H, W) int32.

    Raises ValueError if the map is not the one that the edits made.
    """
    if not read_edits(folder, name):
        return read_masks(folder, name)
    png = Path(folder) / "corrected" / f"{name}.png"
    noted = _noted(png.with_suffix(".json"))
    if noted.get("seal", "") not in ("", _seal(noted["edits"], png)) or not png.is_file():
        raise ValueError(f"{png}: not the map that the edits in {name}.json made, because saving "
                         "was stopped or one of the two was changed. Any edit of this image in "
                         "notebook 14 makes the map again")
    return read_labels(png)


def close_up(image: np.ndarray, labels: np.ndarray, points: np.ndarray, k: int,
             box: list[float] | None = None) -> np.ndarray:
    """Head k and its neighbours, enlarged, with masks and a box: (420, 420, 3) uint8.

    image: (H, W, 3) uint8; labels: (H, W) label map; points: (N, 2) px; box: x0, y0, x1, y1 px.
    """
    from xmask.tools.overlay import overlay

    side, radius = 420, float(nnec.exclusion_radii(points, labels.shape)[k - 1])
    half = max(round(2.5 * radius), 12)
    x, y = np.rint(points[k - 1]).astype(int)
    pad = ((half, half), (half, half))
    window = np.s_[y:y + 2 * half + 1, x:x + 2 * half + 1]
    painted = overlay(np.pad(image, (*pad, (0, 0)))[window], np.pad(labels, pad)[window],
                      points[k - 1:k] - (x - half, y - half), opacity=0.3)
    picture = Image.fromarray(painted).resize((side, side), Image.Resampling.NEAREST)
    if box is not None:
        corners = (np.array(box).reshape(2, 2) - (x - half, y - half) + 0.5) * side / (2 * half + 1)
        ImageDraw.Draw(picture).rectangle([*corners.ravel()], outline="white", width=2)
    return np.asarray(picture)


class Corrector:
    """The tool: `Corrector(dataset, folder, segmenter)` at the end of a notebook cell shows it.

    It walks through the images, and in each through its heads, the least confident first. Every
    edit is saved at once; "Undo" takes back the last one of the image.
    """

    def __init__(self, dataset: Any, folder: str | os.PathLike, segmenter: Segmenter,
                 names: list[str] | None = None) -> None:
        import ipywidgets as w

        self.dataset, self.folder, self.segmenter = dataset, Path(folder), segmenter
        names = names or [n for n in dataset.ids if (self.folder / f"{n}.csv").is_file()]
        if not names:
            raise ValueError(f"{folder}: no masks of this dataset; run `xmask masks` first")
        self.name = w.Dropdown(options=names, description="image")
        self.rank = w.BoundedIntText(1, min=1, max=1, description="worst no.")
        self.radius = w.FloatSlider(5, min=1, max=60, step=0.5, description="disc, px")
        self.across = w.FloatRangeSlider(description="box x", step=0.5)
        self.down = w.FloatRangeSlider(description="box y", step=0.5)
        self.picture, self.status = w.Image(format="png"), w.HTML()
        self.buttons = {}
        for action, text in (("drop", "Drop"), ("disc", "Redraw as disc"),
                             ("prompt", "Prompt with box"), ("undo", "Undo")):
            self.buttons[action] = w.Button(description=text)
            self.buttons[action].on_click(lambda _, action=action: self.act(action))
        self.name.observe(lambda _: self.open(), "value")
        self.rank.observe(lambda _: self.look(), "value")
        for slider in (self.across, self.down):
            slider.observe(lambda _: self.show(), "value")
        controls = w.VBox([self.name, self.rank, self.radius, self.across, self.down,
                           w.HBox(list(self.buttons.values())), self.status])
        self.widget = w.HBox([self.picture, controls])
        self.open()

    def _repr_mimebundle_(self, **options):
        return self.widget._repr_mimebundle_(**options)

    @property
    def head(self) -> int:
        """The head that is looked at, 1 to N."""
        return int(self.order[self.rank.value - 1])

    def open(self) -> None:
        """Another image. If it cannot be read, the one before stays, and nothing can be pressed."""
        name = self.name.value
        try:
            sample = self.dataset[self.dataset.ids.index(name)]
            automatic = read_masks(self.folder, name)
            edits = read_edits(self.folder, name)
            labels = self._corrected(name, automatic, edits, sample)
            table = pd.read_csv(self.folder / f"{name}.csv", keep_default_na=False)
        except (OSError, ValueError) as error:
            for button in self.buttons.values():
                button.disabled = True
            self.status.value = f"{name} cannot be shown: {error}"
            raise
        self.opened, self.sample, self.points = name, sample, sample.points.astype(np.float64)
        self.automatic, self.edits, self.labels, self.table = automatic, edits, labels, table
        self.order = table.sort_values(["score", "head"])["head"].to_numpy()
        for button in self.buttons.values():
            button.disabled = not len(self.order)
        self.rank.max = max(len(self.order), 1)
        self.rank.value = 1
        self.look()

    def _corrected(self, name: str, automatic: np.ndarray, edits: list[dict[str, Any]],
                   sample: Any) -> np.ndarray:
        """The map that is saved, made again from the edits unless it is sure to be theirs."""
        png = self.folder / "corrected" / f"{name}.png"
        noted = _noted(png.with_suffix(".json"))
        sure = bool(noted) and noted.get("seal") == _seal(noted["edits"], png)
        others = any(edit["action"] == "prompt" and "segmenter" in edit
                     and _seal([edit["segmenter"]]) != _seal([self.segmenter.describe()])
                     for edit in edits)
        if sure or others:  # another segmenter's masks cannot be made again
            return read_corrected(self.folder, name)
        return apply(automatic, sample.points, edits, sample.image, self.segmenter)

    def look(self) -> None:
        """Another head: the box starts around its mask."""
        if not len(self.order):
            self.show()
            return
        k = self.head
        y, x = np.nonzero(self.labels == k)
        centre, reach = self.points[k - 1], 2 * float(self.table["radius"][k - 1])
        size = max(np.sqrt(max(len(x), 1) / np.pi), 1.5)
        self.radius.value = round(2 * size) / 2
        for slider, values, at in ((self.across, x, centre[0]), (self.down, y, centre[1])):
            low, high = ((values.min() - .5, values.max() + .5) if len(values)
                         else (at - size, at + size))
            with slider.hold_trait_notifications():
                slider.min, slider.max = at - max(reach, size + 2), at + max(reach, size + 2)
                slider.value = (max(low, slider.min), min(high, slider.max))
        self.show()

    def show(self) -> None:
        """Draw the head, and say what is known of it."""
        if not len(self.order):
            self.picture.value = _png(self.sample.image)
            self.status.value = f"{self.opened} has no heads"
            return
        k = self.head
        row = self.table.iloc[k - 1]
        self.picture.value = _png(close_up(
            self.sample.image, self.labels, self.points, k, self.box))
        self.status.value = (
            f"head {k} of {len(self.order)}: {row['source']}, confidence {row['score']:.2f}, "
            f"{int((self.labels == k).sum())} px {row['flags']}; {len(self.edits)} edits")

    @property
    def box(self) -> list[float]:
        (x0, x1), (y0, y1) = self.across.value, self.down.value
        return [float(v) for v in (x0, y0, x1, y1)]

    def act(self, action: str) -> None:
        """One press of a button."""
        if action == "undo":
            before, edits = self.automatic, self.edits[:-1]
            todo = edits
        else:
            extra = {"disc": {"radius": float(self.radius.value)},
                     "prompt": {"box": self.box, "segmenter": self.segmenter.describe()},
                     }.get(action, {})
            todo = [{"head": self.head, "action": action, **extra}]
            before, edits = self.labels, self.edits + todo
        try:
            labels = apply(before, self.points, todo, self.sample.image, self.segmenter)
            save(self.folder, self.opened, labels, edits, since=self.edits)
        except (OSError, ValueError) as error:
            self.status.value = str(error)
            return
        self.labels, self.edits = labels, edits
        self.show()


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()
