"""What EDP-SAM is worth: its masks against simpler ones, where the truth is known (ours).

Synthetic crowds with seeds that neither training nor tuning has seen. Masks are compared with
the truth person by person, because every method knows the heads: mean IoU over heads, per
density third (images sorted by their median r_i), and the share of mask pixels that lie on
somebody else. No method gives a pixel to two persons.

Simple methods, without a segmenter:

- fixed discs: one radius for everybody, the best one on these very scenes (an advantage);
- exclusion discs: radius r_i / 2, so that no two overlap;
- Voronoi-limited discs: the local head radius s_i of EDP-SAM, and the nearest head wins;
- watershed: of the colour gradient, from the heads and from everything outside the circles.

Building up and taking away are explained on the page that `markdown` writes. Besides: without NNEC
there is no head radius from the crowd's geometry or by vote either; masks are looked for within 4
radii, as EDP-SAM does; a contested pixel goes to the higher logit, and of every mask only the piece
at the head stays.

- point prompt only: three candidates, of which only those that hold the head count;
- superpixel prompt only: one candidate;
- without the superpixel or the point prompt: still with circles, negatives and sizes, so not the
  prompts of "building up";
- without negatives: a head's neighbours are no longer negative points of its prompts;
- without size agreement: no vote on sizes, and candidates are not judged by theirs.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_gradient_magnitude
from skimage.color import rgb2lab
from skimage.segmentation import watershed
from tqdm.auto import tqdm

from xmask import edp_sam, files, nnec, provenance
from xmask.data.sample import Sample
from xmask.edp_sam import generate_masks, local_head_radius
from xmask.segmenters import POSITIVE, Prompts, Segmenter, describe, open_segmenter
from xmask.segmenting.sam_segmenter import SamSegmenter
from xmask.synthetic import draw_scene

SEED = 3_700_000  # of the first scene; nothing else uses seeds from here to 3.8 million
RADII = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20)  # px, tried for fixed discs
NEIGHBOURS = (1, 2, 4, 8), (1.5, 3.0, 6.0)  # tried: at most so many negatives, within so many r_i
HEAD_RADII = (7, 10, 14)  # px, tried for the prompts without NNEC
FIXED, FULL = "fixed discs", "EDP-SAM"
# Blocks of the table, in its order. Building up: which prompts; taking away: options that go.
SIMPLE, BUILD, TAKE = "simple", "building up", "taking away"
PROMPTS = {"point prompt only": ("point",), "superpixel prompt only": ("superpixel",),
           "both, without NNEC": ("point", "superpixel")}
PARTS = {"without the superpixel prompt": {"superpixel_prompt": False},
         "without the point prompt": {"point_prompt": False},
         "without the clip": {"nnec": False},
         "without negatives": {"negatives": False},
         "without size agreement": {"size_agreement": False}}
WHOLE = "without enlarged crops"
THIRDS = ("densest", "middle", "sparsest")
Method = tuple[dict[str, Any], Callable[[Sample], np.ndarray]]


def draw_evaluation_scene(number: int, seed: int = SEED) -> Sample:
    """Scene `number` of the comparison: 20 to 400 people, in pictures that grow with them."""
    rng = np.random.default_rng((seed + number, 3))
    people = int(round(math.exp(rng.uniform(math.log(20), math.log(400)))))
    height = int(rng.integers(368, 440))
    return draw_scene(seed + number, shape=(height, height * 4 // 3), people=people,
                      character=("sha", "qnrf", "jhu")[number % 3])


def discs(points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Discs around heads, a pixel in several to the nearest head: label map (H, W) int32."""
    inside = nnec.circles(points, radii, shape, split=False)
    return inside.lowest_wins(inside.squared)


def watershed_masks(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Watershed of the colour gradient from the heads, and from outside all circles: (H, W) label
    map. image: (H, W, 3) uint8; points: (N, 2) px."""
    shape = image.shape[:2]
    radii = nnec.exclusion_radii(points, shape)
    lab = rgb2lab(image)
    gradient = np.sqrt(sum(gaussian_gradient_magnitude(lab[..., c], 1.0) ** 2 for c in range(3)))
    size = local_head_radius(points, radii, shape)
    markers = discs(points, np.maximum(0.35 * size, 1.0), shape)
    background = len(points) + 1
    markers[discs(points, np.minimum(radii, 2 * size), shape) == 0] = background
    labels = watershed(gradient, markers)
    return np.where(labels == background, 0, labels).astype(np.int32)


def prompted_masks(image: np.ndarray, points: np.ndarray, segmenter: Segmenter,
                   prompts: tuple[str, ...], radius: float) -> np.ndarray:
    """The prompts without NNEC, as "building up" says: label map (H, W) int32.

    points: (N, 2) px. prompts: "point", "superpixel" or both. radius: px, of every head.
    """
    scale = np.full(len(points), float(radius))
    near = nnec.circles(points, edp_sam.REACH * scale, image.shape[:2], split=False)
    dots = Prompts(points[:, None], np.full((len(points), 1), POSITIVE), sizes=scale)
    segmenter.set_image(image)
    candidates, region = [], None
    if "point" in prompts:
        candidates += edp_sam.ask(segmenter, "point", dots, near)
    if "superpixel" in prompts:
        region = edp_sam.superpixel_regions(image, points, scale, near)
        boxed = edp_sam.superpixel_prompts(dots, near.select(region))
        candidates += edp_sam.ask(segmenter, "superpixel", boxed, near)
    logit, _, _ = edp_sam.fuse_candidates(candidates, region, None, near)
    return edp_sam.keep_connected(near.lowest_wins(-logit, threshold=0.0), points)


def simple_methods() -> Iterator[Method]:
    """What a row says of a method, and its label map (H, W) int32 of a scene; fixed discs once
    per radius."""
    for radius in RADII:
        yield {"method": FIXED, "head_radius": radius}, lambda s, r=radius: discs(
            s.points, np.full(len(s.points), float(r)), s.shape)
    yield {"method": "exclusion discs"}, lambda s: discs(
        s.points, nnec.exclusion_radii(s.points, s.shape) / 2, s.shape)
    yield {"method": "Voronoi-limited discs"}, lambda s: discs(s.points, local_head_radius(
        s.points.astype(float), nnec.exclusion_radii(s.points, s.shape), s.shape), s.shape)
    yield {"method": "watershed"}, lambda s: watershed_masks(s.image, s.points.astype(float))


def segmenter_methods(spec: str) -> Iterator[Method]:
    """What a row says of a segmenter's methods, and their label maps (H, W) int32 of a scene, for
    both blocks; EDP-SAM itself once."""
    segmenter = open_segmenter(spec)

    def full(sample: Sample, by: Segmenter = segmenter, **options: bool) -> np.ndarray:
        return generate_masks(sample.image, sample.points, by, **options)[0]

    for name, prompts in PROMPTS.items():
        for radius in HEAD_RADII:
            yield {"block": BUILD, "method": name, "head_radius": radius}, (
                lambda s, p=prompts, r=radius: prompted_masks(
                    s.image, s.points.astype(float), segmenter, p, r))
    yield {"block": BUILD, "method": FULL}, full
    for name, options in PARTS.items():
        yield {"block": TAKE, "method": name}, lambda s, o=options: full(s, **o)
    if isinstance(segmenter, SamSegmenter):
        whole = SamSegmenter.from_model(segmenter.model, max_zoom=1)
        yield {"block": TAKE, "method": WHOLE}, lambda s: full(s, whole)


def compare(labels: np.ndarray, truth: np.ndarray, heads: int) -> dict[str, float]:
    """Person by person: sum of IoUs, mask pixels, and those of them on another person.

    labels, truth: (H, W) int label maps of the same heads 1 to `heads`.
    """
    mask = np.bincount(labels.ravel(), minlength=heads + 1)[1:]
    true = np.bincount(truth.ravel(), minlength=heads + 1)[1:]
    both = np.bincount(labels[labels == truth].ravel(), minlength=heads + 1)[1:]
    iou = both / np.maximum(mask + true - both, 1)
    on_another = int(((labels > 0) & (truth > 0) & (labels != truth)).sum())
    return {"heads": heads, "iou_sum": float(iou.sum()), "mask_px": int(mask.sum()),
            "other_px": on_another, "without_mask": int((mask == 0).sum())}


def one_scene(number: int, seed: int, segmenters: tuple[str, ...]) -> list[dict[str, Any]]:
    """All methods on one scene: a row each."""
    torch.set_num_threads(1)
    sample = draw_evaluation_scene(number, seed)
    heads = len(sample.points)
    radius = float(np.median(nnec.exclusion_radii(sample.points, sample.shape)))
    methods = [({"segmenter": "none", "block": SIMPLE, **row}, method)
               for row, method in simple_methods()]
    for spec in segmenters:
        methods += [({"segmenter": spec, **row}, method)
                    for row, method in segmenter_methods(spec)]
    return [{"scene": number, "median_radius": radius, "head_radius": None, **row,
             **compare(method(sample), sample.instances, heads)} for row, method in methods]


def run(out: str | os.PathLike, *, scenes: int = 18, seed: int = SEED,
        segmenters: Iterable[str] = ("classical", "bundled"), jobs: int = 1,
        overwrite: bool = False, progress: bool = True) -> pd.DataFrame:
    """The comparison; writes scenes.csv, thirds.csv, table.md and study.json into `out`.

    overwrite: as of `files.OutputFolder`, which `out` is. In the repository's own folder
    `results`, a file that was edited is set aside. Finished scenes are kept in work/edp_study
    until code, segmenters or versions change.
    Returns the table of `thirds`. Raises ValueError for fewer than three scenes.
    """
    if scenes < 3:
        raise ValueError(f"scenes: {scenes}; give 3 or more, one for each density third")
    out, segmenters, folder = Path(out), tuple(segmenters), _folder(out, overwrite)
    described = {spec: describe(spec) for spec in segmenters}
    # so that a stopped comparison goes on, and a larger one starts from it
    kept = Path("work") / "edp_study" / provenance.digest(
        seed, described, provenance.code("xmask.study.edp_study"), provenance.versions())[:16]
    paths = [kept / f"{number}.json" for number in range(scenes)]
    todo = [number for number in range(scenes) if not paths[number].is_file()]
    with tqdm(total=scenes, initial=scenes - len(todo), desc="comparing", unit="scene",
              disable=not progress) as bar:
        for number, rows in _scenes(todo, seed, segmenters, jobs):
            files.write_json(paths[number], {"rows": rows})
            bar.update()
    rows = [row for path in paths for row in files.read_json(path)["rows"]]
    table = thirds(pd.DataFrame(rows))
    with folder:
        _write_csv(out / "scenes.csv", pd.DataFrame(rows))
        _write_csv(out / "thirds.csv", table)
        files.write_json(out / "study.json", {
            "command": f"xmask edp-study --scenes {scenes} --seed {seed} "
                       f"--segmenters {','.join(segmenters)}",
            "data": "drawn crowds", "segmenters": described, "versions": provenance.versions()})
        files.write_text(out / "table.md", markdown(table, scenes, seed))
    return table


def _folder(out: str | os.PathLike, overwrite: bool) -> files.OutputFolder:
    """The folder of the results, checked before the work."""
    ours = Path(out).parts[:1] == ("results",)
    folder = files.OutputFolder(out, overwrite=overwrite, cloned=ours)
    with folder:  # what cannot be is said now
        return folder


def _scenes(todo: list[int], seed: int, segmenters: tuple[str, ...], jobs: int
            ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Number and rows of each scene, as they are finished."""
    if jobs == 1:
        for number in todo:
            yield number, one_scene(number, seed, segmenters)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(one_scene, number, seed, segmenters): number for number in todo}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def run_boxes(out: str | os.PathLike, *, scenes: int = 12, seed: int = SEED + 50_000,
              segmenters: Iterable[str] = ("classical", "bundled"), overwrite: bool = False,
              progress: bool = True) -> pd.DataFrame:
    """What annotated head sizes add, on scenes like JHU-CROWD++: writes boxes.csv into `out`.

    Columns: segmenter, sizes ("none", "exact" or "off by 20%", a log-normal error of each side),
    heads, mean_iou. Drawn sizes are those of the visible head; JHU-CROWD++'s own are rougher.
    overwrite: as of `run`.
    """
    rows, folder = [], _folder(out, overwrite)
    for number in tqdm(range(scenes), desc="head sizes", unit="scene", disable=not progress):
        rng = np.random.default_rng((seed + number, 4))
        people = int(round(math.exp(rng.uniform(math.log(20), math.log(300)))))
        sample = draw_scene(seed + number, shape=(364, 482), people=people, character="jhu")
        wrong = sample.boxes * np.exp(rng.normal(0, 0.2, sample.boxes.shape))
        for spec in segmenters:
            segmenter = open_segmenter(spec)
            for name, boxes in (("none", None), ("exact", sample.boxes), ("off by 20%", wrong)):
                labels, _ = generate_masks(sample.image, sample.points, segmenter, boxes=boxes)
                rows.append({"segmenter": spec, "sizes": name,
                             **compare(labels, sample.instances, people)})
    sums = pd.DataFrame(rows).groupby(["segmenter", "sizes"], sort=False, as_index=False)[
        ["heads", "iou_sum"]].sum()
    table = sums.assign(mean_iou=sums["iou_sum"] / sums["heads"]).drop(columns="iou_sum")
    with folder:
        _write_csv(Path(out) / "boxes.csv", table)
    return table


def run_negatives(out: str | os.PathLike, *, scenes: int = 6, seed: int = 5_600_000,
                  segmenters: Iterable[str] = ("classical", "bundled"), overwrite: bool = False,
                  progress: bool = True) -> pd.DataFrame:
    """How many neighbours, and how far away, serve as negative points: writes negatives.csv.

    Columns: segmenter, at most (neighbours), within (so many r_i), heads, mean IoU, on others
    (share of mask pixels on another person). The scenes are others than those of the comparison,
    because this one decides what EDP-SAM does. overwrite: as of `run`.
    """
    rows, folder = [], _folder(out, overwrite)
    for number in tqdm(range(scenes), desc="negatives", unit="scene", disable=not progress):
        sample = draw_evaluation_scene(number, seed)
        for spec in segmenters:
            segmenter = open_segmenter(spec)
            for most, within in itertools.product(*NEIGHBOURS):
                labels, _ = generate_masks(sample.image, sample.points, segmenter,
                                           neighbours=(most, within))
                rows.append({"segmenter": spec, "at most": most, "within": within,
                             **compare(labels, sample.instances, len(sample.points))})
    keys = ["segmenter", "at most", "within"]
    sums = pd.DataFrame(rows).groupby(keys, sort=False, as_index=False).sum()
    table = sums[[*keys, "heads"]].assign(
        mean_iou=sums["iou_sum"] / sums["heads"], on_others=sums["other_px"] / sums["mask_px"])
    with folder:
        _write_csv(Path(out) / "negatives.csv", table)
    return table


def thirds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of scenes -> a row per segmenter and method, for each density third and for all.

    Columns: segmenter, block, method, then per third "<third> IoU" (mean over heads), "all IoU",
    "on others" (share of mask pixels on another person, all scenes), "without mask" (heads). Of a
    method that was tried with several head radii the best one stays, and is named.
    """
    order = rows.drop_duplicates("scene").sort_values("median_radius")["scene"].to_list()
    third = {scene: THIRDS[min(3 * k // len(order), 2)] for k, scene in enumerate(order)}
    rows = rows.assign(third=rows["scene"].map(third))
    result: dict[tuple[str, str], dict[str, Any]] = {}
    for (segmenter, block, method, radius), part in rows.groupby(
            ["segmenter", "block", "method", "head_radius"], sort=False, dropna=False):
        name = method if pd.isna(radius) else f"{method}, {radius:g} px"
        row = {"segmenter": segmenter, "block": block, "method": name}
        for one in THIRDS:
            chosen = part[part["third"] == one]
            row[f"{one} IoU"] = chosen["iou_sum"].sum() / max(chosen["heads"].sum(), 1)
        row["all IoU"] = part["iou_sum"].sum() / max(part["heads"].sum(), 1)
        row["on others"] = part["other_px"].sum() / max(part["mask_px"].sum(), 1)
        row["without mask"] = int(part["without_mask"].sum())
        best = result.get((segmenter, method))
        if best is None or row["all IoU"] > best["all IoU"]:
            result[segmenter, method] = row
    return pd.DataFrame(result.values())


def markdown(table: pd.DataFrame, scenes: int, seed: int) -> str:
    """The tables as a page; in the first, the best of each segmenter's column is bold."""
    columns = [f"{name} IoU" for name in (*THIRDS, "all")]
    head = [f"| segmenter | method | {' | '.join((*THIRDS, 'all'))} | on others | without mask |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]

    def line(row: dict[str, Any], cells: list[str]) -> str:
        name = row["segmenter"] if row["segmenter"] != "none" else ""
        return (f"| {name} | {row['method']} | {' | '.join(cells)} | "
                f"{100 * row['on others']:.1f}% | {row['without mask']} |")

    lines = [
        "# Masks from dots, compared on synthetic crowds", "",
        f"{scenes} drawn scenes (not photographs), seeds {seed} to {seed + scenes - 1}, never used "
        "for training or tuning. Mean IoU over heads in per cent, by density third of the images "
        "(median distance to the nearest neighbour); then the share of mask pixels that lie on "
        "another person, and heads without any mask. No pixel has two owners in any of them.", "",
        "## Building up: discs, single prompts, both prompts, EDP-SAM", "",
        "The prompts come without NNEC: nothing is derived from distances between heads, neither "
        "circles nor negative points nor sizes. Crops, SLIC and the reach of masks need some size "
        "of a head: one radius for everybody, named in the row, the best of "
        f"{', '.join(map(str, HEAD_RADII))} px on these very scenes (as for fixed discs: an "
        "advantage). *Point prompt only*: the dot as positive point, the candidate that the "
        "segmenter trusts most. *Superpixel prompt only*: the box around the superpixels at the "
        "dot, and the dot. *Both, without NNEC*: scored and merged as EDP-SAM does.", "", *head]
    built = table[table["block"] != TAKE]
    for row in built.to_dict("records"):
        rivals = built[built["segmenter"].isin(["none", row["segmenter"]])]
        lines.append(line(row, [
            f"**{100 * row[c]:.1f}**" if row["segmenter"] != "none"
            and row[c] == rivals[c].max() else f"{100 * row[c]:.1f}" for c in columns]))
    lines += [
        "", "## Taking away: EDP-SAM with one part switched off", "",
        "Points of mean IoU that are lost (-) or gained (+) without the part. *Without the point "
        "prompt* the vote on sizes, which rests on its candidates, is missing, too. *Without the "
        "clip* masks may reach twice as far as the circle, while negative points, sizes and crops "
        "still know the neighbours. *Without enlarged crops* the model sees the whole image at its "
        "input size.", "", *head]
    for row in table[table["block"] == TAKE].to_dict("records"):
        full = table[(table["segmenter"] == row["segmenter"]) & (table["method"] == FULL)].iloc[0]
        lines.append(line(row, [f"{100 * (row[c] - full[c]):+.2f}" for c in columns]))
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    files.write_text(path, table.to_csv(index=False, float_format="%.6g"))
