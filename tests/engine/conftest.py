"""Tiny models of four architectures with random weights, and a tokenizer trained here: no hub, no files."""

import functools
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from handler.engine.model_runner import ModelRunner
from handler.weights.onloading import onload_weights
from handler.weights.packed import pack_weights
from handler.weights.streaming import stream_weights
from tests.models import DEVICE, train_tokenizer

torch.set_num_threads(1)  # tiny matrices: a second thread only waits

KINDS = ("bloom", "llama", "gpt2", "qwen2")
VOCAB = 320
EOS = 0
CONTEXT = 256
TEXT = [
    "The dog ran home. Stop there, said the cat.",
    "naïve café — 日本語のテキスト 🙂🚀",
    "one two three four five",
]


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(VOCAB, TEXT, {"eos_token": "<eos>", "bos_token": "<bos>"})


def _config(kind: str):
    # Weights far larger than usual, so that the best token is never nearly tied with the second.
    wide = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "initializer_range": 0.5}
    rope = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
    ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": EOS}
    return {
        "bloom": lambda: BloomConfig(**wide, **ids),
        "llama": lambda: LlamaConfig(**wide, **rope, **ids),
        "gpt2": lambda: GPT2Config(**wide, **ids, n_positions=CONTEXT),
        "qwen2": lambda: Qwen2Config(**wide, **rope, **ids),
    }[kind]()


@functools.cache
def make_model(kind: str):
    """A float32 model with its weights in memory."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(_config(kind)).eval().to(DEVICE)


@functools.cache
def reference(kind: str, prompt: tuple[int, ...], new: int = 24) -> list[int]:
    """What `model.generate` makes of this prompt when it is alone. A shorter answer is its beginning."""
    ids = torch.tensor([prompt], device=DEVICE)
    out = make_model(kind).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@functools.cache
def offloaded_model(kind: str, on_disk: tuple[int, ...]):
    """The same weights through Accelerate: layers `on_disk` are read anew in every forward, the second one from memory
    where a GPU computes; the others stay on the device, packed on a CPU."""
    model = make_model(kind)
    if not on_disk:
        return model
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    base = model.base_model_prefix
    stack = "h" if hasattr(model.base_model, "h") else "layers"
    main: int | str = "cpu" if DEVICE.type == "cpu" else 0
    places = {f"{base}.{name}": main for name, _ in model.base_model.named_children() if name != stack}
    away = {0: "disk", 1: "disk" if main == "cpu" else "cpu", 2: "disk"}
    places |= {f"{base}.{stack}.{i}": away[i] if i in on_disk else main for i in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": main}, offload_folder=tempfile.mkdtemp()
    )
    if main == "cpu":
        assert pack_weights(model)
    else:
        stream_weights(model, 1 << 20)
        assert onload_weights(model, 20_000)
    return model


def guesser(texts: list[list[int]]):
    """A stand-in for `prompt_lookup` that knows the texts that may come, but for a wrong token here and there."""

    def guess(token_ids, limit):
        text = next((text for text in texts if text[: len(token_ids)] == token_ids), [])
        drafts = [token if at * 7 % 5 else 3 for at, token in enumerate(text)]
        return drafts[len(token_ids) :][:limit]

    return guess


def prompt_ids(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def scheduled(monkeypatch):
    """scheduled() -> a list that gets each forward's numbers of scheduled tokens from now on."""

    def scheduled():
        forwards, forward = [], ModelRunner.forward

        def record(runner, batch):
            forwards.append(batch.num_scheduled_tokens)
            return forward(runner, batch)

        monkeypatch.setattr(ModelRunner, "forward", record)
        return forwards

    return scheduled
