"""The network: encoder, fusion, density decoder and mask head (paper's network section).

The encoder is a backbone of timm by name: `vgg16_bn`, as in the paper; `tf_efficientnet_lite0`,
for CPUs; any other that gives maps of strides 8, 16 and 32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmask.config import Network
from xmask.encoder import Encoder

STRIDE = 4  # px per output cell
MULTIPLE = 32  # images are padded to a multiple of this many px


class Output(NamedTuple):
    """Of a batch, at stride 4: the person logit of every cell (B, h, w), and the embedding
    (B, D, h, w), of unit length along D, or None where masks were not asked for."""

    logits: Tensor
    embedding: Tensor | None


class XMask(nn.Module):
    """Image batch (B, 3, H, W), float in 0..1, H and W multiples of 32 -> `Output`."""

    def __init__(self, config: Network, weights: str = "random"):
        """weights: how the encoder starts, as of `xmask.pretrained.initialise`."""
        super().__init__()
        self.encoder = Encoder(config, weights)
        c = config.channels
        self.fusion = Fusion(self.encoder.channels, c)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(c, 8, 3, padding=1), nn.PixelShuffle(2),
        )
        self.mask_head = MaskHead(c, config.embedding)

    def forward(self, images: Tensor, masks: bool = True, grid: Tensor | None = None) -> Output:
        """Logits (B, H/4, W/4) and embedding (B, D, H/4, W/4), or None without `masks`, of images
        (B, 3, H, W) in 0..1. grid: (2, H / 8, W / 8) coordinates, see `coordinates`, where the
        images are pieces of a larger one; None: they are whole."""
        fused = self.fusion(self.encoder(images))
        density = self.decoder(fused)
        embedding = self.mask_head(fused, grid) if masks else None
        return Output(density[:, 1] - density[:, 0], embedding)


class Fusion(nn.Module):
    """All maps to one width, the coarser ones upsampled and added, one 3×3 convolution."""

    def __init__(self, inputs: list[int], channels: int):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in inputs)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(B, channels, H/8, W/8) of the encoder's maps, finest first."""
        fused, *coarser = [project(m) for project, m in zip(self.project, maps)]
        for m in coarser:
            fused = fused + F.interpolate(m, size=fused.shape[-2:], mode="bilinear")
        return self.mix(fused)


class MaskHead(nn.Module):
    """Coordinates appended, two conv-BN-ReLU, ×2 by pixel shuffle, unit-length embedding."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()

        def block(inputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True)]

        self.layers = nn.Sequential(
            *block(channels + 2), *block(channels),
            nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2),
            nn.ReLU(inplace=True), nn.Conv2d(channels, embedding, 1))

    def forward(self, features: Tensor, grid: Tensor | None = None) -> Tensor:
        """Embedding (B, D, 2h, 2w) float32 of unit length, of fused features (B, channels, h, w);
        grid: (2, h, w), see `coordinates`."""
        b, _, h, w = features.shape
        if grid is None:
            grid = coordinates(h, w, features.device)
        grid = grid.to(features).expand(b, -1, -1, -1)
        # unit length in float32 also under autocast: distances of near neighbours matter
        return F.normalize(self.layers(torch.cat([features, grid], 1)).float(), dim=1)


def coordinates(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(2, height, width): row and column of every feature cell, from -1 to 1 over the image."""
    y, x = (torch.linspace(-1, 1, side, device=device) for side in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


def build(config: Network) -> tuple[XMask, str]:
    """A fresh network and how its encoder was initialised, to be recorded with every result.

    Raises the errors of `Encoder` and of `xmask.pretrained.initialise`.
    """
    network = XMask(config, config.weights)
    return network, network.encoder.initialisation


def pad_to_multiple(images: Tensor) -> Tensor:
    """Zero-pad (B, 3, H, W) on the right and below to multiples of 32 px."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % MULTIPLE, 0, -h % MULTIPLE))
