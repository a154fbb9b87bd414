"""Plain text: the prompt is the body, and so is the answer."""

from handler.engine import InvalidRequest, Job, Request
from handler.protocols.base import Call, ModelInfo


class TextCall(Call):
    """`POST /predictions/M` with text, a form part `data`, or `{"data": "…"}`: answered with text, as the sample."""

    protocol = "plain_text"
    content_type = "text/plain; charset=utf-8"

    def __init__(self, text: object, model: ModelInfo):
        if not isinstance(text, str):
            raise InvalidRequest(f"data: send a string, not {type(text).__name__}")
        self.prompts = [text]
        self._model = model

    def request(self, prompt: str | list[int]) -> Request:
        return Request(prompt)

    def render(self, jobs: list[Job]) -> str:
        (job,) = jobs
        return self._model.text(job.sequences[0], self._model.return_full_text)
