"""SAM's mask decoder for many heads of one image, at the cells that are asked for.

The same function as `segment_anything.modeling.MaskDecoder`, up to rounding, with the sums in
another order. What that decoder does for every prompt and this one does not:

- In the first layer all prompts see the same image: its projections are made once.
- Between T tokens and P image cells, a projection of the cells costs P * C * C / 2 operations;
  projecting the few tokens instead, (W k) . q = k . (W' q), costs P * C * T * heads of them, which
  is less, as T is about 7. The other way round likewise: the sum over tokens of attention times
  W v is attention times (W v), with W v made once a token.
- The upscaling to 256 x 256 works on every cell by itself, so it is done at the cells whose
  values are read, in and around each head's circle.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Prompts at once on a CPU: their cells, 4 MB each, then stay below the size from which the C
# library asks the system for fresh pages (ours, measured). An accelerator takes all.
_AT_ONCE = 4


class HeadDecoder:
    """Decodes prompts on one encoded image.

    decoder: the `mask_decoder` of a SAM. features, position: (1, C, h, w), the image embedding
    and its positional encoding. dense: (C,), the embedding of "no mask prompt".
    """

    def __init__(self, decoder: nn.Module, features: Tensor, position: Tensor, dense: Tensor):
        self._decoder = decoder
        self._grid = tuple(features.shape[-2:])
        self._keys = features[0].flatten(1).t() + dense  # (P, C)
        self._position = position[0].flatten(1).t()
        first = decoder.transformer.layers[0]
        seen = self._keys + self._position
        into, out = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        self._first = tuple(_heads(x, into.num_heads).contiguous() for x in (
            into.k_proj(seen), into.v_proj(self._keys), out.q_proj(seen)))  # (heads, P, c)

    @torch.no_grad()
    def __call__(
        self, sparse: Tensor, multimask: bool, head: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (B, M, 4h, 4w), predicted IoU (B, M); M is 3 or 1.

        sparse: (B, K, C) prompt embeddings. head, row, column: (n,) the cells of the h x w grid
        that are wanted; logits elsewhere are 0.
        """
        count = len(sparse)
        masks = 3 if multimask else 1
        height, width = self._grid
        logits = sparse.new_zeros(count, masks, 4 * height, 4 * width)
        scores = sparse.new_empty(count, masks)
        step = _AT_ONCE if sparse.device.type == "cpu" else count
        cell = (head * height + row) * width + column
        cell = torch.unique(cell)  # sorted: by prompt
        limits = torch.searchsorted(
            cell, torch.arange(count + 1, device=cell.device) * (height * width)).tolist()
        for start in range(0, count, step):
            stop = min(start + step, count)
            wanted = cell[limits[start]:limits[stop]] - start * height * width
            scores[start:stop] = self._some(
                sparse[start:stop], multimask, wanted, logits[start:stop])
        return logits, scores

    def _some(self, sparse: Tensor, multimask: bool, wanted: Tensor, out: Tensor) -> Tensor:
        decoder = self._decoder
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], dim=1)
        queries, keys = self._transform(tokens)
        chosen = slice(1, None) if multimask else slice(0, 1)
        kinds = range(decoder.num_mask_tokens)[chosen]
        hyper = torch.stack([
            decoder.output_hypernetworks_mlps[k](queries[:, 1 + k]) for k in kinds], dim=1)
        self._upscale(keys, hyper, wanted, out)
        return decoder.iou_prediction_head(queries[:, 0])[:, chosen]

    def _transform(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The two-way transformer: tokens (B, T, C) -> queries (B, T, C), keys (B, P, C)."""
        transformer = self._decoder.transformer
        queries, keys, seen = tokens, self._keys, None
        for number, layer in enumerate(transformer.layers):
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                asking = queries + tokens
                queries = queries + layer.self_attn(q=asking, k=asking, v=queries)
            queries = layer.norm1(queries)

            attention = layer.cross_attn_token_to_image
            if number == 0:
                found = _read_shared(attention, queries + tokens, *self._first[:2])
            else:
                found = _read(attention, queries + tokens, seen, keys)
            queries = layer.norm2(queries + found)
            queries = layer.norm3(queries + layer.mlp(queries))

            keys = _write(layer.cross_attn_image_to_token, queries + tokens, queries,
                          self._first[2] if number == 0 else seen, keys, shared=number == 0)
            norm = layer.norm4
            keys = F.layer_norm(keys, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            seen = keys + self._position
        found = _read(transformer.final_attn_token_to_image, queries + tokens, seen, keys)
        return transformer.norm_final_attn(queries + found), keys

    def _upscale(self, keys: Tensor, hyper: Tensor, wanted: Tensor, out: Tensor) -> None:
        """Logits of the wanted cells, 4 x 4 each, into `out` (B, M, 4h, 4w)."""
        up, norm, act, up_again, act_again = self._decoder.output_upscaling
        height, width = self._grid
        x = keys.flatten(0, 1).index_select(0, wanted)
        x = _double(up, x)  # (n, 2, 2, c)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = act_again(_double(up_again, x))  # (n, 2, 2, 2, 2, c): y, x, finer y, finer x
        prompt = torch.div(wanted, height * width, rounding_mode="floor")
        x = torch.bmm(x.reshape(len(wanted), 16, x.shape[-1]),
                      hyper.index_select(0, prompt).transpose(1, 2))  # (n, 16, M)
        x = x.view(len(wanted), 2, 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(len(wanted), -1, 4, 4)
        cells = out.view(len(out), -1, height, 4, width, 4).permute(0, 2, 4, 1, 3, 5)
        place = wanted % (height * width)
        cells[prompt, torch.div(place, width, rounding_mode="floor"), place % width] = x


def _heads(x: Tensor, number: int) -> Tensor:
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.unflatten(-1, (number, -1)).transpose(-3, -2)


def _join(x: Tensor) -> Tensor:
    """(..., heads, n, c) -> (..., n, heads * c)."""
    return x.transpose(-3, -2).flatten(-2)


def _read_shared(attention: nn.Module, asking: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Tokens (B, T, C) read image cells whose projections (heads, P, c) all prompts share."""
    query = _heads(attention.q_proj(asking), attention.num_heads)  # (B, heads, T, c)
    batch, heads, count, each = query.shape
    query = query.transpose(0, 1).reshape(heads, batch * count, each) / math.sqrt(each)
    weight = torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)
    read = torch.bmm(weight, value).view(heads, batch, count, each).transpose(0, 1)
    return attention.out_proj(_join(read))


def _read(attention: nn.Module, asking: Tensor, seen: Tensor, keys: Tensor) -> Tensor:
    """Tokens (B, T, C) read the image cells of their own prompt, `seen` and `keys` (B, P, C)."""
    number = attention.num_heads
    query = _heads(attention.q_proj(asking), number)
    batch, heads, count, each = query.shape
    # q . (W k + b) = (W' q) . k + q . b; the last term is the same for all cells: softmax drops it
    weights = attention.k_proj.weight.view(heads, each, -1)
    folded = torch.matmul(query / math.sqrt(each), weights).flatten(1, 2)  # (B, heads * T, C)
    weight = torch.softmax(torch.bmm(folded, seen.transpose(1, 2)), dim=-1)
    read = torch.bmm(weight, keys).view(batch, heads, count, -1)
    weights = attention.v_proj.weight.view(heads, each, -1)
    read = torch.matmul(read, weights.transpose(1, 2)) + attention.v_proj.bias.view(heads, 1, each)
    return attention.out_proj(_join(read))


def _write(
    attention: nn.Module, seen: Tensor, queries: Tensor, asking: Tensor, keys: Tensor,
    *, shared: bool,
) -> Tensor:
    """Image cells read the tokens; (B, P, C), the cells plus what they read.

    asking: the cells with their position (B, P, C); shared: their projection (heads, P, c).
    """
    number = attention.num_heads
    key = _heads(attention.k_proj(seen), number)  # (B, heads, T, c)
    batch, heads, count, each = key.shape
    key = key / math.sqrt(each)
    if shared:
        cells = asking.shape[1]
        score = torch.matmul(asking, key.transpose(2, 3))  # (B, heads, P, T)
        weight = torch.softmax(score, dim=-1).transpose(1, 2).reshape(batch, cells, -1)
    else:
        weights = attention.q_proj.weight.view(heads, each, -1)
        folded = torch.matmul(key, weights).flatten(1, 2)  # (B, heads * T, C)
        offset = (key * attention.q_proj.bias.view(heads, 1, each)).sum(-1).view(batch, 1, -1)
        score = torch.baddbmm(offset, asking, folded.transpose(1, 2))
        weight = torch.softmax(score.unflatten(-1, (heads, count)), dim=-1).flatten(-2)
    value = _heads(attention.v_proj(queries), number)
    out = attention.out_proj.weight.t().reshape(heads, each, -1)
    told = torch.matmul(value, out).flatten(1, 2)  # (B, heads * T, C)
    keys = (keys + attention.out_proj.bias).expand(batch, -1, -1)
    return torch.baddbmm(keys, weight, told)


def _double(up: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2, on cells: (..., c) -> (..., 2, 2, d)."""
    weight = up.weight.permute(0, 2, 3, 1)  # (c, 2, 2, d)
    return torch.matmul(x, weight.flatten(1)).unflatten(-1, weight.shape[1:]) + up.bias
