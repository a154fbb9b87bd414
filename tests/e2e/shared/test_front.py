"""KServe's own model server in front of TorchServe, with the environment that KServe gives the container."""

import contextlib
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import requests

from scripts.archive import ROOT
from tests.e2e.asking import at_once, infer, overfill, predict
from tests.ports import free_port

PROMPTS = [f"My dog number {i} is cute" for i in range(8)]
STOCK = Path(__file__).with_name("kserve_front.py")
OURS = ROOT / "deploy/transformer.py"


@contextlib.contextmanager
def front(script, predictor, protocol, log, *options):
    """KServe's server, as `script` makes it, before HOST:PORT; its URL."""
    port = free_port()
    command = [ROOT / ".venv-kserve/bin/python", script]
    command += ["--model_name", "bloom", "--http_port", str(port), "--enable_grpc", "false"]
    command += ["--predictor_host", predictor, "--predictor_protocol", protocol, *options]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_alive(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_alive(url, process, log):
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.1)
    pytest.fail(f"KServe's server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module", params=[("v1", "continuous"), ("v2", "offloaded")], ids=["v1", "v2"])
def torchserve(request):
    """(protocol, a server with KServe's environment for it)."""
    protocol, server = request.param
    return protocol, request.getfixturevalue(server)


@pytest.fixture(scope="module", params=[STOCK, OURS], ids=["stock", "ours"])
def kserve(request, torchserve, tmp_path_factory):
    """(protocol, TorchServe, the front's URL)."""
    protocol, server = torchserve
    log = tmp_path_factory.mktemp("front") / "log"
    with front(request.param, f"127.0.0.1:{server.port}", protocol, log) as url:
        yield protocol, server, url


def ask(protocol, url, text, **parameters):
    return predict(url, {"data": text}, **parameters) if protocol == "v1" else infer(url, text, **parameters)


def texts(protocol, answer):
    assert answer.ok, answer.text
    return answer.json()["predictions"] if protocol == "v1" else answer.json()["outputs"][0]["data"]


def test_eight_at_once_get_what_torchserve_itself_answers(kserve, generated):
    protocol, server, url = kserve
    through = at_once(8, lambda index: ask(protocol, url, PROMPTS[index]))
    straight = [ask(protocol, server.url, text) for text in PROMPTS]
    assert [texts(protocol, answer) for answer in through] == [texts(protocol, answer) for answer in straight]
    assert [texts(protocol, answer) for answer in through] == [[generated(text)] for text in PROMPTS]
    if protocol == "v2":
        assert [answer.json()["id"] for answer in through] == PROMPTS


def test_parameters_pass_through(kserve, generated):
    protocol, _, url = kserve
    for new in (1, 12):
        assert texts(protocol, ask(protocol, url, PROMPTS[0], max_new_tokens=new)) == [generated(PROMPTS[0], new)]


MISTAKES = pytest.mark.parametrize(
    "text, parameters, status, said",
    [
        (PROMPTS[0], {"temprature": 1}, 400, "temprature"),
        ("long " * 300, {}, 413, "200"),
        (PROMPTS[0], {"max_time": 1e-4, "max_new_tokens": 100}, 408, "max_time"),
    ],
)


@MISTAKES
@pytest.mark.parametrize("kserve", [OURS], ids=["ours"], indirect=True)
def test_errors_keep_their_status_and_body(kserve, text, parameters, status, said):
    protocol, server, url = kserve
    straight, through = (ask(protocol, at, text, **parameters) for at in (server.url, url))
    assert straight.status_code == status and said in straight.text
    # How far a request came before max_time was over is the machine's affair, not the front's.
    body, expected = (re.sub(rb"after \d+ tokens", b"after N tokens", answer.content) for answer in (through, straight))
    assert (through.status_code, body) == (status, expected)
    assert through.headers["content-type"] == straight.headers["content-type"]
    assert ask(protocol, url, PROMPTS[0]).ok


@pytest.mark.parametrize("kserve", [OURS], ids=["ours"], indirect=True)
def test_a_full_queue_says_when_to_come_again(kserve):
    protocol, server, url = kserve
    refused, answered = overfill(server, lambda: ask(protocol, url, PROMPTS[0]))
    assert [(answer.status_code, answer.headers.get("retry-after")) for answer in refused] == [(429, "1")] * 16
    assert all(answer.ok for answer in answered)


@MISTAKES
@pytest.mark.parametrize("kserve", [STOCK], ids=["stock"], indirect=True)
def test_kserves_own_server_makes_every_error_a_500_that_says_which(kserve, text, parameters, status, said):
    """Should this fail one day, KServe passes statuses on, and deploy/transformer.py is no longer needed."""
    protocol, _, url = kserve
    answer = ask(protocol, url, text, **parameters)
    assert answer.status_code == 500
    assert said in answer.text and f"'code': {status}" in answer.text and f"'{status} " in answer.text
    assert ask(protocol, url, PROMPTS[0]).ok


def test_nobody_there_is_a_503(tmp_path):
    with front(OURS, f"127.0.0.1:{free_port()}", "v1", tmp_path / "log") as url:
        answer = ask("v1", url, PROMPTS[0])
    assert answer.status_code == 503
    assert "cannot be reached" in answer.json()["error"]["message"]


def test_an_answer_that_comes_too_late_is_a_504(tmp_path):
    options = ("--predictor_request_timeout_seconds", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        predictor = f"127.0.0.1:{silent.getsockname()[1]}"
        with front(OURS, predictor, "v1", tmp_path / "log", *options) as url:
            answer = ask("v1", url, PROMPTS[0])
    assert answer.status_code == 504
    assert "in time" in answer.json()["error"]["message"]
