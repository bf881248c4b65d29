"""Every claim of the paper with a verdict: what was compared, the effect, its interval.

A row compares two methods on the same test images and, where networks are trained, the same seeds.
The effect is the mean over seeds and images of the paired difference, so signed that a positive one
speaks for the claim. Its 95% interval is a bootstrap (percentiles) that draws seeds and images
anew, the images the same for all seeds. A claim *holds* where the interval lies above zero (for
"without loss", above minus a tenth of the rival's error), else it *does not hold here*. Fewer than
three seeds or a hundred images decide nothing: it *cannot be tested here*. Intervals are of one row
each, not corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from xmask import files
from xmask.study import edp_study, runs
from xmask.study.other_masks import CELLS
from xmask.study.tables import markdown_table

SEEDS, IMAGES = 3, 100  # fewer decide nothing
DRAWS = 10_000
COLUMNS = ("claim", "ours", "rival", "data", "labels", "measure", "trained", "margin", "seeds",
           "images", "ours_value", "rival_value", "effect", "low", "high", "in_favour", "verdict",
           "why")
MARGIN = 0.1  # of the rival's error or IoU: what counts as no loss
COUNTS, MASKS = "MAE", "mean IoU %"
HOLDS, FAILS, UNTESTED = "holds", "does not hold here", "cannot be tested here"


@dataclass(frozen=True)
class Claim:
    """What the paper says (`text`, in our words), and the comparison that tests it.

    rival: a variant of the method, or a way of making masks at the same points. measure: COUNTS or
    MASKS. percents: of labels. source: "variant", "masks" (`other_masks.json`), "prompts" (`xmask
    edp-study`; `ours` against `rival`, block by block) or "fewer labels" (the rival is the method
    itself at the next lower percentage). margin: "without loss" instead of "better".
    """

    text: str
    rival: str
    measure: str
    percents: tuple[int, ...] = (5, 10, 40)
    source: str = "variant"
    ours: str = "xmask"
    margin: float = 0.0
    real: bool = True  # is asked of photographs too


_TEN = (10,)
CLAIMS = (
    Claim("Two prompts are better than one", "point prompt only", MASKS, (), "prompts",
          "both, without NNEC"),
    Claim("Two prompts are better than one", "superpixel prompt only", MASKS, (), "prompts",
          "both, without NNEC"),
    Claim("The circle helps masks from dots: all of it", "both, without NNEC", MASKS, (),
          "prompts", edp_study.FULL),
    Claim("The circle helps masks from dots: as clip", "without the clip", MASKS, (), "prompts",
          edp_study.FULL),
    Claim("The circle helps masks from dots: as negative points", "without negatives", MASKS, (),
          "prompts", edp_study.FULL),
    Claim("The circle helps masks from dots: as head sizes", "without size agreement", MASKS, (),
          "prompts", edp_study.FULL),
    Claim("The circle helps the network (masks and loss)", "without-nnec", MASKS, _TEN),
    Claim("The circle helps the network (masks and loss)", "without-nnec", COUNTS, _TEN),
    Claim("Exclusivity separates neighbours better than distance alone", CELLS, MASKS,
          source="masks"),
    *(Claim("XMask's masks are better than masks without a mask head", rival, MASKS,
            source="masks") for rival in ("equal discs, cut where they meet", "exclusion discs",
                                          "Voronoi-limited discs", "watershed", "EDP-SAM")),
    Claim("Gaussian smoothing helps", "without-smoothing", MASKS, _TEN),
    Claim("Differentiable center sampling helps", "without-center-sampling", MASKS, _TEN),
    Claim("The superpixel prompt helps the network", "without-superpixel", MASKS, _TEN),
    Claim("Unlabelled images help counting", "supervised-only", COUNTS),
    Claim("Unlabelled images help masks", "supervised-only", MASKS),
    Claim("Mask pseudo-labels beat point pseudo-labels", "points-only", COUNTS),
    Claim("The mask constraint helps counting", "without-mask-constraint", COUNTS),
    Claim("The mask constraint leaves masks as good", "without-mask-constraint", MASKS,
          margin=MARGIN),
    Claim("One model does both: counts as good as of points alone", "points-only", COUNTS,
          margin=MARGIN),
    Claim("More labels are better", "fewer labels", COUNTS, (10, 40), "fewer labels"),
)
# Claims that no comparison here can test, and why
NOT_COMPARED = (
    ("The circle helps decoding", "no decoder here works without a circle: without one, no head "
     "has a region. What exclusivity adds to circles is a row of its own"),
)


def paired(differences: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of differences (S, n) of S seeds on the same n images; the 95% interval
    draws seeds and images anew. One seed: images only."""
    rng = np.random.default_rng(seed)
    trained, images = differences.shape
    drawn = rng.multinomial(trained, np.full(trained, 1 / trained), DRAWS) / trained
    image = rng.multinomial(images, np.full(images, 1 / images), DRAWS) / images
    means = np.einsum("ds,si,di->d", drawn, differences, image, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def table(results: str | Path = "results", *, drawn: tuple[str, str] = ("full", "sha"),
          photographs: tuple[str, str] = ("photo", "sha")) -> pd.DataFrame:
    """The claims, a row a comparison.

    results: the folder of all profiles. drawn, photographs: (profile, dataset) of either kind.
    Columns: COLUMNS. trained: whether seeds matter; ours_value to high: NaN where it cannot be
    tested; in_favour: seeds whose own mean speaks for the claim; why: of a verdict that is not
    "holds".
    """
    rows = []
    for claim in CLAIMS:
        if claim.source == "prompts":
            rows.append(_row(claim, "drawn crowds", math.nan, *_prompts(claim, Path(results) / (
                drawn[0]) / "edp_sam" / "scenes.csv"), trained=False))
            continue
        for kind, (profile, dataset) in (("drawn crowds", drawn), ("photographs", photographs)):
            if kind == "photographs" and claim.measure == MASKS:
                continue  # they have no true masks
            name = kind if kind == "drawn crowds" else runs.DATASETS[dataset]
            for percent in claim.percents:
                folder = Path(results) / profile / "runs"
                rows.append(_row(claim, name, percent, *_pair(claim, folder, dataset, percent)))
    rows += [{"claim": text, "data": "drawn crowds", "verdict": UNTESTED, "why": why}
             for text, why in NOT_COMPARED]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def _row(claim: Claim, data: str, percent: float, ours: pd.DataFrame, rival: pd.DataFrame, *,
         trained: bool = True) -> dict[str, object]:
    """ours, rival: value of every seed (rows) and image (columns), lower is better for COUNTS."""
    seeds = ours.index.intersection(rival.index)
    images = ours.columns.intersection(rival.columns)
    row = {"claim": claim.text, "ours": claim.ours, "rival": claim.rival, "data": data,
           "labels": percent, "measure": claim.measure, "trained": trained,
           "margin": claim.margin, "seeds": len(seeds) if trained else 0, "images": len(images)}
    if trained and len(seeds) < SEEDS or len(images) < IMAGES:
        found = f"{len(seeds)} of at least {SEEDS} seeds" if trained and len(seeds) < SEEDS else (
            f"{len(images)} of at least {IMAGES} images")
        return row | {"verdict": UNTESTED, "why": found}
    mine, theirs = (one.loc[seeds, images].to_numpy(float) for one in (ours, rival))
    sign = -1 if claim.measure == COUNTS else 1
    effect, low, high = paired(sign * (mine - theirs))
    allowed = claim.margin * theirs.mean()
    in_favour = int((sign * (mine - theirs).mean(axis=1) > -allowed).sum())
    why = ("" if low > -allowed else
           "the opposite" if high < -allowed else "no difference shown")
    return row | {"ours_value": mine.mean(), "rival_value": theirs.mean(), "effect": effect,
                  "low": low, "high": high, "in_favour": in_favour if trained else 0,
                  "verdict": HOLDS if low > -allowed else FAILS, "why": why}


def _pair(claim: Claim, folder: Path, dataset: str, percent: int
          ) -> tuple[pd.DataFrame, pd.DataFrame]:
    value = _count_error if claim.measure == COUNTS else _own_iou
    ours = values(folder, dataset, percent, "xmask", value)
    if claim.source == "fewer labels":
        fewer = {10: 5, 40: 10}[percent]
        return ours, values(folder, dataset, fewer, "xmask", value)
    if claim.source == "masks":
        return ours, values(folder, dataset, percent, "xmask", lambda row: (
            math.nan if row[claim.rival] is None else 100 * row[claim.rival]), "other_masks.json")
    return ours, values(folder, dataset, percent, claim.rival, value)


def values(folder: Path, dataset: str, percent: int, variant: str,
           value: Callable[[dict], float], file: str = "metrics.json") -> pd.DataFrame:
    """One number of every seed (rows) and test image (columns) of a method's runs.

    folder: of the runs. file: of the run, with `per_image`. Images without a number in any seed
    are left out; no run gives an empty table.
    """
    found = {}
    end = "" if variant == "xmask" else f"-{variant}"
    for path in run_folders(folder, f"{dataset}-{percent}-s", end, file):
        content = files.read_json(path / file)
        try:
            found[int(path.name.split("-s", 1)[1].split("-")[0])] = {
                row["name"]: value(row) for row in content["per_image"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / file}: field {error} is missing. Evaluate the run again "
                             "(`make reproduce PROFILE=full`).") from error
    return pd.DataFrame.from_dict(found, orient="index").sort_index().dropna(axis=1)


def run_folders(folder: Path, begin: str, end: str, file: str) -> Iterator[Path]:
    """Run folders named `begin`, a seed, `end` that hold `file`."""
    for path in sorted(folder.glob(f"{begin}*")):
        seed = path.name.removeprefix(begin).removesuffix(end)
        if seed.isdigit() and path.name == f"{begin}{seed}{end}" and (path / file).is_file():
            yield path


def _count_error(row: dict) -> float:
    return abs(row["count"] - row["true_count"])


def _own_iou(row: dict) -> float:
    return math.nan if row["mean_iou"] is None else 100 * row["mean_iou"]


def _prompts(claim: Claim, file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean IoU (%) of every scene of `xmask edp-study`, ours and the rival's; with several head
    radii the best one."""
    if not file.is_file():
        return pd.DataFrame(), pd.DataFrame()
    scenes = pd.read_csv(file)
    scenes = scenes[scenes["segmenter"] != "none"]

    def of(method: str) -> pd.DataFrame:
        part = scenes[scenes["method"] == method].assign(
            iou=lambda t: 100 * t["iou_sum"] / t["heads"])
        radii = part.groupby("head_radius", dropna=False)["iou"].mean()
        best = radii.idxmax() if len(radii) else math.nan
        part = part[part["head_radius"].isna() if pd.isna(best) else part["head_radius"] == best]
        return part.pivot_table(index="segmenter", columns="scene", values="iou")

    return of(claim.ours), of(claim.rival)


def luck(results: str | Path = "results", profile: str = "full", dataset: str = "sha"
         ) -> pd.DataFrame:
    """How far one seed, and the choice of test images, move the count's MAE: a row a method and
    percentage. Columns: method, labels, seeds, images, mae, seed_std (between seeds), image_se
    (standard error of one seed's MAE over images)."""
    folder, rows = Path(results) / profile / "runs", []
    for percent in (5, 10, 40):
        for variant in ("supervised-only", "points-only", "xmask"):
            errors = values(folder, dataset, percent, variant, _count_error)
            if len(errors) < 2:
                continue
            own = errors.std(axis=1, ddof=1) / math.sqrt(errors.shape[1])
            rows.append({"method": runs.VARIANTS[variant], "labels": percent,
                         "seeds": len(errors), "images": errors.shape[1],
                         "mae": errors.to_numpy().mean(),
                         "seed_std": errors.mean(axis=1).std(ddof=1), "image_se": own.mean()})
    return pd.DataFrame(rows)


def markdown(claims: pd.DataFrame) -> list[str]:
    """The claims as lines of a Markdown table."""
    rows = [["claim", "compared with", "data", "seeds × images", "theirs → ours",
             "effect [95% interval]", "seeds for it", "verdict"]]
    groups = ["claim", "rival", "data", "measure", "why"]
    untested = claims[claims["verdict"] == UNTESTED].fillna({"rival": "", "measure": ""})
    together = untested.groupby(groups, sort=False)["labels"].agg(list).to_dict()
    for row in claims.to_dict("records"):
        labels = [row["labels"]]
        rival = "" if pd.isna(row["rival"]) else runs.VARIANTS.get(row["rival"], row["rival"])
        if row["verdict"] == UNTESTED:  # of several percentages one row
            key = ["" if pd.isna(row[name]) else row[name] for name in groups]
            labels = together.pop(tuple(key), None)
            if labels is None:
                continue
        percents = ", ".join(f"{label:g}" for label in labels if not pd.isna(label))
        cells = ["", "", "", ""]
        if row["verdict"] != UNTESTED:
            cells = [f"{row['seeds']:g} × {row['images']:g}" if row["trained"] else
                     f"{row['images']:g}",
                     f"{row['measure']} {row['rival_value']:.1f} → {row['ours_value']:.1f}",
                     f"{row['effect']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]",
                     f"{row['in_favour']:g} of {row['seeds']:g}" if row["trained"] else ""]
        rows.append([row["claim"], rival, row["data"] + (f", {percents}%" if percents else ""),
                     *cells, row["verdict"] + (f": {row['why']}" if row["why"] else "")])
    return markdown_table(rows)


def write(claims: pd.DataFrame, results: str | Path = "results") -> list[Path]:
    """Write claims.csv and claims.md into `results`; return their paths."""
    results = Path(results)
    page = ["# Claims, and what holds of them here", "",
            "Written by `notebooks/23_claims.ipynb`, not by hand; `docs/evidence.md` says what it "
            "means. The effect is the paired difference, positive where it speaks for the claim: "
            "people (MAE) or points of mean IoU. MAE and mean IoU are means over images here.", "",
            *markdown(claims), ""]
    files.write_text(results / "claims.md", "\n".join(page))
    files.write_text(results / "claims.csv", claims.to_csv(index=False, float_format="%.6g"))
    return [results / "claims.md", results / "claims.csv"]
