"""Files of a training: checkpoints, shared states, damaged files, the model file."""

import json

import pandas as pd
import pytest
import torch

from tests.test_trainer import CPU, images, same, tiny, trainer
from xmask import files, model
from xmask.config import override
from xmask.study import training
from xmask.study.training import NOT_READ_IN_PHASE_1, NOT_READ_IN_WARMUP, fit, read_part
from xmask.tools import models
from xmask.trainer import Trainer


def run(folder, config=None, **options):
    made = trainer(config)
    fit(made, folder, progress=False, **options)
    return made


class Killed(Exception):
    pass


def kill_at(folder, epoch, config=None, **options):
    """Train and die in an epoch, as a lost machine would."""
    made = trainer(config)
    step = made._step

    def dying(*arguments):
        if made.epoch == epoch:
            raise Killed
        return step(*arguments)

    made._step = dying
    with pytest.raises(Killed):
        fit(made, folder, progress=False, **options)


def resumed(folder, config=None, *, fingerprint="", shared=None):
    """The epoch from which a new trainer would go on."""
    made = trainer(config)
    made.run_epoch = lambda: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        fit(made, folder, progress=False, fingerprint=fingerprint, shared=shared)
    return made.epoch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run(folder), folder


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_run_killed_ends_exactly_as_if_it_had_not_been(tmp_path, finished, epoch):
    kill_at(tmp_path, epoch)
    assert not (tmp_path / "model.safetensors").exists()
    again = run(tmp_path)
    assert same(again.teacher, finished[0].teacher) and same(again.student, finished[0].student)
    assert (tmp_path / "history.csv").read_bytes() == (finished[1] / "history.csv").read_bytes()


def test_a_users_checkpoint_stops_a_training_and_stays(tmp_path):
    with files.OutputFolder(tmp_path):
        (tmp_path / "checkpoint.pt").write_text("mine")
        with pytest.raises(FileExistsError, match="checkpoint.pt: was not written by xmask"):
            run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_text() == "mine"
    assert not list(tmp_path.glob("*.damaged*"))


def test_a_run_killed_before_its_model_is_written_writes_it(tmp_path, finished, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.files, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path)
    monkeypatch.undo()
    made = trainer()
    made.run_epoch = None  # nothing is left to train
    fit(made, tmp_path, progress=False)
    one, other = (models.load_network(folder / "model.safetensors")[0]
                  for folder in (tmp_path, finished[1]))
    assert same(one, other)


def test_the_history_is_a_table_with_a_row_an_epoch(finished):
    history = pd.read_csv(finished[1] / "history.csv")
    assert tuple(history) == training.HISTORY
    assert history["epoch"].tolist() == list(range(6))
    assert history.loc[history.phase == 1, "exclusivity"].isna().all()
    assert history.loc[history.phase == 3, ["p2r", "constraint"]].notna().all(axis=None)


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_the_model_file_is_the_named_network_and_the_checkpoint_gone(tmp_path, weights):
    made = run(tmp_path, tiny(evaluation__weights=weights))
    network, config, metadata = models.load_network(tmp_path / "model.safetensors")
    assert same(network, getattr(made, weights)) and not same(made.student, made.teacher)
    assert config == made.config and metadata["backbone"] == "random"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "model.safetensors"]
    assert json.loads(metadata["config"])["evaluation"]["weights"] == weights


def test_a_checkpoint_of_other_code_or_data_is_not_resumed(tmp_path):
    kill_at(tmp_path, 4, fingerprint="a")
    assert resumed(tmp_path, fingerprint="a") == 4
    assert resumed(tmp_path, fingerprint="b") == 0
    assert resumed(tmp_path, tiny(loss__tau=0.5), fingerprint="a") == 0
    assert not list(tmp_path.glob("*.damaged"))


def test_a_checkpoint_is_written_every_few_epochs(tmp_path):
    config = tiny(machine__checkpoint_every=2, schedule__phase1=5, schedule__phase2=5,
                  schedule__phase3=5)
    kill_at(tmp_path, 3, config)
    assert resumed(tmp_path, config) == 2


def test_best_on_test_keeps_the_network_with_the_lowest_score(tmp_path):
    states = []

    def scored(values):
        values = iter(values)

        def score(network):
            assert not network.training
            states.append({k: v.clone() for k, v in network.state_dict().items()})
            return next(values)

        return score

    config = tiny(schedule__phase3=8, selection="best-on-test")
    assert config.schedule.phase2 == 5 and config.machine.checkpoint_every == 1
    kill_at(tmp_path, 7, config, score=scored([3.0, 1.0]))
    chosen = run(tmp_path, config, score=scored([2.0])).network
    assert len(states) == 3
    assert all(torch.equal(v, states[1][k]) for k, v in chosen.state_dict().items())
    network, _, _ = models.load_network(tmp_path / "model.safetensors")
    assert same(network, chosen)


def test_every_epoch_of_phase_3_is_scored_however_often_it_is_saved(tmp_path):
    asked = []
    config = tiny(schedule__phase3=9, selection="best-on-test", machine__checkpoint_every=4)
    run(tmp_path, config, score=lambda network: asked.append(1) or len(asked))
    assert len(asked) == 9 - config.schedule.phase2


# --- shared states -----------------------------------------------------------------------------

def test_runs_that_share_phase_one_end_as_if_they_had_trained_it(tmp_path, finished):
    shared = tmp_path / "phase1", "data"
    base = run(tmp_path / "a", shared=shared)
    assert same(base.teacher, finished[0].teacher)
    ablated = tiny(loss__sigma=0.0)
    assert resumed(tmp_path / "b", ablated, shared=shared) == 3
    alone, taken = run(tmp_path / "c", ablated), run(tmp_path / "b", ablated, shared=shared)
    assert same(taken.teacher, alone.teacher) and not same(taken.teacher, base.teacher)
    other = tiny(optimisation__lr=0.1)
    assert resumed(tmp_path / "d", other, shared=shared) == 0, "another phase 1"
    assert resumed(tmp_path / "d", shared=(tmp_path / "phase1", "other data")) == 0


def test_supervised_only_shares_the_warmup_and_ends_as_if_it_had_trained_it(tmp_path):
    shared = tmp_path / "phase1", "data"
    run(tmp_path / "a", shared=shared)
    config = tiny(schedule__unlabelled=False)
    assert resumed(tmp_path / "b", config, shared=shared) == 1
    taken, alone = run(tmp_path / "b", config, shared=shared), run(tmp_path / "c", config)
    assert same(taken.teacher, alone.teacher) and same(taken.student, alone.student)


def test_a_network_that_started_otherwise_is_not_taken_up(tmp_path, monkeypatch):
    shared = tmp_path / "phase1", "data"
    run(tmp_path / "a", shared=shared)
    build = model.build
    monkeypatch.setattr(model, "build", lambda network: (build(network)[0], "ImageNet"))
    assert resumed(tmp_path / "b", shared=shared) == 0


def names(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("unread", [NOT_READ_IN_PHASE_1, NOT_READ_IN_WARMUP])
def test_every_field_is_in_the_key_or_on_the_list_of_those_not_read(unread):
    config = tiny()
    kept = set(names(read_part(config, unread)))
    assert kept | set(unread) == set(names(config.to_dict())) and not kept & set(unread)


OTHER = {
    "variant": "another", "selection": "best-on-test", "masks.segmenter": "bundled",
    "evaluation.weights": "student", "evaluation.count_threshold": 0.9,
    "evaluation.point_threshold": 0.2, "schedule.phase2": 4, "schedule.phase3": 7,
    "schedule.mask_warmup": 0, "optimisation.pseudo_threshold": 0.5,
}
# the rule that reads most
BASE = {"schedule__steps_per_epoch": 1, "optimisation__pseudo_threshold": None}


def changed(config, name):
    """The configuration with another value of a field."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    if name not in OTHER:
        assert isinstance(value, (bool, int, float)), f"{name}: give another value in OTHER"
    other = OTHER[name] if name in OTHER else (
        not value if isinstance(value, bool) else value + 1 if isinstance(value, int)
        else 0.8 * value or 0.3)
    assert other != value
    return override(config, {name: other})


@pytest.fixture(scope="module")
def phase_1():
    """Networks at the end of a warm-up and of a phase 1 with unlabelled images."""
    made = trainer(tiny(**BASE))
    made.run_epoch()
    warm = {k: v.clone() for k, v in made.student.state_dict().items()}
    made.run_epoch(), made.run_epoch()
    assert made.history[2]["weight"] > 0
    return warm, made.student.state_dict()


@pytest.mark.parametrize("name", NOT_READ_IN_WARMUP)
def test_fields_on_the_list_do_not_change_phase_1(phase_1, name):
    warm, end = phase_1
    made = Trainer(changed(tiny(**BASE), name), *images(), device=CPU)
    made.run_epoch()
    assert all(torch.equal(v, warm[k]) for k, v in made.student.state_dict().items())
    if name in NOT_READ_IN_PHASE_1:
        made.run_epoch(), made.run_epoch()
        assert all(torch.equal(v, end[k]) for k, v in made.student.state_dict().items())


# --- damaged files -----------------------------------------------------------------------------

def bitten(content):
    """The same file with some bytes in its middle overwritten."""
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 64 + content[middle + 64:]


DAMAGE = {"empty": lambda content: b"", "text": lambda content: b"hello\n",
          "cut short": lambda content: content[:len(content) // 2], "bitten": bitten}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_made_again(tmp_path, finished, damage):
    kill_at(tmp_path, 4)
    checkpoint = tmp_path / "checkpoint.pt"
    broken = DAMAGE[damage](checkpoint.read_bytes())
    checkpoint.write_bytes(broken)
    with pytest.warns(UserWarning, match=r"checkpoint.pt: damaged .*set aside as checkpoint.pt"
                                         r".damaged, and what it held is trained again"):
        again = run(tmp_path)
    assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == broken
    assert same(again.teacher, finished[0].teacher)


@pytest.mark.parametrize("content", [
    {}, [1, 2], {"fingerprint": None}, {"fingerprint": "key", "best": None},
    {"fingerprint": "key", "best": None, "epoch": 1},
    {"fingerprint": "key", "best": (1.0, {"a": torch.ones(1)}), "epoch": 1}])
def test_a_shared_state_with_wrong_keys_is_set_aside_and_made_again(tmp_path, content):
    shared = tmp_path / "phase1", "data"
    kill_at(tmp_path / "a", 4, shared=shared)
    files = sorted((tmp_path / "phase1").iterdir())
    assert len(files) == 2  # warm-up and phase 1
    for path in files:
        if isinstance(content, dict) and content.get("fingerprint"):
            content = content | {"fingerprint": path.stem}
        torch.save(content, path)
    with pytest.warns(UserWarning, match="damaged"):
        assert resumed(tmp_path / "b", shared=shared) == 0
    kill_at(tmp_path / "b", 4, shared=shared)
    assert resumed(tmp_path / "c", shared=shared) == 3
    assert sorted(p.suffix for p in (tmp_path / "phase1").iterdir()) == [
        ".damaged", ".damaged", ".pt", ".pt"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    kill_at(tmp_path, 4)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "checkpoint.pt")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError, match="checkpoint.pt"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()
