"""Run folders in, pictures out: learning curves, counts, masks (paper: its figures).

Like the tables of `xmask.study.tables`, every figure is a function of run folders: it names its
runs in a line at its foot and in the PNG's Description, holds no date, and comes out the same byte
for byte. Colours are those of `xmask.tools.overlay`; the background is white, also on a dark page.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from xmask import files
from xmask.data.images import read_labels
from xmask.data.sample import Sample
from xmask.study import tables
from xmask.tools.described_figure import DescribedFigure
from xmask.tools.overlay import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, overlay

SERIES = {"supervised-only": ORANGE, "xmask": BLUE}
DISCS = {"supervised-only": "#FCEBCC", "xmask": "#CCE3F0"}  # lighter: discs at the same points
CUT_DISCS = {"supervised-only": "#F3C566", "xmask": "#7AB5D8"}  # between the two
TERMS = {"p2r": BLUE, "exclusivity": VERMILION, "constraint": GREEN, "point_mask": PURPLE}


# Drawn in our style only: a reader's matplotlibrc changes no pixel.
styled = matplotlib.style.context([
    "default", seaborn.axes_style("ticks"), seaborn.plotting_context("paper"),
    {"font.family": "DejaVu Sans", "axes.grid": True, "grid.color": "#E5E5E5",
     "axes.axisbelow": True}])


# Figures from histories and metrics


@styled
def plot_history(history: pd.DataFrame) -> DescribedFigure:
    """Learning curves of one run: the losses, and below their terms on a log axis.

    history: the rows of history.csv, with step, phase, labelled, unlabelled and the terms.
    """
    figure, axes = _grid(2, 1, width=6.4, height=2.0, sharex=True)
    _shade_phases(axes[:, 0], history)
    _draw_history(axes[:, 0], history)
    _dress_history(axes)
    return figure


@styled
def learning_curves(runs: pd.DataFrame, dataset: str) -> DescribedFigure:
    """Loss against training step of the full method on one dataset, one column a percentage.

    Upper row: labelled and unlabelled loss; lower row: the terms of the loss, on a log axis. One
    line a seed, a running mean over 1/50 of a phase; phases are shaded.
    Raises FileNotFoundError if a run has no history.csv, ValueError without a run.
    """
    runs = _some(_full(runs[runs["dataset"] == dataset]), f"no XMask run of {dataset}")
    figure, axes = _grid(2, runs["percent"].nunique(), width=3.6, height=2.2, sharex="col")
    for column, (percent, group) in zip(axes.T, runs.groupby("percent")):
        histories = [_history(Path(path)) for path in group["path"]]
        _shade_phases(column, histories[0])
        for number, history in enumerate(histories):
            _draw_history(column, history, label=number == 0)
        column[0].set_title(f"{percent:g}% labelled")
    _dress_history(axes)
    return _finish(figure, f"{_name(dataset, runs)}: learning curves", runs)


@styled
def count_scatter(runs: pd.DataFrame, dataset: str) -> DescribedFigure:
    """Predicted against true count of every test image, one column a percentage, all seeds.

    Axes are logarithmic above 10 people and linear below (symlog), so that empty images show.
    """
    runs = _some(_full(runs[runs["dataset"] == dataset]), f"no XMask run of {dataset}")
    figure, axes = _grid(1, runs["percent"].nunique(), width=3.0, height=3.0,
                         sharex=True, sharey=True)
    images = {path: pd.DataFrame(files.read_json(Path(path) / "metrics.json")["per_image"])
              for path in runs["path"]}
    top = 1.3 * max(10.0, *(float(image[["true_count", "count"]].to_numpy().max())
                            for image in images.values()))
    for axis, (percent, group) in zip(axes[0], runs.groupby("percent")):
        axis.plot([0, top], [0, top], color=GREY, lw=1.0, zorder=1)
        for path in group["path"]:
            axis.scatter(images[path]["true_count"], images[path]["count"], s=14, alpha=0.6,
                         color=BLUE, edgecolor="white", linewidth=0.3, zorder=2)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_yscale("symlog", linthresh=10)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlim=(-1, top), ylim=(-1, top), xlabel="true count", aspect="equal",
                 title=f"{percent:g}% labelled, MAE {group['mae'].mean():.1f}")
    axes[0, 0].set_ylabel("predicted count")
    return _finish(figure, f"{_name(dataset, runs)}: counts of the test images", runs)


@styled
def mae_versus_percent(runs: pd.DataFrame) -> DescribedFigure:
    """MAE against the percentage of labelled images, one panel a dataset.

    Mean over seeds with its sample standard deviation, beside supervised only and the constant
    count. Published numbers are of real photographs and do not stand here.
    """
    runs = _some(runs[runs["variant"].isin(SERIES)], "no run of XMask or supervised only")
    figure, panels = _percent_panels(runs, "MAE (people)", height=2.7)
    for axis, part, percents in panels:
        place = {percent: index for index, percent in enumerate(percents)}
        constant = part.groupby("percent")["constant_mae"].mean()
        axis.plot([place[percent] for percent in constant.index], constant, color=GREY, ls="--",
                  marker="s", ms=3, label="best constant count")
        for shift, variant in zip((-0.03, 0.03), tables.ordered(part["variant"], SERIES)):
            group = part[part["variant"] == variant].groupby("percent")["mae"]
            axis.errorbar([place[percent] + shift for percent in group.mean().index],
                          group.mean(), yerr=group.std(ddof=1), color=SERIES[variant],
                          marker="o", ms=5, capsize=3, label=tables.VARIANTS[variant])
        axis.set(xlim=(-0.4, len(percents) - 0.6))
        axis.set_ylim(bottom=0)
    _legend(panels[0][0])
    return _finish(figure, "Counting error against labelled images", runs)


@styled
def iou_bars(runs: pd.DataFrame) -> DescribedFigure:
    """Mean IoU (percent) per dataset and percentage beside equal discs at the same points.

    The lightest bars are whole discs, the next ones discs that give a contested pixel to the
    nearest point; each have the one radius that is best on the test images. Bars are means over
    seeds, whiskers sample standard deviations. Raises ValueError if no run has truth masks.
    """
    runs = _some(runs[runs["variant"].isin(SERIES) & runs["mean_iou"].notna()],
                 "no run with a mean IoU (truth masks are needed)")
    bars = [bar for variant in tables.ordered(runs["variant"], tuple(SERIES)) for bar in (
        (variant, "disc_mean_iou", DISCS[variant],
         f"discs, whole, at {tables.VARIANTS[variant]} points"),
        (variant, "exclusive_disc_mean_iou", CUT_DISCS[variant],
         f"discs, cut, at {tables.VARIANTS[variant]} points"),
        (variant, "mean_iou", SERIES[variant], tables.VARIANTS[variant]))]
    width = 0.84 / len(bars)
    figure, panels = _percent_panels(runs, "mean IoU (%)", height=3.0, sharey=True)
    for axis, part, percents in panels:
        for index, (variant, column, colour, label) in enumerate(bars):
            values = 100 * part[part["variant"] == variant].set_index("percent")[column]
            groups = values.groupby(level=0)
            axis.bar(np.arange(len(percents)) + (index - (len(bars) - 1) / 2) * width,
                     groups.mean().reindex(percents), width * 0.94, color=colour, label=label,
                     yerr=groups.std(ddof=1).reindex(percents),
                     error_kw={"capsize": 2, "lw": 1})
    first = panels[0][0]
    first.set_ylim(top=first.get_ylim()[1] * (1.08 + 0.1 * len(bars)))  # for the legend
    _legend(first, loc="upper left", fontsize=7)
    return _finish(
        figure, "Instance segmentation against equal discs, whole and cut where they meet", runs)


@styled
def ablation_bars(runs: pd.DataFrame, dataset: str, percent: float) -> DescribedFigure:
    """MAE and mean IoU of every variant on the seeds it shares with the full method.

    The line is the full method on all its seeds. Raises what `tables.ablation_pairs` raises.
    """
    pairs = tables.ablation_pairs(runs, dataset, percent)
    used = pd.concat([group.reset_index() for group, _ in pairs.values()])
    measures = [("mae", 1, "MAE (people), lower is better")]
    if used["mean_iou"].notna().any():
        measures.append(("mean_iou", 100, "mean IoU (%), higher is better"))
    figure, axes = _grid(1, len(measures), width=3.6, height=0.6 + 0.36 * len(pairs), sharey=True)
    for axis, (column, scale, label) in zip(axes[0], measures):
        for row, (variant, (group, _)) in enumerate(pairs.items()):
            values = scale * group[column].dropna()
            axis.barh(row, values.mean(), 0.72, color=BLUE if variant == "xmask" else SKY,
                      xerr=values.std(ddof=1) if len(values) > 1 else None,
                      error_kw={"capsize": 2, "lw": 1})
            axis.plot(values, np.full(len(values), row), "o", color="black", ms=2.5)
        axis.axvline(scale * pairs["xmask"][0][column].mean(), color=BLUE, lw=1, ls="--")
        axis.set_yticks(range(len(pairs)), [
            f"{tables.VARIANTS.get(variant, variant)} ({len(group)})"
            for variant, (group, _) in pairs.items()])
        axis.set(xlabel=label)
        axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()  # shared by both panels
    title = f"{_name(dataset, used)}, {percent:g}% labelled: ablation (number of seeds)"
    return _finish(figure, title, used)


# Pictures of predictions


def sparse_middle_dense(dataset) -> list[str]:
    """Image names with the fewest, the median and the most people (fewer if there are fewer)."""
    counts = np.asarray(dataset.counts())
    order = np.argsort(counts, kind="stable")
    # an image without people shows nothing: start at the first with some, if any has
    order = order[counts[order] > 0] if (counts > 0).any() else order
    places = [order[0], order[len(order) // 2], order[-1]]
    return [dataset.ids[place] for place in dict.fromkeys(int(place) for place in places)]


@styled
def figure_predictions(dataset, run_folder: str | Path,
                       ids: Sequence[str] | None = None) -> DescribedFigure:
    """Image, truth and prediction side by side, one row an image.

    dataset: test split with `.ids` and `.counts()`; run_folder: one with `predictions/`.
    ids: image names; by default a sparse, a middle and a dense one. Where the dataset has no
    truth masks, its head points stand in the middle column.
    Whether a picture of real people may be kept in the repository: see `write_figures`.
    Raises FileNotFoundError without the predicted files, ValueError for an unknown image name or
    a prediction of another size.
    """
    run_folder = Path(run_folder)
    rows = []
    for name in _known(dataset, ids):
        sample, truth, predicted, heads = painted(dataset, run_folder, name)
        rows.append({name: sample.image, _truth_words(sample): truth,
                     f"predicted: {heads} people": predicted})
    run = _identity(run_folder)
    title = f"{_name(run['dataset'][0], run)}, {run['percent'][0]:g}% labelled"
    return _finish(_pictures(rows), f"{title}: predicted instances", run)


@styled
def figure_by_percent(dataset, run_folders: Sequence[str | Path],
                      ids: Sequence[str] | None = None) -> DescribedFigure:
    """The truth and what runs of several percentages predict side by side, one row an image.

    run_folders: of one dataset, with `predictions/`, in the order of the columns. The rest is as
    of `figure_predictions`.
    """
    runs = pd.concat([_identity(folder) for folder in run_folders], ignore_index=True)
    rows = []
    for name in _known(dataset, ids):
        row = {}
        for folder, percent in zip(run_folders, runs["percent"]):
            sample, truth, predicted, heads = painted(dataset, folder, name)
            row |= {f"{name}, {_truth_words(sample)}": truth,
                    f"{percent:g}% labelled: {heads} people": predicted}
        rows.append(row)
    return _finish(_pictures(rows), f"{_name(runs['dataset'][0], runs)}: predicted instances by "
                   "labelled images", runs)


def _known(dataset, ids: Sequence[str] | None) -> list[str]:
    ids = list(sparse_middle_dense(dataset) if ids is None else ids)
    if unknown := sorted(set(ids) - set(dataset.ids)):
        raise ValueError(f"no test image named {', '.join(unknown)}; names look like "
                         f"{', '.join(dataset.ids[:3])}")
    return ids


def _truth_words(sample: Sample) -> str:
    words = "truth" if sample.instances is not None else "true heads (no truth masks)"
    return f"{words}: {len(sample.points)} people"


def _identity(run_folder: str | Path) -> pd.DataFrame:
    config = files.read_json(Path(run_folder) / "config.json")
    return pd.DataFrame([{"run": Path(run_folder).name} | {name: config[name] for name in (
        "profile", "dataset", "percent", "synthetic", "selection")}])


def _pictures(rows: list[dict[str, np.ndarray]]) -> DescribedFigure:
    """Rows of pictures (H, W, 3) by their titles, those of a row of one size."""
    sizes = [next(iter(row.values())).shape for row in rows]
    heights = [3.0 * size[0] / size[1] for size in sizes]
    columns = len(rows[0])
    figure = DescribedFigure((3.0 * columns + 0.2, sum(heights) + 0.28 * len(rows) + 0.75))
    axes = figure.subplots(len(rows), columns, squeeze=False,
                           gridspec_kw={"height_ratios": heights})
    for row, line in zip(rows, axes):
        for axis, (text, picture) in zip(line, row.items()):
            axis.imshow(picture, interpolation="antialiased")
            axis.set_title(text)
            axis.set_axis_off()
    return figure


def painted(dataset, run_folder: str | Path, name: str
            ) -> tuple[Sample, np.ndarray, np.ndarray, int]:
    """A test image by its name: its sample, two pictures (H, W, 3) uint8, of the truth and of the
    prediction painted over it, and how many heads were predicted.

    Masks are those of all predicted points, as they are measured; dots are the counted heads.
    Raises FileNotFoundError without the predicted files, ValueError if they are of another size
    than the image or do not say which points are counted.
    """
    sample = dataset[list(dataset.ids).index(name)]
    labels, heads = _read_prediction(Path(run_folder), name, sample.image.shape[:2])
    truth = np.zeros_like(labels) if sample.instances is None else sample.instances
    return (sample, overlay(sample.image, truth, sample.points),
            overlay(sample.image, labels, heads), len(heads))


def _read_prediction(run_folder: Path, name: str, shape: tuple[int, int]
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Label map (H, W) int32 and counted heads (N, 2) float32 of an image of this shape."""
    path = run_folder / "predictions" / f"{name}.png"
    for file in (path, path.with_suffix(".csv")):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no prediction of this image. Predictions are not "
                                    "committed: evaluate the run again (`xmask evaluate`).")
    label_map = read_labels(path)
    if label_map.shape != shape:
        raise ValueError(f"{path}: {label_map.shape} pixels, but the image has {shape}: the data "
                         "changed since. Evaluate the run again (`xmask evaluate`).")
    points = pd.read_csv(path.with_suffix(".csv"))
    if "counted" not in points:
        raise ValueError(f"{path.with_suffix('.csv')}: no column 'counted', so nothing says which "
                         "points are heads. Evaluate the run again (`xmask evaluate`).")
    return label_map, points.loc[points["counted"] == 1, ["x", "y"]].to_numpy(np.float32)


# Writing


def write_figures(results: str | Path, out: str | Path,
                  datasets: Callable[[str], object] | None = None,
                  only: Sequence[str] = ()) -> list[Path]:
    """Write every figure of `results/<profile>` as PNG into `out`; list the files.

    datasets: gives the test split of a run by its folder, or None where it is not at hand; without
    it no predictions are drawn. only: names of the runs to read; empty for all. Runs of selection
    `best-on-test` get figures of their own, and so do real runs beside drawn ones: neither
    shares a figure with the others.

    `out` belongs to the repository, so only drawn crowds are pictured there: photographs of
    people belong to their datasets, whose terms rarely allow copies, and the people in them were
    not asked. Pictures of a dataset that is not drawn therefore go to
    `<run folder>/pictures/`, which Git ignores. Plots of an earlier call that these runs no
    longer support are removed.
    """
    runs, out = tables.load_runs(results, only), Path(out)
    with files.OutputFolder(out, cloned=True, wait=tables.PATIENCE) as folder:
        paths = list(_write_all(runs, out, datasets))
        tables.remove_others(folder, r"(learning_.+|counts_.+|percents_.+|mae_versus_percent|"
                                     r"mean_iou|ablation_.+)\.png", paths)
    return paths


def _write_all(runs: pd.DataFrame, out: Path,
               datasets: Callable[[str], object] | None) -> Iterator[Path]:
    both = runs["synthetic"].nunique() > 1
    for selection in tables.SELECTIONS:
        for synthetic in (True, False):
            part = runs[(runs["selection"] == selection) & (runs["synthetic"] == synthetic)]
            ending = ("_real" if both and not synthetic else "") + (
                "" if selection == "last" else f"_{selection}") + ".png"
            for name, figure in _figures_of(part):
                yield figure.write(out / f"{name}{ending}")
            if datasets is not None:
                yield from _write_predictions(part, out, ending, datasets)


def _figures_of(runs: pd.DataFrame) -> Iterator[tuple[str, DescribedFigure]]:
    """(name, figure) of every plot that runs of one selection and kind give."""
    for dataset in tables.ordered(_full(runs)["dataset"], tables.DATASETS):
        yield f"learning_{dataset}", learning_curves(runs, dataset)
        yield f"counts_{dataset}", count_scatter(runs, dataset)
    compared = runs[runs["variant"].isin(SERIES)]
    if len(compared):
        yield "mae_versus_percent", mae_versus_percent(runs)
    if compared["mean_iou"].notna().any():
        yield "mean_iou", iou_bars(runs)
    for dataset, percent in tables.ablations(runs):
        yield f"ablation_{dataset}-{percent:g}", ablation_bars(runs, dataset, percent)


def _full(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the full method; in a study of changed settings only, those instead."""
    full = runs[runs["variant"] == "xmask"]
    return full if len(full) else runs[~runs["variant"].isin(tables.VARIANTS)]


def pictured(runs: pd.DataFrame) -> pd.DataFrame:
    """The run of each dataset that pictures show: of the full method at its largest percentage,
    the first seed."""
    order = _full(runs).sort_values(["percent", "seed"], ascending=[False, True], kind="stable")
    return order.drop_duplicates(["dataset", "synthetic"]).sort_index()


def _write_predictions(runs: pd.DataFrame, out: Path, ending: str,
                       datasets: Callable[[str], object]) -> list[Path]:
    paths, full = [], _full(runs).sort_values("percent")
    for run in pictured(runs).itertuples():
        split = datasets(run.path)
        if split is None:
            continue
        if not (Path(run.path) / "predictions").is_dir():
            warnings.warn(f"{run.path}/predictions: not there (they are not committed), so no "
                          "predictions are drawn. Evaluate the run again (`xmask evaluate`).",
                          stacklevel=3)
            continue
        if bool(split.synthetic) != bool(run.synthetic):
            raise ValueError(f"{run.run} was measured on {tables.kind_of(run.synthetic)} images, "
                             f"but the {run.dataset} test set at hand is "
                             f"{tables.kind_of(split.synthetic)}. Give the data of the run.")
        folder = out if split.synthetic else Path(run.path) / "pictures"
        figure = figure_predictions(split, run.path)
        paths.append(figure.write(folder / f"predictions_{run.dataset}{ending}"))
        alike = full[(full["dataset"] == run.dataset) & (full["seed"] == run.seed)]
        others = [path for path in alike["path"] if (Path(path) / "predictions").is_dir()]
        if len(others) > 1:
            figure = figure_by_percent(split, others)
            paths.append(figure.write(folder / f"percents_{run.dataset}{ending}"))
    return paths


# Shared parts


def _some(runs: pd.DataFrame, complaint: str) -> pd.DataFrame:
    if runs.empty:
        raise ValueError(f"{complaint}: nothing to draw. Train and evaluate one, or name another "
                         "dataset.")
    if runs["selection"].nunique() > 1 or runs["synthetic"].nunique() > 1:
        raise ValueError("runs of several selections, or real and drawn runs, in one figure: "
                         "filter `selection` and `synthetic` first.")
    return runs


def _grid(rows: int, columns: int, *, width: float, height: float, **options
          ) -> tuple[DescribedFigure, np.ndarray]:
    figure = DescribedFigure((max(width * columns, 4.6) + 0.3, height * rows + 0.9))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _percent_panels(runs: pd.DataFrame, label: str, **options
                    ) -> tuple[DescribedFigure, list[tuple[Axes, pd.DataFrame, list[float]]]]:
    """A figure with one panel a dataset: (axis, its runs, its percentages from the left)."""
    datasets = tables.ordered(runs["dataset"], tables.DATASETS)
    figure, axes = _grid(1, len(datasets), width=3.0, **options)
    axes[0, 0].set_ylabel(label)
    panels = []
    for axis, dataset in zip(axes[0], datasets):
        part = runs[runs["dataset"] == dataset]
        percents = sorted(part["percent"].unique())
        axis.set_xticks(range(len(percents)), [f"{percent:g}" for percent in percents])
        axis.set(xlabel="labelled images (%)", title=_name(dataset, runs))
        axis.grid(axis="x", visible=False)
        panels.append((axis, part, percents))
    return figure, panels


def _legend(axis: Axes, **options) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=True, framealpha=0.9, edgecolor="none", **options)


def _name(dataset: str, runs: pd.DataFrame) -> str:
    name = tables.title(dataset, runs["synthetic"].iloc[0])
    return name[0].upper() + name[1:]


def _finish(figure: DescribedFigure, title: str, runs: pd.DataFrame) -> DescribedFigure:
    """Title above, provenance below: the kind of images, profile, selection, runs."""
    first = runs.iloc[0]
    head = (f"{tables.crowds_of(runs['synthetic'])}, profile {first['profile']}, "
            f"selection {first['selection']}, runs: ")
    names = list(dict.fromkeys(runs["run"]))
    shown = names if len(names) <= 6 else [*names[:5], f"... and {len(names) - 5} more"]
    width = int(figure.get_figwidth() * 17)  # characters of 6-point text on the line
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(
        head + ", ".join(shown), width, break_on_hyphens=False)), fontsize=6,
                     color="#555555", ha="left", x=0.01)
    figure.description = f"{title}. {head}{', '.join(names)}"
    return figure


def _history(run: Path) -> pd.DataFrame:
    file = run / "history.csv"
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing, so there is no learning curve. Restore it, or "
                                "train the run again.")
    needed = ["step", "phase", "labelled", "unlabelled", *TERMS]
    try:
        history = pd.read_csv(file)
        missing = sorted(set(needed) - set(history))
        if missing:
            raise ValueError(f"columns {', '.join(missing)} are missing")
        history[needed].astype(float)  # numbers, or it says what is none
        return history
    except ValueError as error:  # pandas' own errors, too
        raise ValueError(f"{file}: {error}. Train the run again.") from None


def _draw_history(axes: Sequence[Axes], history: pd.DataFrame, *, label: bool = True) -> None:
    """The losses on the upper and their terms on the lower axis; values of 0 are left out."""
    for axis, lines in zip(axes, ({"labelled": BLUE, "unlabelled": ORANGE}, TERMS)):
        for name, colour in lines.items():
            values = _smooth(history, name)
            if (values > 0).any():
                axis.plot(history["step"], values.where(values > 0), color=colour, lw=1.0,
                          alpha=0.85, label=name if label else None)


def _dress_history(axes: np.ndarray) -> None:
    for upper, lower in axes.T:
        lower.set(yscale="log", xlabel="training step")
        lower.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_locator(NullLocator())
        for axis in (upper, lower):
            axis.grid(axis="x", visible=False)
            _legend(axis, fontsize=7)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("terms of the loss")


def _smooth(history: pd.DataFrame, name: str) -> pd.Series:
    """Running mean over 1/50 of each phase: it calms the line and never crosses a phase."""
    return history.groupby("phase", sort=False)[name].transform(
        lambda values: values.rolling(max(len(values) // 50, 1), min_periods=1, center=True).mean())


def _shade_phases(axes: Sequence[Axes], history: pd.DataFrame) -> None:
    spans = history.groupby("phase", sort=False)["step"].agg(["min", "max"])
    ends = [*spans["min"].iloc[1:], spans["max"].iloc[-1]]
    for index, (phase, start, end) in enumerate(zip(spans.index, spans["min"], ends)):
        for axis in axes:
            axis.axvspan(start, end, color=("#FFFFFF", "#F2F2F2")[index % 2], lw=0, zorder=0)
        wide = end - start > 0.15 * (ends[-1] - spans["min"].iloc[0])  # room for the word
        axes[0].text((start + end) / 2, 0.98, f"phase {phase}" if wide else f"{phase}",
                     fontsize=7, color="#555555", ha="center", va="top",
                     transform=axes[0].get_xaxis_transform())
