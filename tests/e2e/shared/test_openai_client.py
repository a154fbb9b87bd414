"""OpenAI's own client, unchanged but for its base_url, and curl."""

import asyncio
import json
import subprocess

import openai
import pytest
from transformers import AutoTokenizer

from tests.e2e.asking import PROMPT, predict

PROMPTS = [PROMPT, "東京", "The quick brown fox", "a", "emoji 🐶", "{"]


@pytest.fixture
def url(continuous):
    return f"{continuous.url}/predictions/bloom/1.0/v1"


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_completions_streamed_or_not(client):
    whole = client.completions.create(model="bloom", prompt=PROMPT, max_tokens=20, logprobs=1)
    assert whole.usage.completion_tokens == 20 and whole.choices[0].finish_reason == "length"
    parts = client.completions.create(model="bloom", prompt=PROMPT, max_tokens=20, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_chat_streamed_or_not(client):
    request = {"model": "bloom", "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 20}
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.role == "assistant"
    options = {"include_usage": True}
    parts = list(client.chat.completions.create(**request, stream=True, stream_options=options))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage


def test_json_of_a_schema_streamed_or_not(client, bloom):
    properties = {"ok": {"enum": [None, True]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["ok", "n"], "additionalProperties": False}
    tokenizer = AutoTokenizer.from_pretrained(bloom)
    blanks = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()]
    request = {
        "model": "bloom",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        "logit_bias": dict.fromkeys(map(str, blanks), -100),  # this model likes nothing better
    }
    whole = client.chat.completions.create(**request)
    parts = client.chat.completions.create(**request, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    answer = json.loads(whole.choices[0].message.content)
    assert whole.choices[0].finish_reason == "stop" and list(answer) == ["ok", "n"]
    assert answer["ok"] in (None, True) and answer["n"] in range(100)
    completion = client.completions.create(model="bloom", prompt=PROMPT, extra_body={"guided_choice": ["red", "blue"]})
    assert completion.choices[0].text in ("red", "blue")
    with pytest.raises(openai.BadRequestError, match="guided_regex"):
        client.completions.create(model="bloom", prompt=PROMPT, extra_body={"guided_regex": "("})


def test_models(client):
    assert [model.id for model in client.models.list()] == ["bloom"]
    assert client.models.retrieve("bloom").id == "bloom"


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="bloom", prompt=PROMPT, suffix="x")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.APIStatusError, match="250 tokens") as error:
        client.completions.create(model="bloom", prompt="x" * 250)
    assert error.value.status_code == 413


def test_many_at_once_get_what_they_get_alone(client, url):
    sampling = {"model": "bloom", "max_tokens": 16, "temperature": 0.8, "seed": 5}
    alone = [client.completions.create(prompt=prompt, **sampling).choices[0].text for prompt in PROMPTS]

    async def streamed(asynchronous, prompt):
        parts = await asynchronous.completions.create(prompt=prompt, stream=True, **sampling)
        return "".join([part.choices[0].text async for part in parts])

    async def together():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asynchronous:
            return await asyncio.gather(*(streamed(asynchronous, prompt) for prompt in PROMPTS))

    assert asyncio.run(together()) == alone


def curl(*arguments, text=None):
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def test_curl(continuous, url, tmp_path, generated):
    body = '{"instances": [{"data": "My dog is cute"}]}'
    v1 = f"{continuous.url}/v1/models/bloom:predict"
    assert curl("-H", "Content-Type: application/json", "-d", body, v1) == predict(continuous.url, PROMPT).text
    assert "Content-Type: application/json" in curl("-d", body, v1)  # the well-known mistake, explained
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert curl("-T", str(tmp_path / "prompt.txt"), f"{continuous.url}/predictions/bloom") == generated()
    plain = ("-H", "Content-Type: text/plain", "--data-binary", f"@{tmp_path / 'prompt.txt'}")
    assert curl(*plain, f"{continuous.url}/predictions/bloom") == generated()
    stream = '{"prompt": "My dog", "stream": true}'
    assert curl("-N", "-H", "Content-Type: application/json", "-d", stream, f"{url}/completions").endswith("[DONE]\n\n")
