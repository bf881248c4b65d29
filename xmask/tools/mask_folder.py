"""The folder that `xmask masks` leaves: the masks of `xmask.data.masks`, as COCO too, and a picture
of the least sure ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from xmask import files
from xmask.data import masks
from xmask.segmenters import Segmenter
from xmask.tools import coco, contact_sheet


def make(dataset: Sequence, indices: list[int], segmenter: Segmenter, out: str | os.PathLike, *,
         shard: str = "", overwrite: bool = False, kept: Iterable[Path] = (), **options: Any
         ) -> tuple[list[str], masks.MasksFailed | None]:
    """Masks of the images `indices`, coco.json and worst.png, which has the least sure ones.

    shard, options: as of `masks.mask_dataset`. kept: as of `files.OutputFolder`. Of shards, the
    last one to come to its end writes the two files. Returns what to tell about it, line by line,
    and the error to end with if some images got no masks.
    """
    failure, written, out = None, [], Path(out)
    names = [dataset.ids[i] for i in masks.part_of(indices, shard)]
    with files.OutputFolder(out, overwrite=overwrite, shard=shard, kept=kept) as folder:
        try:
            masks.mask_dataset(dataset, indices, segmenter, out, shard=shard, anew=overwrite,
                               overwrite=overwrite, **options)
        except masks.MasksFailed as error:
            failure = error
        with folder.alone():
            done = masks.file_names(out, dataset)
            if not shard or all(dataset.ids[i] in done for i in indices):
                written = [coco.write(out, done, out / "coco.json"),
                           contact_sheet.write(dataset, out, out / "worst.png")]
    told = [masks.summary(out, names), *map(str, filter(None, (out / "manifest.json", *written)))]
    return told, failure
