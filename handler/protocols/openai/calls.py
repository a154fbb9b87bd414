"""How completions and chat completions are answered: whole, or in the parts of a stream."""

import json
import time
import uuid
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError

from handler.engine import EngineError, InvalidRequest, Job, Sequence
from handler.protocols.base import Call, ModelInfo, failure, validated
from handler.protocols.errors import NotFound, ProtocolError, status_and_type
from handler.protocols.openai.schemas import Chat, Completion, Generation, without_nulls

# OpenAI's finish reasons. The others end a request without an answer of its own.
FINISH_REASONS = {"stop": "stop", "length": "length"}


@dataclass
class Cursor:
    """How much of one sequence its client has been sent.

    text: characters of `Sequence.text`.
    logprobs: entries of `Sequence.logprobs`.
    text_offset: characters of the tokens in those entries, and of the prompt's where they are echoed.
    started, finished: whether its first part and its finish_reason are sent.
    """

    text: int = 0
    logprobs: int = 0
    text_offset: int = 0
    started: bool = False
    finished: bool = False


class OpenAICall(Call):
    """A call that generates. OpenAI's choices are the engine's sequences, prompt by prompt, then n by n."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: Generation, model: ModelInfo):
        _check_model(body.model, model)
        self._model = model
        self.stream = bool(body.stream)
        self.content_type = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._continuous_usage = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._cursors: dict[int, Cursor] = {}  # by the index of the choice

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        choices = [
            {"index": index, **self._choice(sequence), "finish_reason": self._finish_reason(sequence)}
            for index, sequence in enumerate(_sequences(jobs))
        ]
        return self._head(self.object) | {"choices": choices, "usage": self._count(jobs)}

    def render_part(self, jobs: list[Job]) -> str:
        if error := failure(jobs):
            return _event(self.error_body(error)) + "data: [DONE]\n\n"
        chunks = [chunk for index, sequence in enumerate(_sequences(jobs)) for chunk in self._chunks(index, sequence)]
        if self._continuous_usage:
            chunks = [chunk | {"usage": self._count(jobs)} for chunk in chunks]
        if all(job.finished for job in jobs):
            if self._usage:
                chunks.append(self._chunk([]) | {"usage": self._count(jobs)})
            return "".join(map(_event, chunks)) + "data: [DONE]\n\n"
        return "".join(map(_event, chunks))

    @staticmethod
    def error_body(error: EngineError | ProtocolError) -> dict[str, Any]:
        """In OpenAI's shape. `param` is the field that the message begins with, where it names one."""
        field, colon, _ = str(error).partition(": ")
        param = field if colon and field.replace(".", "").replace("_", "").isalnum() else None
        status, kind = status_and_type(error)
        return {"error": {"message": str(error), "type": kind, "param": param, "code": status}}

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        """A whole choice of an answer, but for its index and finish_reason."""
        raise NotImplementedError

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        """A choice of a chunk: `text` is new, `cursor` says what was sent before. Moves `cursor.text_offset`."""
        raise NotImplementedError

    def _chunks(self, index: int, sequence: Sequence) -> list[dict[str, Any]]:
        """The chunk of what is new of one choice, if anything is."""
        cursor = self._cursors.setdefault(index, Cursor())
        text = sequence.text[cursor.text :]
        if cursor.finished or not (text or sequence.finished):
            return []
        delta = self._delta(sequence, text, cursor)
        cursor.text += len(text)
        cursor.logprobs = len(sequence.logprobs)
        cursor.started, cursor.finished = True, sequence.finished
        return [self._chunk([{"index": index, **delta, "finish_reason": self._finish_reason(sequence)}])]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.chunk_object) | {"choices": choices} | ({"usage": None} if self._usage else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return FINISH_REASONS.get(sequence.finish_reason or "")

    def _count(self, jobs: list[Job]) -> dict[str, int]:
        prompt = sum(len(job.prompt_ids) for job in jobs)
        completion = sum(len(sequence.token_ids) for sequence in _sequences(jobs))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _token_text(self, token_id: int) -> str:
        return str(self._model.tokenizer.decode([token_id]))


class CompletionCall(OpenAICall):
    """`v1/completions`: one prompt or several, as text or as token ids."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        completion = validated(Completion, without_nulls(body))
        super().__init__(completion, model)
        self._echo = bool(completion.echo)
        # The engine generates at least one token; with max_tokens 0 it is left out of the answer.
        self._prompt_only = completion.max_tokens == 0
        if self._prompt_only:
            completion = completion.model_copy(update={"max_tokens": 1})
        logprobs = completion.logprobs
        self.requests = [
            completion.request(prompt, logprobs, self._echo and logprobs is not None) for prompt in completion.prompts()
        ]

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        return self._delta(sequence, sequence.text, Cursor())

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        text = "" if self._prompt_only else text
        if self._echo and not cursor.started:
            text = self._model.prompt_text(sequence.job) + text
        asked = sequence.job.params.logprobs is not None
        return {"text": text, "logprobs": self._logprobs(sequence, cursor) if asked else None}

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return "length" if self._prompt_only and sequence.finished else super()._finish_reason(sequence)

    def _count(self, jobs: list[Job]) -> dict[str, int]:
        count = super()._count(jobs)
        if self._prompt_only:
            count |= {"completion_tokens": 0, "total_tokens": count["prompt_tokens"]}
        return count

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        """OpenAI's legacy form: parallel lists over tokens. The first prompt token has no probability."""
        job = sequence.job
        new = [] if self._prompt_only else sequence.logprobs[cursor.logprobs :]
        echo = self._echo and not cursor.started
        entries: list[Any] = [*(job.prompt_logprobs if echo else []), *new]
        token_ids = [*(job.prompt_ids if echo else []), *(token_id for token_id, *_ in new)]
        tokens = [self._token_text(token_id) for token_id in token_ids]
        *offsets, cursor.text_offset = accumulate(map(len, tokens), initial=cursor.text_offset)
        tops = [entry and {self._token_text(token_id): logprob for token_id, logprob in entry[2]} for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry and entry[1] for entry in entries],
            "top_logprobs": tops if job.params.logprobs else None,
            "text_offset": offsets,
        }


class ChatCall(OpenAICall):
    """`v1/chat/completions`: messages, through the tokenizer's chat template."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        chat = validated(Chat, without_nulls(body))
        super().__init__(chat, model)
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        request = chat.request(self._prompt(chat), logprobs)
        self.requests = [replace(request, add_special_tokens=False)]

    def _prompt(self, chat: Chat) -> str:
        tokenizer = self._model.tokenizer
        if not tokenizer.chat_template:
            raise InvalidRequest("messages: this model's tokenizer has no chat template; use completions with a prompt")
        messages = [message.plain() for message in chat.messages]
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        message = {"role": "assistant", "content": sequence.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(sequence, Cursor())}

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        role = {} if cursor.started else {"role": "assistant"}
        content = {"content": text} if text or role else {}
        return {"delta": role | content, "logprobs": self._logprobs(sequence, cursor)}

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any] | None:
        if sequence.job.params.logprobs is None:
            return None
        content = [
            self._token_logprob(token_id, logprob) | {"top_logprobs": [self._token_logprob(*other) for other in top]}
            for token_id, logprob, top in sequence.logprobs[cursor.logprobs :]
        ]
        return {"content": content, "refusal": None}

    def _token_logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def models(model: ModelInfo, name: str | None = None) -> dict[str, Any]:
    """The answer of `GET v1/models` and `v1/models/NAME`. Raises NotFound for another name."""
    _check_model(name, model)
    entry = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "torchserve",
        "max_model_len": model.max_sequence_length,
    }
    return entry if name is not None else {"object": "list", "data": [entry]}


def _check_model(name: str | None, model: ModelInfo) -> None:
    if name not in (None, model.name):
        raise NotFound(f"model: there is no {name!r} here; the model is {model.name!r}")


def _sequences(jobs: list[Job]) -> list[Sequence]:
    return [sequence for job in jobs for sequence in job.sequences]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
