"""The shipped model on photographs from elsewhere, as it is and after `learn` (ours).

Some photos of a dataset are given with their dots, some without, and the rest measures; lots are
drawn before anything is counted. Notebook 17 runs it; results/elsewhere keeps what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from xmask import files, provenance
from xmask.data.own_photos import OwnPhotos
from xmask.study.claims import paired
from xmask.study.tables import markdown_table
from xmask.tools import learn, models

RESULTS = Path("results") / "elsewhere"
BEGIN = "<!-- elsewhere: written by `xmask docs`, not by hand -->"
END = "<!-- end of elsewhere -->"


def parts(number: int, dotted: int, bare: int, seed: int) -> list[np.ndarray]:
    """Which of so many photos are given with dots, which without, and which measure.

    Returns their indices: int64 arrays of shape (dotted,), (bare,) and (number - dotted - bare,).
    The last are the same for all seeds, so that trials can be compared photo by photo.
    Raises ValueError where none are left to measure.
    """
    if not 0 < dotted <= dotted + bare < number:
        raise ValueError(f"dotted, bare: of {number} photos, {dotted} with dots and {bare} without "
                         "leave none to measure; take fewer")
    given, rest = np.split(np.random.default_rng(2024).permutation(number), [dotted + bare])
    return [*np.split(np.random.default_rng(seed).permutation(given), [dotted]), rest]


def trial(dataset: Sequence, out: str | Path, *, dotted: int = 20, bare: int = 40,
          seed: int = 2024, segmenter: str = "bundled", overrides: dict | None = None,
          work: str | Path = "own/elsewhere", progress: bool = True) -> Path:
    """Learn from a part of a dataset and count on the rest, with both models.

    dataset: photos with points, as of `open_dataset`. seed: draws who is dotted, and trains. The
    run folder goes into `work`; its config.json and report.json, and counts.csv (a row a photo
    that measures: people, and count, low and high before and after) go into the folder `out`.
    Returns `out`. Raises what `parts` and `learn.learn` raise.
    """
    given, unmarked, rest = parts(len(dataset), dotted, bare, seed)
    photos = OwnPhotos([(dataset.image_path(i), dataset[i].points) for i in given])
    others = OwnPhotos([(dataset.image_path(i), None) for i in unmarked])
    run = learn.learn(photos, others, Path(work) / Path(out).name,
                      learn.configure(overrides, seed=seed), segmenter=segmenter,
                      progress=progress)
    found = {"before": models.load(), "after": models.load(run)}
    rows = []
    for index in tqdm(rest, unit="photo", desc="count", disable=not progress):
        sample = dataset[index]
        row = {"photo": dataset.ids[index], "people": len(sample.points)}
        for name, model in found.items():
            seen = model.predict(sample.image)
            row |= {name: seen.count, f"{name}_low": seen.low, f"{name}_high": seen.high}
        rows.append(row)
    with files.OutputFolder(out) as folder:
        files.write_json(folder.path / "config.json", files.read_json(run / "config.json") | {
            "photos": dataset.settings | {"checksum": dataset.checksum()},
            "seed_of_parts": seed, "code": {"digest": provenance.code("xmask.study.elsewhere"),
                                            "modules": ["xmask.study.elsewhere"]}})
        if (run / "report.json").is_file():
            files.write_json(folder.path / "report.json", files.read_json(run / "report.json"))
        files.write_text(folder.path / "counts.csv", pd.DataFrame(rows).to_csv(index=False))
    return Path(out)


def trials(results: str | Path = RESULTS, dataset: str = "*") -> dict[str, pd.DataFrame]:
    """counts.csv of every trial of a dataset, by name, with the absolute errors of the counts:
    `before`, `after`, and `constant`, of the best constant count, which nobody knows beforehand."""
    found = {path.parent.name: pd.read_csv(path)
             for path in sorted(Path(results).glob(f"{dataset}-*/counts.csv"))}
    for table in found.values():
        table["constant"] = table["people"].median()
        for name in ("constant", "before", "after"):
            table[name] = (table[name] - table["people"]).abs()
    return found


def summary(results: str | Path = RESULTS) -> pd.DataFrame:
    """One row a trial: `trial`, `photos`, `people` (sum), and the means of the errors of
    `trials`."""
    return pd.DataFrame([{"trial": name, "photos": len(table), "people": table["people"].sum(),
                          **table[["constant", "before", "after"]].mean()}
                         for name, table in trials(results).items()])


def gain(dataset: str, results: str | Path = RESULTS) -> tuple[float, float, float]:
    """By how many people a count is nearer to the truth after learning: the mean over trials of a
    dataset and over photos, and its 95% interval (as of `claims.paired`)."""
    return paired(np.stack([(table["before"] - table["after"]).to_numpy()
                            for table in trials(results, dataset).values()]))


def card_block(root: Path) -> str:
    """The part of the model card on photographs of ShanghaiTech B, markers included."""
    found = summary(root / RESULTS)
    table = [["trial", "photos", "people", "best constant's MAE", "MAE as it is",
              "MAE after `learn`"],
             *([row.trial, str(row.photos), str(row.people), f"{row.constant:.1f}",
                f"{row.before:.1f}", f"{row.after:.1f}"] for row in found.itertuples())]
    mean, low, high = gain("shb", root / RESULTS)
    return "\n".join([BEGIN, *markdown_table(table), "",
                      f"Learning changes the MAE by {-mean:+.1f} people (95% interval {-high:+.1f} "
                      f"to {-low:+.1f}, over trials and photos).", END])
