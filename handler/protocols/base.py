"""What the wire formats share: a call is one HTTP request, what to generate for it, and how to answer."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from transformers import PreTrainedTokenizerBase

from handler.engine import EngineError, InvalidRequest, Job, Request, Sequence
from handler.protocols.errors import DeadlineExceeded, ProtocolError, message, status_and_type
from handler.protocols.token_text import TokenText

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ModelInfo:
    """What a protocol has to know of the model it speaks for.

    max_sequence_length: tokens of prompt and continuation together.
    return_full_text: whether an answer begins with the prompt, unless the request says otherwise.
    created: Unix time, seconds.
    describe: the answer to `describe`.
    """

    name: str
    version: str
    tokenizer: PreTrainedTokenizerBase
    max_sequence_length: int
    return_full_text: bool
    created: int
    describe: Callable[[], dict[str, Any]]

    @cached_property
    def token_text(self) -> TokenText:
        return TokenText(self.tokenizer)

    def text(self, sequence: Sequence, full_text: bool) -> str:
        """A sequence's text; with `full_text` the prompt before it, as `decode` gives them together."""
        return self.prompt_text(sequence.job) + sequence.text if full_text else sequence.text

    def prompt_text(self, job: Job) -> str:
        """The prompt as `decode` gives it back, without special tokens."""
        return str(self.tokenizer.decode(job.prompt_ids, skip_special_tokens=True))


class Call(ABC):
    """One HTTP request. What `request` makes of each of its prompts goes to the engine, in order; the jobs come back
    in the same order."""

    protocol = "unknown"  # its name, for whoever counts requests
    prompts: Collection[str | list[int]] = ()
    add_special_tokens = True  # whether the tokenizer adds its own to a text
    stream = False
    content_type = "application/json"

    def request(self, prompt: str | list[int]) -> Request:
        """What the engine is asked for one of the prompts."""
        raise NotImplementedError

    @abstractmethod
    def render(self, jobs: list[Job]) -> Any:
        """The body, once every job is finished: text, or something that JSON can hold."""

    def prepare(self, jobs: list[Job]) -> None:  # noqa: B027
        """Called again and again while the jobs run: what of the answer takes long to make is made bit by bit, so
        that nobody waits for all of it in the end."""

    def render_part(self, jobs: list[Job]) -> str:
        """With `stream`: what is new since the last part, maybe nothing. The last part ends the stream."""
        raise NotImplementedError

    def render_error(self, error: EngineError | ProtocolError) -> dict[str, Any]:
        """The body that tells of an error."""
        return self.error_body(error)

    @staticmethod
    def error_body(error: EngineError | ProtocolError) -> dict[str, Any]:
        """An error in this format."""
        status, kind = status_and_type(error)
        return {"error": {"code": status, "message": message(error), "type": kind}}


class Json(str):
    """A part of a body that is JSON already."""


def to_json(body: Any) -> str:
    """As `json.dumps`, with what is `Json` in dictionaries, or in lists of them, as it is."""
    if isinstance(body, Json):
        return body
    if isinstance(body, dict):
        items = (f"{json.dumps(name)}: {to_json(value)}" for name, value in body.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(body, list) and body and isinstance(body[0], dict):
        return f"[{', '.join(to_json(item) for item in body)}]"
    return json.dumps(body)


class Strict(BaseModel):
    """A body in which an unknown field is an error that names it: it is never ignored. Nor is a value made fit:
    "false" is not false, and 1e309 is no number. A null is the same as leaving the field out, also one that is not
    supported."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        """Here and not by pydantic, which would make an error of each of 100,000 unknown fields."""
        if not isinstance(body, dict):
            return body
        specified = {name: value for name, value in body.items() if value is not None}
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in specified:
            if name not in known:
                # Half a surrogate pair is no text for pydantic.
                context = {"name": name.encode(errors="replace").decode(), "known": ", ".join(known)}
                raise PydanticCustomError("unknown", "this field is not supported; send only {known}", context)
        return specified


def text_or(kind: type) -> Discriminator:
    """Tells the two members of a union apart, "text" and "other", so that an error is about the one that is meant."""
    return Discriminator(lambda value: "other" if isinstance(value, kind) else "text")


def validated(model: type[Body], body: Any) -> Body:
    """The body as `model`. Raises InvalidRequest that names the field and what it must be."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(_path(problem, body)) or "the body"
        raise InvalidRequest(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None


def _path(problem: ErrorDetails, body: Any) -> Iterator[str]:
    """Names and indexes from the body to the field, without pydantic's own names for the members of a union."""
    for part in problem["loc"]:
        inside = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        if inside:
            body = body[part]
        if inside or problem["type"] == "missing":
            yield str(part)
    if problem["type"] == "unknown":
        yield problem["ctx"]["name"]


def failure(jobs: list[Job]) -> EngineError | ProtocolError | None:
    """What went wrong with one of a call's jobs, or None."""
    for job in jobs:
        if job.error:
            return job.error
        if any(sequence.finish_reason == "time" for sequence in job.sequences):
            tokens = sum(len(sequence.token_ids) for sequence in job.sequences)
            return DeadlineExceeded(
                f"max_time of {job.params.max_time:g} s was over after {tokens} tokens; "
                "allow more time or ask for fewer tokens"
            )
    return None
