"""One HTTP request from its first byte to its last: what to reply now, and whether more follows."""

import logging
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from handler.engine import Engine, EngineError, Job
from handler.protocols.base import Call, ModelInfo, failure
from handler.protocols.errors import InternalError, ProtocolError, status_and_type
from handler.protocols.router import UnparsedCall, parse

logger = logging.getLogger(__name__)

RETRY_AFTER = "1"  # seconds, for a client that meets a full queue


@dataclass(frozen=True)
class Reply:
    """What goes to TorchServe for one request. `more`: True for a part that others follow, False for the last
    part, None for an answer that is complete at once."""

    body: Any
    more: bool | None = None
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return HTTPStatus(self.status).phrase


class OpenRequest:
    """A request that is being answered. The first reply fixes its status, so it comes as late as it can."""

    def __init__(self, entry: dict[str, Any], path: str, model: ModelInfo, engine: Engine):
        """Parse the request and submit its jobs, all or none. What is wrong with it becomes its reply."""
        self._engine = engine
        self._jobs: list[Job] = []
        self._started = False  # the first part is sent: the status is fixed, and a hang-up is noticed
        self._error: EngineError | ProtocolError | None = None
        self._call: Call = UnparsedCall(path)
        try:
            self._call = parse(entry, path, model)
            for request in self._call.requests:
                self._jobs.append(engine.submit(request))
        except Exception as error:
            self._fail(error)

    @property
    def finished(self) -> bool:
        return self._error is not None or all(job.finished for job in self._jobs)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
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
        return Reply(body, False if self._started else None, content_type=self._call.content_type)

    def _part(self, watch: bool) -> Reply | None:
        body = self._call.render_part(self._jobs) if self._call.stream else ""
        has_tokens = any(sequence.token_ids for job in self._jobs for sequence in job.sequences)
        has_deadline = any(job.deadline for job in self._jobs)
        may_start = has_tokens and not has_deadline and not self._call.stream
        if not body and not (watch and (self._started or may_start)):
            return None
        self._started = True
        return Reply(body, more=True, content_type=self._call.content_type)

    def _error_reply(self, error: EngineError | ProtocolError) -> Reply:
        status, _ = status_and_type(error)
        headers = {"Retry-After": RETRY_AFTER} if status == HTTPStatus.TOO_MANY_REQUESTS else {}
        more = False if self._started else None
        return Reply(self._call.render_error(error), more, status, headers=headers)

    def _fail(self, error: Exception) -> EngineError | ProtocolError:
        """End the request with this error, or with what a client may know of it."""
        self.cancel()
        if not isinstance(error, EngineError | ProtocolError):
            logger.error("a request failed through a fault of ours", exc_info=error)
            error = InternalError(f"an error on our side, {type(error).__name__}; the worker's log has it")
        self._error = error
        return error
