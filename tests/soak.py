"""Long trials of what docs/reliability.md promises: `make soak` runs them and writes its numbers.

    python -m tests.soak [--kills 100] [--images 1000]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests import hostile
from tests.warm import Program
from xmask import files
from xmask.data.masks import mask_dataset
from xmask.data.sample import Sample
from xmask.segmenting.classical import ClassicalSegmenter
from xmask.synthetic import draw_scene, write_dataset

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_NEVER_EQUAL = ("times.csv",)  # tells how long it took
_SHORT = [f"--set={field}" for field in (  # a training of seconds
    "optimisation.crop=64", "schedule.steps_per_epoch=2", "schedule.warmup=1", "schedule.phase1=2",
    "schedule.mask_warmup=1", "schedule.phase2=4", "schedule.phase3=8")]


def _photos(folder: Path, number: int, *, dotted: int = 0) -> Path:
    """A folder of small photos, the first of them with dots beside them."""
    folder.mkdir(parents=True)
    scene = draw_scene(seed=4, shape=(96, 128), people=8)
    for k in range(number):
        Image.fromarray(scene.image).rotate(0 if k < dotted else k).save(folder / f"{k:05d}.png")
        if k < dotted:
            np.savetxt(folder / f"{k:05d}.csv", scene.points, "%g", ",", header="x,y", comments="")
    return folder


def _command(name: str, place: Path) -> list[str]:
    """What follows `xmask`, but for the output folder."""
    if name == "masks":
        if not (place / "drawn").exists():
            write_dataset("sha", place / "drawn", train=4, test=1, seed=3, progress=False)
        words = ["masks", "--dataset", "sha", "--root", str(place / "drawn"), "--segmenter",
                 "classical"]
    else:
        if not (place / "photos").exists():
            _photos(place / "photos", 6, dotted=3)
        words = (["predict", str(place / "photos"), "--device", "cpu"] if name == "predict" else
                 ["learn", str(place / "photos"), "--segmenter", "classical", *_SHORT])
    return [*words, "--out"]


def results(folder: Path) -> dict[str, str]:
    """Path -> checksum of the results in an output folder."""
    return {str(path.relative_to(folder)): files.sha256(path) for path in folder.rglob("*")
            if path.is_file() and ".xmask" not in path.parts and path.name not in _NEVER_EQUAL}


def kill_and_compare(name: str, place: Path, *, kills: int, seed: int) -> dict:
    """Run a command, kill it `kills` times at random moments, run it to its end, and compare.

    A whole run takes far longer than the time between two kills, so the output folder is thrown
    away whenever a run has come to its end and kills are left. The first run is a new interpreter;
    the others are forked, so that kills meet its work and not its imports.
    Returns how many kills there were, and what was lost of finished images or differs.
    """
    rng = random.Random(f"{name} {seed}")
    command = _command(name, place)
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "xmask", *command, str(place / "whole")], check=True,
                   capture_output=True)
    took = time.monotonic() - begun
    whole, done, lost, different, ends = results(place / "whole"), 0, [], [], 0
    out = place / "killed-0"
    while True:
        begun = time.monotonic()
        process = Program("-m", "xmask", *command, out, log=place / "log")
        try:
            code = process.wait(rng.uniform(0.2, 0.9) * took if done < kills else None)
        except subprocess.TimeoutExpired:
            process.kill_all()
            done += 1
            if out.exists():  # whatever has its name is whole
                lost += [f"{path.name} after kill {done}" for path in out.rglob("*.png")
                         if ".xmask" not in path.parts and not _is_whole(path)]
            continue
        if code:
            raise RuntimeError(process.said())
        took = min(took, time.monotonic() - begun)  # without imports
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
for place in sys.argv[1:3]:
    status = main([sys.argv[3], f"{place}/photos", "--out", f"{place}/out", *sys.argv[4:]])
    print("peak", status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peaks(command: str, place: Path, few: int, many: int) -> list[float]:
    """Peak memory, MB, of a process that predicts, or learns from, few small images, and after it
    has done so with many, too."""
    places = [place / str(number) for number in (few, many)]
    for folder, number in zip(places, (few, many)):
        _photos(folder / "photos", number, dotted=3)
    options = ["--device", "cpu"]
    if command != "predict":  # long enough to see 1,000 images
        options = ["--segmenter", "classical", *_SHORT, "--set=schedule.steps_per_epoch=32"]
    found = subprocess.run([sys.executable, "-c", _MEASURE, *map(str, places), command, *options],
                           check=True, capture_output=True, text=True).stdout
    measured = re.findall(r"^peak (\d+) (\d+)$", found, re.MULTILINE)
    assert [status for status, _ in measured] == ["0", "0"]
    return [int(size) / 1024 for _, size in measured]


class TinyImages:
    """So many images of 32 × 32 px with two heads, as far as masks need a dataset."""

    settings = {"max_side": None}

    def __init__(self, number: int) -> None:
        self.ids = [f"{k:05d}" for k in range(number)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        image = np.full((32, 32, 3), i % 251, np.uint8)
        image[8:16, 8:16], image[18:26, 18:26] = 255 - i % 251, i % 7 * 30
        return Sample(image, np.array([[11, 11], [21, 21]], np.float32), None, self.ids[i])

    def image_checksum(self, i: int) -> str:
        return str(i)


def many_images(place: Path, number: int) -> dict:
    """Masks of so many tiny images by two workers: seconds, and the most memory in MB of this
    process and of a worker during the second and during the last tenth of the images."""
    me, sizes, begun, over = psutil.Process(), [], time.monotonic(), threading.Event()

    def watch() -> None:
        while not over.wait(1):
            done = sum(1 for _ in place.glob("*.csv")) / number
            with suppress(psutil.Error):
                workers = me.children(recursive=True)
                sizes.append((done, *(max(p.memory_info().rss for p in some) / 2**20
                                      for some in ([me], workers) if some)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        mask_dataset(TinyImages(number), range(number), ClassicalSegmenter(), place, workers=2,
                     progress=False)
    finally:
        over.set()
        thread.join()
    sizes = [one for one in sizes if len(one) == 3]
    early, late = ([max(some) for some in zip(*(one[1:] for one in sizes if low <= one[0] <= high))]
                   for low, high in ((0.1, 0.2), (0.9, 1.0)))
    return {"seconds": time.monotonic() - begun, "early": early, "late": late}


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
    parser.add_argument("--many", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name, share in (("masks", 0.4), ("predict", 0.4), ("learn", 0.2)):
            (place / name).mkdir()
            one = kill_and_compare(name, place / name, kills=round(share * options.kills),
                                   seed=options.seed)
            faults += one["lost"] + one["different"]
            rows.append((f"`xmask {name}` killed by SIGKILL at random moments", f"{one['kills']} "
                         f"kills, {one['ends']} whole runs",
                         f"{len(one['lost'])} results lost, {len(one['different'])} files differ "
                         "from an undisturbed run"))
        one = hostile_images(place, 500)
        rows.append(("hostile files as photos", f"{one['files']} files in one call",
                     f"{one['tracebacks']} tracebacks, {one['said']} named"))
        for name in ("predict", "learn"):
            few, many = peaks(name, place / f"of {name}", 50, options.images)
            rows.append((f"memory of `xmask {name}`", f"{options.images} images beside 50",
                         f"{many:.0f} MB beside {few:.0f} MB: {many / few:.3f} times"))
        one = many_images(place / "many", options.many)
        rows.append(("memory of `xmask masks` with two workers",
                     f"{options.many} tiny images, 25 a task, {one['seconds']:.0f} s", ", ".join(
                         f"{name} at most {late:.0f} MB (last tenth), {early:.0f} MB (second tenth)"
                         for name, early, late in zip(("client", "largest worker"), one["early"],
                                                      one["late"]))))
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
