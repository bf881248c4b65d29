"""An image in pieces gives what it gives in one piece: no seam, no head lost or counted twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_trainer import tiny
from xmask import decode, energy, metrics, model, tiling
from xmask.study import evaluate
from xmask.synthetic import draw_scene


@pytest.fixture(scope="module")
def network():
    """Random weights, but with a density that fires in places and an embedding that differs."""
    torch.manual_seed(3)
    network = model.build(tiny().network)[0].eval()
    image = draw_scene(seed=5, shape=(256, 256), people=60).image
    with torch.no_grad():
        for layer in network.modules():  # statistics of real activations, as after training
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.5
        network.train()
        for _ in range(4):
            network(model.pad_to_multiple(evaluate.to_tensor(image)[None]))
        network.eval()
        logits = network(evaluate.to_tensor(image)[None]).logits
        last = network.decoder[4]
        last.weight *= 20
        logits = network(evaluate.to_tensor(image)[None]).logits
        # odd channels of the shuffle are "person": about 2% of the cells fire
        last.bias[4:] -= float(torch.quantile(logits.flatten(), 0.98))
    return network


@pytest.fixture(scope="module")
def scene():
    return draw_scene(seed=7, shape=(1100, 1380), people=300)


@pytest.mark.parametrize("gate", [False, True])
def test_pieces_and_whole_agree_to_rounding(network, scene, gate):
    decoding = dataclasses.replace(tiny().evaluation, density_gate=gate)
    shape = scene.image.shape[:2]
    whole = evaluate.predict(network, scene.image, decoding)
    one = tiling.network_maps(network, scene.image, tile=1408)
    cut = tiling.network_maps(network, scene.image, tile=256)
    for a, b in zip(one, cut):
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5, rtol=1e-4)
    pieces = tiling.decode_maps(*cut, shape, decoding, tile=256)
    assert 100 < len(whole.points) == len(pieces.points)
    np.testing.assert_array_equal(pieces.points, whole.points)
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-4)
    differ = (pieces.instances != whole.instances).mean()
    assert differ < 1e-5, f"{differ:.2%} of the pixels have another owner"


@pytest.mark.parametrize("shape", [(3, 70), (8, 8), (37, 50), (64, 200), (333, 45)])
@pytest.mark.parametrize("tile", [32, 64])
def test_decoding_in_windows_is_exact_on_equal_maps(shape, tile, monkeypatch):
    monkeypatch.setattr(tiling, "MARGIN", 0)  # so that small images are cut too
    generator = torch.Generator().manual_seed(shape[0])
    cells = [-(-side // 32) * 8 for side in shape]
    logits = torch.randn(cells, generator=generator) * 2 - 2
    embedding = torch.nn.functional.normalize(torch.randn(6, *cells, generator=generator), dim=0)
    decoding = tiny().evaluation
    expected = decode.predict(logits, embedding, shape, threshold=decoding.theta,
                              geometry_weight=decoding.geometry_weight, sigma=decoding.sigma)
    found = tiling.decode_maps(logits, embedding, shape, decoding, tile=tile)
    np.testing.assert_array_equal(found.points, expected.points)
    assert (found.instances != expected.instances).mean() < 1e-3
    # every head keeps its mask: nobody is lost on a seam, nobody is there twice
    assert metrics.segmentation(found.instances, expected.instances)["mean_iou"] > 0.999


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_head_on_a_seam_counts_once(data):
    """Heads anywhere, and always some in the cells on both sides of every seam: each is one point
    with one mask, as in one piece."""
    height, width = (data.draw(st.integers(40, 140), label=side) for side in ("H", "W"))
    cells = [-(-side // 32) * 8 for side in (height, width)]
    seen = [-(-side // model.STRIDE) for side in (height, width)]
    logits = torch.full(cells, -5.0)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    for row in (7, 8, 15, 16, 23, 24):  # tiles of 32 px meet between cells 7 and 8, 15 and 16, ...
        if row < seen[0]:
            logits[row, rng.integers(seen[1])] = 3.0
        if row < seen[1]:
            logits[rng.integers(seen[0]), row] = 3.0
    logits[rng.integers(seen[0]), rng.integers(seen[1])] = 3.0
    embedding = torch.nn.functional.normalize(
        torch.from_numpy(rng.normal(size=(4, *cells)).astype(np.float32)), dim=0)
    decoding = dataclasses.replace(tiny().evaluation, theta=3.0)  # every head gets a mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "MARGIN", 0)  # so that small images are cut too
        cut = tiling.decode_maps(logits, embedding, (height, width), decoding, tile=32)
    whole = tiling.decode_maps(logits, embedding, (height, width), decoding, tile=1024)
    heads = int((logits > 0).sum())
    assert cut.count == heads == len(np.unique(cut.points, axis=0))
    np.testing.assert_array_equal(cut.points, whole.points)
    assert set(np.unique(cut.instances)) - {0} == set(range(1, heads + 1))
    assert (cut.instances != whole.instances).mean() < 1e-3  # ties of energies, to rounding


def test_an_image_without_heads_stays_empty():
    maps = torch.full((64, 64), -9.0), torch.ones(4, 64, 64)
    found = tiling.decode_maps(*maps, (250, 256), tiny().evaluation, tile=64)
    assert found.count == 0 and not found.instances.any()


def test_no_cell_sees_farther_than_the_margin(network):
    """Change one pixel: only cells within the margin may answer."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 512, 512)
    other = image.clone()
    other[:, :, 256, 256] = 1 - other[:, :, 256, 256]
    with torch.inference_mode():
        before, after = network(image), network(other)
    moved = ((before.logits != after.logits)[0]
             | (before.embedding != after.embedding)[0].any(0))
    reach = (torch.nonzero(moved) * model.STRIDE - 256).abs().max()
    assert 0 < reach <= 138 + model.STRIDE < tiling.MARGIN


def test_nothing_the_network_or_the_decoding_holds_grows_with_the_image(network, monkeypatch):
    """Whatever the image's size, pieces stay within tile + 2 margins, windows within a tile."""
    pieces, windows = [], []
    forward, assign = type(network).forward, energy.assign

    def seen(self, images, *arguments, **options):
        pieces.append(tuple(images.shape[-2:]))
        return forward(self, images, *arguments, **options)

    def assigned(features, *arguments, **options):
        windows.append(tuple(features.shape[-2:]))
        return assign(features, *arguments, **options)

    monkeypatch.setattr(type(network), "forward", seen)
    monkeypatch.setattr(energy, "assign", assigned)
    image = draw_scene(seed=1, shape=(600, 1000), people=40).image
    maps = tiling.network_maps(network, image, tile=64)
    tiling.decode_maps(*maps, (600, 1000), tiny().evaluation, tile=64)
    assert len(pieces) == 10 * 16 and max(map(max, pieces)) <= 64 + 2 * tiling.MARGIN
    assert len(windows) > 50 and max(map(max, windows)) <= 64


@pytest.mark.parametrize("length", [1, 31, 32, 1024, 1344, 1345, 2047, 2048, 5000, 10016])
def test_spans_cover_a_side_once_with_equal_parts(length):
    spans = list(tiling._spans(length, 1024, 160))
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert all(start % 32 == 0 for start, _ in spans)
    assert max(stop - start for start, stop in spans) <= (1344 if len(spans) == 1 else 1024)
    assert min(stop - start for start, stop in spans) >= min(length, 512)
