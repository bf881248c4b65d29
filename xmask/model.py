"""The network: VGG16-BN encoder, fusion, density decoder and mask head (paper's network section).

Two backbones of one shape: `vgg16_bn`, as in the paper, and `slim`, the same layers at an eighth
of the width, for CPUs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmask.config import Network

STRIDE = 4  # px per output cell
MULTIPLE = 32  # images are padded to a multiple of this many px
_LAYERS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # VGG16
_MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB in 0..1
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Output:
    """What the network says of a batch.

    logits: (B, h, w), the person logit of every cell at stride 4.
    embedding: (B, D, h, w), unit length along D, or None where masks were not asked for.
    """

    logits: Tensor
    embedding: Tensor | None


class XMask(nn.Module):
    """Image batch (B, 3, H, W), float in 0..1, H and W multiples of 32 -> `Output`."""

    def __init__(self, config: Network):
        super().__init__()
        width = 1 if config.backbone == "vgg16_bn" else 1 / 8
        self.encoder = Encoder(width)
        c = config.channels
        self.fusion = Fusion(self.encoder.fine, self.encoder.coarse, c)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, 8, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.mask_head = MaskHead(c, config.embedding)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, masks: bool = True, grid: Tensor | None = None) -> Output:
        """Logits (B, H/4, W/4) and embedding (B, D, H/4, W/4), or None without `masks`, of images
        (B, 3, H, W) in 0..1. grid: (2, H / 8, W / 8) coordinates, see `coordinates`, where the
        images are pieces of a larger one; None: they are whole."""
        fused = self.fusion(*self.encoder((images - self.mean) / self.std))
        density = self.decoder(fused)
        embedding = self.mask_head(fused, grid) if masks else None
        return Output(density[:, 1] - density[:, 0], embedding)


class Encoder(nn.Module):
    """VGG16-BN: block 4 before its pooling (stride 8) and block 5 (stride 16)."""

    def __init__(self, width: float = 1):
        super().__init__()
        blocks, inputs = [], 3
        for index, widths in enumerate(_LAYERS):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for full in widths:
                outputs = int(full * width)
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                inputs = outputs
            blocks.append(nn.Sequential(*layers))
        self.to_fine = nn.Sequential(*blocks[:4])
        self.to_coarse = blocks[4]
        self.fine, self.coarse = int(_LAYERS[3][-1] * width), int(_LAYERS[4][-1] * width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Fine (B, 512, H/8, W/8) and coarse (B, 512, H/16, W/16) maps of images (B, 3, H, W);
        the slim encoder has fewer channels."""
        fine = self.to_fine(images)
        return fine, self.to_coarse(fine)


class Fusion(nn.Module):
    """Both maps to one width, the coarse one upsampled and added, one 3×3 convolution."""

    def __init__(self, fine: int, coarse: int, channels: int):
        super().__init__()
        self.fine = nn.Conv2d(fine, channels, 1)
        self.coarse = nn.Conv2d(coarse, channels, 1)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, channels, H/8, W/8) of the encoder's two maps."""
        upsampled = F.interpolate(self.coarse(coarse), size=fine.shape[-2:], mode="bilinear")
        return self.mix(self.fine(fine) + upsampled)


class MaskHead(nn.Module):
    """Coordinates appended, two conv-BN-ReLU, ×2 by pixel shuffle, unit-length embedding."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()

        def block(inputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]

        self.layers = nn.Sequential(
            *block(channels + 2),
            *block(channels),
            nn.Conv2d(channels, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, embedding, 1),
        )

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

    "imagenet" weights that cannot be reached leave the encoder random, with a warning. Raises
    FileNotFoundError or ValueError for a weight file that is missing or of another network.
    """
    network = XMask(config)
    if config.weights == "random":
        return network, "random"
    if config.weights == "imagenet":
        if config.backbone != "vgg16_bn":
            raise ValueError(
                "network.weights: ImageNet weights exist for vgg16_bn only; "
                f"use network.weights='random' with {config.backbone}"
            )
        from torchvision.models import VGG16_BN_Weights

        try:
            state = VGG16_BN_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            warnings.warn(
                f"ImageNet weights are out of reach ({error}); the encoder starts random, so "
                "expect results well below the published ones. Give the file with "
                "network.weights=/path/to/vgg16_bn.pth",
                stacklevel=2,
            )
            return network, "random (ImageNet weights out of reach)"
        _load_encoder(network.encoder, state, "ImageNet weights")
        return network, "ImageNet (torchvision VGG16_BN IMAGENET1K_V1)"

    path = Path(config.weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"network.weights: {path} does not exist; give 'imagenet', 'random', or the path of "
            "a torchvision VGG16-BN state dict"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, none of them helpful alone
        raise ValueError(
            f"{path}: not a readable state dict ({type(error).__name__}: {error}); download it "
            "again, or save it with torch.save(model.state_dict(), path)"
        ) from error
    _load_encoder(network.encoder, state, str(path))
    from xmask.files import sha256

    return network, f"{path.name} (sha256 {sha256(path)})"


def _load_encoder(encoder: Encoder, state: dict, source: str) -> None:
    """Copy torchvision's `features.*` into the encoder: same layers, other grouping."""
    theirs = [value for key, value in state.items() if key.startswith("features.")]
    ours = encoder.state_dict()
    if len(theirs) == len(ours) * 5 // 6:  # a state dict older than num_batches_tracked
        ours = {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")}
    shapes = [tuple(value.shape) for value in ours.values()]
    if [tuple(getattr(value, "shape", ())) for value in theirs] != shapes:
        raise ValueError(
            f"{source}: not a VGG16-BN state dict of torchvision (its `features.*` do not match "
            f"the {sum(len(w) for w in _LAYERS)} convolutions of the encoder); with the slim "
            "backbone use network.weights='random'"
        )
    encoder.load_state_dict(dict(zip(ours, theirs)), strict=False)


def pad_to_multiple(images: Tensor) -> Tensor:
    """Zero-pad (B, 3, H, W) on the right and below to multiples of 32 px."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % MULTIPLE, 0, -h % MULTIPLE))
