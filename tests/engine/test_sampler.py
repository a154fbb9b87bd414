"""The next token: the library's distribution, each row's own randomness."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as library

from handler.engine import Engine, EngineConfig, ModelError, Request, sampler
from handler.engine.logits_processors import quick_equivalent
from handler.engine.sampler import Sampler, _candidates, _rising, sample

from .conftest import make_model, prompt_ids, reference

HOT = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12, "eos_token_id": []}


def sampled(scores, *samplers):
    return sample(scores, samplers, [[1]] * len(samplers))


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 0},
        {"top_k": 40},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(kind, tokenizer, parameters):
    model = make_model(kind)
    prompt = prompt_ids(1, 9)

    def text(seed, crowd):
        engine = Engine(model, tokenizer, EngineConfig(max_batch_size=8, prefill_chunk=16))
        for i in range(crowd):
            other = {} if i % 2 else parameters
            engine.submit(Request(prompt_ids(10 + i, 3 + 4 * i), HOT | other, seed=i))
        engine.step()
        job = engine.submit(Request(prompt, HOT | parameters, seed=seed))
        while not job.finished:
            engine.step()
        return job.sequences[0].token_ids

    alone = text(5, crowd=0)
    assert text(5, crowd=5) == alone
    assert text(6, crowd=0) != alone


def test_without_a_seed_texts_differ(model, tokenizer):
    engine = Engine(model, tokenizer)
    jobs = [engine.submit(Request(prompt_ids(1, 5), HOT)) for _ in range(4)]
    while engine.has_work:
        engine.step()
    assert len({tuple(job.sequences[0].token_ids) for job in jobs}) > 1


warpers = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.2, 3.0).map(library.TemperatureLogitsWarper),
        "top_h": st.floats(0.2, 0.9).map(library.TopHLogitsWarper),
        "top_k": st.integers(1, 60).map(library.TopKLogitsWarper),
        "top_p": st.floats(0.05, 0.99).map(library.TopPLogitsWarper),
        "min_p": st.floats(0.001, 0.5).map(library.MinPLogitsWarper),
        "typical_p": st.floats(0.1, 0.95).map(library.TypicalLogitsWarper),
        "epsilon": st.floats(1e-4, 0.01).map(library.EpsilonLogitsWarper),
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), chain=warpers, spread=st.sampled_from([0.1, 2.0, 8.0]))
def test_few_candidates_have_the_librarys_distribution(seed, chain, spread):
    order = ["temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon"]
    steps = [chain[name] for name in order if name in chain]
    scores = torch.randn(3, 4000, generator=torch.Generator().manual_seed(seed)) * spread
    expected = scores
    for step in steps:
        expected = step(None, expected)
    expected = expected.softmax(-1)
    got = torch.zeros_like(expected)
    for rows, ids, reduced in _candidates(scores, steps):
        probabilities = reduced.softmax(-1)
        got[rows] = probabilities if ids is None else torch.zeros(len(rows), 4000).scatter(1, ids, probabilities)
    assert torch.allclose(got.sum(-1), torch.ones(3), atol=1e-4)
    # A token on the very edge of a nucleus may fall on either side by rounding.
    assert (got - expected).abs().sum(-1).max() < 2e-2 + 2 * expected.max() * (spread < 1)


@pytest.mark.parametrize("levels", [1, 3, 40, 100_000])
def test_the_quick_sort_is_torchs_stable_one(levels):
    """Scores of which many tie, below zero and above, in bfloat16's rounding, and such as are cut off."""
    scores = (torch.randint(levels, (5, 3000), generator=torch.Generator().manual_seed(0)) / levels - 0.5) * 8
    scores[1] = scores[1].bfloat16().float()
    scores[2] *= 1e-39  # not normal
    scores[3, ::3] = torch.tensor([0.0, -0.0]).repeat(500)
    scores[4, 1500:], scores[4, :700] = -math.inf, math.inf
    for ours, theirs in zip(_rising(scores), torch.sort(scores, stable=True), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("warper", [library.TopPLogitsWarper, library.TypicalLogitsWarper])
def test_on_a_cpu_warpers_sort_quickly(monkeypatch, warper, mass):
    """Torch's sort holds all others up for 20 ms and more a row of 250,000 words."""
    scores, sorts = (torch.randn(3, 5000) * 3).bfloat16().float(), []
    monkeypatch.setattr(sampler, "_rising", lambda scores: sorts.append(1) or _rising(scores))
    ours, theirs = sampler._warp(scores, [warper(mass)]), warper(mass)(None, scores)
    assert len(sorts) == 1
    assert torch.equal(ours.sort().values, theirs.sort().values)  # of scores that tie, as many stay
    assert ((ours == scores) | (ours == -math.inf)).all()


def test_a_nucleus_is_found_without_sorting_the_vocabulary():
    scores = torch.randn(2, 5000)
    scores[0, :5] += 20  # a peaked row and a flat one
    parts = list(_candidates(scores, [library.TopPLogitsWarper(0.9)]))
    assert [rows.tolist() for rows, _, _ in parts] == [[0], [1]]
    assert parts[0][2].shape[-1] < 5000 and parts[1][1] is None


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=40)  # few different ones, so that they repeat


@settings(max_examples=300, deadline=None)
@given(prompt=tokens, continuation=tokens, size=st.integers(1, 6), count=st.integers(0, 50), eos=tokens)
def test_our_own_processors_do_what_the_librarys_do(prompt, continuation, size, count, eos):
    prompt, ids, eos = torch.tensor(prompt), torch.tensor([prompt + continuation]), [*eos, 4000]
    scores = torch.randn(1, 7)
    for theirs in [
        library.NoRepeatNGramLogitsProcessor(size),
        library.EncoderNoRepeatNGramLogitsProcessor(size, prompt),
        library.SuppressTokensLogitsProcessor(eos),
        library.SuppressTokensAtBeginLogitsProcessor(eos, begin_index=count),
        library.MinLengthLogitsProcessor(count, eos),
        library.MinNewTokensLengthLogitsProcessor(len(prompt), count, eos),
    ]:
        ours = quick_equivalent(theirs, prompt, vocab_size=7)
        assert type(ours) is not type(theirs)
        for end in range(len(prompt), ids.shape[1] + 1):
            assert torch.equal(ours(ids[:, :end], scores), theirs(ids[:, :end], scores))


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = sampled(scores, *[Sampler(generator=generator)] * 4000)
    shares = torch.tensor(drawn).bincount(minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.03)
    assert shares[3] == 0


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_what_is_impossible_is_never_drawn(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((1, 1), number))
    scores = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert sampled(scores, Sampler(generator=torch.Generator())) in ([1], [2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab_size", [3, 1023, 1024, 1025, 70001])
def test_ties_go_to_the_lowest_token(dtype, rows, vocab_size):
    logits = torch.randn(rows, vocab_size).to(dtype).clamp(max=1.0)
    assert sampled(logits, *[Sampler()] * rows) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [3, 1024, 5000])
def test_the_only_number_is_found_wherever_it_is(vocab_size):
    places = [0, 1, vocab_size // 2, vocab_size - 1]
    logits = torch.full((len(places), vocab_size), -torch.inf)
    logits[range(len(places)), places] = -3
    assert sampled(logits, *[Sampler()] * len(places)) == places
    logits[1, vocab_size - 1] = torch.nan
    assert [isinstance(token, Exception) for token in sampled(logits, *[Sampler()] * len(places))] == [0, 1, 0, 0]


def test_scores_that_are_not_numbers_fail_their_row_only():
    logits = torch.zeros(4, 50)
    logits[:, 7] = 1
    logits[1, 3] = logits[3, 3] = float("nan")
    cold, hot = Sampler(), Sampler(warpers=[library.TopKLogitsWarper(1)], generator=torch.Generator())
    chosen = sampled(logits, cold, cold, hot, hot)
    assert chosen[0] == chosen[2] == 7
    assert isinstance(chosen[1], ModelError) and isinstance(chosen[3], ModelError)


class Broken:
    def __call__(self, ids, scores):
        raise KeyError("mine")


@pytest.mark.parametrize("part", ["processors", "warpers", "generator", "text"])
def test_a_row_that_cannot_be_sampled_fails_alone(model, tokenizer, part):
    engine = Engine(model, tokenizer)
    parameters = {"max_new_tokens": 4, "top_k": 1, "eos_token_id": []}
    bad, good = (engine.submit(Request(prompt_ids(i, 5), parameters, seed=1)) for i in range(2))
    sampler = bad.sequences[0].sampler
    if part == "text":
        bad.sequences[0].text_stream.push = Broken().__call__
    elif part == "generator":
        sampler.generator = "none"
    else:
        getattr(sampler, part).append(Broken())
    while engine.has_work:
        engine.step()
    assert isinstance(bad.error, ModelError) and bad.sequences[0].finish_reason == "error"
    assert good.error is None
    assert good.sequences[0].token_ids == reference("llama", tuple(prompt_ids(1, 5)))[:4]
