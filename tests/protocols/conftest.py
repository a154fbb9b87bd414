"""A real engine on a tiny model, and requests as the handler drives them; no TorchServe."""

import json

import pytest
import torch

from handler.engine import Engine, EngineConfig
from handler.loading import load_model
from handler.protocols.base import ModelInfo
from handler.protocols.open_request import OpenRequest
from handler.settings import Settings

torch.set_num_threads(1)  # tiny matrices: a second thread only waits

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def loaded(bloom, tmp_path_factory):
    return load_model(bloom, Settings(), tmp_path_factory.mktemp("protocols"))


@pytest.fixture
def engine(loaded):
    config = EngineConfig(max_batch_size=4, max_queue=8, max_prompt_tokens=100, max_new_tokens=8)
    return Engine(loaded.model, loaded.tokenizer, config)


@pytest.fixture
def served(loaded):
    return ModelInfo(
        name="bloom",
        version="1.0",
        tokenizer=loaded.tokenizer,
        max_sequence_length=2048,
        return_full_text=True,
        created=1,
        describe=lambda: {"dtype": "float32", "versions": {"torch": "2.13.0"}, "device_map": {"": "cpu"}},
    )


@pytest.fixture
def chat(loaded):
    """The tokenizer has a chat template, as long as the test lasts."""
    loaded.tokenizer.chat_template = CHAT_TEMPLATE
    yield
    loaded.tokenizer.chat_template = None


@pytest.fixture
def send(engine, served):
    """send(body, path) -> (status, body of the answer, headers); a dictionary arrives as TorchServe's parsed JSON."""

    def send(body, path="", entry=None):
        request = OpenRequest(entry if entry is not None else {"body": body}, path, served, engine)
        while not request.finished:
            request.poll(5)
            engine.step()
        reply = request.reply(watch=True)
        body = json.loads(reply.body) if reply.content_type == "application/json" else reply.body
        return reply.status, body, reply.headers

    return send


@pytest.fixture
def stream(engine, served):
    """stream(body, path) -> the events of a stream, that ends as it must."""

    def stream(body, path):
        request = OpenRequest({"body": {**body, "stream": True}}, path, served, engine)
        parts = []
        while not request.finished:
            request.poll(5)
            engine.step()
            if not request.finished and (reply := request.reply(watch=True)):
                assert reply.more is True
                parts.append(reply.body)
        last = request.reply(watch=True)
        assert last.more is (False if parts else None)
        *events, done, rest = "".join([*parts, last.body]).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    return stream


@pytest.fixture
def generate(loaded):
    """generate(prompt, new) -> the text that `model.generate` adds greedily."""

    def generate(prompt, new=8):
        inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = loaded.model.generate(**inputs, max_new_tokens=new, do_sample=False)[0]
        whole = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return whole.removeprefix(prompt)

    return generate
