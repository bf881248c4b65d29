"""What one image costs with SAM ViT-B: its real architecture, through the same path as any SAM.

Weights are random, so the masks mean nothing, but time and memory do not depend on what the
weights are: the number of crops follows the heads, and every head is decoded whatever comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xmask.bench import measure

SHAPE, HEADS = (256, 384), 30


def edp_sam(heads: int, shape: tuple[int, int], model: str = "vit_b"
            ) -> Callable[[], dict[str, Any]]:
    """A call of `generate_masks` with SAM: seconds of "encoder", "prompts" and all, crops, heads
    with a mask."""
    import time

    import torch
    from segment_anything import sam_model_registry

    from xmask.edp_sam import generate_masks
    from xmask.segmenting.sam_segmenter import SamSegmenter
    from xmask.synthetic import draw_scene

    torch.manual_seed(0)
    segmenter = SamSegmenter.from_model(sam_model_registry[model]())
    scene = draw_scene(0, shape=shape, people=heads)

    def call() -> dict[str, Any]:
        segmenter.set_image(np.zeros((1, 1, 3), np.uint8))  # forget what an earlier call encoded
        began = time.perf_counter()
        _, table = generate_masks(scene.image, scene.points, segmenter)
        return {"seconds": time.perf_counter() - began, **segmenter.seconds,
                "crops": segmenter.encoded, "with_mask": int((table["area"] > 0).sum())}

    return call


def run(*, threads: int, heads: int = HEADS, shape: tuple[int, int] = SHAPE,
        model: str = "vit_b") -> dict[str, Any]:
    """Measure it once, in a process of its own: the numbers of `edp_sam`, and peak memory (bytes,
    above the model and the image)."""
    side = measure.alternate(
        [(edp_sam, {"heads": heads, "shape": shape, "model": model})], threads=threads, runs=1)[0]
    return {"model": model, "shape": list(shape), "heads": heads, "threads": threads,
            **side.result, "peak": side.peak}


def lines(found: dict[str, Any]) -> list[str]:
    """The numbers as a section of the page."""
    rest = found["seconds"] - found["encoder"] - found["prompts"]
    height, width = found["shape"]
    return [
        "", "## One image with SAM ViT-B", "",
        f"EDP-SAM with {found['model']}, random weights, on a drawn scene of {width}×{height} with "
        f"{found['heads']} heads, {found['threads']} threads, one run. Every head was prompted; "
        f"{found['with_mask']} have a mask. Peak memory is above model and image.", "",
        "| crops encoded | encoder | a crop | prompts | a head | all the rest | together "
        "| memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {found['crops']} | {found['encoder']:.1f} s "
        f"| {found['encoder'] / max(found['crops'], 1):.2f} s | {found['prompts']:.1f} s "
        f"| {1000 * found['prompts'] / found['heads']:.0f} ms | {rest:.1f} s "
        f"| {found['seconds']:.1f} s | {found['peak'] / 1e9:.2f} GB |"]
