"""KServe's v1 protocol: `{"instances": […], "parameters": {…}}` -> `{"predictions": […]}`."""

from typing import Annotated, Any

from pydantic import Field

from handler.engine import Job, Request
from handler.protocols.base import Call, Served, Strict, validated


class Instance(Strict):
    data: str


class Predict(Strict):
    instances: Annotated[list[str | Instance], Field(min_length=1)]
    parameters: dict[str, Any] = {}


def take_full_text(parameters: dict[str, Any], served: Served) -> tuple[bool, dict[str, Any]]:
    """`return_full_text`, which is ours and not the engine's, and the other parameters."""
    rest = dict(parameters)
    return bool(rest.pop("return_full_text", served.return_full_text)), rest


def texts(served: Served, job: Job, full_text: bool) -> list[str]:
    """A job's texts, one a choice."""
    return [served.full_text(job, choice) if full_text else choice.text for choice in job.choices]


class PredictCall(Call):
    """One prediction an instance, in order: a string, or the list of them with num_return_sequences > 1."""

    def __init__(self, body: dict[str, Any], served: Served):
        predict = validated(Predict, body)
        self._served = served
        self._full_text, parameters = take_full_text(predict.parameters, served)
        prompts = [one if isinstance(one, str) else one.data for one in predict.instances]
        self.requests = [Request(prompt, parameters) for prompt in prompts]

    def answer(self, jobs: list[Job]) -> dict[str, Any]:
        found = [texts(self._served, job, self._full_text) for job in jobs]
        return {"predictions": [several[0] if len(several) == 1 else several for several in found]}
