"""Keeping freed memory for the next tensor.

A training step allocates and frees the same megabytes over and over. By default glibc gives blocks from 128 KB on back
to the system, and every step begins with thousands of page faults: a stack of tiny networks took twice as long.
"""

from __future__ import annotations

import ctypes
import functools

LARGEST_KEPT = 32 * 2**20  # bytes; glibc takes no more. Larger blocks are rare, and long against their page faults
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """From now on this process keeps freed blocks of up to `LARGEST_KEPT` bytes; the results of no computation change.

    Returns:
        Whether the C library can do it; only glibc can, the others are left alone.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    largest = 2**31 - 1
    settings = {_M_MMAP_THRESHOLD: LARGEST_KEPT, _M_TRIM_THRESHOLD: largest, _M_TOP_PAD: 2 * LARGEST_KEPT}
    return all(library.mallopt(name, value) for name, value in settings.items())
