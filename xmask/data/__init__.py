"""Crowd data: readers of the benchmarks, drawn crowds, labelled splits, crops for training."""

from __future__ import annotations

from xmask.data.images import read_image
from xmask.data.readers import CrowdDataset, open_dataset
from xmask.data.sample import Sample
from xmask.data.splits import labelled_ids

__all__ = ["CrowdDataset", "Sample", "labelled_ids", "open_dataset", "read_image"]
