"""Heads, count and masks of one's own photo: load a trained model, call it on an image.

`load()` gives the small model that comes with the package. It was trained on synthetic crowds
only (`.record` says on which, how and from which start): it shows what the method does, and its
counts on photographs are not to be relied on. `load(path)` takes a model trained by `xmask train`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xmask import decode, files, model, tiling
from xmask.study import evaluate
from xmask import config as configuration
from xmask.data.images import read_image, resize_image, resize_labels

BUNDLED = Path(__file__).parent / "weights" / "xmask-slim.safetensors"
MIN_SIDE = 8  # px: an image less wide or high than two output cells holds no head (ours)


class Predictor:
    """A trained network on a device. Make one with `load`, call `predict` as often as wanted.

    network: the `xmask.model.XMask`, in evaluation mode. config: the `xmask.config.Config` it was
    trained with. record: what it is, JSON-ready (see `load`). decoding: the thresholds used,
    `config.evaluation` unless changed.
    """

    def __init__(self, network: nn.Module, config: configuration.Config, record: dict):
        self.network, self.config, self.record = network, config, record
        self.decoding = config.evaluation

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def predict(self, image: np.ndarray | str | os.PathLike, *, max_side: int | None = None,
                tile: int = tiling.TILE, name: str = "image") -> decode.Prediction:
        """Points, scores and label map of one image, at its own size, whatever that is.

        image: (H, W, 3) uint8 RGB, or the path of an image file (read upright and as 8-bit RGB,
            see `xmask.data.images.read_image`).
        max_side: px; a larger image is computed at this longer side, and points and masks are
            brought back to its own size. None: never. Heads should look about as large as in the
            training images, and those of a close-up do not.
        tile: px, a multiple of 32, side of the pieces in which large images are computed; it
            changes memory, not the result.
        name: what errors call an array.
        Returns a `Prediction`; its `count` is the number of heads.
        Raises FileNotFoundError or ValueError, naming the file, for what is no such image.
        """
        if isinstance(image, (str, os.PathLike)):
            name = str(image)
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"{name}: {width} x {height} px; the smaller side must have at least "
                             f"{MIN_SIDE} px to hold a head")
        check_side(max_side)
        if max_side is not None and max_side < max(height, width):
            scale = max_side / max(height, width)
            small = max(round(height * scale), 1), max(round(width * scale), 1)
            found = self.predict(resize_image(pixels, small), tile=tile, name=f"{name}, resized")
            return _enlarged(found, (height, width))
        logits, embedding = self.maps(pixels, tile=tile)
        return tiling.decode_maps(logits, embedding, pixels.shape[:2], self.decoding, tile=tile)

    def maps(self, image: np.ndarray | str | os.PathLike, *, tile: int = tiling.TILE
             ) -> tuple[Tensor, Tensor]:
        """What the network says before decoding: logits (h, w) and embedding (D, h, w), float32,
        one cell for 4 x 4 px; they cover the image padded to a multiple of 32 px."""
        if tile < model.MULTIPLE or tile % model.MULTIPLE:
            raise ValueError(f"tile: {tile} is not a positive multiple of {model.MULTIPLE} px")
        return tiling.network_maps(self.network, _pixels(image), tile=tile)

    def __repr__(self) -> str:
        r = self.record
        return (f"<xmask.Predictor {r['backbone']} ({r['initialisation']} start), trained on "
                f"{r['trained_on']['text']}, sha256 {r['sha256'][:12]}, on {self.device}>")


def load(weights: str | os.PathLike | None = None, device: str | torch.device | None = None
         ) -> Predictor:
    """A model ready to predict.

    weights: None for the small model of the package; a file made by `xmask export`; or a run
        folder (`results/<profile>/runs/<run>`), finished or still training.
    device: "cpu", "cuda", ...; None takes CUDA where there is one.
    The record of the result: `file`, `sha256` (of the weights), `backbone`, `initialisation`,
    `trained_on` (`dataset`, `synthetic`, `labelled` images, `unlabelled` images, `text`), `run`,
    `selection`, `epochs`, `versions`.
    Raises FileNotFoundError or ValueError, naming file and remedy.
    """
    device = _device(device)
    path = Path(weights) if weights is not None else BUNDLED
    if path.is_dir() or path.name == "checkpoint.pt":
        folder = path if path.is_dir() else path.parent
        network, config, record = _read_run(folder)
    else:
        network, config, metadata = evaluate.load(path)
        if "record" not in metadata:
            raise ValueError(f"{path}: does not say what it was trained on. Export it from its "
                             "run folder (`xmask export RUN_FOLDER --out FILE`), or give the "
                             "run folder itself.")
        record = json.loads(metadata["record"])
    record = {"file": path.name, "sha256": _weights_digest(network)} | record
    return Predictor(network.to(device).eval(), config, record)


def check_side(max_side: int | None) -> None:
    """Raises ValueError for a longer side, px, that is too short to hold a head; None is fine."""
    if max_side is not None and max_side < model.MULTIPLE:
        raise ValueError(f"max_side (--max-side): {max_side} px; give at least {model.MULTIPLE}, "
                         "or leave it out for full size")


def export(run: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the model of a run folder as one safetensors file that `load` takes.

    The teacher's weights, as evaluation uses them; configuration and record go into the file's
    metadata. Raises FileNotFoundError or ValueError for a folder that is no run.
    """
    network, config, record = _read_run(Path(run))
    state = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    with files.replacing(out) as temporary:
        save_file(state, temporary, metadata={
            "config": json.dumps(config.to_dict()), "backbone": record["initialisation"],
            "record": json.dumps(record)})
    return Path(out)


def _read_run(folder: Path) -> tuple[nn.Module, configuration.Config, dict[str, Any]]:
    """Network with the teacher's weights, configuration and record of a run folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, so nothing says what this model is. Give a run "
                                "folder (results/<profile>/runs/<run>) as `xmask train` makes it.")
    run = files.read_json(file)
    try:
        config = configuration.from_dict(run["config"])
        data, selection = run["data"], run["selection"]
        record = {
            "backbone": run["backbone"]["name"],
            "initialisation": run["backbone"]["initialisation"],
            "trained_on": _trained_on(run, data),
            "run": folder.resolve().name,
            "profile": run["profile"],
            "selection": selection,
            "versions": run["versions"],
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: field {error} is missing or not as this version of xmask "
                         "writes it. Train the run again.") from error
    finished, halfway = folder / "model.safetensors", folder / "checkpoint.pt"
    if finished.is_file():
        network = evaluate.load(finished)[0]
        return network, config, record | {"epochs": config.schedule.phase3}
    if not halfway.is_file():
        raise FileNotFoundError(f"{finished}: missing, and no checkpoint.pt beside it (models are "
                                "not committed). Train the run: `xmask train --help`.")
    network = model.XMask(config.network)
    try:
        state = torch.load(halfway, map_location="cpu", weights_only=True)
        network.load_state_dict(state["teacher"])
    except Exception as error:  # torch raises many types here, none of them helpful alone
        raise ValueError(f"{halfway}: not a checkpoint of this run ({type(error).__name__}: "
                         f"{error}). Delete it and train again.") from error
    return network, config, record | {"epochs": state["epoch"]}


def _trained_on(run: dict, data: dict) -> dict[str, Any]:
    synthetic, labelled = bool(run["synthetic"]), len(data["labelled"])
    kind = "synthetic crowds" if synthetic else "photographs"
    rest = f" and {data['unlabelled']} unlabelled" if data["unlabelled"] else ""
    return {"dataset": run["dataset"], "synthetic": synthetic, "labelled": labelled,
            "unlabelled": data["unlabelled"],
            "text": f"{kind} ({labelled} labelled{rest} images, layout {run['dataset']})"}


def _enlarged(found: decode.Prediction, shape: tuple[int, int]) -> decode.Prediction:
    """A prediction on a resized image, in the pixels of the image of `shape` (H, W)."""
    # pixel centres: position p of n pixels is (p + 0.5) * N / n - 0.5 of N
    factor = np.array(shape[::-1]) / found.instances.shape[::-1]
    points = np.clip((found.points + 0.5) * factor - 0.5, 0, np.array(shape[::-1]) - 1)
    return decode.Prediction(points.astype(np.float32), found.scores,
                             resize_labels(found.instances, shape))


def _weights_digest(network: nn.Module) -> str:
    """sha256 over names and values: of the model, not of the file it came in."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r} is unknown; give cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device: {device!r} is not supported; give cpu or cuda")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device: no Apple GPU is there; give cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(f"device: {device!r} is not there; there are "
                         f"{torch.cuda.device_count()}, counted from 0")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device is there (or this torch was built without CUDA); "
                         "give cpu")
    return chosen


def _pixels(image: np.ndarray | str | os.PathLike) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB or the path of an image file, found "
                         f"shape {pixels.shape} of {pixels.dtype}")
    return pixels
