"""SAM's mask decoder for many heads of one image, at the cells that are asked for.

The same function as `segment_anything.modeling.MaskDecoder`, up to rounding, with the sums in
another order. What that decoder does for every prompt and this one does not:

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

# Prompts at once, from which more gain nothing; on a CPU only as many as have 16 MB of cells
# together: larger arrays the C library fetches from the system anew each time (ours, measured).
_AT_ONCE, _CELLS_AT_ONCE = 32, 16 << 20


class HeadDecoder:
    """Decodes prompts, each on an encoded crop of its own.

    decoder: the `mask_decoder` of a SAM. position: (1, C, h, w), the positional encoding of an
    image embedding. dense: (C,), the embedding of "no mask prompt".
    `at_once` is how many prompts one call should bring.
    """

    def __init__(self, decoder: nn.Module, position: Tensor, dense: Tensor):
        self._decoder = decoder
        self._grid = tuple(position.shape[-2:])
        self._position = position[0].flatten(1).t().contiguous()  # (P, C)
        self._dense = dense
        fit = _CELLS_AT_ONCE // (4 * position.numel()) if dense.device.type == "cpu" else _AT_ONCE
        self.at_once = max(min(fit, _AT_ONCE), 1)

    def __call__(
        self, features: Tensor, sparse: Tensor, multimask: bool, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (M, B, 4h, 4w), predicted IoU (B, M); M is 3 or 1.

        features: (B, C, h, w), the embedding of each prompt's crop; sparse: (B, K, C), its tokens.
        wanted: (n,) int64, the cells whose logits are wanted, flat indices of (B, h, w) in order;
        logits elsewhere are 0.
        """
        decoder = self._decoder
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], dim=1)
        queries, keys = self._transform(features, tokens)
        chosen = slice(1, None) if multimask else slice(0, 1)
        kinds = range(decoder.num_mask_tokens)[chosen]
        hyper = torch.stack([
            decoder.output_hypernetworks_mlps[k](queries[:, 1 + k]) for k in kinds], dim=1)
        return self._upscale(keys, hyper, wanted), (
            decoder.iou_prediction_head(queries[:, 0])[:, chosen])

    def _transform(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The two-way transformer: tokens (B, T, C) -> queries (B, T, C), keys (B, P, C)."""
        transformer = self._decoder.transformer
        keys = features.flatten(2).transpose(1, 2).contiguous() + self._dense
        seen, queries = keys + self._position, tokens
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                asking = queries + tokens
                queries = queries + layer.self_attn(q=asking, k=asking, v=queries)
            queries = layer.norm1(queries)

            queries = layer.norm2(queries + _read(
                layer.cross_attn_token_to_image, queries + tokens, seen, keys))
            queries = layer.norm3(queries + layer.mlp(queries))
            _write(layer.cross_attn_image_to_token, queries + tokens, queries, seen, keys)
            norm = layer.norm4
            keys = F.layer_norm(keys, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            seen = keys + self._position
        found = _read(transformer.final_attn_token_to_image, queries + tokens, seen, keys)
        return transformer.norm_final_attn(queries + found), keys

    def _upscale(self, keys: Tensor, hyper: Tensor, wanted: Tensor) -> Tensor:
        """Logits (M, B, 4h, 4w): of the wanted cells, 4 x 4 each, and 0 elsewhere."""
        up, norm, act, up_again, act_again = self._decoder.output_upscaling
        height, width = self._grid
        x = keys.flatten(0, 1).index_select(0, wanted)
        x = _double(up, x)  # (n, 2, 2, c)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = act_again(_double(up_again, x))  # (n, 2, 2, 2, 2, c): y, x, finer y, finer x
        prompt = torch.div(wanted, height * width, rounding_mode="floor")
        x = torch.bmm(hyper.index_select(0, prompt), x.flatten(1, 4).transpose(1, 2))  # (n, M, 16)
        x = x.view(len(wanted), -1, 2, 2, 2, 2).transpose(3, 4).reshape(len(wanted), -1, 4, 4)
        out = x.new_zeros(x.shape[1], len(keys), 4 * height, 4 * width)
        cells = out.view(-1, len(keys), height, 4, width, 4).permute(1, 2, 4, 0, 3, 5)
        place = wanted % (height * width)
        cells[prompt, torch.div(place, width, rounding_mode="floor"), place % width] = x
        return out


def _heads(x: Tensor, number: int) -> Tensor:
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.unflatten(-1, (number, -1)).transpose(-3, -2)


def _join(x: Tensor) -> Tensor:
    """(..., heads, n, c) -> (..., n, heads * c)."""
    return x.transpose(-3, -2).flatten(-2)


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
    attention: nn.Module, asked: Tensor, queries: Tensor, seen: Tensor, keys: Tensor
) -> None:
    """Add to image cells `keys` (B, P, C), in place, what they, as `seen`, read from the tokens
    `asked` and `queries` (B, T, C)."""
    number = attention.num_heads
    key, value = _heads(attention.k_proj(asked), number), _heads(attention.v_proj(queries), number)
    each = key.shape[-1]
    key = key / math.sqrt(each)  # (B, heads, T, c)
    folded = torch.matmul(key, attention.q_proj.weight.view(number, each, -1)).flatten(1, 2)
    offset = torch.matmul(key, attention.q_proj.bias.view(number, each, 1)).flatten(1, 2)
    score = torch.baddbmm(offset, folded, seen.transpose(1, 2))  # (B, heads * T, P)
    # Softmax over the tokens with the cells last: it is slow along so short an axis.
    weight = torch.softmax(score.unflatten(1, (number, -1)), dim=2).flatten(1, 2)
    told = torch.matmul(value, attention.out_proj.weight.t().reshape(number, each, -1))
    told = told + attention.out_proj.bias / number  # each head's weights add up to 1
    keys.baddbmm_(weight.transpose(1, 2), told.flatten(1, 2))


def _double(up: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2, on cells: (..., c) -> (..., 2, 2, d)."""
    weight = up.weight.permute(0, 2, 3, 1)  # (c, 2, 2, d)
    return torch.matmul(x, weight.flatten(1)).unflatten(-1, weight.shape[1:]) + up.bias
