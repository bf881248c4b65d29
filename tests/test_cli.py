"""The command line: every command explains itself, errors are one line, exit codes hold."""

import argparse
import os
import signal

import pytest

import xmask
from xmask import cli
from xmask.cli import main

COMMANDS = ["reproduce", "masks", "train", "evaluate", "tables", "figures", "data check",
            "data draw", "data coverage", "predict", "export", "learn", "report", "docs",
            "sam-weights"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0 and "usage: xmask" in capsys.readouterr().out


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"xmask {xmask.__version__}\n"


def test_every_argument_says_what_it_is_for():
    def silent(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for made in action.choices.values():
                    yield from silent(made)
            elif not action.help and not action.choices:
                yield f"{parser.prog} {action.dest}"

    assert not list(silent(cli._parser()))


def test_a_terminated_study_stops_as_ctrl_c_stops_it(monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr("xmask.study.reproduce.run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main(["reproduce"]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "the same command goes on" in capsys.readouterr().err


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    assert main(["data", "draw", "--layout", "sha", "--out", str(folder), "--train", "2",
                 "--test", "1", "--seed", "3"]) == 0
    return folder


def test_a_drawn_dataset_checks_clean_and_gets_masks(drawn, tmp_path, capsys):
    assert main(["data", "check", "--dataset", "sha", "--root", str(drawn)]) == 0
    assert "error" not in capsys.readouterr().out
    masks = ["masks", "--dataset", "sha", "--root", str(drawn), "--out", str(tmp_path), "--limit",
             "1"]
    assert main(masks) == 0
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("IMG_*")}
    assert first and main(masks) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("IMG_*")} == first


def test_a_broken_dataset_fails_the_check(drawn, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(drawn, copy)
    image = next(copy.rglob("IMG_1.jpg"))
    image.write_bytes(image.read_bytes()[:200])
    assert main(["data", "check", "--dataset", "sha", "--root", str(copy)]) == 1
    assert "error" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, seed", [
    ("--profile paper", 2024), ("--profile paper --seed 0", 0), ("--profile full", 1), ("", 1)])
def test_a_run_of_the_published_profile_has_the_published_seed(arguments, seed):
    chosen = cli._parser().parse_args(["train", *arguments.split()])
    assert cli._configuration(chosen).seed == seed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--profile", "paper"], "give the folder that holds the datasets"),
        (["train", "--set", "loss.tua=1"], "loss.tua: no such field; did you mean loss.tau"),
        (["train", "--set", "loss.tau"], "'loss.tau' is not FIELD=VALUE"),
        (["edp-study", "--boxes", "--jobs", "2", "--out", "/nowhere"], "--jobs: --boxes and"),
        (["reproduce", "--datasets", "sha,shc"], "--datasets: shc unknown"),
        (["masks", "--dataset", "sha", "--root", "/nowhere", "--out", "/tmp/none"], "/nowhere"),
    ],
)
def test_errors_are_short_and_exit_with_one(arguments, message, capsys):
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


@pytest.mark.parametrize("command,module,found", [
    ("masks --dataset sha --root x --out y", "xmask.data.open_dataset", "goes on from here"),
    ("train-sam --out x", "xmask.segmenting.sam_training.train", "begins anew"),
    ("edp-study --out x", "xmask.study.edp_study.run", "goes on from here"),
    ("edp-study --out x --boxes", "xmask.study.edp_study.run_boxes", "begins anew"),
])
def test_a_stopped_command_says_whether_it_goes_on(command, module, found, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, stop)
    assert main(command.split()) == 130
    assert capsys.readouterr().err == f"\nstopped; the same command {found}\n"


def test_only_train_works_in_the_processes_of_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["tables"]) == 1
    assert "only `xmask train` works in the processes of torchrun" in capsys.readouterr().err
