"""glibc's allocator, told to keep the memory that a primal step frees: the next step asks for the same again.

By itself it gives freed memory at the end of its heap back to the system and takes it again, page by page. Whether that
happens depends on what lies there by chance: of two workers of one sweep one may lose nothing, the other an eighth of its time.
"""

import ctypes
import os

# mallopt's parameters, <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30  # bytes of free memory at the end of the heap above which it is given back
LARGE = 32 << 20  # bytes from which a block is the system's own, given back when it is freed; glibc takes no more


def keep_freed_memory() -> bool:
    """For this process from now on. Blocks of 32 MiB and more (weights of large models) go back to the system as before.

    Without effect under another C library, or where the user has set glibc's own variables (MALLOC_TRIM_THRESHOLD_ and its like).
    Returns: whether it took effect.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows names no library by None
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT)) and bool(mallopt(_MMAP_THRESHOLD, LARGE))
