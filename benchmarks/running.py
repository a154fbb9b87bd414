"""What benchmarks share that step an engine themselves."""

from collections.abc import Sequence

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
