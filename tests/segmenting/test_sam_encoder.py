"""The encoder with fused attention gives the library's embeddings."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from xmask.segmenting.sam_encoder import encode


@pytest.mark.parametrize("window", [2, 3])  # of 4 x 4 tokens: windows that fit, and padded ones
@pytest.mark.parametrize("relative", [False, True])
def test_embeddings_are_those_of_the_library(window, relative):
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=8,
        use_rel_pos=relative, window_size=window, global_attn_indexes=(1,)).eval()
    for name, value in encoder.named_parameters():
        if "pos" in name:  # the library starts them at 0
            torch.nn.init.normal_(value)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encode(encoder, pixels), encoder(pixels), atol=1e-5, rtol=1e-5)
