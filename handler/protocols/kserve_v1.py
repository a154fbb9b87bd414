"""KServe's v1 protocol: `{"instances": […], "parameters": {…}}` -> `{"predictions": […]}`."""

from typing import Annotated, Any

from pydantic import Field, Tag

from handler.engine import InvalidRequest, Job, Request
from handler.protocols.base import Call, ModelInfo, Strict, text_or, validated


class Instance(Strict):
    data: str


Prompt = Annotated[Annotated[str, Tag("text")] | Annotated[Instance, Tag("other")], text_or(dict)]


class Predict(Strict):
    instances: Annotated[list[Prompt], Field(fail_fast=True, min_length=1)]
    parameters: dict[str, Any] = {}


def split_full_text(parameters: dict[str, Any], model: ModelInfo) -> tuple[bool, dict[str, Any]]:
    """`return_full_text`, which is ours and not the engine's, and the other parameters."""
    others = dict(parameters)
    full_text = others.pop("return_full_text", None)
    if not isinstance(full_text, bool | None):
        raise InvalidRequest("parameters.return_full_text: send true or false")
    return model.return_full_text if full_text is None else full_text, others


class PredictCall(Call):
    """One prediction an instance, in order: a string, or the list of them with num_return_sequences > 1."""

    protocol = "kserve_v1"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        predict = validated(Predict, body)
        self._model = model
        self._full_text, self._parameters = split_full_text(predict.parameters, model)
        self.prompts = [instance if isinstance(instance, str) else instance.data for instance in predict.instances]

    def request(self, prompt: str | list[int]) -> Request:
        return Request(prompt, self._parameters)

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        texts = [[self._model.text(sequence, self._full_text) for sequence in job.sequences] for job in jobs]
        return {"predictions": [several[0] if len(several) == 1 else several for several in texts]}
