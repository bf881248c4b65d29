"""The encoder: a backbone of timm by name, its ImageNet start, and what saves it work on a CPU.

`vgg16_bn`, as in the paper; `tf_efficientnet_lite0`, for CPUs; any other that gives maps of
strides 8, 16 and 32.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from xmask.config import Network
from xmask.pretrained import initialise

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # RGB in 0..1
_NO_CLASSIFIER: dict[str, Any] = {"num_classes": 0, "mlp_ratio": 1 / 4096}  # a VGG's is large


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
        strides = (8, 16) if backbone.startswith("vgg") else (8, 16, 32)
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
