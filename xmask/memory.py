"""Large arrays on a CPU: the C library keeps freed memory for the next one (glibc, so Linux).

As it comes, glibc gives the memory of a large array back to the system, and asks for it anew, page
by page, for the next one. To keep it saves a quarter of a prediction's time, and with huge pages a
fifth of a training step's (by hand, two cores). Results stay the same, bit by bit.
"""

from __future__ import annotations

import ctypes
import os

# bytes: from which size on an array gets pages of its own, how much free memory is kept, and how
# much is asked for at once
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = 1 << 29, 1 << 30, 1 << 26
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch reads it when it is imported
# of a process that is to be started and computes for minutes. Dask makes its workers give back all,
# with which SAM takes twice as long.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD),
               "MALLOC_TRIM_THRESHOLD_": str(_TRIM_THRESHOLD),
               "MALLOC_TOP_PAD_": str(_TOP_PAD)} | _HUGE_PAGES


def keep(huge_pages: bool = False) -> bool:
    """Let this process keep up to a gigabyte of freed memory; whether its C library can.

    huge_pages: torch, if it is not imported yet, asks for those. They come slowly at first, so they
    are for trainings.
    """
    if huge_pages:
        for name, value in _HUGE_PAGES.items():
            os.environ.setdefault(name, value)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    # numbers of <malloc.h>: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    return all([mallopt(-3, _MMAP_THRESHOLD), mallopt(-1, _TRIM_THRESHOLD), mallopt(-2, _TOP_PAD)])
