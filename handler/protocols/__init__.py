"""The wire formats: what a request asks for."""

from dataclasses import dataclass
from typing import Any


class BadRequest(ValueError):
    """The request cannot be served as it is; the message says what to send instead."""


@dataclass(frozen=True)
class Call:
    """The prompts of one request, and whether it is a KServe v1 one with its list of instances."""

    prompts: list[str]
    v1: bool


def parse(entry: dict) -> Call:
    """What TorchServe hands over for one request -> its prompts. Raises BadRequest."""
    body = entry.get("body", entry.get("data"))
    if not entry:
        raise BadRequest("the body did not arrive: `curl -d` needs -H 'Content-Type: application/json'")
    if isinstance(body, bytes | bytearray):
        try:
            body = body.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the body is not UTF-8 text: {error}") from None
    if isinstance(body, dict) and isinstance(body.get("instances"), list) and body["instances"]:
        return Call([_instance(instance) for instance in body["instances"]], v1=True)
    if isinstance(body, dict) and isinstance(body.get("data"), str):
        body = body["data"]
    if isinstance(body, str) and body:
        return Call([body], v1=False)
    raise BadRequest('send text, or {"instances": ["…"]} as application/json')


def _instance(instance: Any) -> str:
    text = instance.get("data") if isinstance(instance, dict) else instance
    if not isinstance(text, str) or not text:
        raise BadRequest('each of "instances" must be a non-empty string or {"data": "…"}')
    return text
