"""What is compared: every row of the benchmark with its two sides and its target.

Each maker takes the number of heads and the shape (H, W) of the image, makes inputs, and returns
two calls: ours and the other. Some take `only`: the other side works on that many heads (or crops).

All inputs are random with a fixed seed (labelled synthetic in the table): heads uniform over the
image, embeddings of unit length, label maps of discs. What a call costs depends on their size
only, not on what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor, sam_model_registry
from skimage.color import rgb2gray
from skimage.filters import sobel
from skimage.segmentation import watershed
from torch import Tensor, nn

from xmask import decode, features, losses, metrics, model, nnec
from xmask.bench import dense
from xmask.config import Network, override, preset
from xmask.data.sample import Sample
from xmask.data.transforms import Batch
from xmask.edp_sam import generate_masks
from xmask.segmenters import Prompts
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.segmenting.sam_segmenter import SamSegmenter
from xmask.synthetic import draw_scene
from xmask.trainer import Trainer

DEPTH = 16  # channels of the embedding (paper)
IMAGE = (768, 1024)  # H, W of a test image (ShanghaiTech A's commonest size)
CROP = (256, 256)
CROWDS = (50, 500, 3000, 10000)
Shape = tuple[int, int]
Sides = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Comparison:
    """One row.

    make: (heads, shape, only where there is `fewer`) -> the calls of both sides.
    fewer: the other side is measured with these sizes only, and a straight line through them (and
        through nothing, if it is one) gives its time and memory for the size `of` (default: all
        heads): dense code is linear in heads, a network in crops.
    agree: (result of ours, result of the other) -> what they have in common, in words.
    faster, leaner: how many times faster and smaller in memory ours has to be; None: no target.
    share: instead, ours may cost at most this share of the other's time.
    """

    group: str
    operation: str
    against: str
    make: Callable[..., Sides]
    heads: int
    shape: Shape = IMAGE
    fewer: tuple[int, ...] = ()
    of: int | None = None
    agree: Callable[[Any, Any], str] | None = None
    faster: float | None = None
    leaner: float | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        """What tells this row from all others."""
        return (f"{self.operation}, {self.shape[1]}×{self.shape[0]}, {self.heads:,} heads, "
                f"against {self.against}")


def comparisons() -> Iterator[Comparison]:
    """Every row, cheap groups first."""
    for heads in CROWDS:
        few = heads <= 50
        yield Comparison(
            "nnec", "exclusion circles: radii and incidence list", "dense N×H×W", circles, heads,
            fewer=() if few else (10, 30), agree=same if few else None)
    for heads, faster in ((50, None), (541, 200), (3000, 1000), (10000, None)):
        few = heads <= 541
        yield Comparison(
            "decode", "decoding, every head", "dense, every head", decoding, heads, faster=faster,
            fewer=() if few else (10, 30), agree=same if few else None)
    yield Comparison("decode", "decoding, many heads", "decoding 50 heads", growth, 10000, share=2)
    loss = ("losses", "exclusivity loss with gradient", "dense N×D×H×W", exclusivity)
    yield Comparison(*loss, 500, CROP, faster=500, leaner=20, agree=same_gradient)
    for heads in CROWDS:
        yield Comparison(*loss, heads, fewer=(4, 12))
    for heads in CROWDS:
        yield Comparison(
            "metrics", "segmentation metrics", "dense IoU + Hungarian", segmentation, heads,
            agree=same, faster=3 if heads == 3000 else None)
    yield Comparison(
        "sam", "SAM masks of every head (ViT-B, random weights), image encoder left out",
        "SamPredictor.predict_torch, batches of 64", sam_prompts, 256, faster=3, agree=same)
    yield Comparison("sam", "EDP-SAM with SAM ViT-B (random weights), masks of one image",
                     "its image encoder, once", sam_image, 30, (256, 384))
    for heads in (50, 500, 3000):
        yield Comparison(
            "masks", "EDP-SAM without SAM (classical segmenter), masks from points",
            "scikit-image watershed", classical_masks, heads,
            agree=partial(mean_ious, heads, IMAGE))
    after = ("the network's forward pass", after_network, 3000)
    yield Comparison("network", "everything after the network: points and masks", *after,
                     share=0.05)
    yield Comparison("network", "the same with all metrics against a truth", after[0],
                     partial(after_network, score=True), after[2], share=0.05)
    for phase in (1, 2, 3):
        yield Comparison(
            "network", f"training step, phase {phase}: losses and pseudo-labels of 16 + 16 crops",
            "the network's part of the step (VGG16-BN)", partial(training, phase=phase), 200, CROP,
            fewer=(2,), of=16, share=0.1)


# Whether both sides give the same


def same(ours: Any, other: Any) -> str:
    """Of numbers or arrays of numbers of one shape."""
    differ = np.asarray(ours) != np.asarray(other)
    return f"{differ.sum()} of {differ.size} numbers differ" if differ.any() else "identical"


def same_gradient(ours: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> str:
    """Of values and gradients."""
    value = abs(ours[0] - other[0]) / abs(other[0])
    gradient = np.abs(ours[1] - other[1]).max() / np.abs(other[1]).max()
    return f"value to {value:.0e}, gradient to {gradient:.0e} (relative)"


def mean_ious(heads: int, shape: Shape, ours: np.ndarray, other: np.ndarray) -> str:
    """Of label maps (H, W) that need not be the same, with the truth of the drawn scene."""
    true = draw_scene(0, shape=shape, people=heads).instances
    values = [metrics.segmentation(labels, true)["mean_iou"] for labels in (ours, other)]
    return "mean IoU {:.3f} against {:.3f}".format(*values)


# Inputs


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


def two_maps(heads: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true label maps, consecutive labels: true discs, and discs a pixel off."""
    points = crowd(heads, shape)
    moved = points + torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    maps = (discs(p, shape).numpy() for p in (moved, points))
    return tuple(np.unique(m, return_inverse=True)[1].reshape(shape).astype(np.int32)
                 for m in maps)


def network_output(points: Tensor, cells: Shape) -> tuple[Tensor, Tensor]:
    """(logits (h, w), embedding (D, h, w)) of a network that finds as many heads as there are
    points, each in a cell of its own."""
    generator = torch.Generator().manual_seed(len(points))
    free = torch.randperm(cells[0] * cells[1], generator=generator)[:len(points)]
    logits = torch.full((cells[0] * cells[1],), -4.0)
    logits[free] = 4.0
    logits += 0.5 * torch.randn(len(logits), generator=generator)
    return logits.view(cells), unit_embedding(DEPTH, *cells)


def _cells(shape: Shape) -> Shape:
    """(h, w) of the network's output."""
    return shape[0] // model.STRIDE, shape[1] // model.STRIDE


# Geometry, decoding, losses, metrics


def circles(heads: int, shape: Shape, only: int | None = None) -> Sides:
    """How many pixels lie in circles."""
    points = crowd(heads, shape)
    return (lambda: len(nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)[0]),
            lambda: dense.incidences(points[:only], shape))


def decoding(heads: int, shape: Shape, only: int | None = None) -> Sides:
    """From the network's embedding, at stride 4, to the label map."""
    embedding, points = unit_embedding(DEPTH, *_cells(shape)), crowd(heads, shape)
    radii = nnec.exclusion_radii(points, shape, lone=decode.LONE_RADIUS)[:only]
    return (lambda: decode.instance_maps(
                embedding[None], [points], stride=model.STRIDE)[0].numpy(),
            lambda: dense.instance_map(features.upsample(embedding, model.STRIDE), points[:only],
                                       radius_of=radii).numpy())


def growth(heads: int, shape: Shape) -> Sides:
    """Our decoding of many and of few heads."""
    return decoding(heads, shape)[0], decoding(CROWDS[0], shape)[0]


def exclusivity(heads: int, shape: Shape, only: int | None = None) -> Sides:
    """Value and gradient with respect to the embedding."""
    points, embedding = crowd(heads, shape), unit_embedding(DEPTH, *shape).requires_grad_()
    labels, radii = discs(points, shape), nnec.exclusion_radii(points, shape)[:only]

    def with_gradient(loss: Callable[[], Tensor]) -> tuple[float, np.ndarray]:
        embedding.grad = None
        value = loss()
        value.backward()
        return float(value.detach()), embedding.grad.numpy()

    return (partial(with_gradient, lambda: losses.exclusivity_loss(embedding, points, labels)),
            partial(with_gradient, lambda: dense.exclusivity_loss(
                embedding, points[:only], labels, radius_of=radii)))


def segmentation(heads: int, shape: Shape) -> Sides:
    """Mean IoU, AP50, PQ and AJI, rounded: the order of a sum is no difference."""
    pred, true = two_maps(heads, shape)

    def rounded(measure: Callable[..., dict[str, float]]) -> list[float]:
        found = measure(pred, true)
        return [round(found[name], 12) for name in ("mean_iou", "ap50", "pq", "aji")]

    return partial(rounded, metrics.segmentation), partial(rounded, dense.segmentation)


# Masks from points


class _GivenFeatures(nn.Module):
    """In the place of SAM's image encoder, which the comparison leaves out."""

    img_size = 1024

    def forward(self, _: Tensor) -> Tensor:
        return torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))


def _sam() -> nn.Module:
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().eval()


def sam_prompts(heads: int, shape: Shape, batch: int = 64) -> Sides:
    """One point a head, three candidates, to a label map: the nearest head wins."""
    sam, points = _sam(), crowd(heads, shape)
    sam.image_encoder = _GivenFeatures()
    segmenter, predictor = SamSegmenter.from_model(sam, max_zoom=1), SamPredictor(sam)
    for one in (segmenter, predictor):
        one.set_image(np.zeros((*shape, 3), np.uint8))

    def label_map(claims: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        head, pixel = nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)
        xy = torch.stack([pixel % shape[1], torch.div(pixel, shape[1], rounding_mode="floor")], 1)
        squared = (xy - points[head]).square().sum(1)
        return nnec.lowest_wins(torch.where(claims(head, pixel), squared, torch.inf), head, pixel,
                                shape).numpy()

    def ours(head: Tensor, pixel: Tensor) -> Tensor:
        prompts = Prompts(points.numpy()[:, None], np.ones((heads, 1), np.int64))
        logits, scores = segmenter.predict(prompts, head.numpy(), pixel.numpy())
        return torch.from_numpy(logits[scores.argmax(1)[head], np.arange(len(head))] > 0)

    def stock(head: Tensor, pixel: Tensor) -> Tensor:
        claims = torch.empty(len(head), dtype=torch.bool)
        for start in range(0, heads, batch):
            part = points[start:start + batch]
            coordinates = predictor.transform.apply_coords_torch(part[:, None].clone(), shape)
            masks, scores, _ = predictor.predict_torch(
                coordinates, torch.ones(len(part), 1), multimask_output=True)
            # SamSegmenter keeps scores in 0..1, so of several above 1 the first is best
            best = masks[torch.arange(len(part)), scores.clamp(0, 1).argmax(1)].flatten(1)
            mine = (head >= start) & (head < start + batch)
            claims[mine] = best[head[mine] - start, pixel[mine]]
        return claims

    return partial(label_map, ours), partial(label_map, stock)


def sam_image(heads: int, shape: Shape) -> Sides:
    """All that EDP-SAM does for one drawn image, and one pass of SAM's encoder, which does most
    of it. Time and memory do not depend on what the weights are."""
    sam, scene = _sam(), draw_scene(0, shape=shape, people=heads)
    segmenter, predictor = SamSegmenter.from_model(sam), SamPredictor(sam)

    def ours() -> int:
        segmenter.set_image(np.zeros((1, 1, 3), np.uint8))  # forget what an earlier call encoded
        return int((generate_masks(scene.image, scene.points, segmenter)[1]["area"] > 0).sum())

    return ours, lambda: predictor.set_image(scene.image)


def classical_masks(heads: int, shape: Shape) -> Sides:
    """EDP-SAM with the classical segmenter, which needs no weights; and the watershed of the
    gradient from the heads, inside their exclusion circles. Both on a drawn scene."""
    scene, segmenter = draw_scene(0, shape=shape, people=heads), ClassicalSegmenter()
    markers = np.zeros(shape, np.int32)
    column, row = np.rint(scene.points).astype(int).T
    markers[row, column] = np.arange(1, heads + 1)

    def flood() -> np.ndarray:
        inside = np.zeros(shape, bool)
        inside.flat[nnec.incidence(
            scene.points, nnec.exclusion_radii(scene.points, shape), shape)[1]] = True
        return watershed(sobel(rgb2gray(scene.image)), markers, mask=inside)

    return lambda: generate_masks(scene.image, scene.points, segmenter)[0], flood


# The network's own cost


def after_network(heads: int, shape: Shape, *, score: bool = False) -> Sides:
    """Points and masks of one test image (score: and its metrics); and VGG16-BN with both
    decoders, as `xmask.predict.predict_image` runs them."""
    decoding = preset("paper", "sha", 40).evaluation
    points = crowd(heads, shape)
    logits, embedding = network_output(points, _cells(shape))
    true = discs(points, shape).numpy()
    network = model.XMask(Network(weights="random")).to(memory_format=torch.channels_last).eval()
    image = torch.rand(1, 3, *shape).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def ours() -> int:
        found = decode.predict(logits, embedding, shape, decoding)
        if score:
            metrics.segmentation(found.instances, true)
            for sigma in (4, 8):
                metrics.localization(found.points, points, sigma)
        return len(found.points)

    @torch.inference_mode()
    def forward() -> None:
        network(image)

    return ours, forward


def training(heads: int, shape: Shape, only: int | None = None, *, phase: int, batch: int = 16
             ) -> Sides:
    """Of a training step on batch + batch crops: losses and pseudo-labels, with gradients down to
    the network's output; and the rest, forward, backward and optimiser, on only + only crops."""
    sample = Sample(np.zeros((*shape, 3), np.uint8), np.zeros((0, 2), np.float32))
    trainer = Trainer(override(preset("paper", "sha", 40), {
        "network.weights": "random", "loss.point_mask": 1.0, "loss.one_point": 0.01,
        "machine.threads": torch.get_num_threads()}), [sample], [sample],
        device=torch.device("cpu"))
    trainer._enter(phase)
    dots = [crowd(heads, shape, seed) for seed in range(2 * batch)]
    seen = zip(*(network_output(d, _cells(shape)) for d in dots))
    logits, embedding = (torch.stack(part).requires_grad_() for part in seen)
    masks = phase == 2  # the phase in which the student's embedding learns
    images = torch.zeros(batch, 3, *shape)
    labelled = Batch(images, dots[:batch], [discs(d, shape) for d in dots[:batch]])
    unlabelled = Batch(images, [], [], images, torch.ones(batch, *shape, dtype=torch.bool))
    crops = torch.rand(2 * (only or batch), 3, *shape)

    def terms() -> float:
        logits.grad = embedding.grad = None
        own = trainer._labelled_terms(
            phase, logits[:batch], embedding[:batch] if masks else None, labelled)
        other = trainer._unlabelled_terms(
            phase, logits[batch:], embedding[batch:] if masks else None, logits.detach()[batch:],
            embedding.detach()[batch:], unlabelled)
        loss = sum(own.values()) + sum(other.values())
        loss.backward()
        return float(loss.detach())

    def network() -> None:
        with torch.no_grad():
            trainer._see(trainer.teacher, crops[:len(crops) // 2], masks=phase > 1)
        seen = trainer._see(trainer.student, crops, masks=masks)
        trainer._learn(sum(part.mean() for part in seen if part is not None))

    return terms, network
