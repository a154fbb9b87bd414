"""Every architecture of the table runs as `generate` does, token for token, packed; or is refused with its reason."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from handler.engine import Engine, EngineConfig, Request, UnsupportedModel, replay, speculation
from handler.engine.captured import Captured
from handler.kernels.cpu import has_code_for
from handler.loading import mend
from handler.weights.packed import pack_weights
from tests.models import DEVICE

from .architectures import BORDER, PAGE, REFUSED, RUNS, WINDOW, Case, make_page
from .conftest import guesser, make_tokenizer, prompt_ids

# Prompt and new tokens. They are cut into chunks, share forwards, slide out of a window of 8, and cross longrope's
# border of 24 tokens: one while it decodes, one with its prompt, and two never.
VISITORS = ((20, 8), (2, 20), (33, 5), (9, 14))
assert any(p < BORDER < p + n for p, n in VISITORS) and all(p + n > 2 * WINDOW for p, n in VISITORS)


# What is done around their forwards, or what their forwards read from tensors, is not the same in each.
NOT_REPLAYED = {"gpt_neo", "jetmoe", "llama, dynamic RoPE", "longcat_flash", "phi3, longrope", "phimoe, longrope"}


def alone(model, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def own_attention_afterwards():
    """The library's, for `generate`."""
    yield
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_runs_as_generate_does(case: Case, monkeypatch, own_attention_afterwards):
    model = case.make_model()
    prompts = [prompt_ids(seed, length) for seed, (length, _) in enumerate(VISITORS)]
    expected = [alone(model, prompt, new) for prompt, (_, new) in zip(prompts, VISITORS, strict=True)]
    mend(model)
    pack_weights(model)
    engine = Engine(model, make_tokenizer(), EngineConfig(prefill_chunk=7, max_batch_size=4))
    texts = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    monkeypatch.setattr(speculation, "prompt_lookup", guesser(texts))
    engine.speculator._limit, engine.speculator._most_rows = 3, 4
    engine._cost.record = lambda *_: None  # believes that computing takes no time
    waiting = [Request(prompt, {"max_new_tokens": new}) for prompt, (_, new) in zip(prompts, VISITORS, strict=True)]
    passer_by = engine.submit(Request(prompt_ids(9, 25), {"max_new_tokens": 40}))
    jobs, steps = [], 0
    while waiting or engine.has_work:
        if waiting and steps % 2 == 0:
            jobs.append(engine.submit(waiting.pop(0)))
        engine._scheduler._mixed_batch = steps % 2 == 0  # decoding and prefilling rows share a forward, or not
        engine.step()
        steps += 1
        if steps == 6:
            engine.cancel(passer_by.id)
    answers = [job.sequences[0].token_ids for job in jobs]
    assert answers == expected
    assert engine.speculator.num_accepted
    assert len({token for answer in answers for token in answer}) > 8  # not one word over and over


class NeverTried(set):
    """So that each replay is held against an ordinary forward."""

    def __contains__(self, _):
        return False


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_replayed_steps_give_what_others_give(case: Case, monkeypatch, own_attention_afterwards):
    """Bit for bit; and about that where more rows stand in."""
    monkeypatch.setattr(replay, "_SIGHTINGS", 1)
    monkeypatch.setattr(replay, "_TRIALS", 0)
    monkeypatch.setattr(replay.Replays, "_code_seconds", lambda *_: 0.4)  # long for such models, short for a prompt
    replayed, prompts, run, equal, difference = [], [], Captured.replay, [], replay._difference

    def tried(captured, forward):
        captured.tried = NeverTried("once")
        replayed.append(captured.is_for_more(forward))
        prompts.extend([len(forward.columns)] * (forward.row is not None))
        return run(captured, forward)

    monkeypatch.setattr(Captured, "replay", tried)
    monkeypatch.setattr(
        replay, "_difference", lambda *pair: equal.append(replayed[-1] or torch.equal(*pair)) or difference(*pair)
    )
    model = case.make_model()
    mend(model)
    pack_weights(model)
    engine = Engine(model, make_tokenizer(), EngineConfig(max_batch_size=3, num_speculative_tokens=0))
    own = engine._runner._replays
    for seed, new in (1, 15), (2, 15), (3, 8):
        engine.submit(Request(prompt_ids(seed, 5 * seed), {"max_new_tokens": new}, ignore_eos=True))
    for seed, tokens in (4, 11), (5, 16), (6, 9), (7, WINDOW), (8, WINDOW - 3):  # the first of so few is recorded
        while engine.has_work:
            engine.step()
        engine.submit(Request(prompt_ids(seed, tokens), {"max_new_tokens": 2}, ignore_eos=True))
    while engine.has_work:
        engine.step()
    if DEVICE.type == "cuda":  # which refuses others
        assert replayed or str(case) != "llama"
        return
    assert all(equal)
    assert bool(own and own._is_on) == (str(case) not in NOT_REPLAYED)
    assert len(equal) >= len(replayed) >= 12 if own and own._is_on else not replayed
    assert not replayed or replayed.count(True) > 3 or not has_code_for(torch.float32)
    few = {WINDOW - 3} if engine._runner._window else {16, 9}
    assert not replayed or few <= set(prompts) or not has_code_for(torch.float32)


def test_continuations_cross_longropes_border_one_after_the_other():
    """Two begin at once, the third when one of them has crossed: their prompts' keys are no longer the same."""
    model = next(case for case in RUNS if str(case) == "phi3, longrope").make_model()
    engine = Engine(model, make_tokenizer(), EngineConfig(max_batch_size=3))
    prompt, new = prompt_ids(0, BORDER - 4), 14
    visitor = engine.submit(Request(prompt_ids(1, 5), {"max_new_tokens": 3}))
    job = engine.submit(Request(prompt, {"max_new_tokens": new}, n=3))
    crossed = 0
    while engine.has_work:
        engine.step()
        crossed += len({sequence.shares_prompt for sequence in job.sequences}) == 2
    assert visitor.finished and crossed > 1
    assert [sequence.token_ids for sequence in job.sequences] == [alone(model, prompt, new)] * 3


def test_a_chain_ends_at_longropes_border(monkeypatch, scheduled):
    """All keys change there, so what a forward made of later drafts does not count."""
    model = next(case for case in RUNS if case.note == "longrope").make_model()
    prompt = prompt_ids(3, BORDER - 3)
    expected = alone(model, prompt, 10)
    monkeypatch.setattr(
        speculation, "prompt_lookup", lambda ids, limit: (prompt + expected)[len(ids) :][: min(limit, 5)]
    )
    engine = Engine(model, make_tokenizer(), EngineConfig(max_batch_size=4))
    engine.speculator._limit, engine.speculator._most_rows = 5, 4
    engine._cost.record = lambda *_: None
    forwards = scheduled()
    job = engine.submit(Request(prompt, {"max_new_tokens": 10}))
    while not job.finished:
        engine.step()
    assert job.sequences[0].token_ids == expected
    assert forwards == [[BORDER - 3], [6], [BORDER + 1], [5]]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_is_refused_in_one_line(case: Case):
    with pytest.raises(UnsupportedModel) as refusal:
        Engine(case.make_model(), make_tokenizer())
    assert REFUSED[case] in str(refusal.value) and "\n" not in str(refusal.value)
    assert type(case.make_model()).__name__ in str(refusal.value)


def test_the_page_is_the_table():
    assert PAGE.read_text() == make_page(), "run python -m tests.engine.architectures"
