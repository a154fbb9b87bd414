"""Memory that was freed: what the C library keeps of it for who comes next, and what goes back to the system."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from handler.weights.c_library import c_function

# mallopt(3)'s M_TRIM_THRESHOLD, bytes that are kept at the heap's end, and M_MMAP_THRESHOLD: for larger blocks the heap
# does not grow; they go back when they are freed, but the kernel zeroes each new one.
_PARAMETERS = (-1, -3)
OUTSIDE = (8 << 20, 1 << 20)  # as server/torchserve.py sets them for the time before the first forward
_INSIDE = (32 << 20, 5 << 20)  # of 1,024 positions in bfloat16, what is up to 2,560 wide is kept
HEAP_BYTES = 32_000_000  # of freed blocks that lie between others during a forward

_now = OUTSIDE


def reusing_blocks() -> AbstractContextManager[None]:
    """For a forward, whose tensors are of the same sizes in each layer: to map each of them anew takes as long as half
    of a prompt's products."""
    return _during(_INSIDE)


def mapping_blocks() -> AbstractContextManager[None]:
    """For tensors of a MiB or more that stay, also where a forward makes them: the heap, unless it has room, does not
    grow for them, to be left with holes that their successors, which are larger, do not fit in."""
    return _during(OUTSIDE)


def release_freed_memory() -> None:
    """Give it back to the system, also what lies between blocks in use: about a millisecond."""
    if trim := c_function("malloc_trim"):
        trim(0)


@contextmanager
def _during(thresholds: tuple[int, int]) -> Iterator[None]:
    before = _now
    _set(thresholds)
    try:
        yield
    finally:
        _set(before)


def _set(thresholds: tuple[int, int]) -> None:
    global _now
    if mallopt := c_function("mallopt"):
        for parameter, size in zip(_PARAMETERS, thresholds, strict=True):
            mallopt(parameter, size)
    _now = thresholds
