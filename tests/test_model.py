"""The network has the paper's shape, whatever its backbone."""

import copy

import pytest
import torch
from torchvision.models import vgg16_bn

from xmask import model
from xmask.config import Network
from xmask.encoder import Encoder
from xmask.pretrained import copy_weights

PAPER = Network(weights="random")
LITE = Network(backbone="tf_efficientnet_lite0", channels=16, weights="random")


@pytest.mark.parametrize("config", [PAPER, LITE])
def test_output_is_a_logit_and_a_unit_embedding_per_cell_of_stride_four(config):
    network, _ = model.build(config)
    output = network.eval()(torch.rand(2, 3, 64, 96))
    assert output.logits.shape == (2, 16, 24)
    assert output.embedding.shape == (2, 16, 16, 24)
    assert torch.allclose(output.embedding.norm(dim=1), torch.ones(2, 16, 24), atol=1e-5)
    assert network(torch.rand(1, 3, 32, 32), masks=False).embedding is None


def test_the_encoder_is_vgg16_bn():
    theirs = vgg16_bn(weights=None).eval()
    ours = Encoder(PAPER)
    for module in theirs.modules():  # statistics of their own, so that none is left out unseen
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    copy_weights(ours.body, theirs.state_dict(), "test")
    image = torch.rand(1, 3, 64, 64)
    scaled = (image - ours.mean) / ours.std
    for encoder in (ours.eval(), copy.deepcopy(ours)):  # the teacher is a copy
        with torch.no_grad():
            fine, coarse = encoder(image)
            assert fine.shape == (1, 512, 8, 8) and coarse.shape == (1, 512, 4, 4)
            assert torch.allclose(fine, theirs.features[:33](scaled), atol=1e-5)
            assert torch.allclose(coarse, theirs.features[:43](scaled), atol=1e-5)


@pytest.mark.parametrize("backbone, channels", [
    ("tf_efficientnet_lite0", [40, 112, 320]), ("tf_efficientnet_lite1", [40, 112, 320]),
    ("tf_efficientnet_lite2", [48, 120, 352]), ("resnet18", [128, 256, 512]),
])
def test_backbones_but_vgg_give_strides_8_16_and_32_and_all_are_fused(backbone, channels):
    network = model.XMask(Network(backbone=backbone, channels=16, weights="random"))
    assert network.encoder.channels == channels
    maps = network.encoder(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, channels[i], 64 >> 3 + i, 96 >> 3 + i) for i in range(3)]
    network(torch.rand(2, 3, 64, 96)).logits.sum().backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in network.fusion.project)


@pytest.mark.parametrize("backbone", ["vgg16_bn", "tf_efficientnet_lite0"])
def test_images_are_scaled_as_the_backbone_expects(backbone):
    encoder = Encoder(Network(backbone=backbone))
    seen = []
    encoder.body.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]))
    low, high = ((-2.1179, -2.0357, -1.8044), (2.2489, 2.4286, 2.64)) \
        if backbone == "vgg16_bn" else ((-1,) * 3, (1,) * 3)
    assert torch.allclose(seen[0][0, :, 0, 0], torch.tensor(low).float(), atol=1e-4)
    assert torch.allclose(seen[0][1, :, 0, 0], torch.tensor(high).float(), atol=1e-4)


@pytest.mark.parametrize("backbone, message", [
    ("tf_efficientnet_lit0", "timm knows no 'tf_efficientnet_lit0'; did you mean tf_efficientnet_l"),
    ("zzz", "timm knows no 'zzz'; timm.list_models"),
    ("vit_tiny_patch16_224", r"vit_tiny_patch16_224 has no maps of strides \(8, 16, 32\)"),
    ("swin_tiny_patch4_window7_224", "has no maps of strides"),
])
def test_a_backbone_that_cannot_be_used_is_refused(backbone, message):
    with pytest.raises(ValueError, match=f"network.backbone: .*{message}"):
        model.XMask(Network(backbone=backbone))


def with_statistics(network):
    """The same network, BatchNorm as after some training."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return network


@pytest.mark.parametrize("backbone", [
    "tf_efficientnet_lite0", "resnet18", "vgg16_bn", "mobilenetv3_small_050"])
def test_folded_batchnorm_gives_the_same_maps(backbone, tmp_path):
    plain = with_statistics(Encoder(Network(backbone=backbone))).eval()
    torch.save(plain.body.state_dict(), tmp_path / "weights.pth")
    config = Network(backbone=backbone, fold_norm=True)
    folded = Encoder(config, str(tmp_path / "weights.pth"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    image = torch.rand(2, 3, 64, 96)
    for mine, theirs in zip(folded.train()(image), plain(image), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("change", [{"fold_norm": True}, {"freeze_stride": 4}])
def test_random_weights_are_neither_folded_nor_frozen(change):
    with pytest.raises(ValueError, match="weights: random, but .* set fold_norm=false and freeze"):
        Network(weights="random", **change)


@pytest.mark.parametrize("backbone, last", [
    ("tf_efficientnet_lite0", "blocks.1.1.conv_pwl"), ("resnet18", "layer1.1.conv2"),
    ("vgg16_bn", "features_20")])
def test_the_first_layers_keep_their_weights_and_the_others_learn(backbone, last):
    config = Network(backbone=backbone, channels=16, fold_norm=True, freeze_stride=4)
    network = model.XMask(config)
    assert network.encoder.frozen[-1] == f"{last}.bias"
    for _ in range(2):  # frozen in one phase, free in the next
        network.encoder.requires_grad_(False).requires_grad_(True)
    network(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    frozen = set(network.encoder.frozen)
    assert all((p.grad is None) is (name in frozen)
               for name, p in network.encoder.body.named_parameters())
    assert copy.deepcopy(network).encoder.frozen == network.encoder.frozen


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 95)])
def test_padding_reaches_multiples_of_32_and_keeps_the_image(shape):
    image = torch.rand(1, 3, *shape)
    padded = model.pad_to_multiple(image)
    assert padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
    assert torch.equal(padded[..., : shape[0], : shape[1]], image)
    assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-5)
