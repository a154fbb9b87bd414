"""What the wire formats share: a call is one HTTP request, what to generate for it, and how to answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from handler.engine import Choice, EngineError, InvalidRequest, Job, Request

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Served:
    """What a protocol has to know of the model it speaks for. `created`: Unix time, seconds."""

    name: str
    version: str
    tokenizer: PreTrainedTokenizerBase
    max_sequence_length: int
    return_full_text: bool
    created: int
    describe: Callable[[], dict[str, Any]]

    def full_text(self, job: Job, choice: Choice) -> str:
        """The prompt and its continuation, as `decode` gives them together."""
        return self.prompt_text(job) + choice.text

    def prompt_text(self, job: Job) -> str:
        """The prompt as `decode` gives it back, without special tokens."""
        return str(self.tokenizer.decode(job.prompt_ids, skip_special_tokens=True))


class NotFound(EngineError):
    """There is nothing at this path, or no such model; the message lists what there is."""

    status = 404
    type = "not_found_error"


class DeadlineExceeded(EngineError):
    """The request's `max_time` was over before its text was complete."""

    status = 408
    type = "timeout_error"


class Call(ABC):
    """One HTTP request. `requests` go to the engine, in order; their jobs come back in the same order."""

    requests: Sequence[Request] = ()
    stream = False
    content_type = "application/json"

    @abstractmethod
    def answer(self, jobs: list[Job]) -> Any:
        """The body, once every job is finished: text, or something that JSON can hold."""

    def part(self, jobs: list[Job]) -> str:
        """With `stream`: what is new since the last call, maybe nothing. The last part ends the stream."""
        raise NotImplementedError

    @staticmethod
    def error(error: EngineError) -> dict[str, Any]:
        """The body that tells of an error."""
        return {"error": {"code": error.status, "message": str(error), "type": error.type}}


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


def failure(jobs: list[Job]) -> EngineError | None:
    """What went wrong with one of a call's jobs, or None."""
    for job in jobs:
        if job.error:
            return job.error
        if any(choice.finish_reason == "time" for choice in job.choices):
            tokens = sum(len(choice.token_ids) for choice in job.choices)
            limit = job.request.parameters.get("max_time")
            return DeadlineExceeded(
                f"max_time of {limit} s was over after {tokens} tokens; allow more time or ask for fewer tokens"
            )
    return None
