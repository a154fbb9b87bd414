"""`v1/models`: the one model there is."""

from typing import Any

from handler.protocols.base import ModelInfo
from handler.protocols.errors import NotFound


def list_models(model: ModelInfo, name: str | None = None) -> dict[str, Any]:
    """The answer of `GET v1/models` and `v1/models/NAME`. Raises NotFound for another name."""
    check_model(name, model)
    entry = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "torchserve",
        "max_model_len": model.max_sequence_length,
    }
    return entry if name is not None else {"object": "list", "data": [entry]}


def check_model(name: str | None, model: ModelInfo) -> None:
    """Raises NotFound for the name of another model."""
    if name not in (None, model.name):
        raise NotFound(f"model: there is no {name!r} here; the model is {model.name!r}")
