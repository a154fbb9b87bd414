"""What one client can do to the others: how long a small request waits and a stream pauses beside hostile requests.

python -m benchmarks.hostile --url http://127.0.0.1:8080 --model-name NAME     (on a server of make serve)

With `--corpus` the hostile requests are all those of tests/protocols/corpus.py, each once. Their slowest answer is told
too. It is for a server whose answers are short (`max_new_tokens` 8), as most of the corpus leaves that to the server.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import requests

from tests.protocols.corpus import Case, corpus

STREAM = {"prompt": "My dog is cute", "max_tokens": 150, "ignore_eos": True, "stream": True}
SMALL = {"instances": ["My dog is cute"], "parameters": {"max_new_tokens": 2}}


def hostile_requests(url: str, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: (URL, keyword arguments of requests.post)."""
    predict, completions = f"{url}/v1/models/{name}:predict", f"{url}/predictions/{name}/1.0/v1/completions"
    chat = f"{url}/predictions/{name}/1.0/v1/chat/completions"

    def with_parameters(**parameters: Any) -> tuple[str, dict[str, Any]]:
        return predict, {"json": {"instances": ["My dog is cute"], "parameters": {"max_new_tokens": 60} | parameters}}

    return {
        "a describe header": (predict, {"json": SMALL, "headers": {"describe": "True"}}),
        "a prompt of 6 MB": (completions, {"json": {"prompt": "My dog is cute. " * 375_000}}),
        "100,000 prompts": (completions, {"json": {"prompt": ["a"] * 100_000}}),
        "a body of lists, 4 MB": (completions, {"data": b'{"prompt": [' + b"[]," * 1_400_000 + b"[]]}"}),
        "100,000 stop strings": with_parameters(stop_strings=[f"never {i}" for i in range(100_000)]),
        "100,000 suppressed tokens": with_parameters(suppress_tokens=[5] * 100_000),
        "100,000 biased tokens": with_parameters(sequence_bias=[[[5], 1.0]] * 100_000),
        "a chat with 20 log-probabilities of 16 x 1,000 tokens": (
            chat,
            {
                "json": {
                    "messages": [{"role": "user", "content": "hello"}],
                    **{"n": 16, "max_tokens": 1000, "temperature": 1, "ignore_eos": True},
                    **{"logprobs": True, "top_logprobs": 20},
                }
            },
        ),
        "a chat with 20 log-probabilities of 4 x 1,000 tokens": (
            chat,
            {
                "json": {
                    "messages": [{"role": "user", "content": "hello"}],
                    **{"n": 4, "max_tokens": 1000, "temperature": 1, "ignore_eos": True},
                    **{"logprobs": True, "top_logprobs": 20},
                }
            },
        ),
        "n of 128": (
            completions,
            {"json": {"prompt": "My dog is cute", "n": 128, "max_tokens": 100, "temperature": 1}},
        ),
    }


def beside(url: str, name: str, hostile: Callable[[], Any]) -> dict[str, Any]:
    """Send small requests from one client and keep a stream open to another, until `hostile` has returned."""
    over = threading.Event()
    waits: list[float] = []
    gaps: list[float] = []
    statuses: list[int] = []

    def client() -> None:
        while not over.is_set():
            started = time.monotonic()
            answer = requests.post(f"{url}/v1/models/{name}:predict", json=SMALL, timeout=120)
            waits.append(time.monotonic() - started)
            statuses.append(answer.status_code)

    def listener() -> None:
        while not over.is_set():
            where = f"{url}/predictions/{name}/1.0/v1/completions"
            with requests.post(where, json=STREAM, stream=True, timeout=120) as answer:
                statuses.append(answer.status_code)
                last = None
                for _ in filter(None, answer.iter_lines()):
                    now = time.monotonic()
                    gaps.append(now - (last or now))
                    last = now

    neighbours = [threading.Thread(target=client), threading.Thread(target=listener)]
    for thread in neighbours:
        thread.start()
    time.sleep(0.5)
    got = hostile()
    time.sleep(0.5)
    over.set()
    for thread in neighbours:
        thread.join()
    return {
        "requests": len(statuses),
        "failed": sum(status != 200 for status in statuses),
        "longest wait, s": round(max(waits), 3),
        "longest gap, s": round(max(gaps), 3),
        "hostile": got,
    }


def three_times(where: str, arguments: dict[str, Any]) -> list[tuple[str, float]]:
    """Status and seconds of each."""
    got = []
    for _ in range(3):
        started = time.monotonic()
        try:
            status = str(requests.post(where, timeout=60, **arguments).status_code)
        except requests.RequestException as error:
            status = type(error).__name__
        got.append((status, round(time.monotonic() - started, 2)))
    return got


def whole_corpus(url: str, name: str) -> dict[str, Any]:
    """How many cases there are, and which three were answered last."""
    cases = corpus()
    times = []
    for case in cases:
        started = time.monotonic()
        send(url, name, case)
        times.append((round(time.monotonic() - started, 3), case.name))
    return {"cases": len(cases), "slowest": sorted(times, reverse=True)[:3]}


def send(url: str, name: str, case: Case) -> requests.Response:
    where = url + case.path.replace("bloom", name)
    if isinstance(case.body, dict):
        return requests.post(where, files={part: (None, value) for part, value in case.body.items()}, timeout=60)
    headers = {"Content-Type": case.content_type} if case.content_type else {}
    return requests.post(where, data=case.body, headers=headers, timeout=60)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--corpus", action="store_true", help="send the corpus of bad input instead")
    args = parser.parse_args(argv)
    if args.corpus:
        print(json.dumps(beside(args.url, args.model_name, lambda: whole_corpus(args.url, args.model_name))))
        return
    print(json.dumps({"nothing": beside(args.url, args.model_name, lambda: time.sleep(3))}), flush=True)
    for kind, request in hostile_requests(args.url, args.model_name).items():
        print(json.dumps({kind: beside(args.url, args.model_name, partial(three_times, *request))}), flush=True)


if __name__ == "__main__":
    main()
