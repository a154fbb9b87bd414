"""Attention as two products is SDPA's within bfloat16, whatever the mask, the blocks and who shares a key head."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, BloomConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from handler.engine import Engine, EngineConfig, Request, block_attention, bloom
from handler.engine.architecture import Architecture
from handler.engine.block_attention import attention
from handler.engine.capacity import Capacity
from handler.kernels.cpu import has_code_for, lanes, use_machine_code
from handler.kernels.decode_attention import decode_attention as decode_attention_of_ours
from handler.kernels.prompt_attention import prompt_attention as prompt_attention_of_ours
from handler.loading import load_model
from handler.settings import Settings

from .conftest import EOS, VOCAB, make_model, make_tokenizer, prompt_ids


@pytest.fixture
def counted(monkeypatch):
    """How often SDPA is asked instead, where there is no code of ours and no AMX."""
    calls = []
    monkeypatch.setattr(
        block_attention, "sdpa_attention_forward", lambda *a, **k: calls.append(1) or sdpa_attention_forward(*a, **k)
    )
    monkeypatch.setattr(block_attention, "_FEW_KEYS", 0)
    monkeypatch.setattr(block_attention, "cpu_lacks", lambda dtype: False)
    monkeypatch.setattr(block_attention, "has_tiles", lambda: False)
    for name in ("can_decode", "can_attend"):
        monkeypatch.setattr(block_attention, name, lambda *given: False)
    return calls


def test_16_bits_that_the_cpu_has_no_instructions_for_are_left_to_sdpa(counted, monkeypatch):
    query, key, value = torch.randn(3, 2, 4, 40, 16, dtype=torch.bfloat16)
    attention(SimpleNamespace(is_causal=True), query, key, value, None)
    assert not counted
    monkeypatch.setattr(block_attention, "cpu_lacks", lambda dtype: dtype == torch.bfloat16)
    attention(SimpleNamespace(is_causal=True), query, key, value, None)
    assert counted


@pytest.mark.parametrize("new, is_left", [(40, True), (1, False)])
def test_with_amx_several_tokens_are_left_to_sdpa(counted, monkeypatch, new, is_left):
    monkeypatch.setattr(block_attention, "has_tiles", lambda: True)
    query, key, value = torch.randn(3, 2, 4, 40, 16, dtype=torch.bfloat16)
    attention(SimpleNamespace(is_causal=True), query[:, :, -new:], key, value, None)
    assert bool(counted) is is_left


def inputs(rows, heads, kv_heads, new, columns, kind):
    """Keys and values as the cache gives them, with spare columns behind; the last row sees two columns less."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, new, heads, 16, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, rows, kv_heads, columns + 5, 16, generator=generator)[:, :, :, :columns]
    mask = torch.ones(new, columns, dtype=torch.bool).tril(columns - new).repeat(rows, 1, 1, 1)
    mask[-1, :, :, :2] = columns == new
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    return module, query, key, value, None if kind == "none" else mask


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("new, columns, kind", [(1, 9, "bool"), (1, 9, "added"), (1, 9, "none"), (7, 7, "none")])
@pytest.mark.parametrize("block", [256, 3])
def test_one_query_or_a_prompt(counted, monkeypatch, heads, kv_heads, new, columns, kind, block):
    compare(counted, monkeypatch, heads, kv_heads, new, columns, kind, block)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("block", [256, 3])
def test_a_chunk_behind_others(counted, monkeypatch, kind, block):
    compare(counted, monkeypatch, 6, 2, 7, 12, kind, block)


def compare(counted, monkeypatch, heads, kv_heads, new, columns, kind, block):
    monkeypatch.setattr(block_attention, "_BLOCK_QUERIES", block)
    module, *tensors, mask = inputs(3, heads, kv_heads, new, columns, kind)
    query, key, value = (tensor.bfloat16() for tensor in tensors)
    exact, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, scaling=0.3)
    for keys in (key, with_gaps(key)):
        ours, _ = attention(module, query, keys, value, mask if kind != "added" else mask.bfloat16(), scaling=0.3)
        assert not counted and ours.dtype == torch.bfloat16 and ours.shape == exact.shape
        torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.02)


def with_gaps(keys: torch.Tensor) -> torch.Tensor:
    """As the cache gives them where it has more columns."""
    return torch.cat([keys, keys.new_full(keys.shape, torch.nan)], dim=2)[:, :, : keys.shape[2]]


def test_scores_of_a_block_are_bounded(counted, monkeypatch):
    monkeypatch.setattr(block_attention, "BLOCK_BYTES", 2 * 3 * 4 * 9 * 2)
    made = []
    mask_scores = block_attention._mask
    monkeypatch.setattr(
        block_attention, "_mask", lambda scores, *rest: made.append(scores.numel()) or mask_scores(scores, *rest)
    )
    compare(counted, monkeypatch, 4, 2, 9, 9, "bool", 256)
    assert len(made) == 2 * 5 and max(made) <= 3 * 4 * 9 * 2


@pytest.mark.parametrize(
    "dtype, columns, more",
    [
        (torch.float32, 7, {}),
        (torch.bfloat16, 9, {}),  # without a mask and with other columns
        (torch.bfloat16, 7, {"is_causal": False}),
        (torch.bfloat16, 7, {"position_bias": torch.zeros(3, 4, 7, 7)}),
    ],
)
def test_what_is_left_to_sdpa(counted, dtype, columns, more):
    module, query, key, value, _ = inputs(3, 4, 4, 7, columns, "none")
    tensors = [tensor.to(dtype) for tensor in (query, key, value)]
    ours, _ = attention(module, *tensors, None, scaling=0.3, **more)
    theirs, _ = sdpa_attention_forward(module, *tensors, None, scaling=0.3, **more)
    assert counted and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_who_sees_nothing_gets_numbers_and_the_others_what_they_get_anyway(counted, kind):
    module, *tensors, mask = inputs(2, 4, 2, 3, 8, "bool")
    query, key, value = (tensor.bfloat16() for tensor in tensors)
    everyone, _ = attention(module, query, key, value, mask)
    mask[1, :, 0] = False
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).bfloat16()
    ours, _ = attention(module, query, key, value, mask)
    assert not counted and ours.isfinite().all()
    assert torch.equal(ours[0], everyone[0]) and torch.equal(ours[1, 1:], everyone[1, 1:])


def test_a_mask_for_all_queries_alike_is_left_to_sdpa(counted, monkeypatch):
    monkeypatch.setattr(block_attention, "_BLOCK_QUERIES", 3)
    module, *tensors, _ = inputs(3, 4, 4, 7, 9, "none")
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = False
    query, key, value = (tensor.bfloat16() for tensor in tensors)
    ours, _ = attention(module, query, key, value, mask)
    assert counted and ours.shape == (3, 7, 4, 16)


@pytest.mark.parametrize(
    "kv_heads, new, scores, left", [(4, 7, 3, True), (4, 7, 7, False), (4, 3, 3, False), (2, 7, 3, False)]
)
def test_small_blocks_of_many_keys_are_left_to_sdpa(counted, monkeypatch, kv_heads, new, scores, left):
    """Unless it would copy the keys for all heads that share one."""
    monkeypatch.setattr(block_attention, "BLOCK_BYTES", 2 * 3 * 4 * 12 * scores)
    module, *tensors, mask = inputs(3, 4, kv_heads, new, 12, "bool")
    attention(module, *(tensor.bfloat16() for tensor in tensors), mask)
    assert bool(counted) == left


def test_few_keys_are_left_to_sdpa(counted, monkeypatch):
    monkeypatch.setattr(block_attention, "_FEW_KEYS", 1024)
    module, query, key, value, mask = inputs(1, 4, 4, 1, 100, "bool")
    attention(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    assert counted


@pytest.mark.skipif(block_attention.cpu_lacks(torch.bfloat16), reason="no bfloat16 here")
def test_an_engine_in_bfloat16_is_as_near_to_float32_as_with_sdpa(counted, monkeypatch):
    """Rows of different length, prompts in chunks; off by the standard deviation of log-probabilities."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)  # put back afterwards
    exact = prompt_logprobs(torch.float32)
    theirs = (prompt_logprobs(torch.bfloat16) - exact).std()
    block_attention.use_block_attention()
    assert torch.equal(prompt_logprobs(torch.float32), exact) and counted
    counted.clear()
    ours = (prompt_logprobs(torch.bfloat16) - exact).std()
    assert not counted and 0 < ours < 2 * theirs


def prompt_logprobs(dtype: torch.dtype) -> torch.Tensor:
    model = copy.deepcopy(make_model("llama")).to(dtype)
    engine = Engine(model, make_tokenizer(), EngineConfig(prefill_chunk=7, max_batch_size=4))
    prompts = [prompt_ids(seed, length) for seed, length in enumerate((20, 3, 33))]
    jobs = [engine.submit(Request(p, {"max_new_tokens": 4}, prompt_logprobs=True, logprobs=0)) for p in prompts]
    while engine.has_work:
        engine.step()
    return torch.tensor([entry[1] for job in jobs for entry in job.prompt_logprobs[1:]])


@pytest.mark.skipif(block_attention.cpu_lacks(torch.bfloat16), reason="no bfloat16 here")
def test_whoever_loads_a_model_gets_it(bloom, tmp_path, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)  # put back afterwards
    load_model(bloom, Settings(), tmp_path)
    assert AttentionInterface._global_mapping["sdpa"] is attention


@pytest.mark.parametrize("most, transposed", [(5, True), (4, False)])
def test_scores_with_a_bias_whichever_side_is_transposed(monkeypatch, most, transposed):
    monkeypatch.setattr(block_attention, "_FEW_TO_TRANSPOSE", {torch.bfloat16: most})
    multiply, left = torch.baddbmm, []
    monkeypatch.setattr(torch, "baddbmm", lambda bias, one, *a, **k: left.append(one) or multiply(bias, one, *a, **k))
    _, query, key, _, _ = inputs(3, 4, 4, 5, 9, "none")
    queries, keys = query.flatten(0, 1).bfloat16(), with_gaps(key.bfloat16()).flatten(0, 1)
    bias = torch.randn(12, 1, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = 0.3 * queries.float() @ keys.float().mT
    for added in (bias, None):
        ours = block_attention._scores(queries, keys, 0.3, added)
        expected = exact if added is None else exact + added.float()
        assert ours.shape == (12, 5, 9) and ours.is_contiguous()
        assert left.pop() is (keys if transposed else queries)
        torch.testing.assert_close(ours.float(), expected, rtol=0.01, atol=0.01)


def test_its_scores_are_planned_for():
    shape = {"max_length": 4096, "sliding_window": None, "kv_bytes_per_token": 64, "takes_position_ids": True}
    one, other = (Architecture(10, heads, **shape, keeps_scores=False, itemsize=2) for heads in (16, 32))
    planned = [Capacity.of(architecture, EngineConfig(max_batch_size=256)) for architecture in (one, other)]
    columns = planned[0].kv_cache_tokens + planned[0].padded_tokens
    assert planned[1].activation_bytes - planned[0].activation_bytes == 2 * 2 * (32 - 16) * columns


@pytest.mark.skipif(not lanes(), reason="this CPU has no code of ours")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [BloomConfig, LlamaConfig])
def test_attention_is_by_code_of_ours(kind, dtype, tmp_path, monkeypatch):
    if not has_code_for(getattr(torch, dtype)):
        pytest.skip("no bfloat16 here")
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.5}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=VOCAB, **shape, eos_token_id=EOS)).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    prompts = [prompt_ids(seed, length) for seed, length in enumerate((5, 40, 1))]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    calls, prompt_calls = [], []
    for module in (block_attention, bloom):
        monkeypatch.setattr(
            module, "decode_attention", lambda *given: calls.append(len(given[0])) or decode_attention_of_ours(*given)
        )
        monkeypatch.setattr(
            module, "prompt_attention", lambda *given: prompt_calls.append(1) or prompt_attention_of_ours(*given)
        )
    loaded = load_model(tmp_path, Settings(dtype=dtype), tmp_path)
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_batch_size=3, num_speculative_tokens=0))
    assert calls == [2, 2]  # the check of rows, in two layers
    jobs = [engine.submit(Request(prompt, {"max_new_tokens": 9})) for prompt in prompts]
    while engine.has_work:
        engine.step()
    assert len(calls) > 10 and max(calls) > 1 and prompt_calls
    calls.clear()
    prompt_calls.clear()
    plain = load_model(tmp_path, Settings(dtype=dtype, compile_kernels=False), tmp_path)
    try:
        Engine(plain.model, plain.tokenizer, EngineConfig())
    finally:
        use_machine_code(True)
    assert not calls and not prompt_calls
    assert not any("multiply" in f"{vars(module).get('forward')}" for module in plain.model.modules())
    assert any("multiply" in f"{vars(module).get('forward')}" for module in loaded.model.modules())
    if dtype == "float32":
        assert [job.sequences[0].token_ids for job in jobs] == expected


@pytest.mark.parametrize("option", [{"softcap": 5.0}, {"dropout": 0.1}, {"is_causal": False}, {"position_bias": 1}])
def test_what_only_some_models_ask_for_is_left_to_sdpa(counted, monkeypatch, option):
    asked = []
    monkeypatch.setattr(block_attention, "sdpa_attention_forward", lambda *given, **options: asked.append(options))
    query, key, value = torch.randn(3, 2, 4, 1, 32)
    attention(SimpleNamespace(is_causal=True), query, key, value, None, **option)
    assert asked == [option]
