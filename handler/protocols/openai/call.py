"""What completions and chat completions share: ids, choices, usage, errors, and the frame of a stream."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from handler.engine import EngineError, Job, Sequence
from handler.protocols.base import Call, ModelInfo, failure
from handler.protocols.errors import NotFound, ProtocolError, error_type, http_status
from handler.protocols.openai.schemas import Generation

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
        if body.model not in (None, model.name):
            raise NotFound(f"model: there is no {body.model!r} here; the model is {model.name!r}")
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
            return _event(self.render_error(error)) + "data: [DONE]\n\n"
        chunks = [chunk for index, sequence in enumerate(_sequences(jobs)) for chunk in self._chunks(index, sequence)]
        if self._continuous_usage:
            chunks = [chunk | {"usage": self._count(jobs)} for chunk in chunks]
        if all(job.finished for job in jobs):
            if self._usage:
                chunks.append(self._chunk([]) | {"usage": self._count(jobs)})
            return "".join(map(_event, chunks)) + "data: [DONE]\n\n"
        return "".join(map(_event, chunks))

    @staticmethod
    def render_error(error: EngineError | ProtocolError) -> dict[str, Any]:
        """In OpenAI's shape. `param` is the field that the message begins with, where it names one."""
        field, colon, _ = str(error).partition(": ")
        param = field if colon and field.replace(".", "").replace("_", "").isalnum() else None
        return {"error": {"message": str(error), "type": error_type(error), "param": param, "code": http_status(error)}}

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


class ModelsCall(Call):
    """`GET v1/models` and `v1/models/NAME`."""

    def __init__(self, model: ModelInfo, name: str | None = None):
        if name not in (None, model.name):
            raise NotFound(f"model: there is no {name!r} here; the model is {model.name!r}")
        self._model, self._one = model, name is not None

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        model = {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "torchserve",
            "max_model_len": self._model.max_sequence_length,
        }
        return model if self._one else {"object": "list", "data": [model]}

    render_error = staticmethod(OpenAICall.render_error)


def _sequences(jobs: list[Job]) -> list[Sequence]:
    return [sequence for job in jobs for sequence in job.sequences]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
