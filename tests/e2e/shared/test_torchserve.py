"""What the real TorchServe does with our handler, in both of its batching modes."""

import time

import pytest
import requests

from tests.e2e.asking import (
    ENDLESS,
    PROMPT,
    at_once,
    complete,
    describe,
    events,
    joined,
    overfill,
    predict,
    start_endless,
    worker,
    workers,
)
from tests.e2e.conftest import READY_TIMEOUT, SETTINGS
from tests.e2e.shared.test_metrics import logged


@pytest.fixture(params=["continuous", "plain"])
def server(request):
    return request.getfixturevalue(request.param)


def read_to_the_end(connection):
    """What still comes until the other side ends or resets the connection."""
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
    except ConnectionError:
        pass
    return received


def test_an_answer_that_is_complete_at_once(server, generated):
    assert predict(server.url, PROMPT, max_new_tokens=1).json() == {"predictions": [generated(new_tokens=1)]}
    assert requests.get(f"{server.url}/predictions/bloom/1.0/health", timeout=20).json() == {"status": "ok"}
    assert requests.get(f"{server.url}/predictions/bloom/1.0/v1/models", timeout=20).json()["data"][0]["id"] == "bloom"


def test_one_connection_for_many_answers(server):
    """A malformed end of one answer would spoil the next on a connection that is kept open."""
    with requests.Session() as session:
        for new_tokens in (1, 30, 2):
            body = {"prompt": PROMPT, "max_tokens": new_tokens, "ignore_eos": True}
            answer = session.post(f"{server.url}/predictions/bloom", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == new_tokens
            streamed = session.post(f"{server.url}/predictions/bloom", json={**body, "stream": True}, timeout=60)
            assert joined(events(streamed)) == answer["choices"][0]["text"]


def test_a_stream_comes_in_parts(server):
    body = {**ENDLESS, "max_tokens": 300}
    whole = complete(server.url, **body).json()["choices"][0]["text"]
    answer = complete(server.url, **body, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = events(answer)
    # However fast the rest comes, the first token has not waited for it.
    assert len(parts) > 1 and joined(parts) == whole


def test_many_at_once_get_what_they_get_alone(server):
    prompts = [PROMPT, "東京", "The quick brown fox", "a"]
    alone = [predict(server.url, prompt, max_new_tokens=5 + index).json() for index, prompt in enumerate(prompts)]
    together = at_once(4, lambda index: predict(server.url, prompts[index], max_new_tokens=5 + index).json())
    assert together == alone


def test_a_bad_request_gets_its_own_status_and_harms_nobody(server):
    expected = predict(server.url, PROMPT).json()

    def send(index):
        if index % 2:
            return predict(server.url, PROMPT, temperature="hot")
        return predict(server.url, PROMPT)

    answers = at_once(6, send)
    assert [answer.status_code for answer in answers] == [200, 400] * 3
    assert all(answer.json() == expected for answer in answers[::2])
    assert all("temperature" in answer.json()["error"]["message"] for answer in answers[1::2])


def test_nobody_waits_for_a_neighbour(continuous):
    """A short request that comes after a long one is answered while the long one still runs."""
    long = complete(continuous.url, **ENDLESS, stream=True)
    received = long.iter_content(1)  # the connection lasts as long as this does
    assert next(received) and predict(continuous.url, PROMPT).ok
    assert describe(continuous.url)["engine"]["running"] == 1
    long.close()


def post(server, body, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    answer = requests.post(f"{server.url}/predictions/bloom", data=body, headers=headers, timeout=60)
    answer.encoding = "utf-8"
    return answer


@pytest.mark.parametrize(
    "body, content_type, status, says",
    [
        (b"text=x", "application/x-www-form-urlencoded", 400, "Content-Type: application/json"),
        (b"", "application/json", 400, "empty"),
        (b"", None, 400, "empty"),
        (b'{"instances": [', "application/json", 400, "not JSON"),
        (b'{"instances": [', None, 400, "not JSON"),
        (b"\xff\xfe\x00", None, 400, "UTF-8"),
        (b"\xff\xfe\x00", "text/plain", 400, "UTF-8"),
        (b"\xff\xfe\x00", "application/json", 400, "UTF-8"),
        (b"[1, 2]", "application/json", 400, "JSON object"),
        (b"17", "application/json", 400, "JSON object"),
        (b'{"text": "x"}', "application/json", 400, "instances"),
        (b'{"instances": "x"}', "application/json", 400, "instances"),
    ],
)
def test_odd_bodies(server, body, content_type, status, says):
    answer = post(server, body, content_type)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text


@pytest.mark.parametrize(
    "body, content_type, prompt",
    [
        (b'{"data": "a"}', "application/json", "a"),
        ("東京".encode(), "text/plain; charset=utf-8", "東京"),
        ("東京".encode(), None, "東京"),
    ],
)
def test_odd_prompts(server, generated, body, content_type, prompt):
    answer = post(server, body, content_type)
    assert (answer.status_code, answer.text) == (200, generated(prompt))


def test_a_form_part(server, generated):
    answer = requests.post(f"{server.url}/predictions/bloom", files={"data": (None, PROMPT)}, timeout=60)
    assert answer.text == generated()


def test_a_prompt_that_is_too_long(server):
    answer = predict(server.url, "x" * 1000)
    assert answer.status_code == 413
    assert "1000 tokens" in answer.text and "200" in answer.text


def test_a_deadline(server):
    answer = predict(server.url, PROMPT, max_new_tokens=8000, max_time=0.01)
    assert answer.status_code == 408
    assert "0.01 s" in answer.json()["error"]["message"]


def test_a_full_queue(continuous):
    refused, answered = overfill(continuous, lambda: predict(continuous.url, PROMPT))
    assert [answer.status_code for answer in refused] == [429] * 16
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert [answer.status_code for answer in answered] == [200] * 8


def test_a_request_that_waits_too_long(serving, bloom):
    with serving(bloom, SETTINGS | {"max_batch_size": 1, "max_wait": 0.2}, "no-archive") as server:
        connection, _ = start_endless(server, stream=True)
        for stream in (False, True):
            answer = complete(server.url, stream=stream)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json()["error"]["type"] == "queue_timeout"
        connection.close()
        assert complete(server.url, max_tokens=2).ok


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(continuous, stream):
    """All four slots are taken by clients that hang up; then a new one is served."""
    started = [start_endless(continuous, stream) for _ in range(4)]
    for connection, _ in started:
        connection.close()
    assert predict(continuous.url, PROMPT, max_time=60).ok
    assert logged(continuous, [request_id for _, request_id in started]) == [499] * 4
    assert describe(continuous.url)["engine"] == {"running": 0, "waiting": 0}


def test_kill_9_tells_the_clients_and_the_worker_comes_back_without_unpacking_again(continuous, generated):
    (shard, *_) = (continuous.work / "tmp/models").rglob("model-00001-*")
    inode = shard.stat().st_ino
    process = worker(continuous)
    connections = [start_endless(continuous, stream)[0] for stream in (True, False)]
    process.kill()
    for connection in connections:
        assert not read_to_the_end(connection).endswith(b"0\r\n\r\n")  # which would say that it is whole
    deadline = time.monotonic() + READY_TIMEOUT
    while (now := workers(continuous)[0])["status"] != "READY" or now["pid"] == process.pid:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    assert predict(continuous.url, PROMPT).json() == {"predictions": [generated()]}
    assert shard.stat().st_ino == inode


def test_describe(plain, continuous):
    managed = requests.get(f"{plain.management_url}/models/bloom?customized=true", timeout=60).json()
    described = managed[0]["customizedMetadata"]
    assert described["device_map"] == {"": "cpu"} and described["dtype"] == "float32"
    assert described["memory_footprint"] == described["tiers"]["cpu"]["bytes"] > 200_000
    assert described["versions"]["transformers"].startswith("5.")
    # What anybody may read, and `drain` does; also in continuous mode, where TorchServe asks for the above for ever.
    public = describe(continuous.url)
    assert described.keys() - public.keys() == {"versions", "device_map", "products"}
    assert public.pop("engine").keys() == {"running", "waiting"}  # of another server
    assert public == {key: described[key] for key in public}
