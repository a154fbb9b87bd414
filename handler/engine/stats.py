"""What the engine has done so far, in totals that only grow: whoever wants rates takes differences."""

from bisect import bisect_left
from dataclasses import dataclass, field

# Seconds, from a token of a small model to a wait for one that streams its weights from disk.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class Histogram:
    """How long things took, in seconds.

    counts: how many took at most as long as each of `BOUNDS` and longer than the one before it; the last, longer than
        all. sum: of all of them.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds


@dataclass
class EngineStats:
    """prompt_tokens: of the jobs that have got a first token.
    generated_tokens: of all sequences.
    queue: from a job's submission until its first sequence has a row of the cache.
    first_token: from a job's submission until its first token.
    between_tokens: from one token of a sequence to its next.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
