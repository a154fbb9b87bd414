"""The engine refuses, when it is made, a model whose rows depend on one another; rounding is no reason."""

import gc

import pytest
import torch

from handler.engine import Engine, UnsupportedModel, model_runner, rounding, self_check
from handler.engine.architecture import Architecture
from handler.engine.attention import UNSEEN, key_positions
from handler.engine.kv_cache import RowLayer

from .architectures import RUNS
from .conftest import make_model, make_tokenizer, offloaded_model

CASES = {case.model_type: case for case in RUNS}
WITH_EXPERTS = ("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_words_that_a_model_blanks_out_hide_no_difference(dtype):
    logits, others = torch.randn(2, 3, 500).to(dtype)
    for of in (logits, others):
        of[:, 400:] = torch.finfo(dtype).min
    assert rounding.differences(logits, others).min() > 1 and not rounding.differences(logits, logits).any()
    others[1, 7] = torch.nan
    assert rounding.differences(others, logits).isnan().tolist() == [False, True, False]


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


# The second as a CPU's allocator says it.
NO_MEMORY = (torch.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
def test_a_lack_of_memory_is_not_the_models_fault(monkeypatch, error):
    def forward(*args, **kwargs):
        raise error

    model = CASES["llama"].make_model()
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(type(error), match="memory"):
        Engine(model, make_tokenizer())


def test_it_leaves_nothing_in_the_cache():
    engine = Engine(make_model("llama"), make_tokenizer())
    assert not engine._cache.layers


def test_the_checks_rows_are_gone_when_it_is_through():
    """And not when the interpreter happens to look for what refers to itself: of a large model they are 50 MB."""
    model = make_model("bloom")
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects() if isinstance(thing, RowLayer)}
        self_check.check_rows(model, Architecture.of(model))
        left = [thing for thing in gc.get_objects() if isinstance(thing, RowLayer) and id(thing) not in before]
        assert not left
    finally:
        gc.enable()


@pytest.mark.parametrize("on_disk, passes", [((), 4), ((1,), 2)])
def test_weights_on_disk_are_read_twice(monkeypatch, on_disk, passes):
    counted = []
    forward = model_runner.ModelRunner.forward
    monkeypatch.setattr(model_runner.ModelRunner, "forward", lambda *given: counted.append(given[1]) or forward(*given))
    model = offloaded_model("llama", on_disk)
    self_check.check_rows(model, Architecture.of(model))
    assert len(counted) == passes
