"""A profile's results as one HTML page to share: tables, figures, every image, where from.

The page is one file that asks nothing of the network: pictures, style and script stand in it, and
its own security policy forbids anything else. Like tables and figures it is a function of run
folders, with no date in it. Of real photographs it shows numbers and plots, and pictures only
when they are asked for, because the page is meant to be sent to others. How it looks is in `page/`:
a Jinja2 template, its style and its script.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from xmask import files
from xmask.study import figures, tables
from xmask.study.runs import UNKNOWN, VARIANTS, by_dotted_name

MOST_PICTURES = 48  #: images of one run that are pictured: those with the largest error
_WIDE = 440  # px of one picture in the browser of images; truth and prediction stand side by side
_OURS = "(ours)"  # how a method of ours ends in the tables
_EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
#: What a figure shows, by the beginning of its file name: the text for those who do not see it.
_PREDICTED = {
    "predictions": "Three test images in rows: the image, its true instances, the predicted ones",
    "percents": "Test images in rows: the image, its true instances, those predicted with each "
                "percentage of labelled images",
}
_SHOWS = {
    "learning": "Learning curves: losses and their terms against the training step, one column "
                "for each percentage of labelled images",
    "counts": "Scatter plot: predicted against true count of every test image, with the diagonal, "
              "one panel for each percentage",
    "mae_versus_percent": "Line plot: mean absolute counting error against the percentage of "
                          "labelled images, beside the best constant count",
    "mean_iou": "Bar chart: mean IoU of predicted instances beside discs at the same points",
    "ablation": "Bar chart: counting error and mean IoU of every variant beside the full method",
    **_PREDICTED,
}
#: Columns of the table of images, and which way each is sorted first.
_IMAGE_COLUMNS = {"image": "ascending", "true count": "descending", "predicted": "descending",
                  "error": "descending", "|error|": "descending", "mean IoU": "ascending"}


def write_report(results: str | Path, out: str | Path, *,
                 figures_folder: str | Path | None = None,
                 datasets: Callable[[str], Any] | None = None,
                 pictures: bool = False) -> Path:
    """Write the page of `results/<profile>` to the file `out` and return its path.

    figures_folder: where `xmask figures` has put pictures of drawn crowds (`predictions_*.png`).
    datasets: gives the test split of a run by its folder, or None; asked only for runs whose
    predictions are on disk. pictures: also pictures of real photographs.
    Raises what `tables.load_runs` raises.
    """
    runs = tables.load_runs(results)
    splits = _splits_to_picture(runs, datasets, pictures)
    shown = [_run(run, splits.get(run.run)) for run in runs.itertuples()]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xmask.study", "page"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["sorting_value"] = _sorting_value
    page = environment.get_template("report.html").render(
        title=f"XMask, profile {runs['profile'].iloc[0]}: results",
        crowds=tables.crowds_of(runs["synthetic"]), drawn=runs["synthetic"].all(),
        any_drawn=runs["synthetic"].any(), skipped=runs.attrs.get("skipped"),
        tables=_tables(runs), figures=_figures(Path(results), runs, figures_folder, pictures),
        runs=sorted(shown, key=lambda run: not run["pictured"]), runs_by_name=shown,
        pictured=bool(splits), pictures=pictures, most_pictures=MOST_PICTURES,
        image_columns=_IMAGE_COLUMNS, unknown=UNKNOWN, empty=_EMPTY) + "\n"
    usual = Path(out) == Path(results) / "report.html"  # there, a page that was edited is set aside
    with files.OutputFolder(results, cloned=True) if usual else nullcontext():
        files.write_text(out, page)
    return Path(out)


def _sorting_value(text: str) -> str | None:
    """The number by which a cell is sorted; "" for an unknown one, None if the cell is a text."""
    if text == UNKNOWN:
        return ""
    try:
        return f"{float(text.split(' ')[0]):g}"
    except ValueError:
        return None


def _tables(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """All tables as the page shows them, the summary first."""
    made = []
    for table in sorted(tables.all_tables(runs), key=lambda t: not t.name.startswith("summary")):
        columns = [name for name in table.text.columns if name != "runs"]
        texts = list(table.text[columns].itertuples(index=False))
        ours = [any(value.endswith(_OURS) for value in text) for text in texts]
        made.append({
            "name": table.name, "heading": table.name.replace("_", " ").capitalize(),
            "caption": table.caption, "columns": [*columns, "runs"],
            "rows": [{"cells": text, "runs": names.split(), "stands_out": mine and not all(ours)}
                     for text, names, mine in zip(texts, table.numbers["runs"], ours)]})
    return made


# Figures


def _figures(results: Path, runs: pd.DataFrame, folder: str | Path | None, pictures: bool
             ) -> list[dict[str, Any]]:
    """Plots drawn anew from the run folders; pictures of predictions as `xmask figures` left
    them."""
    with tempfile.TemporaryDirectory() as temporary:
        made = [_figure(path) for path in figures.write_figures(results, temporary)]
    places = [Path(folder)] if folder else []
    if pictures:
        places += [Path(run, "pictures") for run in runs.loc[~runs["synthetic"], "path"]]
    drawn = [path for place in places for start in _PREDICTED
             for path in sorted(place.glob(f"{start}_*.png"))]
    return made + [_figure(path, photo=True) for path in drawn]


def _figure(path: Path, photo: bool = False) -> dict[str, Any]:
    shows = next(text for start, text in _SHOWS.items() if path.name.startswith(start))
    with Image.open(path) as image:
        caption = image.text["Description"]
        size = image.size
        # photographs and drawings are several times smaller as JPEG
        source = _jpeg(image.convert("RGB")) if photo else _data("png", path.read_bytes())
    return {"source": source, "width": size[0], "height": size[1], "caption": caption,
            "alt": f"{shows}. {caption.split('. ')[0]}."}


def _jpeg(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80, optimize=True)
    return _data("jpeg", stream.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Every image and every run


def _splits_to_picture(runs: pd.DataFrame, datasets: Callable[[str], Any] | None,
                       pictures: bool) -> dict[str, Any]:
    """{run: test split}: of each dataset the run that the figures show, if its predictions are on
    disk and its images may be shown."""
    found: dict[str, Any] = {}
    for run in figures.pictured(runs).itertuples():
        wanted = datasets is not None and (run.synthetic or pictures)
        if wanted and (Path(run.path) / "predictions").is_dir():
            split = datasets(run.path)
            if split is not None and bool(split.synthetic) == bool(run.synthetic):
                found[run.run] = split
    real = set(runs.loc[~runs["synthetic"], "run"])
    if pictures and real and not real & set(found):
        warnings.warn("pictures of photographs were asked for, but no run has both its "
                      "predictions on disk and its data at hand (--data): numbers only",
                      stacklevel=3)
    return found


def _run(run: Any, split: Any | None) -> dict[str, Any]:
    """What the page says of a run: its images, the worst first, its facts and its settings."""
    config, metrics = (Path(run.path) / name for name in ("config.json", "metrics.json"))
    content = files.read_json(config)
    settings = _texts(content.pop("config"))
    facts = {"folder": run.path,
             "measured on": f"{run.images} test images, "
                            + tables.crowds_of(pd.Series([run.synthetic])),
             "metrics.json, sha256": files.sha256(metrics),
             "config.json, sha256": files.sha256(config)}
    images = pd.DataFrame(files.read_json(metrics)["per_image"])
    images["error"] = images["count"] - images["true_count"]
    images["size"] = images["error"].abs()
    images = images.sort_values(["size", "name"], ascending=[False, True], kind="stable")
    return {
        "name": run.run, "pictured": split is not None,
        "label": f"{tables.title(run.dataset, run.synthetic)}, {run.percent:g}% labelled, "
                 f"{VARIANTS.get(run.variant, run.variant)}, seed {run.seed}",
        "facts": facts | _texts(content), "settings": settings,
        "images": [_image(image, run, split if place < MOST_PICTURES else None)
                   for place, image in enumerate(images.to_dict("records"))]}


def _image(image: dict[str, Any], run: Any, split: Any | None) -> dict[str, Any]:
    iou = image.get("mean_iou")
    return {"name": image["name"],
            "numbers": [f"{image['true_count']:g}", f"{image['count']:g}", f"{image['error']:+g}",
                        f"{image['size']:g}",
                        UNKNOWN if iou is None or math.isnan(iou) else f"{iou:.3f}"],
            "picture": _picture(split, run, image["name"]) if split is not None else None}


def _picture(split: Any, run: Any, name: str) -> dict[str, Any]:
    """Truth and prediction of an image side by side."""
    sample, *pair, heads = figures.painted(split, run.path, name)
    height = round(_WIDE * sample.image.shape[0] / sample.image.shape[1])
    both = Image.new("RGB", (2 * _WIDE + 6, height), "white")
    for place, half in zip((0, _WIDE + 6), pair):
        both.paste(Image.fromarray(half).resize((_WIDE, height), Image.Resampling.LANCZOS),
                   (place, 0))
    return {"source": _jpeg(both), "width": both.width, "height": both.height,
            "alt": f"{name}: left {len(sample.points)} true heads, right {heads} predicted"}


def _texts(settings: dict) -> dict[str, str]:
    """Nested settings by dotted name, as text."""
    return {name: f"{len(value)}: {', '.join(map(str, value))}" if isinstance(value, list)
            else value if isinstance(value, str) else json.dumps(value)
            for name, value in by_dotted_name(settings).items()}
