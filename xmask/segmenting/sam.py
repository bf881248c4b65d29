"""Segment Anything models: building, loading, and decoding many heads of many crops at once.

Two kinds come in here, both made of the modules of `segment_anything`, so that its own
`SamPredictor` works with either: the original release (ViT-B, L, H) from a checkpoint file, and
the **bundled SAM**, a small configuration trained by this project on its synthetic crowds
(`xmask.segmenting.sam_training`) and shipped with the package. The paper uses the original; the
bundled one is ours, for where the original cannot be had.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from xmask import files

BUNDLED = Path(__file__).parents[1] / "weights" / "bundled_sam.safetensors"

# Width of the image encoder tells the published models apart (segment_anything, build_sam.py).
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
WIDTH_KEY = "image_encoder.patch_embed.proj.weight"
REMEDY = (
    "give a checkpoint of the original Segment Anything release (sam_vit_b, sam_vit_l or "
    "sam_vit_h), or use the segmenter 'bundled' or 'classical'")
AGAIN = "install the package again, or train it anew with `xmask train-sam --overwrite`"

# The bundled SAM: 16 x 16 tokens of 8 px, masks of 64 x 64. A crop is enlarged until a head
# spans a few tokens, so a small input loses nothing and an image costs seconds on a CPU.
SMALL = {"side": 128, "patch": 8, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 3.0,
         "window": 8, "global_blocks": [1, 3], "channels": 64, "decoder_mlp": 256,
         "decoder_heads": 4}


def build(side: int, patch: int, width: int, depth: int, heads: int, mlp_ratio: float,
          window: int, global_blocks: list[int], channels: int, decoder_mlp: int,
          decoder_heads: int) -> torch.nn.Module:
    """A `segment_anything.modeling.Sam` with random weights in any configuration.

    side: px of its square input; patch: px of a token; width, depth, heads, mlp_ratio: of the
    image encoder, whose attention is global in the blocks `global_blocks` and within windows of
    `window` x `window` tokens in the others; channels: of image embedding and decoder (masks have
    4 * side / patch cells a side); decoder_mlp, decoder_heads: of its two-way transformer.
    """
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    cells = side // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
            mlp_ratio=mlp_ratio, out_chans=channels, use_rel_pos=True, window_size=window,
            global_attn_indexes=tuple(global_blocks),
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)),
        prompt_encoder=PromptEncoder(
            embed_dim=channels, image_embedding_size=(cells, cells),
            input_image_size=(side, side), mask_in_chans=8),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer_dim=channels, iou_head_hidden_dim=channels,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=channels, mlp_dim=decoder_mlp, num_heads=decoder_heads)),
    ).eval()


def save_bundled(model: torch.nn.Module, architecture: dict[str, Any], training: dict[str, Any],
                 path: Path = BUNDLED) -> None:
    """Write weights (float16) and, beside them, a .json with sha256, architecture, training."""
    state = {name: value.detach().to("cpu", torch.float16).contiguous()
             for name, value in model.state_dict().items()}
    with files.replacing(path) as temporary:
        save_file(state, temporary)
    files.write_json(path.with_suffix(".json"), {
        "file": path.name, "sha256": files.sha256(path), "bytes": path.stat().st_size,
        "architecture": architecture, "training": training})


def check_out(path: Path, overwrite: bool = False) -> None:
    """Raises ValueError or FileExistsError where weights, and their record, cannot be written."""
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: the record of the weights gets this name. Give one that ends in "
                         ".safetensors (--out)")
    for one in (path, path.with_suffix(".json")):
        files.check_new(one, overwrite)


def bundled_record(path: Path = BUNDLED) -> dict[str, Any]:
    """What lies beside the bundled weights: file, sha256, architecture, how they were trained.

    Raises FileNotFoundError if one of the two is not there, ValueError if the weights are others
    than those of the record.
    """
    record_path = path.with_suffix(".json")
    for one in (path, record_path):
        if not one.is_file():
            raise FileNotFoundError(f"{one}: the bundled SAM is not there; {AGAIN}")
    record = files.read_json(record_path)
    found = files.sha256(path)
    if found != record["sha256"]:
        raise ValueError(
            f"{path}: sha256 {found[:12]}..., but {record_path.name} records "
            f"{record['sha256'][:12]}...: the file is truncated or another one; {AGAIN}")
    return record


def load_bundled(path: Path = BUNDLED) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The bundled SAM in float32, and its record.

    Raises what `bundled_record` raises, and ValueError if weights and architecture do not fit.
    """
    record = bundled_record(path)
    model = build(**record["architecture"])
    try:
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit the architecture in {path.with_suffix('.json').name} "
            f"({str(error).splitlines()[1].strip()[:200]}); {AGAIN}") from None
    return model, record


def load_original(path: Path, model_type: str | None = None) -> tuple[torch.nn.Module, str]:
    """The model in a checkpoint of the original release, and its type ("vit_b", ...).

    model_type: what it has to be; None takes what the weights are.
    Raises ValueError that says what the file is instead.
    """
    from segment_anything import sam_model_registry

    state = _read_state(path)
    inferred = _type_of(state, path)
    if model_type is not None and model_type != inferred:
        raise ValueError(
            f"{path}: model type {model_type!r} was asked for, but the weights are {inferred!r} "
            f"(image encoder {state[WIDTH_KEY].shape[0]} wide); leave the type out, or give the "
            "other file")
    model = sam_model_registry[inferred]()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(
            f"{path}: looks like {inferred} but does not fit it ({' '.join(lines)[:300]}); "
            f"{REMEDY}") from None
    return model, inferred


def model_type(path: Path) -> str:
    """The type ("vit_b", ...) of a checkpoint of the original release, from its names and shapes
    alone. Raises ValueError that says what the file is instead."""
    return _type_of(_read_state(path, lazily=True), path)


def _type_of(state: Any, path: Path) -> str:
    if not isinstance(state, dict) or WIDTH_KEY not in state:
        found = (f"a dictionary with {', '.join(map(repr, list(state)[:3])) or 'nothing'}"
                 if isinstance(state, dict) else f"a {type(state).__name__}")
        raise ValueError(
            f"{path}: not a SAM state dict: found {found}, and no {WIDTH_KEY!r}; {REMEDY}")
    width = state[WIDTH_KEY].shape[0]
    if width not in WIDTHS:
        raise ValueError(
            f"{path}: an image encoder {width} wide belongs to no known SAM "
            f"({', '.join(f'{t} is {w}' for w, t in WIDTHS.items())}); {REMEDY}")
    return WIDTHS[width]


def _read_state(path: Path, lazily: bool = False) -> Any:
    """What a checkpoint holds; lazily: values stay in the file until somebody reads them."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as archive:
                return {name: archive.get_tensor(name) for name in archive.keys()}
        lazily = lazily and zipfile.is_zipfile(path)  # an old file has to be read whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # every way a file can be broken raises a different one
        reason = str(error).strip().splitlines()
        kind = "safetensors" if isinstance(error, SafetensorError) else type(error).__name__
        raise ValueError(
            f"{path}: not a readable checkpoint of {path.stat().st_size} bytes "
            f"({kind}: {reason[0] if reason else 'no reason given'}). It is "
            f"truncated or of another kind: download it again, or {REMEDY}") from None


def decode(
    model: torch.nn.Module, features: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's mask decoder for prompts that each have an image embedding of their own.

    features: (B, D, h, w), the embedding of the crop of each prompt. sparse: (B, K, D), dense:
    (B, D, h, w), from the prompt encoder. Returns logits (B, 4, 4h, 4w) and predicted IoU
    (B, 4); the first mask is SAM's single answer, the other three its answers to an ambiguous
    prompt. The library's own forward pass takes one image at a time, which is slow where every
    crop holds a handful of heads; this is the same computation.
    """
    decoder = model.mask_decoder
    count, channels, rows, columns = features.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(count, -1, -1), sparse], dim=1)
    position = model.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    state, image = decoder.transformer(features + dense, position, tokens)
    image = image.transpose(1, 2).reshape(count, channels, rows, columns)
    upscaled = decoder.output_upscaling(image)
    masks = torch.stack([
        mlp(state[:, 1 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    logits = torch.einsum("bkc,bchw->bkhw", masks, upscaled)
    return logits, decoder.iou_prediction_head(state[:, 0])
