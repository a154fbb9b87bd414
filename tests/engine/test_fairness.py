"""One client against the others: who gets rows, who loses them, and that nobody sees it in an answer."""

import itertools

import pytest
import torch

from handler.engine import Engine, EngineConfig, Request
from handler.engine.kv_cache import KVCache
from tests.engine.test_scheduler import make_scheduler, sequences, step

from .conftest import prompt_ids, reference

TOKEN_BYTES = 2 * 3 * 2 * 8 * 4  # of the tiny Llama: keys and values, layers, heads, head size, float32


def rows_of(scheduler, *groups):
    """How many rows each of the lists of sequences has."""
    return [sum(sequence in scheduler.running for sequence in group) for group in groups]


def test_alone_a_request_has_all_rows_and_gives_them_up_for_others():
    scheduler, _ = make_scheduler(max_batch_size=8, max_queue=99)
    large, other, third = sequences(20, 5, 50), sequences(20, 5, 50), sequences(3, 5, 50)
    scheduler.add(large)
    step(scheduler)
    assert rows_of(scheduler, large) == [8]
    scheduler.add(other)
    step(scheduler)
    assert rows_of(scheduler, large, other) == [4, 4]
    scheduler.add(third)
    for _ in range(5):
        step(scheduler)
        assert rows_of(scheduler, large, other, third) in ([3, 3, 2], [2, 3, 3], [3, 2, 3])
    assert scheduler.num_preempted == 4 + 2
    assert [s.order for s in large if s in scheduler.running] == [s.order for s in large[:3]]  # the oldest stay


def test_prompts_of_one_body_are_one_request():
    scheduler, _ = make_scheduler(max_batch_size=4, max_queue=99)
    for _ in range(8):
        scheduler.add(sequences(1, 5, group="one body"))
    step(scheduler)
    small = sequences(1, 5)
    scheduler.add(small)
    step(scheduler)
    assert rows_of(scheduler, small) == [1]


def test_a_free_row_goes_to_the_request_with_the_fewest_and_then_to_the_oldest():
    scheduler, _ = make_scheduler(max_batch_size=3, max_queue=99)
    first, second, third = sequences(3, 5), sequences(3, 5), sequences(1, 5)
    scheduler.add([*first, *second, *third])
    step(scheduler)
    assert rows_of(scheduler, first, second, third) == [1, 1, 1]
    third[0].finish_reason = "stop"
    scheduler.release_finished()
    step(scheduler)
    assert rows_of(scheduler, first, second) == [2, 1]  # and nobody is preempted for a difference of one
    assert scheduler.num_preempted == 0


def test_who_does_not_fit_is_passed_a_bounded_number_of_times():
    scheduler, _ = make_scheduler(capacity_tokens=60 * 9, max_batch_size=16, max_queue=99)
    running = [sequences(1, 10, 50) for _ in range(4)]
    for one in running:
        scheduler.add(one)
    step(scheduler)
    long = sequences(1, 400, 100)
    scheduler.add(long)
    small = [sequences(1, 5, 5)[0] for _ in range(20)]
    scheduler.add(small)
    for _ in range(30):
        step(scheduler)
        for one in small:
            one.finish_reason = "length" if one.length >= one.max_length else None
        scheduler.release_finished()
    assert sum(bool(one.token_ids) for one in small) == long[0].times_passed == 8
    for one in running:
        one[0].finish_reason = "stop"
    scheduler.release_finished()
    step(scheduler)
    assert rows_of(scheduler, long) == [1]


def test_a_prompt_is_prefilled_in_the_turn_of_its_request():
    scheduler, _ = make_scheduler(prefill_chunk=8, max_batch_size=8)
    decoding = sequences(1, 2, 99)
    scheduler.add(decoding)
    step(scheduler)
    many = [sequences(1, 20, group="one body")[0] for _ in range(5)]
    scheduler.add(many)
    step(scheduler)
    small = sequences(1, 4)
    scheduler.add(small)
    for _ in range(3):
        step(scheduler)
    assert [bool(one.token_ids) for one in [*many, *small]] == [True, False, False, False, False, True]


def test_one_token_beside_a_request_for_128(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=8))
    prompt = prompt_ids(0, 9)
    large = engine.submit(Request(prompt, {"max_new_tokens": 20}, n=128, ignore_eos=True))
    for _ in range(5):
        engine.step()
    small = engine.submit(Request(prompt_ids(1, 4), {"max_new_tokens": 1}))
    engine.step()
    assert small.finished and engine._scheduler.num_preempted == 1
    while engine.has_work:
        engine.step()
    one = large.sequences[0]
    assert one.token_ids[: len(reference("llama", tuple(prompt), 20))] == reference("llama", tuple(prompt), 20)
    assert all(other.token_ids == one.token_ids and other.text == one.text for other in large.sequences)


def test_what_is_declared_and_not_used_keeps_nobody_out(model, tokenizer):
    config = EngineConfig(max_batch_size=32, kv_cache_memory=32 * 50 * TOKEN_BYTES)
    engine = Engine(model, tokenizer, config)
    engine.submit(Request(prompt_ids(0, 4), {"max_new_tokens": 240}))
    for seed in range(30):
        engine.submit(Request(prompt_ids(seed, 4), {"max_new_tokens": 8}))
    engine.step()
    assert engine.num_running == 31


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 4.0, "top_k": 0}])
def test_a_preempted_stream_goes_on_without_a_seam(model, tokenizer, sampling):
    parameters = {"max_new_tokens": 60, "eos_token_id": []} | sampling
    fields = {"parameters": parameters, "logprobs": 1}
    requests = [Request(prompt_ids(seed, 10), seed=seed, **fields) for seed in range(6)]

    def texts(config):
        engine = Engine(model, tokenizer, config)
        jobs = [engine.submit(request) for request in requests]
        seen = [[""] for _ in jobs]
        while engine.has_work:
            engine.step()
            for job, parts in zip(jobs, seen, strict=True):
                parts.append(job.sequences[0].text)
        assert all(after.startswith(before) for parts in seen for before, after in itertools.pairwise(parts))
        tokens = [job.sequences[0].token_ids for job in jobs]
        assert [[token for token, *_ in job.sequences[0].logprobs] for job in jobs] == tokens
        return tokens, [parts[-1] for parts in seen], engine._scheduler.num_preempted

    *plenty, none = texts(EngineConfig())
    *little, several = texts(EngineConfig(kv_cache_memory=200 * TOKEN_BYTES))
    assert (none, several > 1) == (0, True)
    assert little == plenty


def test_a_prompt_preempted_half_way_is_reported_once(model, tokenizer):
    config = EngineConfig(max_batch_size=2, prefill_chunk=4, max_sequence_length=200)
    engine = Engine(model, tokenizer, config)
    other = engine.submit(Request(prompt_ids(0, 3), {"max_new_tokens": 60}))
    engine.step()
    reported = {"parameters": {"max_new_tokens": 2}, "logprobs": 0, "prompt_logprobs": True}
    job = engine.submit(Request(prompt_ids(1, 30), **reported))
    for _ in range(3):
        engine.step()
    assert len(job.prompt_logprobs) > 4
    with torch.inference_mode():
        engine._scheduler._preempt(job.sequences[0])
    while not job.finished:
        engine.step()
    engine.cancel(other.id)
    alone = engine.submit(Request(prompt_ids(1, 30), **reported))
    while not alone.finished:
        engine.step()
    assert [entry and entry[0] for entry in job.prompt_logprobs] == [None, *job.prompt_ids[1:]]
    for entry, expected in zip(job.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
        assert entry[1] == pytest.approx(expected[1], abs=1e-3)


def test_short_rows_do_not_attend_over_the_columns_of_a_long_one(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=8))
    engine._scheduler._pass_columns = 100  # the tiny model's caches are small beside its weights
    columns = []
    prepare = KVCache.prepare_forward

    def recorded(cache, *args):
        context = prepare(cache, *args)
        columns.append((context.num_rows, context.kv_length))
        return context

    monkeypatch.setattr(KVCache, "prepare_forward", recorded)
    parameters = {"max_new_tokens": 12, "eos_token_id": []}
    jobs = [engine.submit(Request(prompt_ids(seed, 8), parameters)) for seed in range(5)]
    jobs.append(engine.submit(Request(prompt_ids(9, 150), parameters)))
    engine.step()
    columns.clear()
    engine.step()
    assert columns == [(1, 192), (5, 9)]
    while engine.has_work:
        engine.step()
    for job in jobs:
        assert job.sequences[0].token_ids == run_alone(model, tokenizer, job.prompt_ids, parameters)


def run_alone(model, tokenizer, prompt, parameters):
    engine = Engine(model, tokenizer)
    job = engine.submit(Request(prompt, parameters))
    while engine.has_work:
        engine.step()
    return job.sequences[0].token_ids
