"""The trainer: phases, weights, what each phase learns from, exact states, a full teacher."""

import copy

import numpy as np
import pytest
import torch

from tests import reference
from tests.data.test_transforms import scene
from xmask import decode, features, losses, model
from xmask.config import Schedule, override, preset
from xmask.data.sample import Sample
from xmask.data.transforms import Batch
from xmask.study import evaluate
from xmask.trainer import Trainer, learning_rates, phase_of, unlabelled_weight

TINY = {
    "seed": 3,  # with it, some cells are points in phase 2: without any, nothing is learnt there
    "network.backbone": "test_resnet",
    "network.weights": "random",
    "network.fold_norm": False,
    "network.freeze_stride": 0,
    "network.channels": 8,
    "masks.segmenter": "classical",
    "calibration.held_out": 0.0,
    # a network that has hardly learnt anything finds heads all over the image above 0.5
    "evaluation.point_threshold": 0.6,
    "evaluation.count_threshold": 0.6,
    "machine.threads": 1,
    "optimisation.batch": 2,
    "optimisation.lr": 3e-3,
    "optimisation.encoder_lr": 3e-3,
    "optimisation.phase2_encoder_lr": 1e-3,
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
CPU = torch.device("cpu")


def tiny(**changes):
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return override(preset("demo", "sha", 40), TINY | names)


def images():
    """Three labelled samples, and all six as unlabelled ones."""
    bare = [Sample(scene(i).image, np.zeros((0, 2), np.float32)) for i in (0, 1, 2, 10, 11, 12)]
    return [scene(i) for i in range(3)], bare


def trainer(config=None):
    return Trainer(config or tiny(), *images(), device=CPU)


def train(run):
    while not run.finished:
        run.run_epoch()
    return run


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def finished():
    made = train(trainer())
    assert all(row["exclusivity"] > 0 for row in made.history if row["phase"] == 2)
    return made


# --- states ------------------------------------------------------------------------------------

@pytest.mark.parametrize("epoch", [1, 3, 4, 5])
def test_a_training_that_goes_on_from_a_state_ends_as_if_it_had_not_stopped(finished, epoch):
    first = trainer()
    while first.epoch < epoch:
        first.run_epoch()
    state = copy.deepcopy(first.state())
    first.run_epoch()  # the state does not change any more
    again = trainer()
    again.restore(state)
    assert again.epoch == epoch
    train(again)
    assert same(again.teacher, finished.teacher) and same(again.student, finished.student)
    assert again.history == finished.history


@pytest.mark.parametrize("fault", [
    lambda state: state.pop("teacher"), lambda state: state.update(optimiser={"a": 1}),
    lambda state: state["student"].popitem(), lambda state: state.update(epoch="soon"),
    lambda state: state.update(student=None)])
def test_a_state_of_something_else_is_refused_and_changes_nothing(finished, fault):
    state = copy.deepcopy(finished.state())
    fault(state)
    run = trainer()
    run.run_epoch()
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match="not a state of this training"):
        run.restore(state)
    assert run.epoch == 1 and run.history == before["history"]
    train(run)
    assert same(run.student, finished.student) and same(run.teacher, finished.teacher)


# --- phases and weights ------------------------------------------------------------------------

PAPER = {"optimisation__phase2_encoder_lr": 0.0, "loss__phase2_p2r": 0.0}


def test_the_paper_freezes_the_encoder_after_phase_1():
    parts = {phase: set(learning_rates(preset("paper", "sha", 10), phase)) for phase in (1, 2, 3)}
    assert parts == {1: {"encoder", "fusion", "decoder"}, 2: {"mask_head", "fusion", "decoder"},
                     3: {"fusion", "decoder"}}
    ours = preset("demo", "sha", 10)
    assert learning_rates(ours, 2)["encoder"] == ours.optimisation.phase2_encoder_lr > 0


@pytest.mark.parametrize("phase, learning", [
    (1, {"encoder", "fusion", "decoder"}), (2, {"mask_head", "fusion", "decoder"}),
    (3, {"fusion", "decoder"})])
def test_parts_that_do_not_learn_are_in_evaluation_mode(phase, learning):
    run = trainer(tiny(**PAPER))
    run._enter(phase)
    modes = {name: part.training for name, part in run.student.named_children()}
    assert {name for name, training in modes.items() if training} == learning
    assert not any(part.training for part in run.teacher.modules())


def test_rates_fall_by_steps_and_by_a_cosine_within_a_phase():
    run = trainer(tiny(optimisation__decay_every=2, optimisation__decay=0.5,
                       optimisation__cosine=False, optimisation__lr=0.01))
    rates = []
    while not run.finished:
        run.run_epoch()
        if run.epoch < 3:
            rates.append(run.optimiser.param_groups[1]["lr"])
        elif run.epoch == 5:
            run._enter(3)
            run._set_rates(3)
            assert run.optimiser.param_groups[0]["lr"] == pytest.approx(
                run.config.optimisation.phase3_lr * 0.5**2)
    assert rates == [0.01, 0.01]
    run.epoch = 2
    run._enter(1)
    run._set_rates(1)
    assert run.optimiser.param_groups[1]["lr"] == 0.005
    run = trainer(tiny(optimisation__cosine=True, optimisation__lr=0.01))
    run.epoch = 1
    run._enter(1)
    run._set_rates(1)
    assert run.optimiser.param_groups[1]["lr"] == pytest.approx(0.01 * (1 + np.cos(np.pi / 3)) / 2)


@pytest.mark.parametrize("count, steps", [(300, 19), (1201, 76), (2272, 142)])
def test_an_epoch_passes_over_all_training_images(count, steps):
    config = override(preset("paper", "sha", 5), {"network.weights": "random",
                                                  "network.channels": 8})
    run = Trainer(config, [scene(0)], [None] * count, device=CPU)
    assert run.steps == steps
    supervised = override(config, {"schedule.unlabelled": False})
    assert Trainer(supervised, [scene(0)], [None] * count, device=CPU).steps == steps


def test_every_image_is_an_unlabelled_one_equally_often():
    seen = []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    labelled, bare = images()
    config = tiny(schedule__steps_per_epoch=0, schedule__warmup=0, schedule__phase1=4,
                  schedule__phase2=4, schedule__phase3=4)
    run = train(Trainer(config, labelled, Watched(bare), device=CPU))
    assert run.steps == 3 and sorted(seen) == sorted(list(range(6)) * 3)  # epoch 0 has weight 0


@pytest.mark.parametrize("phase, changes", [(1, {}), (2, {}), (2, PAPER), (3, {})])
def test_only_the_parts_of_a_phase_learn(phase, changes):
    run = trainer(tiny(schedule__warmup=0, schedule__mask_warmup=0, **changes))
    run.epoch = {1: 2, 2: 4, 3: 5}[phase]
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    run.run_epoch()
    changed = {k.split(".")[0] for k, v in run.student.state_dict().items()
               if not torch.equal(v, before[k])}
    expected = set(learning_rates(run.config, phase))
    if phase == 2 and not run.config.loss.point_mask and not run.config.loss.phase2_p2r:
        expected.discard("decoder")  # only the point-mask term reaches it, and weight decay
        changed.discard("decoder")
    assert changed == expected


def test_the_teacher_follows_parameters_and_batchnorm_statistics():
    run = trainer(tiny(schedule__steps_per_epoch=1))
    start = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    run.run_epoch()
    keep = run.config.optimisation.ema
    for name, mine in run.teacher.state_dict().items():
        if not mine.is_floating_point() or name.startswith("mask_head"):
            continue
        expected = keep * start[name] + (1 - keep) * run.student.state_dict()[name]
        assert torch.allclose(mine, expected, atol=1e-6), name
    statistics = [name for name in start if name.startswith("encoder") and "running_mean" in name]
    assert statistics and not torch.equal(run.teacher.state_dict()[statistics[0]],
                                          start[statistics[0]])


def test_the_result_is_the_network_that_the_configuration_names():
    for weights in ("student", "teacher"):
        run = trainer(tiny(evaluation__weights=weights))
        assert run.network is getattr(run, weights)


def test_the_history_names_every_term_of_every_phase(finished):
    history = finished.history
    assert [row["epoch"] for row in history] == list(range(6))
    assert [row["phase"] for row in history] == [1, 1, 1, 2, 2, 3]
    assert [row["step"] for row in history] == [2, 4, 6, 8, 10, 12]
    assert [("exclusivity" in row, "p2r" in row, "constraint" in row) for row in history] == [
        *[(False, True, False)] * 3, *[(True, True, False)] * 2, (False, True, True)]
    assert [row["weight"] for row in history] == [0, 0, 0.5, 0, 0, 0.1]
    assert all(np.isfinite(list(row.values())).all() for row in history)


def test_the_weight_of_the_unlabelled_loss_grows_as_in_the_paper():
    s = Schedule()  # published: 1500, 2000, 2100; warm-up 50, 0.01 an epoch, at most 2
    weights = [unlabelled_weight(s, e) for e in (0, 50, 51, 150, 250, 1499)]
    assert weights == pytest.approx([0, 0, 0.01, 1, 2, 2])
    assert [phase_of(s, e) for e in (1499, 1500, 1999, 2000, 2099)] == [1, 2, 2, 3, 3]
    assert unlabelled_weight(s, 2000) == pytest.approx(0.1)
    assert unlabelled_weight(Schedule(unlabelled=False), 1000) == 0


def test_supervised_only_never_reads_an_unlabelled_image():
    class Poison(list):
        def __getitem__(self, index):
            raise AssertionError("an unlabelled image was read")

    run = train(Trainer(tiny(schedule__unlabelled=False), [scene(0)], Poison([1, 2]), device=CPU))
    assert all(row["weight"] == 0 for row in run.history)


def test_it_learns_to_count():
    """On bright squares over noise, counts soon err less than half as much as a constant."""
    def bright(seed):
        made = scene(seed, (64, 64), people=1 + 2 * (seed % 8))
        image = made.image // 4
        image[made.instances > 0] = 230
        return Sample(image, made.points, made.instances)

    config = tiny(seed=1, schedule__phase1=20, schedule__phase2=20, schedule__phase3=20,
                  schedule__steps_per_epoch=8, schedule__warmup=20, network__channels=16,
                  optimisation__crop=64, optimisation__ema=0.9)
    run = train(Trainer(config, [bright(i) for i in range(8)], [], device=CPU))
    test = [bright(104 + i) for i in range(8)]
    # a constant: 4
    assert evaluate.count_error(run.network, test, config.evaluation) < 2


def test_what_goes_wrong_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="no labelled image"):
        Trainer(tiny(), [], [scene(0)], device=CPU)
    run = trainer()
    monkeypatch.setattr(run, "_step", lambda *_: (_ for _ in ()).throw(
        torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(RuntimeError, match=r"lower optimisation.batch \(now 2\)"):
        run.run_epoch()
    run = trainer()
    next(run.student.parameters()).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="lower the learning rate of that phase"):
        run.run_epoch()


# --- labelled crops ----------------------------------------------------------------------------

def cut_crop():
    """A 32 px crop with one whole person and a large piece of another, whose dot lies outside."""
    instances = torch.zeros(32, 32, dtype=torch.int32)
    instances[4:12, 4:12] = 1
    instances[16:, 12:] = 2
    return Batch(torch.zeros(1, 3, 32, 32), [torch.tensor([[7.5, 7.5]])], [instances])


INSIDE_CUT = (6, 5)  # a cell more than a cell away from all that is not the cut person's


@pytest.mark.parametrize("term", ["background", "foreground", "one_point"])
@pytest.mark.parametrize("value", [-2.0, -0.1, 0.5, 2.0])
def test_the_constraint_asks_nothing_of_a_person_cut_by_the_crop(term, value):
    weights = {f"loss.{name}": float(name == term)
               for name in ("background", "foreground", "one_point")}
    run = trainer(override(tiny(), weights))
    logits = torch.full((1, 8, 8), value, requires_grad=True)
    run._labelled_terms(3, logits, None, cut_crop())["constraint"].backward()
    assert logits.grad[0][INSIDE_CUT] == 0
    assert value < 0 or logits.grad.any()


@pytest.mark.parametrize("value", [-2.0, 2.0])
def test_the_point_mask_term_asks_nothing_of_a_person_cut_by_the_crop(value):
    run = trainer(tiny(loss__point_mask=1.0))
    logits = torch.full((1, 8, 8), value, requires_grad=True)
    embedding = torch.zeros(1, 16, 8, 8)
    run._labelled_terms(2, logits, embedding, cut_crop())["point_mask"].backward()
    assert not logits.grad[0, 4:, 3:].any() and logits.grad.any()


def test_points_can_be_learnt_in_the_mask_phase_too():
    logits, embedding = torch.randn(1, 8, 8), torch.randn(1, 16, 8, 8)
    terms = trainer(tiny(loss__phase2_p2r=3.0))._labelled_terms(2, logits, embedding, cut_crop())
    assert terms["p2r"] == pytest.approx(
        3 * losses.p2r_loss(logits[0], cut_crop().points[0], 4).item())
    terms = trainer(tiny(**PAPER))._labelled_terms(2, logits, embedding, cut_crop())
    assert set(terms) == {"exclusivity"}


# --- unlabelled crops --------------------------------------------------------------------------

def unlabelled_case(seed=0):
    """Output of student and teacher on one 32 px crop with a cut-out, and the crop."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(-1, 1.5, (8, 8))).float()
    teacher = torch.from_numpy(rng.normal(-4, 0.5, (8, 8))).float()
    # sure and visible, sure and hidden, likely, doubtful, barely a point
    for cell, value in {(1, 1): 3.0, (5, 6): 3.0, (2, 6): 1.0, (6, 1): -1.0, (4, 3): -2.1}.items():
        teacher[cell] = value
    embeddings = [torch.nn.functional.normalize(
        torch.from_numpy(rng.normal(size=(16, 8, 8))).float(), dim=0) for _ in range(2)]
    visible = torch.ones(32, 32, dtype=torch.bool)
    visible[18:26, 22:30] = False
    batch = Batch(torch.zeros(1, 3, 32, 32), [], [], torch.zeros(1, 3, 32, 32), visible[None])
    return logits, embeddings[0], teacher, embeddings[1], batch


def cells_above(logits, probability, peaks=False):
    """(x, y) and probability of the cells, one by one; peaks: of those higher than all beside."""
    score = torch.sigmoid(logits)

    def alone(y, x):
        window = score[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2]
        return not peaks or (window >= score[y, x]).sum() == 1

    found = [((4 * x + 1.5, 4 * y + 1.5), score[y, x].item())
             for y in range(8) for x in range(8) if score[y, x] >= probability and alone(y, x)]
    return np.array([p for p, _ in found]).reshape(-1, 2), np.array([s for _, s in found])


def pseudo_masks(config, teacher, embedding, gate):
    points, scores = cells_above(teacher, 0.1, config.pseudo.peaks)
    density = features.upsample(torch.sigmoid(teacher)[None], 4)[0] if gate else None
    p = config.pseudo
    return points, scores, decode.instance_map(
        features.upsample(embedding, 4), points, threshold=p.theta,
        geometry_weight=p.geometry_weight, sigma=p.sigma, density=density).numpy()


def explicit_terms(config, phase, logits, embedding, teacher, teacher_embedding, batch):
    """What a phase learns from one unlabelled crop, step by step, by the slow references."""
    logits, visible = logits.double(), batch.visible[0].numpy()
    c, terms = config.loss, {}
    if phase != 2:
        o, peaks = config.optimisation, config.pseudo.peaks
        points, scores = cells_above(teacher, o.pseudo_threshold or 0.1, peaks)
        if o.pseudo_threshold is None:
            expected = round(sum(s / (2 - s) for s in cells_above(teacher, 0)[1]))
            points = points[np.argsort(-scores, kind="stable")[:expected]]
        _, target = reference.p2r(logits, points, 4)
        cell_visible = torch.tensor([[visible[4 * y + 2, 4 * x + 2] for x in range(8)]
                                     for y in range(8)])
        cost = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="none")
        terms["p2r"] = ((target + 1) * cell_visible * cost).mean()
    if phase == 1:
        return terms
    points, scores, masks = pseudo_masks(config, teacher, teacher_embedding,
                                         phase == 3 and config.pseudo.density_gate)
    sure = points[scores > config.optimisation.confident]
    if phase == 3:
        known = [p for p in sure if visible[int(p[1] + 0.5), int(p[0] + 0.5)]]
        terms["constraint"] = reference.mask_constraint(
            logits, masks, known, 4, c.background, c.foreground, c.one_point, visible=visible)
        return terms
    ignore = ~visible
    for x, y in points[scores <= config.optimisation.confident]:
        rows, columns = np.mgrid[:32, :32]
        ignore = ignore | ((rows - y) ** 2 + (columns - x) ** 2 <= c.ignore_radius**2)
    own, _ = cells_above(logits, 0.5, config.pseudo.peaks)
    terms["exclusivity"] = reference.exclusivity(
        reference.upsample(embedding.double(), 4), own, masks, sigma=c.sigma, ignore=ignore)
    known = [p for p in sure if not ignore[int(p[1] + 0.5), int(p[0] + 0.5)]]
    terms["point_mask"] = c.point_mask * reference.consistency(logits, masks, 4, known, ignore)
    return terms


@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("threshold", [0.6, None])
@pytest.mark.parametrize("peaks", [False, True])
def test_terms_of_unlabelled_crops_equal_an_explicit_computation(
        phase, seed, gate, threshold, peaks):
    config = tiny(optimisation__pseudo_threshold=threshold, pseudo__peaks=peaks,
                  loss__point_mask=0.7, loss__background=0.5, loss__foreground=0.3,
                  loss__one_point=0.2, loss__ignore_radius=5.0, pseudo__density_gate=gate)
    case = unlabelled_case(seed)
    wanted = explicit_terms(config, phase, *case)
    *outputs, batch = case
    terms = trainer(config)._unlabelled_terms(phase, *(o[None] for o in outputs), batch)
    assert terms.keys() == wanted.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-4), name


def test_phase_2_learns_masks_around_the_students_points_not_the_teachers():
    logits, embedding, teacher, teacher_embedding, batch = unlabelled_case()
    run = trainer()

    def terms(mine):
        return run._unlabelled_terms(2, mine[None], embedding[None], teacher[None],
                                     teacher_embedding[None], batch)["exclusivity"]

    assert terms(torch.full((8, 8), -3.0)) == 0  # no point of its own: no centre
    assert terms(logits) > 0


def test_the_density_gate_is_for_phase_3_only(monkeypatch):
    gates = []
    plain = decode.instance_maps

    def watched(*arguments, density=None, **options):
        gates.append(density is not None)
        return plain(*arguments, density=density, **options)

    monkeypatch.setattr(decode, "instance_maps", watched)
    *outputs, batch = unlabelled_case()
    run = trainer(tiny(pseudo__density_gate=True))
    for phase in (2, 3):
        run._unlabelled_terms(phase, *(o[None] for o in outputs), batch)
    assert gates == [False, True]


def test_strides_agree():
    assert model.STRIDE == 4  # the explicit computations above say 4


def test_what_is_too_small_to_matter_becomes_zero_before_it_is_denormal():
    run = trainer()
    run.run_epoch()
    weight = run.student.fusion.mix.weight
    state = run.optimiser.state[weight]
    with torch.no_grad():
        for value, tiny_, small in ((weight, 1e-13, 1e-11), (state["exp_avg"], 1e-19, 1e-17),
                                    (state["exp_avg_sq"], 1e-37, 1e-35)):
            value[0, 0, 0, 0], value[0, 1, 0, 0] = -tiny_ if value is weight else tiny_, small
    run._drop_the_tiny()
    for value in (weight, state["exp_avg"], state["exp_avg_sq"]):
        assert value[0, 0, 0, 0] == 0 and value[0, 1, 0, 0] > 0
    assert not any(((p != 0) & (p.abs() < 1e-12)).any() for p in run.teacher.parameters())
