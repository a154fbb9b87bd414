"""What can go wrong, in the words a client should read.

Each error carries the status and type that a protocol puts on the wire; the engine itself knows no HTTP.
"""


class EngineError(Exception):
    """Base of all errors of the engine. `str(error)` says what to send instead."""

    status: int = 500
    type: str = "server_error"


class InvalidRequest(EngineError):
    """A parameter is unknown, of the wrong type, out of range, or cannot be honoured."""

    status = 400
    type = "invalid_request_error"


class PromptTooLong(EngineError):
    """The request can never fit; the message holds the tokens asked for and the tokens allowed."""

    status = 413
    type = "prompt_too_long"


class QueueFull(EngineError):
    """Too many sequences wait already; the same request may succeed later."""

    status = 429
    type = "queue_full"


class OutOfMemory(EngineError):
    """The step did not fit in memory, and this job was the youngest in it. The engine still serves."""

    status = 507
    type = "out_of_memory"


class ModelError(EngineError):
    """The model's forward or its output failed for this job."""


class UnsupportedModel(EngineError):
    """The model's cache or positions cannot be batched row by row."""

    type = "unsupported_model"
