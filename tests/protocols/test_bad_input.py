"""Every answer to the corpus, and to what Hypothesis finds, is right or a 4xx that names what is wrong; its form is the
one in docs/openapi.yaml; and a neighbour's stream goes on as if nobody else were there."""

import json
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.protocols.open_request import OpenRequest
from handler.protocols.router import PATHS
from tests.protocols.corpus import (
    ANSWERS,
    ANY,
    CHAT,
    COMPLETIONS,
    GENERATION,
    INFER,
    OPENAPI,
    PARAMETERS,
    PREDICT,
    PROMPT,
    SCHEMAS,
    allows,
    corpus,
    is_error,
    validator,
    wrong,
)

STREAM = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}


def entry_of(case):
    """(entry, url_path) as TorchServe hands them over."""
    if isinstance(case.body, dict):
        parts = {name: _decoded(value) for name, value in case.body.items()}
        return parts, {"content-type": "text/plain"} if "url_path" in parts else ""
    body = bytearray(case.body)
    path = case.path.removeprefix(f"{ANY}/1.0/") if case.path.startswith(f"{ANY}/") else ""
    if case.content_type == "application/json":
        try:
            return {"body": json.loads(body.decode())}, path
        except (ValueError, RecursionError):
            return {"body": body}, path
    return {"body": _decoded(body) if (case.content_type or "").startswith("text") else body}, path


def read(reply):
    if reply.content_type != "application/json":
        return reply.body
    return json.loads(reply.body, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def _decoded(value):
    try:
        return value.decode()
    except UnicodeDecodeError:
        return bytearray(value)


class Neighbour:
    """A client whose stream is always open beside the others'."""

    def __init__(self, served, engine):
        self._served, self._engine = served, engine
        self.texts, self.longest_gap = [], 0.0
        self._begin()

    def _begin(self):
        self._request = OpenRequest({"body": STREAM}, "v1/completions", self._served, self._engine)
        self._parts, self.last = [], time.perf_counter()

    def listen(self):
        """Take what has come; begin again after the last part."""
        finished = self._request.finished
        if reply := self._request.reply(watch=True):
            assert reply.status == 200
            self._parts.append(reply.body)
            self.longest_gap = max(self.longest_gap, time.perf_counter() - self.last)
            self.last = time.perf_counter()
        if finished:
            *events, done, rest = "".join(self._parts).split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
            self.texts.append("".join(chunk["text"] for chunk in chunks))
            self._begin()


@pytest.fixture
def neighbour(served, engine):
    return Neighbour(served, engine)


@pytest.fixture
def ask(served, engine, neighbour):
    """ask(entry, path) -> status, body and seconds, while the neighbour listens."""

    def ask(entry, path):
        start = neighbour.last = time.perf_counter()
        request = OpenRequest(entry, path, served, engine)
        while not request.finished:
            request.poll(0)
            engine.step()
            neighbour.listen()
        reply = request.reply(watch=True)
        seconds = time.perf_counter() - start
        engine.step()
        neighbour.listen()
        return reply.status, read(reply), seconds

    return ask


@pytest.fixture
def continuation(loaded):
    """continuation(prompt) -> what `generate` adds greedily."""

    def continuation(prompt):
        ids = loaded.tokenizer(prompt).input_ids or [loaded.tokenizer.bos_token_id]
        tokens = loaded.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0]
        return loaded.tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(prompt)

    return continuation


def test_the_corpus(ask, chat, neighbour, continuation, generate):
    cases, times, failures = corpus(), [], []
    for case in cases:
        entry, path = entry_of(case)
        status, answer, seconds = ask(entry, path)
        times.append((seconds, case.name))
        expected = None if case.continues is None else continuation(case.continues)
        if reason := wrong(case, status, answer, expected):
            failures.append(f"{case.name}: {reason}"[:300])
    slowest = ", ".join(f"{seconds:.3f} s {name}" for seconds, name in sorted(times, reverse=True)[:5])
    print(f"\n{len(cases)} cases, the slowest {slowest}; longest gap in the stream {neighbour.longest_gap:.3f} s")
    assert not failures, "\n".join([f"{len(failures)} of {len(cases)}", *failures])
    alone = generate(PROMPT, STREAM["max_tokens"])
    assert len(neighbour.texts) > 1 and set(neighbour.texts) == {alone}


def test_every_path_is_in_openapi():
    described = {path.removeprefix("/predictions/{model}/{version}/") for path in OPENAPI["paths"]}
    assert described == {
        *PATHS,
        "v1/models/{id}",
        "/predictions/{model}",
        "/v1/models/{model}:predict",
        "/v2/models/{model}/infer",
    }


# JSON as a client may send it, with the protocols' names and values that mean something more often than chance has it.
names = st.sampled_from(
    [
        *GENERATION,
        *PARAMETERS,
        *[
            "prompt",
            "messages",
            "instances",
            "inputs",
            "outputs",
            "parameters",
            "data",
            "role",
            "content",
            "tools",
            "text",
        ],
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 200),
    st.floats(),
    st.text(max_size=20),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Ll"]), max_size=5),
    st.sampled_from(["user", "assistant", "text", "BYTES", "bloom", 2**63, -(2**63), 10**400, 1e-310, 1e308]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=3), inner, max_size=4)
)
wholes = {
    COMPLETIONS: st.fixed_dictionaries({"prompt": values | st.text(max_size=20)}),
    CHAT: st.fixed_dictionaries(
        {"messages": values | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": values}), max_size=3)}
    ),
    PREDICT: st.fixed_dictionaries({"instances": values | st.lists(st.text(max_size=9), min_size=1, max_size=3)}),
    INFER: st.fixed_dictionaries({"inputs": values}),
    ANY: values,
}


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("path", wholes)
def test_any_json(ask, chat, path, data):
    body = data.draw(wholes[path])
    if isinstance(body, dict):
        limited = st.sampled_from(GENERATION if path in (COMPLETIONS, CHAT) else ["parameters", "id", "outputs"])
        extra = data.draw(
            st.dictionaries(limited, values | st.dictionaries(st.sampled_from(PARAMETERS), scalars), max_size=3)
        )
        body |= {name: value for name, value in extra.items() if path != ANY}
    status, answer, _ = ask({"body": body}, path.removeprefix(f"{ANY}/1.0/") if path.startswith(f"{ANY}/") else "")
    if status != 200:
        assert status in (400, 404, 408, 413) and is_error(answer, path), answer
    elif path in SCHEMAS:
        assert allows(path, body)
        assert not isinstance(answer, dict) or validator(ANSWERS[path]).is_valid(answer)
