"""Which wire format a request speaks: by its path, else by the fields of its body."""

import json
from collections.abc import Callable
from typing import Any

from handler.engine import EngineError, InvalidRequest
from handler.protocols.base import Call, ModelInfo
from handler.protocols.errors import NotFound, ProtocolError
from handler.protocols.kserve_v1 import PredictCall
from handler.protocols.open_inference import InferCall
from handler.protocols.openai import ChatCall, CompletionCall, OpenAICall, list_models
from handler.protocols.plain_text import TextCall

GENERATING_PATHS = {"v1/completions": CompletionCall, "v1/chat/completions": ChatCall}
OPERATOR = object()  # in place of a path, which no client can send: the whole description
PATHS = (*GENERATING_PATHS, "v1/models", "health", "describe")
# What of the model's description is for operators alone, on the management port.
PRIVATE = ("versions", "device_map", "products", "streaming", "draft_model")
# On a path without a protocol of its own the fields tell which one is meant.
FIELDS: dict[str, Callable[[dict[str, Any], ModelInfo], Call]] = {
    "instances": PredictCall,
    "inputs": InferCall,
    "messages": ChatCall,
    "prompt": CompletionCall,
}

NO_FORM = (
    "`curl -d` sends a form, which TorchServe drops: "
    "add -H 'Content-Type: application/json', or send text with -H 'Content-Type: text/plain'"
)


class InformationCall(Call):
    """An answer that needs no generation."""

    protocol = "information"

    def __init__(self, answer: dict[str, Any]):
        self._answer = answer

    def render(self, jobs: list) -> dict[str, Any]:
        return self._answer


class UnparsedCall(Call):
    """A request whose format is not known yet: there are only errors to tell, in OpenAI's shape on OpenAI's paths."""

    def __init__(self, path: Any):
        is_openai = isinstance(path, str) and path.strip("/").startswith("v1/")
        self._format = OpenAICall if is_openai else Call

    def render(self, jobs: list) -> Any:
        raise NotImplementedError

    def render_error(self, error: EngineError | ProtocolError) -> dict[str, Any]:
        return self._format.error_body(error)


def parse(entry: dict[str, Any], path: Any, model: ModelInfo) -> Call:
    """One request of TorchServe's batch -> a call.

    entry: `{"body": …}` or the parts of a form, values as TorchServe decoded them.
    path: what followed the model's version in `/predictions/M/VERSION/…`, or nothing.
    Raises InvalidRequest or NotFound.
    """
    if path is OPERATOR:
        return InformationCall(model.describe())
    if not isinstance(path, str):  # TorchServe keeps a part's headers under the part's name, among the request's
        raise InvalidRequest("url_path: a part of a form cannot have this name; send the part data")
    path = path.strip("/")
    if path == "health":
        return InformationCall({"status": "ok"})  # whoever can ask is answered by a model that is loaded
    if path == "describe":
        return InformationCall({name: value for name, value in model.describe().items() if name not in PRIVATE})
    if path == "v1/models" or path.startswith("v1/models/"):
        return InformationCall(list_models(model, path.removeprefix("v1/models").strip("/") or None))
    if path in GENERATING_PATHS:
        return GENERATING_PATHS[path](_json_object(_body(entry)), model)
    if path:
        raise NotFound(f"there is nothing at {path!r}; the paths are {', '.join(PATHS)}")
    return _by_fields(_body(entry), model)


def _by_fields(body: Any, model: ModelInfo) -> Call:
    if isinstance(body, bytes):
        body = _decoded(body)
        if body.lstrip().startswith("{"):
            body = _json_object(body)
    if isinstance(body, str):
        return TextCall(body, model)
    if isinstance(body, dict):
        for field, call in FIELDS.items():
            if field in body:
                return call(body, model)
        if body.keys() == {"data"}:
            return TextCall(body["data"], model)
    raise InvalidRequest(
        'send text, or a JSON object with "instances" (KServe v1), "inputs" (Open Inference v2), '
        '"messages" (chat), "prompt" (completion) or "data" (text)'
    )


def _body(entry: dict[str, Any]) -> Any:
    """The body as TorchServe decoded it: JSON, text, or bytes."""
    if entry and not {"body", "data"} & entry.keys():
        parts = ", ".join(map(repr, entry))
        raise InvalidRequest(f"data: the form has no such part; it has {parts}; {NO_FORM}")
    body = entry.get("body", entry.get("data"))
    if isinstance(body, bytearray):
        body = bytes(body)
    if body in (None, b"", ""):
        raise InvalidRequest(f"the body is empty; {NO_FORM}")
    return body


def _decoded(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")  # Windows' editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_object(body: Any) -> dict[str, Any]:
    if isinstance(body, bytes):
        body = _decoded(body)
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body
