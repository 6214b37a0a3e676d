"""Keep freed memory in the process: on CPU, training allocates the same large blocks every step.

glibc hands blocks above 32 MiB back to the kernel when they are freed and gets them again, page by
page, at the next step: tens of thousands of page faults a step on the embedded model, and next to
none with this.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameter numbers, from malloc.h
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 1 GiB; returns whether that was possible.

    Peak memory does not change, only what is returned in between. Elsewhere than on glibc
    nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        and libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        and libc.mallopt(_M_TOP_PAD, 64 << 20)
    )
