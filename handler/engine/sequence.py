"""What a caller watches grow: a job is a submitted request, a sequence one continuation of its prompt."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from .detokenizer import TextStream
from .errors import EngineError
from .grammar import Compilation
from .request import Request
from .sampler import Sampler, TokenLogprob
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "time", "cancel", "error"]


@dataclass
class Job:
    """A submitted request. The engine fills it; the caller reads.

    sequences: one for each of the `n` continuations.
    prompt_logprobs: if asked for, one entry a prompt token; the first is None as nothing predicts it.
    submitted_at, started_at, first_token_at: `time.monotonic()` seconds at which it was submitted, one of its sequences
        got a row for the first time, and one had a first token; None before.
    waiting_since: the same clock when it was submitted, or when something of its group ran last.
    deadline: `time.monotonic()` seconds after which it ends with finish_reason "time", or None.
    prefix_owner: whose texts may begin with the same keys and values, and it with theirs; None for nobody's.
    compilation: of the request's grammar, if it has one.
    """

    request: Request
    params: SamplingParams
    prompt_ids: list[int]
    submitted_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    waiting_since: float = 0.0
    deadline: float | None = None
    prefix_owner: str | None = None
    compilation: Compilation | None = None
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    error: EngineError | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def group(self) -> str:
        return self.request.group or self.id

    @cached_property
    def prompt_array(self) -> np.ndarray:
        """The prompt's tokens, quick to compare with others'."""
        return np.array(self.prompt_ids)

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One continuation of a job's prompt, from the queue to its last token.

    index: its place among the job's sequences.
    order: counts up in the order of submission.
    token_ids: every generated token, including the eos token or the one that completed a stop string.
    last_token_at: `time.monotonic()` seconds at which it got the last of them, or None.
    logprobs: if asked for, one entry a generated token, from the model's raw logits in float32.
    finish_reason: None while it waits or runs.
    row: its row in the KV cache, -1 while it waits.
    num_cached_tokens: how many of its tokens have keys and values there.
    acceptance, draft_acceptance: the share of its drafts that was accepted lately, of its text's and the draft model's.
    times_passed: how often others were admitted before it because it did not fit.
    shares_prompt: whether its prompt has the same keys and values as its siblings'. Not once it has grown beyond
        longrope's border: that changes all its keys, and theirs maybe not yet.
    """

    job: Job
    index: int
    sampler: Sampler
    text_stream: TextStream
    eos_token_ids: frozenset[int]
    order: int
    token_ids: list[int] = field(default_factory=list)
    last_token_at: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    row: int = -1
    num_cached_tokens: int = 0
    acceptance: float = 0.3  # what is right soon shows, and what is wrong costs
    draft_acceptance: float = 0.5
    times_passed: int = 0
    shares_prompt: bool = True

    @property
    def text(self) -> str:
        """The text that no later token can take back: no half character, no beginning of a stop string."""
        return self.text_stream.text

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def can_run(self) -> bool:
        """Whether it may have a row: not before its grammar is compiled."""
        return self.job.compilation is None or self.job.compilation.future.done()

    @property
    def all_token_ids(self) -> list[int]:
        """The prompt's tokens and the generated ones."""
        return self.job.prompt_ids + self.token_ids

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.job.prompt_ids) + len(self.token_ids)

    @property
    def max_length(self) -> int:
        """Tokens it may come to, prompt included."""
        return len(self.job.prompt_ids) + self.job.params.max_new_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its last token is missing in the cache: the prompt, or after a loss of its row everything.
        A row with nothing in the cache is always prefilled."""
        return self.num_cached_tokens < max(1, self.length - 1)

    @property
    def shared_length(self) -> int:
        """How many tokens have the same keys and values in all sequences of the job that share any. The last token is
        not among them: the next one is sampled from its logits."""
        return min(len(self.job.prompt_ids), self.length - 1) if self.shares_prompt else 0

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether the logits of its next prompt tokens are to be reported: once a job, by its first sequence."""
        return self.job.params.prompt_logprobs and self.index == 0 and not self.token_ids

    def next_token_ids(self, count: int) -> list[int]:
        """The first `count` tokens that are not in the cache yet."""
        start = self.num_cached_tokens - len(self.job.prompt_ids)
        if start >= 0:  # the usual case, without copying the prompt
            return self.token_ids[start : start + count]
        return self.all_token_ids[self.num_cached_tokens : self.num_cached_tokens + count]
