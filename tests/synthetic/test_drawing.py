"""Drawn crowds: the truth fits the picture exactly, and the picture is not too easy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat
from scipy.spatial import cKDTree

from xmask import files
from xmask.synthetic import crowd, datasets, draw_scene, drawing, write_dataset
from xmask.synthetic.datasets import stratified_counts
from xmask.synthetic.scene import CHARACTERS, KINDS, LARGEST_HEAD


def same(a, b) -> bool:
    return (np.array_equal(a.image, b.image) and np.array_equal(a.points, b.points)
            and np.array_equal(a.instances, b.instances) and np.array_equal(a.boxes, b.boxes))


def assert_truth_fits(image, points, instances):
    """Ids are 1..N without gaps, every head has 4 px or more, every dot is on its own head."""
    n = len(points)
    assert instances.shape == image.shape[:2]
    area = np.bincount(instances.ravel(), minlength=n + 1)
    assert len(area) == n + 1 and (area[1:] >= 4).all()
    x, y = np.rint(points).astype(int).T
    assert np.array_equal(instances[y, x], np.arange(1, n + 1))
    assert len(np.unique(points, axis=0)) == n


@pytest.fixture(scope="module")
def scenes():
    counts = np.geomspace(30, 400, 10).astype(int)
    return [draw_scene(700 + i, people=int(n)) for i, n in enumerate(counts)]


@pytest.fixture(scope="module", params=["sha", "qnrf", "jhu"])
def dataset(request, tmp_path_factory):
    """A dataset of each layout, with few people to save time."""
    with pytest.MonkeyPatch.context() as patch:
        few = {"sha": (20, 60), "qnrf": (40, 120), "jhu": (1, 40)}[request.param]
        patch.setattr(datasets, "CHARACTERS",
                      {name: _with(character, counts=few, empty=.2 if name == "jhu" else 0.)
                       for name, character in CHARACTERS.items()})
        root = tmp_path_factory.mktemp(request.param)
        folder = write_dataset(request.param, root, train=6, test=3, seed=5, progress=False)
        yield request.param, folder


def _with(character, **changes):
    return type(character)(**{**character.__dict__, **changes})


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# ---- one scene

def test_the_same_seed_gives_the_same_scene_and_another_seed_another():
    assert same(draw_scene(3, people=60), draw_scene(3, people=60))
    assert not np.array_equal(draw_scene(3, people=60).image, draw_scene(4, people=60).image)


def test_numpys_global_random_state_is_neither_read_nor_changed():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = draw_scene(3, shape=(128, 160), people=20)
    assert np.array_equal(before, np.random.get_state()[1])
    np.random.seed(2)
    assert same(first, draw_scene(3, shape=(128, 160), people=20))


@pytest.mark.parametrize("character", sorted(CHARACTERS))
@pytest.mark.parametrize("people", [1, 20, 200])
def test_as_many_people_as_asked_for_and_every_dot_on_its_head(people, character):
    for seed in range(3):
        sample = draw_scene(seed, people=people, character=character)
        assert len(sample.points) == people
        assert sample.image.dtype == np.uint8 and sample.instances.dtype == np.int32
        assert sample.points.dtype == np.float32 and sample.boxes.dtype == np.float32
        assert_truth_fits(sample.image, sample.points, sample.instances)


def test_boxes_are_the_extents_of_the_visible_heads(scenes):
    sample = scenes[4]
    for k, rows_columns in enumerate(ndimage.find_objects(sample.instances)):
        rows, columns = rows_columns
        assert sample.boxes[k].tolist() == [columns.stop - columns.start, rows.stop - rows.start]


def test_dots_lie_near_the_middle_of_the_visible_head(scenes):
    for sample in scenes[::3]:
        n = len(sample.points)
        middle = np.array(ndimage.center_of_mass(
            sample.instances > 0, sample.instances, np.arange(1, n + 1)))[:, ::-1]
        offset = np.linalg.norm(sample.points - middle, axis=1) / sample.boxes.max(1)
        assert np.median(offset) < 0.15 and np.median(offset) > 0.005


def test_an_empty_scene_is_a_picture_without_heads():
    sample = draw_scene(8, people=0)
    assert sample.points.shape == (0, 2) and sample.boxes.shape == (0, 2)
    assert not sample.instances.any()
    assert sample.image.std() > 5


def test_fifteen_hundred_people_fit_and_are_drawn_quickly():
    start = time.process_time()
    sample = draw_scene(1, people=1500, character="qnrf")
    elapsed = time.process_time() - start
    assert len(sample.points) == 1500
    assert_truth_fits(sample.image, sample.points, sample.instances)
    assert elapsed < 6  # about 0.5 s on the machine it was written on


def diameters(sample) -> np.ndarray:
    """Diameters of discs as large as the visible heads, px."""
    area = np.bincount(sample.instances.ravel(), minlength=len(sample.points) + 1)[1:]
    return 2 * np.sqrt(area / np.pi)


@pytest.fixture(scope="module", params=sorted(CHARACTERS))
def planned_scenes(request):
    """Every other scene of a dataset of 16, as `write_dataset` would draw them."""
    images = {"train": 16, "val": 1, "test": 1}
    tasks = datasets._tasks(request.param, Path("nowhere"), images, 2024)[:16:2]
    return [drawing.draw(task.scene_seed, task.shape, task.people, CHARACTERS[request.param],
                         task.name)[0] for task in tasks]


def test_heads_span_a_wide_range_inside_one_scene(planned_scenes):
    crowds = [diameters(sample) for sample in planned_scenes if len(sample.points) >= 20]
    spread = np.array([np.percentile(d, 98) / np.percentile(d, 2) for d in crowds])
    assert np.median(spread) > 6
    assert np.mean(spread > 5) >= 0.7


def test_sizes_of_heads_are_spread_over_the_octaves(planned_scenes):
    everything = np.concatenate([diameters(sample) for sample in planned_scenes])
    low, high = np.percentile(everything, [2, 98])
    assert 5 <= low <= 7.5 and 35 <= high <= 62
    octaves = np.histogram(everything, [6, 12, 24, 48])[0] / len(everything)
    assert octaves.min() > 0.12 and octaves.max() < 0.55


def test_equal_discs_at_the_true_points_are_bad_masks(planned_scenes):
    """The best of 20 radii, contested pixels to the nearest point, over all people."""
    radii = 2 * 1.12 ** np.arange(6, 26)
    ious = []
    for sample in planned_scenes:
        n, truth = len(sample.points), sample.instances.ravel()
        if not n:
            continue
        y, x = np.indices(sample.instances.shape)
        distance, owner = cKDTree(sample.points).query(np.stack([x.ravel(), y.ravel()], 1),
                                                       distance_upper_bound=radii[-1] + 1)
        areas = np.bincount(truth, minlength=n + 1)[1:]
        for radius in radii:
            disc = distance <= radius
            both = np.bincount(owner[disc & (truth == owner + 1)], minlength=n)
            ious.append(both / (areas + np.bincount(owner[disc], minlength=n) - both))
    scores = [np.concatenate(ious[i::len(radii)]).mean() for i in range(len(radii))]
    assert max(scores) < 0.47


def test_heads_further_down_are_nearer_and_larger(scenes):
    slopes = [np.polyfit(sample.points[:, 1], sample.boxes.max(1), 1)[0] for sample in scenes]
    assert np.mean(np.array(slopes) > 0) >= 0.9


def test_distractors_are_few():
    for people in (0, 20, 400):
        _, facts = drawing.draw(3, (384, 512), people, CHARACTERS["sha"], "")
        assert facts["things"] <= 0.03 * people + 2


def test_people_hide_each_other_but_few_go_without_an_annotation():
    visible, annotated, drawn = [], 0, 0
    for seed in range(4):
        sample, facts = drawing.draw(seed, (384, 512), 300, CHARACTERS["sha"], "")
        visible.append(facts["visible"])
        annotated += len(sample.points)
        drawn += facts["figures"]
    visible = np.concatenate(visible)
    assert visible.min() >= crowd.VISIBLE
    assert np.mean(visible < 0.9) > 0.03  # partly hidden heads are there
    assert drawn - annotated <= 0.03 * drawn


def test_neighbouring_heads_mostly_keep_apart():
    sample = draw_scene(11, people=800, character="qnrf")
    nearest = cKDTree(sample.points).query(sample.points, k=2)[0][:, 1]
    assert np.mean(nearest >= 4.5) > 0.9
    assert np.mean(nearest >= 0.65 * sample.boxes.min(1)) > 0.8


def test_all_visible_parts_of_one_head_are_close_together(scenes):
    for sample in scenes[::3]:
        assert sample.boxes.max() <= 1.6 * LARGEST_HEAD


# ---- not too easy

def test_no_colour_threshold_counts_the_people(scenes):
    """The best of 72 thresholds on colours, chosen with the truth, still misses by far."""
    scenes = scenes[::2]
    people = np.array([len(sample.points) for sample in scenes])
    channels = []
    for sample in scenes:
        rgb = sample.image.astype(float) / 255
        r, _, b = np.moveaxis(rgb, -1, 0)
        channels.append([r, rgb.mean(-1), r - b, rgb.max(-1) - rgb.min(-1)])
    best = np.inf
    for c in range(4):
        for level in np.linspace(-.2 if c == 2 else .1, .9, 9):
            for sign in (1, -1):
                blobs = [ndimage.label(ndimage.binary_opening(sign * channel[c] > sign * level))[1]
                         for channel in channels]
                best = min(best, np.mean(np.abs(np.array(blobs) - people) / people))
    assert best > 0.2


def test_colours_of_heads_are_colours_of_the_background_too(scenes):
    """A colour table learned from the other scenes finds heads badly, pixel by pixel."""
    codes = [np.sum((sample.image // 32).astype(int) * [64, 8, 1], -1) for sample in scenes]
    heads = [sample.instances > 0 for sample in scenes]
    total = np.array([np.bincount(code.ravel(), minlength=512) for code in codes])
    of_heads = np.array([np.bincount(code[head], minlength=512)
                         for code, head in zip(codes, heads)])
    scores = []
    for i, (code, head) in enumerate(zip(codes, heads)):
        share = ((of_heads.sum(0) - of_heads[i] + .5) / (total.sum(0) - total[i] + 2))[code]
        scores.append(max(2 * np.sum((share > level) & head) / (np.sum(share > level) + head.sum())
                          for level in (.1, .2, .3, .4, .5)))
    assert np.mean(scores) < 0.6


# ---- messages

@pytest.mark.parametrize("arguments, words", [
    ({"people": -1}, "people: -1 is negative"),
    ({"shape": (64, 64), "people": 65}, "65 do not fit into 64x64"),
    ({"shape": (30, 400)}, "30x400 is too small"),
    ({"character": "shz"}, "'shz' is unknown; choose from"),
])
def test_a_scene_that_cannot_be_drawn_says_why(arguments, words):
    with pytest.raises(ValueError, match=words):
        draw_scene(0, **arguments)


@pytest.mark.parametrize("arguments, words", [
    ({"layout": "coco"}, "'coco' is unknown; choose from"),
    ({"train": 0}, "train: 0 is too small"),
    ({"test": -2}, "test: -2 is too small"),
    ({"seed": -1}, "seed: -1 is too small"),
    ({"jobs": 0}, "jobs: 0 is too small"),
])
def test_a_dataset_that_cannot_be_drawn_says_why(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_dataset(**{"layout": "sha", "root": tmp_path, "train": 1, "test": 1, "seed": 0,
                         **arguments})
    assert not list(tmp_path.iterdir())


# ---- datasets

def read_back(layout, folder):
    """(image, points, instances) of all images, read with the libraries and nobody's reader."""
    found = []
    pattern = {"sha": "*/images/*.jpg", "qnrf": "*/*.jpg", "jhu": "*/images/*.jpg"}[layout]
    for path in sorted(folder.glob(pattern)):
        split = path.parent if layout == "qnrf" else path.parent.parent
        if layout == "sha":
            info = loadmat(split / "ground-truth" / f"GT_{path.stem}.mat")["image_info"][0, 0][0, 0]
            points, mask = info[0], split / "instances" / f"{path.stem}.png"
            assert info.dtype.names == ("location", "number")
            assert info[1].shape == (1, 1) and info[1][0, 0] == len(points)
        elif layout == "qnrf":
            points = loadmat(split / f"{path.stem}_ann.mat")["annPoints"]
            mask = split / f"{path.stem}_instances.png"
        else:
            rows = [line.split() for line in
                    (split / "gt" / f"{path.stem}.txt").read_text().splitlines()]
            assert all(len(row) == 6 for row in rows)
            points = np.array([row[:2] for row in rows], float).reshape(-1, 2)
            mask = split / "instances" / f"{path.stem}.png"
        found.append((np.array(Image.open(path)), points, np.array(Image.open(mask)).astype(int)))
    return found


def test_masks_and_dots_fit_the_images_read_back_from_disk(dataset):
    layout, folder = dataset
    found = read_back(layout, folder)
    assert len(found) == {"sha": 9, "qnrf": 9, "jhu": 11}[layout]
    for image, points, instances in found:
        assert image.ndim == 3 and image.shape[2] == 3
        assert_truth_fits(image, points, instances)


def test_the_marker_holds_the_settings(dataset):
    layout, folder = dataset
    marker = files.read_json(folder / "synthetic.json")
    assert marker["layout"] == layout and marker["seed"] == 5
    assert marker["images"] == {"train": 6, **({"val": 2} if layout == "jhu" else {}), "test": 3}


@pytest.mark.parametrize("dataset", ["jhu"], indirect=True)
def test_jhu_has_empty_scenes_and_a_label_line_per_image(dataset):
    layout, folder = dataset
    names = []
    for split in ("train", "val", "test"):
        for line in (folder / split / "image_labels.txt").read_text().splitlines():
            name, count, scene, weather, distractor = line.split(",")
            names.append(name)
            rows = (folder / split / "gt" / f"{name}.txt").read_text().splitlines()
            assert len(rows) == int(count) and (distractor == "1") == (count == "0")
            assert scene in KINDS and weather in "0123"
    assert names == [f"{i:04d}" for i in range(1, 12)]
    assert any(len(points) == 0 for _, points, _ in read_back(layout, folder))


def test_an_interrupted_dataset_is_completed_with_the_same_bytes(dataset):
    layout, folder = dataset
    before = contents(folder)
    root = folder.parent if layout != "sha" else folder.parent.parent
    images = sorted(folder.rglob("*.jpg"))
    kept = images[1].stat().st_mtime_ns
    (folder / "synthetic.json").unlink()
    images[0].unlink()
    sorted(folder.rglob("*.png"))[-1].unlink()
    write_dataset(layout, root, train=6, test=3, seed=5, progress=False)
    assert contents(folder) == before
    assert images[1].stat().st_mtime_ns == kept  # it was not drawn again


def test_files_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_tasks", _few_tasks(datasets._tasks))
    one = write_dataset("sha", tmp_path / "one", train=2, test=1, seed=9, jobs=1, progress=False)
    two = write_dataset("sha", tmp_path / "two", train=2, test=1, seed=9, jobs=2, progress=False)
    assert contents(one) == contents(two)


def _few_tasks(tasks):
    """Tasks with 20 people at most; they travel to the other processes as they are."""
    def few(*arguments):
        return [_with(task, people=min(task.people, 20)) for task in tasks(*arguments)]
    return few


def test_images_depend_on_their_own_number_only(tmp_path):
    """Splits and seeds differ; the first image of a split has its own seed."""
    tasks = {seed: datasets._tasks("sha", tmp_path, {"train": 3, "test": 3}, seed)
             for seed in (1, 2)}
    seeds = [task.seeds for group in tasks.values() for task in group]
    assert len(set(seeds)) == len(seeds)


def test_images_of_other_settings_or_photographs_are_never_overwritten(dataset):
    layout, folder = dataset
    root = folder.parent if layout != "sha" else folder.parent.parent
    before = contents(folder)
    with pytest.raises(ValueError, match="drawn with"):
        write_dataset(layout, root, train=6, test=3, seed=6, progress=False)
    marker = (folder / "synthetic.json").read_bytes()
    (folder / "synthetic.json").unlink()
    with pytest.raises(ValueError, match="not drawn by these settings"):
        write_dataset(layout, root, train=6, test=3, seed=6, progress=False)
    photograph = sorted(folder.rglob("*.jpg"))[0]
    drawn = photograph.read_bytes()
    Image.new("RGB", (80, 80)).save(photograph)
    with pytest.raises(ValueError, match="no comment of this generator"):
        write_dataset(layout, root, train=6, test=3, seed=5, progress=False)
    photograph.write_bytes(drawn)
    (folder / "synthetic.json").write_bytes(marker)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["IMG_1.jpg", "IMG_7.jpg"])  # one that is drawn, one that is not
def test_photographs_behind_a_linked_folder_are_never_overwritten(name, tmp_path):
    photos, split = tmp_path / "disk", tmp_path / "ShanghaiTech" / "part_A" / "train_data"
    for folder in (photos, split):
        folder.mkdir(parents=True)
    Image.new("RGB", (80, 80)).save(photos / name)
    before = contents(photos)
    (split / "images").symlink_to(photos)
    with pytest.raises(ValueError, match=f"{name}: .*no comment of this generator"):
        write_dataset("sha", tmp_path, train=2, test=1, seed=1, progress=False)
    assert contents(photos) == before and [one.name for one in split.iterdir()] == ["images"]


@pytest.mark.parametrize("place", ["images/IMG_1.jpg", "instances/IMG_1.png"])
def test_a_link_to_a_disk_that_is_away_is_not_replaced(place, tmp_path):
    link = tmp_path / "ShanghaiTech" / "part_A" / "train_data" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=f"{link.name}: .*not drawn by these settings"):
        write_dataset("sha", tmp_path, train=1, test=1, seed=1, progress=False)
    assert link.is_symlink()


@pytest.mark.parametrize("layout", sorted(CHARACTERS))
@pytest.mark.parametrize("images", [40, 16])
def test_counts_cover_the_logarithmic_range_evenly(layout, images):
    character = CHARACTERS[layout]
    counts = np.sort(stratified_counts(np.random.SeedSequence(3), images, character))
    crowds = counts[counts > 0]
    low, high = character.counts
    assert crowds[0] >= low and crowds[-1] <= high
    assert (len(crowds) < images) == (layout == "jhu")
    place = np.log(crowds / low) / np.log(high / low)
    expected = (np.arange(len(crowds)) + .5) / len(crowds)
    # rounding to whole people moves the smallest counts of a range that starts at 1
    assert np.abs(place - expected)[crowds >= 10].max() < 1 / len(crowds)


