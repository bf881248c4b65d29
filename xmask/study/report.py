"""A profile's results as one HTML page to share: tables, figures, every image, where from.

The page is one file that asks nothing of the network: pictures, style and script stand in it, and
its own security policy forbids anything else. Like tables and figures it is a function of run
folders, with no date in it. Of real photographs it shows numbers and plots, and pictures only
when they are asked for, because the page is meant to be sent to others.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from xmask import files
from xmask.study import figures, tables
from xmask.study.runs import DATASETS, UNKNOWN, VARIANTS
from xmask.tools.overlay import overlay

#: Pictures of one run: those with the largest error.
MOST_PICTURES = 48
_WIDE = 440  # px of one picture in the browser of images; truth and prediction stand side by side
_OURS = "(ours)"  # how a method of ours ends in the tables
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
#: What a figure shows, by the beginning of its file name: the text for those who do not see it.
_SHOWS = {
    "learning": "Learning curves: losses and their terms against the training step, one column "
                "for each percentage of labelled images",
    "counts": "Scatter plot: predicted against true count of every test image, with the diagonal, "
              "one panel for each percentage",
    "mae_versus_percent": "Line plot: mean absolute counting error against the percentage of "
                          "labelled images, beside the best constant count",
    "mean_iou": "Bar chart: mean IoU of predicted instances beside discs at the same points",
    "ablation": "Bar chart: counting error and mean IoU of every variant beside the full method",
    "predictions": "Three test images in rows: the image, its true instances, the predicted ones",
}


def write_report(results: str | Path, out: str | Path, *,
                 figures_folder: str | Path | None = None,
                 datasets: Callable[[str], object] | None = None,
                 pictures: bool = False) -> Path:
    """Write the page of `results/<profile>` to the file `out` and return its path.

    figures_folder: where `xmask figures` has put pictures of drawn crowds (`predictions_*.png`).
    datasets: gives the test split of a run by its folder, or None; asked only for runs whose
    predictions are on disk. pictures: also pictures of real photographs.
    Raises what `tables.load_runs` raises.
    """
    results = Path(results)
    runs = tables.load_runs(results)
    shown = _runs_with_pictures(runs, datasets, pictures)
    synthetic = runs["synthetic"]
    kind = ("synthetic (drawn) crowds" if synthetic.all() else "real photographs"
            if not synthetic.any() else "synthetic (drawn) crowds and real photographs")
    profile = runs["profile"].iloc[0]
    title = f"XMask, profile {profile}: results"
    parts = [
        ("tables", "Tables", _tables(runs)),
        ("figures", "Curves and figures", _figures(results, runs, figures_folder, pictures)),
        ("images", "Every test image", _browser(runs, shown, pictures)),
        ("provenance", "Where each number comes from", _provenance(runs)),
    ]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in parts)
    body = "\n".join(f'<section id="{name}">\n<h2>{heading}</h2>\n{content}\n</section>'
                     for name, heading, content in parts)
    skipped = runs.attrs.get("skipped")
    left_out = (f"<p>Not evaluated yet and left out: {escape(', '.join(skipped))}.</p>"
                if skipped else "")
    asset = resources.files("xmask.study").joinpath("page")
    files.write_text(out, f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{asset.joinpath("report.css").read_text(encoding="utf-8")}</style>
<noscript><style>[hidden] {{ display: block !important; }} .choose {{ display: none; }}</style>
</noscript>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="note">Measured on <strong>{kind}</strong>: {_runs_counted(runs)}.
{_warning(runs)}</p>
{left_out}<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<dialog id="large" aria-label="Large picture"><img alt="" src="{_EMPTY}"><p></p>
<button type="button">Close</button></dialog>
<script>
{asset.joinpath("report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
""")
    return Path(out)


_EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def _runs_counted(runs: pd.DataFrame) -> str:
    return f"{len(runs)} run{'s' * (len(runs) > 1)}"


def _warning(runs: pd.DataFrame) -> str:
    if runs["synthetic"].all():
        return ("The numbers show that the method runs and learns; they say nothing about its "
                "accuracy on photographs. Published numbers stand in columns of their own.")
    return "Every table says how its runs were trained; compare only what was made alike."


# Tables


def _tables(runs: pd.DataFrame) -> str:
    """All tables, each folded under its name but the summary, which most readers came for."""
    made = []
    for table in sorted(tables.all_tables(runs), key=lambda t: not t.name.startswith("summary")):
        heading = table.name.replace("_", " ").capitalize()
        columns = [name for name in table.text.columns if name != "runs"]
        head = "".join(_heading(name, "ascending") for name in (*columns, "runs"))
        rows, texts = [], list(table.text[columns].itertuples(index=False))
        ours = [any(value.endswith(_OURS) for value in text) for text in texts]
        for text, names, mine in zip(texts, table.numbers["runs"], ours):
            cells = "".join(_cell(value) for value in text)
            mark = ' class="ours"' if mine and not all(ours) else ""  # stands out from others
            rows.append(f'<tr{mark}>{cells}<td class="runs">{_run_links(names.split())}</td></tr>')
        made.append(f'<details class="table" id="table-{escape(table.name)}"'
                    f'{"" if made else " open"}><summary><h3>{escape(heading)}</h3> '
                    f'<span class="caption">{len(rows)} rows</span></summary>\n'
                    f'<p class="caption">{escape(table.caption)}</p>\n'
                    + _scrolling(heading, head, rows) + "</details>")
    return "\n".join(made)


def _scrolling(label: str, head: str, rows: list[str], kind: str = "") -> str:
    """A wide table scrolls in its own box, also by keyboard; the page never does sideways.
    kind: a second class of the table, for the style."""
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
            f'<table class="{f"sortable {kind}".strip()}"><thead><tr>{head}</tr></thead>\n<tbody>\n'
            + "\n".join(rows) + "\n</tbody></table></div>")


def _heading(text: str, first: str, sorted_now: bool = False) -> str:
    now = f' aria-sort="{first}"' if sorted_now else ""
    return (f'<th scope="col" data-first="{first}"{now}><button type="button">{escape(text)}'
            "</button></th>")


def _cell(text: str) -> str:
    """A cell whose number, if it is one, sorts as a number; an unknown one stands as they do."""
    if text == UNKNOWN:
        return f'<td class="number">{UNKNOWN}</td>'
    try:
        number = float(text.split(" ± ")[0])
    except ValueError:
        return f"<td>{escape(text)}</td>"
    return f'<td class="number" data-v="{number:g}">{escape(text)}</td>'


def _run_links(names: list[str]) -> str:
    return ", ".join(f'<a href="#run-{escape(name)}">{escape(name)}</a>' for name in names) \
        or UNKNOWN


# Figures


def _figures(results: Path, runs: pd.DataFrame, folder: str | Path | None, pictures: bool) -> str:
    """Plots drawn anew from the run folders; pictures of predictions as `xmask figures` left
    them."""
    with tempfile.TemporaryDirectory() as temporary:
        made = [_figure(path) for path in figures.write_figures(results, temporary)]
    drawn = sorted(Path(folder).glob("predictions_*.png")) if folder else []
    made += [_figure(path, photo=True) for path in drawn]
    if pictures:
        made += [_figure(path, photo=True) for run in runs.loc[~runs["synthetic"], "path"]
                 for path in sorted(Path(run, "pictures").glob("*.png"))]
    return "\n".join(made)


def _figure(path: Path, photo: bool = False) -> str:
    shows = next(text for start, text in _SHOWS.items() if path.name.startswith(start))
    with Image.open(path) as image:
        caption = image.text["Description"]
        size = image.size
        if photo:  # photographs and drawings are several times smaller as JPEG
            picture = _jpeg(image.convert("RGB"))
        else:
            picture = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    title = caption.split(". ")[0]
    return (f'<figure><img src="{picture}" width="{size[0]}" height="{size[1]}" '
            f'alt="{escape(f"{shows}. {title}.")}"><figcaption>{escape(caption)}</figcaption>'
            "</figure>")


def _jpeg(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# Every image


def _runs_with_pictures(runs: pd.DataFrame, datasets: Callable[[str], object] | None,
                        pictures: bool) -> dict[str, object]:
    """{run: test split}: of each dataset the run that the figures show, if its predictions are on
    disk and its images may be shown."""
    found: dict[str, object] = {}
    order = runs[runs["variant"] == "xmask"].sort_values(
        ["percent", "seed"], ascending=[False, True], kind="stable")
    for (dataset, synthetic), group in order.groupby(["dataset", "synthetic"], sort=False):
        run = group.iloc[0]
        wanted = datasets is not None and (synthetic or pictures)
        if wanted and (Path(run["path"]) / "predictions").is_dir():
            split = datasets(run["path"])
            if split is not None and bool(split.synthetic) == bool(synthetic):
                found[run["run"]] = split
    real = set(runs.loc[~runs["synthetic"], "run"])
    if pictures and real and not real & set(found):
        warnings.warn("pictures of photographs were asked for, but no run has both its "
                      "predictions on disk and its data at hand (--data): numbers only",
                      stacklevel=3)
    return found


def _browser(runs: pd.DataFrame, shown: dict[str, object], pictures: bool) -> str:
    """One table a run, worst image first; the script shows the chosen one."""
    order = sorted(runs["run"], key=lambda name: name not in shown)  # those with pictures first
    by_name = runs.set_index("run")
    options, blocks = [], []
    for name in order:
        run = by_name.loc[name]
        label = (f"{DATASETS.get(run['dataset'], run['dataset'])}, {run['percent']:g}% labelled, "
                 f"{VARIANTS.get(run['variant'], run['variant'])}, seed {run['seed']} "
                 f"({tables.kind_of(run['synthetic'])})")
        options.append(f'<option value="{escape(name)}">{escape(label)}</option>')
        blocks.append(f'<div data-images-of="{escape(name)}"{" hidden" if shown else ""}>'
                      f'<p class="caption">Run {_run_links([name])}: {escape(label)}</p>\n'
                      + _images(label, run, shown.get(name)) + "</div>")
    note = "Sorted by error; click a heading to sort by it."
    if runs["synthetic"].any() and not shown:
        note += (" There are no pictures, as no run has its predictions on disk here (they are "
                 "not committed); where the runs were made, the same command shows them.")
    if not runs["synthetic"].all() and not pictures:
        note += (" Of real photographs only numbers are shown, because this page is meant to be "
                 "shared.")
    return (f'<p>{note}</p>\n<p class="choose"><label for="run-choice">Run: </label>'
            f'<select id="run-choice">{"".join(options)}</select></p>\n' + "\n".join(blocks))


def _images(label: str, run: pd.Series, split: object | None) -> str:
    images = pd.DataFrame(files.read_json(Path(run["path"]) / "metrics.json")["per_image"])
    images["error"] = images["count"] - images["true_count"]
    images["size"] = images["error"].abs()
    images = images.sort_values(["size", "name"], ascending=[False, True], kind="stable")
    columns = {"image": "ascending", "true count": "descending", "predicted": "descending",
               "error": "descending", "|error|": "descending", "mean IoU": "ascending"}
    head = "".join(_heading(name, first, name == "|error|") for name, first in columns.items())
    if split is not None:
        head += '<th scope="col">truth and prediction</th>'
    rows = []
    for place, image in enumerate(images.itertuples()):
        iou = getattr(image, "mean_iou", None)
        cells = [f"<td>{escape(str(image.name))}</td>",
                 *(_cell(f"{value:g}") for value in (image.true_count, image.count)),
                 _cell(f"{image.error:+g}"), _cell(f"{image.size:g}"),
                 _cell(UNKNOWN if iou is None or math.isnan(iou) else f"{iou:.3f}")]
        if split is not None:
            cells.append(_picture(split, run, image.name) if place < MOST_PICTURES
                         else f"<td>{UNKNOWN}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    more = (f'<p class="caption">Pictures: the {MOST_PICTURES} images with the largest error.</p>'
            if split is not None and len(rows) > MOST_PICTURES else "")
    kind = "pictured" if split is not None else ""
    return _scrolling(f"Images of {label}", head, rows, kind) + more


def _picture(split, run: pd.Series, name: str) -> str:
    """Truth and prediction of an image side by side, as a cell."""
    sample = split[list(split.ids).index(name)]
    labels, points = figures.read_prediction(Path(run["path"]), name, sample.image.shape[:2])
    truth = (sample.instances if sample.instances is not None
             else np.zeros(sample.image.shape[:2], np.int32))
    pair = [overlay(sample.image, truth, sample.points),
            overlay(sample.image, labels, points)]
    height = round(_WIDE * pair[0].shape[0] / pair[0].shape[1])
    both = Image.new("RGB", (2 * _WIDE + 6, height), "white")
    for place, half in zip((0, _WIDE + 6), pair):
        both.paste(Image.fromarray(half).resize((_WIDE, height), Image.Resampling.LANCZOS),
                   (place, 0))
    alt = f"{name}: left {len(sample.points)} true heads, right {len(points)} predicted"
    return (f'<td><button type="button" class="open"><img width="{both.width}" '
            f'height="{both.height}" alt="{escape(alt)}" src="{_jpeg(both)}"></button></td>')


# Provenance


def _provenance(runs: pd.DataFrame) -> str:
    made = ["<p>Every row of a table and every image names its run. A run is a folder that holds "
            "its whole configuration, the versions and the checksum of its data; all of it "
            "stands below.</p>"]
    for run in runs.itertuples():
        config = files.read_json(Path(run.path) / "config.json")
        facts = {"folder": run.path,
                 "measured on": f"{run.images} test images, "
                                + ("synthetic (drawn)" if run.synthetic else "real photographs"),
                 "metrics.json, sha256": files.sha256(Path(run.path) / "metrics.json"),
                 "config.json, sha256": files.sha256(Path(run.path) / "config.json")}
        facts |= _flat({name: value for name, value in config.items() if name != "config"})
        settings = _flat(config["config"])
        made.append(
            f'<details><summary>{escape(run.run)}</summary><div id="run-{escape(run.run)}">'
            f"<h3>{escape(run.run)}</h3>{_facts('Provenance of ' + run.run, facts)}"
            f"<h3>Configuration</h3>{_facts('Configuration of ' + run.run, settings)}"
            "</div></details>")
    return "\n".join(made)


def _facts(label: str, facts: dict[str, object]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(value))}</td></tr>'
                   for name, value in facts.items())
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
            f"<tbody>{rows}</tbody></table></div>")


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    """Nested fields by dotted name."""
    flat: dict[str, object] = {}
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = inner
    return flat


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value))}"
    return json.dumps(value)
