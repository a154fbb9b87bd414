"""Large requests are parsed beside the running step; small ones at once."""

import json
import threading

import pytest

from handler.engine import Request
from handler.protocols import open_request
from handler.protocols.open_request import OpenRequest

MANY = {name: [6] * 4_000 for name in ("suppress_tokens", "begin_suppress_tokens")}
LARGE = {"instances": ["My dog is cute"] * 4, "parameters": {"bad_words_ids": [[5]] * 4_000} | MANY}


@pytest.fixture
def parsing(monkeypatch):
    """parsing() -> an event; nothing is parsed in the other thread before it is set."""
    go, parse, threads = threading.Event(), open_request.parse, []

    def wait_and_parse(*args):
        threads.append(threading.current_thread())
        if threads[-1] is not threading.main_thread():
            assert go.wait(30)
        return parse(*args)

    monkeypatch.setattr(open_request, "parse", wait_and_parse)
    go.threads = threads
    yield go
    go.set()


def finish(engine, request):
    while not request.finished:
        request.poll(5)
        engine.step()
    return request.reply(watch=True)


def test_others_step_on_while_a_large_request_is_parsed(engine, served, parsing):
    large = OpenRequest({"body": LARGE}, "", served, engine)
    small = OpenRequest({"body": "My dog"}, "", served, engine)
    assert finish(engine, small).status == 200
    large.poll(0)
    assert not large.finished and large.reply(watch=True) is None and not engine.has_work
    parsing.set()
    assert finish(engine, large).status == 200
    assert sorted(thread is threading.main_thread() for thread in parsing.threads) == [False, True]


def test_the_answer_is_that_of_a_small_request(engine, served, monkeypatch):
    def answer():
        return finish(engine, OpenRequest({"body": LARGE}, "", served, engine)).body

    large = answer()
    monkeypatch.setattr(open_request, "_LARGE", 10**9)
    assert answer() == large


def test_what_is_wrong_with_a_large_request_is_its_reply(engine, served):
    reply = finish(engine, OpenRequest({"body": {"prompt": "x" * 10**6}}, "v1/completions", served, engine))
    assert reply.status == 413 and "1000000 characters" in reply.body
    reply = finish(engine, OpenRequest({"body": {"prompt": "x", "no": [0] * 20_000}}, "v1/completions", served, engine))
    assert reply.status == 400 and json.loads(reply.body)["error"]["param"] == "no"


def test_a_large_request_that_is_cancelled_never_runs(engine, served, parsing):
    first, second = (OpenRequest({"body": LARGE}, "", served, engine) for _ in range(2))
    first.cancel(), second.cancel()
    parsing.set()
    engine.submit(Request("My dog"))
    while engine.has_work:
        engine.step()
    assert len(parsing.threads) <= 1  # the one that had begun


@pytest.mark.parametrize(
    "body, large",
    [
        ("x" * 16_000, False),
        ("x" * 17_000, True),
        (bytearray(17_000), True),
        ({"a": [["x"] * 20] * 900}, True),
        ({"a": {"b": ["x" * 100] * 100}}, False),
        ({str(i): i for i in range(10_000)}, True),
        (None, False),
    ],
)
def test_what_counts_as_large(body, large):
    assert open_request._is_large({"body": body}) == large
