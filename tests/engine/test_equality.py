"""Greedy float32 output is `model.generate`'s, token for token, whatever else happens in the engine."""

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.engine import Engine, EngineConfig, Request, prefix_cache, scheduler, speculation
from handler.engine.forward_cost import ForwardCost
from handler.engine.scheduler import Scheduler

from .conftest import KINDS, guesser, make_tokenizer, offloaded_model, prompt_ids, reference

LENGTHS = (1, 2, 5, 8, 13, 30)
PROMPTS = list(itertools.product(range(4), LENGTHS))  # seeds and lengths
OFFLOADS = ((), (1,), (0, 1, 2))  # which layers are on disk


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
    length=st.sampled_from(LENGTHS),
    new=st.integers(1, 24) | st.just(24),
    n=st.sampled_from([1, 1, 2, 5]),
    group=st.integers(0, 9),
    leaves=st.none() | st.none() | st.integers(0, 10),
)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate(kind, monkeypatch):
    preempted = fairly = accepted = rejected = reused = 0
    victims = Scheduler._victims

    def counted(self, sequence):
        nonlocal fairly
        found = victims(self, sequence)
        fairly += len(found or ())
        return found

    @settings(max_examples=45, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        guests=st.lists(visitors, min_size=1, max_size=8),
        on_disk=st.sampled_from(OFFLOADS),
        rows=st.integers(1, 7),
        chunk=st.sampled_from([1, 3, 7, 64]),
        tokens=st.none() | st.integers(54, 100) | st.integers(54, 160),  # what the KV cache may hold
        pass_columns=st.sampled_from([1, 10, math.inf]),  # what a pass over the weights costs
        per_position=st.sampled_from([0.0, 0.01, 1.0]),  # and what a position does, in passes
        drafts=st.sampled_from([0, 1, 5, 16]),
        prefix_cache=st.sampled_from(["shared", "shared", "off"]),
    )
    def check(guests, on_disk, rows, chunk, tokens, pass_columns, per_position, drafts, prefix_cache):
        nonlocal preempted, accepted, rejected, reused
        engine = serve(kind, guests, on_disk, rows, chunk, tokens, pass_columns, per_position, drafts, prefix_cache)
        reused += engine.num_reused_tokens
        preempted += engine._scheduler.num_preempted
        accepted += engine.speculator.num_accepted
        rejected += engine.speculator.num_drafted - engine.speculator.num_accepted

    texts = [prompt_ids(*prompt) + reference(kind, tuple(prompt_ids(*prompt))) for prompt in PROMPTS]
    monkeypatch.setattr(speculation, "prompt_lookup", guesser(texts))
    monkeypatch.setattr(ForwardCost, "record", lambda *_: None)
    monkeypatch.setattr(Scheduler, "_victims", counted)
    monkeypatch.setattr(scheduler, "SHORTEST", 2)
    monkeypatch.setattr(prefix_cache, "SHORTEST", 2)
    monkeypatch.setattr(scheduler, "_MARGIN", 1)  # tokens: these sequences are short
    check()
    assert fairly > 3 and preempted - fairly > 3
    assert reused > 100
    assert accepted > 300 and rejected > 100


def serve(kind, guests, on_disk, rows, chunk, tokens, pass_columns, per_position, drafts, prefix_cache):
    """Serve them all, see that each gets what `generate` gives; the engine."""
    model = offloaded_model(kind, on_disk)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token_bytes = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4
    engine = Engine(
        model,
        make_tokenizer(),
        EngineConfig(
            max_batch_size=rows,
            prefill_chunk=chunk,
            kv_cache_memory=tokens and tokens * token_bytes,
            num_speculative_tokens=drafts,
            prefix_cache=prefix_cache,
        ),
    )
    engine.speculator._most_rows = rows  # also where nothing is read
    engine._cost.reading, engine._cost.per_position = 1.0, per_position
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
        kept = engine._cache.prefixes.num_tokens
        assert all(k.shape[0] * k.shape[2] + kept <= engine._cache.capacity_tokens for k in allocated)
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
def test_offloaded_layers_stream_through_one_forward_a_step_where_that_pays(kind, scheduled, monkeypatch):
    model = offloaded_model(kind, (0, 1, 2))
    engine = Engine(model, make_tokenizer(), EngineConfig(prefill_chunk=4))
    monkeypatch.setattr(ForwardCost, "record", lambda *_: None)
    forwards = scheduled()
    first = engine.submit(Request(prompt_ids(0, 3), {"max_new_tokens": 10}))
    engine.step()
    engine.submit(Request(prompt_ids(1, 9), {"max_new_tokens": 4}))
    engine.step()  # one row decodes while the other is prefilled
    assert len(first.sequences[0].token_ids) == 2
    assert forwards == [[3], [1, 4]]
    engine._cost.reading, engine._cost.per_position = 1.0, 0.4
    engine.step()  # three positions of padding take longer than to read the weights once more
    assert forwards[2:] == [[1], [4]]


def test_resident_weights_prefill_apart_from_decoding(model, tokenizer, scheduled):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=4))
    forwards = scheduled()
    engine.submit(Request(prompt_ids(0, 3), {"max_new_tokens": 10}))
    engine.step()
    engine.submit(Request(prompt_ids(1, 9), {"max_new_tokens": 4}))
    engine.step()
    assert forwards == [[3], [1], [4]]
