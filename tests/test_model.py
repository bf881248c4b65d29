"""The network has the paper's shape, whatever its backbone."""

import copy

import pytest
import torch
from torchvision.models import vgg16_bn

from xmask import model
from xmask.config import Network
from xmask.pretrained import copy_weights

PAPER = Network(weights="random")
SLIM = Network(backbone="slim", channels=16, weights="random")
LITE = Network(backbone="tf_efficientnet_lite0", channels=16, weights="random")


@pytest.mark.parametrize("config", [PAPER, SLIM, LITE])
def test_output_is_a_logit_and_a_unit_embedding_per_cell_of_stride_four(config):
    network, _ = model.build(config)
    output = network.eval()(torch.rand(2, 3, 64, 96))
    assert output.logits.shape == (2, 16, 24)
    assert output.embedding.shape == (2, 16, 16, 24)
    assert torch.allclose(output.embedding.norm(dim=1), torch.ones(2, 16, 24), atol=1e-5)
    assert network(torch.rand(1, 3, 32, 32), masks=False).embedding is None


def test_the_encoder_is_vgg16_bn():
    theirs = vgg16_bn(weights=None).eval()
    ours = model.Encoder("vgg16_bn")
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
    encoder = model.Encoder(backbone)
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


@pytest.mark.parametrize("config", [SLIM, LITE])
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batchnorm_keeps_its_statistics_and_the_weights_learn(config, frozen):
    config = Network(backbone=config.backbone, channels=16, weights="random", freeze_norm=frozen)
    network = model.XMask(config)
    for part in network.children():
        part.train(True)
    before = copy.deepcopy(network.state_dict())
    network(torch.rand(2, 3, 64, 64)).embedding.sum().backward()
    changed = {name for name, value in network.state_dict().items()
               if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder") for name in changed) is not frozen
    assert any(name.startswith("mask_head") for name in changed)  # it has no statistics to keep
    assert all(p.grad is not None for p in network.encoder.parameters())
    assert network.encoder.training and not network.eval().encoder.training


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 95)])
def test_padding_reaches_multiples_of_32_and_keeps_the_image(shape):
    image = torch.rand(1, 3, *shape)
    padded = model.pad_to_multiple(image)
    assert padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
    assert torch.equal(padded[..., : shape[0], : shape[1]], image)
    assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-5)
