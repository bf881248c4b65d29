"""What EDP-SAM is worth: its masks against simpler ones, where the truth is known (ours).

Synthetic crowds with seeds that neither training nor tuning has seen. Masks are compared with
the truth person by person, because every method knows the heads: mean IoU over heads, per
density third (images sorted by their median r_i), and the share of mask pixels that lie on
somebody else. The simple methods:

- fixed discs: one radius for everybody, the best one on these very scenes (an advantage);
- exclusion discs: radius r_i / 2, so that no two overlap;
- Voronoi-limited discs: the local head radius s_i of EDP-SAM, and the nearest head wins;
- watershed: of the colour gradient, from the heads and from everything outside the circles;
- plain point: the segmenter as anybody would use it on a dot: no neighbours, no circles, no
  agreement on sizes, the mask it trusts most, contested pixels to the higher logit. "Point
  prompt only" is EDP-SAM without its superpixels, with all of these.
"""

from __future__ import annotations

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

from xmask import files, nnec, provenance
from xmask.data.sample import Sample
from xmask.data.synthetic import draw_scene
from xmask.edp_sam import generate_masks, local_head_radius
from xmask.segmenters import Prompts, Segmenter, open_segmenter

SEED = 3_700_000  # of the first scene; nothing else uses seeds from here to 3.8 million
RADII = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20)  # px, tried for fixed discs
PROMPTS = {
    "point prompt only": {"superpixel_prompt": False},
    "superpixel prompt only": {"point_prompt": False},
    "both, without NNEC": {"nnec": False},
    "EDP-SAM": {},
}
PLAIN = "plain point"
THIRDS = ("densest", "middle", "sparsest")


def draw_evaluation_scene(number: int, seed: int = SEED) -> Sample:
    """Scene `number` of the comparison: 20 to 400 people, in pictures that grow with them."""
    rng = np.random.default_rng((seed + number, 3))
    people = int(round(math.exp(rng.uniform(math.log(20), math.log(400)))))
    height = int(rng.integers(368, 440))
    return draw_scene(seed + number, shape=(height, height * 4 // 3), people=people,
                      character=("sha", "qnrf", "jhu")[number % 3])


def discs(points: np.ndarray, radii: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Discs around heads, a pixel in several to the nearest head: label map (H, W) int32."""
    head, pixel = nnec.incidence(points, radii, shape)
    y, x = np.divmod(pixel, shape[1])
    squared = (x - points[head, 0]) ** 2 + (y - points[head, 1]) ** 2
    return nnec.lowest_wins(squared, head, pixel, shape)


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


def plain_point_masks(image: np.ndarray, points: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """One positive point per head and nothing else: label map (H, W) int32."""
    shape = image.shape[:2]
    reach = np.minimum(2 * nnec.exclusion_radii(points, shape), max(0.5 * min(shape), 3.0))
    head, pixel = nnec.incidence(points, reach, shape)
    segmenter.set_image(image)
    prompts = Prompts(points[:, None], np.ones((len(points), 1), int))
    logits, trust = segmenter.predict(prompts, head, pixel)
    logit = logits[trust.argmax(axis=1)[head], np.arange(len(head))]
    return nnec.lowest_wins(-logit, head, pixel, shape, threshold=0.0)


def simple_methods() -> dict[str, Callable[[Sample], np.ndarray]]:
    """Name -> function from a scene to its label map (H, W) int32; fixed discs once per radius."""
    methods: dict[str, Callable[[Sample], np.ndarray]] = {
        f"fixed discs, {radius} px": lambda s, r=radius: discs(
            s.points, np.full(len(s.points), float(r)), s.shape) for radius in RADII}
    methods["exclusion discs"] = lambda s: discs(
        s.points, nnec.exclusion_radii(s.points, s.shape) / 2, s.shape)
    methods["Voronoi-limited discs"] = lambda s: discs(s.points, local_head_radius(
        s.points.astype(float), nnec.exclusion_radii(s.points, s.shape), s.shape), s.shape)
    methods["watershed"] = lambda s: watershed_masks(s.image, s.points.astype(float))
    return methods


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
    scene = {"scene": number, "median_radius": radius}
    rows = [{**scene, "segmenter": "none", "method": name,
             **compare(method(sample), sample.instances, heads)}
            for name, method in simple_methods().items()]
    for spec in segmenters:
        segmenter = open_segmenter(spec)
        plain = plain_point_masks(sample.image, sample.points.astype(float), segmenter)
        rows.append({**scene, "segmenter": spec, "method": PLAIN,
                     **compare(plain, sample.instances, heads)})
        rows += [{**scene, "segmenter": spec, "method": name, **compare(
            generate_masks(sample.image, sample.points, segmenter, **options)[0],
            sample.instances, heads)} for name, options in PROMPTS.items()]
    return rows


def run(out: str | os.PathLike, *, scenes: int = 18, seed: int = SEED,
        segmenters: Iterable[str] = ("classical", "bundled"), jobs: int = 1,
        progress: bool = True) -> pd.DataFrame:
    """The comparison; writes scenes.csv, thirds.csv, table.md and study.json into `out`.

    Finished scenes are kept in work/edp_study until code, segmenters or versions change.

    Returns the table of `thirds`. Raises ValueError for fewer than three scenes.
    """
    if scenes < 3:
        raise ValueError(f"scenes: {scenes}; give 3 or more, one for each density third")
    out, segmenters = Path(out), tuple(segmenters)
    described = {spec: open_segmenter(spec).describe() for spec in segmenters}
    # Scenes are kept, so that a stopped comparison goes on, and a larger one starts from it.
    kept = Path("work") / "edp_study" / provenance.digest(
        seed, described, provenance.code("xmask.edp_study"), provenance.versions())[:16]
    paths = [kept / f"{number}.json" for number in range(scenes)]
    todo = [number for number in range(scenes) if not paths[number].is_file()]
    with tqdm(total=scenes, initial=scenes - len(todo), desc="comparing", unit="scene",
              disable=not progress) as bar:
        for number, rows in _scenes(todo, seed, segmenters, jobs):
            files.write_json(paths[number], {"rows": rows})
            bar.update()
    rows = [row for path in paths for row in files.read_json(path)["rows"]]
    table = thirds(pd.DataFrame(rows))
    _write_csv(out / "scenes.csv", pd.DataFrame(rows))
    _write_csv(out / "thirds.csv", table)
    files.write_json(out / "study.json", {
        "command": f"xmask edp-study --scenes {scenes} --seed {seed} "
                   f"--segmenters {','.join(segmenters)}",
        "data": "synthetic crowds", "segmenters": described, "versions": provenance.versions()})
    files.write_text(out / "table.md", markdown(table, scenes, seed))
    return table


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
              segmenters: Iterable[str] = ("classical", "bundled"), progress: bool = True
              ) -> pd.DataFrame:
    """What annotated head sizes add, on scenes like JHU-CROWD++: writes boxes.csv into `out`.

    Columns: segmenter, sizes ("none", "exact" or "off by 20%", a log-normal error of each side),
    heads, mean IoU. Drawn sizes are those of the visible head; JHU-CROWD++'s own are rougher.
    """
    rows = []
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
    _write_csv(Path(out) / "boxes.csv", table)
    return table


def thirds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of scenes -> a row per segmenter and method, for each density third and for all.

    Columns: segmenter, method, then per third "<third> IoU" (mean over heads) and "on others"
    (share of mask pixels on another person, all scenes), "without mask" (heads). Of the fixed
    discs only the best radius stays.
    """
    order = rows.drop_duplicates("scene").sort_values("median_radius")["scene"].to_list()
    third = {scene: THIRDS[min(3 * k // len(order), 2)] for k, scene in enumerate(order)}
    rows = rows.assign(third=rows["scene"].map(third))
    result = []
    for (segmenter, method), part in rows.groupby(["segmenter", "method"], sort=False):
        row = {"segmenter": segmenter, "method": method}
        for name in THIRDS:
            chosen = part[part["third"] == name]
            row[f"{name} IoU"] = chosen["iou_sum"].sum() / max(chosen["heads"].sum(), 1)
        row["all IoU"] = part["iou_sum"].sum() / max(part["heads"].sum(), 1)
        row["on others"] = part["other_px"].sum() / max(part["mask_px"].sum(), 1)
        row["without mask"] = int(part["without_mask"].sum())
        result.append(row)
    table = pd.DataFrame(result)
    fixed = table["method"].str.startswith("fixed discs")
    best = table[fixed]["all IoU"].idxmax() if fixed.any() else None
    return table[~fixed | (table.index == best)].reset_index(drop=True)


def markdown(table: pd.DataFrame, scenes: int, seed: int) -> str:
    """The table as a page; the best of each segmenter's column is bold."""
    lines = [
        "# Masks from dots, compared on synthetic crowds", "",
        f"{scenes} drawn scenes (not photographs), seeds {seed} to {seed + scenes - 1}, never used "
        "for training or tuning. Mean IoU over heads in per cent, by density third of the images "
        "(median distance to the nearest neighbour); then the share of mask pixels that lie on "
        "another person, and heads without any mask. No pixel has two owners in any of them.", "",
        "| segmenter | method | densest | middle | sparsest | all | on others | without mask |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    columns = [f"{name} IoU" for name in (*THIRDS, "all")]
    for row in table.to_dict("records"):
        rivals = table[table["segmenter"].isin(["none", row["segmenter"]])]
        cells = [f"**{100 * row[c]:.1f}**" if row["segmenter"] != "none"
                 and row[c] == rivals[c].max() else f"{100 * row[c]:.1f}" for c in columns]
        name = row["segmenter"] if row["segmenter"] != "none" else ""
        lines.append(f"| {name} | {row['method']} | {' | '.join(cells)} | "
                     f"{100 * row['on others']:.1f}% | {row['without mask']} |")
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    files.write_text(path, table.to_csv(index=False, float_format="%.6g"))
