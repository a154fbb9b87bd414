"""Continuous batching for any causal LM of transformers.

engine = Engine(model, tokenizer)
job = engine.submit(Request("My dog is", {"max_new_tokens": 20}))
while not job.finished:
    engine.step()
print(job.sequences[0].text)
"""

from handler.settings import EngineConfig

from .engine import Engine
from .errors import (
    EngineError,
    InvalidRequest,
    ModelError,
    OutOfMemory,
    PromptTooLong,
    QueueFull,
    QueueTimeout,
    UnsupportedModel,
)
from .request import Grammar, Request
from .sequence import Job, Sequence

__all__ = ["Engine", "EngineConfig", "Grammar", "Job", "Request", "Sequence"]
__all__ += [
    "EngineError",
    "InvalidRequest",
    "ModelError",
    "OutOfMemory",
    "PromptTooLong",
    "QueueFull",
    "QueueTimeout",
    "UnsupportedModel",
]
