"""Which HTTP status and type an error has; the engine's own tests know only its classes."""

import pytest

from handler import engine
from handler.protocols import errors
from handler.protocols.base import Call
from handler.protocols.openai import OpenAICall


@pytest.mark.parametrize(
    "kind, status, error_type",
    [
        (engine.InvalidRequest, 400, "invalid_request_error"),
        (errors.NotFound, 404, "not_found_error"),
        (errors.DeadlineExceeded, 408, "timeout_error"),
        (engine.PromptTooLong, 413, "prompt_too_long"),
        (engine.QueueFull, 429, "queue_full"),
        (engine.QueueTimeout, 503, "queue_timeout"),
        (engine.OutOfMemory, 507, "out_of_memory"),
        (engine.ModelError, 500, "server_error"),
        (errors.InternalError, 500, "server_error"),
    ],
)
def test_the_status_and_type_of_an_error(kind, status, error_type):
    error = kind("prompt: send another")
    assert Call.error_body(error) == {"error": {"code": status, "message": str(error), "type": error_type}}
    assert OpenAICall.error_body(error) == {
        "error": {"message": str(error), "type": error_type, "param": "prompt", "code": status}
    }
