"""What the engine counts and times, by a clock that the test turns."""

import time

import pytest

from handler.engine import Engine, EngineConfig, Request
from handler.engine.stats import BOUNDS, Histogram

from .conftest import prompt_ids

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3}


@pytest.fixture
def clock(monkeypatch):
    """clock.now: seconds."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def counts(histogram):
    """{least bound: how many}, of the buckets that hold any."""
    return {bound: count for bound, count in zip((*BOUNDS, "more"), histogram.counts, strict=True) if count}


def test_a_bucket_counts_what_took_at_most_so_long():
    histogram = Histogram()
    for seconds in (0, 0.005, 0.006, 30, 300, 301):
        histogram.observe(seconds)
    assert counts(histogram) == {0.005: 2, 0.01: 1, 30: 1, 300: 1, "more": 1} and histogram.sum == 631.011


def test_tokens_and_times_of_two_jobs_one_after_the_other(model, tokenizer, clock):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1))
    stats, start = engine.stats, clock.now
    first, second = (engine.submit(Request(prompt_ids(seed, 5), GREEDY)) for seed in (0, 1))
    clock.now += 0.5
    while engine.has_work:
        engine.step()
        clock.now += 15
    assert (stats.prompt_tokens, stats.generated_tokens) == (10, 6)
    assert (first.submitted_at, first.started_at, first.first_token_at) == (start, start + 0.5, start + 0.5)
    assert second.started_at == second.first_token_at == start + 45.5
    assert counts(stats.queue) == counts(stats.first_token) == {0.5: 1, 60: 1} and stats.queue.sum == 46
    assert counts(stats.between_tokens) == {30: 4} and stats.between_tokens.sum == 60


def test_a_prompt_counts_once_whatever_is_made_of_it(model, tokenizer, clock):
    engine = Engine(model, tokenizer)
    sampling = {"num_return_sequences": 3, "do_sample": True, "seed": 1}
    job = engine.submit(Request(prompt_ids(0, 5), GREEDY | sampling))
    while not job.finished:
        engine.step()
        clock.now += 1
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (5, 9)
    assert sum(stats.first_token.counts) == sum(stats.queue.counts) == 1 and sum(stats.between_tokens.counts) == 6


def test_what_ends_in_the_queue_counts_for_nothing(model, tokenizer):
    engine = Engine(model, tokenizer)
    engine.cancel(engine.submit(Request(prompt_ids(0, 5), GREEDY)).id)
    engine.step()
    assert not engine.stats.prompt_tokens and not sum(engine.stats.queue.counts)


def test_the_cache_is_used_by_rows_as_long_as_the_longest(model, tokenizer):
    engine = Engine(model, tokenizer)
    free = engine.kv_tokens_free
    assert engine.kv_tokens_used == 0 and free > 0
    jobs = [engine.submit(Request(prompt_ids(length, length), GREEDY)) for length in (5, 9)]
    engine.step()
    assert engine.kv_tokens_used == 2 * max(job.sequences[0].length for job in jobs) >= 2 * 9
    assert engine.kv_tokens_used + engine.kv_tokens_free == free
    while engine.has_work:
        engine.step()
    assert (engine.kv_tokens_used, engine.kv_tokens_free) == (0, free)
