"""How the bundled SAM is trained: drawn crowds, and the prompts that EDP-SAM gives (ours).

Scenes are drawn with seeds that nothing else uses (`SEED` onwards). A step looks at a few crops,
cut as `xmask.segmenting.crops` would cut them, and prompts some heads of each: half with the point
of the head and its neighbours as negative points, half with the box of the superpixels around it
and the same points. The three masks of a point prompt compete, as in SAM's own training: only the
best one of each head learns the mask. Besides, a linear layer that is thrown away afterwards
has to say for every mask cell whether it is head and where its centre lies: a small
transformer learns much faster from every cell than from a dozen masks.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from skimage.color import hsv2rgb, rgb2hsv
from tqdm.auto import tqdm

from xmask import edp_sam, files, nnec, provenance
from xmask.segmenters import NEGATIVE, PADDING
from xmask.segmenting import crops, sam
from xmask.synthetic import draw_scene

SEED = 4_100_000  # of the first training scene; nothing else uses seeds from here to 5 million
WARM, DECAY = 100, 0.05
EMA = 0.998
NOTE_EVERY = 100  # steps between two rows of the log


@dataclass(frozen=True)
class Training:
    """Everything a training run depends on."""

    seed: int = SEED
    scenes: int = 300
    steps: int = 2400  # over which the learning rate falls to nothing
    stop: int | None = None  # end after so many of them
    crops: int = 8  # per step
    heads: int = 12  # at most, per crop
    lr: float = 1.2e-3


@dataclass(frozen=True)
class PromptedScene:
    """A drawn scene and its prompts; (N, ...) in pixels of the image."""

    image: np.ndarray
    instances: np.ndarray
    points: np.ndarray  # (N, 2)
    labels: np.ndarray  # (N, K) of the prompt points
    prompts: np.ndarray  # (N, K, 2)
    boxes: np.ndarray  # (N, 4), of the superpixels
    truth: np.ndarray  # (N, 4), of the visible head, around the point
    radius: np.ndarray  # (N,), what EDP-SAM takes for the head's radius
    area: np.ndarray  # (N,)


def draw_training_scene(seed: int) -> PromptedScene:
    """Scene number `seed`, its superpixels and prompts."""
    rng = np.random.default_rng((seed, 1))
    people = int(round(math.exp(rng.uniform(math.log(25), math.log(420)))))
    height = int(rng.integers(340, 480))
    shape = (height, int(height * 4 / 3))
    character = ("sha", "sha", "qnrf", "jhu")[rng.integers(4)]
    drawn = draw_scene(seed, shape=shape, people=people, character=character)
    points = drawn.points.astype(np.float64)
    radii = nnec.exclusion_radii(points, shape)
    radius = edp_sam.local_head_radius(points, radii, shape)
    area = np.bincount(drawn.instances.ravel(), minlength=people + 1)[1:]
    # EDP-SAM knows a head's size from the geometry of the crowd, corrected by vote.
    mean = np.sqrt(radius * np.sqrt(np.maximum(area, 1) / np.pi))
    radius = mean * np.exp(rng.normal(0, 0.2, people))
    near = nnec.circles(points, np.minimum(radii, 4 * radius), shape)
    region = edp_sam.superpixel_regions(drawn.image, points, radius, near)
    dots = edp_sam.point_prompts(points, radii, radius)
    box = edp_sam.superpixel_prompts(dots, near.select(region))
    half = drawn.boxes / 2
    return PromptedScene(
        drawn.image, drawn.instances.astype(np.uint16), points, box.labels, box.points,
        box.boxes, np.concatenate([points - half, points + half], axis=1), radius, area)


@dataclass(frozen=True)
class CropBatch:
    """Crops and prompts as SAM wants them, and what it should answer."""

    pixels: torch.Tensor  # (V, 3, side, side), not normalised
    valid: torch.Tensor  # (V, cells, cells), 0 on padding
    people: torch.Tensor  # (V, 3, cells, cells): share of head, offset to its middle (x, y)
    crop: torch.Tensor  # (B,) which crop
    points: torch.Tensor  # (B, K, 2), pixels of the input
    labels: torch.Tensor  # (B, K)
    boxes: torch.Tensor  # (B, 4)
    boxed: torch.Tensor  # (B,) bool: prompted with the box
    target: torch.Tensor  # (B, cells, cells), share of each cell that is the head
    near: torch.Tensor  # (B, cells, cells), 1 where EDP-SAM will look


def make_batch(scenes: list[PromptedScene], rng: np.random.Generator, plan: Training, side: int,
               cells: int) -> CropBatch:
    """Crops around random heads, in the sizes that `plan_crops` would choose."""
    resize = ResizeLongestSide(side)
    parts: dict[str, list] = {name: [] for name in CropBatch.__dataclass_fields__}
    for view in range(plan.crops):
        scene = scenes[rng.integers(len(scenes))]
        while len(scene.points) == 0:
            scene = scenes[rng.integers(len(scenes))]
        height, width = scene.image.shape[:2]
        # Small heads are many; heads are drawn so that all sizes are seen.
        chance = scene.radius / scene.radius.sum()
        middle = rng.choice(len(scene.points), p=chance)
        crop = cells * 2 * scene.radius[middle] / (crops.HEAD_CELLS * 2 ** rng.uniform(0, 1))
        crop = int(np.clip(crop, side / crops.MOST_ENLARGED, max(height, width)))
        tall, wide = min(crop, height), min(crop, width)
        corner = [int(np.clip(round(scene.points[middle, axis] - length * rng.uniform(.2, .8)),
                              0, most - length))
                  for axis, length, most in ((0, wide, width), (1, tall, height))]
        left, top = corner
        window = np.s_[top:top + tall, left:left + wide]
        image = jitter(scene.image[window], rng)
        flip = rng.random() < 0.5
        owner = scene.instances[window]
        if flip:
            image, owner = image[:, ::-1], owner[:, ::-1]
        resized = resize.apply_image(np.ascontiguousarray(image))
        factor = np.array([resized.shape[1] / wide, resized.shape[0] / tall])
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:resized.shape[0], :resized.shape[1]] = resized
        inner = (math.ceil(resized.shape[0] * cells / side),
                 math.ceil(resized.shape[1] * cells / side))
        valid = np.zeros((cells, cells), np.float32)
        valid[:inner[0], :inner[1]] = 1

        def place(xy: np.ndarray, corner=corner, flip=flip, wide=wide, factor=factor) -> np.ndarray:
            xy = xy - corner
            if flip:
                xy = xy * (-1, 1) + (wide - 1, 0)
            return xy * factor

        at = place(scene.points)
        inside = ((at > 0.1 * side) & (at < 0.9 * np.array(resized.shape[1::-1]))).all(1)
        ratio = 2 * scene.radius * factor.mean() * cells / side
        fit = np.flatnonzero(inside & (ratio > 4) & (ratio < 22) & (scene.area >= 6))
        fit = rng.permutation(fit)[:plan.heads]
        shares = [share(owner == k + 1, inner, (cells, cells)) for k in fit]
        for k, mask in zip(fit, shares):
            prompts = place(scene.prompts[k])
            prompts[0] += rng.normal(0, 0.1 * scene.radius[k] * factor.mean(), 2)
            labels = scene.labels[k].copy()
            out = ((prompts < 0) | (prompts >= resized.shape[1::-1])).any(1)
            labels[out & (labels == NEGATIVE)] = PADDING
            box = scene.truth[k] if rng.random() < 0.2 else scene.boxes[k]
            corners = place(box.reshape(2, 2) + rng.normal(
                0, 0.1 * scene.radius[k], (2, 2)))
            corners = np.sort(corners, axis=0).clip(0, np.array(resized.shape[1::-1]) - 1)
            grid = (np.indices((cells, cells))[::-1] + 0.5) * side / cells
            reach = 3.0 * scene.radius[k] * factor.mean()
            near = ((grid - at[k][:, None, None]) ** 2).sum(0) <= reach**2
            parts["crop"].append(view)
            parts["points"].append(prompts)
            parts["labels"].append(np.r_[labels, [PADDING] * (5 - len(labels))])
            if len(labels) < 5:
                parts["points"][-1] = np.r_[prompts, np.zeros((5 - len(labels), 2))]
            parts["boxes"].append(corners.reshape(4))
            parts["boxed"].append(rng.random() < 0.5)
            parts["target"].append(mask)
            parts["near"].append(near * valid)
        parts["pixels"].append(pixels.transpose(2, 0, 1))
        parts["valid"].append(valid)
        parts["people"].append(everybody(owner, inner, (cells, cells)))
    kinds = {"crop": np.int64, "labels": np.int64, "boxed": bool}
    return CropBatch(**{name: torch.from_numpy(np.stack(value).astype(kinds.get(name, np.float32)))
                    for name, value in parts.items()})


def share(mask: np.ndarray, inner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The share of every mask cell that the mask covers: `shape` float32, 0 on padding.

    mask: (H, W) bool. inner: (h, w), cells that hold the image; the rest of `shape` is padding.
    """
    small = Image.fromarray(mask.astype(np.float32)).resize(inner[::-1], Image.Resampling.BOX)
    full = np.zeros(shape, np.float32)
    full[:inner[0], :inner[1]] = np.asarray(small)
    return full


def everybody(owner: np.ndarray, inner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(3, *shape): share of head in every cell, and the offset to that head's middle, in heads."""
    target = np.zeros((3, *shape), np.float32)
    target[0] = share(owner > 0, inner, shape)
    rows = ((np.arange(inner[0]) + 0.5) * owner.shape[0] / inner[0]).astype(int)
    columns = ((np.arange(inner[1]) + 0.5) * owner.shape[1] / inner[1]).astype(int)
    label = owner[np.ix_(rows, columns)].astype(np.int64)
    size = np.bincount(label.ravel())
    for axis, grid in enumerate(np.indices(label.shape)[::-1]):
        middle = np.bincount(label.ravel(), grid.ravel()) / np.maximum(size, 1)
        offset = (middle[label] - grid) / np.sqrt(np.maximum(size, 1))[label]
        target[1 + axis, :inner[0], :inner[1]] = np.where(label > 0, offset, 0)
    return target


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, 3) uint8 with colours, contrast, noise and sharpness of another camera."""
    values = image.astype(np.float32) / 255
    if rng.random() < 0.5:
        hsv = rgb2hsv(values)
        hsv[..., 0] = (hsv[..., 0] + rng.normal(0, 0.03)) % 1
        hsv[..., 1] = (hsv[..., 1] * rng.uniform(0.5, 1.4)).clip(0, 1)
        values = hsv2rgb(hsv)
    if rng.random() < 0.15:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    values = (values.clip(1e-4, 1) ** math.exp(rng.normal(0, 0.25)) - 0.5)
    values = values * rng.uniform(0.7, 1.25) + 0.5 + rng.normal(0, 0.06)
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(0, 0.05), values.shape)
    values = (values.clip(0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.25:  # a coarser photograph of the same
        coarse = rng.uniform(0.5, 1.0)
        picture = Image.fromarray(values)
        small = [max(1, round(length * coarse)) for length in picture.size]
        values = np.asarray(picture.resize(small, Image.Resampling.BILINEAR).resize(
            picture.size, Image.Resampling.BILINEAR))
    return values


def losses(model: torch.nn.Module, spare: torch.nn.Module, batch: CropBatch
           ) -> dict[str, torch.Tensor]:
    """The terms of the loss, and the IoU of the masks chosen by SAM's own estimate: scalars."""
    pixels = (batch.pixels - model.pixel_mean) / model.pixel_std
    pixels = pixels * F.interpolate(batch.valid[:, None], batch.pixels.shape[-1])
    with torch.autocast(pixels.device.type, torch.bfloat16):  # a third faster on a recent CPU
        features = model.image_encoder(pixels)
    features = features.float()
    sparse_point, dense = model.prompt_encoder((batch.points, batch.labels), None, None)
    sparse_box, _ = model.prompt_encoder((batch.points, batch.labels), batch.boxes, None)
    # A point prompt ends in one token of padding, a box in two corners.
    sparse_point = torch.cat(
        [sparse_point, model.prompt_encoder.not_a_point_embed.weight.expand(
            len(sparse_point), 1, -1)], dim=1)
    boxed = batch.boxed
    sparse = torch.where(boxed[:, None, None], sparse_box, sparse_point)
    logits, predicted = sam.decode(model, features[batch.crop], sparse, dense)
    target, near = batch.target[:, None], batch.near[:, None]
    weight = near + 0.05 * batch.valid[batch.crop][:, None]
    size = target.sum((2, 3)).clamp(min=4)
    cross = (F.binary_cross_entropy_with_logits(logits, target.expand_as(logits),
                                                reduction="none") * weight).sum((2, 3))
    probability = logits.sigmoid() * weight
    dice = 1 - (2 * (probability * target).sum((2, 3)) + 1) / (
        probability.sum((2, 3)) + (target * weight).sum((2, 3)) + 1)
    cost = cross / (3 * size) + dice
    with torch.no_grad():
        mask, truth = (logits > 0) & (near > 0), (target > 0.5) & (near > 0)
        iou = (mask & truth).sum((2, 3)) / (mask | truth).sum((2, 3)).clamp(min=1)
        rows = torch.arange(len(cost))
        best = 1 + cost[:, 1:].argmin(1)
        best = torch.where(boxed, torch.zeros_like(best), best)
        trusted = 1 + predicted[:, 1:].argmax(1)
        trusted = torch.where(boxed, torch.zeros_like(trusted), trusted)
    # All three learn a little, so that none falls asleep.
    mean = torch.where(boxed, cost[:, 0], cost[:, 1:].mean(1))
    asked = torch.ones_like(predicted)
    asked[:, 0], asked[:, 1:] = boxed.float()[:, None].T, (~boxed).float()[:, None]
    everyone = spare(features)
    count, _, rows_, columns = everyone.shape
    everyone = F.pixel_shuffle(everyone, batch.people.shape[-1] // rows_)
    valid = batch.valid[:, None]
    heads = batch.people[:, :1]
    dense_loss = (F.binary_cross_entropy_with_logits(everyone[:, :1], heads, reduction="none")
                  * valid).sum() / valid.sum()
    offset = ((everyone[:, 1:] - batch.people[:, 1:]).abs() * heads).sum() / heads.sum().clamp(1)
    return {
        "mask": (0.9 * cost[rows, best] + 0.1 * mean).mean(),
        "estimate": ((predicted - iou) ** 2 * asked).sum() / asked.sum(),
        "everybody": dense_loss + 0.5 * offset,
        # 0 where a step has no prompt of the kind
        "iou_point": iou[rows, trusted][~boxed].sum().detach() / max(int((~boxed).sum()), 1),
        "iou_box": iou[rows, trusted][boxed].sum().detach() / max(int(boxed.sum()), 1),
    }


def train(plan: Training = Training(), path: Path = sam.BUNDLED, *, device: str = "cpu",
          progress: bool = True) -> dict[str, Any]:
    """Train the bundled SAM and write it with its record; returns the record.

    The log goes into the record, one row per 100 steps and one for the last; weights and record
    are also written then, so that a run that is stopped leaves something to look at.
    Raises ValueError for a plan that cannot be.
    """
    for name in ("scenes", "steps", "crops", "heads", "stop"):
        if getattr(plan, name) is not None and getattr(plan, name) < 1:
            raise ValueError(f"{name}: {getattr(plan, name)} is too small; give 1 or more")
    began = time.monotonic()
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng((plan.seed, 2))
    scenes = [draw_training_scene(plan.seed + k) for k in tqdm(
        range(plan.scenes), desc="drawing", unit="scene", disable=not progress)]
    model = sam.build(**sam.SMALL).to(device).train()
    torch.nn.init.trunc_normal_(model.image_encoder.pos_embed, std=0.02)
    cells = 4 * sam.SMALL["side"] // sam.SMALL["patch"]
    spare = torch.nn.Conv2d(sam.SMALL["channels"], 3 * 16, 1).to(device)
    learned = [*(p for p in model.parameters() if p.requires_grad), *spare.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=plan.lr, weight_decay=DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(
        (step + 1) / WARM, 0.5 + 0.5 * math.cos(math.pi * step / plan.steps) + 1e-3))
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    sums: dict[str, float] = {}
    log: list[dict[str, float]] = []
    last = plan.stop or plan.steps
    bar = tqdm(range(1, last + 1), desc="training", unit="step", disable=not progress)
    for step in bar:
        batch = make_batch(scenes, rng, plan, sam.SMALL["side"], cells)
        batch = CropBatch(*(one.to(device) for one in vars(batch).values()))
        terms = losses(model, spare, batch)
        total = terms["mask"] + terms["estimate"] + terms["everybody"]
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        schedule.step()
        keep = min(EMA, step / (step + 20))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % NOTE_EVERY == 0 or step == last:
            every = step - (log[-1]["step"] if log else 0)
            log.append({"step": step, "seconds": round(time.monotonic() - began, 1),
                        **{name: round(value / every, 4) for name, value in sums.items()}})
            sums = {}
            bar.set_postfix(iou=log[-1]["iou_point"])
            _save(averaged, plan, log, device, path)
    return files.read_json(path.with_suffix(".json"))


def _save(state: dict[str, torch.Tensor], plan: Training, log: list[dict[str, float]], device: str,
          path: Path) -> None:
    """Write the averaged weights and how they came about; also halfway, for the impatient."""
    model = sam.build(**sam.SMALL)
    model.load_state_dict(state)
    sam.save_bundled(model, sam.SMALL, {
        "command": f"xmask train-sam --seed {plan.seed} --scenes {plan.scenes} "
                   f"--steps {plan.steps}" + (f" --stop {plan.stop}" if plan.stop else ""),
        "plan": asdict(plan), "steps_done": log[-1]["step"],
        "data": "synthetic crowds, xmask.synthetic.draw_scene",
        "scene_seeds": [plan.seed, plan.seed + plan.scenes - 1], "device": device,
        "threads": torch.get_num_threads(), "versions": provenance.versions(), "log": log}, path)
