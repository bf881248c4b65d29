"""SAM's image encoder with attention that is fused: the same function, up to rounding.

`segment_anything.modeling.ImageEncoderViT` makes the attention of all pairs of tokens, adds to it
what their rows and columns have to say in two passes over memory, and applies softmax in a third.
Here rows and columns are one mask, and torch's own attention does the rest in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    ImageEncoderViT,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn


def encode(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Image embeddings (B, C, h, w) of preprocessed images (B, 3, side, side).

    An encoder of another kind, as smaller SAMs have, is called as it is.
    """
    if not isinstance(encoder, ImageEncoderViT):
        return encoder(pixels)
    x = encoder.patch_embed(pixels)  # (B, h, w, D)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    x = x.contiguous()  # the patches' convolution leaves channels first
    for block in encoder.blocks:
        x += _attention(block, block.norm1(x))
        x += block.mlp(block.norm2(x))
    return encoder.neck(x.permute(0, 3, 1, 2))


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    """Attention of tokens (B, h, w, D) over the whole image, or within the block's windows."""
    if block.window_size == 0:
        return _attend(block.attn, x)
    windows, padded = window_partition(x, block.window_size)
    return window_unpartition(
        _attend(block.attn, windows), block.window_size, padded, x.shape[1:3])


def _attend(attention: nn.Module, x: Tensor) -> Tensor:
    batch, height, width, _ = x.shape
    qkv = attention.qkv(x).view(batch, height * width, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, h * w, c)
    mask = None
    if attention.use_rel_pos:
        grid = query.reshape(batch, -1, height, width, query.shape[-1])
        rows = get_rel_pos(height, height, attention.rel_pos_h)  # (h, h, c)
        columns = get_rel_pos(width, width, attention.rel_pos_w)
        down = torch.matmul(grid, rows.transpose(1, 2))  # (B, heads, h, w, h)
        across = torch.einsum("bnhwc,wkc->bnhwk", grid, columns)
        mask = (down[..., None] + across[..., None, :]).flatten(4).flatten(2, 3)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.proj(found.transpose(1, 2).reshape(x.shape))
