"""The tokens of log-probabilities: joined they are the text, and each stands where its text_offset says."""

import codecs
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from handler.engine import replay
from handler.protocols import open_request
from handler.protocols.open_request import OpenRequest
from handler.protocols.token_text import TokenText
from tests.models import make_sentencepiece, sharpen, train_tokenizer

COMPLETIONS, CHAT = "v1/completions", "v1/chat/completions"
TOKENIZERS = {"bytes": train_tokenizer, "sentencepiece": make_sentencepiece}
PROMPTS = ["a lo b", " a", "abé lo 語🙂 b", "日本語"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def loaded(request):
    """A model whose tokenizer writes bytes as BLOOM's or as Llama's does."""
    tokenizer = TOKENIZERS[request.param]()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = sharpen(
        LlamaForCausalLM(LlamaConfig(vocab_size=max(tokenizer.get_vocab().values()) + 1, **shape, eos_token_id=2))
    )
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def in_bytes(token):
    if not token.startswith("bytes:"):
        return token.encode()
    return codecs.escape_decode(token.removeprefix("bytes:").encode("latin-1"))[0]


def joined(tokens):
    """Their text, where one replacement character stands for any bytes that are none: decoders count differently."""
    return re.sub("\ufffd+", "\ufffd", b"".join(map(in_bytes, tokens)).decode(errors="replace"))


def check(text, logprobs):
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert b"".join(map(in_bytes, tokens)).decode(errors="replace") == text
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    assert all(re.fullmatch(r"bytes:(\\x[0-9a-f]{2}|[ -~])+", token) for token in tokens if "\\x" in token)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_echoed_prompt(send, loaded, prompt):
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(prompt).input_ids]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 3}
    (choice,) = send(body, COMPLETIONS)[1]["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt and logprobs["tokens"][0] == "" and len(logprobs["tokens"]) == len(ids)
    check(prompt, logprobs)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("echo", [False, True])
def test_what_is_generated(send, loaded, prompt, echo):
    """Only tokens that are text, and a character of several bytes."""
    tokenizer = loaded.tokenizer
    allowed = {i for word in ("a lo b", "語") for i in tokenizer(word).input_ids}
    bias = {str(i): 100 for i in allowed}
    body = {"prompt": prompt, "max_tokens": 30, "temperature": 2.0, "logprobs": 2, "logit_bias": bias, "echo": echo}
    for seed in range(4):
        (choice,) = send({**body, "seed": seed}, COMPLETIONS)[1]["choices"]
        assert choice["text"].startswith(prompt) or not echo
        logprobs = choice["logprobs"]
        kept = [token for token in logprobs["tokens"] if not token.startswith("bytes:")]
        assert all(token in choice["text"] for token in kept)
        if "\ufffd" not in choice["text"]:  # bytes in an order that is text
            check(choice["text"], logprobs)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab lo.éß語日🙂🚀", min_size=1, max_size=30), name=st.sampled_from(sorted(TOKENIZERS)))
def test_tokens_join_to_any_text(text, name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text).input_ids
    token_text = TokenText(tokenizer)
    shown = [token_text.shown(i, piece) for i, piece in zip(ids, token_text.of_prompt(ids), strict=True)]
    assert b"".join(data or token.encode() for token, data in shown).decode() == text
    assert all((data is not None) == token.startswith("bytes:") for token, data in shown)


def test_candidates_keep_their_spaces_and_names(loaded):
    tokenizer, token_text = loaded.tokenizer, TokenText(loaded.tokenizer)
    after_space, alone = (tokenizer(text, add_special_tokens=False).input_ids[-1] for text in ("lo a", "loa"))
    assert (token_text.own(after_space)[0][-2:], token_text.own(alone)[0]) == (" a", "a")
    assert token_text.own(tokenizer.eos_token_id) == ("</s>", None)
    (half, *_) = tokenizer("🙂", add_special_tokens=False).input_ids[-4:]
    assert token_text.own(half)[0].startswith("bytes:\\xf0")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_tokens_of_a_stop_string_are_no_text(send, stream, chat, path):
    asked = {"prompt": "a lo b"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a lo b"}]}
    asked |= {"max_tokens": 20, "logprobs": 1 if path == COMPLETIONS else True, "ignore_eos": True}

    def answered(body):
        (choice,) = send(body, path)[1]["choices"]
        return choice.get("text") or choice["message"]["content"], _tokens([choice])

    whole, _ = answered(asked)
    stop = re.search("[ -~]{2}", whole[3:])[0]
    text, tokens = answered({**asked, "stop": stop})
    assert text == whole[: whole.index(stop)]
    assert joined(tokens) == re.sub("\ufffd+", "\ufffd", text)
    parts = [event["choices"][0] for event in stream({**asked, "stop": stop}, path)]
    assert _tokens(parts) == tokens


def _tokens(choices):
    logprobs = [choice["logprobs"] for choice in choices]
    if "tokens" in logprobs[0]:
        return [token for one in logprobs for token in one["tokens"]]
    entries = [entry for one in logprobs for entry in one["content"]]
    assert all(in_bytes(entry["token"]) == bytes(entry["bytes"]) for entry in entries)
    return [entry["token"] for entry in entries]


def test_what_cannot_be_has_a_number_too(send, loaded, monkeypatch):
    """JSON has no infinity; OpenAI writes -9999."""
    forward = type(loaded.model).forward

    def masked(model, *args, **kwargs):
        output = forward(model, *args, **kwargs)
        output.logits[..., 3:] = -float("inf")
        return output

    monkeypatch.setattr(type(loaded.model), "forward", masked)
    (choice,) = send({"prompt": [1], "max_tokens": 1, "logprobs": 5}, COMPLETIONS)[1]["choices"]
    assert min(choice["logprobs"]["top_logprobs"][0].values()) == -9999.0


@pytest.mark.parametrize("echo", [False, True])
def test_what_is_made_bit_by_bit_is_the_same(send, served, engine, echo, monkeypatch):
    """A long answer's log-probabilities are encoded while it runs, so that nobody waits for all of them at its end."""
    monkeypatch.setattr(replay, "_STAND_INS", 0)  # a forward of more rows may round otherwise
    body = {"prompt": "a lo 語", "max_tokens": 30, "logprobs": 3, "ignore_eos": True, "echo": echo, "n": 2}
    request = OpenRequest({"body": body}, COMPLETIONS, served, engine)
    encoded = []
    while not request.finished:
        engine.step()
        if not request.finished:
            request.reply(watch=True)
            encoded.append(request._call._cursors[0].logprobs)
    assert encoded == sorted(encoded) and len(set(encoded)) > 10
    assert json.loads(request.reply(watch=True).body)["choices"] == send(body, COMPLETIONS)[1]["choices"]


@pytest.mark.parametrize(
    "body, named",
    [
        ({"prompt": "a", "max_tokens": 1000, "logprobs": 20, "n": 8}, None),
        ({"prompt": "a", "max_tokens": 1600, "logprobs": 20, "n": 8}, "logprobs"),
        ({"prompt": ["a"] * 8, "max_tokens": 1600, "logprobs": 20}, "logprobs"),
        ({"prompt": "a" * 50, "echo": True, "max_tokens": 0, "logprobs": 20}, None),
    ],
)
def test_there_are_no_more_than_can_be_sent(served, engine, body, named):
    request = OpenRequest({"body": body}, COMPLETIONS, served, engine)
    assert request.finished == bool(named) and engine.has_work != bool(named)
    if named:
        reply = request.reply(watch=True)
        assert reply.status == 400 and json.loads(reply.body)["error"]["param"] == named


def test_an_echoed_prompt_has_no_more_than_can_be_made_at_once(send, monkeypatch):
    body = {"prompt": "a lo b", "echo": True, "max_tokens": 0, "logprobs": 3}
    assert send(body, COMPLETIONS)[0] == 200
    monkeypatch.setattr(open_request, "_MOST_ECHOED_LOGPROBS", 4)
    status, answer, _ = send(body, COMPLETIONS)
    assert (status, answer["error"]["param"]) == (400, "logprobs")
