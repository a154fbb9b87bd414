"""What the wire formats share: a call is one HTTP request, what to generate for it, and how to answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from handler.engine import EngineError, InvalidRequest, Job, Request, Sequence
from handler.protocols.errors import DeadlineExceeded, ProtocolError, status_and_type

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

    def text(self, sequence: Sequence, full_text: bool) -> str:
        """A sequence's text; with `full_text` the prompt before it, as `decode` gives them together."""
        return self.prompt_text(sequence.job) + sequence.text if full_text else sequence.text

    def prompt_text(self, job: Job) -> str:
        """The prompt as `decode` gives it back, without special tokens."""
        return str(self.tokenizer.decode(job.prompt_ids, skip_special_tokens=True))


class Call(ABC):
    """One HTTP request. `requests` go to the engine, in order; their jobs come back in the same order."""

    requests: Collection[Request] = ()
    stream = False
    content_type = "application/json"

    @abstractmethod
    def render(self, jobs: list[Job]) -> Any:
        """The body, once every job is finished: text, or something that JSON can hold."""

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
        return {"error": {"code": status, "message": str(error), "type": kind}}


class Strict(BaseModel):
    """A body in which an unknown field is an error that names it: it is never ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def validated(model: type[Body], body: Any) -> Body:
    """The body as `model`. Raises InvalidRequest that names the field and what it must be."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the body"
        if problem["type"] == "extra_forbidden":
            raise InvalidRequest(
                f"{where}: this field is not supported; send only {', '.join(model.model_fields)}"
            ) from None
        raise InvalidRequest(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None


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
