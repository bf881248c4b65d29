"""Corrections are data: applied in order, saved beside the automatic masks, never over them."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from skimage.measure import label as connected_components

from tests.data.test_masks import Dataset, masks
from xmask import files, nnec
from xmask.data.masks import read_masks
from xmask.edp_sam import check_label_map
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.tools import correct


@pytest.fixture
def folder(tmp_path):
    return masks(tmp_path, ClassicalSegmenter())


def state(folder):
    sample = Dataset()[4]
    return sample, sample.points.astype(float), read_masks(folder, "IMG_4")


def test_drop_disc_and_prompt_change_one_head_and_keep_the_map_exclusive(folder):
    sample, points, labels = state(folder)
    radii = nnec.exclusion_radii(points, labels.shape)
    dropped = correct.apply(labels, points, [{"head": 2, "action": "drop"}])
    assert not (dropped == 2).any() and (dropped[labels != 2] == labels[labels != 2]).all()
    x, y = points[1]
    for edit in ({"action": "disc", "radius": 2.5},
                 {"action": "prompt", "box": [x - 3, y - 3, x + 3, y + 3]}):
        new = correct.apply(dropped, points, [{"head": 2, **edit}], sample.image,
                            ClassicalSegmenter())
        assert (new == 2).any()
        check_label_map(new, points, radii)  # in its circle, and everybody in one piece
        assert set(np.unique(new)) >= set(np.unique(labels)) - {2}
    assert (labels == 2).any()  # the map that was given is left alone


def test_a_disc_takes_only_what_is_nearer_to_it():
    points = np.array([[4.0, 4.0], [12.0, 4.0]])
    labels = np.zeros((9, 17), np.int32)
    labels[3:6, 6:15] = 2
    new = correct.apply(labels, points, [{"head": 1, "action": "disc", "radius": 7.0}])
    _, x = np.nonzero(new[3:6] == 1)  # where the two compete; a pixel halfway stays as it was
    assert x.max() == 7 and (new[3:6, 8:15] == 2).all()
    assert connected_components(new, background=0, connectivity=1).max() == 2


@pytest.mark.parametrize("edit,found", [
    ({"head": 1, "action": "paint"}, "action 'paint'; expected one of drop, disc, prompt"),
    ({"head": 9, "action": "drop"}, "head 9 of 8"),
    ({"head": 0, "action": "drop"}, "head 0 of 8"),
    ({"head": 1, "action": "disc"}, "radius None"),
    ({"head": 1, "action": "prompt", "box": [3, 3, 2, 5]}, r"box \[3, 3, 2, 5\]"),
    ({"head": 1, "action": "prompt", "box": [1, 3, 2, 5]}, "needs the image and a segmenter"),
])
def test_edits_that_cannot_be_are_named(folder, edit, found):
    _, points, labels = state(folder)
    with pytest.raises(ValueError, match=found):
        correct.apply(labels, points, [edit])


def test_the_tool_saves_beside_the_automatic_masks_and_goes_on_later(folder):
    before = {p.name: files.sha256(p) for p in folder.glob("IMG_*")}
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter())
    assert tool.name.options == tuple(f"IMG_{k}" for k in range(5))
    assert tool.buttons["drop"].disabled  # IMG_0 has no heads
    tool.name.value = "IMG_4"
    first = tool.head
    assert first == tool.table["score"].idxmin() + 1 and tool.picture.value[:4] == b"\x89PNG"
    tool.buttons["drop"].click()
    tool.rank.value = 2
    tool.radius.value = 2.0
    tool.buttons["disc"].click()
    tool.buttons["prompt"].click()
    tool.buttons["undo"].click()
    assert "2 edits" in tool.status.value
    assert {p.name: files.sha256(p) for p in folder.glob("IMG_*")} == before
    corrected = correct.read_corrected(folder, "IMG_4")
    assert not (corrected == first).any() and (corrected == tool.labels).all()
    again = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    assert again.edits == tool.edits and (again.labels == tool.labels).all()
    assert (correct.apply(read_masks(folder, "IMG_4"), again.points, again.edits) ==
            corrected).all()
    assert (correct.read_corrected(folder, "IMG_3") == read_masks(folder, "IMG_3")).all()


def test_edits_of_other_automatic_masks_are_refused(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["drop"].click()
    masks(folder, ClassicalSegmenter(), superpixel_prompt=False)  # other masks, same place
    edits = files.read_json(folder / "corrected" / "IMG_4.json")  # a person's work is not removed
    assert files.sha256(folder / "IMG_4.png") != edits["automatic"]
    with pytest.raises(ValueError, match="made for other automatic masks of IMG_4"):
        correct.read_corrected(folder, "IMG_4")


@pytest.mark.parametrize("link", [False, True])
def test_a_picture_of_the_user_is_never_replaced(folder, tmp_path, link):
    place = folder / "corrected"
    if link:
        (tmp_path / "photos").mkdir()
        place.symlink_to(tmp_path / "photos")
    else:
        place.mkdir()
    (place / "IMG_4.png").write_bytes(b"a photo")
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["drop"].click()
    assert "holds files of yours" in tool.status.value and tool.edits == []
    assert [(p.name, p.read_bytes()) for p in place.iterdir()] == [("IMG_4.png", b"a photo")]


def test_two_tools_do_not_lose_each_others_edits(folder):
    one, two = (correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4", "IMG_3"])
                for _ in range(2))
    one.buttons["drop"].click()
    two.rank.value = 2
    two.buttons["prompt"].click()
    assert "edited elsewhere" in two.status.value and two.edits == []
    assert correct.read_edits(folder, "IMG_4") == one.edits
    two.name.value = "IMG_3"
    two.name.value = "IMG_4"
    two.rank.value = 2
    two.buttons["prompt"].click()
    assert [edit["action"] for edit in correct.read_edits(folder, "IMG_4")] == ["drop", "prompt"]
    two.buttons["undo"].click()
    assert correct.read_edits(folder, "IMG_4") == one.edits


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("killed", ["write_png", "write_json"])
def test_a_kill_while_saving_loses_no_finished_edit(folder, monkeypatch, before, killed):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    for rank in range(before):
        tool.rank.value = rank + 1
        tool.buttons["drop"].click()
    tool.rank.value = before + 1
    with monkeypatch.context() as patch:
        write = getattr(files, killed)

        def kill(path, *content):
            if path.stem == "IMG_4":
                raise KeyboardInterrupt
            write(path, *content)
        patch.setattr(files, killed, kill)
        with pytest.raises(KeyboardInterrupt):
            tool.act("drop")
    again = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    assert len(again.edits) == before
    again.rank.value = before + 2
    again.buttons["drop"].click()
    edits = correct.read_edits(folder, "IMG_4")
    assert len(edits) == before + 1
    labels = correct.read_corrected(folder, "IMG_4")
    assert (labels == correct.apply(read_masks(folder, "IMG_4"), again.points, edits)).all()


def test_a_map_that_is_not_of_its_edits_is_named(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["drop"].click()
    files.write_png(folder / "corrected" / "IMG_4.png", tool.automatic.astype(np.uint16))
    with pytest.raises(ValueError, match="not the map that the edits in IMG_4.json made"):
        correct.read_corrected(folder, "IMG_4")


@pytest.mark.parametrize("stale", [False, True])
def test_corrections_of_earlier_versions_go_on(folder, stale):
    place = folder / "corrected"
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["drop"].click()
    shutil.rmtree(place / files.HIDDEN)
    noted = files.read_json(place / "IMG_4.json")
    del noted["seal"]
    files.write_json(place / "IMG_4.json", noted)
    if stale:  # they could be killed between the edits and the map
        (place / "IMG_4.png").unlink()
    (place / "IMG_3.png").write_bytes(b"mine")
    again = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4", "IMG_3"])
    assert again.edits == tool.edits and (again.labels == tool.labels).all()
    again.rank.value = 2
    again.buttons["drop"].click()
    assert len(correct.read_edits(folder, "IMG_4")) == 2
    assert (place / "IMG_4.png.set-aside-1").is_file() is not stale, "it may be drawn by hand"
    again.name.value = "IMG_3"
    again.buttons["drop"].click()
    assert "files of yours" in again.status.value
    assert (place / "IMG_3.png").read_bytes() == b"mine"


def test_corrections_that_were_copied_without_their_record_go_on(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["drop"].click()
    shutil.rmtree(folder / "corrected" / files.HIDDEN)
    tool.buttons["disc"].click()
    assert len(correct.read_edits(folder, "IMG_4")) == 2
    assert sorted(p.name for p in (folder / "corrected").iterdir()) == [
        files.HIDDEN, "IMG_4.json", "IMG_4.png"]


def test_a_folder_without_masks_is_named(tmp_path):
    with pytest.raises(ValueError, match="run `xmask masks` first"):
        correct.Corrector(Dataset(), tmp_path, ClassicalSegmenter())


class Blind(ClassicalSegmenter):
    """Finds nothing, whatever it is asked."""

    def predict(self, prompts, head, pixel):
        logits, scores = super().predict(prompts, head, pixel)
        return -np.abs(logits) - 1, scores


def test_a_prompt_that_finds_nothing_leaves_the_mask_and_says_so(folder):
    sample, points, labels = state(folder)
    x, y = points[1]
    edit = {"head": 2, "action": "prompt", "box": [x - 3, y - 3, x + 3, y + 3]}
    with pytest.raises(ValueError, match="of head 2: the segmenter finds no mask there"):
        correct.apply(labels, points, [edit], sample.image, Blind())
    tool = correct.Corrector(Dataset(), folder, Blind(), ["IMG_4"])
    tool.buttons["prompt"].click()
    assert "finds no mask" in tool.status.value and tool.edits == []
    assert (tool.labels == labels).all() and not (folder / "corrected").exists()


def test_every_prompt_says_which_segmenter_answered(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4"])
    tool.buttons["prompt"].click()
    tool.buttons["disc"].click()
    prompt, disc = correct.read_edits(folder, "IMG_4")
    assert prompt["segmenter"] == ClassicalSegmenter().describe() and "segmenter" not in disc
    path = folder / "corrected" / "IMG_4.json"
    old = files.read_json(path)  # as the first version wrote it
    del old["edits"][0]["segmenter"]
    files.write_json(path, {**old, "segmenter": {"kind": "another"}})
    prompt, disc = correct.read_edits(folder, "IMG_4")
    assert prompt["segmenter"] == {"kind": "another"} and "segmenter" not in disc


def test_an_image_that_cannot_be_read_leaves_the_one_before(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_4", "IMG_3"])
    labels = tool.labels
    (folder / "IMG_3.png").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read as a label map"):
        tool.name.value = "IMG_3"
    assert "IMG_3 cannot be shown" in tool.status.value and tool.buttons["drop"].disabled
    assert len(tool.points) == len(tool.table) == 8 and tool.labels is labels
    assert tool.sample.name == "IMG_4"
    tool.act("drop")  # should anybody still do it, it is noted for the image that is shown
    assert [p.name for p in sorted((folder / "corrected").iterdir())] == [
        files.HIDDEN, "IMG_4.json", "IMG_4.png"]


def test_sliders_of_an_image_without_heads_do_nothing(folder):
    tool = correct.Corrector(Dataset(), folder, ClassicalSegmenter(), ["IMG_0", "IMG_4"])
    tool.across.value = (3, 9)
    tool.rank.value = 2
    assert tool.status.value == "IMG_0 has no heads"
    tool.name.value = "IMG_4"
    tool.rank.value = 5
    tool.name.value = "IMG_0"
    assert tool.status.value == "IMG_0 has no heads"


def test_the_notebook_makes_masks_only_where_there_are_none(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "notebooks" / "14_correct_masks.ipynb"
    source = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"][1]
    monkeypatch.setattr("xmask.study.steps.check_parameters", lambda cells: None)
    monkeypatch.setattr("xmask.study.steps.enter_root", lambda: None)
    monkeypatch.setattr("xmask.data.open_dataset", lambda *_: Dataset())
    values = {"dataset": "sha", "root": "", "split": "train", "worst": 2, "In": [],
              "segmenter": "classical", "masks": str(tmp_path / "new")}
    exec(source, dict(values))
    assert (tmp_path / "new" / "IMG_4.csv").is_file()
    made = masks(tmp_path / "made", ClassicalSegmenter(), nnec=False)
    before = {p: p.stat().st_mtime_ns for p in made.iterdir()}
    exec(source, {**values, "masks": str(made)})
    assert {p: p.stat().st_mtime_ns for p in made.iterdir()} == before
