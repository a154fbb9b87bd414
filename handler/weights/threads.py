"""How many threads compute: as many as there are cores that nobody else keeps busy."""

import os
import time
from collections.abc import Callable

import psutil
import torch

_PERIOD = 1.0  # seconds over which the others' use is measured
_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user and nice too
_SPARE = 0.4  # of a core: less than the rest of it that others use takes no thread away


class FreeCores:
    """Lets PyTorch compute in fewer threads while other processes use the cores.

    All threads of a product wait for the last one: one that has to share its core holds the others up, and they spin
    meanwhile, so two threads beside a busy process are slower than one. To be used by the thread that computes.
    """

    def __init__(
        self, used: Callable[[], tuple[float, float]] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        """used: seconds for which our cores have been busy so far, and for which this process has kept them so."""
        self._cores = _cores()
        self._most = torch.get_num_threads()
        self._used, self._clock = used or _used, clock
        self._last = (clock(), *self._used())
        self._resting_since: float | None = clock()

    def match(self) -> None:
        """Set the number of threads, now and then. Cheap enough for each step."""
        now = self._clock()
        rested_long = self._resting_since is not None and now - self._resting_since >= _PERIOD
        self._resting_since = None
        then, busy_then, own_then = self._last
        if now - then < _PERIOD:
            return
        busy, own = self._used()
        self._last = now, busy, own
        others = max(0.0, (busy - busy_then) - (own - own_then)) / (now - then)
        threads = min(self._most, max(1, int(len(self._cores) - others + _SPARE)))
        if rested_long:
            threads = max(threads, torch.get_num_threads())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def rest(self) -> None:
        """Nothing is computed until the next `match`. What others do in a long rest takes no thread away, as clients
        get their requests ready then; but what they leave is taken back."""
        self._resting_since = self._clock()


def _cores() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _used() -> tuple[float, float]:
    ours = [times._asdict() for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in _cores()]
    busy = sum(seconds for times in ours for kind, seconds in times.items() if kind not in _NOT_BUSY)
    return busy, time.process_time()
