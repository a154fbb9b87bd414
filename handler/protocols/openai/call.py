"""What completions and chat completions share: how they are answered, whole or in the parts of a stream."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from handler.engine import EngineError, Job, Sequence
from handler.engine.sampler import TokenLogprob
from handler.protocols.base import Call, Json, ModelInfo, failure
from handler.protocols.errors import ProtocolError, message, status_and_type
from handler.protocols.openai.models import check_model
from handler.protocols.openai.schemas import Generation
from handler.protocols.token_text import Piece, pieces

# OpenAI's finish reasons. The others end a request without an answer of its own.
FINISH_REASONS = {"stop": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's for what cannot be; JSON has no infinity


@dataclass
class Cursor:
    """How much of one sequence its client has been sent.

    text: characters of what is shown of `Sequence.text`.
    logprobs: entries of `Sequence.logprobs`.
    started, finished: whether its first part and its finish_reason are sent.
    """

    text: int = 0
    logprobs: int = 0
    started: bool = False
    finished: bool = False


class OpenAICall(Call):
    """A call that generates. OpenAI's choices are the engine's sequences, prompt by prompt, then n by n."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: Generation, model: ModelInfo):
        check_model(body.model, model)
        self._model = model
        self.stream = bool(body.stream)
        self.content_type = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._continuous_usage = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._cursors: dict[int, Cursor] = {}  # by the index of the choice
        # By its index too, and by name, the lists of a choice's log-probabilities: each in pieces of JSON.
        self._prepared: dict[int, dict[str, list[str] | None]] = {}

    def prepare(self, jobs: list[Job]) -> None:
        for index, sequence in enumerate(_sequences(jobs)):
            if sequence.token_ids and sequence.job.params.logprobs is not None:
                self._prepare_logprobs(index, sequence)

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._choice(sequence),
                "logprobs": self._all_logprobs(index, sequence),
                "finish_reason": self._finish_reason(sequence),
            }
            for index, sequence in enumerate(_sequences(jobs))
        ]
        return self._head(self.object) | {"choices": choices, "usage": self._usage(jobs)}

    def render_part(self, jobs: list[Job]) -> str:
        if error := failure(jobs):
            return _event(self.error_body(error)) + "data: [DONE]\n\n"
        chunks = [chunk for index, sequence in enumerate(_sequences(jobs)) for chunk in self._chunks(index, sequence)]
        if self._continuous_usage:
            chunks = [chunk | {"usage": self._usage(jobs)} for chunk in chunks]
        if all(job.finished for job in jobs):
            if self._include_usage:
                chunks.append(self._chunk([]) | {"usage": self._usage(jobs)})
            return "".join(map(_event, chunks)) + "data: [DONE]\n\n"
        return "".join(map(_event, chunks))

    @staticmethod
    def error_body(error: EngineError | ProtocolError) -> dict[str, Any]:
        """In OpenAI's shape. `param` is the field that the message begins with, where it names one."""
        field, colon, _ = str(error).partition(": ")
        param = field if colon and field.replace(".", "").replace("_", "").isalnum() else None
        status, kind = status_and_type(error)
        return {"error": {"message": message(error), "type": kind, "param": param, "code": status}}

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        """A whole choice of an answer, but for its index, log-probabilities and finish_reason."""
        raise NotImplementedError

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        """The log-probabilities that are not reported yet, in OpenAI's form: lists, which go on in the next ones.
        Moves `cursor.logprobs`."""
        raise NotImplementedError

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        """A choice of a chunk, but for the same: `text` is new, `cursor` says what was sent before."""
        raise NotImplementedError

    def _prepare_logprobs(self, index: int, sequence: Sequence) -> dict[str, list[str] | None]:
        """Encode those that are new. Returns all pieces so far."""
        cursor = self._cursors.setdefault(index, Cursor())
        prepared = self._prepared.setdefault(index, {})
        for name, new in self._logprobs(sequence, cursor).items():
            pieces = prepared.setdefault(name, None if new is None else [])
            if pieces is not None and new:
                pieces.append(json.dumps(new)[1:-1])
        cursor.started = True
        return prepared

    def _all_logprobs(self, index: int, sequence: Sequence) -> dict[str, Any] | None:
        if sequence.job.params.logprobs is None:
            return None
        prepared = self._prepare_logprobs(index, sequence)
        return {name: pieces and Json(f"[{', '.join(pieces)}]") for name, pieces in prepared.items()}

    def _shown(self, sequence: Sequence) -> str:
        """What of a sequence's text its client may see."""
        return sequence.text

    def _chunks(self, index: int, sequence: Sequence) -> list[dict[str, Any]]:
        """The chunk of what is new of one choice, if anything is."""
        cursor = self._cursors.setdefault(index, Cursor())
        text = self._shown(sequence)[cursor.text :]
        if cursor.finished or not (text or sequence.finished):
            return []
        choice = {
            "index": index,
            **self._delta(sequence, text, cursor),
            "logprobs": None if sequence.job.params.logprobs is None else self._logprobs(sequence, cursor),
            "finish_reason": self._finish_reason(sequence),
        }
        cursor.text += len(text)
        cursor.started, cursor.finished = True, sequence.finished
        return [self._chunk([choice])]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.chunk_object) | {"choices": choices} | ({"usage": None} if self._include_usage else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return FINISH_REASONS.get(sequence.finish_reason or "")

    def _usage(self, jobs: list[Job]) -> dict[str, int]:
        prompt = sum(len(job.prompt_ids) for job in jobs)
        completion = sum(len(sequence.token_ids) for sequence in _sequences(jobs))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _new_logprobs(self, sequence: Sequence, cursor: Cursor) -> list[tuple[Piece, TokenLogprob]]:
        """What was not reported yet of the tokens whose text is out."""
        start, ends = cursor.logprobs, sequence.text_stream.ends
        end = len(sequence.logprobs)
        if not sequence.finished:
            out = len(sequence.text)
            end = next((i for i in range(start, end) if (ends[i - 1] if i else 0) >= out or ends[i] > out), end)
        cursor.logprobs = end
        return list(zip(pieces(sequence.text_stream, start, end), sequence.logprobs[start:end], strict=True))


def _sequences(jobs: list[Job]) -> list[Sequence]:
    return [sequence for job in jobs for sequence in job.sequences]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def finite(logprob: float) -> float:
    """The same, or the least that is sent."""
    return max(logprob, LEAST_LOGPROB)
