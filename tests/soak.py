"""Long trials of what docs/reliability.md promises: `make soak` runs them and writes its numbers.

    python -m tests.soak [--kills 100] [--images 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests import hostile
from xmask import files
from xmask.synthetic import draw_scene, write_dataset

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_NEVER_EQUAL = ("times.csv",)  # tells how long it took


def _photos(folder: Path, number: int, size: tuple[int, int] = (96, 128)) -> Path:
    folder.mkdir(parents=True)
    scene = Image.fromarray(draw_scene(seed=4, shape=size, people=8).image)
    for k in range(number):
        scene.rotate(k).save(folder / f"{k:05d}.png")
    return folder


def _command(name: str, place: Path) -> list[str]:
    if name == "masks":
        if not (place / "drawn").exists():
            write_dataset("sha", place / "drawn", train=4, test=1, seed=3, progress=False)
        words = ["masks", "--dataset", "sha", "--root", str(place / "drawn"), "--segmenter",
                 "classical"]
    else:
        if not (place / "photos").exists():
            _photos(place / "photos", 6)
        words = ["predict", str(place / "photos"), "--device", "cpu"]
    return [sys.executable, "-m", "xmask", *words, "--out"]


def results(folder: Path) -> dict[str, str]:
    """Name -> checksum of the results in an output folder."""
    return {path.name: files.sha256(path) for path in folder.iterdir()
            if path.is_file() and path.name not in _NEVER_EQUAL}


def kill_and_compare(name: str, place: Path, *, kills: int, seed: int) -> dict:
    """Run a command, kill it `kills` times at random moments, run it to its end, and compare.

    A whole run takes far longer than the time between two kills, so the output folder is thrown
    away whenever a run has come to its end and kills are left.
    Returns how many kills there were, and what was lost of finished images or differs.
    """
    rng = random.Random(f"{name} {seed}")
    command = _command(name, place)
    begun = time.monotonic()
    subprocess.run([*command, str(place / "whole")], check=True, capture_output=True)
    took = time.monotonic() - begun
    whole, done, lost, different, ends = results(place / "whole"), 0, [], [], 0
    out = place / "killed-0"
    while True:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, start_new_session=True)
        try:
            errors = process.communicate(
                timeout=rng.uniform(0.2, 0.9) * took if done < kills else None)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
            if out.exists():  # whatever has its name is whole
                lost += [f"{path.name} after kill {done}" for path in out.glob("*.png")
                         if not path.name.startswith(".") and not _is_whole(path)]
            continue
        if process.returncode:
            raise RuntimeError(errors.decode())
        found = results(out)
        different += [f"{name} in {out.name}" for name in {*whole, *found}
                      if whole.get(name) != found.get(name)]
        ends += 1
        if done >= kills:
            return {"kills": done, "ends": ends, "lost": lost, "different": different}
        out = place / f"killed-{ends}"


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except OSError:
        return False


_MEASURE = """
import resource, sys
from xmask.cli import main
status = main(["predict", sys.argv[1], "--out", sys.argv[2], "--device", "cpu"])
print("peak", status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of_predict(place: Path, images: int) -> float:
    """Peak memory, MB, of a process that predicts so many small images."""
    photos = _photos(place / "photos", images)
    found = subprocess.run([sys.executable, "-c", _MEASURE, str(photos), str(place / "out")],
                           check=True, capture_output=True, text=True).stdout
    status, peak = re.findall(r"^peak (\d+) (\d+)$", found, re.MULTILINE)[0]
    assert status == "0"
    return int(peak) / 1024


def hostile_images(place: Path, number: int) -> dict:
    """Hand so many hostile files to `predict` in one call: what came of them."""
    folder = place / "hostile"
    folder.mkdir()
    contents = dict(list(hostile.images(many=number // 5).items())[:number])
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    found = subprocess.run(
        [sys.executable, "-m", "xmask", "predict", str(folder), "--out", str(place / "of-hostile"),
         "--device", "cpu"], capture_output=True, text=True)
    text = found.stdout + found.stderr
    return {"files": len(contents), "tracebacks": text.count("Traceback"),
            "said": len(re.findall(r"^.*hostile/.*: ", found.stdout, re.MULTILINE)),
            "exit": found.returncode}


def main(arguments: list[str] | None = None) -> None:
    """All trials; their numbers go into docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name in ("masks", "predict"):
            (place / name).mkdir()
            one = kill_and_compare(name, place / name, kills=options.kills // 2, seed=options.seed)
            faults += one["lost"] + one["different"]
            rows.append((f"`xmask {name}` killed by SIGKILL at random moments", f"{one['kills']} "
                         f"kills, {one['ends']} whole runs",
                         f"{len(one['lost'])} results lost, {len(one['different'])} files differ "
                         "from an undisturbed run"))
        one = hostile_images(place, 500)
        rows.append(("hostile files as photos", f"{one['files']} files in one call",
                     f"{one['tracebacks']} tracebacks, {one['said']} named"))
        few, many = (peak_of_predict(place / f"n{n}", n) for n in (50, options.images))
        rows.append(("memory of `xmask predict`", f"{options.images} images beside 50",
                     f"{many:.0f} MB beside {few:.0f} MB: {many / few:.3f} times"))
    table = "\n".join(["| tried | how often | what happened |", "| --- | --- | --- |",
                       *("| " + " | ".join(row) + " |" for row in rows)])
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- soak -->\n", "\n<!-- end of soak -->"
    head, tail = page.split(begin)[0], page.split(end)[1]
    files.write_text(PAGE, head + begin + table + end + tail)
    print(table)
    print(json.dumps({"written": str(PAGE), "faults": faults}))


if __name__ == "__main__":
    main()
