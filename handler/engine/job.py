"""What a caller hands in (Request) and watches grow (Job, Choice)."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import EngineError
from .text import TextStream

FinishReason = Literal["stop", "length", "time", "cancel", "error"]
TokenLogprob = tuple[int, float, list[tuple[int, float]]]  # token, its log-probability, the most likely ones


@dataclass
class Request:
    """One prompt and how to continue it.

    prompt: text, or token ids. An empty prompt starts from the tokenizer's bos token.
    parameters: transformers' `GenerationConfig` names, and `seed`.
    n: how many continuations; the i-th is seeded with seed + i.
    stop: strings that end a continuation, besides `parameters["stop_strings"]`. They are searched in the
        generated text only, and neither they nor what follows them appears in `Choice.text`.
    logprobs: None, or how many most likely tokens to report beside each chosen one (0: the chosen one only).
    echo_logprobs: also report the prompt's tokens, in `Job.prompt_logprobs`.
    ignore_eos: go on to the length limit whatever the model says.
    logit_bias, presence_penalty, frequency_penalty: as OpenAI defines them, over generated tokens.
    """

    prompt: str | list[int]
    parameters: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    logprobs: int | None = None
    echo_logprobs: bool = False
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Choice:
    """One continuation of a job's prompt.

    token_ids: every generated token, including the eos token or the one that completed a stop string.
    logprobs: one entry a token when the request asks for them, from the model's raw logits in float32.
    finish_reason: None while it runs.
    """

    index: int
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _taken: int = 0

    @property
    def text(self) -> str:
        """The text that no later token can take back: no half character, no beginning of a stop string."""
        return self.stream.text

    def take_text(self) -> str:
        """The text that is new since the last call."""
        new = self.text[self._taken :]
        self._taken += len(new)
        return new


@dataclass
class Job:
    """A submitted request. The engine fills it; the caller reads.

    prompt_logprobs: with `echo_logprobs`, one entry a prompt token; the first is None as nothing predicts it.
    deadline: `time.monotonic()` seconds after which it ends with finish_reason "time", or None.
    """

    request: Request
    prompt_ids: list[int]
    deadline: float | None = None
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    error: EngineError | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline
