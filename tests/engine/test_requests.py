"""What a request may say, and what becomes of it."""

import time

import pytest
import torch
from transformers import GenerationConfig

from handler.engine import (
    Engine,
    EngineConfig,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    QueueTimeout,
    Request,
    sampler,
)

from .conftest import CONTEXT, VOCAB, make_model, prompt_ids, reference

PROMPT = prompt_ids(0, 8)
GREEDY = reference("llama", tuple(PROMPT))


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer)


def run(engine, prompt=PROMPT, parameters=None, **fields):
    job = engine.submit(Request(prompt, parameters or {}, **fields))
    while not job.finished:
        engine.step()
    assert job.error is None
    return job


def generated(parameters):
    ids = torch.tensor([PROMPT])
    out = make_model("llama").generate(ids, attention_mask=torch.ones_like(ids), **parameters)
    return out[0, len(PROMPT) :].tolist()


# parameters


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1, "suppress_tokens": GREEDY[:1]},
        {"begin_suppress_tokens": GREEDY[:1]},
        {"bad_words_ids": [[GREEDY[0]], GREEDY[2:4]]},
        {"eos_token_id": [GREEDY[4], 3]},
        {"eos_token_id": GREEDY[3], "min_new_tokens": 9},
        {"suppress_tokens": GREEDY[:3]},
        {"sequence_bias": [[[5], 60.0]]},
        {"forced_eos_token_id": 9},
        {"max_length": len(PROMPT) + 5},
        {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 7},
    ],
    ids=lambda p: next(iter(p)),
)
def test_means_what_generate_means(engine, parameters):
    parameters = {"do_sample": False, "max_new_tokens": 14} | parameters
    if "max_length" in parameters:
        del parameters["max_new_tokens"]
    expected = generated(parameters)
    assert expected != GREEDY[: len(expected)] or len(expected) < 14  # the parameter matters
    assert run(engine, parameters=parameters).sequences[0].token_ids == expected


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"temprature": 0.5}, "temprature"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"no_repeat_ngram_size": 257}, "no_repeat_ngram_size"),
        ({"encoder_no_repeat_ngram_size": 257}, "encoder_no_repeat_ngram_size"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_time": -1}, "max_time"),
        ({"num_beams": 4}, "num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"use_cache": False}, "use_cache"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": [3]}, "stop_strings"),
        ({"bad_words_ids": [[VOCAB + 9]]}, "bad_words_ids"),
        ({"suppress_tokens": [VOCAB]}, "suppress_tokens"),
        ({"forced_eos_token_id": -2}, "forced_eos_token_id"),
        ({"sequence_bias": [[[VOCAB + 9], 1.0]]}, "sequence_bias"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": VOCAB}, "eos_token_id"),
        ({"eos_token_id": [0, -2]}, "eos_token_id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"exponential_decay_length_penalty": [-100, 1e18]}, "exponential_decay_length_penalty"),
        ({"min_new_tokens": 81}, "min_new_tokens: expected at most the 80"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"min_length": 200}, "min_length"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(engine, parameters, named):
    with pytest.raises(InvalidRequest, match=named):
        engine.submit(Request(PROMPT, parameters))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 0}, "n:"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"n": 1000}, "n:"),
    ],
)
def test_a_bad_field_is_refused_by_name(engine, fields, named):
    with pytest.raises(InvalidRequest, match=named):
        engine.submit(Request(PROMPT, {}, **fields))
    assert not engine.has_work


def test_neutral_values_of_what_is_not_supported_are_fine(engine):
    job = run(engine, parameters={"num_beams": 1, "use_cache": True, "top_p": None, "max_new_tokens": 3})
    assert job.sequences[0].token_ids == GREEDY[:3]


def test_greedy_unless_sampling_is_asked_for(model, tokenizer, monkeypatch):
    checkpoint = GenerationConfig(do_sample=True, temperature=9.0, min_p=0.1, no_repeat_ngram_size=1)
    monkeypatch.setattr(model, "generation_config", checkpoint)
    engine = Engine(model, tokenizer)
    assert run(engine, parameters={"max_new_tokens": 20}).sequences[0].token_ids == GREEDY[:20]


@pytest.mark.parametrize("parameters", [{"temperature": 5.0}, {"top_k": 300}, {"top_p": 0.999}, {"do_sample": True}])
def test_a_sampling_parameter_turns_sampling_on(engine, parameters):
    fixed = {"max_new_tokens": 20, "temperature": 5.0, "seed": 1}
    if "temperature" not in parameters and "do_sample" not in parameters:
        fixed.pop("temperature")
    texts = {tuple(run(engine, parameters=fixed | parameters | {"seed": s}).sequences[0].token_ids) for s in range(8)}
    assert len(texts) > 1


def test_as_many_rows_are_drawn_at_once_as_there_is_memory_for(engine, monkeypatch):
    """To sort many rows of a large vocabulary takes several times the logits' memory. What is drawn stays the same,
    also beside greedy rows, and of rows with penalties."""
    odd = [{}, {"do_sample": False}, {"repetition_penalty": 1.3}]

    def drawn():
        jobs = []
        for seed in range(9):
            parameters = {"do_sample": True, "typical_p": 0.9, "top_k": 0, "seed": seed, "max_new_tokens": 4}
            jobs.append(engine.submit(Request(PROMPT, parameters | odd[seed % 3], logprobs=2 if seed == 4 else None)))
        while engine.has_work:
            engine.step()
        return [(job.sequences[0].token_ids, job.sequences[0].logprobs) for job in jobs]

    expected, rows, draw = drawn(), [], sampler._draw_at_once

    def counted(scores, samplers):
        rows.append(len(scores))
        return draw(scores, samplers)

    monkeypatch.setattr(sampler, "_draw_at_once", counted)
    monkeypatch.setattr(sampler, "DRAWN_LOGITS", 2 * VOCAB)
    assert drawn() == expected
    assert max(rows) == 2


def test_temperature_zero_is_greedy(engine):
    parameters = {"temperature": 0, "top_p": 0.9, "do_sample": True, "max_new_tokens": 12}
    assert run(engine, parameters=parameters).sequences[0].token_ids == GREEDY[:12]


def test_the_request_wins_over_the_defaults(model, tokenizer):
    hot = {"do_sample": True, "temperature": 50.0}
    engine = Engine(model, tokenizer, EngineConfig(max_new_tokens=4, generation=hot))
    assert len(run(engine, ignore_eos=True).sequences[0].token_ids) == 4  # eos is as likely as any other
    assert run(engine, parameters={"temperature": 0}).sequences[0].token_ids == GREEDY[:4]
    assert len(run(engine, parameters={"max_length": len(PROMPT) + 9, "temperature": 0}).sequences[0].token_ids) == 9
    assert len(run(engine, parameters={"max_new_tokens": 2}, ignore_eos=True).sequences[0].token_ids) == 2


def test_a_default_of_more_tokens_than_a_request_allows_is_no_error(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(generation={"min_new_tokens": 9, "eos_token_id": -1}))
    assert len(run(engine, parameters={"max_new_tokens": 4}).sequences[0].token_ids) == 4


def test_nothing_is_chosen_where_the_parameters_forbid_everything(engine):
    job = engine.submit(Request(PROMPT, {"suppress_tokens": list(range(VOCAB))}))
    while engine.has_work:
        engine.step()
    assert isinstance(job.error, InvalidRequest) and not job.sequences[0].token_ids


def test_null_in_the_defaults_is_the_default(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_new_tokens=3, generation={"max_new_tokens": None}))
    assert len(run(engine).sequences[0].token_ids) == 3


def test_bad_defaults_are_refused_when_they_are_configured():
    with pytest.raises(ValueError, match="num_beams"):
        EngineConfig(generation={"num_beams": 2})


# prompts


def test_a_text_prompt_is_what_the_tokenizer_makes_of_it(engine, tokenizer):
    text = "The dog — naïve"
    job = run(engine, prompt=text, parameters={"max_new_tokens": 3})
    assert job.prompt_ids == tokenizer(text).input_ids
    assert job.sequences[0].token_ids == reference("llama", tuple(job.prompt_ids))[:3]


@pytest.mark.parametrize("prompt", [[VOCAB], [-1], [1.0], None, ["a"], [True], "\ud800"])
def test_a_bad_prompt_is_refused(engine, prompt):
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.submit(Request(prompt))


def test_an_empty_prompt_starts_from_bos(engine, tokenizer, monkeypatch):
    assert run(engine, prompt="", parameters={"max_new_tokens": 2}).prompt_ids == [tokenizer.bos_token_id]
    monkeypatch.setattr(engine, "_tokenizer", type("NoBos", (), {"bos_token_id": None})())
    with pytest.raises(InvalidRequest, match="bos"):
        engine.submit(Request([]))


def test_a_pad_token_in_the_prompt_is_a_token(engine):
    parameters = {"max_new_tokens": 1, "pad_token_id": PROMPT[0], "repetition_penalty": 1000.0}
    job = run(engine, parameters=parameters, logit_bias={PROMPT[0]: 90.0})
    assert job.sequences[0].token_ids != PROMPT[:1]  # the penalty on the prompt's tokens holds for it too
    parameters.pop("repetition_penalty")
    assert run(engine, parameters=parameters, logit_bias={PROMPT[0]: 90.0}).sequences[0].token_ids == PROMPT[:1]


# limits


def test_too_long_is_413_with_both_numbers(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_sequence_length=40, max_prompt_tokens=20))
    for prompt, parameters, numbers in [
        ([2] * 21, {}, ("21", "20")),
        ([2] * 20, {"max_new_tokens": 21}, ("41", "40")),
        ([2] * 20, {"max_length": 19}, ("20", "19")),
    ]:
        with pytest.raises(PromptTooLong) as refused:
            engine.submit(Request(prompt, parameters))
        assert all(number in str(refused.value) for number in numbers)
    assert len(run(engine, [2] * 20, {"max_new_tokens": 20, "eos_token_id": []}).sequences[0].token_ids) == 20


def test_a_default_gives_way_to_what_fits(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_sequence_length=12, max_new_tokens=100))
    assert len(run(engine).sequences[0].token_ids) == 4


def test_the_models_own_limit_holds(model, tokenizer, caplog):
    assert Engine(model, tokenizer).capacity.max_sequence_length == CONTEXT
    assert Engine(model, tokenizer, EngineConfig(max_sequence_length=9999)).capacity.max_sequence_length == CONTEXT
    assert "9999" in caplog.text
    assert Engine(make_model("bloom"), tokenizer).capacity.max_sequence_length == 2048
    assert Engine(make_model("gpt2"), tokenizer).capacity.max_sequence_length == CONTEXT


def test_what_can_never_fit_the_memory_limit_is_413(model, tokenizer):
    token_bytes = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    engine = Engine(model, tokenizer, EngineConfig(kv_cache_memory=30 * token_bytes + 1))
    with pytest.raises(PromptTooLong, match="31"):
        engine.submit(Request(PROMPT, {"max_new_tokens": 23}))
    assert len(run(engine, parameters={"max_new_tokens": 22, "eos_token_id": []}).sequences[0].token_ids) == 22


def test_a_full_queue_is_429(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1, max_queue=2))
    first = engine.submit(Request(PROMPT, {"max_new_tokens": 3}))
    engine.step()
    engine.submit(Request(PROMPT))
    with pytest.raises(QueueFull):
        engine.submit(Request(PROMPT, n=2))
    engine.submit(Request(PROMPT))
    while not first.finished:
        engine.step()
    engine.step()
    engine.submit(Request(PROMPT))


def test_an_id_that_runs_is_refused(engine):
    engine.submit(Request(PROMPT, id="a"))
    with pytest.raises(InvalidRequest, match="id"):
        engine.submit(Request(PROMPT, id="a"))


def test_first_come_first_served(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=2))
    jobs = [engine.submit(Request(prompt_ids(i, 5), {"max_new_tokens": 4, "eos_token_id": []})) for i in range(5)]
    ended = []
    while engine.has_work:
        ended += [jobs.index(job) for job in engine.step() if job.finished]
    assert ended == [0, 1, 2, 3, 4]


def test_a_long_prompt_does_not_stall_who_decodes(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=8))
    decoding = engine.submit(Request(PROMPT, {"max_new_tokens": 24, "eos_token_id": []}))
    engine.step()
    late = engine.submit(Request(prompt_ids(5, 60), {"max_new_tokens": 2}))
    for step in range(2, 10):
        engine.step()
        assert len(decoding.sequences[0].token_ids) == step  # one token in every step
        assert bool(late.sequences[0].token_ids) == (step == 9)  # 60 tokens, 8 in a step


def test_all_prompts_together_share_one_chunk(model, tokenizer, scheduled):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=8))
    engine.submit(Request(prompt_ids(9, 3), {"max_new_tokens": 20}))
    engine.step()  # this one decodes from now on
    forwards = scheduled()
    for i in range(3):
        engine.submit(Request(prompt_ids(i, 5), {"max_new_tokens": 1}))
    for _ in range(2):
        engine.step()
    assert forwards == [[1], [5, 3], [1], [2, 5]]


def test_prompts_take_more_of_a_step_that_nobody_decodes_in(model, tokenizer, scheduled):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=4))
    forwards = scheduled()
    for i in range(4):
        engine.submit(Request(prompt_ids(i, 5), {"max_new_tokens": 1}))
    engine.step()
    assert forwards == [[5, 5, 5, 1]]


# ends


def test_eos_ends_and_ignore_eos_does_not(engine):
    parameters = {"eos_token_id": GREEDY[5], "max_new_tokens": 12}
    job = run(engine, parameters=parameters)
    assert job.sequences[0].token_ids == GREEDY[: GREEDY.index(GREEDY[5]) + 1]
    assert job.sequences[0].finish_reason == "stop"
    job = run(engine, parameters=parameters | {"min_new_tokens": 12}, ignore_eos=True)
    assert job.sequences[0].token_ids == GREEDY[:12]
    assert job.sequences[0].finish_reason == "length"


def test_cancel_frees_the_slot(model, tokenizer):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1))
    gone = engine.submit(Request(PROMPT, {"max_new_tokens": 24}))
    waiting = engine.submit(Request(PROMPT, {"max_new_tokens": 24}))
    engine.step()
    engine.cancel(gone.id)
    engine.cancel("nobody")
    assert gone.finished and gone.sequences[0].finish_reason == "cancel"
    engine.step()
    assert waiting.sequences[0].token_ids == GREEDY[:1]
    engine.cancel(waiting.id)
    assert not engine.has_work


def test_a_deadline_ends_running_and_waiting_jobs(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1))
    now = time.monotonic()
    running = engine.submit(Request(PROMPT, {"max_new_tokens": 24, "max_time": 5.0}))
    waiting = engine.submit(Request(PROMPT, {"max_time": 5}))
    patient = engine.submit(Request(PROMPT, {"max_new_tokens": 2}))
    engine.step()
    assert not running.finished
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    changed = engine.step()
    assert {running.id, waiting.id} <= {job.id for job in changed}
    assert running.sequences[0].finish_reason == waiting.sequences[0].finish_reason == "time"
    assert running.sequences[0].token_ids == GREEDY[:1]
    assert patient.sequences[0].token_ids == GREEDY[:1]  # it got the row in the same step


def test_a_request_that_waits_too_long_is_told_so(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1, max_wait=60))
    now = time.monotonic()
    running = engine.submit(Request(PROMPT, {"max_new_tokens": 20}, n=2))
    alone = engine.submit(Request(PROMPT, group="one body"))
    engine.step()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    late = engine.submit(Request(PROMPT, {"max_new_tokens": 2}))
    assert engine.step() == [running]
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert alone in engine.step()
    assert isinstance(alone.error, QueueTimeout) and "60 s" in str(alone.error)
    while engine.has_work:
        engine.step()
    # One that runs may take as long as it likes, with all that came with it; so may one that came later.
    assert [len(sequence.token_ids) for sequence in running.sequences] == [20, 20]
    assert late.error is None and late.sequences[0].token_ids == GREEDY[:2]


def test_prompts_that_came_together_wait_together(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=1, max_wait=60))
    now = time.monotonic()
    jobs = [engine.submit(Request(PROMPT, {"max_new_tokens": 5}, group="one body")) for _ in range(2)]
    for seconds in range(0, 250, 50):  # five steps for the first prompt
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        engine.step()
    assert jobs[0].finished and not jobs[1].finished
    engine.step()
    assert jobs[1].error is None and jobs[1].sequences[0].token_ids == GREEDY[:1]


def test_stop_strings_from_both_places(engine, tokenizer):
    text = run(engine, parameters={"max_new_tokens": 20}).sequences[0].text
    middle = len(text) // 2
    stop = next(text[i : i + 2] for i in range(middle, len(text)) if "\ufffd" not in text[i : i + 2])
    for job in (
        run(engine, parameters={"max_new_tokens": 20, "stop_strings": stop}),
        run(engine, parameters={"max_new_tokens": 20}, stop=("never there", stop)),
    ):
        choice = job.sequences[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
        assert stop in tokenizer.decode(choice.token_ids)
        assert stop not in tokenizer.decode(choice.token_ids[:-1])


def test_what_was_held_back_is_shown_at_the_end(engine, tokenizer):
    prompt = "The dog ran"
    parameters = {"max_new_tokens": 9, "eos_token_id": []}
    plain = run(engine, prompt, parameters)
    text = plain.sequences[0].text
    assert text == tokenizer.decode(plain.prompt_ids + plain.sequences[0].token_ids)[len(prompt) :]
    for reason, more in (("length", 0), ("cancel", 1)):
        parameters["max_new_tokens"] = 9 + more
        again = engine.submit(Request(prompt, parameters, stop=text[-1] + "never"))
        while len(again.sequences[0].token_ids) < 9:
            engine.step()
        engine.cancel(again.id)
        assert again.sequences[0].finish_reason == reason
        assert again.sequences[0].text == text


def test_a_step_reports_the_jobs_whose_text_has_grown(engine):
    job = engine.submit(Request(PROMPT, {"max_new_tokens": 20}))
    texts = [""]
    while not job.finished:
        changed = engine.step()
        texts.append(job.sequences[0].text)
        assert texts[-1].startswith(texts[-2])
        assert (job in changed) == (texts[-1] != texts[-2] or job.finished)
    assert len(set(texts)) > 2


# several sequences of one request


def test_n_sequences_are_seeded_one_after_the_other(engine):
    parameters = {"do_sample": True, "temperature": 4.0, "top_k": 0, "max_new_tokens": 8}
    job = run(engine, parameters=parameters, n=3, seed=11)
    alone = [run(engine, parameters=parameters, seed=11 + i).sequences[0] for i in range(3)]
    assert [c.token_ids for c in job.sequences] == [c.token_ids for c in alone]
    assert [c.index for c in job.sequences] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in job.sequences}) == 3
    assert len(run(engine, parameters={"num_return_sequences": 2, "max_new_tokens": 2}).sequences) == 2


@pytest.mark.parametrize("chunk", [3, 256])
def test_n_sequences_prefill_their_prompt_once(model, tokenizer, scheduled, chunk):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=chunk))
    forwards = scheduled()
    job = run(engine, parameters={"max_new_tokens": 1}, n=5, logprobs=1, prompt_logprobs=True)
    assert sum(map(sum, forwards)) == len(PROMPT) + 4  # the others compute the last token, which they sample from
    assert [sequence.token_ids for sequence in job.sequences] == [GREEDY[:1]] * 5
    assert len(job.prompt_logprobs) == len(PROMPT)
    for sequence in job.sequences:
        assert sequence.logprobs[0][1] == pytest.approx(job.sequences[0].logprobs[0][1], abs=1e-5)


def test_penalties_and_bias_as_openai_defines_them(engine, model):
    fields = {"logit_bias": {9: 25.0, GREEDY[3]: -50.0}, "presence_penalty": 3.0, "frequency_penalty": 4.0}
    expected = list(PROMPT)
    for _ in range(16):
        with torch.no_grad():
            scores = model(torch.tensor([expected])).logits[0, -1]
        new = expected[len(PROMPT) :]
        for token in set(new):
            scores[token] -= 3.0 + 4.0 * new.count(token)
        scores[9] += 25.0
        scores[GREEDY[3]] -= 50.0
        expected.append(scores.argmax().item())
    job = run(engine, parameters={"max_new_tokens": 16, "eos_token_id": []}, **fields)
    assert job.sequences[0].token_ids == expected[len(PROMPT) :]
    assert 1 < job.sequences[0].token_ids.count(9) < 16  # the bias brings it, the penalties end it


@pytest.mark.parametrize("chunk", [3, 256])
def test_logprobs_are_the_models(model, tokenizer, chunk):
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=chunk))
    engine.submit(Request(prompt_ids(3, 11), {"max_new_tokens": 20}))  # a neighbour
    # A penalty changes what is chosen, not what is reported.
    job = run(engine, parameters={"max_new_tokens": 6, "repetition_penalty": 3.0}, logprobs=4, prompt_logprobs=True)
    choice = job.sequences[0]
    with torch.no_grad():
        truth = model(torch.tensor([PROMPT + choice.token_ids])).logits[0].log_softmax(-1)
    assert job.prompt_logprobs[0] is None
    reported = job.prompt_logprobs[1:] + choice.logprobs
    assert len(job.prompt_logprobs) == len(PROMPT)
    assert [token for token, _, _ in reported] == PROMPT[1:] + choice.token_ids
    for position, (token, logprob, top) in enumerate(reported):
        assert logprob == pytest.approx(truth[position, token].item(), abs=1e-3)
        assert [i for i, _ in top] == truth[position].topk(4).indices.tolist()
        assert [p for _, p in top] == pytest.approx(truth[position].topk(4).values.tolist(), abs=1e-3)


def test_everyone_gets_as_many_logprobs_as_asked_for(engine):
    wishes = (None, 3, 0, 1)
    jobs = [engine.submit(Request(prompt_ids(i, 5), {"max_new_tokens": 2}, logprobs=n)) for i, n in enumerate(wishes)]
    while engine.has_work:
        engine.step()
    for job, wish in zip(jobs, wishes, strict=True):
        entries = job.sequences[0].logprobs
        assert [token for token, _, _ in entries] == (job.sequences[0].token_ids if wish is not None else [])
        assert all(len(top) == wish for _, _, top in entries)


def test_no_logprobs_unless_asked(engine):
    job = run(engine, parameters={"max_new_tokens": 2})
    assert job.sequences[0].logprobs == [] and job.prompt_logprobs == []
