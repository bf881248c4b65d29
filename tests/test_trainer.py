"""The trainer: phases, weights, an exact resume, a teacher that follows in full."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.data.test_transforms import scene
from xmask import model
from xmask.study import evaluate
from xmask.config import Schedule, override, preset
from xmask.data.sample import Sample
from xmask.trainer import Trainer, learning_rates, phase_of, unlabelled_weight

TINY = {
    "network.channels": 8,
    "optimisation.batch": 2,
    "optimisation.crop": 32,
    "schedule.phase1": 3,
    "schedule.phase2": 5,
    "schedule.phase3": 6,
    "schedule.steps_per_epoch": 2,
    "schedule.warmup": 1,
    "schedule.mask_warmup": 1,
    "schedule.ramp": 0.5,
    "machine.checkpoint_every": 1,
}


def tiny(**changes):
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return override(preset("demo", "sha", 40, seed=1), TINY | names)


def trainer(folder, config=None, **options):
    labelled = [scene(i) for i in range(3)]
    bare = [Sample(scene(10 + i).image, np.zeros((0, 2), np.float32)) for i in range(3)]
    return Trainer(config or tiny(), labelled, bare, folder, device=torch.device("cpu"),
                   progress=False, **options)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[k], other[k]) for k in one)


class Killed(Exception):
    pass


def kill_at(run, epoch):
    """Make a trainer die in the middle of an epoch, as a lost machine would."""
    step, done = run._step, []

    def dying(phase, weight, batches):
        if run.epoch == epoch and done and done[-1] == epoch:
            raise Killed
        done.append(run.epoch)
        return step(phase, weight, batches)

    run._step = dying
    with pytest.raises(Killed):
        run.fit()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("run"))
    run.fit()
    return run


@pytest.mark.parametrize("epoch", [1, 3, 4, 5])
def test_a_run_killed_in_any_phase_ends_exactly_as_if_it_had_not_been(tmp_path, finished, epoch):
    kill_at(trainer(tmp_path), epoch)
    assert not (tmp_path / "model.safetensors").exists()
    again = trainer(tmp_path)
    again.fit()
    assert same(again.teacher, finished.teacher) and same(again.student, finished.student)
    read = [(f / "history.csv").read_bytes() for f in (tmp_path, finished.folder)]
    assert read[0] == read[1]


def test_runs_that_share_phase_one_end_as_if_they_had_trained_it(tmp_path, finished):
    base = trainer(tmp_path / "a", cache=(tmp_path / "cache", "data"))
    base.fit()
    assert same(base.teacher, finished.teacher)
    ablated = tiny(loss__sigma=0.0)
    shared = trainer(tmp_path / "b", ablated, cache=(tmp_path / "cache", "data"))
    shared._resume()
    assert shared.epoch == 3
    shared.fit()
    alone = trainer(tmp_path / "c", ablated)
    alone.fit()
    assert same(shared.teacher, alone.teacher) and not same(shared.teacher, base.teacher)
    other = trainer(tmp_path / "d", tiny(optimisation__lr=0.1),
                    cache=(tmp_path / "cache", "data"))
    other._resume()
    assert other.epoch == 0, "another phase 1 must not be taken over"


def test_supervised_only_shares_the_warmup_and_ends_as_if_it_had_trained_it(tmp_path):
    trainer(tmp_path / "a", cache=(tmp_path / "cache", "data")).fit()
    config = tiny(schedule__unlabelled=False)
    shared = trainer(tmp_path / "b", config, cache=(tmp_path / "cache", "data"))
    shared._resume()
    assert shared.epoch == 1
    shared.fit()
    alone = trainer(tmp_path / "c", config)
    alone.fit()
    assert same(shared.teacher, alone.teacher) and same(shared.student, alone.student)


def test_a_network_that_started_otherwise_is_not_taken_up(tmp_path, monkeypatch):
    cache = (tmp_path / "cache", "data")
    trainer(tmp_path / "a", cache=cache).fit()
    build = model.build
    monkeypatch.setattr(model, "build", lambda network: (build(network)[0], "ImageNet"))
    other = trainer(tmp_path / "b", cache=cache)
    other._resume()
    assert other.epoch == 0 and other.initialisation == "ImageNet"


def test_a_checkpoint_of_other_code_or_data_is_not_resumed(tmp_path):
    kill_at(trainer(tmp_path, fingerprint="a"), 4)
    same_run, other = trainer(tmp_path, fingerprint="a"), trainer(tmp_path, fingerprint="b")
    same_run._resume(), other._resume()
    assert (same_run.epoch, other.epoch) == (4, 0)


PAPER = {"optimisation__phase2_encoder_lr": 0.0, "loss__phase2_p2r": 0.0}


def test_the_paper_freezes_the_encoder_after_phase_1():
    parts = {phase: set(learning_rates(preset("paper", "sha", 10), phase)) for phase in (1, 2, 3)}
    assert parts == {1: {"encoder", "fusion", "decoder"}, 2: {"mask_head", "fusion", "decoder"},
                     3: {"fusion", "decoder"}}
    ours = preset("demo", "sha", 10)
    assert learning_rates(ours, 2)["encoder"] == ours.optimisation.phase2_encoder_lr > 0


def test_points_can_be_learnt_in_the_mask_phase_too(tmp_path):
    run = trainer(tmp_path, tiny(loss__phase2_p2r=3.0))
    run._enter(2)
    row = run._step(2, 0.0, run._batches(3))
    assert row["p2r"] > 0 and row["loss"] == pytest.approx(row["p2r"] + row["exclusivity"])
    run = trainer(tmp_path, tiny(**PAPER))
    run._enter(2)
    assert "p2r" not in run._step(2, 0.0, run._batches(3))


@pytest.mark.parametrize("phase, changes", [(1, {}), (2, {}), (2, PAPER), (3, {})])
def test_only_the_parts_of_a_phase_learn(tmp_path, phase, changes):
    run = trainer(tmp_path, tiny(schedule__warmup=0, schedule__mask_warmup=0, **changes))
    run.epoch = {1: 2, 2: 4, 3: 5}[phase]
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    run._enter(phase)
    run._step(phase, 1.0, run._batches(run.epoch))
    changed = {k.split(".")[0] for k, v in run.student.state_dict().items()
               if not torch.equal(v, before[k])}
    expected = set(learning_rates(run.config, phase))
    if phase == 2 and not run.config.loss.point_mask and not run.config.loss.phase2_p2r:
        expected.discard("decoder")  # only the point-mask term reaches it, and weight decay
        changed.discard("decoder")
    assert changed == expected


def test_the_teacher_follows_parameters_and_batchnorm_statistics(tmp_path):
    run = trainer(tmp_path)
    run._enter(1)
    start = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    run._step(1, 0.0, run._batches(0))
    keep = run.config.optimisation.ema
    for name, mine in run.teacher.state_dict().items():
        if not mine.is_floating_point() or name.startswith("mask_head"):
            continue
        expected = keep * start[name] + (1 - keep) * run.student.state_dict()[name]
        assert torch.allclose(mine, expected, atol=1e-6), name
    assert not torch.equal(run.teacher.encoder.to_fine[0][1].running_mean,
                           start["encoder.to_fine.0.1.running_mean"])


def test_the_history_names_every_term_of_every_phase(finished):
    history = pd.read_csv(finished.folder / "history.csv")
    assert history["epoch"].tolist() == list(range(6))
    assert history["phase"].tolist() == [1, 1, 1, 2, 2, 3]
    assert history["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert history.loc[history.phase == 1, "exclusivity"].isna().all()
    assert history.loc[history.phase == 2, "exclusivity"].notna().all()
    assert history.loc[history.phase == 3, ["p2r", "constraint"]].notna().all(axis=None)
    assert history["weight"].tolist() == [0, 0, 0.5, 0, 0, 0.1]


def test_the_model_file_is_complete_and_the_checkpoint_gone(finished):
    network, config, metadata = evaluate.load(finished.folder / "model.safetensors")
    assert same(network, finished.teacher)
    assert config == finished.config and metadata["backbone"] == "random"
    assert not (finished.folder / "checkpoint.pt").exists()


def test_it_learns_to_count(tmp_path):
    """On bright squares over noise, counts soon err less than half as much as a constant."""
    def bright(seed):
        made = scene(seed, (64, 64), people=1 + 2 * (seed % 8))
        image = made.image // 4
        image[made.instances > 0] = 230
        return Sample(image, made.points, made.instances)

    config = tiny(schedule__phase1=20, schedule__phase2=20, schedule__phase3=20,
                  schedule__steps_per_epoch=8, schedule__warmup=20, network__channels=16,
                  optimisation__crop=64, optimisation__ema=0.9)
    run = Trainer(config, [bright(i) for i in range(8)], [], tmp_path,
                  device=torch.device("cpu"), progress=False)
    test = [bright(104 + i) for i in range(8)]
    network = run.fit()
    assert evaluate.count_error(network, test, config.evaluation) < 2  # a constant: 4


def test_best_on_test_keeps_the_network_with_the_lowest_score(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    states = []

    def score(network):
        states.append({k: v.clone() for k, v in network.state_dict().items()})
        return next(scores)

    config = tiny(schedule__phase3=8, selection="best-on-test")
    chosen = trainer(tmp_path, config, score=score).fit()
    assert len(states) == 3
    assert all(torch.equal(v, states[1][k]) for k, v in chosen.state_dict().items())


def test_the_weight_of_the_unlabelled_loss_grows_as_in_the_paper():
    s = Schedule()  # published: 1500, 2000, 2100; warm-up 50, 0.01 an epoch, at most 2
    weights = [unlabelled_weight(s, e) for e in (0, 50, 51, 150, 250, 1499)]
    assert weights == pytest.approx([0, 0, 0.01, 1, 2, 2])
    assert [phase_of(s, e) for e in (1499, 1500, 1999, 2000, 2099)] == [1, 2, 2, 3, 3]
    assert unlabelled_weight(s, 2000) == pytest.approx(0.1)
    assert unlabelled_weight(Schedule(unlabelled=False), 1000) == 0


def test_supervised_only_never_reads_an_unlabelled_image(tmp_path):
    class Poison(list):
        def __getitem__(self, index):
            raise AssertionError("an unlabelled image was read")

    run = Trainer(tiny(schedule__unlabelled=False), [scene(0)], Poison([1, 2]), tmp_path,
                  device=torch.device("cpu"), progress=False)
    run.fit()
    assert all(row["weight"] == 0 for row in run.history)


def test_what_goes_wrong_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no labelled image"):
        Trainer(tiny(), [], [scene(0)], tmp_path, device=torch.device("cpu"))
    run = trainer(tmp_path)
    monkeypatch.setattr(run, "_update", lambda *_: (_ for _ in ()).throw(
        torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(RuntimeError, match=r"lower optimisation.batch \(now 2\)"):
        run.fit()
    broken = trainer(tmp_path / "nan")
    torch.nn.init.constant_(next(broken.student.parameters()), float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate of that phase"):
        broken.fit()
