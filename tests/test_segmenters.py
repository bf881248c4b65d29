"""What a segmenter promises: logits at the incidences only, equal to the full masks."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import segment_anything
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from xmask import nnec
from xmask.segmenters import Prompts, describe, open_segmenter
from xmask.segmenting import sam as sam_models
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.segmenting.sam_segmenter import SamSegmenter, resize_taps


def tiny_sam(side: int = 256, width: int = 32) -> Sam:
    """Segment Anything with random weights, small enough for a test."""
    torch.manual_seed(0)
    cells = side // 16
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side, patch_size=16, embed_dim=width, depth=2, num_heads=2, out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=4,
            global_attn_indexes=(1,)),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(cells, cells), input_image_size=(side, side),
            mask_in_chans=4),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer_dim=32, iou_head_hidden_dim=16,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4)),
    ).eval()


def picture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def crowd(shape: tuple[int, int], count: int = 70, seed: int = 0):
    """Random heads with two more points as prompts, and their incidences."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((0, 0), (shape[1] - 1, shape[0] - 1), (count, 2))
    head, pixel = nnec.incidence(points, nnec.exclusion_radii(points, shape), shape)
    prompts = np.concatenate([points[:, None], rng.permutation(points)[:, None]], axis=1)
    return points, prompts, np.tile([1, 0], (count, 1)), head, pixel


def as_sam_does(sam, image, coordinates, labels, boxes, multimask):
    """Full-image logits (B, C, H, W) and predicted IoU from the library's own predictor."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    size = image.shape[:2]
    corners = None
    if boxes is not None:
        corners = torch.as_tensor(predictor.transform.apply_boxes(boxes, size)).float()
    masks, quality, _ = predictor.predict_torch(
        torch.as_tensor(predictor.transform.apply_coords(coordinates, size)).float(),
        torch.as_tensor(labels), boxes=corners, multimask_output=multimask, return_logits=True)
    return masks.numpy(), quality.clamp(0, 1).numpy()


@pytest.mark.parametrize("shape", [(90, 140), (141, 87), (64, 64), (300, 401), (1, 5)])
@pytest.mark.parametrize("boxed", [False, True])
def test_sam_read_at_incidences_equals_the_library_upsampled_masks(shape, boxed):
    sam, image = tiny_sam(), picture(shape)
    points, coordinates, labels, head, pixel = crowd(shape)
    boxes = None
    if boxed:
        boxes = np.concatenate([points - 4, points + 5], axis=1)
        boxes = boxes.clip(0, np.array([shape[1], shape[0]] * 2) - 1.0)
    segmenter = SamSegmenter.from_model(sam, max_zoom=1)
    segmenter.set_image(image)
    logits, scores = segmenter.predict(
        Prompts(coordinates, labels, boxes, multimask=not boxed), head, pixel)
    masks, quality = as_sam_does(sam, image, coordinates, labels, boxes, not boxed)
    expected = masks.reshape(*masks.shape[:2], -1)[head, :, pixel].T
    assert logits.shape == (1 if boxed else 3, len(head))
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    np.testing.assert_allclose(scores, quality, atol=1e-4)


def test_small_heads_are_prompted_in_an_enlarged_crop():
    sam, image = tiny_sam(), picture((200, 320))
    points = np.array([[100.0, 80.0], [102.0, 83.0], [310.0, 5.0]])
    head, pixel = nnec.incidence(points, np.array([5.0, 5.0, 5.0]), (200, 320))
    labels = np.ones((3, 1), int)
    segmenter = SamSegmenter.from_model(sam, max_zoom=2)
    segmenter.set_image(image)
    logits, scores = segmenter.predict(Prompts(points[:, None], labels), head, pixel)
    # A zoom of 2 on 320 px means crops of 160 px, at 0, 80 and 160: there is no room for the
    # full step of 96 px. A head belongs to the crop whose middle is nearest.
    assert segmenter.encoded == 2
    for heads, left, top in ((slice(0, 2), 0, 0), (slice(2, 3), 160, 0)):
        crop = np.ascontiguousarray(image[top:top + 160, left:left + 160])
        local = points[heads] - [left, top]
        masks, quality = as_sam_does(sam, crop, local[:, None], labels[heads], None, True)
        np.testing.assert_allclose(scores[heads], quality, atol=1e-4)
        for k, mask in zip(range(heads.start, heads.stop), masks):
            y, x = np.divmod(pixel[head == k], 320)
            np.testing.assert_allclose(
                logits[:, head == k], mask[:, y - top, x - left], atol=1e-3)


@pytest.mark.parametrize("kept,size", [(1024, 1024), (768, 576), (683, 2000), (5, 3), (1024, 64)])
def test_composed_taps_equal_two_bilinear_steps(kept, size):
    values = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0)).double()
    resize = partial(torch.nn.functional.interpolate, mode="linear", align_corners=False)
    expected = resize(resize(values, size=1024)[..., :kept], size=size)[0, 0].numpy()
    first, weight = resize_taps(256, 1024, kept, size)
    assert weight.shape[1] <= 4
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    cells = np.pad(values[0, 0].numpy(), (0, 4))
    found = (weight * cells[first[:, None] + np.arange(weight.shape[1])]).sum(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_sam_in_memory_is_another_one_once_it_has_learned():
    model = tiny_sam(side=64)
    segmenter = SamSegmenter.from_model(model)
    before = segmenter.describe()
    assert before["model_type"] == "in-memory" and len(before["sha256"]) == 64
    assert SamSegmenter.from_model(copy.deepcopy(model)).describe() == before
    with torch.no_grad():
        model.mask_decoder.iou_token.weight[0, 0] += 1e-3
    assert segmenter.describe()["sha256"] != before["sha256"]


def test_a_sam_checkpoint_is_recognised_by_its_weights(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    sam = tiny_sam(side=64, width=768)
    torch.save(sam.state_dict(), path)
    monkeypatch.setitem(
        segment_anything.sam_model_registry, "vit_b", lambda: tiny_sam(side=64, width=768))
    segmenter = open_segmenter(str(path))
    description = segmenter.describe()
    assert segmenter.name == "sam" and description["model_type"] == "vit_b"
    assert len(description["sha256"]) == 64
    assert describe(str(path)) == description
    with pytest.raises(ValueError, match="'vit_h' was asked for, but the weights are 'vit_b'"):
        SamSegmenter(path, "vit_h")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"weights\.pth: not a readable checkpoint of 5000 bytes"):
        open_segmenter(str(path))


def test_files_that_are_no_sam_are_named_with_what_they_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such SAM checkpoint"):
        open_segmenter(str(tmp_path / "missing.pth"))
    cases = {
        "vgg.pth": ({"features.0.weight": torch.zeros(1)}, "features.0.weight"),
        "list.pth": ([1, 2], "found a list"),
        "narrow.pth": ({sam_models.WIDTH_KEY: torch.zeros(32, 3, 16, 16)}, "32 wide"),
    }
    for name, (content, found) in cases.items():
        torch.save(content, tmp_path / name)
        for look in (open_segmenter, describe):
            with pytest.raises(ValueError, match=found):
                look(str(tmp_path / name))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        open_segmenter(str(tmp_path / "text.pth"))


@pytest.mark.parametrize("name", ["classical", "bundled"])
def test_a_segmenter_is_described_without_being_built(name, monkeypatch):
    wanted = open_segmenter(name).describe()
    monkeypatch.setattr(sam_models, "build", None)  # whoever builds one fails
    assert describe(name) == wanted


def test_an_old_checkpoint_is_described_too(tmp_path, monkeypatch):
    sam = tiny_sam(side=64, width=768)
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", lambda: sam)
    path = tmp_path / "old.pth"
    torch.save(sam.state_dict(), path, _use_new_zipfile_serialization=False)
    assert describe(str(path)) == open_segmenter(str(path)).describe()


def test_weights_that_only_look_like_sam_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "other.pth"
    torch.save({sam_models.WIDTH_KEY: torch.zeros(768, 3, 16, 16)}, path)
    monkeypatch.setitem(
        segment_anything.sam_model_registry, "vit_b", lambda: tiny_sam(side=64, width=768))
    with pytest.raises(ValueError, match="looks like vit_b but does not fit"):
        open_segmenter(str(path))


# -- classical -------------------------------------------------------------------------------

def ball(shape=(160, 200), centre=(47.0, 38.0), axes=(12.0, 15.0), colour=(200, 120, 80)):
    """A bright ellipse on a grey ground; and its mask."""
    y, x = np.indices(shape)
    mask = ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 <= 1
    image = np.random.default_rng(0).normal(90, 6, (*shape, 3))
    image[mask] += np.array(colour) - 90
    return image.clip(0, 255).astype(np.uint8), mask


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("point", [(47.0, 38.0), (50.0, 35.0)])
def test_active_rays_find_an_ellipse(boxed, point):
    image, mask = ball()
    points = np.array([point])
    head, pixel = nnec.incidence(points, np.array([36.0]), mask.shape)
    boxes = np.array([[34.5, 22.5, 59.5, 53.5]]) if boxed else None
    segmenter = ClassicalSegmenter()
    segmenter.set_image(image)
    logits, scores = segmenter.predict(
        Prompts(points[:, None], np.ones((1, 1), int), boxes, multimask=not boxed), head, pixel)
    found = np.zeros((len(logits), mask.size), bool)
    found[:, pixel] = logits > 0
    assert max(iou(one.reshape(mask.shape), mask) for one in found) > 0.85
    assert ((scores >= 0) & (scores <= 1)).all()


def test_active_rays_respect_the_midline_to_a_negative_point():
    image = np.full((60, 100, 3), 128, np.uint8)  # no edges: only the prompts speak
    points = np.array([[[40.0, 30.0], [60.0, 30.0]]])
    head, pixel = nnec.incidence(points[:, 0], np.array([28.0]), (60, 100))
    segmenter = ClassicalSegmenter()
    segmenter.set_image(image)
    logits, _ = segmenter.predict(Prompts(points, np.array([[1, 0]])), head, pixel)
    beyond = (pixel % 100 > 54)
    assert not (logits[:, beyond] > 0).any()


def test_each_head_is_answered_as_if_it_were_alone():
    image = picture((70, 90))
    _, coordinates, labels, head, pixel = crowd((70, 90), count=150)
    segmenter = ClassicalSegmenter()
    segmenter.set_image(image)
    logits, scores = segmenter.predict(Prompts(coordinates, labels), head, pixel)
    few = slice(140, 150)
    mine = head >= 140
    again, score = segmenter.predict(
        Prompts(coordinates[few], labels[few]), head[mine] - 140, pixel[mine])
    np.testing.assert_allclose(again, logits[:, mine], atol=1e-5)
    np.testing.assert_allclose(score, scores[few], atol=1e-6)


@pytest.mark.parametrize("segmenter", [
    ClassicalSegmenter(), SamSegmenter.from_model(tiny_sam(side=64))], ids=["classical", "sam"])
def test_segmenters_speak_the_same_protocol(segmenter):
    image = picture((30, 40))
    points, coordinates, labels, head, pixel = crowd((30, 40), count=5)
    with pytest.raises(RuntimeError, match="set_image"):
        segmenter.predict(Prompts(coordinates, labels), head, pixel)
    segmenter.set_image(image)
    for multimask, candidates in ((True, 3), (False, 1)):
        logits, scores = segmenter.predict(
            Prompts(coordinates, labels, multimask=multimask), head, pixel)
        assert logits.shape == (candidates, len(head)) and scores.shape == (5, candidates)
        assert np.isfinite(logits).all() and np.isfinite(scores).all()
    nobody = Prompts(np.zeros((0, 2, 2)), np.zeros((0, 2), int))
    none = np.zeros(0, np.int64)
    assert segmenter.predict(nobody, none, none)[0].shape == (3, 0)
    for wrong in (image[..., 0], image.astype(float), image[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            segmenter.set_image(wrong)
    assert segmenter.describe()["kind"] == segmenter.name


def test_prompts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        Prompts(np.zeros((3, 1, 2)), np.ones((2, 1), int))
    with pytest.raises(ValueError, match="boxes"):
        Prompts(np.zeros((3, 1, 2)), np.ones((3, 1), int), np.zeros((2, 4)))
