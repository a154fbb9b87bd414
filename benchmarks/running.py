"""What benchmarks share that step an engine themselves, or time what they call."""

import time
from collections.abc import Callable, Sequence

from handler.engine import Engine, Job


def finish(engine: Engine, jobs: Sequence[Job]) -> int:
    """Step until all is answered; the number of steps.

    Raises the error of a job that failed: then no figure is what it says.
    """
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    for job in jobs:
        if job.error:
            raise job.error
    return steps


def least_in_turns(actions: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The least seconds of each, after one call that warms up."""
    best = dict.fromkeys(actions, float("inf"))
    for turn in range(1 + turns):
        for name, action in actions.items():
            took = seconds(action)
            best[name] = min(best[name], took) if turn else best[name]
    return best


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
