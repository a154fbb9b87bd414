"""Tools: into the chat template, and out of the text as `tool_calls`, streamed or not."""

import json
from itertools import pairwise

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from handler.engine import Engine, EngineConfig
from handler.protocols.openai.tools import certain_content, split_calls

CHAT = "v1/chat/completions"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "now", "parameters": {"type": "object", "properties": {}}},
}
REQUEST = {"messages": [{"role": "user", "content": "hello"}], "tools": [WEATHER]}
BERN, ROME = {"city": "Bern"}, {"city": 'Ro"m'}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def call(arguments, key="arguments"):
    return json.dumps({"name": "weather", key: arguments})


FORMATS = [
    (HERMES, "", [BERN]),
    (f"Let me see. \n{HERMES}\n<tool_call>{call(ROME)}</tool_call>", "Let me see.", [BERN, ROME]),
    (HERMES.removesuffix("</tool_call>"), "", [BERN]),  # where the closing mark is a special token
    (call(BERN, "parameters"), "", [BERN]),
    (f"{call(BERN, 'parameters')}; {call(ROME, 'parameters')}", "", [BERN, ROME]),
    (f"[TOOL_CALLS] [{call(BERN)}, {call(ROME)}]", "", [BERN, ROME]),
    (f"I look. [TOOL_CALLS][{call(BERN)}]", "I look.", [BERN]),
    (f" [{call(BERN)}]", "", [BERN]),  # where the marker is a special token
]
NO_CALLS = [
    "It rains.",
    "",
    "[1] a source, {and} more [TOOL",
    '{"name": "weather"}',
    '{"name": "weather", "arguments": "Bern"}',
    '{"name": ["weather"], "arguments": {}}',
    '{"name": "rain", "arguments": {}}',
    f"<tool_call>{call(BERN)[:-1]}</tool_call>",
    f"{HERMES}<tool_call>no</tool_call> \n",
    "[TOOL_CALLS] none",
    f"[{call(BERN)}, 3]",
    "<tool_call>",
    " a < b, [TOO] ",
]


@pytest.fixture
def chat(loaded):
    loaded.tokenizer.chat_template = TEMPLATE
    yield
    loaded.tokenizer.chat_template = None


@pytest.fixture
def engine(loaded):
    return Engine(loaded.model, loaded.tokenizer, EngineConfig(max_batch_size=4, max_new_tokens=500))


@pytest.fixture
def says(loaded, monkeypatch):
    """says(text): that is what the model says from now on, token for token, and then its eos token."""
    append = Engine._append

    def says(text):
        said = [*loaded.tokenizer(text).input_ids, loaded.tokenizer.eos_token_id]
        monkeypatch.setattr(
            Engine, "_append", lambda engine, sequence, _: append(engine, sequence, said[len(sequence.token_ids)])
        )

    return says


@pytest.mark.parametrize("text, content, arguments", FORMATS)
def test_calls(text, content, arguments):
    before, calls = split_calls(text, {"weather"})
    assert before == content
    assert [json.loads(one["function"]["arguments"]) for one in calls] == arguments
    assert {one["function"]["name"] for one in calls} == {"weather"} and {one["type"] for one in calls} == {"function"}
    assert len({one["id"] for one in calls}) == len(calls) and all(one["id"].isalnum() for one in calls)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content(text):
    assert split_calls(text, {"weather"}) == (text, [])


@pytest.mark.parametrize("text", [text for text, *_ in FORMATS] + NO_CALLS)
def test_no_part_of_a_call_is_content(text):
    content, _ = split_calls(text, {"weather"})
    shown = [certain_content(text[:end]) for end in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert content.startswith(shown[-1])


def test_brackets_without_end():
    assert split_calls("[" * 5000, {"weather"}) == ("[" * 5000, [])


def test_plain_text_is_shown_as_it_comes():
    assert certain_content("It rains. [1] {x") == "It rains. [1] {x"
    assert certain_content("It rains. <tool") == "It rains."


@pytest.mark.parametrize("text, content, arguments", FORMATS + [(text, text, []) for text in NO_CALLS])
def test_an_answer_and_its_stream(send, stream, chat, says, text, content, arguments):
    says(text)
    body = {**REQUEST, "n": 2}
    answer = send(body, CHAT)[1]
    events = stream(body, CHAT)
    assert len(answer["choices"]) == 2
    for choice in answer["choices"]:
        message = choice["message"]
        assert choice["finish_reason"] == ("tool_calls" if arguments else "stop")
        assert message["content"] == (content or (None if arguments else ""))
        assert [json.loads(one["function"]["arguments"]) for one in message.get("tool_calls", [])] == arguments
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in mine) == content
        streamed = [one for part in mine for one in part["delta"].get("tool_calls", [])]
        assert [json.loads(one["function"]["arguments"]) for one in streamed] == arguments
        assert [one["index"] for one in streamed] == list(range(len(arguments)))
        assert mine[-1]["finish_reason"] == choice["finish_reason"] and mine[0]["delta"]["role"] == "assistant"


def test_without_parallel_calls_there_is_one(send, chat, says):
    says(f"[TOOL_CALLS] [{call(BERN)}, {call(ROME)}]")
    (choice,) = send({**REQUEST, "parallel_tool_calls": False}, CHAT)[1]["choices"]
    assert [json.loads(one["function"]["arguments"]) for one in choice["message"]["tool_calls"]] == [BERN]


@pytest.mark.parametrize("extra", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_who_offers_no_tools_gets_no_calls(send, chat, says, seen, extra):
    says(HERMES)
    (choice,) = send(REQUEST | extra, CHAT)[1]["choices"]
    assert choice["message"]["content"] == HERMES and choice["finish_reason"] == "stop"
    assert "weather" not in seen[0]


@pytest.fixture
def seen(loaded, monkeypatch):
    """The texts that chat templates made."""
    seen, apply = [], loaded.tokenizer.apply_chat_template

    def spy(*args, **kwargs):
        seen.append(apply(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(loaded.tokenizer, "apply_chat_template", spy)
    return seen


def test_a_loop_with_a_tool(send, chat, seen, says):
    """The messages are those of OpenAI's own client."""
    says(HERMES)
    answer = send(REQUEST, CHAT)[1]["choices"][0]["message"]
    assistant = {"function_call": None, "annotations": [], "audio": None, **answer}
    (made,) = answer["tool_calls"]
    result = {"role": "tool", "tool_call_id": made["id"], "content": "rain"}
    status, _, _ = send({**REQUEST, "messages": [*REQUEST["messages"], assistant, result]}, CHAT)
    assert status == 200
    assert seen[0] == json.dumps(WEATHER) + "<user>hello"
    assert seen[1].endswith('<user>hello<assistant>weather{"city": "Bern"}<tool>rain' + made["id"])


def test_what_openais_client_makes_of_a_stream_can_be_sent_back(send, stream, chat, says):
    says("<tool_call>" + json.dumps({"name": "weather", "arguments": BERN}) + "</tool_call>")
    state = ChatCompletionStreamState()
    for chunk in stream(REQUEST, CHAT):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    message = state.get_final_completion().choices[0].message.to_dict()
    assert message["tool_calls"][0]["index"] == 0
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    assert send({**REQUEST, "messages": [*REQUEST["messages"], message, result]}, CHAT)[0] == 200


@pytest.mark.parametrize(
    "change, param",
    [
        ({"tools": [{**WEATHER, "type": "browser"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools.0.function.name"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [WEATHER] * 200}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_what_is_wrong_is_named(send, chat, change, param):
    status, answer, _ = send(REQUEST | change, CHAT)
    assert (status, answer["error"]["param"]) == (400, param)


def test_a_template_without_tools_says_so(send, chat, loaded):
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    status, answer, _ = send(REQUEST, CHAT)
    assert (status, answer["error"]["param"]) == (400, "tools")
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    status, answer, _ = send({"messages": [{"role": "assistant", "tool_calls": calls}]}, CHAT)
    assert status == 400 and "tool_calls" in answer["error"]["message"]


def test_half_a_surrogate_pair_in_a_call_can_be_sent():
    """A model may write it with an escape."""
    _, calls = split_calls(r'{"name": "f", "arguments": {"city": "\ud800"}}', {"f"})
    assert json.loads(calls[0]["function"]["arguments"].encode()) == {"city": "?"}
