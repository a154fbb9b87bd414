"""Requests as clients send them, to the model `bloom`."""

import json
from concurrent.futures import ThreadPoolExecutor

import psutil
import requests

PROMPT = "My dog is cute"


def predict(url, *instances, **parameters):
    """KServe's v1 protocol."""
    body = {"instances": list(instances), "parameters": parameters}
    return requests.post(f"{url}/v1/models/bloom:predict", json=body, timeout=120)


def infer(url, text, **parameters):
    """The Open Inference Protocol, with the text as the request's id too."""
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    body = {"id": text, "inputs": [tensor], "parameters": parameters}
    return requests.post(f"{url}/v2/models/bloom/infer", json=body, timeout=120)


def complete(url, **body):
    """OpenAI's completions; the answer's body is not read yet."""
    body = {"prompt": PROMPT, **body}
    return requests.post(f"{url}/predictions/bloom/1.0/v1/completions", json=body, timeout=120, stream=True)


def events(answer):
    """The events of a stream that has its end."""
    lines = [line.removeprefix("data: ") for line in answer.iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(parts):
    """The text of a completion's events."""
    return "".join(part["choices"][0]["text"] for part in parts)


def describe(url):
    return requests.get(f"{url}/predictions/bloom/1.0/describe", timeout=60).json()


def worker(server):
    """The process that runs the model."""
    workers = requests.get(f"{server.management_url}/models/bloom", timeout=60).json()[0]["workers"]
    return psutil.Process(workers[0]["pid"])


def at_once(count, action):
    """action(0), action(1), … at the same time; the results in this order."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, range(count)))
