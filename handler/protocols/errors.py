"""HTTP's statuses, and the error types that clients read, for what can go wrong. The engine knows neither."""

from handler.engine import EngineError, InvalidRequest, OutOfMemory, PromptTooLong, QueueFull, QueueTimeout


class ProtocolError(Exception):
    """Base of what goes wrong outside of the engine. `str(error)` says what to send instead."""


class NotFound(ProtocolError):
    """There is nothing at this path, or no such model; the message lists what there is."""


class DeadlineExceeded(ProtocolError):
    """The request's `max_time` was over before its text was complete."""


class InternalError(ProtocolError):
    """A fault of ours; the message names nothing but its kind."""


_STATUS_AND_TYPE: dict[type[EngineError | ProtocolError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    NotFound: (404, "not_found_error"),
    DeadlineExceeded: (408, "timeout_error"),
    PromptTooLong: (413, "prompt_too_long"),
    QueueFull: (429, "queue_full"),
    QueueTimeout: (503, "queue_timeout"),
    OutOfMemory: (507, "out_of_memory"),
}


_LONGEST_MESSAGE = 1000  # characters; a message may quote a value as long as the body


def message(error: EngineError | ProtocolError) -> str:
    text = str(error)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def status_and_type(error: EngineError | ProtocolError) -> tuple[int, str]:
    return _STATUS_AND_TYPE.get(type(error), (500, "server_error"))
