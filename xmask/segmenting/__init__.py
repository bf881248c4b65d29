"""Segmenters: SAM in enlarged crops, its checkpoints and training, and one without weights."""
