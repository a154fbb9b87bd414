"""What of a file is in the kernel's page cache."""

import ctypes

from .c_library import c_function

_CACHESTAT = 451  # the system call's number, on every architecture that PyTorch runs on; Linux 6.5


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def cached_pages(descriptor: int, start: int, size: int) -> int | None:
    """How many pages of `size` bytes of an open file are cached; None where the kernel does not tell, or not whoever
    asks. Nothing is read: to ask by RWF_NOWAIT is to begin, and a fast disk may be through before the answer."""
    call, pages = c_function("syscall"), _Pages()
    if call is None or call(_CACHESTAT, descriptor, ctypes.byref(_Range(start, size)), ctypes.byref(pages), 0):
        return None
    return pages.cached
