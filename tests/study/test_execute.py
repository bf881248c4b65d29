"""A notebook ends with whoever started it, however that one ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
STUDY = """
import signal
from xmask.study import reproduce
# as in a terminal: what a script starts in the background begins deaf to SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)
reproduce.NOTEBOOKS = reproduce.Path(".")
steps = [reproduce.Step(f"sleep {n}", "sleep.ipynb", {"name": n}) for n in "ab"]
print(reproduce.Runner("demo", 2, 1).run(steps), flush=True)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killing_a_study_ends_its_notebooks_within_five_seconds(tmp_path, number):
    code = ["name = ''", "import os, time\nfrom pathlib import Path",
            "Path(f'{name}.pids').write_text(f'{os.getppid()} {os.getpid()} ')\ntime.sleep(600)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, tmp_path / "sleep.ipynb")
    study = subprocess.Popen([sys.executable, "-c", STUDY], cwd=tmp_path,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 60
        noted = []
        while len(noted) < 4 and time.monotonic() < end:
            time.sleep(0.2)
            noted = " ".join(path.read_text() for path in tmp_path.glob("*.pids")).split()
        started = [int(pid) for pid in noted]
        assert len(started) == 4 and all(map(alive, started))
        study.send_signal(number)
        end = time.monotonic() + 5
        while any(map(alive, started)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(alive, started))
    finally:
        study.kill()
        study.wait()


def test_a_notebook_that_fails_fails_its_process(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, tmp_path / "fails.ipynb")
    with subprocess.Popen(
        [sys.executable, "-m", "xmask.study.execute", tmp_path / "fails.ipynb",
         tmp_path / "out.ipynb", json.dumps({})],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert "ZeroDivisionError" in process.stderr.read()
    assert process.returncode != 0
