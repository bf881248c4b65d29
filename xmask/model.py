"""The network: encoder, fusion, density decoder and mask head (paper's network section).

The encoder is a backbone of timm by name: `vgg16_bn`, as in the paper; `tf_efficientnet_lite0`,
for CPUs; any other that gives maps of strides 8, 16 and 32.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import vgg
from torch import Tensor, nn
from torch.nn.utils import fusion

from xmask.config import Network
from xmask.pretrained import initialise

STRIDE = 4  # px per output cell
MULTIPLE = 32  # images are padded to a multiple of this many px
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # RGB in 0..1
_NO_CLASSIFIER: dict[str, Any] = {"num_classes": 0, "mlp_ratio": 1 / 4096}  # a VGG's is large


@dataclass(frozen=True)
class Output:
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


class Encoder(nn.Module):
    """A backbone of timm without its classifier: one map per stride, finest first.

    Strides 8 and 16 of a VGG, as in the paper; 8, 16 and 32 of any other. initialisation: how it
    started, in words. Raises ValueError for a backbone that timm does not know, or that lacks maps
    of those strides for any image size, and the errors of `xmask.pretrained.initialise`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Network, weights: str = "random"):
        super().__init__()
        backbone = config.backbone
        strides = (8, 16) if backbone == "slim" or backbone.startswith("vgg") else (8, 16, 32)
        with torch.device("meta"):  # takes no memory: only the shapes of its maps are wanted
            probe = _create(backbone).eval()
            try:
                shapes = [tuple(m.shape[-2:]) for m in probe(torch.empty(1, 3, 64, 96))]
                chosen = [shapes.index((64 // s, 96 // s)) for s in strides]
            except Exception as error:  # of many types: whatever a backbone says to this size
                raise ValueError(
                    f"network.backbone: {backbone} has no maps of strides {strides} for images of "
                    f"any size ({error}); take one such as tf_efficientnet_lite0 or resnet18"
                ) from error
        self.body = _create(backbone, tuple(probe.feature_info.out_indices[i] for i in chosen))
        self.channels: list[int] = self.body.feature_info.channels()
        scale = getattr(self.body, "pretrained_cfg", _IMAGENET)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(scale[name]).view(3, 1, 1), persistent=False)
        self.initialisation = initialise(self.body, backbone, weights)
        if config.fold_norm:
            _fold_norm(self.body)
        self.frozen = _first_layers(self.body, config.freeze_stride)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C_i, H / stride_i, W / stride_i) of images (B, 3, H, W) in 0..1."""
        return self.body((images - self.mean) / self.std)

    def requires_grad_(self, requires_grad: bool = True) -> Encoder:
        """As of any module, but the layers that `freeze_stride` names never learn."""
        super().requires_grad_(requires_grad)
        for name in self.frozen:
            self.body.get_parameter(name).requires_grad_(False)
        return self


def _create(backbone: str, out_indices: tuple[int, ...] | None = None) -> Any:
    """timm's feature extractor, randomly initialised; out_indices: which maps, None: all."""
    options: dict[str, Any] = {} if out_indices is None else {"out_indices": out_indices}
    if backbone == "slim":  # VGG16-BN at an eighth of its width
        layers = [width if width == "M" else int(width) // 8 for width in vgg.cfgs["vgg16"]]
        body = vgg.VGG(layers, norm_layer=nn.BatchNorm2d, **_NO_CLASSIFIER)
        return timm.models.FeatureListNet(body, flatten_sequential=True, **options)
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has them all"
        raise ValueError(f"network.backbone: timm knows no {backbone!r}; {hint}")
    if backbone.startswith("vgg"):
        options |= _NO_CLASSIFIER
    return timm.create_model(backbone, pretrained=False, features_only=True, **options)


def _fold_norm(body: nn.Module) -> None:
    """Fold every BatchNorm, with the statistics it has, into the convolution before it: the same
    maps with less work, and weights that learn in small batches without statistics of them."""
    for parent in list(body.modules()):
        layers = list(parent.named_children())
        for (first, convolution), (second, norm) in zip(layers, layers[1:]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                folded = fusion.fuse_conv_bn_eval(convolution.eval(), norm.eval())
                setattr(parent, first, folded)
                # timm's BatchNormAct2d holds the activation too
                setattr(parent, second, getattr(norm, "act", nn.Identity()))


def _first_layers(body: Any, stride: int) -> list[str]:
    """Names of the parameters up to the backbone's map of a stride, in its order; 0: none."""
    if stride == 0:
        return []
    last = next(m["module"] for m in body.feature_info.info if m["reduction"] == stride)
    if last not in dict(body.named_modules()):
        last = last.replace(".", "_")  # as timm's flattened extractors have it
    names, reached = [], False
    for name, module in body.named_modules():
        inside = name == last or name.startswith(f"{last}.")
        if reached and not inside:
            break
        reached |= inside
        names += [f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)]
    return names


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
            nn.Conv2d(channels, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2), nn.ReLU(inplace=True),
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

    Raises the errors of `Encoder` and of `xmask.pretrained.initialise`.
    """
    network = XMask(config, config.weights)
    return network, network.encoder.initialisation


def pad_to_multiple(images: Tensor) -> Tensor:
    """Zero-pad (B, 3, H, W) on the right and below to multiples of 32 px."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % MULTIPLE, 0, -h % MULTIPLE))
