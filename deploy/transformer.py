"""KServe's model server before TorchServe, which passes TorchServe's errors on as they are.

The server of the `kserve` package answers 500 to whatever fails behind it (`generic_exception_handler` in its
errors.py), so a client cannot tell a prompt that is too long (413) from a full queue (429, with Retry-After).
Start a transformer of your own from this file: it needs `pip install kserve` and nothing else of this package.

    python transformer.py --model_name bloom --predictor_host HOST:PORT --predictor_protocol v1
"""

import httpx
import kserve
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from kserve.model_server import app, parser

PASSED_ON = ("content-type", "retry-after")


class Transformer(kserve.Model):
    """Override `preprocess` and `postprocess`; as it is, requests and answers pass unchanged."""

    def __init__(self, name: str):
        super().__init__(name)
        self.ready = True


@app.exception_handler(httpx.HTTPStatusError)
async def answered_with_an_error(_: Request, error: httpx.HTTPStatusError) -> Response:
    """TorchServe's answer: its status, its body, and when to come again."""
    answer = error.response
    headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
    return Response(answer.content, answer.status_code, headers)


@app.exception_handler(httpx.TransportError)
async def did_not_answer(_: Request, error: httpx.TransportError) -> Response:
    """504 when TorchServe took longer than --predictor_request_timeout_seconds, else 503."""
    status, message = 503, "cannot be reached, or broke off: send the request again"
    if isinstance(error, httpx.ReadTimeout):
        status, message = 504, "did not answer in time"
    content = {"error": {"code": status, "message": f"TorchServe {message}", "type": type(error).__name__}}
    return JSONResponse(content, status)


if __name__ == "__main__":
    kserve.ModelServer().start([Transformer(parser.parse_args().model_name)])
