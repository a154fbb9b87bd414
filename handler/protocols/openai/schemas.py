"""The bodies of OpenAI's requests, and what they ask of the engine."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from handler.engine import InvalidRequest, Request
from handler.protocols.base import Strict


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: usage so far in every chunk
    include_obfuscation: bool = False


class Generation(Strict):
    """The fields that both have. Those of the last group change nothing in an answer and are taken as they come."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    # vLLM's
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    # without influence
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _check(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    def parameters(self) -> dict[str, Any]:
        """Those that are specified, under the names of transformers' GenerationConfig."""
        sampled = any((self.temperature, self.top_p, self.min_p, self.top_k and self.top_k > 0))
        params = {
            "max_new_tokens": self.max_tokens or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # Off unless asked for: in transformers sampling alone would bring a top_k of 50.
            "top_k": max(self.top_k or 0, 0) if sampled else None,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
        }
        return {name: value for name, value in params.items() if value is not None}

    def request(self, prompt: str | list[int], logprobs: int | None, prompt_logprobs: bool = False) -> Request:
        """What the engine is asked for one prompt."""
        return Request(
            prompt,
            self.parameters(),
            n=self.n or 1,
            seed=self.seed,
            stop=self.stop or (),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )


class Completion(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "Completion":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; ask for n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 with echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. A list of numbers is one prompt of token ids."""
        if not self.prompt and self.prompt != "":
            raise InvalidRequest("prompt: the list is empty; send a string, strings, or token ids")
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], self.prompt if several else [self.prompt])


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message with its parts joined, as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ResponseFormat(Strict):
    type: Literal["text"]


class Chat(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # without influence when there are no tools
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _check_chat(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        return self

    def parameters(self) -> dict[str, Any]:
        own = {"max_new_tokens": self.max_completion_tokens} if self.max_completion_tokens else {}
        return super().parameters() | own


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's null is the same as leaving a field out, also one that is not supported."""
    return {name: value for name, value in body.items() if value is not None}
