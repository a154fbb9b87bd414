"""Requests as clients send them, to the model `bloom`."""

import itertools
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor, as_completed

import psutil
import requests

PROMPT = "My dog is cute"
# Takes ten seconds and more, if nobody ends it. Sampled: greedy text repeats itself, is guessed and comes too fast.
ENDLESS = {"max_tokens": 8000, "ignore_eos": True, "temperature": 1, "seed": 0}


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
    """OpenAI's completions; a stream's body is not read yet. Not to read a whole answer's would be to hang up on it."""
    body = {"prompt": PROMPT, "stream": False, **body}
    url = f"{url}/predictions/bloom/1.0/v1/completions"
    return requests.post(url, json=body, timeout=120, stream=body["stream"])


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


def workers(server):
    """What TorchServe says of its workers."""
    return requests.get(f"{server.management_url}/models/bloom", timeout=60).json()[0]["workers"]


def worker(server):
    """The process that runs the model."""
    return psutil.Process(workers(server)[0]["pid"])


def at_once(count, action):
    """action(0), action(1), … at the same time; the results in this order."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, range(count)))


def start_endless(server, stream):
    """A connection on which an endless answer has begun, and the request's id."""
    body = json.dumps({"prompt": PROMPT, **ENDLESS, "stream": stream}).encode()
    head = "POST /predictions/bloom HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    while b"\r\n\r\n" not in received:
        received += (more := connection.recv(65536))
        assert more, received
    return connection, re.search(rb"x-request-id: (\S+)", received, re.IGNORECASE)[1].decode()


def overfill(server, ask):
    """The answers to 24 times `ask()` at once while others have all four rows: of sixteen that found no place, and of
    eight that waited until those others had gone."""
    others = [start_endless(server, stream=True)[0] for _ in range(4)]
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask) for _ in range(24)]
        first = [future.result() for future in itertools.islice(as_completed(asked), 16)]
        for connection in others:
            connection.close()
    return first, [answer for answer in (future.result() for future in asked) if answer not in first]
