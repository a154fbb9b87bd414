"""One HTTP request from its first byte to its last: what to reply now, and whether more follows."""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from handler.engine import Engine, EngineError, InvalidRequest, Job
from handler.protocols.base import Call, ModelInfo, failure, to_json
from handler.protocols.errors import InternalError, ProtocolError, status_and_type
from handler.protocols.router import UnparsedCall, parse

logger = logging.getLogger(__name__)

RETRY_AFTER = "1"  # seconds, for a client that meets a full queue, or one that does not move
# Requests with more characters and values than these are parsed beside the running step, one after the other.
_LARGE = 16_384
_MOST_LOGPROBS = 2**18  # of one request: every 80 or so bytes of the answer, and more while it is made
_MOST_ECHOED_LOGPROBS = 2**14  # of one prompt: they are all made at once
_LARGEST_ANSWER = 2**25  # bytes, well below TorchServe's max_response_size
_PARSER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parser")


@dataclass(frozen=True)
class Reply:
    """What goes to TorchServe for one request. `more`: True for a part that others follow, False for the last
    part, None for an answer that is complete at once. `body` is text, maybe JSON's."""

    body: str
    more: bool | None = None
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return HTTPStatus(self.status).phrase


class OpenRequest:
    """A request that is being answered. The first reply fixes its status, so it comes as late as it can."""

    def __init__(self, entry: dict[str, Any], path: Any, model: ModelInfo, engine: Engine):
        """Parse the request and submit its jobs, all or none: at once, or for a large one when another thread has
        parsed it. What is wrong with it becomes its reply."""
        self.received_at = time.monotonic()
        self._engine = engine
        self._jobs: list[Job] = []
        self._started = False  # the first part is sent: the status is fixed, and a hang-up is noticed
        self._error: EngineError | ProtocolError | None = None
        self._call: Call = UnparsedCall(path)
        self._parsed: Future[Call] | None = None
        if _is_large(entry):
            self._parsed = _PARSER.submit(_parse, entry, path, model, engine)
        else:
            self._submit(lambda: _parse(entry, path, model, engine))

    def _submit(self, parsed: Callable[[], Call]) -> None:
        self._parsed = None
        try:
            self._call = parsed()
            for prompt in self._call.prompts:
                request = self._call.request(prompt)
                request.group = self._jobs[0].id if self._jobs else request.id
                self._jobs.append(self._engine.submit(request))
                _check_count(len(self._call.prompts), self._jobs[0].params.n, self._engine)
                _check_logprobs(len(self._call.prompts), self._jobs[-1])
        except RecursionError:
            self._fail(InvalidRequest("the body is nested too deeply; send one that is flatter"))
        except Exception as error:
            self._fail(error)

    def poll(self, timeout: float) -> None:
        """Submit a large request once it is parsed. timeout: seconds to wait for that."""
        if self._parsed and wait([self._parsed], timeout).done:
            self._submit(self._parsed.result)

    @property
    def finished(self) -> bool:
        return self._error is not None or (self._parsed is None and all(job.finished for job in self._jobs))

    @property
    def jobs(self) -> Collection[Job]:
        """What the engine has of it."""
        return self._jobs

    @property
    def protocol(self) -> str:
        """The name of its wire format; "unknown" before it is parsed, and of one that could not be."""
        return self._call.protocol

    @property
    def status(self) -> int:
        """HTTP's, of how it has ended; of an error in the middle of an answer too, whose client has read 200."""
        error = self._error or failure(self._jobs)
        return status_and_type(error)[0] if error else 200

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._parsed:
            self._parsed.cancel()
        for job in self._jobs:
            self._engine.cancel(job.id)

    def reply(self, watch: bool) -> Reply | None:
        """What to send now; None for nothing yet.

        watch: start the reply of a request that runs with an empty part, because TorchServe notices a hang-up only
            on requests that it gets parts for. Not before its first token, when most of what can fail has not
            failed, and not with a deadline, which has a status of its own and frees the row by itself.
        """
        try:
            return self._whole() if self.finished else self._part(watch)
        except Exception as error:
            return self._error_reply(self._fail(error))

    def _whole(self) -> Reply:
        if self._error:
            return self._error_reply(self._error)
        if self._started and self._call.stream:
            return Reply(self._call.render_part(self._jobs), more=False)
        if error := failure(self._jobs):
            return self._error_reply(error)
        body = self._call.render_part(self._jobs) if self._call.stream else self._call.render(self._jobs)
        body = body if isinstance(body, str) else to_json(body)
        if len(body) > _LARGEST_ANSWER:
            raise InvalidRequest(
                f"n: the answer has {len(body)} bytes, at most {_LARGEST_ANSWER} can be sent; ask for fewer or shorter"
            )
        return Reply(body, False if self._started else None, content_type=self._call.content_type)

    def _part(self, watch: bool) -> Reply | None:
        body = ""
        if self._call.stream:
            body = self._call.render_part(self._jobs)
        else:
            self._call.prepare(self._jobs)
        has_tokens = any(sequence.token_ids for job in self._jobs for sequence in job.sequences)
        has_deadline = any(job.deadline for job in self._jobs)
        may_start = has_tokens and not has_deadline and not self._call.stream
        if not body and not (watch and (self._started or may_start)):
            return None
        self._started = True
        return Reply(body, more=True, content_type=self._call.content_type)

    def _error_reply(self, error: EngineError | ProtocolError) -> Reply:
        status, _ = status_and_type(error)
        comes_too_early = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        headers = {"Retry-After": RETRY_AFTER} if comes_too_early else {}
        more = False if self._started else None
        return Reply(to_json(self._call.render_error(error)), more, status, headers=headers)

    def _fail(self, error: Exception) -> EngineError | ProtocolError:
        """End the request with this error, or with what a client may know of it."""
        self.cancel()
        if not isinstance(error, EngineError | ProtocolError):
            logger.error("a request failed through a fault of ours", exc_info=error)
            error = InternalError(f"an error on our side, {type(error).__name__}; the worker's log has it")
        self._error = error
        return error


def _parse(entry: dict[str, Any], path: Any, model: ModelInfo, engine: Engine) -> Call:
    """The call, its prompts tokenized."""
    call = parse(entry, path, model)
    _check_count(len(call.prompts), 1, engine)
    call.prompts = [engine.encode(prompt, call.add_special_tokens) for prompt in call.prompts]
    return call


def _check_count(prompts: int, n: int, engine: Engine) -> None:
    """Raises InvalidRequest for what could never wait together: a full queue has room again later, but not for all of
    this."""
    if prompts * n > engine.max_queue:
        raise InvalidRequest(
            f"n: {prompts} prompts with {n} answers each are more than the {engine.max_queue} sequences that may wait; "
            "send fewer prompts in one request, or a smaller n"
        )


def _check_logprobs(prompts: int, job: Job) -> None:
    """Raises InvalidRequest for more log-probabilities than can be made and sent beside others' answers."""
    params = job.params
    if params.logprobs is None:
        return
    each = 1 + params.logprobs
    echoed = each * len(job.prompt_ids) if params.prompt_logprobs else 0
    if echoed > _MOST_ECHOED_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: {each} for each of the prompt's {len(job.prompt_ids)} tokens are more than "
            f"{_MOST_ECHOED_LOGPROBS}; ask for fewer, or without echo"
        )
    count = prompts * params.n * (each * params.max_new_tokens + echoed)
    if count > _MOST_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: {each} for each token of the answers would be {count}, at most {_MOST_LOGPROBS} can be sent; "
            "ask for fewer, or for fewer or shorter answers"
        )


def _is_large(entry: dict[str, Any]) -> bool:
    """Whether characters and values together are more than `_LARGE`; does not look further than that."""
    size, rest = 0, [entry]
    while rest and size <= _LARGE:
        value = rest.pop()
        size += len(value) if isinstance(value, str | bytes | bytearray | list | dict) else 1
        if isinstance(value, dict):
            rest += [*value, *value.values()][:_LARGE]
        elif isinstance(value, list):
            rest += value[:_LARGE]
    return size > _LARGE
