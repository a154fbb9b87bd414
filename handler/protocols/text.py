"""Plain text: the prompt is the body, and so is the answer."""

from handler.engine import InvalidRequest, Job, Request
from handler.protocols.base import Call, Served


class TextCall(Call):
    """`POST /predictions/M` with text, a form part `data`, or `{"data": "…"}`: answered with text, as the sample."""

    content_type = "text/plain; charset=utf-8"

    def __init__(self, text: object, served: Served):
        if not isinstance(text, str):
            raise InvalidRequest(f"data: send a string, not {type(text).__name__}")
        self.requests = [Request(text)]
        self._served = served

    def answer(self, jobs: list[Job]) -> str:
        (job,) = jobs
        choice = job.choices[0]
        return self._served.full_text(job, choice) if self._served.return_full_text else choice.text
