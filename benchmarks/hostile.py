"""What one client can do to the others: the longest wait of a small request beside a hostile one, and what both get.

python -m benchmarks.hostile --url http://127.0.0.1:8080 --model-name NAME     (on a server of make serve)
"""

import argparse
import json
import threading
import time
from typing import Any

import requests

SMALL = {"instances": ["My dog is cute"], "parameters": {"max_new_tokens": 2}}


def hostile_requests(url: str, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: (URL, keyword arguments of requests.post)."""
    predict, completions = f"{url}/v1/models/{name}:predict", f"{url}/predictions/{name}/1.0/v1/completions"
    return {
        "a describe header": (predict, {"json": SMALL, "headers": {"describe": "True"}}),
        "a prompt of 6 MB": (completions, {"json": {"prompt": "My dog is cute. " * 375_000}}),
        "100,000 prompts": (completions, {"json": {"prompt": ["a"] * 100_000}}),
        "100,000 stop strings": (
            predict,
            {
                "json": {
                    "instances": ["My dog is cute"],
                    "parameters": {"max_new_tokens": 60, "stop_strings": [f"never {i}" for i in range(100_000)]},
                }
            },
        ),
        "n of 128": (
            completions,
            {"json": {"prompt": "My dog is cute", "n": 128, "max_tokens": 100, "temperature": 1}},
        ),
    }


def beside(url: str, name: str, hostile: tuple[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Send small requests from two clients for so long, with three hostile ones in between, one after the other."""
    waits: list[float] = []
    statuses: list[int] = []
    end = time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < end:
            started = time.monotonic()
            answer = requests.post(f"{url}/v1/models/{name}:predict", json=SMALL, timeout=120)
            waits.append(time.monotonic() - started)
            statuses.append(answer.status_code)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    got = []
    for _ in range(3):
        time.sleep(seconds / 10)
        started = time.monotonic()
        where, arguments = hostile
        try:
            status = str(requests.post(where, timeout=30, **arguments).status_code)
        except requests.RequestException as error:
            status = type(error).__name__
        got.append([status, round(time.monotonic() - started, 2)])
    for thread in clients:
        thread.join()
    failed = sum(status != 200 for status in statuses)
    return {"small requests": len(waits), "failed": failed, "longest wait, s": round(max(waits), 3), "hostile": got}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--seconds", type=float, default=10, help="for each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    for kind, hostile in hostile_requests(args.url, args.model_name).items():
        print(json.dumps({kind: beside(args.url, args.model_name, hostile, args.seconds)}), flush=True)


if __name__ == "__main__":
    main()
