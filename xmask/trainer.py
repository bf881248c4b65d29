"""Three-phase mean teacher (paper section on training): points, masks, points under masks.

An epoch is one pass over all training images as unlabelled ones; a step is one batch of labelled
crops and, once their weight is above zero, one of unlabelled crops whose labels the teacher makes.
`Trainer.state` holds everything and crops are a function of their index, so a training that goes
on from a state ends exactly as if it had not been interrupted. Several processes (`torchrun`) share
each batch, and see the crops that one would see; see `xmask.processes`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xmask import decode, losses, model, nnec, processes
from xmask.config import Config, Schedule
from xmask.data.sample import Sample
from xmask.data.transforms import Batch, Crops, collate
from xmask.features import upsample

# Weights, their moving means and mean squares below these are zero (ours; see _drop_the_tiny).
_TINY = {"weight": 1e-12, "exp_avg": 1e-18, "exp_avg_sq": 1e-36}
_TIDY = 5  # every so many epochs, as it takes a tenth of a short one
OWN_POINTS = 0.5  # the student's own points: cells with a logit above 0 (paper)


def learning_rates(config: Config, phase: int) -> dict[str, float]:
    """Parts of the network that learn in a phase, and how fast; the others stay as they are.

    The encoder is frozen in phase 2, as in the paper, unless `phase2_encoder_lr` says otherwise."""
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
    `mask_warmup` of phase 2 (our reading: it starts anew), from `ramp_start` in phase 3."""
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
    """Trains the network of one configuration, epoch by epoch.

    labelled: samples whose `instances` are the masks of EDP-SAM. unlabelled: all training images,
    the labelled ones among them (their points and masks, if any, are never read).
    device: where it runs, "cpu" or "cuda". student, teacher: the two networks. epoch: epochs done.
    history: one row a done epoch, `step`, `epoch`, `phase`, `weight` and the mean of every term of
    the loss. steps: of an epoch. initialisation: how the network started. precision: Fabric's word.
    """

    def __init__(self, config: Config, labelled: Sequence[Sample], unlabelled: Sequence[Sample], *,
                 device: torch.device):
        if len(labelled) == 0:
            raise ValueError("no labelled image: training needs at least one")
        o = config.optimisation
        if o.batch % processes.count():
            raise ValueError(f"optimisation.batch: {o.batch} crops cannot be shared equally by "
                             f"{processes.count()} processes; choose a multiple of these")
        self.config, self.fabric = config, processes.open_fabric(device, config.machine.precision)
        self.device = self.fabric.device
        torch.manual_seed(config.seed)
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # 5% of a small step
        self.student, self.initialisation = model.build(config.network)
        self.student.to(self.device).to(memory_format=torch.channels_last)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        if self.fabric.world_size > 1:
            processes.join_norms(self.student)
        self.precision = self.fabric.strategy.precision.precision
        if (device.type, self.precision) == ("cpu", "bf16-mixed"):
            processes.widen_depthwise(self.student)
        self.optimiser: torch.optim.Optimizer | None = None
        self._learner: nn.Module = self.student
        # listed once: to look through all modules in every step takes a twentieth of it
        self._theirs: list[Tensor] = list(self.teacher.parameters())
        self._ours: list[Tensor] = list(self.student.parameters())
        self._buffers = list(zip(self.teacher.buffers(), self.student.buffers()))
        self.epoch, self.history = 0, []

        crops = {"size": o.crop, "scale": (o.scale_min, o.scale_max), "seed": config.seed,
                 "augmentation": config.augmentation}
        self.labelled = Crops(labelled, **crops, strong=False)
        self.unlabelled = Crops(unlabelled, **crops, strong=True) if len(unlabelled) else None
        whole_pass = -(-(len(unlabelled) or len(labelled)) // o.batch)
        self.steps = config.schedule.steps_per_epoch or whole_pass
        self._batches: Iterator[tuple[Batch, Batch | None]] | None = None

    @property
    def finished(self) -> bool:
        """Whether the last epoch of phase 3 is done."""
        return self.epoch >= self.config.schedule.phase3

    @property
    def network(self) -> nn.Module:
        """Student or teacher, whichever is the result (`evaluation.weights`)."""
        return self.student if self.config.evaluation.weights == "student" else self.teacher

    def run_epoch(self) -> dict[str, float]:
        """Train for one epoch; return its row of the history.

        An exception in the middle, Ctrl-C too, leaves half an epoch done: go on from a `state`.
        Raises RuntimeError, naming what to lower, when the device is out of memory, and, in all
        processes, FloatingPointError when the loss of one is no longer finite."""
        s = self.config.schedule
        phase, weight = phase_of(s, self.epoch), self._weight(self.epoch)
        if self.optimiser is None:
            self._enter(phase)
        self._set_rates(phase)
        if self._batches is None:
            self._batches = self._draw(self.epoch)
        try:
            rows = [self._step(phase, weight, *next(self._batches)) for _ in range(self.steps)]
        except torch.cuda.OutOfMemoryError as error:
            o = self.config.optimisation
            raise RuntimeError(
                f"{self.config.run}: out of GPU memory in epoch {self.epoch}; lower optimisation."
                f"batch (now {o.batch}) or optimisation.crop (now {o.crop})") from error
        if self.epoch % _TIDY == 0:
            self._drop_the_tiny()
        row = {"step": (self.epoch + 1) * self.steps, "epoch": self.epoch, "phase": phase}
        row |= {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
        self.history.append(row | {"weight": weight})
        self.epoch += 1
        if self.epoch in (s.phase1, s.phase2, s.phase3):
            self.optimiser = None  # the next phase starts its own
        return self.history[-1]

    def _weight(self, epoch: int) -> float:
        return unlabelled_weight(self.config.schedule, epoch) if self.unlabelled else 0.0

    def _draw(self, epoch: int) -> Iterator[tuple[Batch, Batch | None]]:
        """(labelled, unlabelled or None) batches of all steps from an epoch on; of several
        processes each takes its part of every batch."""
        o, m = self.config.optimisation, self.config.machine
        share = o.batch // self.fabric.world_size
        first = self.fabric.global_rank * share
        epochs = range(epoch, self.config.schedule.phase3)
        weighted = [e for e in epochs if self._weight(e) > 0]

        def loader(crops: Crops | None, wanted: Sequence[int]):
            if not wanted:
                return iter(())
            begin = ((e * self.steps + s) * o.batch + first for e in wanted
                     for s in range(self.steps))
            indices = chain.from_iterable(range(b, b + share) for b in begin)
            return iter(DataLoader(crops, share, sampler=indices, num_workers=m.workers,
                                   collate_fn=collate, pin_memory=self.device.type == "cuda",
                                   persistent_workers=m.workers > 0))

        labelled, unlabelled = loader(self.labelled, epochs), loader(self.unlabelled, weighted)
        for e in epochs:
            for _ in range(self.steps):
                yield next(labelled), next(unlabelled) if self._weight(e) > 0 else None

    def _step(self, phase: int, weight: float, labelled: Batch, unlabelled: Batch | None
              ) -> dict[str, float]:
        labelled = labelled.to(self.device)
        images = labelled.images
        if unlabelled is not None:
            unlabelled = unlabelled.to(self.device)
            images = torch.cat([images, unlabelled.strong])
        logits, embedding = self._see(self._learner, images, masks=phase == 2)
        n = len(labelled.images)
        mine, theirs = (None, None) if embedding is None else (embedding[:n], embedding[n:])

        terms = self._labelled_terms(phase, logits[:n], mine, labelled)
        loss = own = sum(terms.values())
        other = torch.zeros((), device=self.device)
        if unlabelled is not None:
            with torch.no_grad(), self.fabric.autocast():
                seen = self._see(self.teacher, unlabelled.images, masks=phase > 1)
            other = sum(
                self._unlabelled_terms(phase, logits[n:], theirs, *seen, unlabelled).values())
            loss = (own + weight * other) / (1 + weight)
        row = {"loss": loss, "labelled": own, "unlabelled": other} | terms
        mine = torch.stack([value.detach() for value in row.values()])
        means = torch.as_tensor(self.fabric.all_reduce(mine)).tolist()
        if not math.isfinite(means[0]):
            raise FloatingPointError(
                f"{self.config.run}: the loss is {means[0]} in epoch {self.epoch} "
                f"(phase {phase}); lower the learning rate of that phase")
        if self.fabric.world_size > 1:  # the others wait for a gradient of every part, be it zero
            loss = loss + sum(0 * out.sum() for out in (logits, embedding) if out is not None)
        self._learn(loss)
        return dict(zip(row, means))

    def _see(self, network: nn.Module, images: Tensor, masks: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (B, h, w) and embedding (B, D, h, w), or None, of images."""
        output = network(images.contiguous(memory_format=torch.channels_last), masks=masks)
        return output.logits.float(), output.embedding

    def _learn(self, loss: Tensor) -> None:
        assert self.optimiser is not None
        self.optimiser.zero_grad()
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.student, self.optimiser, error_if_nonfinite=False,
                                   max_norm=self.config.optimisation.clip)
        self.optimiser.step()
        keep = self.config.optimisation.ema
        with torch.no_grad():
            torch._foreach_lerp_(self._theirs, self._ours, 1 - keep)
            # buffers too: with frozen BatchNorm statistics the teacher would stay untrained
            for mine, yours in self._buffers:
                if mine.is_floating_point():
                    mine.lerp_(yours, 1 - keep)
                else:
                    mine.copy_(yours)

    @torch.no_grad()
    def _drop_the_tiny(self) -> None:
        """Set to zero what is too small to matter. Weights that only weight decay moves shrink
        until they are denormal numbers, with which a CPU computes so slowly that training takes
        twice as long."""
        state = self.optimiser.state if self.optimiser else {}
        for weight, moments in state.items():
            for name, value in (("weight", weight), *moments.items()):
                if name in _TINY:
                    value.masked_fill_(value.abs() < _TINY[name], 0)
        for weight in self._theirs:
            weight.masked_fill_(weight.abs() < _TINY["weight"], 0)

    def _labelled_terms(self, phase: int, logits: Tensor, embedding: Tensor | None, batch: Batch
                        ) -> dict[str, Tensor]:
        """Losses of labelled crops. A person counts whose dot lies in the crop."""
        c = self.config.loss
        instances = None if phase == 1 else torch.stack(batch.instances)
        if phase == 2:
            terms = self._mask_terms(logits, embedding, instances, batch.points, None)
            if c.phase2_p2r:
                terms["p2r"] = c.phase2_p2r * self._p2r(logits, batch.points)
            return terms
        terms = {"p2r": self._p2r(logits, batch.points)}
        if phase == 3:
            terms["constraint"] = losses.mask_constraints(
                logits, instances, batch.points, c, stride=model.STRIDE).mean()
        return terms

    def _unlabelled_terms(self, phase: int, logits: Tensor, embedding: Tensor | None,
                          teacher_logits: Tensor, teacher_embedding: Tensor | None, batch: Batch
                          ) -> dict[str, Tensor]:
        """Losses of unlabelled crops, in which the teacher's output takes the place of labels.

        P2R (phases 1 and 3) learns the teacher's points of probability `pseudo_threshold`, except
        under the cut-out. Pseudo-masks (phases 2 and 3) are decoded from the teacher's points of
        probability `pseudo.point_threshold`; one counts if a point above `confident` lies on it.
        Points are `decode.peaks` if `pseudo.peaks`, here and in the labelled terms.
        Phase 2 leaves out the pixels under the cut-out and in discs of `ignore_radius` px around
        the teacher's other points. For the cut-out in phase 3 see `losses.mask_constraint`."""
        c, o, visible = self.config.loss, self.config.optimisation, batch.visible
        terms = {}
        if phase != 2:
            half = model.STRIDE // 2
            points, _ = self._points(teacher_logits, o.pseudo_threshold)
            terms["p2r"] = self._p2r(logits, points,
                                     visible[:, half::model.STRIDE, half::model.STRIDE].float())
        if phase == 1:
            return terms

        points, scores = self._points(teacher_logits, self.config.pseudo.point_threshold)
        instances = self._pseudo_masks(phase, teacher_logits, teacher_embedding, points)
        sure = [s > o.confident for s in scores]
        confident = [p[s] for p, s in zip(points, sure)]
        if phase == 2:
            doubtful = _discs([p[~s] for p, s in zip(points, sure)], c.ignore_radius,
                              tuple(visible.shape[1:]))
            return self._mask_terms(logits, embedding, instances, confident, doubtful | ~visible)
        terms["constraint"] = losses.mask_constraints(
            logits, instances, confident, c, stride=model.STRIDE, visible=visible).mean()
        return terms

    def _mask_terms(self, logits: Tensor, embedding: Tensor, instances: Tensor,
                    dots: list[Tensor], ignored: Tensor | None) -> dict[str, Tensor]:
        """Exclusivity loss around the student's own points, and the point-mask term, in which the
        instances count that hold one of `dots`."""
        c = self.config.loss
        points, _ = self._points(logits, OWN_POINTS)
        terms = {"exclusivity": losses.exclusivity_losses(
            embedding, points, instances, c, ignored).mean()}
        if c.point_mask:
            terms["point_mask"] = c.point_mask * losses.point_mask_consistencies(
                logits, instances, dots, stride=model.STRIDE, ignore=ignored).mean()
        return terms

    def _p2r(self, logits: Tensor, points: list[Tensor], weight: Tensor | None = None) -> Tensor:
        c = self.config.loss
        return losses.p2r_losses(logits, points, model.STRIDE, c, weight=weight).mean()

    def _points(self, logits: Tensor, threshold: float | None
                ) -> tuple[list[Tensor], list[Tensor]]:
        """Points and scores of every image of logits (B, h, w); None: `expected_threshold`, but
        no less than that of points with masks."""
        p = self.config.pseudo
        if threshold is None:  # of the whole batch, which processes share
            every = processes.of_all(logits)
            threshold = max(losses.expected_threshold(every, decode.candidates(every, p)),
                            p.point_threshold)
        found = [decode.points_from_logits(one, stride=model.STRIDE, threshold=threshold)
                 for one in decode.candidates(logits.detach(), p)]
        return [points for points, _ in found], [scores for _, scores in found]

    def _pseudo_masks(self, phase: int, logits: Tensor, embedding: Tensor, points: list[Tensor]
                      ) -> Tensor:
        """(B, H, W) label maps of the teacher's output; the density gate is for phase 3 only."""
        p, density = self.config.pseudo, None
        if p.density_gate and phase == 3:
            density = upsample(torch.sigmoid(logits)[:, None], model.STRIDE)[:, 0]
        return decode.instance_maps(
            embedding, points, stride=model.STRIDE, threshold=p.theta,
            geometry_weight=p.geometry_weight, sigma=p.sigma, density=density)

    def state(self) -> dict:
        """All that the training has learnt so far, for `restore`; not a copy."""
        return {"epoch": self.epoch, "history": self.history,
                "precision": self.fabric.strategy.precision.state_dict(),
                "student": self.student.state_dict(), "teacher": self.teacher.state_dict(),
                "optimiser": self.optimiser.state_dict() if self.optimiser else None}

    def restore(self, state: dict) -> None:
        """Go on from a `state` of a trainer of this configuration.

        Raises ValueError for anything else, and is then as before."""
        before = copy.deepcopy(self.state())
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            self._take(before)
            raise ValueError(f"not a state of this training: {error!r}") from error

    def _take(self, state: dict) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.epoch, self.history = int(state["epoch"]), list(state["history"])
        self.optimiser, self._batches = None, None
        if state["optimiser"] is not None:
            self._enter(phase_of(self.config.schedule, self.epoch))
            self.optimiser.load_state_dict(state["optimiser"])

    def _enter(self, phase: int) -> None:
        """Free the parts that learn in this phase, freeze the others, start its optimiser."""
        rates, groups, c = learning_rates(self.config, phase), [], self.config.loss
        self.student.zero_grad()
        for name, part in self.student.named_children():
            # the decoder's rate in phase 2 is of use only if a term of the loss reads the logits
            reached = name != "decoder" or phase != 2 or c.point_mask > 0 or c.phase2_p2r > 0
            part.requires_grad_(name in rates and reached).train(name in rates)
            if name in rates:
                lr = rates[name]
                groups.append({"params": list(part.parameters()), "lr": lr, "initial_lr": lr})
        optimiser = torch.optim.Adam(
            groups, weight_decay=self.config.optimisation.weight_decay, fused=True)
        self._learner, self.optimiser = self.fabric.setup(
            self.student, optimiser, move_to_device=False)

    def _set_rates(self, phase: int) -> None:
        """Rates of this epoch: times `decay` every `decay_every` epochs (paper), and with `cosine`
        times a half cosine that falls to zero over each phase."""
        o, s = self.config.optimisation, self.config.schedule
        share = o.decay ** (self.epoch // o.decay_every)
        if o.cosine:
            begin, end = {1: (0, s.phase1), 2: (s.phase1, s.phase2), 3: (s.phase2, s.phase3)}[phase]
            share *= 0.5 * (1 + math.cos(math.pi * (self.epoch - begin) / (end - begin)))
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * share


def _discs(points: list[Tensor], radius: float, shape: tuple[int, int]) -> Tensor:
    """(B, H, W) bool: pixels within `radius` px of any point of their image."""
    height, width = shape
    stacked, image, _ = decode.stack_points(points, points[0].device)
    radii = torch.full((len(stacked),), radius, device=stacked.device)
    head, row, column = nnec.row_spans(stacked, radii, shape, split=False).pixels()
    covered = torch.zeros(len(points), height, width, dtype=torch.bool, device=stacked.device)
    covered[image[head], row, column] = True
    return covered
