"""Trains a run in its folder: goes on from a checkpoint, shares phase 1 with other runs.

The training itself is `xmask.trainer`; here are its files. A file that cannot be read, or holds
something else, is named, set aside as `<name>.damaged` and made again.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from xmask import files
from xmask.config import Config
from xmask.provenance import digest
from xmask.trainer import Trainer

HISTORY = ("step", "epoch", "phase", "loss", "labelled", "unlabelled", "weight", "p2r",
           "exclusivity", "constraint", "point_mask")

# The fields of the configuration that phase 1 does not read. Runs that differ in these only share
# the state at its end. A field that is not listed, so a new one too, keeps runs apart.
NOT_READ_IN_PHASE_1 = (
    "variant", "selection",
    "masks.segmenter", "masks.nnec", "masks.superpixel_prompt",
    "loss.tau", "loss.margin", "loss.push_margins", "loss.sigma", "loss.differentiable_centers",
    "loss.nnec", "loss.ignore_radius", "loss.point_mask", "loss.phase2_p2r", "loss.background",
    "loss.foreground", "loss.one_point",
    "pseudo.theta", "pseudo.geometry_weight", "pseudo.sigma",
    "pseudo.density_gate",
    "evaluation.point_threshold", "evaluation.count_threshold", "evaluation.theta",
    "evaluation.geometry_weight", "evaluation.sigma", "evaluation.density_gate",
    "evaluation.nnec", "evaluation.weights", "evaluation.scale", "evaluation.peaks",
    "schedule.phase2", "schedule.phase3", "schedule.mask_warmup", "schedule.ramp_start",
    "optimisation.phase2_lr", "optimisation.phase2_encoder_lr", "optimisation.mask_head_lr",
    "optimisation.phase3_lr", "optimisation.confident",
    "calibration.coverage", "calibration.expected",
    "machine.workers", "machine.cache_images", "machine.checkpoint_every",
)
# Nor are these before the first unlabelled crop, in the warm-up.
NOT_READ_IN_WARMUP = NOT_READ_IN_PHASE_1 + (
    "schedule.unlabelled", "schedule.ramp", "schedule.ramp_end", "optimisation.pseudo_threshold",
    "pseudo.peaks",
)


def fit(trainer: Trainer, folder: str | os.PathLike, *, fingerprint: str = "",
        shared: tuple[Path, str] | None = None, score: Callable[[nn.Module], float] | None = None,
        finish: Callable[[nn.Module], None] | None = None, progress: bool = True) -> nn.Module:
    """Train to the end and write history.csv and model.safetensors into `folder`.

    Goes on from the folder's checkpoint, else from a shared state. Ctrl-C loses at most
    `machine.checkpoint_every` epochs. Of several processes the first one reads and writes.

    fingerprint: identifies data and code; a checkpoint of another one is not resumed.
    shared: folder in which runs share what is the same in all of them, and a fingerprint of the
        data and code that phase 1 depends on: the end of the warm-up, with or without unlabelled
        images after it, and the end of phase 1, whatever the masks and phases 2 and 3.
    score: a number to minimise of a network in evaluation mode, asked for after every epoch of
        phase 3; the network with the lowest one is the result (configuration "best-on-test").
        None: the last one is.
    finish: is given the result before the checkpoint goes: what it does, a crash does not lose.
    Returns the result, `trainer.network`. Raises what `Trainer.run_epoch` raises.
    """
    folder, config, schedule = Path(folder), trainer.config, trainer.config.schedule
    leads = trainer.fabric.is_global_zero
    states = _shared_states(trainer, *shared) if shared else {}
    key = digest(config.to_dict(), fingerprint, trainer.device.type, trainer.precision,
                 trainer.initialisation)
    checkpoint = folder / "checkpoint.pt"
    best = _resume(trainer, checkpoint, key, states) if leads else None
    if trainer.fabric.world_size > 1:
        state, best = trainer.fabric.broadcast((trainer.state(), best))
        trainer.restore(state)
    with tqdm(total=schedule.phase3, initial=trainer.epoch, unit="epoch", desc=config.run,
              disable=not (progress and leads), mininterval=1.0) as bar:
        while not trainer.finished:
            row = trainer.run_epoch()
            epoch = trainer.epoch
            due = epoch % config.machine.checkpoint_every == 0 or trainer.finished
            if score and row["phase"] == 3:
                value = score(copy.deepcopy(trainer.network).eval())
                if best is None or value < best[0]:
                    best = value, copy.deepcopy(trainer.network.state_dict())
            if leads and (due or epoch in (schedule.phase1, schedule.phase2)):
                _save(checkpoint, trainer, key, best)
                _write_history(folder, trainer)
            if leads and epoch in states and not states[epoch].exists():
                _save(states[epoch], trainer, states[epoch].stem, None)
            bar.set_postfix(phase=row["phase"], loss=f"{row['loss']:.4f}", refresh=False)
            bar.update()
    if best is not None:
        trainer.network.load_state_dict(best[1])
    if not leads:
        return trainer.network
    _write_history(folder, trainer)
    files.write_safetensors(folder / "model.safetensors", trainer.network.state_dict(), {
        "config": json.dumps(config.to_dict()), "backbone": trainer.initialisation})
    if finish:
        finish(trainer.network)
    checkpoint.unlink(missing_ok=True)
    return trainer.network


def read_part(config: Config, unread: tuple[str, ...]) -> dict:
    """The configuration as a dictionary, without the fields named in `unread`."""
    values = config.to_dict()
    for name in unread:
        section, _, field = name.partition(".")
        holder, last = (values[section], field) if field else (values, section)
        del holder[last]
    return values


def _shared_states(trainer: Trainer, place: Path, inputs: str) -> dict[int, Path]:
    """Epoch -> file of the state after so many epochs, for all runs that are equal until then."""
    schedule, states = trainer.config.schedule, {}
    for epoch, unread in ((schedule.warmup, NOT_READ_IN_WARMUP),
                          (schedule.phase1, NOT_READ_IN_PHASE_1)):
        if 0 < epoch <= schedule.phase1:
            key = digest(read_part(trainer.config, unread), inputs, trainer.device.type,
                         trainer.precision, trainer.initialisation)
            states[epoch] = Path(place) / f"{key[:16]}.pt"
    return states


def _save(path: Path, trainer: Trainer, key: str, best: tuple[float, dict] | None) -> None:
    with files.replacing(path) as temporary:
        torch.save(trainer.state() | {"fingerprint": key, "best": best}, temporary)


def _resume(trainer: Trainer, checkpoint: Path, key: str, states: dict[int, Path]
            ) -> tuple[float, dict] | None:
    """Take up the run's own checkpoint, else the latest shared state, else start anew.

    Returns the best score so far and its network, None without one.
    """
    shared = [(path, path.stem) for _, path in sorted(states.items(), reverse=True)]
    if (folder := files.OutputFolder.around(checkpoint)) and not folder.is_listed(checkpoint):
        folder.make_way(checkpoint)  # the user's own file stays, and is named
    for path, wanted in [(checkpoint, key), *shared]:
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums in it
                if wrong := archive.testzip():
                    raise ValueError(f"{wrong} has another checksum than the file says")
            found = torch.load(path, map_location="cpu", weights_only=True)
            if found["fingerprint"] != wanted:
                if path == checkpoint:  # made by other code, data or configuration
                    continue
                raise ValueError("it holds the state of another training")
            best = found["best"]
            if best is not None:
                copy.deepcopy(trainer.network).load_state_dict(best[1])
            trainer.restore(found)
            return best
        except (OSError, MemoryError):  # the file may be whole: it could not be read now
            raise
        except Exception as error:  # noqa: BLE001 a damaged file makes its reader raise anything
            _set_aside(path, error)
    return None


def _set_aside(path: Path, error: Exception) -> None:
    damaged, number = path.with_name(f"{path.name}.damaged"), 1
    while damaged.exists():
        damaged, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    try:
        path.rename(damaged)
    except FileNotFoundError:  # another run that shares it was faster
        pass
    warnings.warn(
        f"{path}: damaged ({type(error).__name__}: {error}); set aside as {damaged.name}, and "
        "what it held is trained again", stacklevel=4)


def _write_history(folder: Path, trainer: Trainer) -> None:
    table = pd.DataFrame(trainer.history, columns=list(HISTORY))
    files.write_text(folder / "history.csv", table.to_csv(index=False, float_format="%.6g"))
