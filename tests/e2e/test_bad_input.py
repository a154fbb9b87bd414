"""The corpus of bad input, and what schemathesis makes of docs/openapi.yaml, against the real TorchServe."""

import contextlib
import json
import shutil
import socket
import threading
import time

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from transformers import AutoTokenizer

from tests.protocols.conftest import CHAT_TEMPLATE
from tests.protocols.corpus import MAX_PROMPT_TOKENS, OPENAPI, PROMPT, corpus, wrong

STREAM = {"prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MAX_REQUEST_SIZE = 2**20  # of config.properties
EVERY = 5  # of the corpus: all of it goes through the same code without a server, in tests/protocols


@pytest.fixture(scope="module")
def server(bloom, serving, tmp_path_factory):
    folder = shutil.copytree(bloom, tmp_path_factory.mktemp("bad-input") / "bloom")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    limits = {"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_sequence_length": 256, "max_queue": 8, "max_batch_size": 4}
    # With a short time slice nobody waits long beside the neighbour's stream, and the test is through sooner.
    with serving(folder, {"max_new_tokens": 8, "time_slice_ms": 5, **limits}, "no-archive") as server:
        yield server


class Neighbour:
    """A client that streams the same completion again and again until it is told to stop."""

    def __init__(self, url):
        self.texts, self.longest_gap, self._url = [], 0.0, f"{url}/predictions/bloom/1.0/v1/completions"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self.texts.append(self.text())
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def text(self):
        lines = []
        with requests.post(self._url, json=STREAM, stream=True, timeout=60) as answer:
            last = time.monotonic()  # the wait for the first part is no pause
            for line in filter(None, answer.iter_lines()):
                self.longest_gap = max(self.longest_gap, time.monotonic() - last)
                last = time.monotonic()
                lines.append(line.removeprefix(b"data: "))
        assert lines.pop() == b"[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    def _run(self):
        while not self._stopped.is_set():
            self.texts.append(self.text())


def send(server, case):
    """(status, body) of the answer."""
    url = server.url + case.path
    if isinstance(case.body, dict):
        answer = requests.post(url, files={name: (None, value) for name, value in case.body.items()}, timeout=60)
    else:
        headers = {"Content-Type": case.content_type} if case.content_type else {}
        answer = requests.post(url, data=case.body, headers=headers, timeout=60)
    answer.encoding = "utf-8"
    is_json = answer.headers.get("Content-Type", "").startswith("application/json")
    return answer.status_code, answer.json() if is_json else answer.text


def test_the_corpus_beside_a_stream(server):
    cases, failures, slowest = corpus()[::EVERY], [], 0.0
    # TorchServe has a 500 of its own for a part without a name, and trims names.
    cases = [case for case in cases if case.name not in ("a part ''", "a part 'body '", r"a part 'data\n'")]
    with Neighbour(server.url) as neighbour:
        for case in cases:
            start = time.monotonic()
            status, answer = send(server, case)
            slowest = max(slowest, time.monotonic() - start)
            # TorchServe has errors of its own, of paths, of parts of a form that it cannot read, and of large bodies.
            is_torchserves = case.name.startswith(("path", "a part")) and status in (400, 403, 404)
            is_torchserves |= len(case.body) > MAX_REQUEST_SIZE and status == 413
            if not is_torchserves and (reason := wrong(case, status, answer)):
                failures.append(f"{case.name}: {reason}"[:300])
    print(f"\n{len(cases)} cases, the slowest {slowest:.3f} s; longest gap in the stream {neighbour.longest_gap:.3f} s")
    assert not failures, "\n".join([f"{len(failures)} of {len(cases)}", *failures])
    assert len(neighbour.texts) > 2 and len(set(neighbour.texts)) == 1


HEAD = b"POST /predictions/bloom HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CUT_OFF = [
    CHUNKED,
    CHUNKED + b"1",
    CHUNKED + b'10\r\n{"prompt"',
    CHUNKED + b'5\r\n{"pro\r\n',
    CHUNKED + b'5\r\n{"pro\r\nzz\r\n',
    CHUNKED + b"ffffffffffffffff\r\n{",
    CHUNKED + b"-1\r\n\r\n",
    HEAD + b'Content-Length: 100\r\n\r\n{"prompt": "a"}',
    CHUNKED.replace(b"chunked", b"nonsense") + b'{"prompt": "a"}',
]


def test_bodies_that_are_cut_off(server):
    with Neighbour(server.url) as neighbour:
        for sent in CUT_OFF:
            connecting = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            # TorchServe may close it before all is sent.
            with connecting as connection, contextlib.suppress(OSError):
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # an error, or nothing
                    pass
        answer = requests.post(f"{server.url}/predictions/bloom", json={"prompt": PROMPT}, timeout=60)
    assert answer.ok and len(set(neighbour.texts)) == 1


def openapi():
    """docs/openapi.yaml with the values that the server's paths have."""
    raw = json.loads(json.dumps(OPENAPI))
    raw["components"]["parameters"]["model"]["schema"] = {"const": "bloom"}
    raw["components"]["parameters"]["version"]["schema"] = {"const": "1.0"}
    model = raw["paths"]["/predictions/{model}/{version}/v1/models/{id}"]["parameters"][-1]
    model["schema"] = {"enum": ["bloom", "gpt-4"]}
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE])
    schema.config.phases.coverage.enabled = False
    return schema


@openapi().parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_openapi(server, case):
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)
