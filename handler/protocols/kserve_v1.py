"""KServe's v1 protocol: `{"instances": […], "parameters": {…}}` -> `{"predictions": […]}`."""

from typing import Annotated, Any

from pydantic import Field

from handler.engine import Job, Request
from handler.protocols.base import Call, ModelInfo, Strict, validated


class Instance(Strict):
    data: str


class Predict(Strict):
    instances: Annotated[list[str | Instance], Field(min_length=1)]
    parameters: dict[str, Any] = {}


def split_full_text(parameters: dict[str, Any], model: ModelInfo) -> tuple[bool, dict[str, Any]]:
    """`return_full_text`, which is ours and not the engine's, and the other parameters."""
    others = dict(parameters)
    return bool(others.pop("return_full_text", model.return_full_text)), others


class PredictCall(Call):
    """One prediction an instance, in order: a string, or the list of them with num_return_sequences > 1."""

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        predict = validated(Predict, body)
        self._model = model
        self._full_text, parameters = split_full_text(predict.parameters, model)
        prompts = [instance if isinstance(instance, str) else instance.data for instance in predict.instances]
        self.requests = [Request(prompt, parameters) for prompt in prompts]

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        texts = [[self._model.text(sequence, self._full_text) for sequence in job.sequences] for job in jobs]
        return {"predictions": [several[0] if len(several) == 1 else several for several in texts]}
