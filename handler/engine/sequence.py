"""One continuation in the making, and the rows of them that one forward takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .job import Choice, Job

if TYPE_CHECKING:
    from .sampling import Sampler


@dataclass(eq=False)
class Sequence:
    """A job's prompt and one of its choices.

    order: counts up in the order of submission.
    cached: how many of its tokens have keys and values in the cache.
    row: its row there, -1 while it waits.
    """

    job: Job
    choice: Choice
    sampler: Sampler
    max_new_tokens: int
    eos: frozenset[int]
    order: int
    cached: int = 0
    row: int = -1

    @property
    def columns(self) -> int:
        """Cache columns it may fill."""
        return len(self.job.prompt_ids) + self.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.job.prompt_ids) + len(self.choice.token_ids)

    @property
    def tokens(self) -> list[int]:
        return self.job.prompt_ids + self.choice.token_ids

    @property
    def prefilling(self) -> bool:
        return self.cached < len(self.job.prompt_ids)

    @property
    def echoes(self) -> bool:
        """Whether the logits of its prompt are wanted now."""
        return self.prefilling and self.choice.index == 0 and self.job.request.echo_logprobs

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` tokens that are not cached yet."""
        if not self.prefilling:
            return self.choice.token_ids[-count:]
        return self.job.prompt_ids[self.cached : self.cached + count]


@dataclass
class Batch:
    """One forward: neighbouring rows, and how many new tokens each brings."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def completes(self, index: int) -> bool:
        """Whether the forward reaches the sequence's last token, so that the next one can be sampled."""
        sequence = self.sequences[index]
        return sequence.cached + self.counts[index] == sequence.length

    @property
    def kept(self) -> list[int]:
        """Of how many of its last new positions each sequence needs logits."""
        needed = [int(self.completes(i)) for i in range(len(self.counts))]
        return [n if s.echoes else k for s, n, k in zip(self.sequences, self.counts, needed, strict=True)]
