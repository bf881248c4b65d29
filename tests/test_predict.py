"""A model predicts as evaluation does; an image in pieces gives what it gives in one piece: no
seam, no head lost or counted twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xmask
from tests.test_trainer import tiny
from xmask import config as configuration
from xmask import decode, features, files, model, predict
from xmask.calibration import Calibration, spread
from xmask.data.images import resize_image, resize_labels
from xmask.data.transforms import to_tensor
from xmask.synthetic import draw_scene


@pytest.fixture(scope="module")
def scene():
    return draw_scene(seed=2, shape=(160, 200), people=25)


@pytest.fixture(scope="module")
def bundled():
    return xmask.load("drawn", device="cpu")


def test_a_prediction_is_what_evaluation_says(bundled, scene):
    ours = bundled.predict(scene.image)
    theirs = predict.predict_image(bundled.network, scene.image, bundled.decoding)
    assert ours.count == theirs.count > 0
    np.testing.assert_array_equal(ours.points, theirs.points)
    np.testing.assert_array_equal(ours.instances, theirs.instances)
    assert ours.instances.dtype == np.int32 and ours.points.dtype == np.float32


def test_a_path_and_its_pixels_give_the_same(bundled, scene, tmp_path):
    files.write_png(tmp_path / "scene.png", scene.image)
    by_path = bundled.predict(tmp_path / "scene.png")
    np.testing.assert_array_equal(by_path.instances, bundled.predict(scene.image).instances)
    logits, embedding = bundled.maps(str(tmp_path / "scene.png"))
    assert logits.shape == embedding.shape[1:] == (40, 56)


def test_changed_thresholds_are_used(bundled, scene):
    mine = xmask.load("drawn", device="cpu")
    mine.decoding = configuration.override(mine.decoding, {"theta": 0.2})
    few, usual = mine.predict(scene.image), bundled.predict(scene.image)
    assert few.count == usual.count
    assert 0 < (few.instances > 0).sum() < (usual.instances > 0).sum()


def test_a_model_may_see_its_images_enlarged(bundled, scene):
    """`scale` is the same as to predict on an image resized by hand, with all positions, masks and
    the interval brought back; the image itself and what its heads are called stay the same."""
    mine = xmask.load("drawn", device="cpu")
    mine.decoding = configuration.override(mine.decoding, {"scale": 1.25})
    mine.calibration = Calibration(mine.decoding.count_threshold, 2.0, 0.9, 10, 1.0, 1.0)
    found = mine.predict(scene.image)
    byhand = bundled.predict(resize_image(scene.image, (200, 250)))
    assert found.count == byhand.count > 0
    np.testing.assert_allclose(found.points, np.clip((byhand.points + 0.5) / 1.25 - 0.5, 0, None),
                               atol=1e-4)
    np.testing.assert_array_equal(found.instances, resize_labels(byhand.instances, (160, 200)))
    assert found.low < found.count < found.high
    wider = spread(predict.own_cells(mine.maps(resize_image(scene.image, (200, 250)))[0],
                                     np.zeros((200, 250, 3))))
    assert found.high - found.count == pytest.approx(2 * wider, abs=1)


def test_an_interval_reads_the_cells_that_may_be_heads(scene):
    mine = xmask.load("drawn", device="cpu")
    mine.decoding = configuration.override(mine.decoding, {"peaks": True})
    mine.calibration = Calibration(mine.decoding.count_threshold, 50.0, 0.9, 10, 1.0, 1.0)
    found = mine.predict(scene.image)
    cells = predict.own_cells(mine.maps(scene.image)[0], scene.image)
    alone = decode.peaks(torch.from_numpy(cells)).numpy()
    assert spread(alone) < spread(cells)
    assert found.high == np.ceil(found.count + 50 * spread(alone))


@given(height=st.integers(1, 60), width=st.integers(1, 60), scale=st.floats(0.25, 4))
@settings(max_examples=60, deadline=None)
def test_a_resized_image_has_sides_times_the_scale(height, width, scale):
    image = np.zeros((height, width, 3), np.uint8)
    rows, columns = predict.scaled(image, scale).shape[:2]
    assert rows == max(round(height * scale), 1) and columns == max(round(width * scale), 1)
    assert predict.scaled(image, 1.0) is image


@given(seed=st.integers(0, 99), scale=st.floats(0.3, 3.9))
@settings(max_examples=30, deadline=None)
def test_what_is_brought_back_lies_in_the_image(seed, scale):
    """Each point in the image, and labels of points that exist; nothing changes where the size
    is the image's own."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(8, 40, 2))
    large = tuple(max(round(n * scale), 1) for n in shape)
    points = (rng.random((9, 2)) * (np.array(large[::-1]) - 1)).astype(np.float32)
    labels = rng.integers(0, 10, large).astype(np.int32)
    one = decode.Prediction(points, rng.random(9), labels, rng.random(9) > 0.5, 3, 8)
    found = predict.brought_back(one, shape)
    assert found.instances.shape == shape and set(np.unique(found.instances)) <= set(range(10))
    assert (found.points >= 0).all() and (found.points <= np.array(shape[::-1]) - 1).all()
    assert (found.low, found.high, found.count) == (3, 8, one.count)
    assert predict.brought_back(one, large) is one


def test_a_close_up_can_be_computed_smaller(bundled, scene):
    """Twice as large an image, computed at the size of the first: the same heads, twice as far
    apart, each in its own mask."""
    large = scene.image.repeat(2, axis=0).repeat(2, axis=1)
    found = bundled.predict(large, max_side=200)
    small = bundled.predict(resize_image(large, scene.shape))
    assert found.instances.shape == large.shape[:2] and found.count == small.count > 5
    np.testing.assert_allclose(found.points, small.points * 2 + 0.5)
    np.testing.assert_array_equal(found.instances[::2, ::2], small.instances)
    np.testing.assert_array_equal(found.counted, small.counted)
    same = bundled.predict(scene.image, max_side=200)  # not larger: nothing happens
    np.testing.assert_array_equal(same.points, bundled.predict(scene.image).points)
    with pytest.raises(ValueError, match="max-side.: 9 px; give at least 32"):
        bundled.predict(scene.image, max_side=9)
    with pytest.raises(ValueError, match="image, resized: 100 x 1 px"):
        bundled.predict(np.zeros((10, 1000, 3), np.uint8), max_side=100)


@pytest.mark.parametrize("image", [
    np.zeros((20, 20), np.uint8), np.zeros((20, 20, 4), np.uint8), np.zeros((20, 20, 3))])
def test_an_array_that_is_no_image_is_refused(bundled, image):
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        bundled.predict(image)


def test_too_small_and_missing_images_are_named(bundled, tmp_path):
    with pytest.raises(ValueError, match="1 x 1 px; the smaller side"):
        bundled.predict(np.zeros((1, 1, 3), np.uint8))
    files.write_png(tmp_path / "dot.png", np.zeros((7, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="dot.png: 50 x 7 px"):
        bundled.predict(tmp_path / "dot.png")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg: no such image"):
        bundled.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="tile: 100 is not a positive multiple of 32"):
        bundled.predict(np.zeros((40, 40, 3), np.uint8), tile=100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree(bundled, scene):
    on_cuda = xmask.load(device="cuda").predict(scene.image, tile=64)
    on_cpu = bundled.predict(scene.image)
    assert abs(on_cuda.count - on_cpu.count) <= 0.05 * on_cpu.count + 1


# -- in pieces -----------------------------------------------------------------------------------


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
            network(model.pad_to_multiple(to_tensor(image)[None]))
        network.eval()
        last = network.decoder[4]
        last.weight *= 20
        logits = network(to_tensor(image)[None]).logits
        # odd channels of the shuffle are "person": about 2% of the cells fire
        last.bias[4:] -= float(torch.quantile(logits.flatten(), 0.98))
    return network


@pytest.fixture(scope="module")
def large():
    return draw_scene(seed=7, shape=(1100, 1380), people=300)


@pytest.mark.parametrize("gate", [False, True])
def test_pieces_and_whole_agree_to_rounding(network, large, gate):
    decoding = configuration.override(tiny().evaluation, {
        "density_gate": gate, "point_threshold": 0.5, "count_threshold": 0.5})
    one = predict.network_maps(network, large.image, tile=1408)
    cut = predict.network_maps(network, large.image, tile=256)
    for a, b in zip(one, cut):
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5, rtol=1e-4)
    whole = predict.predict_image(network, large.image, decoding, tile=1408)
    pieces = predict.predict_image(network, large.image, decoding, tile=256)
    assert 100 < whole.count == pieces.count
    np.testing.assert_array_equal(pieces.points, whole.points)
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-4)
    differ = (pieces.instances != whole.instances).mean()
    assert differ < 1e-5, f"{differ:.2%} of the pixels have another owner"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_head_on_a_seam_counts_once(data):
    """Heads anywhere, and always some in the cells on both sides of every seam between bands of
    rows: each is one point with one mask, as in one piece."""
    height, width = (data.draw(st.integers(40, 140), label=side) for side in ("H", "W"))
    cells = [-(-side // 32) * 8 for side in (height, width)]
    seen = [-(-side // model.STRIDE) for side in (height, width)]
    logits = torch.full(cells, -5.0)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    for row in range(1, 24):  # bands of 8 px meet between cells 1 and 2, 3 and 4, ...
        if row < seen[0]:
            logits[row, rng.integers(seen[1])] = 3.0
    embedding = torch.nn.functional.normalize(
        torch.from_numpy(rng.normal(size=(4, *cells)).astype(np.float32)), dim=0)
    decoding = configuration.override(tiny().evaluation, {"theta": 3.0})
    with pytest.MonkeyPatch.context() as patch:  # every head gets a mask
        patch.setattr(features, "_BAND", 1)
        patch.setattr(features, "_ROWS", 1)
        cut = predict.decode.predict(logits, embedding, (height, width), decoding)
    whole = predict.decode.predict(logits, embedding, (height, width), decoding)
    heads = int((logits > 0).sum())
    assert cut.count == heads == len(np.unique(cut.points, axis=0))
    np.testing.assert_array_equal(cut.points, whole.points)
    assert set(np.unique(cut.instances)) - {0} == set(range(1, heads + 1))
    assert (cut.instances != whole.instances).mean() < 1e-3  # ties of energies, to rounding


def test_no_cell_sees_farther_than_the_margin(network):
    """Change one pixel: only cells within the margin may answer."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 1280, 64)
    other = image.clone()
    other[:, :, 640, 32] = 1 - other[:, :, 640, 32]
    with torch.inference_mode():
        before, after = network(image), network(other)
    moved = ((before.logits != after.logits)[0]
             | (before.embedding != after.embedding)[0].any(0)).any(1)
    cell = torch.nonzero(moved).squeeze(1) * model.STRIDE
    assert 0 < max(640 - int(cell.min()), int(cell.max()) - 640) <= predict.reach(network) <= 512


def test_a_network_that_sees_everything_takes_the_image_in_one_piece(monkeypatch):
    torch.manual_seed(0)
    network = model.build(tiny().network)[0].eval()
    body = type(network).forward

    def forward(self, images, *arguments, **options):
        sizes.append(tuple(images.shape[-2:]))
        return body(self, images + images.mean(), *arguments, **options)

    sizes = []
    monkeypatch.setattr(type(network), "forward", forward)
    assert predict.reach(network) > 1024
    predict.network_maps(network, np.zeros((200, 300, 3), np.uint8), tile=64)
    assert sizes[1:] == [(224, 320)]


def test_nothing_the_network_or_the_decoding_holds_grows_with_the_image(network, monkeypatch):
    """Whatever the image's size, pieces stay within tile + 2 margins, features within a band."""
    pieces, bands, stretched = [], [], []
    forward, made, rows = type(network).forward, features.feature_bands, features._smooth_rows

    def seen(self, images, *arguments, **options):
        pieces.append(tuple(images.shape[-2:]))
        return forward(self, images, *arguments, **options)

    def banded(*arguments):
        for band in made(*arguments):
            bands.append(band[-1].nbytes)
            yield band

    def widened(*arguments):
        stretched.append(rows(*arguments))
        return stretched[-1]

    margin = predict.reach(network)
    monkeypatch.setattr(type(network), "forward", seen)
    monkeypatch.setattr(predict.decode, "feature_bands", banded)
    monkeypatch.setattr(features, "_smooth_rows", widened)
    monkeypatch.setattr(features, "_BAND", 1 << 19)
    monkeypatch.setattr(features, "_ROWS", 1 << 20)
    image = draw_scene(seed=1, shape=(600, 1000), people=40).image
    predict.predict_image(network, image, tiny().evaluation, tile=64)
    assert len(pieces) == 10 * 16 and max(map(max, pieces)) <= 64 + 2 * margin
    assert len(bands) == 75 and max(bands) <= 8 * 1000 * 16 * 4
    # three cells more than the rows of a band: the smoothing reaches beyond it
    assert len(stretched) > 5 and max(s.nbytes for s in stretched) < (1 << 20) + 4 * 1000 * 16 * 4


@pytest.mark.parametrize("length", [1, 31, 32, 1024, 1344, 1345, 2047, 2048, 5000, 10016])
def test_spans_cover_a_side_once_with_equal_parts(length):
    spans = list(predict._spans(length, 1024, 160))
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert all(start % 32 == 0 for start, _ in spans)
    assert max(stop - start for start, stop in spans) <= (1344 if len(spans) == 1 else 1024)
    assert min(stop - start for start, stop in spans) >= min(length, 512)
