"""Greedy float32 output is `model.generate`'s, token for token, whatever else happens in the engine."""

import functools
import tempfile
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from handler.engine import Engine, EngineConfig, Request

from .conftest import KINDS, make_model, make_tokenizer, prompt_ids, reference

OFFLOADS = ((), (1,), (0, 1, 2))  # which layers are on disk


@functools.cache
def offloaded_model(kind: str, on_disk: tuple[int, ...]):
    """The same weights through Accelerate: layers `on_disk` are read anew in every forward."""
    model = make_model(kind)
    if not on_disk:
        return model
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    base = model.base_model_prefix
    stack = "h" if hasattr(model.base_model, "h") else "layers"
    places = {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children() if name != stack}
    places |= {f"{base}.{stack}.{i}": "disk" if i in on_disk else "cpu" for i in range(3)}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "cpu"}, offload_folder=tempfile.mkdtemp()
    )


@dataclass(frozen=True)
class Visitor:
    arrives: int  # step
    prompt: int  # seed
    length: int
    new: int
    leaves: int | None  # cancelled so many steps after arrival


visitors = st.builds(
    Visitor,
    arrives=st.integers(0, 12),
    prompt=st.integers(0, 3),
    length=st.sampled_from([1, 2, 5, 8, 13, 30]),
    new=st.integers(1, 24),
    leaves=st.none() | st.none() | st.integers(0, 10),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    guests=st.lists(visitors, min_size=1, max_size=8),
    on_disk=st.sampled_from(OFFLOADS),
    rows=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 7, 64]),
    tokens=st.none() | st.integers(54, 160),  # what the KV cache may hold
)
def test_equals_generate(kind, guests, on_disk, rows, chunk, tokens):
    model = offloaded_model(kind, on_disk)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token_bytes = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4
    engine = Engine(
        model,
        make_tokenizer(),
        EngineConfig(max_batch_size=rows, prefill_chunk=chunk, kv_cache_memory=tokens and tokens * token_bytes),
    )
    jobs = {}
    step = 0
    while engine.has_work or len(jobs) < len(guests):
        for guest, visitor in enumerate(guests):
            if visitor.arrives == step:
                ids = prompt_ids(visitor.prompt, visitor.length)
                jobs[guest] = engine.submit(Request(ids, {"max_new_tokens": visitor.new}))
            if visitor.leaves is not None and visitor.arrives + visitor.leaves == step:
                engine.cancel(jobs[guest].id)
        engine.step()
        allocated = [layer.keys for layer in engine._cache.layers if layer.is_initialized]
        assert all(k.shape[0] * k.shape[2] * token_bytes <= tokens * token_bytes for k in allocated if tokens)
        step += 1
        assert step < 2000
    for guest, visitor in enumerate(guests):
        choice = jobs[guest].sequences[0]
        expected = reference(kind, tuple(prompt_ids(visitor.prompt, visitor.length)))[: visitor.new]
        if choice.finish_reason == "cancel":
            assert choice.token_ids == expected[: len(choice.token_ids)]
        else:
            assert choice.token_ids == expected
            assert choice.finish_reason in ("length", "stop")


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_layers_stream_through_one_forward_a_step(kind, scheduled):
    model = offloaded_model(kind, (0, 1, 2))
    engine = Engine(model, make_tokenizer(), EngineConfig(prefill_chunk=4))
    forwards = scheduled()
    first = engine.submit(Request(prompt_ids(0, 3), {"max_new_tokens": 10}))
    engine.step()
    engine.submit(Request(prompt_ids(1, 9), {"max_new_tokens": 4}))
    engine.step()  # one row decodes while the other is prefilled
    assert len(first.sequences[0].token_ids) == 2
    assert forwards == [[3], [1, 4]]


def test_resident_weights_prefill_apart_from_decoding(model, tokenizer, scheduled):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=4))
    forwards = scheduled()
    engine.submit(Request(prompt_ids(0, 3), {"max_new_tokens": 10}))
    engine.step()
    engine.submit(Request(prompt_ids(1, 9), {"max_new_tokens": 4}))
    engine.step()
    assert forwards == [[3], [1], [4]]
