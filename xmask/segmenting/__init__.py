"""Segment Anything and its classical stand-in: building, loading, enlarged crops, training the bundled one."""
