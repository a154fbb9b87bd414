"""A draft model changes how many forwards an answer takes, and nothing else of it, however wrong it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from handler.engine import Request, draft_model, scheduler, speculation
from handler.engine.draft_model import DraftModel
from handler.engine.errors import CacheSpoiled
from handler.engine.forward_cost import ForwardCost
from tests.models import DEVICE

from .conftest import KINDS, VOCAB, make_model, prompt_ids, reference
from .test_speculation import ANY_TEXT, REQUESTS, answers, make_engine


@pytest.fixture(autouse=True)
def no_prompt_lookup(monkeypatch):
    monkeypatch.setattr(speculation, "prompt_lookup", lambda ids, limit: [])


def engine_with(draft, kind="llama", seconds=0.0, **config):
    """With a draft model that it believes to take so many seconds a forward, whatever it measures."""
    engine = make_engine(kind, **config)
    model = engine.speculator.draft_model = DraftModel(draft, VOCAB)
    model._cost = ForwardCost()  # it has measured a forward already
    model._cost.reading, model._cost.record = seconds, lambda *_: None
    return engine


def noisy(kind):
    """The model with other weights here and there: right at times."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(make_model(kind).config).eval().to(DEVICE)
    model.load_state_dict(make_model(kind).state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12 * parameter.std())
    return model


def same(found, expected):
    assert [s.token_ids for s in found] == [s.token_ids for s in expected]
    assert [(s.text, s.finish_reason) for s in found] == [(s.text, s.finish_reason) for s in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_every_answer_is_the_one_without_a_draft_model(kind, requests):
    engine = engine_with(noisy(kind), kind, prefill_chunk=8)
    same(answers(engine, requests), answers(make_engine(kind, drafts=0, prefill_chunk=8), requests))
    assert 0 < engine.speculator.num_drafted > engine.speculator.num_accepted
    assert engine.speculator.draft_model


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_itself_is_always_right(kind):
    engine = engine_with(make_model(kind), kind, drafts=7)
    requests = [Request(prompt_ids(i, 5 + 9 * i), ANY_TEXT) for i in range(3)]
    same(answers(engine, requests), answers(make_engine(kind, drafts=0), requests))
    assert engine.speculator.num_accepted == engine.speculator.num_drafted > 0


def test_a_noisy_one_is_right_at_times():
    engine = engine_with(noisy("llama"))
    answers(engine, REQUESTS["greedy"])
    assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted


@pytest.mark.parametrize("perfect", [True, False])
def test_rows_come_and_go(perfect, monkeypatch):
    """Requests join and end at different times, rows move, and memory that ends preempts some."""
    monkeypatch.setattr(draft_model, "_CHUNK", 16)
    monkeypatch.setattr(scheduler, "_MARGIN", 1)
    requests = [
        Request(prompt_ids(i, 3 + 11 * i % 40), ANY_TEXT | {"max_new_tokens": 6 + 9 * i % 31}, seed=i) for i in range(9)
    ]
    small = {"max_batch_size": 4, "kv_cache_memory": 130 * 2 * 3 * 2 * 8 * 4}
    expected = answers(make_engine(drafts=0, **small), requests)
    engine = engine_with(make_model("llama") if perfect else noisy("llama"), drafts=5, **small)
    jobs = []
    for request in requests:
        jobs.append(engine.submit(request))
        engine.step()
    while engine.has_work:
        engine.step()
    same([sequence for job in jobs for sequence in job.sequences], expected)
    assert engine._scheduler.num_preempted
    assert engine.speculator.num_accepted and engine.speculator.draft_model
    assert (engine.speculator.num_accepted == engine.speculator.num_drafted) == perfect


def test_what_was_rejected_is_forgotten():
    """Its guesses are the model's own, also behind a token that it did not guess, and with another text before it."""
    engine = engine_with(make_model("llama"))
    jobs = [engine.submit(Request(prompt_ids(i, 40), ANY_TEXT)) for i in range(3)]
    sequences = [job.sequences[0] for job in jobs]

    def check(sequences):
        with torch.inference_mode():
            proposed = engine.speculator.draft_model.propose(sequences, 4)
        assert [proposed[s] for s in sequences] == [reference("llama", tuple(s.all_token_ids), 4) for s in sequences]
        return [proposed[s] for s in sequences]

    for sequence, guesses in zip(sequences, check(sequences), strict=True):
        sequence.token_ids += [*guesses[:2], 7, 9]
    check(sequences)
    for some in (sequences[:2], sequences[1:], sequences[:1], sequences[2:], sequences):  # rows move
        check(some)


def test_prompt_lookup_comes_first_and_the_draft_model_sees_what_it_has_missed(monkeypatch):
    """It is asked in some steps only, so that it has to catch up."""
    lookups = []
    monkeypatch.setattr(
        speculation, "prompt_lookup", lambda ids, limit: lookups.append(ids) or [7] * (len(ids) % 3 == 0)
    )
    engine = engine_with(make_model("llama"), drafts=3)
    requests = REQUESTS["greedy"] + REQUESTS["seeded"]
    same(answers(engine, requests), answers(make_engine(drafts=0), requests))
    assert 0 < engine.speculator.num_accepted < engine.speculator.num_drafted


def test_an_error_ends_drafting_and_no_request(monkeypatch, caplog):
    engine = engine_with(make_model("llama"))
    calls = []

    def fails(rows, share):
        calls.append(rows)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine.speculator.draft_model._forward = fails
    same(answers(engine, REQUESTS["greedy"]), answers(make_engine(drafts=0), REQUESTS["greedy"]))
    assert engine.speculator.draft_model is None and len(calls) == 1
    assert "not asked any more" in caplog.text


def test_what_a_replay_has_spoiled_is_made_anew(monkeypatch):
    """And the draft model is asked on."""
    engine = engine_with(make_model("llama"))
    model = engine.speculator.draft_model
    forward, forwards = model._runner.forward, []

    def spoil(batch):
        forwards.append(batch)
        if len(forwards) != 8:
            return forward(batch)
        for store in model._cache._stores():
            store.fill_(torch.nan)
        raise CacheSpoiled

    monkeypatch.setattr(model._runner, "forward", spoil)
    same(answers(engine, REQUESTS["greedy"]), answers(make_engine("llama", drafts=0), REQUESTS["greedy"]))
    assert engine.speculator.draft_model is model and len(forwards) > 20
    assert engine.speculator.num_accepted == engine.speculator.num_drafted > 10


@pytest.mark.parametrize("seconds, is_asked", [(0.05, True), (5.0, False)])
def test_it_is_asked_where_that_pays(seconds, is_asked):
    """A step of the model takes one second."""
    engine = engine_with(make_model("llama"), seconds=seconds)
    answers(engine, REQUESTS["greedy"])
    assert bool(engine.speculator.num_drafted) == is_asked


def test_it_is_tried_again_some_day():
    engine = engine_with(make_model("llama"), seconds=1.2)
    answers(engine, [Request(prompt_ids(1, 9), ANY_TEXT | {"max_new_tokens": 9})])
    assert not engine.speculator.num_drafted
    answers(engine, [Request(prompt_ids(1, 9), ANY_TEXT | {"max_new_tokens": 150})])
    assert engine.speculator.num_drafted


def test_also_where_many_rows_are_what_it_takes():
    model = DraftModel(make_model("llama"), VOCAB)
    model._cost.reading, model._cost.per_extra_position = 1.0, 2.0
    for _ in range(1000):
        model.forget()
    assert model._cost.seconds(9) < 0.01


def test_what_a_forward_takes_is_known_before_it_is_asked():
    assert DraftModel(make_model("llama"), VOCAB).seconds([], 1) > 0


def test_what_it_has_not_seen_costs_too():
    engine = engine_with(make_model("llama"))
    model = engine.speculator.draft_model
    model._cost.reading, model._cost.per_position = 0.11, 0.01
    job = engine.submit(Request(prompt_ids(1, 41), ANY_TEXT | {"max_new_tokens": 20}))
    (sequence,) = job.sequences
    assert model.seconds([sequence], 3) == pytest.approx(3 * 0.11 + 41 * 0.01 / 20)
    with torch.inference_mode():
        model.propose([sequence], 3)
    assert model.seconds([sequence], 3) == pytest.approx(3 * 0.11)


def test_texts_that_it_cannot_follow_are_left_out(monkeypatch):
    """Too long, or with a token that the draft model lacks: one client's are no other's harm."""
    monkeypatch.setattr(draft_model, "_MAX_TOKENS", 90)
    engine = engine_with(make_model("llama"), drafts=4)
    engine.speculator.draft_model._vocab_size = VOCAB - 1
    strange, long, short = [VOCAB - 1, 5, 6], prompt_ids(1, 88), prompt_ids(2, 5)
    requests = [Request(ids, ANY_TEXT) for ids in (strange, long, short)]
    followed = []
    propose = engine.speculator.draft_model.propose
    engine.speculator.draft_model.propose = lambda sequences, count: (
        followed.append(sequences) or propose(sequences, count)
    )
    same(answers(engine, requests), answers(make_engine(drafts=0), requests))
    assert {sequence.job.prompt_ids[0] for group in followed for sequence in group} == {short[0]}
    assert engine.speculator.draft_model


def test_a_larger_vocabulary_than_the_models_is_cut(monkeypatch):
    engine = engine_with(make_model("llama"))
    engine.speculator.draft_model._vocab_size = 40
    answers(engine, [Request([5, 6, 7], ANY_TEXT | {"suppress_tokens": list(range(40, VOCAB))})])
    assert engine.speculator.num_drafted
