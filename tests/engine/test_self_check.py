"""The engine refuses, when it is made, a model whose rows depend on one another; rounding is no reason."""

import pytest
import torch

from handler.engine import Engine, UnsupportedModel, model_runner
from handler.engine.attention import UNSEEN, key_positions

from .architectures import RUNS
from .conftest import make_model, make_tokenizer

CASES = {case.model_type: case for case in RUNS}
WITH_EXPERTS = ("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bloom", "llama", "gemma3_text", *WITH_EXPERTS])
def test_rounding_is_not_refused(model_type, dtype):
    """Where it changes which experts are chosen, neither."""
    Engine(CASES[model_type].make_model().to(dtype), make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_token_is_noticed(dtype, monkeypatch):
    def hides_one(lengths, counts, context):
        keys = key_positions(lengths, counts, context)
        return keys.masked_fill(keys == 2, UNSEEN) if context.past_length else keys

    monkeypatch.setattr(model_runner, "key_positions", hides_one)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM gives other logits .* off by"):
        Engine(CASES["llama"].make_model().to(dtype), make_tokenizer())


def test_positions_that_are_columns_are_noticed(monkeypatch):
    model = CASES["gpt2"].make_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids, **inputs: forward(**inputs))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel gives other logits"):
        Engine(model, make_tokenizer())


def test_logits_that_are_not_numbers_are_refused():
    model = CASES["llama"].make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM gives logits that are not numbers"):
        Engine(model, make_tokenizer())


def test_a_lack_of_memory_is_not_the_models_fault(monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    model = CASES["llama"].make_model()
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(model, make_tokenizer())


def test_it_leaves_nothing_in_the_cache():
    engine = Engine(make_model("llama"), make_tokenizer())
    assert not engine._cache.layers
