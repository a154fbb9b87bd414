"""Functions of the C library that Python does not have."""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def c_function(name: str) -> Callable[..., int] | None:
    """None where the library has none of that name: some are glibc's alone."""
    return getattr(ctypes.CDLL(None), name, None)
