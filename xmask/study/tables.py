"""Run folders in, tables out: no number of a table is typed by anybody (paper: its result tables).

Every table is a function of what `runs.load_runs` returns, and two calls on the same folders
write the same bytes. Four rules keep the tables honest: a number measured on drawn crowds and a
published number of real photographs never share a column, nor a dataset's name; runs whose
checkpoint was chosen on the test set (`best-on-test`) get tables of their own; what is not known
is shown as "—", never guessed; a number that was not read where it was published is marked.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from xmask import files
from xmask.study.runs import DATASETS, SELECTIONS, UNKNOWN, VARIANTS, listing, load_runs, ordered

_log = logging.getLogger("xmask")
PATIENCE = 60.0  # seconds to wait for another process that writes tables or figures
# this order in tables; then sweeps of parameters
MAIN_VARIANTS = ("supervised-only", "supervised-points-only", "points-only", "xmask")
# baselines, called as in `other_masks.methods`
DISCS = {"disc_mean_iou": "equal discs, whole",
         "exclusive_disc_mean_iou": "equal discs, cut where they meet"}
SECONDARY = " (secondary)"  # beside a number that was not read where it was published

# One table, three formats


class Cell(NamedTuple):
    """One number of a table: mean and sample standard deviation as written, and as printed."""

    mean: float
    std: float
    text: str


def measured(values: pd.Series, *, scale: float = 1.0, digits: int = 1,
             signed: bool = False) -> Cell | None:
    """Mean over runs, rounded to `digits`; ± sample standard deviation if there are several.

    None (unknown) if there is no value. Rounding keeps the last bits of floating point, which
    change with the number of threads, out of the tables.
    """
    values = values.dropna() * scale
    if values.empty:
        return None
    mean = _rounded(values.mean(), digits)
    std = _rounded(values.std(ddof=1), digits) if len(values) > 1 else math.nan
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}"
    return Cell(mean, std, text if math.isnan(std) else f"{text} ± {std:.{digits}f}")


def _rounded(value: float, digits: int) -> float:
    """Round twice, so that 0.05 - 1e-15 is treated as 0.05; + 0.0 turns -0.0 into 0.0."""
    return round(round(float(value), 9), digits) + 0.0


@dataclass(frozen=True, repr=False)
class Table:
    """A finished table. `numbers` goes to CSV; `text` is what people read (Markdown, LaTeX)."""

    name: str
    caption: str
    numbers: pd.DataFrame
    text: pd.DataFrame
    runs: tuple[str, ...]

    def csv(self) -> str:
        """The numbers at full precision."""
        return self.numbers.to_csv(index=False, lineterminator="\n")

    def markdown(self) -> str:
        """Caption, text cells as a Markdown table, and the runs."""
        lines = markdown_table([list(self.text), *self.text.values.tolist()])
        return "\n".join([self.caption, "", *lines, "", f"Runs: {', '.join(self.runs)}", ""])

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self.text)} rows of {len(self.runs)} runs>"

    _repr_markdown_ = markdown  # how a notebook shows a table

    def latex(self) -> str:
        """Caption, label and text cells as a LaTeX table; comments name the runs."""
        styled = self.text.style.hide(axis="index").format(_latex).format_index(_latex, axis=1)
        table = styled.to_latex(
            column_format="l" * self.text.shape[1], position_float="centering", hrules=True,
            caption=_latex(self.caption), label=f"tab:{self.name}")
        return "\n".join(["% needs \\usepackage{booktabs}",
                          *(f"% run: {run}" for run in self.runs), table])

    def write(self, out: str | Path) -> list[Path]:
        """Write `<name>.csv`, `.md` and `.tex` into `out`; each appears whole or not at all."""
        written = {Path(out) / f"{self.name}.csv": self.csv(),
                   Path(out) / f"{self.name}.md": self.markdown(),
                   Path(out) / f"{self.name}.tex": self.latex()}
        for path, content in written.items():
            files.write_text(path, content)
        return list(written)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row holds the headings."""
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in ruled]


LATEX = {"\\": r"\textbackslash{}", "—": "---", "±": r"$\pm$", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
         **{character: "\\" + character for character in "&%$#_{}"}}


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _table(name: str, caption: str, rows: list[dict], columns: list[str],
           runs: pd.DataFrame) -> Table:
    """Lay out rows: plain values first, then the Cells named by `columns`, then source and runs.

    Each row: plain values by heading; "cells": {column: Cell or None}; "runs": names; may hold
    "source" (published numbers).
    """
    numbers, texts = [], []
    for row in rows:
        plain = {key: value for key, value in row.items() if key not in ("cells", "runs", "source")}
        number, text = dict(plain), {key: UNKNOWN if value is None or value == "" else str(value)
                                     for key, value in plain.items()}
        for column in columns:
            cell = row["cells"].get(column)
            number[column] = cell.mean if cell else math.nan
            if column.endswith("(ours)"):
                number[f"std of {column}"] = cell.std if cell else math.nan
            text[column] = cell.text if cell else UNKNOWN
        if "source" in row:
            number["source"], text["source"] = row["source"], row["source"] or UNKNOWN
        number["runs"] = " ".join(row["runs"])
        numbers.append(number)
        texts.append(text)
    frame = pd.DataFrame(numbers)
    for heading in ("seeds", "labelled %"):  # whole numbers stay whole beside an unknown
        if heading in frame:
            frame[heading] = pd.to_numeric(frame[heading], errors="coerce").convert_dtypes()
    caption = _caption(caption, runs)
    if any(SECONDARY in text for row in texts for text in row.values()):
        caption += " Secondary: see the source; not checked where it was published."
    skipped = runs.attrs.get("skipped")
    if skipped:
        caption += f" Not evaluated yet and left out: {', '.join(skipped)}."
    suffix = "" if _selection(runs) == "last" else f"_{_selection(runs)}"
    return Table(name + suffix, caption, frame, pd.DataFrame(texts), tuple(runs["run"]))


def _selection(runs: pd.DataFrame) -> str:
    found = runs["selection"].unique()
    if len(found) != 1:
        raise ValueError(f"runs of selections {', '.join(found)} in one table: a checkpoint chosen "
                         "on the test set cannot stand beside one that was not: filter.")
    return found[0]


def _caption(what: str, runs: pd.DataFrame) -> str:
    how = {"last": "the final checkpoint, nothing chosen on test images",
           "best-on-test": "checkpoint chosen by its MAE on the test images"}
    selection = _selection(runs)
    return (f"{what} Profile {runs['profile'].iloc[0]}; "
            f"measured on {crowds_of(runs['synthetic'])}; selection: "
            f"{selection} ({how[selection]}); backbone {listing(runs['backbone'])}, "
            f"initialisation {listing(runs['initialisation'])}; "
            f"segmenter {listing(runs['segmenter'])}. ± is the sample standard deviation over "
            f"seeds. {UNKNOWN}: unknown or not applicable.")


def kind_of(synthetic: bool) -> str:
    """The word for where a number was measured, used in every heading."""
    return "drawn" if synthetic else "real"


def crowds_of(synthetic: pd.Series) -> str:
    """What runs were measured on, in words, from their column `synthetic`."""
    names = {True: "drawn crowds", False: "real photographs"}
    return " and ".join(name for value, name in names.items() if (synthetic == value).any())


def kinds(runs: pd.DataFrame) -> list[str]:
    """The words of `kind_of` that occur in runs, drawn first."""
    return [kind_of(value) for value in (True, False) if (runs["synthetic"] == value).any()]


def main_variants(runs: pd.DataFrame) -> list[str]:
    """Variants of the main tables: all but the ablations (`without-...`)."""
    return ordered([name for name in runs["variant"] if not name.startswith(("with-", "without-"))],
                   MAIN_VARIANTS)


def title(dataset: str, synthetic: bool = False) -> str:
    """The name of a dataset as people write it; drawn crowds only borrow its layout."""
    name = DATASETS.get(dataset, dataset)
    if not synthetic:
        return name
    return "drawn" if dataset == "synthetic" else f"drawn, {name} layout"


# The tables


def read_published() -> pd.DataFrame:
    """The published numbers shipped with the package, every cell as printed (text).

    Columns: method, venue, labelled_percent ("" = not stated), dataset, metric, value, source.
    A source that begins with "secondary" was not checked at the place of publication.
    """
    with resources.files("xmask.study").joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


class Measure(NamedTuple):
    """A column family: heading, column of `load_runs`, factor, decimals, metric in published.csv,
    and whether it is a baseline, of which one number is shown where all runs have the same."""

    heading: str
    column: str
    scale: float = 1.0
    digits: int = 1
    published: str | None = None
    same: bool = False

    def cell(self, group: pd.DataFrame) -> Cell | None:
        """Mean and spread over the runs of a group; None where nothing is known."""
        if self.column not in group:
            return None
        values = group[self.column].dropna()
        if self.same and values.round(9).nunique() == 1:  # the last bits may differ
            values = values[:1]
        return measured(values, scale=self.scale, digits=self.digits)


MAE, RMSE = Measure("MAE", "mae", published="mae"), Measure("RMSE", "rmse", published="rmse")
IOU = Measure("mean IoU %", "mean_iou", 100.0, published="mean_iou")


def distances(runs: pd.DataFrame) -> list[str]:
    """The matching distances (px) at which heads were evaluated, the shortest first."""
    return sorted((name.split("_")[1] for name in runs if name.startswith("f1_")), key=float)


def _f1(runs: pd.DataFrame) -> list[Measure]:
    return [Measure(f"F1 % at {px} px", f"f1_{px}", 100.0) for px in distances(runs)]


def counting_table(runs: pd.DataFrame) -> Table:
    """MAE and RMSE (people) per dataset, percentage and method, ours beside the published."""
    caption = ("Counting on the test images: mean absolute error (MAE) and root mean square error "
               "(RMSE, called MSE in this field), in people; beside them F1 of heads found within "
               "a distance, since a right count of wrong places is worth little. "
               "The constant count is the one number for all images that has the lowest MAE: it "
               "knows the test counts and sees no image. Published "
               "numbers are of real photographs, as printed in their sources, with unknown "
               "resizing; the authors' XMask release chooses its checkpoint by test MAE.")
    constant = [Measure("MAE", "constant_mae", same=True),
                Measure("RMSE", "constant_rmse", same=True)]
    return _comparison("counting", caption, runs, [MAE, RMSE, *_f1(runs)],
                       {"constant count": constant})


def segmentation_table(runs: pd.DataFrame) -> Table:
    """Mean IoU, AP50, PQ and AJI in percent, ours beside the published mean IoU."""
    caption = ("Instance segmentation on the test images, in percent. Mean IoU: sum of the IoUs of "
               "the one-to-one matching of predicted to true instances, over the number of true "
               f"instances. {_DISCS_EXPLAINED} Published numbers are of real photographs, as "
               "printed in their sources.")
    measures = [IOU, *(Measure(f"{name} %", name.lower(), 100.0) for name in ("AP50", "PQ", "AJI"))]
    return _comparison("segmentation", caption, runs, measures, {
        f"{discs}, at the points of {{}}":
            [Measure("mean IoU %", column, 100.0, same=True)] for column, discs in DISCS.items()})


_DISCS_EXPLAINED = (
    "Equal discs, whole: at the points that the same runs predicted, where they may overlap; "
    "equal discs, cut where they meet: a contested pixel goes to the nearest point (the stricter "
    "baseline where heads touch); each of the radius that is best on the test images.")


def localisation_table(runs: pd.DataFrame) -> Table:
    """Precision, recall and F1 in percent, for every matching distance that was evaluated."""
    caption = ("Localisation on the test images, in percent: predicted and true heads matched one "
               "to one within the given distance in pixels. No published number was read.")
    return _comparison("localisation", caption, runs, [
        Measure(f"{label} % at {px} px", f"{label.lower()}_{px}", 100.0)
        for px in distances(runs) for label in ("precision", "recall", "F1")], {})


def _headings(measures: Sequence[Measure], kind: str, what: str = "") -> list[str]:
    return [f"{measure.heading}{what}, {kind} (ours)" for measure in measures]


def _cells(measures: Sequence[Measure], group: pd.DataFrame, kind: str) -> dict[str, Cell | None]:
    return dict(zip(_headings(measures, kind), (one.cell(group) for one in measures)))


def _comparison(name: str, caption: str, runs: pd.DataFrame, measures: list[Measure],
                baselines: dict[str, list[Measure]]) -> Table:
    """Rows of dataset × percentage × method: published, baselines, supervised only, XMask.

    baselines: measures by name; "{}" in the name stands for a variant, which then has its own row.
    """
    theirs = {one.published: f"{one.heading}, real (published)"
              for one in measures if one.published}
    columns = [heading for kind in kinds(runs) for heading in _headings(measures, kind)]
    rows: list[dict] = []
    for dataset in ordered(runs["dataset"], DATASETS):
        here = runs[runs["dataset"] == dataset]
        published = _published_rows(dataset, here["percent"], theirs) if theirs else []
        percents = {row["labelled %"] for row in published} | {f"{p:g}" for p in here["percent"]}
        for percent in [*sorted(percents - {"unknown"}, key=float), "unknown"]:
            rows += [row for row in published if row["labelled %"] == percent]
            for kind in kinds(here):
                part = here[(here["percent"].map("{:g}".format) == percent)
                            & (here["synthetic"].map(kind_of) == kind)]
                variants = {VARIANTS.get(name, name): part[part["variant"] == name]
                            for name in main_variants(part)}
                # a method of points only has no masks to compare; on photographs nobody has
                variants = {name: group for name, group in variants.items()
                            if any(one.cell(group) for one in measures)} or variants
                for baseline, of in baselines.items():
                    groups = variants if "{}" in baseline else {"": part} if len(part) else {}
                    rows += [_row(group, f"{baseline.format(variant)} (baseline)", None, of)
                             for variant, group in groups.items()]
                rows += [_row(group, f"{variant} (ours)", group["seed"].nunique(), measures)
                         for variant, group in variants.items()]
    if any(not row["runs"] for row in rows):
        columns += theirs.values()
    else:  # nothing published stands here
        rows = [{key: row[key] for key in row if key not in ("venue", "source")} for row in rows]
    return _table(name, caption, rows, columns, runs)


def _row(group: pd.DataFrame, method: str, seeds: int | None, measures: list[Measure]) -> dict:
    first = group.iloc[0]
    kind = kind_of(first["synthetic"])
    return {"dataset": title(first["dataset"], first["synthetic"]),
            "labelled %": f"{first['percent']:g}", "method": method, "venue": "", "images": kind,
            "longer side": listing(group["longer_side"]), "seeds": seeds,
            "cells": _cells(measures, group, kind), "source": "", "runs": list(group["run"])}


def _published_rows(dataset: str, percents: pd.Series, columns: dict[str, str]) -> list[dict]:
    """One row per published percentage and method of a dataset, verbatim.

    XMask has a row at every percentage, published or ours: if its number could not be read, the
    row shows that it is unknown. Drawn crowds of no published dataset have no published rows.
    """
    if dataset == "synthetic":
        return []
    table = read_published()
    table = table[table["dataset"] == dataset]
    wanted = {*table["labelled_percent"], *(f"{value:g}" for value in percents)} - {""}
    ours = pd.DataFrame({"labelled_percent": sorted(wanted), "method": "XMask", "venue": "ECCV'26"})
    lines = pd.concat([table[table["metric"].isin(list(columns))], ours])
    rows = []
    for (percent, method), group in lines.groupby(["labelled_percent", "method"], sort=False):
        known = group.dropna()
        rows.append({
            "dataset": title(dataset), "labelled %": percent or "unknown",
            "method": f"{method} (published)", "venue": group["venue"].iloc[0], "images": "real",
            "longer side": "", "seeds": None, "runs": [],
            "source": "; ".join(known["source"].unique()),
            "cells": {columns[line.metric]: _as_printed(line) for line in known.itertuples()}})
    return rows


def _as_printed(line: Any) -> Cell:
    mark = SECONDARY if line.source.startswith("secondary") else ""
    return Cell(float(line.value), math.nan, line.value + mark)


def summary_table(runs: pd.DataFrame) -> Table:
    """Our numbers as ratios to the baselines, per dataset and percentage, and their mean: MAE by
    that of the best constant count, mean IoU by that of equal discs, whole and cut."""
    order = main_variants(runs)
    runs = runs[runs["variant"].isin(order)].assign(
        mae_ratio=(runs["mae"] / runs["constant_mae"]).where(runs["constant_mae"] > 0),
        **{f"{column}_ratio": (runs["mean_iou"] / runs[column]).where(runs[column] > 0)
           for column in DISCS})
    ratios = [Measure("MAE / constant count", "mae_ratio", digits=3),
              *(Measure(f"mean IoU / {discs}", f"{column}_ratio", digits=3)
                for column, discs in DISCS.items())]
    measures = [MAE, Measure("constant-count MAE", "constant_mae", same=True), ratios[0], RMSE,
                Measure("constant-count RMSE", "constant_rmse", same=True), *_f1(runs), IOU,
                *(Measure(f"mean IoU % of {discs}", column, 100.0)
                  for column, discs in DISCS.items()), *ratios[1:]]
    rows = []
    for (_, _, variant), group in sorted(
            runs.groupby(["synthetic", "percent", "variant"], sort=False),
            key=lambda item: (not item[0][0], item[0][1], order.index(item[0][2]))):
        parts = [(group[group["dataset"] == dataset], measures)
                 for dataset in ordered(group["dataset"], DATASETS)]
        if len(parts) > 1:  # the spread between datasets is no spread between seeds
            means = pd.DataFrame([group.groupby("dataset")[[one.column for one in ratios]].mean()
                                  .mean()])
            parts.append((group, []))
        for part, shown in parts:
            row = _row(part, f"{VARIANTS.get(variant, variant)} (ours)", part["seed"].nunique(),
                       shown)
            if not shown:
                row["dataset"] = f"mean of {len(parts) - 1} datasets"
                row["cells"] = _cells(ratios, means, row["images"])
            rows.append({name: row[name] for name in row
                         if name not in ("venue", "longer side", "source")})
    caption = ("Summary: our numbers against the baselines. MAE / constant count: below 1 beats "
               "the best single number for all images. Mean IoU / discs: above 1 beats discs. "
               f"{_DISCS_EXPLAINED} The mean over datasets is of the ratios.")
    columns = [heading for kind in kinds(runs) for heading in _headings(measures, kind)]
    return _table("summary", caption, rows, columns, runs)


def ablation_pairs(runs: pd.DataFrame, dataset: str, percent: float) -> dict[str, tuple]:
    """{variant: (its runs, the full runs of the same seeds)}, the full method first.

    Both frames are indexed by seed. A variant that shares no seed with the full method keeps its
    own runs, and its second frame is empty. Raises ValueError if there is no full run, no variant,
    or a mixture of selections or of drawn and real runs.
    """
    part = runs[(runs["dataset"] == dataset) & (runs["percent"] == percent)]
    if "xmask" not in set(part["variant"]) or part["variant"].nunique() < 2:
        raise ValueError(
            f"ablation of {dataset} at {percent:g}%: needs runs of variant 'xmask' and of at least "
            f"one other, found {listing(part['variant']) or 'none'}. Train one with a variant: "
            f"{', '.join(name for name in VARIANTS if name != 'xmask')}.")
    if part["synthetic"].nunique() > 1:
        raise ValueError(f"ablation of {dataset} at {percent:g}%: drawn and real runs cannot "
                         "be compared. Filter `synthetic`.")
    _selection(part)
    full = part[part["variant"] == "xmask"].set_index("seed").sort_index()
    pairs = {}
    for variant in ordered(part["variant"], VARIANTS):
        group = part[part["variant"] == variant].set_index("seed").sort_index()
        shared = group.index.intersection(full.index)
        pairs[variant] = (group.loc[shared] if len(shared) else group, full.loc[shared])
    return pairs


def ablation_table(runs: pd.DataFrame, dataset: str, percent: float) -> Table:
    """Every variant against the full method on the same seeds: numbers and paired differences.
    Raises what `ablation_pairs` raises."""
    pairs = ablation_pairs(runs, dataset, percent)
    synthetic = bool(pairs["xmask"][0]["synthetic"].iloc[0])
    kind, measures = kind_of(synthetic), [MAE, RMSE, *_f1(runs), IOU]
    rows = []
    for variant, (group, full) in pairs.items():
        cells = _cells(measures, group, kind)
        if variant != "xmask" and len(full):
            cells |= {heading: measured(group[one.column] - full[one.column], scale=one.scale,
                                        signed=True)
                      for heading, one in zip(_headings(measures, kind, " difference"), measures)}
        rows.append({"variant": VARIANTS.get(variant, variant), "seeds": len(group),
                     "cells": cells, "runs": list(group["run"])})
    used = runs[runs["run"].isin({run for row in rows for run in row["runs"]})]
    caption = (f"Ablation, {title(dataset, synthetic)}, {percent:g}% labelled. Difference: the "
               "variant minus the full XMask of the same seeds; a lower MAE and RMSE and a higher "
               "F1 and mean IoU are better.")
    if min(row["seeds"] for row in rows) < 2:
        caption += (" With one seed, a difference is not evidence: it may be the luck of that "
                    "seed.")
    columns = [*_headings(measures, kind), *_headings(measures, kind, " difference")]
    return _table(f"ablation_{dataset}-{percent:g}", caption, rows, columns, used)


def ablations(runs: pd.DataFrame) -> list[tuple[str, float]]:
    """The (dataset, percentage) pairs that have the full method and a `without-` variant."""
    found = runs.groupby(["dataset", "percent"])["variant"].agg(set)
    return sorted((pair for pair, variants in found.items() if "xmask" in variants
                   and any(name.startswith("without-") for name in variants)),
                  key=lambda pair: (ordered(runs["dataset"], DATASETS).index(pair[0]), pair[1]))


def all_tables(runs: pd.DataFrame) -> list[Table]:
    """Every table that the runs give, each of one selection only."""
    made = []
    for selection in ordered(runs["selection"], SELECTIONS):
        part = runs[runs["selection"] == selection]
        made += [counting_table(part), segmentation_table(part), localisation_table(part),
                 summary_table(part), *(ablation_table(part, *pair) for pair in ablations(part))]
    return made


def write_tables(results_folder: str | Path, out: str | Path,
                 only: Sequence[str] = ()) -> list[Path]:
    """Write every table of `results/<profile>` as CSV, Markdown and LaTeX; list the files.

    only: names of the runs to read; empty for all.
    Runs of selection `best-on-test` go to files of their own (`counting_best-on-test.csv`, ...).
    Tables of an earlier call that these runs no longer support are removed, so that the folder
    never holds a number without a run; a table that was edited by hand is set aside. Raises what
    `load_runs` raises.
    """
    runs, out = load_runs(results_folder, only), Path(out)
    with files.OutputFolder(out, cloned=True, wait=PATIENCE) as folder:
        paths = [path for table in all_tables(runs) for path in table.write(out)]
        remove_others(folder, r"(counting|segmentation|localisation|summary|ablation_.+)"
                              r"(_best-on-test)?\.(csv|md|tex)", paths)
    return paths


def remove_others(folder: files.OutputFolder, pattern: str, kept: Sequence[Path]) -> None:
    """Remove what was written there under a name that matches the whole pattern, but the kept
    files; one of such a name that was not written there is named, and stays."""
    for path in sorted(folder.path.iterdir()):
        if path not in kept and re.fullmatch(pattern, path.name):
            folder.remove(path)
            if os.path.lexists(path):
                _log.warning("%s: no run here gives it, and xmask did not write it here; delete it "
                             "if it is no file of yours", path)
