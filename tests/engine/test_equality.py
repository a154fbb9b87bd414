"""Greedy float32 output is `model.generate`'s, token for token, whatever else happens in the engine."""

import functools
import math
import tempfile
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from handler.engine import Engine, EngineConfig, Request, scheduler
from handler.engine.scheduler import Scheduler
from handler.weights.packed import pack_weights

from .conftest import KINDS, make_model, make_tokenizer, prompt_ids, reference

OFFLOADS = ((), (1,), (0, 1, 2))  # which layers are on disk


@functools.cache
def offloaded_model(kind: str, on_disk: tuple[int, ...]):
    """The same weights through Accelerate: layers `on_disk` are read anew in every forward, the others are packed."""
    model = make_model(kind)
    if not on_disk:
        return model
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    base = model.base_model_prefix
    stack = "h" if hasattr(model.base_model, "h") else "layers"
    places = {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children() if name != stack}
    places |= {f"{base}.{stack}.{i}": "disk" if i in on_disk else "cpu" for i in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "cpu"}, offload_folder=tempfile.mkdtemp()
    )
    assert pack_weights(model)
    return model


@dataclass(frozen=True)
class Visitor:
    arrives: int  # step
    prompt: int  # seed
    length: int
    new: int
    n: int
    group: int  # that it shares rows with
    leaves: int | None  # cancelled so many steps after arrival


visitors = st.builds(
    Visitor,
    arrives=st.integers(0, 8),
    prompt=st.integers(0, 3),
    length=st.sampled_from([1, 2, 5, 8, 13, 30]),
    new=st.integers(1, 24) | st.just(24),
    n=st.sampled_from([1, 1, 2, 5]),
    group=st.integers(0, 9),
    leaves=st.none() | st.none() | st.integers(0, 10),
)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate(kind, monkeypatch):
    preempted = fairly = 0
    victims = Scheduler._victims

    def counted(self, sequence):
        nonlocal fairly
        found = victims(self, sequence)
        fairly += len(found or ())
        return found

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        guests=st.lists(visitors, min_size=1, max_size=8),
        on_disk=st.sampled_from(OFFLOADS),
        rows=st.integers(1, 7),
        chunk=st.sampled_from([1, 3, 7, 64]),
        tokens=st.none() | st.integers(54, 100) | st.integers(54, 160),  # what the KV cache may hold
        pass_columns=st.sampled_from([1, 10, math.inf]),  # what a pass over the weights costs
    )
    def check(guests, on_disk, rows, chunk, tokens, pass_columns):
        nonlocal preempted
        engine = serve(kind, guests, on_disk, rows, chunk, tokens, pass_columns)
        preempted += engine._scheduler.num_preempted

    monkeypatch.setattr(Scheduler, "_victims", counted)
    monkeypatch.setattr(scheduler, "_MARGIN", 1)  # tokens: these sequences are short
    check()
    assert fairly > 3 and preempted - fairly > 3


def serve(kind, guests, on_disk, rows, chunk, tokens, pass_columns):
    """Serve them all, see that each gets what `generate` gives; the engine."""
    model = offloaded_model(kind, on_disk)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token_bytes = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4
    engine = Engine(
        model,
        make_tokenizer(),
        EngineConfig(max_batch_size=rows, prefill_chunk=chunk, kv_cache_memory=tokens and tokens * token_bytes),
    )
    engine._scheduler._pass_columns = pass_columns
    jobs = {}
    step = 0
    while engine.has_work or len(jobs) < len(guests):
        for guest, visitor in enumerate(guests):
            if visitor.arrives == step:
                ids = prompt_ids(visitor.prompt, visitor.length)
                parameters = {"max_new_tokens": visitor.new}
                jobs[guest] = engine.submit(Request(ids, parameters, n=visitor.n, group=str(visitor.group)))
            if visitor.leaves is not None and visitor.arrives + visitor.leaves == step:
                engine.cancel(jobs[guest].id)
        engine.step()
        allocated = [layer.keys for layer in engine._cache.layers if layer.is_initialized]
        assert all(k.shape[0] * k.shape[2] * token_bytes <= tokens * token_bytes for k in allocated if tokens)
        step += 1
        assert step < 2000
    for guest, visitor in enumerate(guests):
        expected = reference(kind, tuple(prompt_ids(visitor.prompt, visitor.length)))[: visitor.new]
        assert len(jobs[guest].sequences) == visitor.n
        for choice in jobs[guest].sequences:
            if choice.finish_reason == "cancel":
                assert choice.token_ids == expected[: len(choice.token_ids)]
            else:
                assert choice.token_ids == expected
                assert choice.finish_reason in ("length", "stop")
    return engine


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
