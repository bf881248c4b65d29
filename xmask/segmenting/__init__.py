"""Segmenters: SAM in enlarged crops, its checkpoints, its training here, and one without weights."""
