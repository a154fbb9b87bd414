"""Who begins as another text did need not compute that again; nobody notices whose it was who may not."""

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from handler.engine import Engine, EngineConfig, InvalidRequest, Request, kv_cache
from handler.engine.kv_cache import RowLayer
from handler.engine.prefix_cache import Prefix, PrefixCache

from .conftest import make_model, make_tokenizer, prompt_ids, reference

SHARED = prompt_ids(1, 60)
TOKEN_BYTES = 2 * 3 * 2 * 8 * 4  # of the tiny Llama's keys and values


def make_engine(kind="llama", **config):
    return Engine(make_model(kind), make_tokenizer(), EngineConfig(**config))


def run(engine, prompt, new=4, **fields):
    job = engine.submit(Request(prompt, {"max_new_tokens": new, "eos_token_id": []}, **fields))
    while not job.finished:
        engine.step()
    assert job.error is None
    return job.sequences[0].token_ids


def prefilled(scheduled, engine, prompt, **fields):
    """How many tokens of a prompt are computed."""
    forwards = scheduled()
    run(engine, prompt, 1, **fields)
    return sum(map(sum, forwards))


def test_what_is_new_alone_is_computed(kind, scheduled):
    engine = make_engine(kind, num_speculative_tokens=0)
    run(engine, [*SHARED, 7, 8, 9])
    prompt = [*SHARED, 50, 51, 52, 53]
    forwards = scheduled()
    assert run(engine, prompt, 9) == reference(kind, tuple(prompt))[:9]
    assert forwards == [[4], *[[1]] * 8]
    assert engine.num_reused_tokens == 60


def test_a_conversation_goes_on_behind_its_answer(scheduled):
    engine = make_engine()
    answer = run(engine, SHARED, 20)
    assert prefilled(scheduled, engine, SHARED + answer + [7, 8]) == 3  # the last token is never in the cache
    assert prefilled(scheduled, engine, SHARED) == 2  # with its last token comes the one before


def test_who_runs_shares_too(scheduled):
    engine = make_engine()
    job = engine.submit(Request(SHARED, {"max_new_tokens": 30, "eos_token_id": []}))
    engine.step()
    forwards = scheduled()
    prompt = SHARED[:50] + [9] * 10
    assert run(engine, prompt, 6) == reference("llama", tuple(prompt))[:6]
    assert forwards[:2] == [[1], [10]]
    while not job.finished:
        engine.step()
    assert job.sequences[0].token_ids[:24] == reference("llama", tuple(SHARED))


def test_short_ones_and_other_ones_are_not_shared(scheduled):
    engine = make_engine()
    run(engine, SHARED)
    assert prefilled(scheduled, engine, SHARED[:31] + [3] * 29) == 60
    assert prefilled(scheduled, engine, [3, *SHARED]) == 61
    assert prefilled(scheduled, engine, SHARED, prompt_logprobs=True, logprobs=0) == 60  # needs them all


@pytest.mark.parametrize(
    "setting, first, second, is_shared",
    [
        ("shared", None, None, True),
        ("shared", "a", "a", True),
        ("shared", "a", "b", False),
        ("shared", "a", None, False),
        ("shared", None, "a", False),
        ("salted", "a", "a", True),
        ("salted", None, None, False),
        ("salted", "a", "b", False),
        ("off", "a", "a", False),
        ("off", None, None, False),
    ],
)
@pytest.mark.parametrize("running", [False, True])
def test_who_shares(setting, first, second, is_shared, running, scheduled):
    engine = make_engine(prefix_cache=setting)
    one = engine.submit(Request(SHARED, {"max_new_tokens": 20, "eos_token_id": []}, cache_salt=first))
    engine.step()
    while not running and not one.finished:
        engine.step()
    run(engine, [*SHARED, 7, 8, 9], 1, cache_salt=second)
    assert engine.num_reused_tokens == (60 if is_shared else 0)


@pytest.mark.parametrize("salt", ["", 3, "x" * 300])
def test_a_bad_salt_is_refused(salt):
    with pytest.raises(InvalidRequest, match="cache_salt"):
        make_engine().submit(Request([5], cache_salt=salt))


@torch.inference_mode()
def test_running_rows_go_before_what_is_kept(scheduled):
    """Of 160 tokens a row takes 64: two texts of 40 stay, until a longer row needs their place."""
    engine = make_engine(kv_cache_memory=160 * TOKEN_BYTES, max_batch_size=2)
    for seed in (1, 2, 3, 4):
        run(engine, prompt_ids(seed, 40), 1)
        store = engine._cache.layers[0].keys
        assert engine._cache.prefixes.num_tokens + store.shape[0] * store.shape[2] <= 160
    assert engine._cache.prefixes.num_tokens == 80
    assert prefilled(scheduled, engine, prompt_ids(3, 40)) == 2
    assert prefilled(scheduled, engine, prompt_ids(1, 40)) == 40  # used least lately
    assert prefilled(scheduled, engine, prompt_ids(3, 40)) == 2  # used since 4 was
    parts, length = engine._cache.prefixes.longest("", np.array(prompt_ids(3, 40)))
    engine._cache.use_prefix(parts, length, 1, (2, 50))
    assert engine._cache.prefixes.num_tokens == 40  # two rows take 100
    run(engine, prompt_ids(5, 150), 2)
    assert engine._cache.prefixes.num_tokens == 0


def test_there_are_only_so_many():
    cache = PrefixCache()
    for first in range(300):
        cache.add(Prefix("", np.array([first, *range(40)]), []))
    assert cache.num_tokens == 256 * 41
    assert cache.has("", np.array([299, *range(40)])) and not cache.has("", np.array([43, *range(40)]))


def test_only_those_whose_turn_it_is_are_looked_up(monkeypatch):
    """Many prompts wait in their rows for the first one to be through, and looking one up takes long."""
    engine = make_engine(prefill_chunk=8)
    jobs = [engine.submit(Request([*SHARED, seed], {"max_new_tokens": 1})) for seed in range(3, 9)]
    lookups, longest = [], PrefixCache.longest
    monkeypatch.setattr(PrefixCache, "longest", lambda *args: lookups.append(0) or longest(*args))
    engine.step()
    assert len(lookups) == 1
    while engine.has_work:
        engine.step()
    assert engine.num_reused_tokens > 4 * 59 and all(job.sequences[0].token_ids for job in jobs)


def test_the_store_is_not_held_twice_while_a_running_row_is_copied(monkeypatch):
    engine = make_engine()
    engine.submit(Request(SHARED, {"max_new_tokens": 30, "eos_token_id": []}))
    engine.step()
    resized, old = kv_cache._resized, []

    def watched(store, *shape):
        assert sum(not ref.expired() for ref in old) <= 2  # one layer's
        old.append(StorageWeakRef(store.untyped_storage()))
        return resized(store, *shape)

    monkeypatch.setattr(kv_cache, "_resized", watched)
    engine.submit(Request(SHARED + [9] * 60, {"max_new_tokens": 1}))
    engine.step()
    assert len(old) == 6 and engine.num_reused_tokens == 60


def test_a_prefix_that_makes_way_is_let_go_layer_by_layer(monkeypatch):
    engine = make_engine(kv_cache_memory=180 * TOKEN_BYTES, max_batch_size=1)
    run(engine, SHARED, 1)
    (prefix,) = engine._cache.prefixes._prefixes
    parts = [StorageWeakRef(part.untyped_storage()) for part in prefix.parts]
    del prefix
    resized, left = kv_cache._resized, []

    def watched(store, *shape):
        left.append(sum(not ref.expired() for ref in parts))
        return resized(store, *shape)

    monkeypatch.setattr(kv_cache, "_resized", watched)
    run(engine, SHARED + [9] * 90, 1)
    assert left[:6] == [6, 6, 4, 4, 2, 2] and engine.num_reused_tokens == 60


def test_the_store_grows_by_spare_columns_also_where_prefixes_fill_the_rest(monkeypatch):
    engine = make_engine(kv_cache_memory=700 * TOKEN_BYTES, max_batch_size=4)
    for seed in range(20):
        run(engine, prompt_ids(seed, 33), 1)
    assert engine._cache.prefixes.num_tokens > 600
    resized, stores = kv_cache._resized, []
    monkeypatch.setattr(kv_cache, "_resized", lambda store, *shape: stores.append(shape) or resized(store, *shape))
    run(engine, prompt_ids(30, 10), 140, n=4)
    assert len(set(stores)) <= 7  # of one row, and of four every 32 tokens


def test_no_memory_is_no_error(monkeypatch, scheduled):
    engine = make_engine()
    run(engine, SHARED)

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RowLayer, "resize", fail)
    job = engine.submit(Request(SHARED, {"max_new_tokens": 4}))
    engine._scheduler.schedule()
    assert engine.num_reused_tokens == 0 and job.sequences[0].num_cached_tokens == 0
    monkeypatch.undo()
    while not job.finished:
        engine.step()
    assert job.sequences[0].token_ids == reference("llama", tuple(SHARED))[:4]


@torch.inference_mode()
def test_what_failed_is_not_kept():
    engine = make_engine()
    job = engine.submit(Request(SHARED, {"max_new_tokens": 4}))
    engine.step()
    engine._fail(job, RuntimeError())
    engine._scheduler.release_finished()
    assert engine._cache.prefixes.num_tokens == 0


def test_the_longest_and_the_last_used_stay():
    cache = PrefixCache()
    texts = [np.arange(100), np.arange(140), np.full(50, 9), np.full(60, 8)]
    nines = texts[2][:40]
    for text in texts:
        cache.add(Prefix("", text, []))
    assert cache.num_tokens == 140 + 50 + 60  # the first is the beginning of the second
    assert cache.has("", nines) and not cache.has("", np.full(51, 9)) and not cache.has("other", nines)
    assert cache.longest("", np.array([*range(120), 0]))[1] == 120
    cache.shrink(200)
    assert cache.num_tokens == 200 and not cache.has("", nines)
    cache.shrink(140)
    assert cache.num_tokens == 140 and cache.has("", np.arange(140))
