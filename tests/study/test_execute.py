"""A notebook ends with whoever started it, however that one ended; a killed one is tried again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from distributed import LocalCluster

from tests.warm import Program
from xmask.data.cluster import ask, open_client, work_in_order
from xmask.study import reproduce, sweeps, travel
from xmask.study.execute import Notebooks

ROOT = Path(__file__).parents[2]
STUDY = """
import signal, sys
from xmask.study import reproduce, travel
# as in a terminal: what a script starts in the background begins deaf to SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[2] == "no shared folder":
    travel.sees_all = lambda client, root: False
steps = [reproduce.Step(f"sleep {n}", "sleep.ipynb", {"name": str(reproduce.Path(n).absolute())})
         for n in "ab"]
print(reproduce.run_steps("demo", steps, workers=2, threads=1, scheduler=sys.argv[1]), flush=True)
"""
SLEEPS = ["name = ''", "import os, time\nfrom pathlib import Path",
          "Path(f'{name}.pids').write_text(f'{os.getppid()} {os.getpid()} ')\ntime.sleep(600)"]
# the first time it waits to be killed; it goes on from the file that it left
TRIED = ["name = ''", "import os, time\nfrom pathlib import Path",
         "with open(f'{name}.pids', 'a') as file:\n"
         "    print(os.getppid(), os.getpid(), file=file)\n"
         "while len(Path(f'{name}.pids').read_text().splitlines()) < 2:\n    time.sleep(0.1)"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write(path, cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, path)
    return path


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def noted(folder: Path, count: int) -> list[int]:
    """The processes that notebooks have noted, once there are so many."""
    end, found = time.monotonic() + 90, []
    while len(found) < count and time.monotonic() < end:
        time.sleep(0.05)
        found = " ".join(path.read_text() for path in sorted(folder.glob("*.pids"))).split()
    assert len(found) == count
    return [int(pid) for pid in found]


def all_end(pids, seconds=5) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


@pytest.fixture(scope="module", autouse=True)
def light():
    """The notebooks of these tests need nothing of what others need: see light/sitecustomize.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'light'}{os.pathsep}{ROOT}")
        yield


@pytest.fixture(scope="module")
def scheduler(light):
    """A cluster of two processes that runs already."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1",
                      dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("number,where", [
    (signal.SIGKILL, "here"), (signal.SIGTERM, "here"), (signal.SIGINT, "here"),
    (signal.SIGKILL, "far"), (signal.SIGKILL, "no shared folder"),
    (signal.SIGINT, "no shared folder")])
def test_killing_a_study_ends_its_notebooks_within_five_seconds(
        tmp_path, monkeypatch, number, where, scheduler):
    write(tmp_path / "notebooks" / "sleep.ipynb", SLEEPS)
    monkeypatch.chdir(tmp_path)
    study = Program("-c", STUDY, "" if where == "here" else scheduler, where,
                    log=tmp_path / "log")
    try:
        started = noted(tmp_path, 4)
        started += {parent(papermill) for papermill in started[::2]}  # what forks
        assert len(started) == 6 and all(map(alive, started))
        os.kill(study.pid, number)
        assert all_end(started)
    finally:
        study.kill()
        study.join()


@pytest.mark.parametrize("victim", ["kernel", "fork", "worker"])
def test_what_is_killed_in_the_middle_of_a_notebook_is_tried_again(
        tmp_path, monkeypatch, capfd, scheduler, victim):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "tried.ipynb", TRIED)
    steps = [reproduce.Step("first", str(path), {"name": "first"}),
             reproduce.Step("then", str(path), {"name": "then"}, ["first"])]
    (tmp_path / "then.pids").write_text("")

    def kill():
        papermill, kernel = noted(tmp_path, 2)
        fork = parent(papermill)
        os.kill({"kernel": kernel, "fork": fork, "worker": parent(fork)}[victim], signal.SIGKILL)
        noted(tmp_path, 4)
        (tmp_path / "then.pids").write_text("not \nkilled \n")
        gone.append(all_end([papermill, kernel]))

    gone: list = []
    killing = threading.Thread(target=kill)
    killing.start()
    where = {"scheduler": scheduler} if victim == "worker" else {"workers": 1}
    assert reproduce.run_steps("demo", steps, **where) == []
    killing.join()
    assert gone == [True]
    shown = capfd.readouterr()
    assert "- first: " in shown.out + shown.err and "- then: " in shown.out + shown.err


def test_a_failed_step_is_told_and_what_does_not_need_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails, works = (str(write(tmp_path / f"{name}.ipynb", [code]))
                    for name, code in (("fails", "1 / 0"), ("works", "1 / 1")))
    steps = [reproduce.Step("a", fails, {}), reproduce.Step("b", works, {}, ["a"]),
             reproduce.Step("c", works, {}, ["b"]), reproduce.Step("d", works, {}),
             reproduce.Step("e", works, {}, fingerprint=lambda: open("nowhere").read()),
             reproduce.Step("f", works, {}, ["d"])]
    assert sorted(reproduce.run_steps("demo", steps, workers=2)) == ["a", "b", "c", "e"]
    shown = "".join(capsys.readouterr())
    assert "ZeroDivisionError" in shown and "log: work/demo/logs/a.log" in shown
    assert "notebook as far as it came: work/demo/notebooks/a.ipynb" in shown
    for name in "bc":
        assert f"- {name}: not started, an input failed" in shown
    assert "No such file or directory: 'nowhere'" in shown
    assert reproduce.run_steps("demo", [steps[3], steps[5]], workers=1) == []
    assert "- d: unchanged" in "".join(capsys.readouterr())


def test_the_steps_of_a_study_on_a_cluster_write_into_the_shared_folder(
        tmp_path, monkeypatch, scheduler):
    monkeypatch.chdir(tmp_path)
    path = str(write(tmp_path / "n.ipynb", ["n = 0", "open(f'{n}.txt', 'w').write('done')"]))
    steps = [reproduce.Step(str(n), path, {"n": n}, [str(n - 1)] * (n > 0),
                            outputs=[Path(f"{n}.txt")]) for n in range(3)]
    assert reproduce.run_steps("demo", steps, scheduler=scheduler) == []
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
    assert len(list((tmp_path / "work/demo/stamps").iterdir())) == 3
    with open_client(scheduler=scheduler) as client, pytest.raises(
            ValueError, match="sees no such folder. All machines have to see it under the same"):
        list(work_in_order(client, Notebooks("/nowhere"), {"a": ((), ())}))


WRITES = ["n = 0", "from pathlib import Path",
          "folder = Path('results/demo')\nseen = sorted(one.name for one in folder.iterdir())",
          "(folder / f'{n}.txt').write_text(' '.join(seen))\n(folder / 'old.txt').unlink(n < 2)"]


def test_where_no_folder_is_shared_files_travel_to_the_notebooks_and_back(
        tmp_path, monkeypatch, scheduler, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(travel, "sees_all", lambda client, root: False)
    write(tmp_path / "notebooks" / "writes.ipynb", WRITES)
    results = tmp_path / "results" / "demo"
    results.mkdir(parents=True)
    for name in ("old.txt", "mine.txt"):
        (results / name).write_text("old")
    steps = [reproduce.Step(str(n), "writes.ipynb", {"profile": "demo", "n": n}, [str(n - 1)] * (n > 0),
                            outputs=[results.relative_to(tmp_path) / f"{n}.txt"]) for n in range(2)]
    assert reproduce.run_steps("demo", steps, scheduler=scheduler) == []
    found = {path.name: path.read_text() for path in results.iterdir()}
    assert found == {"mine.txt": "old", "0.txt": "mine.txt old.txt", "1.txt": "0.txt mine.txt"}
    assert reproduce.run_steps("demo", steps, scheduler=scheduler) == []
    assert "".join(capsys.readouterr()).count(": unchanged") == 2
    (results / "0.txt").write_text("edited")  # so step 0 is done again, with this file as it is
    fails = reproduce.Step("2", "writes.ipynb", {"profile": "demo", "n": 2})
    assert reproduce.run_steps("demo", [steps[0], fails], scheduler=scheduler) == ["2"]
    shown = "".join(capsys.readouterr())
    assert "FileNotFoundError" in shown and "log: work/demo/logs/2.log" in shown
    assert (tmp_path / "work/demo/logs/2.log").is_file(), "what failed is told here, too"
    assert (results / "0.txt").read_text() != "edited"


def test_files_that_come_back_replace_none_that_was_changed_meanwhile(tmp_path):
    for name in ("a.txt", "gone.txt", "folder/lock", "same.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    sent = travel.pack(tmp_path, ["*"])
    assert set(sent) == {"a.txt", "gone.txt", "same.txt"}
    (tmp_path / "a.txt").write_text("after")
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "new.txt").write_text("new")
    changed = travel.changes(tmp_path, sent)
    assert changed == {"a.txt": b"after", "gone.txt": None, "new.txt": b"new"}
    travel.take_back(tmp_path, sent, changed)  # is so already
    (tmp_path / "a.txt").write_text("edited")
    with pytest.raises(ValueError, match="a.txt: changed here while a notebook made it anew"):
        travel.take_back(tmp_path, sent, changed)
    (tmp_path / "new.txt").unlink()
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    travel.take_back(tmp_path, sent, changed)
    assert travel.changes(tmp_path, sent) == changed
    masks = "work/demo/masks/sha/"  # two notebooks made them at the same time
    first = {f"{masks}manifest.json": b"one", f"{masks}same.png": b"same"}
    second = first | {f"{masks}manifest.json": b"two", f"{masks}more.png": b"more",
                      "work/demo/stamps/mine.json": b"done"}
    travel.take_back(tmp_path, {}, first)
    travel.take_back(tmp_path, {}, second)
    assert travel.pack(tmp_path, ["work"]) == first | {"work/demo/stamps/mine.json": b"done"}
    travel.take_back(tmp_path, first, {f"{masks}manifest.json": b"made anew"})
    assert (tmp_path / masks / "manifest.json").read_text() == "made anew"


def test_a_folder_is_seen_by_the_workers_of_this_machine(tmp_path, scheduler):
    with open_client(scheduler=scheduler) as client:
        assert travel.sees_all(client, tmp_path)
        assert list(tmp_path.rglob("*")) == [tmp_path / "work"]
        client.close()
        with pytest.raises(RuntimeError, match="the Dask scheduler is gone"):
            ask(client, "job", "title", ())


def test_what_a_run_needs_to_travel_is_its_own():
    """... and no other run's, nor the weights where only measures are read."""
    needed = travel.needed({"profile": "demo", "dataset": "sha", "percent": 10, "seed": 1,
                            "variant": "without-nnec", "overrides": {}})
    assert {"results/demo/runs/sha-10-s1-without-nnec", "work/demo/phase1/sha-10-s1",
            "work/demo/masks/sha-no-nnec", "work/demo/data"} <= set(needed)
    assert not any(name in needed for name in ("results", "results/demo", "work/demo"))
    assert "results/demo" in travel.needed({"profile": "demo", "runs": ["sha-10-s1"]})
    assert "figures/claims" in travel.needed({"profile": "full"}), "its record goes along"
    assert "results" not in travel.needed({})


def test_a_sweep_executes_a_notebook_for_every_change_and_names_what_failed(tmp_path, scheduler):
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "n.ipynb", [
        "seed, profile, overrides = 0, '', {}",
        "name = f'{profile}-{seed}-{overrides}'", "print(name, 1 / seed)"])
    changes = list(sweeps.grid(seed=[2, 1], loss__tau=[0.5]))
    given = {"root": tmp_path, "profile": "demo", "overrides": {"loss.margin": 0.1}}
    paths = sweeps.run(changes, "n.ipynb", **given)
    printed = [nbformat.read(path, 4).cells[-1].outputs[0].text for path in paths]
    assert printed == [f"demo-{seed}-{{'loss.margin': 0.1, 'loss.tau': 0.5}} {1 / seed}\n"
                       for seed in (2, 1)]
    with pytest.raises(RuntimeError, match="(?s)1 of 2 failed:.*ZeroDivisionError.*log: work/sweeps"):
        sweeps.run([*changes[1:], {"seed": 0}], "n.ipynb", scheduler=scheduler, **given)


def test_each_notebook_has_a_kernel_of_its_own_and_what_forks_has_no_threads(
        tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # with all that it imports
    path = write(tmp_path / "n.ipynb", ["n = 0", "print(n, 'seen' in globals(), flush=True)",
                                        "seen, n = 1, 1 / n"])
    job, log = Notebooks(str(tmp_path)), tmp_path / "log"
    found = []
    for n in (0, 1, 1):
        found.append(job.execute(path, Path("out.ipynb"), {"n": n}, log))
        assert f"{n} False" in log.read_text()
        assert len(os.listdir(f"/proc/{job.process.pid}/task")) == 1
    assert "ZeroDivisionError" in found[0] and found[1:] == ["", ""]
    job.end()
    assert job.execute(path, Path("out.ipynb"), {"n": 1}, log), "what was not executed is not done"
    assert job.process.wait(timeout=10) == 1


def test_where_python_cannot_fork_a_process_executes_one_notebook(tmp_path):
    for code, status in (("1 / 0", 1), ("1 / 1", 0)):
        source, log = write(tmp_path / "n.ipynb", [code]), tmp_path / "log"
        log.write_text("")
        command = "from xmask.study import execute; execute._FORKS = False; execute.main()"
        process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE,
                                   env=os.environ | {"PYTHONPATH": str(ROOT)})
        process.stdin.write(json.dumps(
            [str(source), str(tmp_path / "out.ipynb"), str(log), {}]).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=100) == status
        assert ("ZeroDivisionError" in log.read_text()) == bool(status)
        process.stdin.close()
