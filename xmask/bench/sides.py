"""The sides of every comparison: each function makes inputs and returns the call to be timed.

All inputs are random with a fixed seed (labelled synthetic in the table): heads uniform over the
image, embeddings of unit length, label maps of discs. What a call costs depends on their size
only, not on what they show. Two sides of one comparison get the same inputs from the same seed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xmask import decode, features, losses, metrics, model, nnec
from xmask.bench import dense

DEPTH = 16  # channels of the embedding (paper)
Shape = tuple[int, int]


def crowd(heads: int, shape: Shape, seed: int = 0) -> Tensor:
    """(N, 2) float32 points, uniform over the image."""
    rng = np.random.default_rng([seed, heads])
    return torch.from_numpy(
        rng.uniform(0, [shape[1] - 1, shape[0] - 1], (heads, 2)).astype(np.float32))


def unit_embedding(*shape: int) -> Tensor:
    """(D, H, W), unit length along D."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(*shape, generator=generator), dim=0)


def discs(points: Tensor, shape: Shape, share: float = 0.7) -> Tensor:
    """(H, W) int32 label map of discs, `share` of the exclusion circles wide."""
    radii = share * nnec.exclusion_radii(points, shape)
    head, pixel = nnec.incidence(points, radii, shape)
    return nnec.lowest_wins(torch.zeros(len(head)), head, pixel, shape)


# -- geometry and decoding ----------------------------------------------------------------------


def circles_ours(heads: int, shape: Shape) -> Callable[[], int]:
    points = crowd(heads, shape)
    return lambda: len(nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)[0])


def circles_dense(heads: int, shape: Shape, only: int | None = None) -> Callable[[], int]:
    points = crowd(heads, shape)[:only]
    return lambda: dense.incidences(points, shape)


def _coarse(shape: Shape) -> Tensor:
    """(1, D, h, w), an embedding as the network gives it."""
    return unit_embedding(DEPTH, *(side // model.STRIDE for side in shape))[None]


def decode_ours(heads: int, shape: Shape) -> Callable[[], np.ndarray]:
    """From the network's embedding, at stride 4, to the label map."""
    embedding, points = _coarse(shape), crowd(heads, shape)
    return lambda: decode.instance_maps(embedding, [points], stride=model.STRIDE)[0].numpy()


def decode_dense(heads: int, shape: Shape, only: int | None = None) -> Callable[[], np.ndarray]:
    embedding, points = _coarse(shape)[0], crowd(heads, shape)
    radii = nnec.exclusion_radii(points, shape, lone=decode.LONE_RADIUS)[:only]
    points = points[:only]
    return lambda: dense.instance_map(
        features.upsample(embedding, model.STRIDE), points, radius_of=radii).numpy()


# -- losses -------------------------------------------------------------------------------------


def _with_gradient(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Callable[[], Any]:
    leaf.requires_grad_()

    def call() -> tuple[float, np.ndarray]:
        leaf.grad = None
        value = loss(leaf)
        value.backward()
        return float(value.detach()), leaf.grad.numpy()

    return call


def exclusivity_ours(heads: int, shape: Shape) -> Callable:
    points = crowd(heads, shape)
    labels = discs(points, shape)
    return _with_gradient(lambda e: losses.exclusivity_loss(e, points, labels),
                          unit_embedding(DEPTH, *shape))


def exclusivity_dense(heads: int, shape: Shape, only: int | None = None) -> Callable:
    points = crowd(heads, shape)
    labels, radii = discs(points, shape), nnec.exclusion_radii(points, shape)[:only]
    points = points[:only]
    return _with_gradient(
        lambda e: dense.exclusivity_loss(e, points, labels, radius_of=radii),
        unit_embedding(DEPTH, *shape))


def p2r_ours(heads: int, shape: Shape) -> Callable[[], np.ndarray]:
    points, cells = crowd(heads, shape), tuple(side // model.STRIDE for side in shape)
    return lambda: losses.p2r_assign(points, cells, model.STRIDE)[0].numpy()


def p2r_dense(heads: int, shape: Shape) -> Callable[[], np.ndarray]:
    points, cells = crowd(heads, shape), tuple(side // model.STRIDE for side in shape)
    return lambda: dense.p2r_assign(points, cells, model.STRIDE)[0].numpy()


# -- metrics ------------------------------------------------------------------------------------


def _two_maps(heads: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true label maps, consecutive labels: true discs, and discs a pixel off."""
    points = crowd(heads, shape)
    moved = points + torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    maps = (discs(p, shape).numpy() for p in (moved, points))
    return tuple(np.unique(m, return_inverse=True)[1].reshape(shape).astype(np.int32)
                 for m in maps)


def segmentation_ours(heads: int, shape: Shape) -> Callable[[], dict]:
    pred, true = _two_maps(heads, shape)
    return lambda: metrics.segmentation(pred, true)


def segmentation_dense(heads: int, shape: Shape) -> Callable[[], dict]:
    pred, true = _two_maps(heads, shape)
    return lambda: dense.segmentation(pred, true)


def localization_ours(heads: int, shape: Shape) -> Callable[[], int]:
    pred, true = crowd(heads, shape, 1).numpy(), crowd(heads, shape).numpy()
    return lambda: metrics.localization(pred, true, 8.0)["matched"]


def localization_dense(heads: int, shape: Shape) -> Callable[[], int]:
    pred, true = crowd(heads, shape, 1).numpy(), crowd(heads, shape).numpy()
    return lambda: dense.matched_points(pred, true, 8.0)


# -- masks from points --------------------------------------------------------------------------


class _GivenFeatures(nn.Module):
    """In the place of SAM's image encoder, which the comparison leaves out."""

    img_size = 1024

    def __init__(self, channels: int, side: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(1, channels, side, side, generator=generator)

    def forward(self, _: Tensor) -> Tensor:
        return self.features


def _sam() -> nn.Module:
    """SAM (vit_b) with random weights."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval()
    sam.image_encoder = _GivenFeatures(256, 64)
    return sam


def _sam_label_map(claims: Tensor, points: Tensor, head: Tensor, pixel: Tensor,
                   shape: Shape) -> np.ndarray:
    """Claimed incidences to an exclusive map: the nearest head wins."""
    x, y = pixel % shape[1], torch.div(pixel, shape[1], rounding_mode="floor")
    squared = (x - points[head, 0]).square() + (y - points[head, 1]).square()
    return nnec.lowest_wins(
        torch.where(claims, squared, torch.inf), head, pixel, shape).numpy()


def sam_ours(heads: int, shape: Shape) -> Callable[[], dict[str, np.ndarray]]:
    """Label map; and, per pixel, the smallest |logit| of its heads, to judge differences by."""
    from xmask.segmenters import Prompts
    from xmask.segmenting.sam_segmenter import SamSegmenter

    segmenter = SamSegmenter.from_model(_sam(), max_zoom=1)
    segmenter.set_image(np.zeros((*shape, 3), np.uint8))
    points = crowd(heads, shape)

    def call() -> dict[str, np.ndarray]:
        head, pixel = nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)
        prompts = Prompts(points.numpy()[:, None], np.ones((heads, 1), np.int64))
        logits, scores = segmenter.predict(prompts, head.numpy(), pixel.numpy())
        best = torch.from_numpy(logits)[torch.from_numpy(scores.argmax(1))[head],
                                        torch.arange(len(head))]
        smallest = torch.full((shape[0] * shape[1],), torch.inf)
        smallest.scatter_reduce_(0, pixel, best.abs(), "amin")
        return {"labels": _sam_label_map(best > 0, points, head, pixel, shape),
                "nearest_zero": smallest.view(shape).numpy(),
                "scale": float(best.abs().median())}

    return call


def sam_stock(heads: int, shape: Shape, batch: int = 64) -> Callable[[], dict[str, np.ndarray]]:
    from segment_anything import SamPredictor

    predictor = SamPredictor(_sam())
    predictor.set_image(np.zeros((*shape, 3), np.uint8))
    points = crowd(heads, shape)

    def call() -> dict[str, np.ndarray]:
        head, pixel = nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)
        claims = torch.empty(len(head), dtype=torch.bool)
        for start in range(0, heads, batch):
            part = points[start:start + batch]
            coordinates = predictor.transform.apply_coords_torch(part[:, None].clone(), shape)
            masks, scores, _ = predictor.predict_torch(
                coordinates, torch.ones(len(part), 1), multimask_output=True)
            # SamSegmenter keeps scores in 0..1, so of several above 1 the first is best
            chosen = scores.clamp(0, 1).argmax(1)
            best = masks[torch.arange(len(part)), chosen].flatten(1)
            mine = (head >= start) & (head < start + batch)
            claims[mine] = best[head[mine] - start, pixel[mine]]
        return {"labels": _sam_label_map(claims, points, head, pixel, shape)}

    return call


def _scene(heads: int, shape: Shape):
    from xmask.synthetic import draw_scene

    return draw_scene(0, shape=shape, people=heads)


def masks_ours(heads: int, shape: Shape) -> Callable[[], np.ndarray]:
    """EDP-SAM with the classical segmenter, which needs no weights."""
    from xmask.edp_sam import generate_masks
    from xmask.segmenting.classical import ClassicalSegmenter

    scene = _scene(heads, shape)
    segmenter = ClassicalSegmenter()

    def call() -> np.ndarray:
        return generate_masks(scene.image, scene.points, segmenter)[0]

    return call


def _grey_and_markers(scene) -> tuple[np.ndarray, np.ndarray]:
    from skimage.color import rgb2gray

    markers = np.zeros(scene.image.shape[:2], np.int32)
    column, row = np.rint(scene.points).astype(int).T
    markers[row, column] = np.arange(1, len(scene.points) + 1)
    return rgb2gray(scene.image), markers


def watershed(heads: int, shape: Shape) -> Callable[[], np.ndarray]:
    """scikit-image: watershed of the gradient from the heads, inside their exclusion circles."""
    from skimage.filters import sobel
    from skimage.segmentation import watershed as flood

    scene = _scene(heads, shape)
    grey, markers = _grey_and_markers(scene)

    def call() -> np.ndarray:
        inside = np.zeros(grey.size, bool)
        inside[nnec.incidence(
            scene.points, nnec.exclusion_radii(scene.points, shape), shape)[1]] = True
        return flood(sobel(grey), markers, mask=inside.reshape(shape))

    return call


def random_walker(heads: int, shape: Shape, only: int | None = None) -> Callable[[], None]:
    """scikit-image: random walker from the heads; background is whatever is left to the border."""
    from skimage.segmentation import random_walker as walk

    scene = _scene(heads, shape)
    grey, markers = _grey_and_markers(scene)
    markers[markers > (only or heads)] = 0
    markers[0] = markers.max() + 1

    def call() -> None:
        walk(grey, markers, beta=130, mode="cg_j", tol=1e-3)

    return call


def true_map(heads: int, shape: Shape) -> np.ndarray:
    return _scene(heads, shape).instances


# -- the network's own cost ---------------------------------------------------------------------


def _network(memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    from xmask.config import Network

    torch.manual_seed(0)
    return model.XMask(Network(weights="random")).to(memory_format=memory_format)


def forward(shape: Shape) -> Callable[[], None]:
    """VGG16-BN and both decoders on one test image, as `xmask.predict.predict_image` runs them."""
    network = _network().eval()
    image = torch.rand(1, 3, *shape).contiguous(memory_format=torch.channels_last)

    def call() -> None:
        with torch.inference_mode():
            network(image)

    return call


def _network_output(points: Tensor, cells: Shape) -> tuple[Tensor, Tensor]:
    """(logits (h, w), embedding (D, h, w)) of a network that finds these heads, each in a cell
    of its own."""
    generator = torch.Generator().manual_seed(len(points))
    free = torch.randperm(cells[0] * cells[1], generator=generator)[:len(points)]
    logits = torch.full((cells[0] * cells[1],), -4.0)
    logits[free] = 4.0
    logits += 0.5 * torch.randn(len(logits), generator=generator)
    return logits.view(cells), unit_embedding(DEPTH, *cells)


def after_network(heads: int, shape: Shape, score: bool = False) -> Callable[[], int]:
    """Points and masks of one test image; score: and its metrics against a truth."""
    from xmask.config import preset

    decoding = preset("paper", "sha", 40).evaluation
    cells = tuple(side // model.STRIDE for side in shape)
    logits, embedding = _network_output(crowd(heads, shape), cells)
    true_points = crowd(heads, shape)
    true = discs(true_points, shape).numpy()

    def call() -> int:
        with torch.inference_mode():
            found = decode.predict(logits, embedding, shape, decoding)
        if score:
            metrics.segmentation(found.instances, true)
            for sigma in (4, 8):
                metrics.localization(found.points, true_points, sigma)
        return len(found.points)

    return call


def training_step(
    phase: int, batch: int, crop: int = 256, *, channels_last: bool = True, fused: bool = True,
) -> Callable[[], None]:
    """Network side of a step: student forward and backward on batch + batch crops, teacher
    forward on batch, and the optimiser; by default as the trainer does it."""
    from xmask.config import preset
    from xmask.trainer import learning_rates

    layout = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = _network(layout), _network(layout).eval().requires_grad_(False)
    rates = learning_rates(preset("paper", "sha", 40), phase)
    for name, part in student.named_children():
        learns = name in rates
        part.requires_grad_(learns).train(learns)
    optimiser = torch.optim.Adam(
        [p for p in student.parameters() if p.requires_grad], lr=1e-6, fused=fused)
    images = torch.rand(2 * batch, 3, crop, crop).contiguous(memory_format=layout)

    def call() -> None:
        with torch.no_grad():
            teacher(images[:batch], masks=phase > 1)
        output = student(images, masks=phase == 2)
        loss = output.logits.mean()
        if output.embedding is not None:
            loss = loss + output.embedding.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return call


def training_terms(phase: int, batch: int, heads: int, crop: int = 256) -> Callable[[], float]:
    """Losses and pseudo-labels of a step, with gradients down to the network's output."""
    from xmask.config import override, preset
    from xmask.data.sample import Sample
    from xmask.data.transforms import Batch
    from xmask.trainer import Trainer

    shape, cells = (crop, crop), (crop // model.STRIDE,) * 2
    config = override(preset("paper", "sha", 40), {
        "network.weights": "random", "loss.point_mask": 1.0, "loss.one_point": 0.01,
        "machine.threads": torch.get_num_threads()})
    sample = Sample(np.zeros((crop, crop, 3), np.uint8), np.zeros((0, 2), np.float32))
    trainer = Trainer(config, [sample], [sample], device=torch.device("cpu"))
    dots = [crowd(heads, shape, seed) for seed in range(2 * batch)]
    seen = [_network_output(d, cells) for d in dots]
    logits = torch.stack([s[0] for s in seen]).requires_grad_()
    embedding = torch.stack([s[1] for s in seen]).requires_grad_() if phase == 2 else None
    images = torch.zeros(batch, 3, *shape)
    labelled = Batch(images, dots[:batch], [discs(d, shape) for d in dots[:batch]])
    unlabelled = Batch(images, [], [], images, torch.ones(batch, *shape, dtype=torch.bool))
    teacher_logits = logits.detach()[batch:]
    teacher_embedding = torch.stack([s[1] for s in seen[batch:]])

    def call() -> float:
        logits.grad = None
        if embedding is not None:
            embedding.grad = None
        half = slice(None, batch), slice(batch, None)
        mine, theirs = (None if embedding is None else embedding[h] for h in half)
        terms = trainer._labelled_terms(phase, logits[half[0]], mine, labelled)
        other = trainer._unlabelled_terms(
            phase, logits[half[1]], theirs, teacher_logits, teacher_embedding, unlabelled)
        loss = sum(terms.values()) + sum(other.values())
        loss.backward()
        return float(loss.detach())

    return call


class _Files:
    """One drawn scene as a JPEG, decoded anew whenever it is asked for, as from a disk."""

    def __init__(self, heads: int, shape: Shape):
        self.scene, self.file = _scene(heads, shape), io.BytesIO()
        Image.fromarray(self.scene.image).save(self.file, "JPEG", quality=90)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return replace(self.scene, image=np.asarray(Image.open(self.file)))


def crops(batch: int, heads: int, shape: Shape) -> Callable[[], None]:
    """One loader process makes the batch + batch crops of a training step, JPEGs and all."""
    from xmask.data.transforms import Crops, collate

    files = _Files(heads, shape)
    kinds = [Crops(files, 256, (0.7, 1.3), 0, strong=strong) for strong in (False, True)]

    def call() -> None:
        for kind in kinds:
            collate([kind[i] for i in range(batch)])

    return call
