"""Crops keep points on their masks, and are a function of their index alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmask.config import Augmentation, override
from xmask.data.sample import Sample
from xmask.data.transforms import Crops, collate, random_crop, strong_view, to_tensor


def scene(seed: int, shape=(90, 120), people=12) -> Sample:
    """Squares of 9 px on a grid, so that every point is well inside its mask."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation((shape[0] // 15) * (shape[1] // 15))[:people]
    instances = np.zeros(shape, np.int32)
    points = []
    for k, cell in enumerate(cells, start=1):
        y, x = (cell // (shape[1] // 15)) * 15 + 7, (cell % (shape[1] // 15)) * 15 + 7
        instances[y - 4 : y + 5, x - 4 : x + 5] = k
        points.append((x, y))
    image = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
    return Sample(image, np.array(points, np.float32).reshape(-1, 2), instances, name=f"s{seed}")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([32, 64, 128, 256]))
def test_every_point_of_a_crop_lies_on_its_own_mask(seed, size):
    crop = random_crop(scene(seed), size, (0.7, 1.3), np.random.default_rng(seed))
    assert crop.image.shape == (size, size, 3) and crop.instances.shape == (size, size)
    x, y = np.rint(crop.points).astype(int).T if len(crop.points) else (np.array([], int),) * 2
    assert ((crop.points >= 0) & (crop.points <= size - 1)).all()
    np.testing.assert_array_equal(crop.instances[y, x], np.arange(1, len(crop.points) + 1))


def test_at_scale_one_without_flip_a_crop_is_a_window():
    sample = scene(3, (128, 128))
    for seed in range(20):
        crop = random_crop(sample, 128, (1, 1), np.random.default_rng(seed))
        flipped = np.array_equal(crop.image, sample.image[:, ::-1])
        assert flipped or np.array_equal(crop.image, sample.image)
        expected = sample.points.copy()
        if flipped:
            expected[:, 0] = 127 - expected[:, 0]
        np.testing.assert_allclose(crop.points, expected, atol=1e-4)


def test_an_image_smaller_than_the_crop_is_padded():
    tiny = Sample(np.full((1, 1, 3), 200, np.uint8), np.zeros((1, 2), np.float32),
                  np.ones((1, 1), np.int32))
    crop = random_crop(tiny, 32, (1, 1), np.random.default_rng(0))
    assert len(crop.points) == 1 and (crop.image.max(-1) > 0).sum() == 1


def test_crops_depend_on_nothing_but_seed_and_index():
    samples = [scene(i) for i in range(3)]

    def stream(seed):
        return Crops(samples, 64, (0.7, 1.3), seed, strong=True)

    ahead, crop, view, visible = stream(1)[17][0], *stream(1)[5]
    again, view2, visible2 = stream(1)[5]
    assert np.array_equal(crop.image, again.image) and np.array_equal(crop.points, again.points)
    assert torch.equal(view, view2) and torch.equal(visible, visible2)
    assert not np.array_equal(crop.image, stream(2)[5][0].image)
    assert not np.array_equal(crop.image, ahead.image)


def test_every_image_is_used_equally_often():
    samples = [scene(i) for i in range(5)]
    names = [Crops(samples, 32, (1, 1), 0, strong=False)[i][0].name for i in range(20)]
    assert sorted(names) == sorted([s.name for s in samples] * 4)
    assert names[:5] != names[5:10] or names[:5] != names[10:15]


@pytest.mark.parametrize("seed", range(8))
def test_the_strong_view_keeps_geometry_and_hides_one_rectangle(seed):
    image = to_tensor(scene(0, (64, 64)).image)
    view, visible = strong_view(image, np.random.default_rng(seed))
    assert view.shape == image.shape and -1e-5 <= view.min() and view.max() <= 1 + 1e-5
    hidden = ~visible
    rows, columns = hidden.any(1).sum().item(), hidden.any(0).sum().item()
    assert hidden.sum() == rows * columns and 64 / 8 <= rows <= 64 / 4
    assert view[:, hidden].abs().sum() == 0


def test_every_augmentation_can_be_switched_off():
    off = Augmentation(flip=0, jitter=0, grey=0, blur=0, cutout_min=0.5, cutout_max=0.5)
    crops = Crops([scene(0)], 64, (1, 1), 3, strong=True, augmentation=off)
    for index in range(6):
        crop, view, visible = crops[index]
        assert torch.equal(view, to_tensor(crop.image) * visible)
        assert (~visible).sum() == 32 * 32
    flipped = Crops([scene(0)], 64, (1, 1), 3, strong=True,
                    augmentation=override(off, {"flip": 1}))
    assert np.array_equal(flipped[2][0].image, crops[2][0].image[:, ::-1])


def test_a_batch_collects_what_the_losses_need():
    labelled = collate([Crops([scene(0)], 64, (1, 1), 0, strong=False)[i] for i in range(2)])
    assert labelled.images.shape == (2, 3, 64, 64) and labelled.strong is None
    assert labelled.instances[0].shape == (64, 64)
    bare = Sample(scene(0).image, np.zeros((0, 2), np.float32))
    unlabelled = collate([Crops([bare], 64, (1, 1), 0, strong=True)[i] for i in range(2)])
    assert unlabelled.strong.shape == unlabelled.images.shape
    assert unlabelled.instances == [None, None] and unlabelled.visible.dtype == torch.bool
