"""Drafts change how many forwards an answer takes, and nothing else of it."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from handler.engine import Engine, EngineConfig, Grammar, Request, scheduler, speculation
from handler.engine.forward_cost import ForwardCost
from handler.engine.speculation import prompt_lookup

from .conftest import EOS, KINDS, guesser, make_model, make_tokenizer, offloaded_model, prompt_ids

ANY_TEXT = {"eos_token_id": [], "max_new_tokens": 24}
HOT = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 24}


def make_engine(kind="llama", on_disk=(1,), drafts=16, reading=1.0, per_position=0.0, **config):
    """An engine that believes in these costs, whatever it measures."""
    engine = Engine(
        offloaded_model(kind, on_disk), make_tokenizer(), EngineConfig(num_speculative_tokens=drafts, **config)
    )
    engine._cost.reading = reading
    engine._cost.per_position = engine._cost.per_extra_position = per_position
    engine._cost.record = lambda *_: None
    return engine


def answers(engine, requests):
    jobs = [engine.submit(request) for request in requests]
    while engine.has_work:
        engine.step()
    assert not any(job.error for job in jobs), [job.error for job in jobs]
    return [sequence for job in jobs for sequence in job.sequences]


def text_of(sequence):
    return sequence.job.prompt_ids + sequence.token_ids


REQUESTS = {
    "greedy": [Request(prompt_ids(1, 9), ANY_TEXT), Request(prompt_ids(2, 5), ANY_TEXT)],
    "seeded": [Request(prompt_ids(i, 4 + i), HOT | {"top_k": 40}, seed=i) for i in range(3)],
    "top_p": [Request(prompt_ids(1, 9), HOT | {"top_k": 0, "top_p": 0.7}, seed=3, n=3)],
    "penalties": [
        Request(prompt_ids(1, 9), HOT | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, seed=1),
        Request(prompt_ids(1, 9), ANY_TEXT, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={9: 3.0}),
        Request(prompt_ids(3, 3), {"max_new_tokens": 24, "min_new_tokens": 20, "suppress_tokens": [5, 6, 7]}),
    ],
    "log-probabilities": [
        Request(prompt_ids(1, 9), ANY_TEXT, logprobs=3),
        Request(prompt_ids(2, 20), ANY_TEXT, logprobs=0, prompt_logprobs=True),
    ],
    "grammar": [
        Request(prompt_ids(1, 9), HOT, seed=2, n=2, grammar=Grammar("regex", "([a-z]{3}[0-9]){2,5}")),
        Request(prompt_ids(1, 9), HOT, seed=2, grammar=Grammar("json_schema", json.dumps({"enum": ["naïve", 42]}))),
    ],
}


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_every_answer_is_the_one_without_drafts(kind, requests, chunk, monkeypatch):
    expected = answers(make_engine(kind, drafts=0, prefill_chunk=chunk), requests)
    monkeypatch.setattr(speculation, "prompt_lookup", guesser([text_of(sequence) for sequence in expected]))
    engine = make_engine(kind, prefill_chunk=chunk)
    for one, other in zip(answers(engine, requests), expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        for (token, logprob, top), (token_too, logprob_too, top_too) in zip(one.logprobs, other.logprobs, strict=True):
            assert (token, [i for i, _ in top]) == (token_too, [i for i, _ in top_too])
            assert logprob == pytest.approx(logprob_too, abs=1e-3)
    assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted


def test_an_answer_ends_in_the_middle_of_a_chain(monkeypatch, tokenizer):
    """At eos, at a stop string, or at its last token, though the drafts go on."""
    prompt = prompt_ids(1, 9)
    (whole,) = answers(make_engine(drafts=0), [Request(prompt, ANY_TEXT, ignore_eos=True)])
    stop = whole.text[len(whole.text) // 2 :][:2]
    requests = [
        Request(prompt, ANY_TEXT | {"eos_token_id": whole.token_ids[13]}),
        Request(prompt, ANY_TEXT, stop=stop),
        Request(prompt, ANY_TEXT | {"max_new_tokens": 11}),
    ]
    expected = answers(make_engine(drafts=0), requests)
    monkeypatch.setattr(speculation, "prompt_lookup", lambda ids, limit: (prompt + whole.token_ids)[len(ids) :][:limit])
    engine = make_engine(drafts=8)
    found = answers(engine, requests)
    assert [s.token_ids for s in found] == [s.token_ids for s in expected]
    assert [(s.text, s.finish_reason) for s in found] == [(s.text, s.finish_reason) for s in expected]
    assert [s.finish_reason for s in found] == ["stop", "stop", "length"] and stop not in found[1].text
    assert engine.speculator.num_accepted > 12


def test_sampling_keeps_the_models_distribution(monkeypatch):
    """Of three tokens, with a guess at the second and the third that is right for some and wrong for most."""
    prompt, several = prompt_ids(4, 6), 900
    parameters = {"do_sample": True, "temperature": 1.5, "top_k": 4, "max_new_tokens": 3, "eos_token_id": []}
    model = make_model("llama")

    def continuations(ids, probability, depth):
        if not depth:
            return {tuple(ids[len(prompt) :]): probability}
        with torch.inference_mode():
            best = model(torch.tensor([ids])).logits[0, -1].topk(4)
        shares = (best.values / 1.5).softmax(-1).tolist()
        several = [
            continuations([*ids, token], probability * share, depth - 1)
            for token, share in zip(best.indices.tolist(), shares, strict=True)
        ]
        return {text: share for one in several for text, share in one.items()}

    expected = continuations(prompt, 1.0, 3)
    likely = max(expected, key=expected.__getitem__)
    monkeypatch.setattr(speculation, "prompt_lookup", lambda ids, limit: list(likely[len(ids) - len(prompt) :])[:limit])
    engine = make_engine(max_queue=several)
    found = Counter(tuple(s.token_ids) for s in answers(engine, [Request(prompt, parameters, n=several, seed=0)]))
    assert set(found) <= set(expected)
    assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted
    chi_squared = sum((found[text] - several * p) ** 2 / (several * p) for text, p in expected.items())
    assert chi_squared < len(expected) - 1 + 4 * math.sqrt(2 * (len(expected) - 1))


def test_a_text_that_repeats_itself_takes_few_forwards(scheduled):
    """A bias makes a tiny model say the same words over and over."""
    words = [20, 30, 40]
    request = Request(
        words * 4,
        ANY_TEXT | {"sequence_bias": [[[a, b], 900.0] for a, b in zip(words, words[1:] + words[:1], strict=True)]},
    )
    engine = make_engine(drafts=7)
    forwards = scheduled()
    (sequence,) = answers(engine, [request])
    assert sequence.token_ids == words * 8
    assert forwards == [[12], [8], [8], [7]]  # 1 + 8 + 8 + 7 tokens: no draft follows the last
    assert (engine.speculator.num_drafted, engine.speculator.num_accepted) == (20, 20)


def test_nothing_is_guessed_where_no_step_reads(scheduled):
    engine = make_engine(on_disk=())
    answers(engine, [Request([20, 30] * 9, ANY_TEXT)])
    assert engine.speculator.num_drafted == 0


def drafted(engine, rows, monkeypatch, acceptance=0.5):
    """How many drafts each row gets in its first step after its prompt, of as many as there may be."""
    monkeypatch.setattr(speculation, "prompt_lookup", lambda ids, limit: [7] * limit)
    jobs = [engine.submit(Request(prompt_ids(i, 5), ANY_TEXT)) for i in range(rows)]
    engine.step()
    for job in jobs:
        job.sequences[0].acceptance = acceptance
    batches = engine._scheduler.schedule()
    engine.speculator.add_drafts(batches)
    return [len(batches[0].drafts(index)) for index in range(rows)]


def test_there_are_as_many_drafts_as_pay(monkeypatch):
    def width(acceptance, per_position, rows=1):
        engine = make_engine(per_position=per_position)
        return drafted(engine, rows, monkeypatch, acceptance)[0]

    assert width(0.5, per_position=0) == 16  # a step costs the same with them
    assert width(0.5, per_position=10) == 0  # nothing but computing
    assert width(0.01, per_position=0.05) == 0
    assert 0 < width(0.5, per_position=0.05) < width(0.9, per_position=0.05) <= 16
    assert width(0.7, per_position=0.05, rows=16) < width(0.7, per_position=0.05)


@pytest.mark.parametrize(
    "columns, limits, drafts",
    [
        (40, {}, 10),  # 3 + 30 of 3 + 32 positions that are sampled from
        (40, {"max_logits": 11}, 2),
        (40, {"padded_tokens": 15}, 4),
        (12, {}, 6),  # behind a prompt of 5 tokens and the first of the answer
    ],
)
def test_drafts_leave_room_in_cache_and_workspace(monkeypatch, columns, limits, drafts):
    monkeypatch.setattr(scheduler, "_MARGIN", 1)
    token_bytes = 2 * 3 * 2 * 8 * 4
    engine = make_engine(kv_cache_memory=3 * columns * token_bytes, max_batch_size=3, max_new_tokens=6)
    engine.speculator._capacity = replace(engine.capacity, **limits)
    assert drafted(engine, 3, monkeypatch) == [drafts] * 3


def test_with_all_weights_in_memory_one_row_alone_brings_drafts(monkeypatch):
    assert drafted(make_engine(on_disk=()), 1, monkeypatch) == [16]
    assert drafted(make_engine(on_disk=()), 2, monkeypatch) == [0, 0]


def test_what_is_rejected_again_and_again_is_guessed_less(monkeypatch):
    monkeypatch.setattr(speculation, "prompt_lookup", lambda ids, limit: [EOS] * limit)
    engine = make_engine(per_position=0.02)
    (sequence,) = answers(engine, [Request(prompt_ids(1, 9), {"max_new_tokens": 60, "suppress_tokens": [EOS]})])
    assert sequence.acceptance < 0.05
    assert engine.speculator.num_drafted < 40 and engine.speculator.num_accepted == 0


@pytest.mark.parametrize(
    "text, drafts",
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9, 1, 2, 3]),
        ([1, 2, 3, 8, 8, 1, 2, 4, 8, 8, 1, 2], [4, 8, 8, 1, 2, 4]),  # the last time
        ([5, 1, 2, 7, 8, 6, 1, 2, 9, 8, 5, 1, 2], [7, 8, 6, 1, 2, 9]),  # more words in common count more
        ([6, 6, 6], [6, 6, 6, 6, 6, 6]),
        ([1, 2, 3, 2], []),  # one word is too little
        ([1, 2], []),
        ([1], []),
    ],
)
def test_prompt_lookup(text, drafts):
    assert prompt_lookup(text, 6) == drafts


def test_a_pass_more_or_padding():
    cost = ForwardCost()
    assert not cost.outweighs_reading(10_000)  # nothing is known
    for positions in [300, 1, 1]:
        cost.record(positions, max(10, 0.06 * positions))
    assert not cost.outweighs_reading(150) and cost.outweighs_reading(170)


def test_what_waits_does_not_compute():
    cost = ForwardCost()
    for positions in [40, 1, 1]:
        cost.record(positions, 10.0, waited=10 - 0.06 * positions)
    assert cost.per_position == pytest.approx(0.06) and cost.reading == pytest.approx(10)


def test_a_few_positions_may_cost_more_each_than_many():
    """As with kernels for few rows. What they cost is not taken for a slower disk, so that drafts would seem cheap."""
    cost = ForwardCost()
    for positions, seconds in [(500, 250), (1, 55), *[(6, 62.5)] * 40]:  # none without drafts any more
        cost.record(positions, seconds)
    assert cost.seconds(6) == pytest.approx(62.5, rel=0.01) and cost.reading < 59
    for positions, seconds in [(1, 55), (6, 62.5)] * 20:
        cost.record(positions, seconds)
    assert cost.per_position == 0.5 and cost.per_extra_position == pytest.approx(1.5, rel=0.1)
    assert cost.seconds(0) == cost.seconds(1) == pytest.approx(55, rel=0.02)


def test_forwards_that_took_long_are_not_the_last_with_drafts():
    cost = ForwardCost()
    for positions, seconds in [(1, 55), *[(6, 62.5)] * 40, (6, 9000)]:
        cost.record(positions, seconds)
    assert cost.per_extra_position < 4
    for positions, seconds in [(6, 900), (1, 55)] * 20:
        cost.record(positions, seconds)
    assert cost.per_extra_position > 20
    for _ in range(400):
        cost.record(1, 55)
    assert cost.per_extra_position < 1


def test_a_cost_is_learned_from_what_forwards_take():
    cost = ForwardCost()
    for positions in [300, 1, 1, 8, 1]:
        cost.record(positions, max(10, 0.06 * positions))
    assert cost.seconds(1) == pytest.approx(10) and cost.seconds(8) < 10.5
    for positions in [100, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        cost.record(positions, max(4, 0.06 * positions))  # the disk has become faster
    assert cost.reading == pytest.approx(4) and cost.per_position == pytest.approx(0.06)
    for _ in range(20):
        cost.record(1, 8)  # and slower
    assert cost.reading == pytest.approx(8, rel=0.01) and cost.per_position == pytest.approx(0.06)
