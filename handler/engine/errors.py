"""What can go wrong, in the words a client should read. Which HTTP status that is, `protocols/errors.py` says."""


class EngineError(Exception):
    """Base of all errors of the engine. `str(error)` says what to send instead."""


class InvalidRequest(EngineError):
    """A parameter is unknown, of the wrong type, out of range, or cannot be honoured."""


class PromptTooLong(EngineError):
    """The request can never fit; the message holds the tokens asked for and the tokens allowed."""


class QueueFull(EngineError):
    """Too many sequences wait already; the same request may succeed later."""


class QueueTimeout(EngineError):
    """The request waited `max_wait` seconds and nothing of it has run; the same request may succeed later."""


class OutOfMemory(EngineError):
    """The step did not fit in memory, and this job was the youngest in it. The engine still serves."""


class ModelError(EngineError):
    """The model's forward or its output failed for this job."""


class UnsupportedModel(EngineError):
    """The model's cache or positions cannot be batched row by row."""
