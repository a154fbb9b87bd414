"""Record what a served model answers to a corpus of requests, to compare two versions of the code byte for byte.

    make serve MODEL_DIR=… MODEL_NAME=m & python -m tests.record_answers --model-name m before.json
    … change the code, serve again …      python -m tests.record_answers --model-name m after.json
    diff before.json after.json

Requests are sent one after the other, and then all together. Ids and times are blanked, and in what is sent together
the log-probabilities too: their last digits depend on who else is in the batch.
"""

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

PROMPT = "My dog is cute"
PROMPTS = [PROMPT, "東京", "The quick brown fox jumps over", "a", "naïve café 🐶", "x " * 300]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
BLANKED = re.compile(r'"(id|created|request_id)": ?("(?:cmpl|chatcmpl)-[0-9a-f]{32}"|\d{10})')
LOGPROBS = re.compile(r"-\d+\.\d+(e-\d+)?")
GREEDY = {"max_new_tokens": 12}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "seed": 7, "max_new_tokens": 12}

V1_PARAMETERS: list[dict[str, Any]] = [
    *({"max_new_tokens": count} for count in (1, 2, 30)),
    *({**SAMPLED, **more} for more in ({}, {"top_p": 0.5}, {"num_return_sequences": 3}, {"min_p": 0.1, "top_k": 0})),
    {**GREEDY, "repetition_penalty": 1.4},
    {**GREEDY, "no_repeat_ngram_size": 2},
    {**GREEDY, "bad_words_ids": [[5], [6, 7]]},
    {**GREEDY, "stop_strings": ["e", " the"]},
    {**GREEDY, "return_full_text": False},
    {"max_length": 40},
    {**GREEDY, "min_new_tokens": 5},
    {**GREEDY, "forced_eos_token_id": 3},
    # refused
    {"temprature": 1},
    {"num_beams": 4},
    {"max_new_tokens": "5"},
    {"max_new_tokens": 0},
    {"max_new_tokens": 10**6},
    {"temperature": -1},
    {"top_p": 1.5},
    {"top_k": -3, "do_sample": True},
    {"seed": 2**70},
    {"bad_words_ids": [[10**7]]},
    {"eos_token_id": "x"},
    {"stop_strings": [""]},
    {"num_return_sequences": 10**4},
    {"max_time": -1},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "max_tokens": 9},
    {"prompt": PROMPTS[:4], "max_tokens": 9, "n": 2, "temperature": 0.7, "seed": 1},
    {"prompt": [5, 6, 7], "max_tokens": 4},
    {"prompt": [[5, 6], [7]], "max_tokens": 4},
    {"prompt": PROMPT, "max_tokens": 6, "logprobs": 3},
    {"prompt": PROMPT, "max_tokens": 6, "logprobs": 2, "echo": True},
    {"prompt": PROMPT, "max_tokens": 0, "logprobs": 2, "echo": True},
    {"prompt": PROMPT, "max_tokens": 0, "echo": True},
    {"prompt": PROMPT, "max_tokens": 20, "stop": ["e", "zz"]},
    {"prompt": PROMPT, "max_tokens": 8, "presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"9": 5}},
    {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True, "min_tokens": 3},
    {"prompt": "x " * 3000},
    {"prompt": PROMPT, "model": "other"},
    {"prompt": []},
    {"prompt": [10**7]},
    {"prompt": PROMPT, "suffix": "x"},
    {"prompt": PROMPT, "best_of": 3},
    {"prompt": PROMPT, "max_tokens": 0},
    {"prompt": PROMPT, "n": 0},
    {"prompt": PROMPT, "temperature": -1},
    {"prompt": PROMPT, "logprobs": 99},
    {},
]
CHATS: list[dict[str, Any]] = [
    {"messages": CHAT, "max_tokens": 9},
    {"messages": CHAT, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2},
    {"messages": CHAT, "max_tokens": 9, "n": 2, "seed": 4, "temperature": 1.0, "top_p": 0.9},
    {"messages": []},
    {"messages": CHAT, "tools": [{"type": "function"}]},
    {"messages": CHAT, "response_format": {"type": "json_object"}},
    {"messages": CHAT, "top_logprobs": 2},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
]
V2: list[dict[str, Any]] = [
    {"id": "7", "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": PROMPTS[:2]}]},
    {
        "inputs": [{"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [[PROMPT], ["a"]]}],
        "parameters": {**SAMPLED, "num_return_sequences": 2},
    },
    {"inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "data": PROMPTS[:2]}]},
    {"inputs": [{"name": "text", "shape": [1], "datatype": "FP32", "data": [1.0]}]},
    {"inputs": [{"name": "text", "shape": [0], "datatype": "BYTES", "data": []}]},
    {"inputs": [], "model_name": "other"},
    {"inputs": [{"name": "t", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "outputs": [{"name": "no"}]},
]
RAW: list[tuple[bytes, str | None]] = [
    (PROMPT.encode(), "text/plain"),
    ("東京".encode(), None),
    (b"", "application/json"),
    (b"text=x", "application/x-www-form-urlencoded"),
    (b'{"instances": [', "application/json"),
    (b"\xff\xfe\x00", None),
    (b"[1, 2]", "application/json"),
    (b'{"data": "a"}', "application/json"),
    (b'{"text": "a"}', "application/json"),
]
PATHS = ["v1/models", "v1/models/other", "v1/nothing", "nothing", "health"]


def calls(url: str, name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, URL, keyword arguments for requests) of each request."""
    predictions, openai = f"{url}/predictions/{name}", f"{url}/predictions/{name}/1.0/v1"
    predict, infer = f"{url}/v1/models/{name}:predict", f"{url}/v2/models/{name}/infer"
    bodies = [(predict, {"instances": [PROMPT, {"data": "a"}], "parameters": params}) for params in V1_PARAMETERS]
    bodies += [(predict, {"instances": PROMPTS, "parameters": GREEDY})]
    bodies += [(predict, body) for body in ({"instances": "x"}, {"instances": []}, {"instances": [1]}, {"other": 1})]
    bodies += [(infer, body) for body in V2]
    for path, several in (("completions", COMPLETIONS), ("chat/completions", CHATS)):
        for body in several:
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            bodies += [(f"{openai}/{path}", body), (f"{openai}/{path}", streamed)]
    bodies += [(predictions, COMPLETIONS[0]), (predictions, CHATS[0]), (predictions, V2[0])]
    made: list[tuple[str, str, dict[str, Any]]] = [("POST", where, {"json": body}) for where, body in bodies]
    for data, content_type in RAW:
        headers = {"Content-Type": content_type} if content_type else {}
        made += [
            ("POST", where, {"data": data, "headers": headers}) for where in (predictions, f"{openai}/completions")
        ]
    return made + [("GET", f"{predictions}/1.0/{path}", {}) for path in PATHS]


def ask(call: tuple[str, str, dict[str, Any]], alone: bool) -> dict[str, Any]:
    """The answer, blanked. The chunks of a stream are joined, because where they are cut depends on the time."""
    method, url, arguments = call
    answer = requests.request(method, url, timeout=300, **arguments)
    body = BLANKED.sub(r'"\1": …', answer.content.decode(errors="backslashreplace"))
    body = body if alone else LOGPROBS.sub("…", body)
    headers = {key: answer.headers.get(key) for key in ("Content-Type", "Retry-After")}
    if body.startswith("data: "):
        return {"status": answer.status_code, **headers, "stream": _joined(body)}
    return {"status": answer.status_code, **headers, "body": body}


def _joined(stream: str) -> dict[str, Any]:
    """Each choice's text, log-probabilities and keys; usage; and how the stream ended."""
    *events, done, rest = stream.replace("…", "null").split("\n\n")
    found: dict[str, Any] = {"end": [done, rest], "choices": {}, "usage": None}
    for event in map(json.loads, (event.removeprefix("data: ") for event in events)):
        found["error"] = event.get("error")
        found["usage"] = event.get("usage") or found["usage"]
        found["keys"] = sorted(event)
        for choice in event.get("choices", []):
            joined = found["choices"].setdefault(str(choice["index"]), {"text": "", "logprobs": [], "roles": 0})
            delta = choice.get("delta", {"content": choice.get("text")})
            joined["text"] += delta.get("content") or ""
            joined["roles"] += "role" in delta
            joined["finish_reason"] = choice["finish_reason"]
            for key, values in (choice["logprobs"] or {}).items():
                joined["logprobs"] += [[key, value] for value in values or []]
    found["choices"] = dict(sorted(found["choices"].items()))
    for joined in found["choices"].values():
        joined["logprobs"].sort(key=lambda pair: pair[0])  # stable: each list stays in its order
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="record_answers", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    made = calls(args.url, args.model_name)
    alone = [ask(call, alone=True) for call in made]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda call: ask(call, alone=False), made))
    entries = [
        {"request": [method, url.removeprefix(args.url), str(arguments)[:200]], "alone": one, "together": other}
        for (method, url, arguments), one, other in zip(made, alone, together, strict=True)
    ]
    args.output.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    statuses = [entry["status"] for entry in alone]
    print(f"{args.output}: {len(made)} requests, statuses { ({s: statuses.count(s) for s in sorted(set(statuses))}) }")


if __name__ == "__main__":
    main()
