"""Several processes that train together learn what one learns, and end together."""

import copy
import itertools
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed, nn

from tests.test_trainer import CPU, images, tiny, trainer
from tests.two_processes import EPOCHS, GENTLE
from tests.warm import Program
from xmask import processes
from xmask.trainer import Trainer

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(*arguments, processes=2, module="tests.two_processes"):
    """`torchrun` with so many processes; its exit code, and what it said."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(processes), "-m", module, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=clean | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def by_hand(folder, fault):
    """Two processes as torchrun starts them, which would end one before it can say why when the
    other ends; the second has the fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"TORCHELASTIC_RUN_ID": "by-hand", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0",
              "OMP_NUM_THREADS": "1"}
    return [Program("-m", "tests.two_processes", folder, fault, log=folder / f"log-{rank}",
                    environment=common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def states(folder):
    return {epoch: torch.load(folder / f"{epoch}.pt", weights_only=True) for epoch in (4, 8, 12)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    program = Program("-m", "tests.two_processes", folder, log=folder / "log")
    assert program.wait(300) == 0, program.said()
    return states(folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    code, said = torchrun(folder)
    assert code == 0, said
    return states(folder)


@pytest.mark.parametrize("epoch", [4, 8, 12])  # the ends of the phases
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_two_processes_learn_what_one_learns_batchnorm_included(alone, together, epoch, network):
    one, two = alone[epoch][network], together[epoch][network]
    assert one.keys() == two.keys() and any("running_mean" in name for name in one)
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])  # timm's holds an activation
def test_a_batchnorm_over_one_process_is_the_usual_one(kind):
    torch.manual_seed(0)
    usual, images = kind(3), 3 + 2 * torch.randn(4, 3, 5, 6)
    nn.init.uniform_(usual.weight)
    joint = copy.deepcopy(usual)
    processes.join_norms(joint)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for training in (True, True, False):
            seen = [norm.train(training)(images.requires_grad_()) for norm in (usual, joint)]
            torch.testing.assert_close(*seen)
            torch.testing.assert_close(*(
                torch.autograd.grad(out.square().sum(), images)[0] for out in seen),
                atol=1e-4, rtol=1e-4)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(usual.state_dict(), joint.state_dict())


def test_what_two_processes_saved_goes_on_in_one(together, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", GENTLE)
    one = trainer(tiny(optimisation__batch=4, **EPOCHS))
    one.restore(together[8])
    assert one.epoch == 8 and len(one.history) == 8
    row = one.run_epoch()
    assert row["loss"] == pytest.approx(together[12]["history"][8]["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    for stopped in by_hand(tmp_path, "nan"):
        assert stopped.wait(60) == 1
        assert "FloatingPointError: sha-40-s4: the loss is nan" in stopped.said()


def test_a_killed_process_ends_the_other_within_a_minute(tmp_path):
    left, killed = by_hand(tmp_path, "kill")
    assert killed.wait(120) == -signal.SIGKILL
    assert left.wait(60) == 1
    assert "RuntimeError: another process of this training has ended" in left.said()


@pytest.mark.parametrize("count", [2, 4])
def test_so_many_processes_see_together_the_crops_that_one_sees(count):
    run = trainer(tiny(optimisation__batch=4, **EPOCHS))

    def seen(rank, count):
        run.fabric = SimpleNamespace(global_rank=rank, world_size=count)
        return [torch.stack([labelled.images, unlabelled.images, unlabelled.strong])
                for labelled, unlabelled in itertools.islice(run._draw(8), 3)]

    for whole, *parts in zip(seen(0, 1), *(seen(rank, count) for rank in range(count))):
        assert torch.equal(whole, torch.cat(parts, dim=1))


def test_crops_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ValueError, match="batch: 2 crops cannot be shared equally by 3 processes"):
        Trainer(tiny(), *images(), device=CPU)


def test_only_the_loss_of_another_process_is_told_as_such(monkeypatch):
    with pytest.raises(RuntimeError, match="closed by peer"), processes.gone():
        raise RuntimeError("Connection closed by peer")  # there is no other
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(RuntimeError, match="another process of this training has ended"), \
            processes.gone():
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="^out of memory$"), processes.gone():
        raise RuntimeError("out of memory")


# --- precision ---------------------------------------------------------------------------------

BFLOAT16 = {"machine__precision": "bfloat16", "network__backbone": "tf_efficientnet_lite0"}


@pytest.fixture
def able(monkeypatch):
    """A CPU that multiplies in bfloat16, be it slowly."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("instructions, precision", [
    ({"amx_bf16": True}, "bf16-mixed"), ({"avx512_bf16": True}, "bf16-mixed"),
    ({"avx512_bf16": False, "avx2": True}, "32-true"), ({}, "32-true"),
])
def test_a_cpu_trains_in_bfloat16_only_if_asked_and_able(monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert trainer(tiny(machine__precision="bfloat16")).precision == precision
    assert trainer(tiny()).precision == "32-true"


@pytest.mark.parametrize("able, precision", [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_trains_in_bfloat16_only_if_asked_and_able(monkeypatch, able, precision):
    asked = []
    monkeypatch.setattr(processes, "Fabric", lambda **options: options["precision"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: (
        asked.append(including_emulation) or able))
    gpu = torch.device("cuda", 0)
    assert processes.open_fabric(gpu, "bfloat16") == precision and asked == [False]
    assert processes.open_fabric(gpu) == processes.open_fabric(gpu, "float32") == "32-true"


def test_a_training_in_bfloat16_is_near_that_in_single_precision(able):
    whole, half = trainer(tiny(network__backbone="tf_efficientnet_lite0")), trainer(
        tiny(**BFLOAT16))
    one, other = whole.run_epoch(), half.run_epoch()
    assert other["loss"] == pytest.approx(one["loss"], rel=0.02) and other["loss"] != one["loss"]
    for weights in (half.student.state_dict(), half.teacher.state_dict()):
        assert all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())


def test_a_training_in_bfloat16_goes_on_from_a_state_as_if_it_had_not_stopped(able):
    through = trainer(tiny(**BFLOAT16))
    state = None
    while not through.finished:
        through.run_epoch()
        state = copy.deepcopy(through.state()) if through.epoch == 4 else state
    again = trainer(tiny(**BFLOAT16))
    again.restore(state)
    while not again.finished:
        again.run_epoch()
    assert again.history == through.history
    assert all(torch.equal(a, b) for a, b in zip(again.teacher.state_dict().values(),
                                                 through.teacher.state_dict().values()))


@pytest.mark.parametrize("frozen", [False, True])
def test_wide_depthwise_convolutions_compute_in_single_precision_where_they_learn(frozen):
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    before = copy.deepcopy(network)
    processes.widen_depthwise(network)
    network.requires_grad_(not frozen)
    maps = torch.rand(1, 4, 9, 9)
    assert torch.equal(network(maps), before(maps))  # without autocast nothing changes
    rounded = maps.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, half = network[0](rounded), before[0](rounded)
    wide = before[0](rounded.float()).bfloat16()
    assert torch.equal(found, half if frozen else wide) and not torch.equal(half, wide)
    assert type(network[1]) is nn.Conv2d
    other = copy.deepcopy(network)  # with weights of its own
    with torch.no_grad():
        network[0].weight.zero_()
    assert torch.equal(other(maps), before(maps))
    assert list(other.state_dict()) == list(before.state_dict())
