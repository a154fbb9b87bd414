"""Bad and odd requests over every protocol, the same ones at every run, and what a right answer to one is."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jsonschema_rs
import yaml

PREDICT, INFER, ANY = "/v1/models/bloom:predict", "/v2/models/bloom/infer", "/predictions/bloom"
COMPLETIONS = "/predictions/bloom/1.0/v1/completions"
CHAT = "/predictions/bloom/1.0/v1/chat/completions"
PROMPT = "My dog is cute"
MAX_PROMPT_TOKENS = 100  # of the servers that the corpus is sent to
JSON = "application/json"

OPENAPI = yaml.safe_load(Path("docs/openapi.yaml").read_text())
SCHEMAS = {PREDICT: "Predict", INFER: "Infer", COMPLETIONS: "Completion", CHAT: "Chat"}
ANSWERS = {PREDICT: "Predictions", INFER: "Inferred", COMPLETIONS: "CompletionAnswer", CHAT: "ChatAnswer"}


@dataclass(frozen=True)
class Case:
    """One HTTP request.

    body: bytes, or the parts of a form by their names.
    names: what the message must hold if the answer is an error.
    refused: whether it must be one.
    continues: the prompt whose greedy continuation a right answer holds.
    """

    name: str
    path: str
    body: bytes | dict[str, bytes]
    names: str = ""
    refused: bool = False
    continues: str | None = None
    content_type: str | None = JSON


# What to put where something else is expected: JSON's source, as not all of it has a value in Python.
ODD_VALUES = {
    "text": '"x"',
    "empty text": '""',
    "number as text": '"1"',
    "lone surrogate": '"\\ud800"',
    "NUL": '"a\\u0000b"',
    "zero": "0",
    "one": "1",
    "minus one": "-1",
    "fraction": "1.5",
    "whole fraction": "2.0",
    "NaN": "NaN",
    "infinity": "Infinity",
    "1e309": "1e309",
    "-1e309": "-1e309",
    "1e-310": "1e-310",
    "huge": "9" * 30,
    "huge negative": "-" + "9" * 30,
    "4,300 digits": "9" * 4300,
    "5,000 digits": "9" * 5000,
    "2**63": str(2**63),
    "true": "true",
    "false": "false",
    "null": "null",
    "list": "[]",
    "list of lists": "[[]]",
    "list of texts": '["a", "b"]',
    "list of odd things": '["a", 1, null, {}]',
    "object": "{}",
    "object with text": '{"a": "b"}',
    "object by number": '{"1": 1}',
    "nested 60": "[" * 60 + "]" * 60,
    "nested 900": '{"a":' * 900 + "1" + "}" * 900,
}
GENERATION = [
    *("model", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("stream", "stream_options", "max_tokens", "ignore_eos", "min_tokens", "min_p", "top_k", "repetition_penalty"),
    *("user", "response_format", "guided_json", "guided_regex", "guided_choice", "structured_outputs", "cache_salt"),
]
ODD_FIELDS = {
    COMPLETIONS: (["prompt", "echo", "logprobs", "best_of", *GENERATION], f'"prompt": "{PROMPT}"'),
    CHAT: (
        [
            *("messages", "logprobs", "top_logprobs", "max_completion_tokens", "tools", "tool_choice"),
            "parallel_tool_calls",
            *GENERATION,
        ],
        '"messages": [{"role": "user", "content": "hello"}]',
    ),
    PREDICT: (["instances", "parameters"], f'"instances": ["{PROMPT}"]'),
    INFER: (
        ["inputs", "outputs", "parameters", "id", "model_name"],
        f'"inputs": [{{"name": "t", "shape": [1], "datatype": "BYTES", "data": ["{PROMPT}"]}}]',
    ),
    ANY: (["data"], '"data": "a"'),
}
PARAMETERS = [
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "eos_token_id"),
    *("stop_strings", "max_time", "num_return_sequences", "seed", "return_full_text", "sequence_bias", "num_beams"),
    *("exponential_decay_length_penalty", "min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "renormalize_logits"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "pad_token_id", "bos_token_id", "remove_invalid_values"),
]
MESSAGE = ["role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations", "audio", "function_call"]


def _with(fields: str, name: str, value: str) -> bytes:
    """A JSON object of these fields; `name` in it once, with this value."""
    others = "" if fields.startswith(f'"{name}"') else f"{fields}, "
    return f'{{{others}"{name}": {value}}}'.encode()


def _odd_fields():
    """Every field of every protocol, with every odd value."""
    for path, (names, fields) in ODD_FIELDS.items():
        for name in names:
            for kind, value in ODD_VALUES.items():
                unknown = name == "parameters" and value.startswith("{")  # then the message names what is in it
                yield Case(f"{path} {name}: {kind}", path, _with(fields, name, value), "" if unknown else name)
    for name in PARAMETERS:
        for kind, value in ODD_VALUES.items():
            body = f'{{"instances": ["a"], "parameters": {{"{name}": {value}}}}}'.encode()
            yield Case(f"{PREDICT} parameters.{name}: {kind}", PREDICT, body, name)
    for name in MESSAGE:
        for kind, value in ODD_VALUES.items():
            message = {"role": '"user"', "content": '"hello"', name: value}
            source = ", ".join(f'"{field}": {one}' for field, one in message.items())
            yield Case(f"message {name}: {kind}", CHAT, f'{{"messages": [{{{source}}}]}}'.encode(), "messages")
    for name in ("name", "shape", "datatype", "data", "parameters"):
        for kind, value in ODD_VALUES.items():
            tensor = {"name": '"t"', "shape": "[1]", "datatype": '"BYTES"', "data": '["a"]', name: value}
            source = ", ".join(f'"{field}": {one}' for field, one in tensor.items())
            yield Case(f"tensor {name}: {kind}", INFER, f'{{"inputs": [{{{source}}}]}}'.encode(), "inputs")


def _odd_names():
    """Names that no field has, wherever there are fields."""
    for name in ("\\ud800", "a\\u0000", "", "__class__", "Prompt", "🐶", "1"):
        field = f'"{name}": 1'
        for path, (_, fields) in ODD_FIELDS.items():
            if path != ANY:
                yield Case(f"{path} {name!r}", path, f"{{{fields}, {field}}}".encode(), refused=True)
        for kind, path, source in (
            ("parameter", PREDICT, '{"instances": ["a"], "parameters": {%s}}'),
            ("instance", PREDICT, '{"instances": [{"data": "a", %s}]}'),
            ("tensor", INFER, '{"inputs": [{"name": "t", "shape": [1], "datatype": "BYTES", "data": ["a"], %s}]}'),
            ("message", CHAT, '{"messages": [{"role": "user", "content": "a", %s}]}'),
            ("part", CHAT, '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", %s}]}]}'),
            ("form", CHAT, '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "text", %s}}'),
            ("option", COMPLETIONS, '{"prompt": "a", "stream": true, "stream_options": {%s}}'),
            ("outputs", COMPLETIONS, '{"prompt": "a", "structured_outputs": {%s}}'),
        ):
            yield Case(f"{kind} {name!r}", path, (source % field).encode(), refused=True)


def _bodies():
    """Bodies that are no object of any protocol."""
    sources = {
        "nothing": b"",
        "half an object": b'{"instances": [',
        "half a text": b'{"prompt": "a',
        "two objects": b'{"prompt": "a"}{"prompt": "b"}',
        "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
        "NUL": b"\0",
        "a list": b'[{"prompt": "a"}]',
        "a text": b'"a"',
        "a number": b"17",
        "null": b"null",
        "NaN": b"NaN",
        "no protocol's fields": b'{"text": "a"}',
        "deep lists": b"[" * 2000 + b"]" * 2000,
        "deeper lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
        "a control character": b'{"prompt": "a\nb"}',
        "10,000 unknown fields": json.dumps({f"x{i}": i for i in range(10_000)}).encode(),
        "100,000 unknown fields": json.dumps({f"x{i}": i for i in range(100_000)}).encode(),
        "a long name": json.dumps({"x" * 100_000: 1}).encode(),
    }
    for path in ODD_FIELDS:
        for kind, source in sources.items():
            may_be_text = path not in (COMPLETIONS, CHAT) and kind in ("NUL", "a text")
            yield Case(f"{path} body: {kind}", path, source, refused=not may_be_text)
    for kind, source in sources.items():
        yield Case(f"text body: {kind}", ANY, source, content_type=None)


def _lists():
    """Lists that are long, and ids that are out of range."""
    for count in (9, 10_000, 100_000):
        texts = json.dumps(["a"] * count)
        tensor = f'{{"name": "t", "shape": [{count}], "datatype": "BYTES", "data": {texts}}}'
        messages = json.dumps([{"role": "user", "content": "a"}] * count)
        parts = json.dumps([{"type": "text", "text": "a"}] * count)
        for path, name, source in (
            (PREDICT, "n:", f'{{"instances": {texts}}}'),
            (PREDICT, "instances", f'{{"instances": {json.dumps([1] * count)}}}'),
            (INFER, "n:", f'{{"inputs": [{tensor}]}}'),
            (INFER, "inputs", f'{{"inputs": {json.dumps([1] * count)}}}'),
            (INFER, "outputs", f'{{"inputs": [{tensor}], "outputs": {json.dumps([1] * count)}}}'),
            (INFER, "shape", f'{{"inputs": [{tensor.replace(str(count), "2", 1)}]}}'),
            (COMPLETIONS, "n:", f'{{"prompt": {texts}}}'),
            (COMPLETIONS, "prompt", f'{{"prompt": {json.dumps([1.5] * count)}}}'),
            (COMPLETIONS, "prompt", f'{{"prompt": {json.dumps([[]] * count)}}}'),
            (COMPLETIONS, "stop", f'{{"prompt": "a", "stop": {json.dumps([1] * count)}}}'),
            (
                COMPLETIONS,
                "logit_bias",
                f'{{"prompt": "a", "logit_bias": {json.dumps({str(-i - 1): 1 for i in range(count)})}}}',
            ),
            (CHAT, "messages", f'{{"messages": {json.dumps([1] * count)}}}'),
            (CHAT, "messages", f'{{"messages": [{{"role": "user", "content": {json.dumps([1] * count)}}}]}}'),
            (CHAT, "tools", f'{{"messages": [{{"role": "user"}}], "tools": {json.dumps([1] * count)}}}'),
        ):
            yield Case(f"{path} {name} {count} {len(source)}", path, source.encode(), name, refused=True)
        for path, source in (
            (CHAT, f'{{"messages": {messages}}}'),
            (CHAT, f'{{"messages": [{{"role": "user", "content": {parts}}}]}}'),
        ):
            yield Case(f"{path} {count} {len(source)}", path, source.encode(), refused=count > 9)
    for path, field in ((COMPLETIONS, '"stop": {}'), (PREDICT, '"parameters": {{"stop_strings": {}}}')):
        start = '"prompt": "a"' if path == COMPLETIONS else '"instances": ["a"]'
        for count, length in ((64, 256), (65, 9), (1, 257), (10_000, 9), (1, 100_000)):
            strings = json.dumps([f"{i} ".ljust(length, "x") for i in range(count)])
            body = f"{{{start}, {field.format(strings)}}}".encode()
            yield Case(
                f"{path} {count} stop strings of {length}", path, body, "stop", refused=(count, length) != (64, 256)
            )
    for ids in ([-1], [384], [10**30], [2**63], [5] * 10_000, [5] * 100_000):
        body = json.dumps({"prompt": ids}).encode()
        yield Case(f"token ids {ids[0]} x {len(ids)}", COMPLETIONS, body, "prompt", refused=True)
        body = json.dumps({"instances": ["a"], "parameters": {"suppress_tokens": ids}}).encode()
        yield Case(f"suppressed ids {ids[0]} x {len(ids)}", PREDICT, body, "suppress_tokens", refused=True)


def _lengths():
    """0, 1, as many tokens as fit, and one more. "x" is one token."""
    for count in (0, 1, MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS + 1, 100_000):
        text, fits = "x" * count, count <= MAX_PROMPT_TOKENS
        case = {"refused": not fits, "continues": text if fits else None, "names": "prompt"}
        yield Case(f"{count} tokens, completion", COMPLETIONS, json.dumps({"prompt": text}).encode(), **case)
        yield Case(f"{count} tokens, v1", PREDICT, json.dumps({"instances": [text]}).encode(), **case)
        if count:
            yield Case(f"{count} tokens, text", ANY, text.encode(), content_type="text/plain", **case)
            ids = json.dumps({"prompt": [91] * count}).encode()
            yield Case(f"{count} token ids", COMPLETIONS, ids, "prompt", refused=not fits)
    for new in (0, 1, 8, 10**6):
        body = json.dumps({"prompt": PROMPT, "max_tokens": new}).encode()
        yield Case(
            f"{new} new tokens", COMPLETIONS, body, "max_tokens" if not new else "tokens", refused=new in (0, 10**6)
        )


def _odd_but_right():
    """Bodies that are odd and have a right answer."""
    for kind, text in {
        "NUL": "a\0b",
        "controls": "\x01\x1b\x7f\u2028",
        "emoji": "👩‍💻🐶",
        "right to left": "שלום \u202e",
        "unassigned": "\U000e0fff",
        "replacement": "\ufffd",
        "spaces": " \t \n ",
        "braces": "{ not JSON",
    }.items():
        yield Case(f"text {kind}", ANY, text.encode(), content_type="text/plain", continues=text)
        yield Case(f"prompt {kind}", COMPLETIONS, json.dumps({"prompt": text}).encode(), continues=text)
        yield Case(f"instance {kind}", PREDICT, json.dumps({"instances": [text]}).encode(), continues=text)
        yield Case(f"part {kind}", ANY, {"data": text.encode()}, continues=text, content_type=None)
    yield Case("duplicate keys", COMPLETIONS, b'{"prompt": "a", "prompt": "My dog"}', continues="My dog")
    yield Case("spaces around", COMPLETIONS, b' \n{ "prompt"\t:"My dog"}\n ', continues="My dog")
    yield Case("byte order mark", COMPLETIONS, '{"prompt": "My dog"}'.encode("utf-8-sig"), continues="My dog")
    yield Case("escaped", COMPLETIONS, b'{"prompt": "\\u004dy dog"}', continues="My dog")
    yield Case("a pair of surrogates", COMPLETIONS, b'{"prompt": "\\ud83d\\udc36"}', continues="🐶")
    yield Case(
        "seven levels",
        INFER,
        b'{"inputs": [{"name": "t", "shape": [1,1,1], "datatype": "BYTES", "data": [[["a"]]]}]}',
        continues="a",
    )
    yield Case("JSON without a type", ANY, b'{"prompt": "My dog"}', content_type=None, continues="My dog")
    yield Case("JSON as text", ANY, b'{"prompt": "My dog"}', content_type="text/plain", refused=False)
    yield Case("another type", ANY, b"My dog", content_type="application/xml", continues="My dog")
    for count in (10_000, 300_000):
        user = json.dumps({"prompt": "a", "user": "x" * count}).encode()
        yield Case(f"user of {count} letters", COMPLETIONS, user, continues="a")


def _forms():
    """Forms of odd parts."""
    for name in ("url_path", "describe", "text", "", "body ", "data\n", "content-type"):
        yield Case(f"a part {name!r}", ANY, {name: b"a"}, "data", refused=True, content_type=None)
    yield Case("no text in a part", ANY, {"data": b"\xff\xfe"}, "UTF-8", refused=True, content_type=None)
    yield Case("an empty part", ANY, {"data": b""}, refused=True, content_type=None)
    yield Case("more parts", ANY, {"other": b"b", "data": b"a"}, continues="a", content_type=None)
    yield Case(
        "a part url_path beside data", ANY, {"data": b"a", "url_path": b"v1/models"}, refused=True, content_type=None
    )


def _paths():
    for path in ("v1", "v1/embeddings", "v1/models/gpt-4", "../../etc/passwd", "health/x", "%00", "v1/chat"):
        yield Case(f"path {path}", f"{ANY}/1.0/{path}", b'{"prompt": "a"}', refused=True)


def corpus() -> list[Case]:
    makers = (_odd_fields, _odd_names, _bodies, _lists, _lengths, _odd_but_right, _forms, _paths)
    return [case for maker in makers for case in maker()]


@functools.cache
def validator(name):
    return jsonschema_rs.validator_for({"components": OPENAPI["components"], "$ref": f"#/components/schemas/{name}"})


def text_of(answer, prompt):
    """The text of an answer, without its prompt."""
    if isinstance(answer, dict) and "choices" in answer:
        return answer["choices"][0]["text"]
    if isinstance(answer, dict):
        answer = answer["predictions"][0] if "predictions" in answer else answer["outputs"][0]["data"][0]
    return answer.removeprefix(prompt)


def is_error(answer, path):
    """In OpenAI's shape on its paths; on the path of every format in that of the one that was sent."""
    openai = path.startswith(f"{ANY}/1.0/v1/")
    shapes = ["Error", "OpenAIError"] if path == ANY else ["OpenAIError" if openai else "Error"]
    return any(validator(shape).is_valid(answer) for shape in shapes)


def allows(path, body):
    """Whether OpenAPI has this request. A null is the same as leaving the field out."""
    try:
        return validator(SCHEMAS[path]).is_valid(_without_nulls(body, levels=8))
    except ValueError as error:  # in a field that may hold anything
        assert "ecursion" in str(error)
        return True


def _without_nulls(body, levels):
    if isinstance(body, dict) and levels:
        return {name: _without_nulls(value, levels - 1) for name, value in body.items() if value is not None}
    return [_without_nulls(one, levels - 1) for one in body] if isinstance(body, list) and levels else body


def parsed(case):
    """The body as JSON, or None if it is none."""
    try:
        return json.loads(case.body) if isinstance(case.body, bytes) else None
    except (ValueError, RecursionError):
        return None


def wrong(case, status, answer, expected=None):
    """What is not as it should be with an answer, or None. expected: what it continues its prompt with, if known."""
    if status == 200:
        if case.refused:
            return "must be refused"
        if expected is not None and text_of(answer, case.continues) != expected:
            return f"says {answer!r}"
        body = parsed(case)
        if case.path in SCHEMAS and isinstance(body, dict):
            if not allows(case.path, body):
                return "OpenAPI does not allow this request"
            if isinstance(answer, dict) and not validator(ANSWERS[case.path]).is_valid(answer):
                return f"no answer as OpenAPI has it: {answer}"
        return None
    if status not in (400, 404, 408, 413) or not is_error(answer, case.path):
        return f"{status}: {answer}"
    message = answer["error"]["message"]
    names = ("prompt", "data") if case.names == "data" else (case.names,)
    if expected is not None or not (any(name in message for name in names) or message.startswith("the body")):
        return f"{status}: {message}"
    return None
