"""Which images are labelled: exactly the published ones, or a spread from sparse to dense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmask.data import labelled_ids, open_dataset
from xmask.data.layouts import LAYOUTS, Listing
from xmask.data.readers import CrowdDataset
from xmask.data.splits import protocols, stratified

REAL = Path(__file__).parents[2].parent / "shared/data"
NAMES = {"sha": "IMG_{}", "shb": "IMG_{}", "qnrf": "img_{:04d}", "jhu": "{:04d}"}


class Listed(CrowdDataset):
    """A data set known by its image numbers and counts, without files."""

    def __init__(self, name, numbers, *, split="train", synthetic=False):
        super().__init__(
            name, split, LAYOUTS[name], Listing(Path("nowhere"), {}, {}),
            [NAMES[name].format(n) for n in numbers],
            generator={} if synthetic else None, max_side=None)

    def counts(self):
        return np.array(self.numbers) * 7 % 101


@pytest.mark.parametrize("name, key, size, sizes", [
    ("sha", "sha", 300, (15, 30, 120)), ("qnrf", "ucf", 1201, (55, 109, 433)),
    ("jhu", "jhu", 4372, (114, 228, 909))])
def test_real_benchmarks_follow_the_published_protocol(name, key, size, sizes):
    dataset = Listed(name, range(1, size + 1))
    for percent, expected in zip((5, 10, 40), sizes):
        chosen = labelled_ids(dataset, percent)
        assert chosen == sorted(set(chosen)) and len(chosen) == expected
        assert {dataset.numbers[i] for i in chosen} == set(protocols()[key][str(percent)])
        assert chosen == labelled_ids(dataset, float(percent), seed=1)


def test_the_protocol_goes_by_image_number_not_by_position():
    dataset = Listed("sha", range(300, 0, -1))
    chosen = {dataset.ids[i] for i in labelled_ids(dataset, 5)}
    assert chosen == {f"IMG_{n}" for n in protocols()["sha"]["5"]}


@pytest.mark.parametrize("name", ["sha", "shb", "qnrf", "jhu"])
@pytest.mark.parametrize("synthetic", [True, False])
def test_100_percent_is_every_image(name, synthetic):
    assert labelled_ids(Listed(name, range(1, 8), synthetic=synthetic), 100) == list(range(7))


@pytest.mark.parametrize("percent", [1, 20, 5.5, 99.9])
def test_a_percentage_without_protocol_lists_those_that_have_one(percent):
    with pytest.raises(ValueError, match=rf"no published protocol for {percent:g} percent of "
                                         r"ShanghaiTech A; .* 5, 10, 40 \(and 100: all images\)"):
        labelled_ids(Listed("sha", range(1, 301)), percent)


@pytest.mark.parametrize("percent", [0, -5, 100.1, float("nan")])
def test_percentages_are_above_0_and_at_most_100(percent):
    with pytest.raises(ValueError, match="above 0 and at most 100"):
        labelled_ids(Listed("shb", range(1, 11)), percent)


def test_labels_are_chosen_from_the_train_split():
    with pytest.raises(ValueError, match="train split, not 'test'"):
        labelled_ids(Listed("sha", range(1, 183), split="test"), 5)


def test_protocol_images_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=(
            "2 of the 15 labelled images of the 5 percent protocol are not in this ShanghaiTech A: "
            "numbers 2, 5. Download")):
        labelled_ids(Listed("sha", [n for n in range(1, 301) if n not in (2, 5)]), 5)


@pytest.mark.parametrize("name, synthetic", [("shb", False), ("sha", True), ("qnrf", True)])
def test_other_data_sets_get_a_seeded_draw(name, synthetic):
    dataset = Listed(name, range(1, 101), synthetic=synthetic)
    chosen = labelled_ids(dataset, 7)
    assert len(chosen) == 7 and chosen == labelled_ids(dataset, 7, seed=2024)
    assert any(labelled_ids(dataset, 7, seed=seed) != chosen for seed in range(5))
    assert all(type(i) is int for i in chosen)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60),
       st.floats(0, 100, exclude_min=True), st.integers(0, 99))
def test_a_stratified_draw_takes_one_image_from_every_stratum(counts, percent, seed):
    counts = np.array(counts)
    chosen = stratified(counts, percent, seed=seed)
    k = max(1, round(len(counts) * percent / 100))
    assert len(chosen) == len(set(chosen)) == k and chosen == sorted(chosen)
    assert 0 <= chosen[0] and chosen[-1] < len(counts)
    strata = np.array_split(np.argsort(counts, kind="stable"), k)
    assert all(len(set(stratum) & set(chosen)) == 1 for stratum in strata)


@pytest.mark.skipif(not (REAL / "ShanghaiTech").is_dir(),
                    reason=f"ShanghaiTech A is not at {REAL}")
def test_the_protocol_fits_the_real_data():
    dataset = open_dataset("sha", REAL)
    assert [len(labelled_ids(dataset, p)) for p in (5, 10, 40, 100)] == [15, 30, 120, 300]
    assert dataset.numbers[labelled_ids(dataset, 5)[0]] == 2
