"""Docs that run: commands parse, code blocks work, links lead somewhere, generated parts are new."""

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from torch.distributed import run as torchrun

import xmask
from xmask import config, files, presets, segmenters
from xmask.cli import _parser, main
from xmask.study import claims, elsewhere, model_card, pages, profile_table, reproduce
from xmask.study.steps import _assigned
from xmask.study.walkthroughs import walkthroughs
from xmask.synthetic import draw_scene
from xmask.trainer import phase_of, unlabelled_weight

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
                      *sorted((ROOT / "docs").glob("*.md")))}
for _path in walkthroughs(ROOT / "notebooks"):
    PAGES[_path.name] = "\n\n".join(
        cell.source for cell in nbformat.read(_path, 4).cells if cell.cell_type == "markdown")
LANGUAGES = {"sh", "sbatch", "python", "text", "bibtex"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SHELL_WORDS = ("for ", "done", "#")


def blocks(languages):
    return [pytest.param(text, id=f"{name}-{number}")
            for name, page in PAGES.items()
            for number, (language, text) in enumerate(
                re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
            if language in languages]


def commands(text):
    """The commands of a shell block: continued lines joined, loops and comments left out."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip()
        if line and not line.startswith(SHELL_WORDS):
            yield shlex.split(line, comments=True)


def test_every_code_block_says_its_language():
    for name, page in PAGES.items():
        found = re.findall(r"^```(\w*)\n.*?^```", page, re.DOTALL | re.MULTILINE)
        assert set(found) <= LANGUAGES, f"{name}: {found}"


@pytest.mark.parametrize("text", blocks({"sh", "sbatch"}))
def test_every_command_of_a_shell_block_exists(text):
    for words in commands(text):
        CHECKS[Path(words[0]).name](words[1:])


def test_examples_of_masks_do_not_share_a_folder():
    # Masks of another request are removed from it: whoever tries both would lose the first.
    folders = [words[words.index("--out") + 1] for words in map(
        shlex.split, re.findall(r"^\S*xmask (masks .*--out \S+)", README, re.MULTILINE))]
    assert len(folders) >= 2 and len(set(folders)) == len(folders)


def check_torchrun(words):
    where = words.index("-m")
    torchrun.get_args_parser().parse_args(words[:where + 2])  # torchrun's own options
    assert words[where + 1:where + 3] == ["xmask", "train"]
    check_xmask(words[where + 2:])


def check_xmask(words):
    _parser().parse_args(words)  # a wrong word ends in SystemExit
    assert not any(word.startswith("--set") for word in words) or config.override(
        config.preset("paper", "sha", 40),
        {words[i + 1].split("=")[0]: _example(words[i + 1].split("=")[1])
         for i, word in enumerate(words) if word == "--set"})


def _example(text):
    value = yaml.safe_load(text)
    return float(value) if isinstance(value, str) and value.startswith("$") else value


def check_papermill(words):
    source = ROOT / words[0]
    code = [cell.source for cell in nbformat.read(source, 4).cells if cell.cell_type == "code"]
    known = _assigned(code[0])
    for i, word in enumerate(words):
        if word == "-p":
            assert words[i + 1] in known, f"{words[i + 1]} is no parameter of {source.name}"
        if word == "-y":
            given = yaml.safe_load(words[i + 1].replace("$lr", "0.1"))
            assert set(given) <= known
            config.override(config.preset("paper", "sha", 40), given.get("overrides", {}))


def check_make(words):
    for word in words:
        if "=" in word:
            assert re.search(rf"^{word.split('=')[0]} \?=", MAKEFILE, re.MULTILINE) or (
                f"$({word.split('=')[0]})" in MAKEFILE), word
        else:
            assert re.search(rf"^{word}:", MAKEFILE, re.MULTILINE), f"make {word}: no such target"


def check_pip(words):
    wanted = re.fullmatch(r"\.\[(\w+)\]", words[-1])[1]
    assert words[0] == "install" and re.search(
        rf"^{wanted} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


def check_files(words):
    """Commands of the system: nothing to check but that we wrote them on purpose."""


def check_dask(words):
    command = importlib.import_module(f"distributed.cli.dask_{words[0]}").main
    command.make_context("dask", words[1:])  # a wrong word ends in an error of click


CHECKS = {"xmask": check_xmask, "papermill": check_papermill, "make": check_make,
          "pip": check_pip, "cat": check_files, "dask": check_dask, "torchrun": check_torchrun}


@pytest.mark.parametrize("text", blocks({"python"}))
def test_a_python_block_runs(text, tmp_path):
    Image.fromarray(draw_scene(1, shape=(96, 128), people=5).image).save(tmp_path / "photo.jpg")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() or "print" not in text


def test_the_three_lines_for_your_own_photo_do_what_they_say(tmp_path, monkeypatch, capsys):
    text = next(one for one in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "photo.jpg" in one)
    assert len(text.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_scene(1, shape=(96, 128), people=5).image).save("photo.jpg")
    ran = [words[1:] for words in commands(text) if Path(words[0]).name == "xmask"]
    assert len(ran) == 1 and main(ran[0]) == 0
    assert "test images of ShanghaiTech A" in capsys.readouterr().out  # how far off the counts are
    read = [words[1] for words in commands(text) if words[0] == "cat"]
    assert all((tmp_path / file).stat().st_size for file in read)


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".md")])
def test_links_lead_somewhere_and_pictures_are_described(name):
    folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
    for bang, text, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)]+)\)", PAGES[name]):
        if "://" not in target:
            assert (folder / target.split("#")[0]).exists(), target
        assert not bang or len(text) > 40, f"{target} has no alternative text"


def test_commands_named_in_sentences_exist():
    known = set(_parser()._subparsers._group_actions[0].choices)
    for name, page in PAGES.items():
        for command in re.findall(r"`xmask ([a-z-]+)", page):
            assert command in known, f"{name}: xmask {command}"
        for target in re.findall(r"`make ([a-z]+)", page):
            check_make([target])


def shown_day():
    return re.search(r"as of (\d{4}-\d{2}-\d{2})", README)[1]


def test_readme_shows_the_results_of_the_tables():
    block = pages.results_block(ROOT, shown_day())
    assert "Drawn crowds" in block and block in README, "run `xmask docs`"


def test_the_numbers_of_the_evidence_are_those_of_the_claims(tmp_path):
    page = (ROOT / claims.PAGE).read_text("utf-8")
    assert claims.evidence_block(ROOT) in page, "run `xmask docs`"
    lost = tmp_path / "page.md"
    lost.write_text("nothing")
    with pytest.raises(ValueError, match="page.md: no lines .* Restore"):
        pages.write_block(lost, f"{claims.BEGIN}\n{claims.END}")


def test_what_the_readme_says_of_claims_is_what_they_say():
    page = " ".join(README.split())
    table = pd.read_csv(ROOT / "results" / "claims.csv")
    drawn = table[table["data"].str.startswith("drawn") & table["effect"].notna()]

    def verdicts(measure, *rivals):
        rows = drawn[(drawn["measure"] == measure) & drawn["rival"].isin(rivals)
                     & ~drawn["as_good"].astype(bool) & (drawn["ours"] == "xmask")]
        return {(row.rival, row.labels): row for row in rows.itertuples()}

    assert "five seeds, at 40% three, on 100 drawn" in page and "with four seeds (the point-mask term three)" in page
    assert dict(drawn.groupby("labels")["seeds"].max()) == {5: 5, 10: 5, 40: 3}
    trainings = sum(step.name.startswith("train") for step in reproduce.plan("full"))
    assert f"moved constants, too: {trainings} trainings" in page
    assert set(drawn[drawn["labels"] == 40]["rival"]) & {*presets.VARIANTS} == {*presets.COMPARED["full"]}
    assert set(drawn[drawn["labels"] == 40]["seeds"]) == {3}
    assert set(drawn[drawn["rival"].isin(presets.ABLATIONS) & (
        drawn["rival"] != "without-mask-constraint")]["seeds"]) == {4}
    assert set(drawn[drawn["ours"] == "with-point-mask"]["seeds"]) == {3}
    assert "better than discs, Voronoi cells, watershed and EDP-SAM (with its classical segmenter)" in page
    same = drawn[drawn["claim"] == "XMask's masks are better than masks without a mask head"]
    assert set(same["labels"]) == {5, 10, 40} and (same["verdict"] == claims.HOLDS).all()
    assert "the circle and center sampling make masks better (tested at 10%)" in page
    parts = verdicts(claims.MASKS, "without-nnec", "without-center-sampling").values()
    assert {row.verdict for row in parts} == {claims.HOLDS}
    assert ("Unlabelled images make counts better where points alone are learnt (drawn, 10%, calibrated "
            "thresholds)") in page
    alone = drawn[(drawn["ours"] == "points-only") & (drawn["rival"] == "supervised-points-only")]
    alone = alone.set_index(["measure", "labels"])
    assert [at for at in alone.index if alone.loc[at, "verdict"] == claims.HOLDS] == [(claims.CALIBRATED, 10)]
    assert len(alone) == 6 and set(alone["why"].fillna("")) == {"", "no difference shown"}
    assert ("that they make XMask's better is not shown, neither on drawn crowds at any percentage nor on photographs at "
            "10%. That masks as further pseudo-labels help counting is not shown either: at 10% points alone count better "
            "(calibrated).") in page
    for measure in (claims.COUNTS, claims.CALIBRATED):
        rows = verdicts(measure, "supervised-only", "points-only")
        if measure == claims.CALIBRATED:
            assert rows.pop(("points-only", 10)).why == "the opposite"
        assert {row.why for row in rows.values()} == {"no difference shown"} and len(rows) >= 5
    real = table[(table["data"] == "ShanghaiTech A") & (table["rival"] == "supervised-only")
                 & (table["ours"] == "xmask") & table["effect"].notna()]
    assert set(real["labels"]) == {10} and set(real["why"]) == {"no difference shown"}
    assert "makes counts better, at 10 and 40% it seems only by moving the threshold" in page
    for percent in (10, 40):
        constraint = ("without-mask-constraint", percent)
        assert verdicts(claims.COUNTS, constraint[0])[constraint].verdict == claims.HOLDS
        assert verdicts(claims.CALIBRATED, constraint[0])[constraint].why == "no difference shown"
    assert verdicts(claims.CALIBRATED, constraint[0])[constraint[0], 5].verdict == claims.HOLDS
    assert "and costs masks three to five points of IoU" in page
    assert all(row.why == "the opposite" and -5.2 < row.effect < -2.9 for row in drawn[
        (drawn["rival"] == "without-mask-constraint") & (drawn["measure"] == claims.MASKS)
    ].itertuples())


def test_what_the_evidence_says_of_unlabelled_images_is_in_the_table():
    page = " ".join((ROOT / claims.PAGE).read_text("utf-8").split())
    table = pd.read_csv(ROOT / "results" / "claims.csv")
    drawn = table[(table["measure"] == claims.CALIBRATED) & table["effect"].notna()]

    def row(ours, rival, percent, as_good=False):
        found = drawn[(drawn["ours"] == ours) & (drawn["rival"] == rival)
                      & (drawn["labels"] == percent) & (drawn["as_good"] == as_good)]
        return next(found.itertuples())

    ten, forty = (row("points-only", "supervised-points-only", p) for p in (10, 40))
    assert f"from {ten.rival_value:.1f} to {ten.ours_value:.1f}, in all five seeds and beyond luck" in page
    assert f"At 40% it goes from {forty.rival_value:.1f} to {forty.ours_value:.1f}, in all three" in page
    assert ten.in_favour == ten.seeds and forty.in_favour == forty.seeds and -0.1 < forty.low < 0
    supervised = [row("supervised-only", "supervised-points-only", p, as_good=True) for p in (10, 40)]
    assert (f"points only has {ten.rival_value:.1f}, and supervised only, which learns masks as well, "
            f"{supervised[0].ours_value:.1f}") in page
    assert f"too wide to say ({forty.rival_value:.1f} and {supervised[1].ours_value:.1f})" in page
    usual = table[(table["measure"] == claims.COUNTS) & (table["rival"] == "supervised-points-only")
                  & (table["ours"] == "points-only")].set_index("labels")["effect"]
    assert "the gain is {:.2f} people at 10%, in all five seeds, {:.2f} at 5% and {:.2f} at 40%".format(
        *(usual.dropna()[p] for p in (10, 5, 40))) in page
    ahead = [row("points-only", "supervised-only", p) for p in (10, 40)]
    assert {one.verdict for one in ahead} == {claims.HOLDS} and (
        "({0.ours_value:.1f} against {0.rival_value:.1f}, and {1.ours_value:.1f} against "
        "{1.rival_value:.1f}, beyond luck)").format(*ahead) in page
    five = row("supervised-only", "supervised-points-only", 5, as_good=True)
    assert five.low > 0 and five.in_favour == 5 and (
        f"({five.ours_value:.1f} against {five.rival_value:.1f}, in all five seeds)") in page
    own = row("xmask", "supervised-only", 10)
    assert own.low < 0 and own.in_favour == 4 and (
        f"calibrated, from {own.rival_value:.1f} to {own.ours_value:.1f}, in four of five seeds") in page
    behind = [row("xmask", "points-only", p) for p in (10, 40)]
    assert [one.in_favour for one in behind] == [0, 0] and [one.high < 0 for one in behind] == [True, False]
    assert f"beyond luck ({behind[0].rival_value:.1f} against {behind[0].ours_value:.1f})" in page
    for name, method in (("XMask", "xmask"), ("supervised only", "supervised-only"),
                         ("without mask constraint", "without-mask-constraint")):
        values = [next((one.ours_value if method == "xmask" else one.rival_value) for one in table[
            (table["ours"] == "xmask") & (table["labels"] == 10) & (table["measure"] == measure)
            & (table["rival"] == ("supervised-only" if method == "xmask" else method))
            & table["data"].str.startswith("drawn")].itertuples())
            for measure in (claims.COUNTS, claims.CALIBRATED, claims.MASKS)]
        shown = re.search(rf"\| {name} " + 3 * r"\| [\d.]+, ([\d.]+) " + r"\|", page)
        assert [*shown.groups()] == [f"{value:.1f}" for value in values]


def test_what_the_evidence_says_of_photographs_is_what_the_runs_found():
    page = " ".join((ROOT / claims.PAGE).read_text("utf-8").split())
    folder = ROOT / "results" / "photo" / "runs"
    error = {"": claims.count_error,
             " at 0.5": lambda row: abs(row["uncalibrated"] - row["true_count"])}

    def compared(percent, seeds, at=""):
        """MAE of supervised only and of XMask, and what lies between them, as the page says it."""
        ours, rival = (claims.values(folder, "sha", percent, v, error[at])
                       for v in ("xmask", "supervised-only"))
        assert list(ours.index) == list(rival.index) == seeds and ours.shape[1] == 182
        effect, low, high = claims.paired((rival - ours[rival.columns]).to_numpy())
        return (f"{rival.to_numpy().mean():.1f}", f"{ours.to_numpy().mean():.1f}",
                f"{abs(effect):.1f} people {'better' if effect > 0 else 'worse'}",
                f"from {-low:.1f} worse to {high:.1f} better")

    def of(percent, variant, seeds):
        return [files.read_json(folder / f"sha-{percent}-s{s}{variant}" / name) for s in seeds
                for name in ("metrics.json", "config.json")]

    said = "supervised only has an MAE of {}, and XMask of {}: {}, with a 95% interval {}{}"
    theirs, mine, effect, interval = compared(5, [2024])
    assert said.format(theirs, mine, effect, "over images ", interval) in page
    found = [of(5, v, [2024])[0] for v in ("", "-supervised-only")]
    f1 = [100 * one["localization"]["8"]["f1"] for one in found]
    assert "their F1 is {:.1f}% and {:.1f}%".format(*f1) in page
    totals = [100 * sum(row["count"] for row in one["per_image"])
              / sum(row["true_count"] for row in one["per_image"]) - 100 for one in found]
    assert "It counts {:.0f}% too few, supervised only {:.0f}%.".format(*(-t for t in totals)) in page

    seeds = [1, 2, 2024]
    theirs, mine, effect, interval = compared(10, seeds)
    assert said.format(theirs, mine, effect, "", interval) in page
    assert f"XMask has an MAE of {mine}, and supervised only {theirs}" in " ".join(README.split())
    theirs, mine, effect, interval = compared(10, seeds, " at 0.5")
    assert f"it has {theirs} and XMask {mine}: {effect}, {interval}" in page
    (xmask, xmask_config), (alone, alone_config) = (
        (of(10, v, seeds)[::2], of(10, v, seeds)[1::2]) for v in ("", "-supervised-only"))
    rmse, f1 = ([np.mean([value(one) for one in runs]) for runs in (xmask, alone)] for value in (
        lambda one: one["counting"]["rmse"], lambda one: 100 * one["localization"]["8"]["f1"]))
    assert "RMSE is {:.1f}, that of supervised only {:.1f}".format(*rmse) in page
    assert "their F1 is {:.1f}% and {:.1f}%".format(*f1) in page
    cuts = [[one["calibration"]["threshold"] for one in runs] for runs in (xmask_config, alone_config)]
    assert "{:.2f} to {:.2f} for XMask, {:.2f} to {:.2f} for supervised only".format(
        *(edge(one) for one in cuts for edge in (min, max))) in page
    few = [100 - 100 * sum(row["uncalibrated"] for row in one["per_image"])
           / sum(row["true_count"] for row in one["per_image"]) for one in alone]
    assert f"counts {min(few):.0f} to {max(few):.0f}% too few" in page
    many = files.read_json(folder / "sha-40-s2024" / "metrics.json")
    too_many = 100 * sum(row["count"] - row["true_count"] for row in many["per_image"]) / sum(
        row["true_count"] for row in many["per_image"])
    assert (f"With 40% XMask has an MAE of {many['counting']['mae']:.1f} "
            f"({many['counting_uncalibrated']['mae']:.1f} at the usual threshold") in page
    assert (f"It counts {too_many:.0f}% too many, and within 8 px its F1 is "
            f"{100 * many['localization']['8']['f1']:.1f}%.") in page
    assert (f"it holds {many['interval']['coverage']:.0%} of the true counts where 90% are wanted, with "
            f"a median width of {many['interval']['median_width']:.0f}") in page
    assert f"With 120 XMask has {many['counting']['mae']:.1f} (one seed)." in " ".join(README.split())


def test_the_schedules_that_the_evidence_names_are_those_of_the_profiles():
    page = " ".join((ROOT / claims.PAGE).read_text("utf-8").split())
    points, own = (sum(phase_of(s, e) != 2 and unlabelled_weight(s, e) > 0 for e in range(315))
                   for s in (config.preset("full", "sha", 10, variant=v).schedule
                             for v in ("points-only", "xmask")))
    assert f"in {points} of 315 epochs; XMask has it in {own}" in page
    assert f"crops in only {own} of 315 epochs" in page
    steps = [config.preset("full", "sha", p).schedule for p in (5, 10, 40)]
    assert "{:,}, {:,} and {:,} steps".format(*(s.phase3 * s.steps_per_epoch for s in steps)) in page
    paper = config.preset("paper", "sha", 10)
    passes = -(-300 // paper.optimisation.batch)  # of 300 training images
    most = config.preset("paper", "sha", 40).schedule.phase3 * passes
    assert f"has {paper.schedule.phase3 * passes:,} steps ({most:,} at 40%)" in page


def test_the_table_of_profiles_is_that_of_the_presets():
    page = (ROOT / profile_table.PAGE).read_text("utf-8")
    assert profile_table.differences_block(ROOT) in page, "run `xmask docs`"


def test_the_numbers_of_the_model_card_are_those_of_its_run():
    card = (ROOT / model_card.CARD).read_text("utf-8")
    assert model_card.card_block(ROOT) in card, "run `xmask docs`"
    assert elsewhere.card_block(ROOT) in card, "run `xmask docs`"


def test_a_changed_table_makes_the_results_of_readme_stale(tmp_path):
    for file in (pages.SUMMARY, pages.README):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    pages.refresh(tmp_path)
    assert (tmp_path / pages.README).read_text(encoding="utf-8") == README  # the date stays
    table = (tmp_path / pages.SUMMARY).read_text(encoding="utf-8")
    old = re.search(r",drawn,1,([\d.]+),", table)[1]
    (tmp_path / pages.SUMMARY).write_text(table.replace(f",{old},", ",123.4,"), encoding="utf-8")
    assert pages.results_block(tmp_path, shown_day()) not in README
    page = pages.refresh(tmp_path)
    assert "| 123.4 |" in page.read_text("utf-8")
    page.write_text(page.read_text("utf-8").replace(", as of ", ", of ", 1), "utf-8")
    pages.refresh(tmp_path)
    assert re.search(r"as of \d{4}-\d{2}-\d{2}", page.read_text("utf-8")), "it was lost"


def test_pages_of_every_function_can_be_built(tmp_path):
    words = re.search(r"^docs:.*?(pdoc .*?)$", MAKEFILE, re.MULTILINE | re.DOTALL)[1]
    words = shlex.split(words.replace("docs/api", str(tmp_path)).replace("xmask ", "xmask.nnec "))
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exclusion_radii" in (tmp_path / "xmask" / "nnec.html").read_text(encoding="utf-8")


SHAPE = r"\((\.\.\.|[A-Zhnb0-9][\w*/]*),|any shape|scalar"
# an implementation says what it does where the protocol is described
PROTOCOLS = {name for name in vars(segmenters.Segmenter) if not name.startswith("_")}


def lacks(one, described=""):
    """What the docstring of a public function, class or method lacks, or ""."""
    text = one.__doc__ or ""
    if not text or text.startswith(f"{one.__name__}("):  # as dataclasses make it
        return "a docstring"
    arrays = [name for name, kind in getattr(one, "__annotations__", {}).items()
              if re.search(r"ndarray|Tensor\b|\bArray\b", str(kind))]
    if inspect.isfunction(one) and arrays and not re.search(SHAPE, text + described):
        return f"the shape of {', '.join(arrays)}"
    return ""


def modules():
    """All modules of the package; of the benchmark only its entrance."""
    names = ["xmask", *(found.name for found in pkgutil.walk_packages(xmask.__path__, "xmask."))]
    return [importlib.import_module(name) for name in names
            if not name.endswith("__main__") and not name.startswith("xmask.bench.")]


def public(module):
    """Name and object of every public function and class that is defined in the module."""
    for name, one in vars(module).items():
        if (not name.startswith("_") and (inspect.isfunction(one) or inspect.isclass(one))
                and one.__module__ == module.__name__):
            yield name, one


PUBLIC = [pytest.param(one, "", id=f"{module.__name__}.{name}")
          for module in modules() for name, one in public(module)]
PUBLIC += [pytest.param(method, owner.values[0].__doc__, id=f"{owner.id}.{name}")
           for owner in list(PUBLIC) if inspect.isclass(owner.values[0])
           for name, method in vars(owner.values[0]).items()
           if inspect.isfunction(method) and method.__name__ == name
           and not name.startswith("_") and name not in PROTOCOLS]


@pytest.mark.parametrize("one, described", PUBLIC)
def test_everything_public_says_what_it_does_and_the_shape_of_its_arrays(one, described):
    assert not lacks(one, described)


def test_a_missing_docstring_or_shape_is_noticed():
    def bare(points): ...
    def vague(points: np.ndarray) -> float:
        """How close the points (x, y) are."""
    def clear(points: np.ndarray) -> float:
        """How close the points (N, 2), px, are."""
    assert [lacks(one) for one in (bare, vague, clear)] == [
        "a docstring", "the shape of points", ""]
