"""An answer that ends by itself is what its grammar says, and a grammar hurts nobody but its own request."""

import functools
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import psutil
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import handler.engine.grammar_compiler
from handler.engine import Engine, EngineConfig, Grammar, InvalidRequest, ModelError, QueueFull, QueueTimeout, Request
from handler.engine.grammar import GrammarState, apply_grammars
from handler.engine.grammar_compiler import GrammarCompiler, _definition, _TrialProcess, _try

from .conftest import CONTEXT, VOCAB, make_model, make_tokenizer
from .test_detokenizer import make_sentencepiece
from .test_fairness import TOKEN_BYTES

TOKENIZERS = {
    "bytes": make_tokenizer,
    "sentencepiece": make_sentencepiece,
}  # the second has fewer tokens than the model
PROMPT = "The dog ran home."
DIGITS = Grammar("regex", "[0-9]{3,6}")
# It takes minutes to find out that no string has all of these.
ENDLESS = Grammar(
    "json_schema", json.dumps({"allOf": [{"pattern": f".*{c}{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz"]})
)


@functools.cache
def make_engine(kind="llama", tokenizer="bytes"):
    return Engine(make_model(kind), TOKENIZERS[tokenizer](), EngineConfig(generation={"max_new_tokens": 40}))


def submit(engine, grammar, parameters=None, **fields):
    ends = {"eos_token_id": engine._tokenizer.eos_token_id}
    return engine.submit(Request(PROMPT, ends | (parameters or {}), grammar=grammar, **fields))


def finish(engine, *jobs):
    while not all(job.finished for job in jobs):
        engine.step()
    return jobs[0]


def run(engine, grammar, parameters=None, **fields):
    job = finish(engine, submit(engine, grammar, parameters, **fields))
    assert job.error is None
    return job


def refusal(engine, grammar, **fields):
    """The message of a job that is refused, at once or once it is compiled."""
    try:
        job = finish(engine, submit(engine, grammar, **fields))
    except InvalidRequest as error:
        return str(error)
    assert isinstance(job.error, InvalidRequest) and not job.sequences[0].token_ids
    return str(job.error)


@pytest.fixture
def held(monkeypatch):
    """No grammar is compiled before this is set."""
    go, compile_ = threading.Event(), handler.engine.grammar_compiler._compile
    monkeypatch.setattr(handler.engine.grammar_compiler, "_compile", lambda *given: go.wait() and compile_(*given))
    yield go
    go.set()


# what an answer is

scalars = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-1200, 1200),
        st.integers(0, 5000),
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ['ä\n"', 1.5, None, [1, {}]]}, {"const": "日本"}]),
)


def containers(schemas):
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        schemas,
        st.integers(0, 1),
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, optional: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in optional],
            "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from(["a", "bc", "é", 'q"\\']), schemas, max_size=3),
        st.sets(st.sampled_from(["a", "é"])),
    )
    return arrays | objects | st.builds(lambda one, other: {"anyOf": [one, other]}, schemas, schemas)


def is_valid(value, schema):
    """As far as the schemas here go. Only true and false are booleans, not 0 and 1."""
    if "anyOf" in schema:
        return any(is_valid(value, each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return json.dumps(value) in map(json.dumps, schema.get("enum", [schema.get("const")]))
    python = {"string": str, "integer": int, "boolean": bool, "null": type(None), "array": list, "object": dict}
    if type(value) is not python[schema["type"]]:
        return False
    if schema["type"] == "string":
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    if schema["type"] == "integer":
        return schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "array":
        fits = schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(is_valid(item, schema["items"]) for item in value)
    if schema["type"] == "object":
        fits = set(schema["required"]) <= value.keys() <= schema["properties"].keys()
        return fits and all(is_valid(item, schema["properties"][name]) for name, item in value.items())
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    schema=st.recursive(scalars, containers, max_leaves=4),
    sampling=st.sampled_from([{}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 3}]),
    seed=st.integers(0, 9),
)
def test_json_of_a_schema(name, schema, sampling, seed):
    engine = make_engine(tokenizer=name)
    blanks = engine._tokenizer(" \n\t\r", add_special_tokens=False).input_ids  # or an answer is nothing else
    bias = dict.fromkeys([*blanks, *(i for i in range(VOCAB) if engine._tokenizer.decode([i]).isspace())], -100.0)
    limits = {"max_new_tokens": CONTEXT - 40}
    job = run(engine, Grammar("json_schema", json.dumps(schema)), limits | sampling, seed=seed, logit_bias=bias)
    assert job.sequences[0].finish_reason == "stop"
    assert is_valid(json.loads(job.sequences[0].text), schema)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5}, {"typical_p": 0.5}, {"top_h": 0.5}, {"min_p": 0.2}], ids=str
)
@pytest.mark.parametrize(
    "grammar, pattern",
    [
        (DIGITS, "[0-9]{3,6}"),
        (Grammar("regex", "(naïve|日本語){1,2}🙂 ?x"), "(naïve|日本語){1,2}🙂 ?x"),
        (Grammar("choice", json.dumps(["yes", "yes, but", 'né\n"🙂'])), 'yes|yes, but|né\n"🙂'),
    ],
    ids=["digits", "characters of several tokens", "choice"],
)
def test_an_expression_or_a_choice(name, sampling, grammar, pattern):
    for sequence in run(make_engine("bloom", name), grammar, sampling | {"num_return_sequences": 3}, seed=3).sequences:
        assert sequence.finish_reason == "stop" and re.fullmatch(pattern, sequence.text), sequence.text


def test_a_json_object_that_is_cut_off_says_so():
    job = run(make_engine(), Grammar("json_object"), {"max_new_tokens": 3})
    assert job.sequences[0].finish_reason == "length" and job.sequences[0].text[0] == "{"


def test_choices_of_one_request_go_their_own_ways():
    texts = [s.text for s in run(make_engine(), DIGITS, {"temperature": 2.0}, n=8, seed=1).sequences]
    assert all(re.fullmatch("[0-9]{3,6}", text) for text in texts) and len(set(texts)) > 2


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_crowd():
    engine, crowded = make_engine(), Engine(make_model("llama"), make_tokenizer(), EngineConfig(max_batch_size=5))
    schema = Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "string"}, "maxItems": 3}))
    asked = [(grammar, seed) for grammar in (DIGITS, schema, None) for seed in range(4)]
    sampling = {"temperature": 1.2, "max_new_tokens": 30}
    alone = [run(engine, grammar, sampling, seed=seed).sequences[0].token_ids for grammar, seed in asked]
    jobs = [submit(crowded, grammar, sampling, seed=seed) for grammar, seed in asked]
    finish(crowded, *jobs)
    assert [job.sequences[0].token_ids for job in jobs] == alone


def test_who_is_preempted_goes_on_in_its_grammar():
    requests = [{"n": 2, "seed": seed} for seed in (0, 10, 20)]

    def answers(config):
        engine = Engine(make_model("llama"), make_tokenizer(), config)
        long = Grammar("regex", "([a-z]{3}[0-9]){10,}")
        jobs = [submit(engine, long, {"temperature": 4.0, "max_new_tokens": 70}, **fields) for fields in requests]
        finish(engine, *jobs)
        return [sequence.text for job in jobs for sequence in job.sequences], engine._scheduler.num_preempted

    plenty, none = answers(EngineConfig())
    little, several = answers(EngineConfig(kv_cache_memory=200 * TOKEN_BYTES))
    assert (none, several > 1) == (0, True)
    assert little == plenty and len(set(plenty)) == 6
    assert all(re.fullmatch("([a-z]{3}[0-9])*[a-z]{0,3}", text) and len(text) > 40 for text in plenty)


# which tokens are left


def test_tokens_that_may_not_come_have_no_chance_and_other_rows_keep_theirs():
    tokenizer = make_sentencepiece()
    vocab = len(tokenizer) + 21  # the model has more rows than the tokenizer has tokens
    compilation = GrammarCompiler(tokenizer, vocab).compile(DIGITS, "group")
    logits = torch.randn(5, vocab)
    scores = logits.clone()
    scores[1], scores[2] = -torch.inf, 1e30  # no processor has its way
    logits[3] = scores[3] = scores[4] = -torch.inf
    states = [GrammarState(compilation, 0, [0]) for _ in range(4)] + [None]
    failed = apply_grammars(scores, logits, states, [[]] * 5)
    left = [set((row > -torch.inf).nonzero().flatten().tolist()) for row in scores]
    assert left[0] == left[1] == left[2] and all(re.fullmatch("[0-9]{1,6}", tokenizer.decode([i])) for i in left[0])
    assert len(left[0]) >= 10 and scores[1].max() == logits[1, list(left[0])].max()
    assert failed.keys() == {3} and isinstance(failed[3], ModelError)  # the model itself has no chance for a digit
    assert not left[4]


def test_a_grammar_that_the_tokens_cannot_write_is_refused():
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>": 0, "a": 1, "b": 2}, []))
    tokens.pre_tokenizer, tokens.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    engine = Engine(make_model("llama"), PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>"))
    job = engine.submit(Request([1], grammar=Grammar("choice", '["abc"]')))
    finish(engine, job)
    assert isinstance(job.error, InvalidRequest) and "none of this model's tokens" in str(job.error)


# with other parameters


def test_eos_comes_where_the_grammar_must_end_whatever_min_new_tokens_says():
    job = run(make_engine(tokenizer="sentencepiece"), Grammar("regex", "[0-9]{4}"), {"min_new_tokens": 20})
    assert re.fullmatch("[0-9]{4}", job.sequences[0].text) and job.sequences[0].finish_reason == "stop"


def test_min_new_tokens_holds_where_the_grammar_may_go_on():
    for new in (1, 9):
        job = run(make_engine(), Grammar("regex", "[0-9]{1,9}"), {"min_new_tokens": new}, seed=2)
        assert len(job.sequences[0].token_ids) > new


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_text_of_a_special_token_is_text(tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    for text in engine._tokenizer.all_special_tokens:
        job = run(engine, Grammar("choice", json.dumps([text])))
        assert (job.sequences[0].text, job.sequences[0].finish_reason) == (text, "stop")


def test_a_special_token_whose_text_the_tokenizer_can_merge_is_no_obstacle():
    tokenizer = make_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"] |= {"<e": VOCAB, "os>": VOCAB + 1, "s>": VOCAB + 2}
    described["model"]["merges"] += [["<", "e"], ["s", ">"], ["o", "s>"], ["<e", "os>"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    compilation = GrammarCompiler(tokenizer, len(tokenizer)).compile(Grammar("choice", '["<eos>"]'), "group")
    state = GrammarState(compilation, 0, [tokenizer.eos_token_id])
    bits = np.unpackbits(state.next_tokens([]), bitorder="little")
    assert bits.any() and not bits[tokenizer.eos_token_id]


def test_eos_tokens_outside_the_vocabulary_end_nothing():
    for own in (-1, 2**40):
        engine = Engine(make_model("llama"), make_tokenizer(), EngineConfig(generation={"eos_token_id": [own, 0]}))
        assert finish(engine, engine.submit(Request(PROMPT, grammar=DIGITS))).sequences[0].finish_reason == "stop"


def test_the_grammar_wins_over_what_forbids_all_it_allows():
    tokens = make_tokenizer()("0123456789").input_ids
    job = run(make_engine(), DIGITS, {"suppress_tokens": tokens, "forced_eos_token_id": 0, "max_new_tokens": 2})
    assert re.fullmatch("[0-9]{2,}", job.sequences[0].text)


def test_a_stop_string_ends_it():
    job = run(make_engine(), Grammar("regex", "abc0[a-z]{9}"), stop="c0")
    assert (job.sequences[0].text, job.sequences[0].finish_reason) == ("ab", "stop")


def test_log_probabilities_are_those_of_the_raw_logits():
    free, bound = (run(make_engine(), grammar, logprobs=5).sequences[0].logprobs[0] for grammar in (None, DIGITS))
    assert free[2] == bound[2] and bound[0] != free[0] and bound[1] < free[1]


def test_ignore_eos_is_refused():
    assert "ignore_eos" in refusal(make_engine(), DIGITS, ignore_eos=True)


# where a sequence is in its grammar


def test_the_state_depends_on_the_tokens_alone():
    compilation = GrammarCompiler(make_tokenizer(), VOCAB).compile(Grammar("regex", "(ab|cd)*[0-9]"), "group")
    tokens = [9] * 7 + make_tokenizer()("abcdab").input_ids
    step_by_step, at_once = GrammarState(compilation, 7, [0]), GrammarState(compilation, 7, [0])
    for end in range(7, len(tokens) + 1):
        allowed = step_by_step.next_tokens(tokens[:end])
    assert (allowed == at_once.next_tokens(tokens)).all() and (allowed == at_once.next_tokens(tokens)).all()
    bits = np.unpackbits(allowed, bitorder="little")
    assert {make_tokenizer().decode([i]) for i in bits.nonzero()[0]} == {"a", "c", *"0123456789"}


# grammars that are refused


@pytest.mark.parametrize(
    "grammar, why",
    [
        (Grammar("regex", "(a", "guided_regex"), "unclosed group"),
        (Grammar("regex", "(?=a)b", "guided_regex"), "look-around"),
        (Grammar("regex", r"[^\s\S]", "guided_regex"), "no text"),
        (Grammar("regex", "a\ud800", "guided_regex"), "surrogates"),
        (Grammar("regex", "a" * 70_000, "guided_regex"), "70000 bytes"),
        (Grammar("choice", "[]", "guided_choice"), "0 choices"),
        (Grammar("choice", json.dumps(["a"] * 1001), "guided_choice"), "1001 choices"),
        (Grammar("json_schema", "{", "guided_json"), "property name"),
        (Grammar("json_schema", "[1]", "guided_json"), "is an object"),
        (Grammar("json_schema", '{"type": "strin"}', "guided_json"), "strin"),
        (Grammar("json_schema", '{"not": {"type": "string"}}', "guided_json"), "not"),
        (Grammar("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "guided_json"), "not"),
        (Grammar("json_schema", '{"$ref": "https://example.org/schema"}', "guided_json"), "https://example.org"),
        (Grammar("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "guided_json"), "recursion"),
    ],
    ids=lambda value: value.text[:30] if isinstance(value, Grammar) else "",
)
def test_a_bad_grammar_is_refused_by_its_field_and_the_next_request_served(grammar, why):
    message = refusal(make_engine(), grammar)
    assert message.startswith(grammar.field + ": ") and why in message and len(message) < 500
    run(make_engine(), DIGITS)


def test_one_that_takes_for_ever_to_compile_is_refused():
    assert "too long" in refusal(make_engine(), ENDLESS)


@pytest.fixture
def trials():
    process = _TrialProcess()
    yield process
    with process._process as started:
        started.kill()


def test_the_next_grammar_is_tried_by_the_same_process(trials):
    assert _try(trials, '%llguidance {}\nstart: "a"', 10) == ""
    pid = trials._process.pid
    assert "too long" in _try(trials, _definition(ENDLESS), 0.1)
    assert "Expected" in _try(trials, "nothing", 10) and trials._process.pid == pid


def test_a_process_that_is_gone_is_started_again(trials):
    _try(trials, "nothing", 10)
    trials._process.kill()
    with pytest.raises(RuntimeError, match="ended with -9"):
        _try(trials, "nothing", 10)
    assert "Expected" in _try(trials, "nothing", 10)


def test_a_trial_that_the_machine_gives_no_time_may_come_again(trials):
    _try(trials, "nothing", 10)
    with ThreadPoolExecutor() as thread:
        trial = thread.submit(_try, trials, _definition(ENDLESS), 100)
        process = psutil.Process(trials._process.pid)
        while not (forks := process.children()):
            time.sleep(0.01)
        forks[0].send_signal(signal.SIGALRM)  # which the clock sends after a while
    assert isinstance(trial.exception(), QueueFull)


def test_a_trial_that_fails_is_no_fault_of_the_grammars(trials):
    with pytest.raises(RuntimeError, match="could not be tried"):
        _try(trials, "nothing", "a number")


def test_others_go_on_while_a_grammar_is_compiled(held):
    engine = make_engine()
    job, other = submit(engine, DIGITS), submit(engine, None, {"max_new_tokens": 5})
    finish(engine, other)
    assert not job.finished and not job.sequences[0].token_ids
    held.set()
    assert re.fullmatch("[0-9]{3,6}", finish(engine, job).sequences[0].text)


def test_one_that_explodes_later_ends_its_own_request_alone():
    engine = make_engine()
    late = submit(engine, Grammar("regex", "x{20}(a{300}){300}"), {"max_new_tokens": 200})
    other = submit(engine, DIGITS)
    finish(engine, late, other)
    assert isinstance(late.error, InvalidRequest) and "for each token" in str(late.error)
    assert other.error is None and re.fullmatch("[0-9]{3,6}", other.sequences[0].text)


def test_a_request_can_go_while_its_grammar_is_compiled(held):
    engine = make_engine()
    job, late = submit(engine, DIGITS), submit(engine, DIGITS, {"max_time": 0.001})
    engine.cancel(job.id)
    finish(engine, late)
    assert [j.sequences[0].finish_reason for j in (job, late)] == ["cancel", "time"]
    held.set()
    run(engine, DIGITS)
    assert not engine.has_work and engine.num_running == engine.num_waiting == 0


def test_so_many_grammars_wait_to_be_compiled_and_no_more(held):
    engine = Engine(make_model("llama"), make_tokenizer())  # without grammars of another test
    jobs = [submit(engine, DIGITS) for _ in range(64)]
    with pytest.raises(QueueFull):
        submit(engine, DIGITS)
    for job in jobs:
        engine.cancel(job.id)
    held.set()
    wait([job.compilation.future for job in jobs])
    run(engine, DIGITS)


def test_prompts_of_one_request_take_one_place(held):
    engine = make_engine()
    jobs = [submit(engine, DIGITS, group="one body") for _ in range(70)]
    other = submit(engine, DIGITS)
    assert len({id(job.compilation) for job in jobs}) == 1 and other.compilation is not jobs[0].compilation
    for job in [*jobs[1:], other]:
        engine.cancel(job.id)
    held.set()
    assert re.fullmatch("[0-9]{3,6}", finish(engine, jobs[0]).sequences[0].text)


def test_quick_grammars_do_not_wait_for_slow_ones(monkeypatch):
    go, try_ = threading.Event(), handler.engine.grammar_compiler._try

    def try_slow_ones_for_ever(process, definition, seconds):
        if "slow" not in definition:
            return try_(process, definition, seconds)
        return handler.engine.grammar_compiler._TOO_LONG if seconds < 1 or go.wait() else ""

    monkeypatch.setattr(handler.engine.grammar_compiler, "_try", try_slow_ones_for_ever)
    engine = make_engine()
    slow = [submit(engine, Grammar("regex", f"slow{i}")) for i in range(40)]
    assert run(engine, Grammar("regex", "quick")).sequences[0].text == "quick"
    assert not any(job.finished for job in slow)
    go.set()
    finish(engine, *slow)
    assert all("too long" in str(job.error) for job in slow)


def test_who_waits_for_a_grammar_waits_like_all_others(held):
    engine = Engine(make_model("llama"), make_tokenizer(), EngineConfig(max_queue=4, max_wait=0.05))
    jobs = [submit(engine, DIGITS, n=2) for _ in range(2)]
    assert engine.num_waiting == 4
    with pytest.raises(QueueFull):
        submit(engine, None)
    finish(engine, *jobs)
    assert all(isinstance(job.error, QueueTimeout) for job in jobs)
    assert not engine.has_work and engine.num_waiting == 0


def test_a_tokenizer_that_the_library_does_not_know_refuses_grammars_alone():
    class Tokenizer:
        """As those are that are written in Python."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def __len__(self):
            return len(self._inner)

        def __call__(self, text, **options):
            return self._inner(text, **options)

    engine = Engine(make_model("llama"), Tokenizer(make_tokenizer()))
    assert "tokenizer" in refusal(engine, DIGITS)
    assert run(engine, None).sequences[0].token_ids


def test_a_model_without_eos_cannot_end_an_answer():
    assert "eos" in refusal(make_engine(), DIGITS, parameters={"eos_token_id": []})
