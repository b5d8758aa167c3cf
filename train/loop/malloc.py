"""Memory that a training step frees is taken again by the next one."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory(limit: int = 2**30) -> bool:
    """Let glibc keep up to `limit` bytes of freed memory for reuse; False where there is no glibc.

    By default glibc gives every block above 32 MB back to the kernel when it is freed, and a
    training step takes its gradients anew each time: 10 to 25 thousand page faults a step for a
    layer of 14 M fp32 weights, a sixth or more of its time. Call it before the first step. The
    process then stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, limit))
