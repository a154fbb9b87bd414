"""OpenAI's completions and chat completions, streaming or not, with the parameters that vLLM adds."""

import json
import time
import uuid
from itertools import accumulate
from typing import Annotated, Any, Literal, cast

from jinja2 import TemplateError
from pydantic import Field, model_validator

from handler.engine import Choice, EngineError, InvalidRequest, Job, Request
from handler.protocols.base import Call, NotFound, Served, Strict, failure, validated

FINISH = {"stop": "stop", "length": "length"}


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
        """Those that were given, under the names of transformers' GenerationConfig."""
        sampled = any((self.temperature, self.top_p, self.min_p, self.top_k and self.top_k > 0))
        given = {
            "max_new_tokens": self.max_tokens or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # Off unless asked for: in transformers sampling alone would bring a top_k of 50.
            "top_k": max(self.top_k or 0, 0) if sampled else None,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def request(self, prompt: str | list[int], logprobs: int | None, echo_logprobs: bool = False) -> Request:
        """What the engine is asked for one prompt."""
        return Request(
            prompt,
            self.parameters(),
            n=self.n or 1,
            seed=self.seed,
            stop=self.stop or (),
            logprobs=logprobs,
            echo_logprobs=echo_logprobs,
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


class OpenAICall(Call):
    """What completions and chat completions share: ids, choices, usage, and the stream's frame."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: Generation, served: Served):
        if body.model not in (None, served.name):
            raise NotFound(f"model: there is no {body.model!r} here; the model is {served.name!r}")
        self._served = served
        self._body = body
        self.stream = bool(body.stream)
        self.content_type = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage_so_far = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._reported: dict[int, int] = {}  # log-probabilities already sent, by choice
        self._ended: set[int] = set()  # choices whose finish_reason is sent

    def answer(self, jobs: list[Job]) -> dict[str, Any]:
        choices = [self._choice(index, job, choice) for index, job, choice in _choices(jobs)]
        return self._head(self.object) | {"choices": choices, "usage": self._count(jobs)}

    def part(self, jobs: list[Job]) -> str:
        if error := failure(jobs):
            return _event(self.error(error)) + "data: [DONE]\n\n"
        events = [event for found in _choices(jobs) for event in self._events(*found)]
        if self._usage_so_far:
            events = [event | {"usage": self._count(jobs)} for event in events]
        if all(job.finished for job in jobs):
            if self._usage:
                events.append(self._chunk([]) | {"usage": self._count(jobs)})
            return "".join(map(_event, events)) + "data: [DONE]\n\n"
        return "".join(map(_event, events))

    @staticmethod
    def error(error: EngineError) -> dict[str, Any]:
        return openai_error(error)

    def _choice(self, index: int, job: Job, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, job: Job, choice: Choice, text: str, first: bool, logprobs_from: int | None) -> dict[str, Any]:
        raise NotImplementedError

    def _events(self, index: int, job: Job, choice: Choice) -> list[dict[str, Any]]:
        """The chunks of what is new of one choice."""
        text, finished = choice.take_text(), choice.finish_reason is not None
        if index in self._ended or not (text or finished):
            return []
        first, sent = index not in self._reported, self._reported.get(index, 0)
        self._reported[index] = len(choice.logprobs)
        asked = job.request.logprobs is not None
        delta = self._delta(job, choice, text, first, sent if asked else None)
        if finished:
            self._ended.add(index)
        return [self._chunk([{"index": index, **delta, "finish_reason": FINISH.get(choice.finish_reason or "")}])]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.chunk_object) | {"choices": choices} | ({"usage": None} if self._usage else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._served.name}

    def _count(self, jobs: list[Job]) -> dict[str, int]:
        prompt = sum(len(job.prompt_ids) for job in jobs)
        completion = sum(len(choice.token_ids) for job in jobs for choice in job.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _token(self, token: int) -> str:
        return str(self._served.tokenizer.decode([token]))


class CompletionCall(OpenAICall):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    _body: Completion

    def __init__(self, body: dict[str, Any], served: Served):
        completion = validated(Completion, _without_nulls(body))
        super().__init__(completion, served)
        self._echo = bool(completion.echo)
        self._offsets: dict[tuple[str, int], int] = {}  # characters of the tokens already reported, by choice
        # The engine generates at least one token; with max_tokens 0 it is left out of the answer.
        self._prompt_only = completion.max_tokens == 0
        if self._prompt_only:
            completion = completion.model_copy(update={"max_tokens": 1})
        logprobs = completion.logprobs
        self.requests = [
            completion.request(prompt, logprobs, self._echo and logprobs is not None) for prompt in completion.prompts()
        ]

    def _choice(self, index: int, job: Job, choice: Choice) -> dict[str, Any]:
        text = "" if self._prompt_only else choice.text
        logprobs = self._logprobs(job, choice, self._echo, 0) if job.request.logprobs is not None else None
        reason = "length" if self._prompt_only else FINISH.get(choice.finish_reason or "")
        text = self._served.prompt_text(job) + text if self._echo else text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, job: Job, choice: Choice, text: str, first: bool, logprobs_from: int | None) -> dict[str, Any]:
        echo = self._echo and first
        text = "" if self._prompt_only else text
        logprobs = None if logprobs_from is None else self._logprobs(job, choice, echo, logprobs_from)
        return {"text": self._served.prompt_text(job) + text if echo else text, "logprobs": logprobs}

    def _count(self, jobs: list[Job]) -> dict[str, int]:
        count = super()._count(jobs)
        if self._prompt_only:
            count |= {"completion_tokens": 0, "total_tokens": count["prompt_tokens"]}
        return count

    def _logprobs(self, job: Job, choice: Choice, echo: bool, start: int) -> dict[str, Any]:
        """OpenAI's legacy form: parallel lists over tokens. The first prompt token has no probability."""
        own = [] if self._prompt_only else choice.logprobs[start:]
        entries: list[Any] = [*(job.prompt_logprobs if echo else []), *own]
        ids = [*(job.prompt_ids if echo else []), *(token for token, *_ in own)]
        tokens = [self._token(token) for token in ids]
        key = (job.id, choice.index)
        at = self._offsets.get(key, 0 if echo or not self._echo else len(self._served.prompt_text(job)))
        *offsets, self._offsets[key] = accumulate(map(len, tokens), initial=at)
        tops = [entry and {self._token(token): logprob for token, logprob in entry[2]} for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry and entry[1] for entry in entries],
            "top_logprobs": tops if job.request.logprobs else None,
            "text_offset": offsets,
        }


class ChatCall(OpenAICall):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: dict[str, Any], served: Served):
        chat = validated(Chat, _without_nulls(body))
        super().__init__(chat, served)
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        self.requests = [chat.request(self._prompt(chat), logprobs)]

    def _prompt(self, chat: Chat) -> list[int]:
        tokenizer = self._served.tokenizer
        if not tokenizer.chat_template:
            raise InvalidRequest("messages: this model's tokenizer has no chat template; use completions with a prompt")
        messages = [message.plain() for message in chat.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def _choice(self, index: int, job: Job, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice, 0) if job.request.logprobs is not None else None
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        reason = FINISH.get(choice.finish_reason or "")
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, job: Job, choice: Choice, text: str, first: bool, logprobs_from: int | None) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        logprobs = None if logprobs_from is None else self._logprobs(choice, logprobs_from)
        return {"delta": delta, "logprobs": logprobs}

    def _logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        return {
            "content": [
                self._token_logprob(token, logprob) | {"top_logprobs": [self._token_logprob(*one) for one in top]}
                for token, logprob, top in choice.logprobs[start:]
            ],
            "refusal": None,
        }

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class ModelsCall(Call):
    """`GET v1/models` and `v1/models/NAME`."""

    def __init__(self, served: Served, name: str | None = None):
        if name not in (None, served.name):
            raise NotFound(f"model: there is no {name!r} here; the model is {served.name!r}")
        self._served, self._one = served, name is not None

    def answer(self, jobs: list[Job]) -> dict[str, Any]:
        model = {
            "id": self._served.name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "torchserve",
            "max_model_len": self._served.max_sequence_length,
        }
        return model if self._one else {"object": "list", "data": [model]}

    @staticmethod
    def error(error: EngineError) -> dict[str, Any]:
        return openai_error(error)


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's null is the same as leaving a field out, also one that is not supported."""
    return {name: value for name, value in body.items() if value is not None}


def openai_error(error: EngineError) -> dict[str, Any]:
    """An error in OpenAI's shape. `param` is the field that the message begins with, where it names one."""
    field, colon, _ = str(error).partition(": ")
    param = field if colon and field.replace(".", "").replace("_", "").isalnum() else None
    return {"error": {"message": str(error), "type": error.type, "param": param, "code": error.status}}


def _choices(jobs: list[Job]) -> list[tuple[int, Job, Choice]]:
    """Every choice with the index that the answer gives it: prompt by prompt, then n by n."""
    pairs = ((job, choice) for job in jobs for choice in job.choices)
    return [(index, job, choice) for index, (job, choice) in enumerate(pairs)]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
