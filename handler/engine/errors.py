"""What can go wrong, in the words a client should read. Which HTTP status that is, `protocols/errors.py` says."""

import logging

import torch

logger = logging.getLogger(__name__)


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


class CacheSpoiled(EngineError):
    """What the cache holds is not known any more: all rows have to be computed again."""


class UnsupportedModel(EngineError):
    """The model's cache or positions cannot be batched row by row."""


def as_engine_error(error: Exception) -> EngineError:
    """The error in words for a client, who need not know our files. The rest goes to the log, also its traceback,
    which would keep the forward's tensors alive."""
    if isinstance(error, EngineError):
        return error
    logger.error("a step failed", exc_info=error)
    if is_out_of_memory(error):
        return OutOfMemory(
            "not enough memory for this request; send a shorter prompt or ask for fewer tokens, or later"
        )
    return ModelError(f"a {type(error).__name__} in the model; the worker's log has it")


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class for it on GPUs alone."""
    words = ("not enough memory", "out of memory", "can't allocate memory")
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_known or any(word in str(error).lower() for word in words)
