"""Whatever a client sends, the answer is its own, and tells nothing of the server."""

import json

import pytest

from handler.engine.model_runner import ModelRunner
from handler.protocols import open_request

PROMPT = "My dog is cute"
CHAT = "v1/chat/completions"


def nested(depth):
    return b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"


def test_a_form_part_may_have_any_name(send):
    """TorchServe keeps a part's headers under its name, among those of the request."""
    path = {"content-type": "text/plain"}
    status, answer, _ = send(None, path, entry={"url_path": PROMPT})
    assert status == 400 and "url_path" in answer["error"]["message"]
    status, answer, _ = send(None, entry={"text": PROMPT, "other": b""})
    assert status == 400 and "'text', 'other'" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["", "v1/completions", CHAT])
@pytest.mark.parametrize("body", [nested(2000), nested(100_000), b'{"a":' * 2000])
def test_deep_nesting(send, path, body):
    status, answer, _ = send(bytearray(body), path)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("depth", range(50, 800, 50))
def test_nesting_that_is_just_read(send, depth):
    """Python reads these; what then walks over them has less of the stack left."""
    for field in ("metadata", "logit_bias", "stop"):
        body = json.loads(f'{{"prompt": "a", "max_tokens": 1, "{field}": {"[" * depth}{"]" * depth}}}')
        assert send(body, "v1/completions")[0] in (200, 400)
    for parameter in ("sequence_bias", "bad_words_ids", "unheard_of"):
        body = json.loads(f'{{"instances": ["a"], "parameters": {{"{parameter}": {"[" * depth}{"]" * depth}}}}}')
        assert send(body)[0] == 400 or parameter == "bad_words_ids"


@pytest.mark.parametrize("field", ["role", "content"])
def test_half_a_surrogate_pair_in_a_chat(send, chat, field):
    message = {"role": "user", "content": "hello"} | {field: "\ud800"}
    status, answer, _ = send({"messages": [message]}, CHAT)
    assert status == 400 and "messages" in answer["error"]["message"]


def test_a_template_may_fail_in_any_way(send, chat, loaded):
    loaded.tokenizer.chat_template = "{{ 1 // 0 }}"
    status, answer, _ = send({"messages": [{"role": "user", "content": "hello"}]}, CHAT)
    assert status == 400 and answer["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"temperature": 1e-310}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"repetition_penalty": 1e-310, "temperature": 1.0}, "repetition_penalty"),
        ({"max_new_tokens": 10**4299}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"sequence_bias": [[[5], float("nan")]]}, "sequence_bias"),
        ({"sequence_bias": [[[5], float("inf")]]}, "sequence_bias"),
        ({"exponential_decay_length_penalty": [1, "a"]}, "exponential_decay_length_penalty"),
    ],
)
def test_numbers_that_cannot_be_reckoned_with(send, parameters, named):
    status, answer, _ = send({"instances": [PROMPT], "parameters": parameters})
    assert status == 400 and named in answer["error"]["message"]


def test_a_parameter_that_fails_later_is_still_the_requests_fault(send):
    """1e18 to the power of 18 is no float."""
    parameters = {"exponential_decay_length_penalty": [1, 1e18], "max_new_tokens": 30, "eos_token_id": 383}
    parameters |= {"suppress_tokens": [383]}
    status, answer, _ = send({"instances": ["a"], "parameters": parameters})
    assert status == 400 and "tokens" in answer["error"]["message"]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "/mnt/models/a"), MemoryError("/mnt/models/a")])
def test_no_error_names_the_servers_files(send, monkeypatch, error):
    def broken(*_):
        raise error

    with monkeypatch.context() as context:
        context.setattr(ModelRunner, "forward", broken)
        status, answer, _ = send(PROMPT)
    assert status in (500, 507) and "/mnt" not in answer["error"]["message"]
    assert send(PROMPT)[0] == 200


def test_a_message_is_short_whatever_it_quotes(send):
    long = "x" * 100_000
    for body in (
        {"prompt": "a", "model": long},
        {"prompt": "a", long: 1},
        {"instances": ["a"], "parameters": {"a": long}},
    ):
        status, answer, _ = send(body)
        assert status in (400, 404) and len(answer["error"]["message"]) < 2000


def long_lists():
    """What each may be at most, and one more."""
    yield from (("stop_strings", [str(i) for i in range(count)], count == 64) for count in (64, 65))
    yield from (("stop_strings", ["x" * length], length == 256) for length in (256, 257))
    for count in (4096, 4097):
        yield "suppress_tokens", [5] * count, count == 4096
        yield "begin_suppress_tokens", [5] * count, count == 4096
        yield "eos_token_id", [5] * count, count == 4096
        yield "bad_words_ids", [[5] * (count - 4000), *([[6]] * 4000)], count == 4096
        yield "sequence_bias", [[[5] * (count - 1), 1.0]], count == 4096


@pytest.mark.parametrize("name, value, fits", list(long_lists()))
def test_no_list_holds_the_engine_up(send, name, value, fits):
    status, answer, _ = send({"instances": ["a"], "parameters": {name: value, "max_new_tokens": 1}})
    assert status == (200 if fits else 400)
    assert fits or answer["error"]["message"].startswith(name)


def test_no_bias_holds_the_engine_up(send):
    bias = {str(i): 1 for i in range(4097)}
    status, answer, _ = send({"prompt": "a", "logit_bias": bias}, "v1/completions")
    assert status == 400 and answer["error"]["param"] == "logit_bias"


def test_an_answer_larger_than_the_server_sends_is_an_error(send, monkeypatch):
    monkeypatch.setattr(open_request, "_LARGEST_ANSWER", 100)
    status, answer, _ = send({"instances": ["a" * 90], "parameters": {"max_new_tokens": 1}})
    assert status == 400 and "at most 100" in answer["error"]["message"]
