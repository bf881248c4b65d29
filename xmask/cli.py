"""The `xmask` command: every step of the study, and the tools around it, from a shell."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from xmask import __version__, memory
from xmask.presets import DATASETS, PERCENTS, PROFILES, SEEDS, VARIANTS
from xmask.tools.arguments import names, number, numbers, positive, threads


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 something failed or was found wrong, 2 a wrong command line."""
    sys.stdout, sys.stderr = (  # closed by whoever started us: then nobody reads them
        one or open(os.devnull, "w", encoding="utf-8") for one in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # a file name may hold bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    memory.keep(huge_pages=options.function in (_train, _evaluate, _learn))
    before = os.environ.get("XMASK_MAX_PIXELS")
    if getattr(options, "max_pixels", None):
        os.environ["XMASK_MAX_PIXELS"] = str(options.max_pixels)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and options.function is not _train:
            raise ValueError("only `xmask train` works in the processes of torchrun; start this "
                             "command without it")
        status = options.function(options)
        _flush()
        return status or 0
    except KeyboardInterrupt:
        print("\nstopped; the same command " + (
            "goes on from here" if options.goes_on else "begins anew"), file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left: that is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other programs end then
    except Exception as error:  # whatever a user hands in gets a sentence
        if os.environ.get("XMASK_TRACEBACK"):
            raise
        print(f"xmask: {_sentence(error)}\n(XMASK_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    finally:
        if before is None:
            os.environ.pop("XMASK_MAX_PIXELS", None)
        else:
            os.environ["XMASK_MAX_PIXELS"] = before


def _flush() -> None:
    """Bring what was printed out, so that a full disk or a closed pipe is noticed here."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


def _sentence(error: Exception) -> str:
    """An error in words that name the file, where there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return (f"out of memory ({error}). Give smaller images (--max-side), fewer --workers, or "
                "close other programs")
    if isinstance(error, (ValueError, OSError, RuntimeError)) and str(error):
        return str(error)
    return (f"{type(error).__name__}: {error}. This was not foreseen and may be a fault of xmask: "
            "please report it")


_BESIDE = "write into a folder that holds other files, too, and replace those of the same names"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xmask", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str, within=commands) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=text, description=text)
        made.set_defaults(function=function, goes_on=function in _GOES_ON)
        return made

    _reproduce_command(command)
    _own_photo_commands(command)
    _training_commands(command)
    _run_commands(command)
    _page_commands(command)
    _data_commands(command, commands)
    return parser


def _reproduce_command(command: Callable) -> None:
    made = command("reproduce", _reproduce, "run the study: what is missing or stale, then compare")
    _profile(made)
    made.add_argument("--sam", default="", help="SAM checkpoint (.pth) or vit_b, vit_l, vit_h; "
                      "default: the profile's own, classical (photo: the bundled SAM)")
    made.add_argument("--datasets", type=names, default=DATASETS, help="e.g. sha,qnrf")
    made.add_argument("--percents", type=numbers, default=PERCENTS, help="e.g. 5,40")
    made.add_argument("--seeds", type=numbers, help="e.g. 1,2,3; default: 1; full: 1 to 5; "
                      "paper: 2024")
    made.add_argument("--jobs", type=positive, help="steps at a time")
    _elsewhere(made, "--jobs")
    _set(made, "a field of every run, e.g. --set loss.tau=0.5")
    made.add_argument("--no-extras", action="store_true",
                      help="leave out supervised-only runs and ablations")


def _own_photo_commands(command: Callable) -> None:
    made = command("masks", _masks, "EDP-SAM masks of a dataset or of one image, resumable")
    made.add_argument("--dataset", choices=(*DATASETS, "shb", "synthetic"))
    made.add_argument("--root", type=Path, help="folder of the dataset")
    made.add_argument("--split", default="train", help="of the dataset; default: train")
    made.add_argument("--image", type=Path, help="one image instead of a dataset")
    made.add_argument("--points", type=Path, help="its heads: a CSV with columns x and y")
    made.add_argument("--out", required=True, type=Path, help="folder for all results")
    made.add_argument("--segmenter", choices=("bundled", "classical"), default="bundled",
                      help="bundled (default): the small SAM of the package; classical: without "
                           "a network, faster")
    made.add_argument("--checkpoint", metavar="PATH_OR_NAME", help="SAM to use instead: a .pth, or "
                      "vit_b, vit_l, vit_h as `xmask sam-weights` stores them")
    made.add_argument("--workers", type=number, default=1, help="processes; masks do not depend "
                      "on how many")
    made.add_argument("--threads", type=number, default=1, help="of each process")
    _elsewhere(made, "--workers")
    made.add_argument("--shard", default="", metavar="I/N",
                      help="2/5: the second of five such calls that fill one --out together")
    made.add_argument("--boxes", action="store_true",
                      help="use the head sizes that the dataset has (JHU-CROWD++) as well")
    made.add_argument("--limit", type=positive, help="only the first images")
    _guards(made)

    made = command("sam-weights", _sam_weights, "download a checkpoint of the original SAM, its "
                   "checksum verified, and say where it lies")
    made.add_argument("name", help="vit_b (375 MB), vit_l (1.2 GB) or vit_h (2.6 GB)")

    made = command("predict", _predict, "count and masks of your own images, resumable")
    made.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or globs")
    made.add_argument("--out", required=True, type=Path, help="folder for all results")
    made.add_argument("--weights", help="a file of `xmask export` or a run folder; default: the "
                                        "model of the package for photographs; drawn: the one of "
                                        "drawn crowds")
    made.add_argument("--max-side", type=int, metavar="PX",
                      help="compute larger images at this longer side; default: full size")
    made.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    _guards(made)

    made = command("export", _export, "write a run's model as one file: for `predict --weights`, "
                   "or, as ONNX, for other programs")
    made.add_argument("run", metavar="RUN_FOLDER", help="for ONNX also a file of `xmask export`, "
                      "or photo or drawn: the models of the package")
    into = made.add_mutually_exclusive_group(required=True)
    into.add_argument("--out", type=Path, metavar="FILE", help="safetensors; ONNX if it ends in "
                      ".onnx")
    into.add_argument("--onnx", type=Path, metavar="FILE", help="ONNX, whatever it ends in")
    made.add_argument("--half", action="store_true", help="weights in 16 bits: half the size")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")

    made = command("learn", _learn, "train on your own photos: those with dots beside them, and "
                   "those without; resumable")
    made.add_argument("folder", type=Path, metavar="FOLDER", help="photos and their dots: a.csv "
                      "(x,y), LabelMe's a.json or a .mat for a.jpg; or a file of COCO, CVAT, VIA "
                      "or Label Studio for many")
    made.add_argument("--out", required=True, type=Path, help="a run folder, for predict --weights")
    made.add_argument("--segmenter", default="bundled", help="what makes the masks to learn from: "
                      "bundled (default), classical (faster), a SAM checkpoint (.pth), or vit_b, "
                      "vit_l, vit_h")
    made.add_argument("--seed", type=number, default=1, help="of the training; default: 1")
    _set(made, "a field, e.g. --set schedule.phase3=48")
    _guards(made)


def _training_commands(command: Callable) -> None:
    made = command("train-sam", _train_sam, "train the bundled SAM on drawn crowds")
    made.add_argument("--out", type=Path, help="weights file; default: the one in the package")
    made.add_argument("--seed", type=number, help="of the first training scene")
    made.add_argument("--scenes", type=positive, help="drawn scenes")
    made.add_argument("--steps", type=positive, help="over which the learning rate falls")
    made.add_argument("--stop", type=positive, help="end after so many of the steps")
    made.add_argument("--threads", type=threads, default=1, help="default: 1")
    made.add_argument("--overwrite", action="store_true", help="replace the weights, and their "
                      ".json, if they are there")

    made = command("edp-study", _edp_study, "compare EDP-SAM with simpler masks on drawn scenes")
    made.add_argument("--out", type=Path, default=Path("results/edp_sam"),
                      help="default: results/edp_sam")
    made.add_argument("--overwrite", action="store_true", help=_BESIDE)
    made.add_argument("--scenes", type=positive, default=18, help="default: 18")
    made.add_argument("--seed", type=number, help="of the first scene")
    made.add_argument("--boxes", action="store_true",
                      help="instead: what annotated head sizes add (boxes.csv)")
    made.add_argument("--negatives", action="store_true",
                      help="instead: how many neighbours serve as negative points (negatives.csv)")
    made.add_argument("--segmenters", type=names, default=("classical", "bundled"),
                      help="default: classical,bundled")
    made.add_argument("--jobs", type=positive, default=1, help="scenes at a time; default: 1")


def _run_commands(command: Callable) -> None:
    for name, function, text in (
            ("train", _train, "train one run of the study"),
            ("evaluate", _evaluate, "evaluate one run of the study (training it if needed)")):
        made = command(name, function, text)
        _profile(made)
        made.add_argument("--dataset", choices=(*DATASETS, "shb"), default="sha")
        made.add_argument("--percent", type=int, default=10, help="of the images are labelled; "
                          "default: 10")
        made.add_argument("--seed", type=number, help="default: 1; paper: 2024, as released")
        made.add_argument("--variant", choices=VARIANTS, default="xmask", metavar="NAME",
                          help="xmask (default); rivals and ablations: "
                          + ", ".join([*VARIANTS][1:]))
        made.add_argument("--sam", default="", help="SAM checkpoint (.pth); default: the profile's "
                          "own, classical (photo: the bundled SAM)")
        _set(made, "a field, e.g. --set loss.tau=0.5")

    text = "regenerate the {} of a profile from its run folders"
    _profile(command("figures", _figures, text.format("figures")))
    made = command("tables", _tables, text.format("tables"))
    made.add_argument("--profile", choices=PROFILES, default="demo")


def _page_commands(command: Callable) -> None:
    made = command("code", _code, "which commits carry the code that made a result")
    made.add_argument("wanted", metavar="RUN_FOLDER_OR_DIGEST",
                      help="a run folder, or a digest of code from its config.json")
    made.add_argument("--limit", type=int, default=200, help="how many commits to look at")
    made = command("bench", _bench, "measure what the method costs beside dense code and libraries")
    made.add_argument("--only", type=names, default=(), metavar="GROUPS",
                      help="e.g. decode,losses; default: all")
    made.add_argument("--threads", type=threads, default=2, help="default: 2")
    made = command("docs", _docs, "for maintainers: write the numbers in README.md and docs anew")
    made.add_argument("--diagram", action="store_true",
                      help="instead, draw the method's picture (figures/method)")
    made.add_argument("--walkthroughs", nargs="*", metavar="NAME",
                      help="instead, run these walkthroughs (e.g. 01; default: all) and store "
                           "their outputs")
    made = command("report", _report, "one HTML page of a profile's results, to share")
    _profile(made, ", for --pictures")
    made.add_argument("--out", type=Path, help="default: results/PROFILE/report.html")
    made.add_argument("--pictures", action="store_true",
                      help="show real photographs, too: mind their terms before you share the page")
    made.add_argument("--overwrite", action="store_true", help="replace the file --out if it is "
                      "there")


def _data_commands(command: Callable, commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="check, measure or draw datasets").add_subparsers(
        required=True, metavar="COMMAND")
    check = command("check", _check, "what is missing or odd in a dataset folder", data)
    made = command("coverage", _coverage, "how many exclusion circles cover a pixel, counted over "
                   "all images (walkthrough 01)", data)
    for one in (check, made):
        one.add_argument("--dataset", required=True, choices=(*DATASETS, "shb", "synthetic"))
        one.add_argument("--root", required=True, type=Path, help="folder of the dataset")
    made.add_argument("--out", required=True, type=Path, help="a .csv file")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    made = command("draw", _draw, "draw a synthetic dataset in an official layout", data)
    made.add_argument("--layout", required=True, choices=DATASETS)
    made.add_argument("--out", required=True, type=Path, help="the dataset's folder comes into it")
    for name, default, text in (("train", 40, "training images"), ("test", 16, "test images"),
                                ("seed", 2024, "other seeds, other crowds")):
        made.add_argument(f"--{name}", type=number, default=default,
                          help=f"{text}; default: {default}")
    made.add_argument("--jobs", type=positive, default=1, help="images at a time; default: 1")


def _profile(made: argparse.ArgumentParser, use: str = "") -> None:
    made.add_argument("--profile", choices=PROFILES, default="demo", help="which study: demo "
                      "(default) and full draw their crowds, photo and paper need --data")
    made.add_argument("--data", default="", help=f"folder of the real datasets{use}")


def _set(made: argparse.ArgumentParser, what: str) -> None:
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help=f"change {what}")


def _elsewhere(made: argparse.ArgumentParser, workers: str) -> None:
    made.add_argument("--scheduler", default="", metavar="tcp://HOST:PORT", help="use its workers")
    made.add_argument("--cluster", default="", help=f"slurm: {workers} jobs; see docs/cluster.md")


def _guards(made: argparse.ArgumentParser) -> None:
    made.add_argument("--overwrite", action="store_true", help=_BESIDE)
    made.add_argument("--max-pixels", type=positive, metavar="N", help="refuse larger images; "
                      "default: 100 million")


def _reproduce(o: argparse.Namespace) -> int:
    from xmask.study import reproduce

    for name in ("SIGTERM", "SIGHUP"):  # stops the notebooks too, as Ctrl-C does
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, signal.default_int_handler)
    unknown = [name for name in o.datasets if name not in DATASETS]
    if unknown:
        raise ValueError(f"--datasets: {', '.join(unknown)} unknown; known: {', '.join(DATASETS)}")
    ok = reproduce.run(o.profile, data=o.data, sam=o.sam, jobs=o.jobs, datasets=o.datasets,
                       percents=o.percents, seeds=o.seeds, extras=not o.no_extras,
                       overrides=_changes(o.set), scheduler=o.scheduler, cluster=o.cluster)
    return 0 if ok else 1


def _masks(o: argparse.Namespace) -> None:
    from xmask import files
    from xmask.data import open_dataset
    from xmask.data.own_photos import OwnPhotos
    from xmask.segmenters import open_segmenter
    from xmask.study import steps
    from xmask.tools import mask_folder

    if (o.dataset is None) == (o.image is None):
        raise ValueError("give either --dataset and --root, or --image and --points")
    if o.dataset and o.root is None:
        raise ValueError(f"--root: give the folder of {o.dataset}")
    if o.image and not o.points:
        raise ValueError("--points: give a CSV with columns x and y, one row per head")
    if o.image:
        read = [o.image, o.points]
        dataset = OwnPhotos([(o.image, o.points)])
    else:
        dataset = open_dataset(o.dataset, o.root, o.split, draw=False)
        read = dataset.paths()
    files.OutputFolder(o.out, overwrite=o.overwrite).check()
    segmenter = open_segmenter(str(o.checkpoint or o.segmenter), steps.device())
    options = {name: getattr(o, name) for name in (
        "shard", "overwrite", "workers", "threads", "scheduler", "cluster", "boxes")}
    told, failure = mask_folder.make(dataset, list(range(len(dataset)))[: o.limit], segmenter,
                                     o.out, kept=read, **options)
    print("\n".join(told))
    if failure:
        raise failure


def _sam_weights(o: argparse.Namespace) -> None:
    from xmask.segmenting import checkpoints

    print(checkpoints.download(o.name))


def _train_sam(o: argparse.Namespace) -> None:
    import torch

    from xmask.segmenting import sam, sam_training

    out = o.out or sam.BUNDLED
    sam.check_out(out, o.overwrite)
    torch.set_num_threads(o.threads)
    chosen = {name: getattr(o, name) for name in ("seed", "scenes", "steps", "stop")}
    plan = sam_training.Training(**{k: value for k, value in chosen.items() if value is not None})
    print(json.dumps(sam_training.train(plan, out), indent=1))


def _edp_study(o: argparse.Namespace) -> None:
    from xmask.study import edp_study

    options = {"scenes": o.scenes, "segmenters": o.segmenters, "overwrite": o.overwrite}
    options |= {} if o.seed is None else {"seed": o.seed}
    if o.boxes or o.negatives:
        if o.jobs > 1:
            raise ValueError("--jobs: --boxes and --negatives do one scene at a time; leave it out")
        o.goes_on = False  # unlike the comparison, they keep no finished scenes
        print((edp_study.run_boxes if o.boxes else edp_study.run_negatives)(o.out, **options))
    else:
        edp_study.run(o.out, jobs=o.jobs, **options)
        print((o.out / "table.md").read_text(encoding="utf-8"))


def _predict(o: argparse.Namespace) -> int:
    from xmask import files
    from xmask.tools import models, photos

    found = photos.find(o.images)
    photos.check_side(o.max_side)
    files.OutputFolder(o.out, overwrite=o.overwrite).check()
    model = models.load(o.weights, o.device)
    print(f"model: trained on {model.record['trained_on']['text']}, on {model.device}")
    rows = photos.run(found, model, o.out, max_side=o.max_side, overwrite=o.overwrite)
    for row in rows:
        said = row.error.removeprefix(f"{row.image}: ") or f"{row.count} heads"
        if row.low is not None:
            said += f" (between {row.low} and {row.high})"
        print(f"{row.image}: {said}" + (f" ({row.repairs})" if row.repairs else ""))
    failed = [row for row in rows if row.error]
    print(f"{len(rows) - len(failed)} of {len(rows)} images done, in {o.out}"
          + (f"; {len(failed)} failed, see above and counts.csv" if failed else ""))
    if len(failed) < len(rows):
        print(f"look at {o.out / 'counts.csv'}, and at every image's NAME.overlay.png beside it")
    if said := models.reliability(model.record, [r.count for r in rows if r.count is not None]):
        print(said)
    return 1 if failed else 0


def _export(o: argparse.Namespace) -> None:
    from xmask import files
    from xmask.tools import models

    out, as_onnx = o.onnx or o.out, o.onnx is not None or o.out.suffix.lower() == ".onnx"
    if as_onnx and o.half:
        raise ValueError("--half: an ONNX file has weights in 32 bits; leave it out")
    models.check_apart(o.run, out)
    files.check_new(out, o.overwrite)
    if not as_onnx:
        print(models.load(models.export(o.run, out, half=o.half), "cpu"))
        print(f"{out}\nnext: xmask predict PHOTOS --out FOLDER --weights {shlex.quote(str(out))}")
        return
    from xmask.tools import onnx_export
    model = models.load(o.run, "cpu")
    differences = onnx_export.export(model, out)
    print(f"{model!r}\n{out}: " + (
        ", ".join(f"{name} within {value:.0e}" for name, value in differences.items())
        + " of torch" if differences else "not compared with torch: no onnxruntime is installed"))


def _learn(o: argparse.Namespace) -> None:
    from xmask import files
    from xmask.tools import learn

    settings = learn.configure(_changes(o.set), seed=o.seed)
    files.OutputFolder(o.out, overwrite=o.overwrite).check()
    dotted, bare = learn.read_folder(o.folder)
    print(f"{len(dotted)} photos with {dotted.counts().sum()} dots, {len(bare)} without")
    run = learn.learn(dotted, bare, o.out, settings, segmenter=o.segmenter, overwrite=o.overwrite)
    report = run / "report.json"
    if report.is_file():
        print(learn.in_words(files.read_json(report)))
    else:
        print("No photo was held out, so nothing says how good the new model is: give dots to ten "
              "photos or more.")
    print(f"{run}\nnext: xmask predict PHOTOS --out FOLDER --weights {shlex.quote(str(run))}")


def _configuration(o: argparse.Namespace):
    from xmask.study import steps

    seed = SEEDS.get(o.profile, (1,))[0] if o.seed is None else o.seed
    return steps.configure(o.profile, o.dataset, o.percent, seed, variant=o.variant, sam=o.sam,
                           overrides=_changes(o.set))


def _changes(texts: list[str]) -> dict[str, object]:
    """FIELD=VALUE, the value as JSON where it is JSON, else as text."""
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: {text!r} is not FIELD=VALUE")
        try:
            changes[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            changes[name] = value
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--set {name}: {error}; give a shorter value") from None
    return changes


def _train(o: argparse.Namespace) -> None:
    from xmask.study import steps

    folder = steps.train(_configuration(o), o.data)
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one speaks
        print(folder)


def _evaluate(o: argparse.Namespace) -> None:
    from xmask.study import steps

    result = steps.evaluate(_configuration(o), o.data)
    print(json.dumps({k: result[k] for k in ("run", "synthetic", "counting", "localization",
                                             "segmentation", "baselines")}, indent=1))


def _say(lines: Iterable[object]) -> None:
    for line in lines:
        print(line)


def _tables(o: argparse.Namespace) -> None:
    from xmask.study import steps, tables

    results = steps.results_folder(o.profile)
    _say(tables.write_tables(results, results / "tables"))


def _figures(o: argparse.Namespace) -> None:
    from xmask.study import figures, steps

    _say(figures.write_figures(
        steps.results_folder(o.profile), Path("figures") / o.profile,
        lambda run: steps.test_images_of(run, o.data)))


def _code(o: argparse.Namespace) -> None:
    from xmask.study import commits

    _say(commits.find(o.wanted, o.limit))


def _bench(o: argparse.Namespace) -> int:
    from xmask import bench

    folders = Path("results/bench"), Path("figures/bench")
    try:
        bench.run(*folders, only=o.only or bench.GROUPS, threads=o.threads)
    except KeyboardInterrupt:
        print(f"\nstopped; {folders[0] / 'bench.md'} holds what was measured and says what is "
              "missing; --only GROUPS measures some groups only", file=sys.stderr)
        return 130
    print((folders[0] / "bench.md").read_text(encoding="utf-8"))
    return 0


def _docs(o: argparse.Namespace) -> None:
    from xmask import provenance
    from xmask.study import (
        claims,
        diagram,
        elsewhere,
        model_card,
        pages,
        profile_table,
        steps,
        walkthroughs,
    )

    root = steps.enter_root(provenance.ROOT)  # the package's own clone, not where this is called
    if o.diagram:
        made = diagram.write()
    elif o.walkthroughs is None:
        made = [pages.refresh(root),
                *(pages.write_block(root / page, block(root)) for page, block in (
                    (model_card.CARD, model_card.card_block),
                    (model_card.CARD, elsewhere.card_block), (claims.PAGE, claims.evidence_block),
                    (profile_table.PAGE, profile_table.differences_block)))]
    else:
        made = map(walkthroughs.execute, walkthroughs.walkthroughs(only=o.walkthroughs))
    _say(made)


def _report(o: argparse.Namespace) -> None:
    from xmask import files
    from xmask.study import report, steps

    results = steps.results_folder(o.profile)
    if o.out:
        files.check_new(o.out, o.overwrite, ".html")
    print(report.write_report(
        results, o.out or results / "report.html", figures_folder=Path("figures") / o.profile,
        datasets=lambda run: steps.test_images_of(run, o.data), pictures=o.pictures))


def _check(o: argparse.Namespace) -> int:
    from xmask.data.check import as_text, check_dataset

    table = check_dataset(o.dataset, o.root)
    print(as_text(table))
    return 1 if (table["status"] == "error").any() else 0


def _coverage(o: argparse.Namespace) -> None:
    from xmask import files
    from xmask.data import open_dataset
    from xmask.study import illustrations

    files.check_new(o.out, o.overwrite, ".csv")
    splits = [open_dataset(o.dataset, o.root, split, draw=False) for split in ("train", "test")]
    table = illustrations.coverage_table((s.points, s.shape) for split in splits for s in split)
    files.write_text(o.out, table.to_csv(index=False))
    print(o.out)


def _draw(o: argparse.Namespace) -> None:
    from xmask.synthetic import write_dataset

    print(write_dataset(o.layout, o.out, train=o.train, test=o.test, seed=o.seed, jobs=o.jobs))


# Stopped, these go on where they were; the others begin anew.
_GOES_ON = (_reproduce, _masks, _predict, _learn, _train, _evaluate, _edp_study, _draw)
