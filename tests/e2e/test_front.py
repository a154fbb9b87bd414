"""KServe's own model server in front of TorchServe, with the environment that KServe gives the container."""

import contextlib
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from scripts.archive import ROOT
from scripts.torchserve import free_port

PROMPTS = [f"My dog number {i} is cute" for i in range(8)]


@contextlib.contextmanager
def front(server, protocol, log):
    """KServe's server before `server`; its URL."""
    port = free_port()
    command = [ROOT / ".venv-kserve/bin/python", Path(__file__).with_name("kserve_front.py")]
    command += ["--model_name", "bloom", "--http_port", str(port), "--enable_grpc", "false"]
    command += ["--predictor_host", f"127.0.0.1:{server.port}", "--predictor_protocol", protocol]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_alive(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_alive(url, process, log):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.1)
    pytest.fail(f"KServe's server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module", params=[("v1", "kserve"), ("v2", "kservev2")], ids=["v1", "v2"])
def kserve(request, serving, bloom, tmp_path_factory):
    """(protocol, TorchServe, the front's URL). `enable_envvars_config` is what would let the envelope in."""
    protocol, envelope = request.param
    environment = {"TS_SERVICE_ENVELOPE": envelope, "PROTOCOL_VERSION": protocol}
    settings = {"max_new_tokens": 8, "max_sequence_length": 128}
    log = tmp_path_factory.mktemp("front") / "log"
    with serving(bloom, settings, environment=environment) as server, front(server, protocol, log) as url:
        yield protocol, server, url


def ask(protocol, url, text, **parameters):
    if protocol == "v1":
        body = {"instances": [{"data": text}], "parameters": parameters}
        return requests.post(f"{url}/v1/models/bloom:predict", json=body, timeout=60)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    body = {"id": text, "inputs": [tensor], "parameters": parameters}
    return requests.post(f"{url}/v2/models/bloom/infer", json=body, timeout=60)


def texts(protocol, answer):
    assert answer.ok, answer.text
    return answer.json()["predictions"] if protocol == "v1" else answer.json()["outputs"][0]["data"]


def test_eight_at_once_get_what_torchserve_itself_answers(kserve):
    protocol, server, url = kserve
    with ThreadPoolExecutor(8) as pool:
        through = list(pool.map(lambda text: ask(protocol, url, text), PROMPTS))
    straight = [ask(protocol, server.url, text) for text in PROMPTS]
    assert [texts(protocol, answer) for answer in through] == [texts(protocol, answer) for answer in straight]
    assert all(texts(protocol, answer)[0].startswith(text) for answer, text in zip(through, PROMPTS, strict=True))
    if protocol == "v2":
        assert [answer.json()["id"] for answer in through] == PROMPTS


def test_parameters_pass_through(kserve):
    protocol, _, url = kserve
    (short,), (long,) = (texts(protocol, ask(protocol, url, PROMPTS[0], max_new_tokens=n)) for n in (1, 8))
    assert long.startswith(short) and len(long) > len(short)


@pytest.mark.parametrize(
    "text, parameters, status, said",
    [
        (PROMPTS[0], {"temprature": 1}, 400, "temprature"),
        ("long " * 300, {}, 413, "127"),
        (PROMPTS[0], {"max_time": 1e-4, "max_new_tokens": 100}, 408, "max_time"),
    ],
)
def test_errors_keep_what_they_say_and_torchserve_keeps_the_status(kserve, text, parameters, status, said):
    """KServe's server answers 500 to whatever failed behind it; the status is in the message it passes on."""
    protocol, server, url = kserve
    straight, through = (ask(protocol, at, text, **parameters) for at in (server.url, url))
    assert (straight.status_code, said in straight.text) == (status, True), straight.text
    assert through.status_code == 500
    assert said in through.text and f"'code': {status}" in through.text and f"'{status} " in through.text
    assert ask(protocol, url, PROMPTS[0]).ok
