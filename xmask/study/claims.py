"""Every claim of the paper with a verdict: what was compared, the effect, its interval.

A row compares two methods on the same test images and, where networks are trained, the same seeds.
The effect is the mean over seeds and images of the paired difference, so signed that a positive one
speaks for the claim. Its 95% interval is a bootstrap that draws seeds and images anew, the images
the same for all seeds, and widens the part of the seeds as Student's t does, since a few seeds
resampled look more alike than seeds are. A claim *holds* where the interval lies above zero (for
"as good as", above minus the margin), else it *does not hold here*. Fewer than three seeds or a
hundred images decide nothing: it *cannot be tested here*. Intervals are of one row each, not
corrected for their number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from xmask import files
from xmask.study import edp_study, runs
from xmask.study.other_masks import NEAREST, WHOLE
from xmask.study.tables import markdown_table

PAGE = Path("docs") / "evidence.md"
BEGIN = "<!-- numbers: written by `xmask docs`, not by hand -->"
END = "<!-- end of numbers -->"
SEEDS, IMAGES = 3, 100  # fewer decide nothing
DRAWS = 10_000
COLUMNS = ("claim", "ours", "rival", "data", "labels", "measure", "trained", "as_good", "seeds",
           "images", "ours_value", "rival_value", "effect", "low", "high", "in_favour", "verdict",
           "why")
# what two methods have in common: labelled images, start and number of steps
_ALIKE = ("data.checksum", "data.labelled", "data.held_out", "backbone.",
          "config.optimisation.batch", "config.schedule.phase3", "config.schedule.steps_per_epoch")
COUNTS, MASKS = "MAE", "mean IoU %"
CALIBRATED = "MAE, calibrated"  # with the threshold that other drawn scenes set: calibrated.json
AS_GOOD = {COUNTS: "a tenth of the other's MAE", MASKS: "1 point of mean IoU"}  # see `_row`
HOLDS, FAILS, UNTESTED = "holds", "does not hold here", "cannot be tested here"


@dataclass(frozen=True)
class Claim:
    """What the paper says (`text`, in our words), and the comparison that tests it.

    rival: a variant of the method, or a way of making masks at the same points. measure: COUNTS,
    CALIBRATED or MASKS. percents: of labels. source: "variant", "masks" (`other_masks.json`),
    "prompts" (`xmask edp-study`; `ours` against `rival`, with the classical segmenter), "fewer
    labels" (the rival is the method itself at the next lower percentage) or "decoding" (the same
    networks decoded otherwise, `constants.csv`). as_good: the margin AS_GOOD is allowed.
    """

    text: str
    rival: str
    measure: str
    percents: tuple[int, ...] = (5, 10, 40)
    source: str = "variant"
    ours: str = "xmask"
    as_good: bool = False


_TEN = (10,)
_PROMPTS = (  # (claim, ours, rival) of masks from dots
    ("Two prompts are better than one", "both, without NNEC", "point prompt only"),
    ("Two prompts are better than one", "both, without NNEC", "superpixel prompt only"),
    ("Masks from dots: EDP-SAM, with circles and sizes, is better than prompts without circles",
     edp_study.FULL, "both, without NNEC"),
    ("Masks from dots: the circle helps as clip", edp_study.FULL, "without the clip"),
    ("Masks from dots: neighbours help as negative points", edp_study.FULL, "without negatives"),
    ("Masks from dots: the crowd's vote on head sizes helps", edp_study.FULL,
     "without size agreement"),
)
_NETWORK = "The circle helps the network, as clip of its training masks and as region of its loss"
CLAIMS = (
    *(Claim(text, rival, MASKS, (), "prompts", ours) for text, ours, rival in _PROMPTS),
    Claim(_NETWORK, "without-nnec", MASKS, _TEN),
    Claim(_NETWORK, "without-nnec", COUNTS, _TEN),
    Claim("Exclusivity shares pixels among neighbours better than distance alone", NEAREST, MASKS,
          source="masks"),
    *(Claim("XMask's masks are better than masks without a mask head", rival, MASKS,
            source="masks") for rival in (
                WHOLE, "equal discs, cut where they meet", "exclusion discs",
                "Voronoi cells in circles", "Voronoi-limited discs", "watershed", "EDP-SAM")),
    Claim("The circle helps as region of decoding", "one circle for all heads", MASKS, _TEN,
          "decoding"),
    Claim("Gaussian smoothing helps", "without-smoothing", MASKS, _TEN),
    Claim("Differentiable center sampling helps", "without-center-sampling", MASKS, _TEN),
    Claim("The superpixel prompt helps the network", "without-superpixel", MASKS, _TEN),
    Claim("The point-mask term helps (weight 1, as released)", "xmask", COUNTS, _TEN,
          ours="with-point-mask"),
    Claim("The point-mask term helps (weight 1, as released)", "xmask", MASKS, _TEN,
          ours="with-point-mask"),
    *(Claim("Unlabelled images help counting", "supervised-only", m)
      for m in (COUNTS, CALIBRATED)),
    *(Claim("A mean teacher of points counts better than supervised training", "supervised-only",
            m, ours="points-only") for m in (COUNTS, CALIBRATED)),
    *(Claim("Unlabelled images help counting, where points alone are learnt",
            "supervised-points-only", m, ours="points-only") for m in (COUNTS, CALIBRATED)),
    *(Claim("Without unlabelled images, learning masks too leaves counts as good",
            "supervised-points-only", m, ours="supervised-only", as_good=True)
      for m in (COUNTS, CALIBRATED)),
    Claim("Unlabelled images help masks", "supervised-only", MASKS),
    *(Claim("Points and masks as pseudo-labels count better than points alone", "points-only", m)
      for m in (COUNTS, CALIBRATED)),
    *(Claim("The mask constraint helps counting", "without-mask-constraint", m)
      for m in (COUNTS, CALIBRATED)),
    Claim("The mask constraint leaves masks as good", "without-mask-constraint", MASKS,
          as_good=True),
    *(Claim("One model does both: it counts as well as one that learns points only", "points-only",
            m, as_good=True) for m in (COUNTS, CALIBRATED)),
    Claim("More labels, with more steps, are better", "fewer labels", COUNTS, (10, 40),
          "fewer labels"),
)
# (claim, data, why no comparison here can test it)
NOT_COMPARED = (
    ("One model does both: its masks are as good as those of one that learns masks only",
     "drawn crowds", "no such model is trained: masks are decoded at points"),
    ("All claims about masks", "ShanghaiTech A", "photographs here have no true masks"),
)


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of differences (S, n) of S seeds on the same n images, with the 95%
    interval of the module's docstring. One seed: of images only."""
    rng = np.random.default_rng(0)
    trained, images = differences.shape
    drawn = rng.multinomial(trained, np.full(trained, 1 / trained), DRAWS) / trained
    image = rng.multinomial(images, np.full(images, 1 / images), DRAWS) / images
    means = np.einsum("ds,si,di->d", drawn, differences, image, optimize=True)
    # a bootstrap of S values has (S - 1) / S of their variance, and the quantiles of a normal
    few = 1.0 if trained == 1 else math.sqrt(trained / (trained - 1)) * (
        student.ppf(0.975, trained - 1) / 1.96)
    means += (few - 1) * (drawn - 1 / trained) @ differences.mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def table(results: str | Path = "results", *, drawn: tuple[str, str] = ("full", "sha")
          ) -> pd.DataFrame:
    """The claims, a row a comparison.

    results: the folder of all profiles. drawn: (profile, dataset) of the drawn crowds.
    Columns: COLUMNS. trained: whether seeds matter; ours_value to high: NaN where it cannot be
    tested; in_favour: seeds whose own mean speaks for the claim; why: of a verdict that is not
    "holds".
    """
    rows = []
    for claim in CLAIMS:
        if claim.source == "prompts":
            scenes = Path(results) / drawn[0] / "edp_sam" / "scenes.csv"
            rows.append(_row(claim, "drawn crowds, classical segmenter", math.nan,
                             *_prompts(claim, scenes), trained=False))
            continue
        if claim.source == "decoding":
            rows.append(_decoded(claim, Path(results) / drawn[0] / "constants.csv"))
            continue
        for kind, profile, dataset in (("drawn crowds", *drawn), ("photographs", "photo", "sha")):
            if kind == "photographs" and claim.measure != COUNTS:
                continue  # NOT_COMPARED says why for masks; other photographs are not at hand
            name = kind if kind == "drawn crowds" else runs.DATASETS[dataset]
            for percent in claim.percents:
                folder = Path(results) / profile / "runs"
                rows.append(_row(claim, name, percent, *_pair(claim, folder, dataset, percent)))
    rows += [{"claim": text, "data": data, "verdict": UNTESTED, "why": why}
             for text, data, why in NOT_COMPARED]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def _row(claim: Claim, data: str, percent: float, ours: pd.DataFrame, rival: pd.DataFrame, *,
         trained: bool = True) -> dict[str, object]:
    """ours, rival: value of every seed (rows) and image (columns), higher is better for MASKS."""
    seeds = ours.index.intersection(rival.index)
    images = ours.columns.intersection(rival.columns)
    row = {"claim": claim.text, "ours": claim.ours, "rival": claim.rival, "data": data,
           "labels": percent, "measure": claim.measure, "trained": trained,
           "as_good": claim.as_good, "seeds": len(seeds) if trained else 0, "images": len(images)}
    if trained and len(seeds) < SEEDS or len(images) < IMAGES:
        found = f"{len(seeds)} of at least {SEEDS} seeds" if trained and len(seeds) < SEEDS else (
            f"{len(images)} of at least {IMAGES} images")
        return row | {"verdict": UNTESTED, "why": found}
    mine, theirs = (one.loc[seeds, images].to_numpy(float) for one in (ours, rival))
    sign = 1 if claim.measure == MASKS else -1
    effect, low, high = paired(sign * (mine - theirs))
    allowed = 0.0  # to be lost, in people or points of mean IoU: AS_GOOD in numbers
    if claim.as_good:
        allowed = 1.0 if claim.measure == MASKS else 0.1 * float(theirs.mean())
    in_favour = int((sign * (mine - theirs).mean(axis=1) > -allowed).sum())
    return row | {"ours_value": mine.mean(), "rival_value": theirs.mean(), "effect": effect,
                  "low": low, "high": high, "in_favour": in_favour if trained else 0,
                  **_verdict(low, high, allowed)}


def _verdict(low: float, high: float, allowed: float = 0.0) -> dict[str, str]:
    why = ("" if low > -allowed else
           "the opposite" if high < -allowed else
           "not shown to be as good" if allowed else "no difference shown")
    return {"verdict": HOLDS if low > -allowed else FAILS, "why": why}


def _decoded(claim: Claim, file: Path) -> dict[str, object]:
    """The row of the circle in decoding, from the table of constants."""
    row: dict[str, object] = {
        "claim": claim.text, "ours": claim.ours, "rival": claim.rival, "data": "drawn crowds",
        "labels": claim.percents[0], "measure": claim.measure, "trained": True, "as_good": False}
    moved = pd.read_csv(file) if file.is_file() else pd.DataFrame({"constant": []})
    moved = moved[moved["constant"] == "evaluation.nnec"]
    if len(moved) < 2 or (moved["seeds"] < SEEDS).any() or (moved["images"] < IMAGES).any():
        return row | {"verdict": UNTESTED, "why": "too few networks were decoded both ways"}
    ours, rival = (moved[moved["configured"] == one].iloc[0] for one in (True, False))
    low, high = -rival["mean_iou_high"], -rival["mean_iou_low"]
    return row | {
        "seeds": rival["seeds"], "images": rival["images"], "ours_value": ours["mean_iou"],
        "rival_value": rival["mean_iou"], "effect": -rival["mean_iou_effect"], "low": low,
        "high": high, "in_favour": rival["seeds_lower"], **_verdict(low, high)}


def _pair(claim: Claim, folder: Path, dataset: str, percent: int
          ) -> tuple[pd.DataFrame, pd.DataFrame]:
    value = own_iou if claim.measure == MASKS else count_error
    if claim.source == "variant":
        _check_alike(folder, dataset, percent, (claim.ours, claim.rival))
    file = "calibrated.json" if claim.measure == CALIBRATED else "metrics.json"
    ours = values(folder, dataset, percent, claim.ours, value, file)
    if claim.source == "fewer labels":
        fewer = {10: 5, 40: 10}[percent]
        return ours, values(folder, dataset, fewer, "xmask", value)
    if claim.source == "masks":
        return ours, values(folder, dataset, percent, "xmask", lambda row: (
            math.nan if row[claim.rival] is None else 100 * row[claim.rival]), "other_masks.json")
    return ours, values(folder, dataset, percent, claim.rival, value, file)


def _check_alike(folder: Path, dataset: str, percent: int, variants: Iterable[str]) -> None:
    """Raises ValueError, naming both, where runs of one seed differ in more than the method."""
    first: dict[int, tuple[Path, dict]] = {}
    for variant in variants:
        for seed, path in run_folders(folder, dataset, percent, variant, "metrics.json"):
            settings = runs.by_dotted_name(files.read_json(path / "config.json"))
            other, theirs = first.setdefault(seed, (path, settings))
            if apart := sorted(name for name in {*settings, *theirs} if name.startswith(_ALIKE)
                               and (settings.get(name) or None) != (theirs.get(name) or None)):
                raise ValueError(f"{other} and {path} differ in {', '.join(apart)}, so what lies "
                                 "between them is not the method's. Train both alike, or move one "
                                 "of them away.")


def values(folder: Path, dataset: str, percent: int, variant: str,
           value: Callable[[dict], float], file: str = "metrics.json") -> pd.DataFrame:
    """One number of every seed (rows) and test image (columns) of a method's runs.

    folder: of the runs. file: of the run, with `per_image`. Images without a number in any seed
    are left out; no run gives an empty table.
    """
    found = {}
    for seed, path in run_folders(folder, dataset, percent, variant, file):
        content = files.read_json(path / file)
        try:
            found[seed] = {row["name"]: value(row) for row in content["per_image"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / file}: field {error} is missing. Evaluate the run again "
                             "(`make reproduce PROFILE=full`).") from error
    return pd.DataFrame.from_dict(found, orient="index").sort_index().dropna(axis=1)


def run_folders(folder: Path, dataset: str, percent: int, variant: str, file: str
                ) -> Iterator[tuple[int, Path]]:
    """(seed, run folder) of a method's runs that hold `file`."""
    name = re.compile(rf"{dataset}-{percent}-s(\d+)"
                      + ("" if variant == "xmask" else re.escape(f"-{variant}")))
    for path in sorted(folder.glob(f"{dataset}-{percent}-s*")):
        if (found := name.fullmatch(path.name)) and (path / file).is_file():
            yield int(found[1]), path


def count_error(row: dict) -> float:
    """How many people the count of an image of metrics.json is wrong by."""
    return abs(row["count"] - row["true_count"])


def own_iou(row: dict) -> float:
    """Mean IoU (%) of the run's own masks of an image; NaN where nobody is in it."""
    return math.nan if row["mean_iou"] is None else 100 * row["mean_iou"]


def _prompts(claim: Claim, file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean IoU (%) of every scene of `xmask edp-study` with the classical segmenter, ours and the
    rival's; with several head radii the best one."""
    if not file.is_file():
        return pd.DataFrame(), pd.DataFrame()
    scenes = pd.read_csv(file)
    scenes = scenes[scenes["segmenter"] == "classical"]

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
            errors = values(folder, dataset, percent, variant, count_error)
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
    alone = np.where(claims["verdict"] == UNTESTED, -1, np.arange(len(claims)))
    for _, alike in claims.groupby([alone, "claim", "data", "why"], sort=False, dropna=False):
        row = alike.iloc[0]  # one row for all that cannot be tested for the same reason
        rival = ", ".join(runs.VARIANTS.get(n, n) for n in alike["rival"].dropna().unique())
        percents = ", ".join(f"{label:g}" for label in alike["labels"].dropna().unique())
        cells = ["", "", "", ""]
        if row["verdict"] != UNTESTED:
            cells = [f"{row['seeds']:g} × {row['images']:g}" if row["trained"] else
                     f"{row['images']:g}",
                     f"{row['measure']} {row['rival_value']:.1f} → {row['ours_value']:.1f}",
                     f"{row['effect']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]",
                     f"{row['in_favour']:g} of {row['seeds']:g}" if row["trained"] else ""]
        rows.append([row["claim"], rival, row["data"] + (f", {percents}%" if percents else ""),
                     *cells, row["verdict"] + (f": {row['why']}" if row["why"] else "")])
    return markdown_table(rows)


def write(claims: pd.DataFrame, results: str | Path = "results") -> list[Path]:
    """Write claims.csv and claims.md into `results`; return their paths. Others of these names
    are set aside."""
    results = Path(results)
    page = ["# Claims, and what holds of them here", "",
            "Written by `notebooks/23_claims.ipynb`, not by hand; `docs/evidence.md` says what it "
            "means. The effect is the paired difference, positive where it speaks for the claim: "
            "people (MAE) or points of mean IoU, both means over images. \"As good\" allows "
            f"{AS_GOOD[COUNTS]} or {AS_GOOD[MASKS]}.", "",
            *markdown(claims), ""]
    with files.OutputFolder(results, cloned=True):
        files.write_text(results / "claims.md", "\n".join(page))
        files.write_text(results / "claims.csv", claims.to_csv(index=False, float_format="%.6g"))
    return [results / "claims.md", results / "claims.csv"]


def evidence_block(root: Path) -> str:
    """The numbers of docs/evidence.md, markers included. root: of the repository.

    Raises FileNotFoundError, with the remedy, before there are claims.
    """
    file = root / "results" / "claims.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, so docs/evidence.md has no numbers. Restore it, "
                                "or run `make reproduce PROFILE=full`.")
    claims = pd.read_csv(file).fillna({"why": ""})
    counted = claims["verdict"].value_counts()
    rows = [["method", "labels %", "seeds × images", "MAE", "± between seeds",
             "± by the choice of images"]]
    rows += [[r["method"], f"{r['labels']}", f"{r['seeds']} × {r['images']}", f"{r['mae']:.1f}",
              f"{r['seed_std']:.1f}", f"{r['image_se']:.1f}"]
             for r in luck(root / "results").to_dict("records")]
    return "\n".join([
        BEGIN, "", *markdown(claims), "",
        f"{counted.get(HOLDS, 0) + counted.get(FAILS, 0)} comparisons could be made: "
        f"{counted.get(HOLDS, 0)} hold, {counted.get(FAILS, 0)} do not hold here.", "",
        "How far luck alone moves the MAE on drawn crowds (standard deviation between seeds; "
        "standard error of one seed over the test images). All seeds share the labelled images, so "
        "the luck of drawing those is in no number here:", "", *markdown_table(rows), "", END])
