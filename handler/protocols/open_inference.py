"""The Open Inference Protocol (KServe's v2): one BYTES tensor of prompts in, one of texts out."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from handler.engine import InvalidRequest, Job, Request
from handler.protocols.base import Call, ModelInfo, Strict, validated
from handler.protocols.kserve_v1 import split_full_text

OUTPUT = "predictions"


class InputTensor(Strict):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=16)]
    datatype: Literal["BYTES"]
    data: list[Any]
    parameters: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> "InputTensor":
        if "binary_data_size" in self.parameters:
            raise ValueError("binary data is not supported; send the strings in data")
        flat = list(flatten(self.data))
        if not all(isinstance(item, str) for item in flat):
            raise ValueError("data must be strings, also nested as shape says")
        if math.prod(self.shape) != len(flat):
            raise ValueError(f"shape {self.shape} is {math.prod(self.shape)} elements and data has {len(flat)}")
        if not flat:
            raise ValueError("data is empty; send at least one prompt")
        return self


class RequestedOutput(Strict):
    name: str
    parameters: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> "RequestedOutput":
        if self.parameters.get("binary_data"):
            raise ValueError("binary_data is not supported; leave it out, the answer is JSON")
        if self.name != OUTPUT:
            raise ValueError(f"there is no output {self.name!r}; the one there is is {OUTPUT!r}")
        return self


class Infer(Strict):
    id: str | None = None
    model_name: str | None = None  # not in the protocol; KServe's own server repeats the path's model here
    inputs: Annotated[list[InputTensor], Field(fail_fast=True, min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(fail_fast=True)] = []
    parameters: dict[str, Any] = {}


def flatten(data: list[Any]) -> Any:
    """The items of nested lists, in order."""
    for item in data:
        if isinstance(item, list):
            yield from flatten(item)
        else:
            yield item


class InferCall(Call):
    """One text a prompt, in the input's shape; with num_return_sequences > 1, in one more dimension."""

    protocol = "open_inference"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        infer = validated(Infer, body)
        if infer.model_name not in (None, model.name):
            raise InvalidRequest(
                f"model_name: {infer.model_name!r} is not served here; leave it out, or send {model.name!r}"
            )
        if infer.parameters.get("binary_data_output"):
            raise InvalidRequest("parameters.binary_data_output: not supported; leave it out, the answer is JSON")
        self._id, self._model = infer.id, model
        self._shape = infer.inputs[0].shape
        self._full_text, self._parameters = split_full_text(infer.parameters, model)
        self.prompts = list(flatten(infer.inputs[0].data))

    def request(self, prompt: str | list[int]) -> Request:
        return Request(prompt, self._parameters)

    def render(self, jobs: list[Job]) -> dict[str, Any]:
        count = len(jobs[0].sequences)
        tensor = {
            "name": OUTPUT,
            "shape": self._shape + ([count] if count > 1 else []),
            "datatype": "BYTES",
            "data": [self._model.text(sequence, self._full_text) for job in jobs for sequence in job.sequences],
        }
        answer = {"model_name": self._model.name, "model_version": self._model.version, "outputs": [tensor]}
        return answer | ({"id": self._id} if self._id is not None else {})
