"""How completions and chat completions are answered: whole, or in the parts of a stream."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from handler.engine import EngineError, InvalidRequest, Job, PromptTooLong, Request, Sequence
from handler.engine.sampler import TokenLogprob
from handler.protocols.base import Call, Json, ModelInfo, failure, validated
from handler.protocols.errors import NotFound, ProtocolError, message, status_and_type
from handler.protocols.openai.schemas import Chat, Completion, Generation
from handler.protocols.openai.tools import certain_content, split_calls
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
        _check_model(body.model, model)
        self._model = model
        self.stream = bool(body.stream)
        self.content_type = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
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
        return {"error": {"message": message(error), "type": kind, "param": param, "code": status}}

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        """A whole choice of an answer, but for its index, log-probabilities and finish_reason."""
        raise NotImplementedError

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        """The log-probabilities that are not reported yet, in OpenAI's form: lists, which go on in the next ones.
        Moves `cursor.logprobs`."""
        raise NotImplementedError

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        """A choice of a chunk: `text` is new, `cursor` says what was sent before."""
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
        delta = self._delta(sequence, text, cursor)
        cursor.text += len(text)
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

    def _new_logprobs(self, sequence: Sequence, cursor: Cursor) -> list[tuple[Piece, TokenLogprob]]:
        """What was not reported yet of the tokens whose text is out."""
        start, ends = cursor.logprobs, sequence.text_stream.ends
        end = len(sequence.logprobs)
        if not sequence.finished:
            out = len(sequence.text)
            end = next((i for i in range(start, end) if (ends[i - 1] if i else 0) >= out or ends[i] > out), end)
        cursor.logprobs = end
        return list(zip(pieces(sequence.text_stream, start, end), sequence.logprobs[start:end], strict=True))


class CompletionCall(OpenAICall):
    """`v1/completions`: one prompt or several, as text or as token ids."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        completion = validated(Completion, body)
        super().__init__(completion, model)
        self._echo = bool(completion.echo)
        # The engine generates at least one token; with max_tokens 0 it is left out of the answer.
        self._prompt_only = completion.max_tokens == 0
        if self._prompt_only:
            completion = completion.model_copy(update={"max_tokens": 1})
        self._completion, self.prompts = completion, completion.prompt

    def request(self, prompt: str | list[int]) -> Request:
        logprobs = self._completion.logprobs
        return self._completion.request(prompt, logprobs, self._echo and logprobs is not None)

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        text = "" if self._prompt_only else sequence.text
        return {"text": self._model.prompt_text(sequence.job) + text if self._echo else text}

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
        job, tokens, entries = sequence.job, self._model.token_text, list[tuple[Piece, int, TokenLogprob | None]]()
        if self._echo and not cursor.started:
            entries += zip(tokens.of_prompt(job.prompt_ids), job.prompt_ids, job.prompt_logprobs, strict=True)
        if not self._prompt_only:
            start = len(self._model.prompt_text(job)) if self._echo else 0
            new = self._new_logprobs(sequence, cursor)
            entries += [(Piece(piece.text, start + piece.end), entry[0], entry) for piece, entry in new]
        shown = [tokens.shown(token_id, piece) for piece, token_id, _ in entries]
        tops = [
            entry and {tokens.own(other)[0]: _finite(logprob) for other, logprob in entry[2]} for *_, entry in entries
        ]
        return {
            "tokens": [text for text, _ in shown],
            "token_logprobs": [entry and _finite(entry[1]) for *_, entry in entries],
            "top_logprobs": tops if job.params.logprobs else None,
            "text_offset": [
                piece.end - len(piece.text if data else text)
                for (piece, *_), (text, data) in zip(entries, shown, strict=True)
            ],
        }


class ChatCall(OpenAICall):
    """`v1/chat/completions`: messages, through the tokenizer's chat template, which writes special tokens too."""

    add_special_tokens = False

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        _check_message_count(body.get("messages"), model)
        chat = validated(Chat, body)
        super().__init__(chat, model)
        self._chat = chat
        self._tools = {tool.function.name for tool in chat.offered_tools()}
        self._split: dict[int, tuple[str, list[dict[str, Any]]]] = {}  # content and calls, by the index of the choice
        self.prompts = [_prompt(chat, model)]

    def request(self, prompt: str | list[int]) -> Request:
        request = self._chat.request(prompt, (self._chat.top_logprobs or 0) if self._chat.logprobs else None)
        # Templates end a message with the tokenizer's eos token, whatever generation_config.json says.
        eos = self._model.tokenizer.eos_token_id
        request.eos_token_ids = () if eos is None else (eos,)
        return request

    def _shown(self, sequence: Sequence) -> str:
        if not self._tools:
            return sequence.text
        return self._content_and_calls(sequence)[0] if sequence.finished else certain_content(sequence.text)

    def _content_and_calls(self, sequence: Sequence) -> tuple[str, list[dict[str, Any]]]:
        """Of a sequence that is finished. Made once, because the calls get their ids here."""
        if sequence.index not in self._split:
            content, calls = split_calls(sequence.text, self._tools)
            self._split[sequence.index] = content, calls if self._chat.parallel_tool_calls else calls[:1]
        return self._split[sequence.index]

    def _finish_reason(self, sequence: Sequence) -> str | None:
        reason = super()._finish_reason(sequence)
        return "tool_calls" if reason == "stop" and self._content_and_calls(sequence)[1] else reason

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        content, calls = self._content_and_calls(sequence)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message}

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        delta: dict[str, Any] = {} if cursor.started else {"role": "assistant"}
        if text or delta:
            delta["content"] = text
        if sequence.finished and (calls := self._content_and_calls(sequence)[1]):
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        asked = sequence.job.params.logprobs is not None
        return {"delta": delta, "logprobs": self._logprobs(sequence, cursor) if asked else None}

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        tokens = self._model.token_text
        content = [
            _token_logprob(*tokens.shown(token_id, piece), logprob)
            | {"top_logprobs": [_token_logprob(*tokens.own(other), value) for other, value in top]}
            for piece, (token_id, logprob, top) in self._new_logprobs(sequence, cursor)
        ]
        return {"content": content, "refusal": None}


def _check_message_count(messages: Any, model: ModelInfo) -> None:
    """Raises PromptTooLong for more messages than the model takes tokens, before any time is spent on them."""
    if isinstance(messages, list) and len(messages) > model.max_sequence_length:
        raise PromptTooLong(f"messages: there are {len(messages)}, at most {model.max_sequence_length} tokens fit")


def _prompt(chat: Chat, model: ModelInfo) -> str:
    """The conversation as the model's chat template writes it. Raises InvalidRequest."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise InvalidRequest("messages: this model's tokenizer has no chat template; use completions with a prompt")
    tools: list[Any] | None = [tool.for_template() for tool in chat.offered_tools()] or None
    template = tokenizer.get_chat_template(None, tools)
    if tools and "tools" not in template:
        raise InvalidRequest("tools: this model's chat template has no place for them; leave them out")
    if any(message.tool_calls for message in chat.messages) and "tool_calls" not in template:
        raise InvalidRequest("messages: this model's chat template has no place for tool_calls; leave them out")
    messages = [message.for_template() for message in chat.messages]
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))
        text.encode()
        return text
    except Exception as error:  # the template is the model's own program; half a surrogate pair is no text
        raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None


def _token_logprob(text: str, data: bytes | None, logprob: float) -> dict[str, Any]:
    known = data if data else None if "\ufffd" in text else text.encode()
    return {"token": text, "logprob": _finite(logprob), "bytes": None if known is None else list(known)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


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
