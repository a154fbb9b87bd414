"""JSON, expressions and choices on OpenAI's paths, as its client and vLLM's clients ask for them."""

import json
import re

import pytest

COMPLETIONS, CHAT = "v1/completions", "v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"enum": [None, True]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "none": {"const": None, "default": None},
    },
    "required": ["ok", "n", "none"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def compact(loaded):
    """A bias against blanks between the tokens of JSON: this model likes nothing better."""
    vocabulary = range(len(loaded.tokenizer))
    return {"logit_bias": {str(i): -100 for i in vocabulary if loaded.tokenizer.decode([i]).isspace()}}


def is_answer(text):
    answer = json.loads(text)
    is_valid = answer["ok"] in (None, True) and 0 <= answer["n"] <= 99 and answer["none"] is None
    return is_valid and list(answer) == ["ok", "n", "none"]


JSON_FIELDS = [
    {"response_format": FORMAT},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
]


@pytest.mark.parametrize("field", JSON_FIELDS, ids=["response_format", "guided_json", "as text", "structured_outputs"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_json_of_a_schema(send, chat, compact, path, field):
    prompt = {"prompt": "My dog"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hello"}]}
    status, answer, _ = send(prompt | {"max_tokens": 60} | compact | field, path)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert is_answer(choice["text"] if path == COMPLETIONS else choice["message"]["content"])


@pytest.mark.parametrize(
    "field, pattern",
    [
        ({"guided_regex": "[0-9]{2}-x"}, "[0-9]{2}-x"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"structured_outputs": {"regex": "[0-9]{2}-x"}}, "[0-9]{2}-x"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
    ],
    ids=str,
)
def test_an_expression_or_a_choice(send, field, pattern):
    body = {"prompt": ["My dog", "My cat"], "max_tokens": 20, "n": 2, "temperature": 1.5, "seed": 1} | field
    choices = send(body, COMPLETIONS)[1]["choices"]
    assert len(choices) == 4 and all(re.fullmatch(pattern, choice["text"]) for choice in choices)


@pytest.mark.parametrize(
    "field", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_a_json_object(send, chat, field):
    answer = send({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3} | field, CHAT)[1]
    assert answer["choices"][0]["message"]["content"][0] == "{" and answer["choices"][0]["finish_reason"] == "length"


def test_a_stream(stream, chat, compact):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "response_format": FORMAT} | compact
    deltas = [event["choices"][0]["delta"].get("content", "") for event in stream(body, CHAT)]
    assert len(deltas) > 3 and is_answer("".join(deltas))


@pytest.mark.parametrize(
    "fields, param",
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": FORMAT["json_schema"]}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "x" * 100_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice.0"),
        ({"guided_choice": ["x"] * 1001}, "guided_choice"),
        ({"guided_choice": ["\ud800"]}, "guided_choice"),
        ({"guided_json": 1}, "guided_json"),
        ({"guided_json": {"maximum": float("inf")}}, "guided_json"),
        ({"guided_json": '{"type": "number", "maximum": Infinity}'}, "guided_json"),
        ({"guided_json": '{"a": ' * 20_000}, "guided_json"),
        ({"structured_outputs": {"json": []}}, "structured_outputs.json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_kept_is_a_400_that_names_the_field(send, fields, param, streamed):
    status, answer, _ = send({"prompt": "My dog", "stream": streamed} | fields, COMPLETIONS)
    assert status == 400, answer
    assert answer["error"]["param"] == param


def test_tools_and_a_form_of_the_answer_exclude_each_other(send, chat):
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"messages": [{"role": "user", "content": "Hello"}], "tools": tools, "guided_choice": ["a"]}
    status, answer, _ = send(body, CHAT)
    assert status == 400 and "tools and guided_choice" in answer["error"]["message"]
    assert send(body | {"tool_choice": "none"}, CHAT)[1]["choices"][0]["message"]["content"] == "a"
    status, answer, _ = send(body | {"tool_choice": "required"}, CHAT)
    assert status == 400 and answer["error"]["param"] == "tool_choice"
