"""`xmask learn`: own photos and dots in, a model out; what was done is not done again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load

import xmask
from xmask import config, files
from xmask.cli import main
from xmask.data.training_images import Kept
from xmask.predict import predict_image
from xmask.study import evaluate
from xmask.synthetic import draw_scene
from xmask.tools import learn

TINY = {"optimisation.crop": 64, "optimisation.batch": 1, "machine.threads": 1, "schedule.phase1": 1,
        "schedule.phase2": 2, "schedule.phase3": 3, "schedule.warmup": 0,
        "schedule.mask_warmup": 0, "schedule.steps_per_epoch": 1}


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        scene = draw_scene(number, shape=(96, 128), people=6)
        Image.fromarray(scene.image).save(tmp_path / f"p{number}.png")
    np.savetxt(tmp_path / "p1.csv", scene.points, delimiter=",", header="x,y", comments="")
    return tmp_path, scene


def test_a_folder_of_photos_and_dots(photos):
    folder, scene = photos
    dotted, bare = learn.read_folder(folder)
    assert [one.name for one in dotted] == ["p1"] and [one.name for one in bare] == ["p0", "p2"]
    assert np.allclose(dotted[0].points, scene.points, atol=1e-4)


@pytest.mark.parametrize("text, message", [
    ("a,b\n1,2\n", "p1.csv: .*line 'x,y' first"),
    ("x,y\n1,two\n", "p1.csv"),
    ("x,y\n1,2\n3,\n", "p1.csv: line 3 lacks x or y"),
    ("", "p1.csv"),
])
def test_bad_dots_are_named(photos, text, message):
    folder, _ = photos
    (folder / "p1.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        learn.read_folder(folder)


def test_dots_without_a_photo_and_folders_without_photos_are_errors(photos, tmp_path):
    folder, _ = photos
    (folder / "other.csv").write_text("x,y\n")
    with pytest.raises(ValueError, match="other.csv: no image of this name"):
        learn.read_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no image"):
        learn.read_folder(tmp_path / "empty")


def test_learning_from_own_photos_makes_a_model_that_loads(photos, tmp_path):
    folder, _ = photos
    dotted, bare = learn.read_folder(folder)
    tiny = learn.configure(TINY)
    run = learn.learn(dotted, bare, tmp_path / "run", tiny, progress=False)
    model = xmask.load(run, device="cpu")
    assert model.record["trained_on"]["labelled"] == 1
    assert model.record["trained_on"]["unlabelled"] == 2
    assert not model.record["trained_on"]["synthetic"]
    assert "weights of the package" in model.record["initialisation"]
    assert model.predict(folder / "p0.png").instances.shape == (96, 128)
    with pytest.raises(ValueError, match="no dots"):
        learn.learn([], bare, tmp_path / "none", tiny)


def test_of_ten_dotted_photos_some_are_kept_back_and_say_what_learning_changed(tmp_path, capsys):
    for number in range(10):
        scene = draw_scene(number, shape=(96, 128), people=3 + number)
        Image.fromarray(scene.image).save(tmp_path / f"p{number}.png")
        np.savetxt(tmp_path / f"p{number}.csv", scene.points, delimiter=",", header="x,y",
                   comments="")
    sets = [f"--set={name}={value}" for name, value in TINY.items()]
    assert main(["learn", str(tmp_path), "--out", str(tmp_path / "run"), "--segmenter",
                 "classical", *sets]) == 0
    said = capsys.readouterr().out
    assert "On 3 photos with" in said and "before count wrong by" in said and "after " in said
    assert said.endswith(f"\nnext: xmask predict PHOTOS --out FOLDER --weights {tmp_path / 'run'}\n")
    record = files.read_json(tmp_path / "run" / "config.json")
    kept, learnt = set(record["data"]["held_out"]), set(record["data"]["labelled"])
    assert len(kept) == 3 and len(learnt) == 7 and not kept & learnt
    masks = {path.stem for path in (tmp_path / "run" / "masks").glob("*.png")}
    assert learnt <= masks and not kept & masks
    report = files.read_json(tmp_path / "run" / "report.json")
    model = xmask.load(tmp_path / "run", device="cpu")
    assert model.calibration.images == report["photos"] == 3
    others = [draw_scene(int(name[1:]), shape=(96, 128), people=3 + int(name[1:]))
              for name in record["data"]["held_out"]]
    seen = evaluate.look(model.network, others, model.config.evaluation, progress=False)
    errors = []
    for number, sample in enumerate(others):  # counted with the calibration of the two others
        by_others = evaluate.calibrate(seen[:number] + seen[number + 1:], model.config)
        decoding = by_others.applied(model.config.evaluation)
        found = predict_image(model.network, sample.image, decoding)
        errors.append(abs(found.count - len(sample.points)))
    assert report["after"]["mae"] == pytest.approx(np.mean(errors))
    assert set(report["before"]) == set(report["after"]) == {
        "mae", "bias", "precision", "recall", "coverage"}
    assert report["after"]["coverage"] is None  # three are too few for an interval
    found = model.predict(tmp_path / "p0.png")
    assert (found.low, found.high) == (None, None)


def test_a_crash_before_the_report_is_not_taken_for_the_end(tmp_path, monkeypatch):
    folder, run, tiny = tmp_path / "photos", tmp_path / "run", learn.configure(TINY)
    folder.mkdir()
    for number in range(10):  # most of them empty: some cannot be calibrated by the others
        scene = draw_scene(number, shape=(64, 96), people=4)
        Image.fromarray(scene.image).save(folder / f"p{number}.png")
        np.savetxt(folder / f"p{number}.csv", scene.points if number == 9 else np.zeros((0, 2)),
                   delimiter=",", header="x,y", comments="")

    def again(settings=tiny):
        return learn.learn(*learn.read_folder(folder), run, settings, segmenter="classical",
                           progress=False)

    def crash(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(learn, "compare", crash)
        again()
    assert not (run / "report.json").exists()
    again()
    assert files.read_json(run / "config.json")["calibration"]["images"] == 3
    assert files.read_json(run / "report.json")["photos"] == 3
    again(config.override(tiny, {"calibration.held_out": 0.0}))  # without any: the old one goes
    assert not (run / "report.json").exists()


def test_of_fewer_than_ten_none_is_kept_back(photos):
    folder, _ = photos
    dotted, _ = learn.read_folder(folder)
    assert learn.held_out(dotted, 0.2) == []


def test_what_is_finished_is_not_done_again(photos, tmp_path, monkeypatch, caplog):
    folder, scene = photos
    (folder / "broken.jpg").write_bytes(b"no photo")
    tiny, out = learn.configure(TINY), tmp_path / "run"

    def run():
        return learn.learn(*learn.read_folder(folder), out, tiny, segmenter="classical",
                           progress=False)

    run()
    assert "left out: " in caplog.text and "broken.jpg" in caplog.text
    record = files.read_json(out / "config.json")
    assert record["start"] == xmask.load(device="cpu").record["sha256"]
    assert record["start"][:12] in record["backbone"]["initialisation"]
    assert len(record["data"]["left_out"]) == 1 and record["data"]["unlabelled"] == 2
    model = (out / "model.safetensors").read_bytes()
    tensors = load(model)
    mask = (out / "masks" / "p1.png").stat().st_mtime_ns
    monkeypatch.setattr(learn, "Trainer", None)
    run()  # trains nothing
    with pytest.raises(TypeError):
        learn.learn(*learn.read_folder(folder), out, learn.configure(TINY, seed=2),
                    segmenter="classical", progress=False)
    monkeypatch.undo()
    (out / "model.safetensors").write_bytes(model[:-9])  # damaged: trained again
    run()
    again = load((out / "model.safetensors").read_bytes())
    assert all((again[name] == tensors[name]).all() for name in tensors)
    assert (out / "model.safetensors.set-aside-1").is_file()
    assert (out / "masks" / "p1.png").stat().st_mtime_ns == mask  # masks are not made again
    (out / "masks" / "p1.png").write_bytes(b"")
    (out / "model.safetensors").unlink()
    run()
    assert (out / "masks" / "p1.png").stat().st_size > 0


@pytest.mark.parametrize("change", ["a photo more", "another segmenter", "other photos"])
def test_a_finished_model_stays_whatever_is_learnt_into_its_folder(photos, tmp_path, monkeypatch,
                                                                   change, caplog):
    folder, scene = photos
    out, tiny = tmp_path / "run", learn.configure(TINY)

    def run(source=folder, segmenter="classical", **options):
        return learn.learn(*learn.read_folder(source), out, tiny, segmenter=segmenter,
                           progress=False, **options)

    def results(where=out):
        return {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*")
                if path.suffix in (".safetensors", ".json", ".csv", ".png")
                and path.parent.name != ".xmask" and path.name != "manifest.json"}

    run()
    before = results()
    if change == "another segmenter":
        with pytest.raises(ValueError, match="masks of 1 images .* another segmenter.*--overwrite"):
            run(segmenter="bundled")
        assert results() == before
        return
    source = folder
    if change == "other photos":
        source = tmp_path / "other"
        source.mkdir()
    Image.fromarray(scene.image[:80]).save(source / "q.png")
    (source / "q.csv").write_text("x,y\n20,30\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learn.training, "fit", stopped)
        run(source)
    kept = xmask.load(out / "earlier-1", device="cpu")
    assert kept.record["trained_on"]["labelled"] == 1 and "kept in earlier-1" in caplog.text
    run(source)
    xmask.load(out, device="cpu")
    after = results()
    moved = ("model.safetensors", "config.json", "history.csv")
    assert all(after[f"earlier-1/{name}"] == before[name] for name in moved)
    assert before["masks/p1.png"] == after["masks/p1.png"] and "masks/q.png" in after
    assert not (out / "earlier-2").exists()


def stopped(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_a_users_file_with_a_needed_name_is_told_before_anything_is_made(photos, tmp_path, name):
    folder, _ = photos
    out = tmp_path / "run"
    with files.OutputFolder(out):
        files.write_text(out / "history.csv", "")
    (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}: was not written by xmask"):
        learn.learn(*learn.read_folder(folder), out, learn.configure(TINY), segmenter="classical",
                    progress=False)
    assert (out / name).read_text() == "mine" and not (out / "masks").exists()


def test_a_finished_model_stays_where_a_checkpoint_makes_it_look_unfinished(
        photos, tmp_path, monkeypatch):
    folder, _ = photos

    def run():
        learn.learn(*learn.read_folder(folder), tmp_path / "run", learn.configure(TINY),
                    segmenter="classical", progress=False)

    run()
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_text("of another run")
    monkeypatch.setattr(learn.training, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model


def test_a_folder_of_the_users_takes_no_model(photos, tmp_path):
    folder, _ = photos
    with pytest.raises(FileExistsError, match="no record of xmask"):
        learn.learn(*learn.read_folder(folder), folder, learn.configure(TINY), progress=False)


def test_only_the_last_images_are_kept_in_memory():
    reads = []

    class Images:
        def __len__(self):
            return 50

        def __getitem__(self, position):
            reads.append(position)
            return learn.Sample(np.zeros((10, 10, 3), np.uint8), np.zeros((0, 2)))

    recent = Kept(Images(), limit=5 * 300)
    for _ in range(2):
        for position in (*range(50), 49, 48, 47):
            assert recent[position].shape == (10, 10)
    assert len(reads) == 100 and len(recent.samples) == 5 and recent.held == 1500
