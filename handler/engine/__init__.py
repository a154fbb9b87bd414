"""Continuous batching for any causal LM of transformers.

engine = Engine(model, tokenizer)
job = engine.submit(Request("My dog is", {"max_new_tokens": 20}))
while not job.finished:
    engine.step()
print(job.choices[0].text)
"""

from .engine import Engine
from .errors import (
    EngineError,
    InvalidRequest,
    ModelError,
    OutOfMemory,
    PromptTooLong,
    QueueFull,
    UnsupportedModel,
)
from .job import Choice, Job, Request

__all__ = [
    "Choice",
    "Engine",
    "EngineError",
    "InvalidRequest",
    "Job",
    "ModelError",
    "OutOfMemory",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "UnsupportedModel",
]
