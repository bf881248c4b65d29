"""The network has the paper's shape, and weights are loaded or refused with a reason."""

import pytest
import torch
from torchvision.models import vgg16_bn

from xmask import model
from xmask.config import Network

PAPER = Network(weights="random")
SLIM = Network(backbone="slim", channels=16, weights="random")


@pytest.mark.parametrize("config", [PAPER, SLIM])
def test_output_is_a_logit_and_a_unit_embedding_per_cell_of_stride_four(config):
    network, _ = model.build(config)
    output = network.eval()(torch.rand(2, 3, 64, 96))
    assert output.logits.shape == (2, 16, 24)
    assert output.embedding.shape == (2, 16, 16, 24)
    assert torch.allclose(output.embedding.norm(dim=1), torch.ones(2, 16, 24), atol=1e-5)
    assert network(torch.rand(1, 3, 32, 32), masks=False).embedding is None


def test_the_encoder_is_vgg16_bn():
    theirs = vgg16_bn(weights=None).eval()
    ours = model.Encoder()
    model._load_encoder(ours, theirs.state_dict(), "test")
    image = torch.rand(1, 3, 64, 64)
    fine, coarse = ours.eval()(image)
    assert fine.shape == (1, 512, 8, 8) and coarse.shape == (1, 512, 4, 4)
    with torch.no_grad():
        assert torch.allclose(fine, theirs.features[:33](image), atol=1e-5)
        assert torch.allclose(coarse, theirs.features[:43](image), atol=1e-5)


def test_weights_from_a_file_are_loaded_and_recorded(tmp_path):
    theirs, path = vgg16_bn(weights=None), tmp_path / "vgg16_bn.pth"
    torch.save(theirs.state_dict(), path)
    network, record = model.build(Network(weights=str(path)))
    assert record.startswith("vgg16_bn.pth (sha256 ")
    assert torch.equal(network.encoder.to_fine[0][0].weight, theirs.features[0].weight)


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="network.weights: .*none.pth does not exist"):
        model.build(Network(weights=str(tmp_path / "none.pth")))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="broken.pth: not a readable state dict"):
        model.build(Network(weights=str(broken)))
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="other.pth: not a VGG16-BN state dict"):
        model.build(Network(weights=str(other)))
    with pytest.raises(ValueError, match="ImageNet weights exist for vgg16_bn only"):
        model.build(Network(backbone="slim", weights="imagenet"))


def test_imagenet_weights_out_of_reach_leave_a_random_start_that_says_so(monkeypatch):
    from torchvision.models import VGG16_BN_Weights

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(VGG16_BN_Weights, "get_state_dict", refuse)
    with pytest.warns(UserWarning, match="ImageNet weights are out of reach"):
        _, record = model.build(Network())
    assert record == "random (ImageNet weights out of reach)"


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 95)])
def test_padding_reaches_multiples_of_32_and_keeps_the_image(shape):
    image = torch.rand(1, 3, *shape)
    padded = model.pad_to_multiple(image)
    assert padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
    assert torch.equal(padded[..., : shape[0], : shape[1]], image)
    assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-5)
