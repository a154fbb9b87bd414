import math

import pytest
import torch

PROMPT = "My dog is cute"
COMPLETIONS, CHAT = "v1/completions", "v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_a_completion(send, generate, loaded):
    status, answer, _ = send({"model": "bloom", "prompt": PROMPT, "max_tokens": 5, "user": "me"}, COMPLETIONS)
    prompt_tokens = len(loaded.tokenizer(PROMPT).input_ids)
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "bloom"
    assert answer["choices"] == [{"index": 0, "text": generate(PROMPT, 5), "logprobs": None, "finish_reason": "length"}]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 5, "total_tokens": prompt_tokens + 5}
    assert answer["usage"] == usage


def test_every_form_of_prompt(send, generate, loaded):
    ids = loaded.tokenizer(PROMPT).input_ids
    other = loaded.tokenizer("a").input_ids
    one, two = generate(PROMPT), generate("a")
    assert texts(send({"prompt": [PROMPT, "a"]}, COMPLETIONS)[1]) == [one, two]
    assert texts(send({"prompt": ids}, COMPLETIONS)[1]) == [one]
    assert texts(send({"prompt": [ids, other]}, COMPLETIONS)[1]) == [one, two]
    assert texts(send({"prompt": PROMPT})[1]) == [one]  # without a path


def test_n_and_seed(send):
    body = {"prompt": [PROMPT, "a"], "n": 2, "temperature": 1.5, "seed": 3}
    answer = send(body, COMPLETIONS)[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len(set(texts(answer))) == 4
    assert texts(send(body, COMPLETIONS)[1]) == texts(answer)


@pytest.mark.parametrize("several", [False, True])
def test_stop(send, generate, several):
    whole = generate(PROMPT, 20)
    stop = whole[3:5]
    answer = send({"prompt": PROMPT, "max_tokens": 20, "stop": [stop, "never"] if several else stop}, COMPLETIONS)[1]
    assert texts(answer) == [whole[: whole.index(stop)]]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_echo_and_logprobs(send, loaded):
    ids = loaded.tokenizer(PROMPT).input_ids
    answer = send({"prompt": PROMPT, "max_tokens": 3, "logprobs": 2, "echo": True}, COMPLETIONS)[1]
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    with torch.inference_mode():
        expected = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert choice["text"].startswith(PROMPT) and "".join(logprobs["tokens"][: len(ids)]) == PROMPT
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for position in range(1, len(ids)):
        assert math.isclose(logprobs["token_logprobs"][position], expected[position - 1, ids[position]], abs_tol=1e-4)
    assert math.isclose(logprobs["token_logprobs"][len(ids)], expected[-1].max(), abs_tol=1e-4)
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    assert len({len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


def test_the_prompt_alone_for_its_logprobs(send, loaded):
    answer = send({"prompt": PROMPT, "max_tokens": 0, "logprobs": 0, "echo": True}, COMPLETIONS)[1]
    assert texts(answer) == [PROMPT] and answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(loaded.tokenizer(PROMPT).input_ids)


def test_penalties_and_bias(send, generate, loaded):
    token = loaded.tokenizer("z", add_special_tokens=False).input_ids[0]
    assert texts(send({"prompt": PROMPT, "max_tokens": 3, "logit_bias": {str(token): 100}}, COMPLETIONS)[1]) == ["zzz"]
    repeated = {"prompt": "a", "max_tokens": 8, "ignore_eos": True}
    plain = texts(send(repeated, COMPLETIONS)[1])
    assert texts(send({**repeated, "repetition_penalty": 5.0}, COMPLETIONS)[1]) != plain
    off = {"top_k": -1, "temperature": 0, "presence_penalty": 0, "frequency_penalty": 0, "min_tokens": 0, "n": None}
    assert texts(send({**repeated, **off}, COMPLETIONS)[1]) == plain


@pytest.mark.parametrize("extra", [{}, {"n": 2, "temperature": 1.0, "seed": 1}, {"echo": True}, {"logprobs": 1}])
def test_a_stream_adds_up_to_the_answer(send, stream, extra):
    body = {"prompt": [PROMPT, "東京"], "max_tokens": 12, **extra}
    whole = send(body, COMPLETIONS)[1]
    events = stream({**body, "stream_options": {"include_usage": True}}, COMPLETIONS)
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if "logprobs" in extra:
            tokens = [token for one in mine for token in one["logprobs"]["tokens"]]
            offsets = [offset for one in mine for offset in one["logprobs"]["text_offset"]]
            assert (tokens, offsets) == (choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"])
    assert all(event["usage"] is None for event in events[:-1])


def test_usage_in_every_chunk(stream):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream({"prompt": PROMPT, "max_tokens": 6, "stream_options": options}, COMPLETIONS)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 6


def test_chat(send, generate, chat):
    prompt = "<system>be brief<user>hello<assistant>"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    status, answer, _ = send({"messages": messages, "max_completion_tokens": 6}, CHAT)
    assert status == 200 and answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": generate(prompt, 6), "refusal": None}
    assert answer["choices"][0]["message"] == message


def test_chat_logprobs(send, chat):
    body = {**HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    entries = send(body, CHAT)[1]["choices"][0]["logprobs"]["content"]
    assert len(entries) == 3 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)


def test_a_chat_stream(send, stream, chat):
    whole = send({**HELLO, "max_tokens": 10}, CHAT)[1]["choices"][0]["message"]["content"]
    events = stream({**HELLO, "max_tokens": 10}, CHAT)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == whole


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        (COMPLETIONS, {"prompt": PROMPT, "model": "gpt-4"}, 404, "model"),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [999999]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": PROMPT, "suffix": "x"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": PROMPT, "best_of": 3}, 400, None),
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0}, 400, None),
        (COMPLETIONS, {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {"prompt": PROMPT, "stream_options": {"include_usage": True}}, 400, None),
        (COMPLETIONS, {"prompt": "x" * 150}, 413, None),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, 400, "tools.0.function"),
        (CHAT, HELLO | {"functions": [{"name": "f"}]}, 400, "functions"),
        (CHAT, HELLO | {"response_format": {"type": "xml"}}, 400, "response_format.type"),
        (CHAT, HELLO | {"top_logprobs": 2}, 400, None),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ],
)
def test_errors_have_openais_shape_and_name_the_field(send, chat, path, body, status, param):
    got, answer, _ = send(body, path)
    assert got == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert param is None or answer["error"]["param"] == param


def test_sampling_is_from_the_whole_vocabulary_unless_top_k_is_given(send, monkeypatch):
    from handler.engine import Engine

    seen = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, request: seen.append(request) or submit(self, request))
    for extra in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0}, {}):
        send({"prompt": PROMPT, **extra}, COMPLETIONS)
    assert [request.parameters.get("top_k") for request in seen] == [0, 5, None, None]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompts_are_shared_by_salt(send, engine, chat, path):
    text = "My dog is cute. " * 8
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    reused = []
    for salt in ("a", "a", "b"):
        before = engine.num_reused_tokens
        assert send({**body, "cache_salt": salt, "max_tokens": 2}, path)[0] == 200
        reused.append(engine.num_reused_tokens > before)
    assert reused == [False, True, False]
    assert send({**body, "cache_salt": ""}, path)[0] == 400


def test_null_and_harmless_values_are_no_error(send, chat):
    nulls = {"stop": None, "seed": None, "logit_bias": None, "stream": None, "n": None, "max_tokens": None}
    assert send({"prompt": PROMPT, "suffix": None, **nulls}, COMPLETIONS)[0] == 200
    extra = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}}
    assert send({**HELLO, **nulls, **extra}, CHAT)[0] == 200


def test_chat_without_a_template(send):
    status, answer, _ = send(HELLO, CHAT)
    assert status == 400 and "no chat template" in answer["error"]["message"]


def test_models(send):
    status, answer, _ = send(None, "v1/models")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["bloom"]
    assert send(None, "v1/models/bloom")[1]["max_model_len"] == 2048
    assert send(None, "v1/models/other")[0] == 404


def test_openais_own_loop(send, chat):
    """Its client sends an answer's message back with every field that it has."""
    from openai.types.chat import ChatCompletion

    answer = ChatCompletion.model_validate(send({**HELLO, "max_tokens": 3}, CHAT)[1])
    message = answer.choices[0].message.model_dump()
    assert message["refusal"] is None and message["tool_calls"] is None
    messages = [*HELLO["messages"], message | {"annotations": [], "tool_calls": []}, *HELLO["messages"]]
    assert send({"messages": messages, "max_tokens": 3}, CHAT)[0] == 200


@pytest.mark.parametrize(
    "field, value",
    [
        ("refusal", "no"),
        ("annotations", [{"type": "url_citation"}]),
        ("audio", {"id": "1"}),
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("reasoning", "because"),
    ],
)
def test_what_no_template_can_use_is_refused_by_name(send, chat, field, value):
    body = {"messages": [*HELLO["messages"], {"role": "assistant", "content": "a", field: value}]}
    status, answer, _ = send(body, CHAT)
    assert (status, answer["error"]["param"]) == (400, f"messages.1.{field}")


def test_a_null_is_nothing_anywhere(send, stream, chat):
    assert send({"instances": [{"data": PROMPT}], "parameters": None})[0] == 200
    assert send({"instances": [PROMPT], "parameters": {"return_full_text": None, "seed": None}})[1] == {
        "predictions": [PROMPT + texts(send({"prompt": PROMPT})[1])[0]]
    }
    options = {"include_usage": None}
    assert stream({"prompt": PROMPT, "stream_options": options}, COMPLETIONS)
    part = {"type": "text", "text": "a", "image_url": None}
    assert send({"messages": [{"role": "user", "content": [part], "name": None}]}, CHAT)[0] == 200


@pytest.mark.parametrize("min_tokens", [0, 40])
def test_a_chat_ends_with_the_tokenizers_eos_token_too(send, chat, loaded, monkeypatch, min_tokens):
    """generation_config.json may name another one; completions end with that alone, as `generate` does."""
    chat = {**HELLO, "max_tokens": 60, "logprobs": True, "min_tokens": min_tokens}
    whole = send(chat, CHAT)[1]
    tokens = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == 60
    ids = loaded.tokenizer("<user>hello<assistant>").input_ids
    with torch.inference_mode():
        made = loaded.model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
    ends = loaded.tokenizer.convert_ids_to_tokens(made[5])
    monkeypatch.setattr(
        loaded.tokenizer, "_special_tokens_map", loaded.tokenizer._special_tokens_map | {"eos_token": ends}
    )
    assert loaded.tokenizer.eos_token_id == made[5]
    (choice,) = send(chat, CHAT)[1]["choices"]
    assert choice["finish_reason"] == ("length" if min_tokens and made[5] not in made[40:] else "stop")
    assert len(choice["logprobs"]["content"]) >= max(made.index(made[5]) + 1, min_tokens)
    assert min_tokens or len(choice["logprobs"]["content"]) == made.index(made[5]) + 1
    (other,) = send({"prompt": ids, "max_tokens": 60, "min_tokens": min_tokens}, COMPLETIONS)[1]["choices"]
    assert other["finish_reason"] == "length"
    (ignoring,) = send({**chat, "ignore_eos": True}, CHAT)[1]["choices"]
    assert len(ignoring["logprobs"]["content"]) == 60


def test_min_tokens_hold_back_stop_strings(send, loaded):
    """As in vLLM: a stop string counts that is complete after more tokens than these."""
    letters = {str(loaded.tokenizer(letter).input_ids[0]): 100 for letter in "xyz"}
    body = {"prompt": PROMPT, "max_tokens": 20, "logit_bias": letters, "temperature": 6.0, "seed": 1}
    (whole,) = texts(send(body, COMPLETIONS)[1])
    assert len(whole) == 20 and set(whole) == set("xyz")
    for stop in {whole[-1], whole[-2:]}:
        for min_tokens in range(20):
            (choice,) = send({**body, "stop": stop, "min_tokens": min_tokens}, COMPLETIONS)[1]["choices"]
            ends = [end for end in range(min_tokens + 1, 21) if whole[:end].endswith(stop)]
            assert (choice["text"], choice["finish_reason"]) == (whole[: ends[0] - len(stop)], "stop")


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_seed_of_64_bits(send, seed):
    body = {"prompt": PROMPT, "n": 3, "temperature": 1.5, "seed": seed}
    first = texts(send(body, COMPLETIONS)[1])
    assert len(set(first)) == 3 and texts(send(body, COMPLETIONS)[1]) == first
    assert texts(send({**body, "seed": 5}, COMPLETIONS)[1]) != first
    parameters = {"seed": seed, "do_sample": True, "top_k": 0, "return_full_text": False, "temperature": 1.5}
    assert send({"instances": [PROMPT], "parameters": parameters})[1]["predictions"] == first[:1]


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63, 1.0, "1", True])
def test_no_other_seed(send, seed):
    status, answer, _ = send({"prompt": PROMPT, "seed": seed}, COMPLETIONS)
    assert (status, answer["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize("count, n", [(9, 1), (5, 2), (3, 3)])
def test_what_can_never_wait_together_is_no_full_queue(send, engine, count, n):
    """The queue has eight places: 429 would send the client round for ever."""
    body = {"prompt": [PROMPT] * count, "n": n, "temperature": 1.0}
    status, answer, _ = send(body, COMPLETIONS)
    assert status == 400 and "8" in answer["error"]["message"] and not engine.has_work
    parameters = {"num_return_sequences": n, "do_sample": True}
    assert send({"instances": [PROMPT] * count, "parameters": parameters})[0] == 400
    assert send({"prompt": [PROMPT] * 4, "n": 2, "temperature": 1.0}, COMPLETIONS)[0] == 200


@pytest.mark.parametrize(
    "body, param",
    [
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 4.0}, "max_tokens"),
        ({"temperature": "0.5"}, "temperature"),
        ({"stream": "false"}, "stream"),
        ({"echo": 1}, "echo"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": 1}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)
def test_no_value_is_made_fit(send, body, param):
    status, answer, _ = send({"prompt": PROMPT, **body}, COMPLETIONS)
    assert (status, answer["error"]["param"]) == (400, param)
