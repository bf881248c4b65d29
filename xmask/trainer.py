"""Three-phase mean teacher (paper section on training): points, masks, points under masks.

The loop is plain: an epoch is `steps_per_epoch` steps, a step is one batch of labelled crops and,
once their weight is above zero, one of unlabelled crops whose labels the teacher makes. A
checkpoint holds everything, crops are a function of their index, so a run that was killed goes
on exactly as if it had not been.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from xmask import decode, files, losses, model, nnec
from xmask.config import Config, Schedule
from xmask.data.sample import Sample
from xmask.data.transforms import Batch, Crops, collate
from xmask.provenance import digest


def learning_rates(config: Config, phase: int) -> dict[str, float]:
    """Parts of the network that learn in a phase, and how fast; the others stay as they are.

    The encoder is frozen in phase 2, as in the paper, unless `phase2_encoder_lr` says otherwise.
    """
    o = config.optimisation
    if phase == 1:
        return {"encoder": o.encoder_lr, "fusion": o.lr, "decoder": o.lr}
    if phase == 3:
        return {"fusion": o.phase3_lr, "decoder": o.phase3_lr}
    rates = {"mask_head": o.mask_head_lr, "fusion": o.phase2_lr, "decoder": o.phase2_lr}
    return rates | ({"encoder": o.phase2_encoder_lr} if o.phase2_encoder_lr else {})


def phase_of(schedule: Schedule, epoch: int) -> int:
    """Phase 1, 2 or 3 of an epoch counted from 0."""
    return 1 if epoch < schedule.phase1 else 2 if epoch < schedule.phase2 else 3


def unlabelled_weight(schedule: Schedule, epoch: int) -> float:
    """Weight w of the unlabelled loss; total = (labelled + w * unlabelled) / (1 + w).

    It grows by `ramp` an epoch up to `ramp_end`: from 0 after `warmup` epochs of phase 1 and
    `mask_warmup` of phase 2 (that it starts anew there is our reading), from `ramp_start` in
    phase 3.
    """
    if not schedule.unlabelled:
        return 0.0
    phase = phase_of(schedule, epoch)
    begin = {1: 0, 2: schedule.phase1, 3: schedule.phase2}[phase]
    if phase == 3:
        weight = schedule.ramp_start + schedule.ramp * (epoch - begin)
    else:
        wait = schedule.warmup if phase == 1 else schedule.mask_warmup
        weight = schedule.ramp * (epoch - begin - wait)
    return min(max(weight, 0.0), schedule.ramp_end)


class Trainer:
    """Trains one configuration into `folder`.

    labelled: samples whose `instances` are the masks of EDP-SAM. unlabelled: the other training
    images (their points and masks, if any, are never read). fingerprint: identifies data and
    code; a checkpoint of another one is not resumed. cache: folder in which runs share what is
    the same in all of them, and a fingerprint of the data and code that phase 1 depends on: the
    end of the warm-up, with or without unlabelled images after it, and the end of phase 1,
    whatever the masks and phases 2 and 3. score: returns a number to minimise for a network,
    called every `checkpoint_every` epochs of phase 3 (configuration "best-on-test").
    """

    def __init__(
        self,
        config: Config,
        labelled: Sequence[Sample],
        unlabelled: Sequence[Sample],
        folder: Path,
        *,
        device: torch.device,
        fingerprint: str = "",
        cache: tuple[Path, str] | None = None,
        score: Callable[[nn.Module], float] | None = None,
        progress: bool = True,
    ):
        if len(labelled) == 0:
            raise ValueError("no labelled image: training needs at least one")
        self.config, self.device, self.folder = config, device, Path(folder)
        self.score, self.progress = score, progress
        torch.manual_seed(config.seed)
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # 5% of a small step
        self.student, self.initialisation = model.build(config.network)
        self.student.to(device, memory_format=torch.channels_last)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.optimiser: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler(enabled=self._amp == torch.float16)
        self.epoch, self.history = 0, []
        self.best: tuple[float, dict] | None = None

        o = config.optimisation
        crops = {"size": o.crop, "scale": (o.scale_min, o.scale_max), "seed": config.seed,
                 "augmentation": config.augmentation}
        self.labelled = Crops(labelled, **crops, strong=False)
        self.unlabelled = Crops(unlabelled, **crops, strong=True) if len(unlabelled) else None
        s = config.schedule
        self.steps = s.steps_per_epoch or -(-len(labelled) // o.batch)
        self.fingerprint = digest(config.to_dict(), fingerprint, device.type, self.initialisation)
        self.shared: dict[int, Path] = {}  # epoch -> file of the state after so many epochs
        if cache:
            place, inputs = cache
            for epoch, part in ((s.warmup, _warmup_part), (s.phase1, _phase1_part)):
                if 0 < epoch <= s.phase1:
                    key = digest(part(config), inputs, device.type, self.initialisation)
                    self.shared[epoch] = place / f"{key[:16]}.pt"

    @property
    def _amp(self) -> torch.dtype | None:
        """Mixed precision on CUDA: bfloat16 where the device has it, else float16."""
        if self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    # -- the loop ---------------------------------------------------------------------------

    def fit(self) -> nn.Module:
        """Train to the end, resuming where a checkpoint stands; return the teacher.

        Writes history.csv and model.safetensors into the folder. Ctrl-C loses at most
        `checkpoint_every` epochs. Raises RuntimeError, naming what to lower, when the device is
        out of memory, and FloatingPointError when the loss is no longer finite.
        """
        s = self.config.schedule
        self._resume()
        batches = self._batches(self.epoch)
        bar = tqdm(total=s.phase3, initial=self.epoch, unit="epoch", disable=not self.progress,
                   desc=self.config.run, mininterval=1.0)
        while self.epoch < s.phase3:
            phase = phase_of(s, self.epoch)
            if self.optimiser is None:
                self._enter(phase)
            self._set_rate(phase)
            weight = unlabelled_weight(s, self.epoch) if self.unlabelled else 0.0
            rows = [self._step(phase, weight, batches) for _ in range(self.steps)]
            row = pd.DataFrame(rows).mean().to_dict()
            self.history.append(
                {"step": (self.epoch + 1) * self.steps, "epoch": self.epoch, "phase": phase}
                | row | {"weight": weight}
            )
            self.epoch += 1
            if phase == 3 and self.score and (
                self.epoch % self.config.machine.checkpoint_every == 0 or self.epoch == s.phase3
            ):
                value = self.score(self.teacher)
                if self.best is None or value < self.best[0]:
                    self.best = value, copy.deepcopy(self.teacher.state_dict())
            ends_phase = self.epoch in (s.phase1, s.phase2, s.phase3)
            if ends_phase:
                self.optimiser = None
            if ends_phase or self.epoch % self.config.machine.checkpoint_every == 0:
                self._save(self.folder / "checkpoint.pt", self.fingerprint)
                self._write_history()
            if (shared := self.shared.get(self.epoch)) and not shared.exists():
                self._save(shared, shared.stem)
            bar.set_postfix(phase=phase, loss=f"{row['loss']:.4f}", refresh=False)
            bar.update()
        bar.close()
        if self.best is not None:
            self.teacher.load_state_dict(self.best[1])
        self._write_history()
        with files.replacing(self.folder / "model.safetensors") as temporary:
            state = {k: v.contiguous().cpu() for k, v in self.teacher.state_dict().items()}
            save_file(state, temporary, metadata={"config": json.dumps(self.config.to_dict()),
                                                  "backbone": self.initialisation})
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return self.teacher

    def _batches(self, epoch: int):
        """Endless (labelled, unlabelled or None) batches from an epoch on."""
        s, o, m = self.config.schedule, self.config.optimisation, self.config.machine
        epochs = range(epoch, s.phase3)
        weighted = [e for e in epochs if self.unlabelled and unlabelled_weight(s, e) > 0]

        def loader(crops: Crops | None, wanted: Sequence[int]):
            per_epoch = self.steps * o.batch
            indices = [i for e in wanted for i in range(e * per_epoch, (e + 1) * per_epoch)]
            if not indices:
                return iter(())
            return iter(DataLoader(crops, o.batch, sampler=indices, num_workers=m.workers,
                                   collate_fn=collate, pin_memory=self.device.type == "cuda",
                                   persistent_workers=m.workers > 0))

        labelled, unlabelled = loader(self.labelled, epochs), loader(self.unlabelled, weighted)
        wanted = set(weighted)
        for e in epochs:
            for _ in range(self.steps):
                yield next(labelled), next(unlabelled) if e in wanted else None

    def _step(self, phase: int, weight: float, batches) -> dict[str, float]:
        labelled, unlabelled = next(batches)
        try:
            return self._update(phase, weight, labelled, unlabelled)
        except torch.cuda.OutOfMemoryError as error:
            o = self.config.optimisation
            raise RuntimeError(
                f"{self.config.run}: out of GPU memory in epoch {self.epoch}; lower "
                f"optimisation.batch (now {o.batch}) or optimisation.crop (now {o.crop})"
            ) from error

    def _update(
        self, phase: int, weight: float, labelled: Batch, unlabelled: Batch | None
    ) -> dict[str, float]:
        labelled = labelled.to(self.device)
        images = labelled.images
        if unlabelled is not None:
            unlabelled = unlabelled.to(self.device)
            images = torch.cat([images, unlabelled.strong])
        with torch.autocast(self.device.type, self._amp, enabled=self._amp is not None):
            output = self.student(_channels_last(images), masks=phase == 2)
        logits, embedding = output.logits.float(), output.embedding
        n = len(labelled.images)

        terms = self._labelled_terms(phase, logits[:n], embedding, labelled)
        loss = own = sum(terms.values())
        other = torch.zeros((), device=self.device)
        if unlabelled is not None:
            with torch.no_grad(), torch.autocast(
                self.device.type, self._amp, enabled=self._amp is not None
            ):
                seen = self.teacher(_channels_last(unlabelled.images), masks=phase > 1)
            theirs = self._unlabelled_terms(
                phase, logits[n:], None if embedding is None else embedding[n:],
                seen.logits.float(), seen.embedding, unlabelled,
            )
            other = sum(theirs.values())
            loss = (own + weight * other) / (1 + weight)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{self.config.run}: the loss is {loss.item()} in epoch {self.epoch} "
                f"(phase {phase}); lower the learning rate of that phase"
            )
        self._learn(loss)
        row = {"loss": loss, "labelled": own, "unlabelled": other} | terms
        return {name: float(value.detach()) for name, value in row.items()}

    def _learn(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.optimisation.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        keep = self.config.optimisation.ema
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                                 1 - keep)
            # buffers too: with frozen BatchNorm statistics the teacher would stay untrained
            for mine, yours in zip(self.teacher.buffers(), self.student.buffers()):
                if mine.is_floating_point():
                    mine.lerp_(yours, 1 - keep)
                else:
                    mine.copy_(yours)

    # -- what is learnt ---------------------------------------------------------------------

    def _labelled_terms(
        self, phase: int, logits: Tensor, embedding: Tensor | None, batch: Batch
    ) -> dict[str, Tensor]:
        instances = None if phase == 1 else torch.stack(batch.instances)
        if phase == 2:
            points, _ = self._points(logits, 0.5)
            terms = self._mask_terms(embedding, logits, points, instances, None)
            if weight := self.config.loss.phase2_p2r:
                terms["p2r"] = weight * self._p2r(logits, batch.points)
            return terms
        terms = {"p2r": self._p2r(logits, batch.points)}
        if phase == 3:
            terms["constraint"] = self._constraint(logits, instances, None)
        return terms

    def _unlabelled_terms(
        self,
        phase: int,
        logits: Tensor,
        embedding: Tensor | None,
        teacher_logits: Tensor,
        teacher_embedding: Tensor | None,
        batch: Batch,
    ) -> dict[str, Tensor]:
        c, o = self.config.loss, self.config.optimisation
        terms = {}
        if phase != 2:
            half = model.STRIDE // 2
            visible = batch.visible[:, half :: model.STRIDE, half :: model.STRIDE].float()
            points, _ = self._points(teacher_logits, o.pseudo_threshold)
            terms["p2r"] = self._p2r(logits, points, visible)
        if phase == 1:
            return terms

        shape = batch.images.shape[-2:]
        points, scores = self._points(teacher_logits, self.config.pseudo.point_threshold)
        instances = self._pseudo_masks(teacher_logits, teacher_embedding, points, shape)
        sure = [s > o.confident for s in scores]
        confident = [p[s] for p, s in zip(points, sure)]
        if phase == 2:
            doubtful = _discs([p[~s] for p, s in zip(points, sure)], c.ignore_radius, shape)
            return self._mask_terms(embedding, logits, confident, instances,
                                    doubtful | ~batch.visible)
        terms["constraint"] = self._constraint(logits, instances, confident)
        return terms

    def _mask_terms(self, embedding, logits, points, instances, ignored) -> dict[str, Tensor]:
        c = self.config.loss
        terms = {
            "exclusivity": losses.exclusivity_losses(
                embedding, points, instances, tau=c.tau, margin=c.margin,
                push_margins=c.push_margins, sigma=c.sigma, ignore=ignored, nnec=c.nnec,
                differentiable_centers=c.differentiable_centers,
            ).mean()
        }
        if c.point_mask:
            terms["consistency"] = c.point_mask * losses.point_mask_consistencies(
                logits, instances, stride=model.STRIDE, ignore=ignored
            ).mean()
        return terms

    def _constraint(self, logits: Tensor, instances: Tensor, confident) -> Tensor:
        c = self.config.loss
        return losses.mask_constraints(
            logits, instances, confident, stride=model.STRIDE,
            background=c.background, foreground=c.foreground, one_point=c.one_point,
        ).mean()

    def _p2r(self, logits: Tensor, points, weight: Tensor | None = None) -> Tensor:
        c = self.config.loss
        return losses.p2r_losses(logits, points, model.STRIDE, max_distance=c.max_distance,
                                 min_radius=c.min_radius, distance_cost=c.distance_cost,
                                 empty_weight=c.empty_weight, weight=weight).mean()

    def _points(self, logits: Tensor, threshold: float) -> tuple[list[Tensor], list[Tensor]]:
        found = [decode.points_from_logits(one, stride=model.STRIDE, threshold=threshold)
                 for one in logits.detach()]
        return [points for points, _ in found], [scores for _, scores in found]

    def _pseudo_masks(self, logits, embedding, points, shape) -> Tensor:
        p = self.config.pseudo
        density = None
        if p.density_gate:
            density = decode.upsample(torch.sigmoid(logits)[:, None], tuple(shape))[:, 0]
        return decode.instance_maps(embedding, points, stride=model.STRIDE, shape=tuple(shape),
                                    threshold=p.theta, geometry_weight=p.geometry_weight,
                                    sigma=p.sigma, density=density)

    # -- state ------------------------------------------------------------------------------

    def _enter(self, phase: int) -> None:
        """Free the parts that learn in this phase, freeze the others, start its optimiser."""
        rates, groups = learning_rates(self.config, phase), []
        for name, part in self.student.named_children():
            part.requires_grad_(name in rates).train(name in rates)
            if name in rates:
                lr = rates[name]
                groups.append({"params": list(part.parameters()), "lr": lr, "initial_lr": lr})
        self.optimiser = torch.optim.Adam(
            groups, weight_decay=self.config.optimisation.weight_decay, fused=True)

    def _set_rate(self, phase: int) -> None:
        """Constant rates (paper), or a half cosine to zero over each phase."""
        if not self.config.optimisation.cosine:
            return
        s = self.config.schedule
        begin, end = {1: (0, s.phase1), 2: (s.phase1, s.phase2), 3: (s.phase2, s.phase3)}[phase]
        share = 0.5 * (1 + math.cos(math.pi * (self.epoch - begin) / (end - begin)))
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * share

    def _save(self, path: Path, fingerprint: str) -> None:
        state = {
            "fingerprint": fingerprint,
            "epoch": self.epoch,
            "history": self.history,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimiser": self.optimiser.state_dict() if self.optimiser else None,
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }
        with files.replacing(path) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        """Take up the run's own checkpoint, else the latest shared state, else start anew."""
        shared = [(path, path.stem) for _, path in sorted(self.shared.items(), reverse=True)]
        for path, fingerprint in [(self.folder / "checkpoint.pt", self.fingerprint), *shared]:
            if not path.is_file():
                continue
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["fingerprint"] != fingerprint:
                continue  # made by other code, data or configuration: not this run
            self.student.load_state_dict(state["student"])
            self.teacher.load_state_dict(state["teacher"])
            self.epoch, self.history = state["epoch"], state["history"]
            self.scaler.load_state_dict(state["scaler"])
            self.best = state["best"]
            if state["optimiser"] is not None:
                self._enter(phase_of(self.config.schedule, self.epoch))
                self.optimiser.load_state_dict(state["optimiser"])
            return

    def _write_history(self) -> None:
        columns = ["step", "epoch", "phase", "loss", "labelled", "unlabelled", "weight", "p2r",
                   "exclusivity", "constraint", "consistency"]
        table = pd.DataFrame(self.history, columns=columns)
        with files.replacing(self.folder / "history.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _discs(points: list[Tensor], radius: float, shape: tuple[int, int]) -> Tensor:
    """(B, H, W) bool: pixels within `radius` px of any point of their image."""
    height, width = shape
    stacked, image, _ = decode.stack_points(points, points[0].device)
    radii = torch.full((len(stacked),), radius, device=stacked.device)
    head, row, column = nnec.incidence_rows(stacked, radii, shape)
    covered = torch.zeros(len(points), height, width, dtype=torch.bool, device=stacked.device)
    covered[image[head], row, column] = True
    return covered


def _warmup_part(config: Config) -> dict:
    """The fields that the epochs before any unlabelled image depend on."""
    values = _phase1_part(config)
    for name in ("unlabelled", "ramp", "ramp_end"):
        del values["schedule"][name]
    del values["optimisation"]["pseudo_threshold"]
    return values


def _phase1_part(config: Config) -> dict:
    """The fields that phase 1 depends on."""
    values = config.to_dict()
    for name in ("variant", "selection", "masks", "pseudo", "evaluation"):
        del values[name]
    values["loss"] = {k: values["loss"][k]
                      for k in ("max_distance", "min_radius", "distance_cost", "empty_weight")}
    for name in ("phase2", "phase3", "ramp_start", "mask_warmup"):
        del values["schedule"][name]
    for name in ("phase2_lr", "phase2_encoder_lr", "mask_head_lr", "phase3_lr", "confident"):
        del values["optimisation"][name]
    del values["machine"]["checkpoint_every"], values["machine"]["cache_images"]
    del values["machine"]["workers"]
    return values

