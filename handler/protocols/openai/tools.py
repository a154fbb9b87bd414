"""Calls of tools in a model's text, in the formats that most models were trained on.

Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several of them, also after some text.
Llama 3: the whole text is `{"name": …, "parameters": {…}}`, or several with ";" between them.
Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`; the marker is a special token, which the text lacks.
"""

import json
import re
import secrets
from typing import Any

_HERMES, _MISTRAL = "<tool_call>", "[TOOL_CALLS]"
_BARE = re.compile(r"\s*(\[\s*)?(\{|$)")  # JSON from the first character on, or what may become it


def split_calls(text: str, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """Content and calls, the latter as OpenAI's `tool_calls`. Unless all are calls of tools in `names`, the whole
    text is content."""
    before, values = _written_calls(text)
    calls = [_call(value, names) for value in values]
    if not calls or None in calls:
        return text, []
    return before.rstrip(), [call for call in calls if call]


def certain_content(text: str) -> str:
    """The beginning of an unfinished text that is content whatever follows: no call begins in it, nor the spaces
    before one."""
    if _BARE.match(text):
        return ""
    ends = [at for marker in (_HERMES, _MISTRAL) if (at := text.find(marker)) >= 0]
    ends += [
        len(text) - n for marker in (_HERMES, _MISTRAL) for n in range(1, len(marker)) if text.endswith(marker[:n])
    ]
    return text[: min(ends, default=len(text))].rstrip()


def _written_calls(text: str) -> tuple[str, list[Any]]:
    """The text before the calls, and the JSON values that they are; None for what is no JSON."""
    before, marker, written = text.partition(_HERMES)
    if marker:
        blocks = [block.strip().removesuffix("</tool_call>") for block in written.split(_HERMES)]
        return before, [value for block in blocks for value in _json_values(block) or [None]]
    before, marker, written = text.partition(_MISTRAL)
    return (before, _json_values(written)) if marker else ("", _json_values(text))


def _json_values(text: str) -> list[Any]:
    """The values of a list, or those one after the other, maybe with ";" between them; none if it is anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    text = text.strip()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            at += len(text[at:]) - len(text[at:].lstrip("; \n"))
    except (ValueError, RecursionError):
        return []
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _call(value: Any, names: set[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not (isinstance(name, str) and name in names and isinstance(arguments, dict)):
        return None
    # Half a surrogate pair, which a model may write with an escape, is no text that can be sent.
    written = json.dumps(arguments, ensure_ascii=False).encode(errors="replace").decode()
    function = {"name": name.encode(errors="replace").decode(), "arguments": written}
    # Mistral's chat templates take ids of nine letters and digits only.
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}
