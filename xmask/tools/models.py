"""What a model file is, how it is read and how it is written; `xmask.load` and `xmask export`.

A model file is a safetensors file whose metadata say, as JSON, the configuration (`config`), how
the encoder started (`backbone`, text), and, for a file on its own, what the model is (`record`,
see `load`). In a run folder (`results/<profile>/runs/<run>`) the record is made from
`config.json`, and while a run is still training its checkpoint holds the weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import xmask
from xmask import calibration, files, memory, model
from xmask import config as configuration
from xmask.data.layouts import LAYOUTS
from xmask.predict import Predictor

_log = logging.getLogger("xmask")
_FOLDER = Path(xmask.__file__).parent / "weights"
BUNDLED = {name: _FOLDER / f"xmask-{name}.safetensors" for name in ("photo", "drawn")}


def load(weights: str | os.PathLike | None = None, device: str | torch.device | None = None
         ) -> Predictor:
    """A model ready to predict.

    weights: None or "photo" for the package's model of photographs; "drawn" for its one of drawn
        crowds; a file made by `xmask export`; or a run folder (`results/<profile>/runs/<run>`),
        finished or still training. One that keeps a finished model while it trains anew
        (`earlier-1`) gives that one; its checkpoint.pt, the one that is still training.
    device: "cpu", "cuda", ...; None takes CUDA where there is one.
    The record of the result: `file`, `sha256` (of the weights), `backbone`, `initialisation`,
    `trained_on` (`dataset`, `synthetic`, `labelled` images, `unlabelled` images, `text`), `run`,
    `selection`, `epochs`, `calibration`, `measured` (errors on test images), `versions`.
    On Linux, this process keeps freed memory from now on (`xmask.memory.keep`), as all predictions
    are faster for it. Raises FileNotFoundError or ValueError, naming file and remedy.
    """
    memory.keep()
    device = _device(device)
    weights = "photo" if weights is None else weights
    path = BUNDLED.get(os.fspath(weights)) or Path(weights)
    if path.is_dir() or path.name == "checkpoint.pt":
        network, config, record = _read_run(_finished(path) if path.is_dir() else path.parent)
    else:
        network, config, metadata = load_network(path)
        record = _record(metadata, path)
    record |= {"file": path.name, "sha256": _weights_digest(network)}
    return Predictor(network.to(device).eval(), config, record,
                     calibration.from_dict(record.get("calibration")))


def load_network(path: str | os.PathLike
                 ) -> tuple[nn.Module, configuration.Config, dict[str, str]]:
    """A trained network in evaluation mode, its configuration and its safetensors metadata.

    Raises FileNotFoundError, or ValueError that names the file for whatever is not a model of
    this package: other content, other tensors than its configuration asks for (compared before
    anything of their size is made), weights that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model. Check the path; `xmask train` makes a "
                                "run folder with a model, `xmask export` one file of it.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        values = json.loads(metadata["config"])
        if not isinstance(values, dict):
            raise ValueError(f"metadata config: a {type(values).__name__}, expected an object")
        config = configuration.from_dict(values)
        with torch.device("meta"):  # takes no memory, whatever the configuration says
            empty = model.XMask(config.network).state_dict()
        wanted = {name: tuple(value.shape) for name, value in empty.items()}
        other = sorted(name for name in found.keys() | wanted.keys()
                       if found.get(name) != wanted.get(name))
        if other:
            raise ValueError(f"tensor {other[0]}: {found.get(other[0], 'missing')}, its "
                             f"configuration asks for {wanted.get(other[0], 'none')}")
        network, state = model.XMask(config.network), load_file(path)
        network.load_state_dict(state)
    except Exception as error:  # damaged files raise many types in safetensors, json and torch
        raise ValueError(
            f"{path}: not a model of this version of xmask ({type(error).__name__}: {error}). "
            "Give a run folder or a file made by `xmask export`, or train it again."
        ) from error
    _check_finite(state, path)
    return network.eval(), config, metadata


def export(run: str | os.PathLike, out: str | os.PathLike, *, half: bool = False) -> Path:
    """Write the model of a run folder as one safetensors file that `load` takes.

    The weights that evaluation uses (`evaluation.weights`); configuration and record go into the
    file's metadata. half: in 16 bits, half the size; they are computed with in 32 all the same.
    Raises FileNotFoundError or ValueError for a folder that is no run.
    """
    network, config, record = _read_run(_finished(Path(run)))
    state = network.state_dict()
    if half:
        state = {name: value.half() if value.is_floating_point() else value
                 for name, value in state.items()}
    files.write_safetensors(out, state, {
        "config": json.dumps(config.to_dict()), "backbone": record["initialisation"],
        "record": json.dumps(record)})
    return Path(out)


def check_apart(run: str | os.PathLike, out: str | os.PathLike) -> None:
    """Raises ValueError where a file made from a model would lie in its run folder, or be it."""
    source = BUNDLED.get(os.fspath(run)) or Path(run)
    if source.name == "checkpoint.pt":
        source = source.parent
    if Path(out).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out}: belongs to the model that is exported, which stays as it is. "
                         "Give a name elsewhere (--out)")


def _finished(folder: Path) -> Path:
    """A run folder, or, while it is trained anew, the last finished model that it keeps."""
    earlier = [one for one in folder.glob("earlier-*") if all(
        (one / name).is_file() for name in ("config.json", "model.safetensors"))]
    if (folder / "model.safetensors").is_file() or not earlier:
        return folder
    last = max(earlier, key=lambda one: (len(one.name), one.name))
    _log.warning("%s: its new training is not finished, so this is the model in %s. Finish it, or "
                 "give its checkpoint.pt for the new one as it is", folder, last.name)
    return last


def _read_run(folder: Path) -> tuple[nn.Module, configuration.Config, dict[str, Any]]:
    """Network with the weights that evaluation uses, configuration and record of a run folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, so nothing says what this model is. Give a run "
                                "folder (results/<profile>/runs/<run>) as `xmask train` makes it.")
    try:
        run = files.read_json(file)
        config = configuration.from_dict(run["config"])
        record = {
            "backbone": run["backbone"]["name"],
            "initialisation": run["backbone"]["initialisation"],
            "trained_on": _trained_on(run), "run": folder.resolve().name,
            "profile": run["profile"], "selection": run["selection"],
            "calibration": run.get("calibration"), "measured": measured(folder),
            "versions": run["versions"]}
        calibration.from_dict(record["calibration"])
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing. Train the run again.") from error
    except Exception as error:  # anything may stand there
        raise ValueError(f"{file}: not as this version of xmask writes it "
                         f"({type(error).__name__}: {error}). Train the run again.") from error
    finished, halfway = folder / "model.safetensors", folder / "checkpoint.pt"
    if finished.is_file():
        network = load_network(finished)[0]
        return network, config, record | {"epochs": config.schedule.phase3}
    if not halfway.is_file():
        raise FileNotFoundError(f"{finished}: missing, and no checkpoint.pt beside it (models are "
                                "not committed). Train the run: `xmask train --help`.")
    network = model.XMask(config.network)
    try:
        state = torch.load(halfway, map_location="cpu", weights_only=True)
        network.load_state_dict(state[config.evaluation.weights])
        record |= {"epochs": int(state["epoch"])}
    except Exception as error:  # torch raises many types here, none of them helpful alone
        raise ValueError(f"{halfway}: not a checkpoint of this run ({type(error).__name__}: "
                         f"{error}). Delete it and train again.") from error
    _check_finite(network.state_dict(), halfway)
    return network, config, record


def _trained_on(run: dict) -> dict[str, Any]:
    data, synthetic = run["data"], bool(run["synthetic"])
    labelled = len(data["labelled"])
    kind = "drawn crowds" if synthetic else "photographs"
    rest = f" and {data['unlabelled']} unlabelled" if data["unlabelled"] else ""
    return {"dataset": run["dataset"], "synthetic": synthetic, "labelled": labelled,
            "unlabelled": data["unlabelled"],
            "text": f"{kind} ({labelled} labelled{rest} images, layout {run['dataset']})"}


def measured(folder: Path) -> dict[str, Any] | None:
    """What metrics.json of a run folder says of the counts, in thirds of the test images by the
    count found: `from`, `to`, `mae`, `bias` (mean of count - true count). None without one, and,
    with a warning, where it holds no images."""
    if not (folder / "metrics.json").is_file():
        return None
    found = files.read_json(folder / "metrics.json")
    if not isinstance(found, dict) or not found.get("per_image"):
        warnings.warn(f"{folder / 'metrics.json'}: field 'per_image' is missing, so the error of "
                      "this model is not known. Evaluate the run again.", stacklevel=2)
        return None
    rows = sorted(found["per_image"], key=lambda row: row["count"])
    thirds = []
    for k in range(3):
        if part := rows[len(rows) * k // 3:len(rows) * (k + 1) // 3]:
            error = np.array([row["count"] - row["true_count"] for row in part], float)
            thirds.append({"from": part[0]["count"], "to": part[-1]["count"], "images": len(part),
                           "mae": round(np.abs(error).mean().item(), 2),
                           "bias": round(error.mean().item(), 2)})
    return {"dataset": found["dataset"], "synthetic": found["synthetic"],
            "images": found["images"], **found["counting"], "interval": found.get("interval"),
            "thirds": thirds}


def reliability(record: dict[str, Any], counts: Sequence[int]) -> str:
    """What counts of a model are worth, in words: its error on the third of its test images in
    which it found about as many heads as in these, or on photos held out from what it learnt
    from. Empty without a count."""
    if not counts:
        return ""
    if record["trained_on"]["synthetic"]:
        return ("This model was trained on drawn crowds: do not rely on its counts of "
                "photographs.")
    known, typical = record.get("measured"), sorted(counts)[len(counts) // 2]
    if not known:
        error = (record.get("calibration") or {}).get("mae")
        if error is None:
            return "The error of this model was not measured: compare some counts with your own."
        return ("On dotted photos that were held out when this model learnt, its count was wrong "
                f"by {error:.0f} on average.")
    thirds = known["thirds"]
    part = next((p for p in thirds if typical <= p["to"]), thirds[-1])
    beyond = ("fewer" if typical < thirds[0]["from"] else
              "more" if typical > thirds[-1]["to"] else "")
    title = LAYOUTS[known["dataset"]].title if known["dataset"] in LAYOUTS else known["dataset"]
    return ((f"{typical} heads are {beyond} than in any of this model's test images. "
             if beyond else "") +
            f"On the {part['images']} of {known['images']} test images of {title} in which this "
            f"model finds {part['from']} to {part['to']} heads, its count is wrong by "
            f"{part['mae']:.0f} on average ({cancelled(part['bias'])}). Photographs of another "
            "kind can be far worse: see docs/model_card.md.")


def cancelled(bias: float, digits: int = 0) -> str:
    """A bias, the mean error with its sign, in words."""
    return (f"{abs(bias):.{digits}f} too {'few' if bias < 0 else 'many'} where errors up and down "
            "cancel")


def _check_finite(state: dict[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: weights {name} hold NaN or infinite values. The training "
                             "went wrong or the file is damaged: train or copy it again.")


def _record(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The record of an exported file, see `load`."""
    if "record" not in metadata:
        raise ValueError(f"{path}: does not say what it was trained on. Export it from its "
                         "run folder (`xmask export RUN_FOLDER --out FILE`), or give the "
                         "run folder itself.")
    try:
        record = json.loads(metadata["record"])
        texts = record["backbone"], record["initialisation"], record["trained_on"]["text"]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is expected in backbone, initialisation and trained_on.text")
        calibration.from_dict(record.get("calibration"))
        reliability(record, [1])
        json.dumps(record, allow_nan=False)
    except Exception as error:  # anything may stand there
        raise ValueError(f"{path}: its record is not as `xmask export` writes it "
                         f"({type(error).__name__}: {error}). Export it again.") from error
    return record


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
        torch.ones(1, device=chosen).item()  # whether it is there, and computes
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ValueError(f"device: {device!r} is unknown or not here; give cpu or cuda") from error
    return chosen
