"""A replayed forward gives what an ordinary one gives, or is not believed.

What a CUDA graph captures runs anew at each replay where there is no GPU: all but the capture is tested so.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from handler.engine import Engine, EngineConfig, Request, block_attention, cuda_graphs, kv_cache, replay
from handler.engine.captured import Captured, Forward
from handler.engine.scheduler import Batch
from handler.kernels.cpu import has_code_for
from handler.loading import mend
from handler.weights.packed import pack_weights
from tests.models import DEVICE

from .conftest import KINDS, make_model, make_tokenizer, offloaded_model, prompt_ids, reference

LENGTHS = (3, 9, 1, 20, 14, 5, 11, 17)


class Rerun(cuda_graphs._Graph):
    """Stands for a graph: the same forward, on the tensors and by the numbers that were there when it was made."""

    def __init__(self, model, cache, forward, logits, stream, pool):
        Captured.__init__(self, forward, len(logits), logits.device)
        self._model, self._cache, self._logits = model, cache, logits
        self._graph, self.run = SimpleNamespace(replay=self._run), self._replay
        cache.direct_to(self.columns)
        self._known = dict(vars(cache.context))

    def _run(self):
        context = self._cache.context
        prepared = dict(vars(context))
        vars(context).update(self._known, slots={})
        self._logits.copy_(self._model(**self.inputs).logits.flatten(0, -2))
        vars(context).update(prepared)


@pytest.fixture(params=["graph"] if DEVICE.type == "cuda" else ["graph", "recording"])
def replays(request, monkeypatch):
    """replays(kind) -> an engine, and its replays, where a forward takes no time that one of more rows could take."""
    monkeypatch.setattr(replay, "_timed", lambda forward: (forward(), 0.0))
    if DEVICE.type == "cpu" and request.param == "graph":
        monkeypatch.setattr(cuda_graphs, "_Graph", Rerun)
        monkeypatch.setattr(replay, "Recordings", cuda_graphs.CudaGraphs)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")

    return replaying_engine


def replaying_engine(kind):
    settings = EngineConfig(max_batch_size=4, num_speculative_tokens=0, prefill_chunk=7)
    engine = Engine(make_model(kind), make_tokenizer(), settings)
    return engine, engine._runner._replays


def serve(engine):
    """Answers of rows that come and go, and whether they are what `generate` gives."""
    jobs = []
    for seed, length in enumerate(LENGTHS):
        jobs.append(engine.submit(Request(prompt_ids(seed, length), {"max_new_tokens": 24})))
        for _ in range(5):
            engine.step()
    while engine.has_work:
        engine.step()
    return [job.sequences[0].token_ids for job in jobs]


def expected(kind):
    return [reference(kind, tuple(prompt_ids(seed, length)))[:24] for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate(kind, replays, monkeypatch):
    engine, own = replays(kind)
    replayed, run = [], Captured.replay
    monkeypatch.setattr(Captured, "replay", lambda *given: replayed.append(1) or run(*given))
    assert serve(engine) == expected(kind)
    assert own._is_on and own._trials == 0 and len(replayed) > 20 and own._captured


def test_a_replay_that_gives_other_logits_is_not_believed(replays, monkeypatch, caplog):
    engine, own = replays("llama")
    run = Captured.replay

    def wrong(*given):
        return run(*given).roll(1, dims=-1)

    monkeypatch.setattr(Captured, "replay", wrong)
    assert serve(engine) == expected("llama")
    assert not own._is_on and "other numbers" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_replay", [0, 2])
def test_a_replay_that_writes_keys_elsewhere_is_not_believed(kind, replays, monkeypatch, caplog, from_replay):
    """What it has written over is computed anew, for everyone."""
    engine, own = replays(kind)
    own._trials, replayed, run = 3, [], Captured.replay

    def elsewhere(captured, forward):
        replayed.append(forward)
        wrong = replace(forward, columns=[0] * len(forward.columns))
        return run(captured, wrong if len(replayed) > from_replay else forward)

    monkeypatch.setattr(Captured, "replay", elsewhere)
    assert serve(engine) == expected(kind)
    assert not own._is_on and len(replayed) == from_replay + 1 and "other numbers" in caplog.text
    assert not any(store.isnan().any() for store in engine._cache._stores())


def test_a_replay_that_fails_when_it_is_tried_harms_nobody(replays, monkeypatch, caplog):
    engine, own = replays("llama")

    def fail(*given):
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(Captured, "replay", fail)
    assert serve(engine) == expected("llama")
    assert not own._is_on and "sizes do not match" in caplog.text
    assert not any(store.isnan().any() for store in engine._cache._stores())


def test_a_replay_that_fails_later_is_run_by_the_models_code(replays, monkeypatch, caplog):
    engine, own = replays("llama")
    replayed, run = [], Captured.replay

    def fail(*given):
        replayed.append(1)
        if len(replayed) == 9:
            raise RuntimeError("sizes do not match")
        return run(*given)

    monkeypatch.setattr(Captured, "replay", fail)
    assert serve(engine) == expected("llama")
    assert own._trials == 0 and not own._is_on and "sizes do not match" in caplog.text


@pytest.mark.parametrize("at", ["capture", "trial", "replay"])
def test_memory_that_ends_turns_nothing_off(replays, monkeypatch, at):
    engine, own = replays("llama")
    made, done = [], {"capture": own._backend.capture, "replay": Captured.replay}

    def fail(kind, when):
        def call(*given):
            made.append(1)
            if len(made) == when:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            return done[kind](*given)

        return call

    if at == "capture":
        monkeypatch.setattr(own._backend, "capture", fail("capture", 1))
    else:
        monkeypatch.setattr(Captured, "replay", fail("replay", 1 if at == "trial" else 9))
    assert serve(engine) == expected("llama")
    assert own._is_on and own._captured


@pytest.mark.parametrize("at", ["capture", "trial"])
def test_memory_that_always_ends_turns_replay_off(replays, monkeypatch, caplog, at):
    engine, own = replays("llama")

    def fail(*given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(*(own._backend, "capture") if at == "capture" else (Captured, "replay"), fail)
    assert serve(engine) == expected("llama")
    assert not own._is_on and caplog.text.count("can't allocate") == 1


def test_logits_without_a_deviation_are_no_difference(replays):
    engine, own = replays("llama")
    handle = make_model("llama").lm_head.register_forward_hook(lambda *given: given[-1] * 0)
    engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 12}, ignore_eos=True))
    try:
        while engine.has_work:
            engine.step()
    finally:
        handle.remove()
    assert own._is_on and own._captured


def test_rows_that_do_not_begin_at_the_first(replays):
    """A long row keeps the first place, and runs apart from short ones."""
    engine, own = replays("llama")
    engine._scheduler._mixed_batch = False
    jobs = [engine.submit(Request(prompt_ids(n, 5), {"max_new_tokens": 24})) for n in range(3)]
    first_rows, forward = set(), engine._runner.forward

    def part(batch):
        if batch.cache_shape[0] < 3 or len(batch.sequences) < 3 or max(batch.num_scheduled_tokens) > 1:
            return forward(batch)
        first_rows.add(1)
        kept = [Batch(batch.sequences[a:b], [1] * (b - a), batch.cache_shape) for a, b in ((0, 1), (1, 3))]
        return torch.cat([forward(one).clone() for one in kept])

    engine._runner.forward = part
    while engine.has_work:
        engine.step()
    assert first_rows and {(kind[0], rows) for rows, kind in own._captured} >= {(0, 1), (1, 2)}
    assert [job.sequences[0].token_ids for job in jobs] == [
        reference("llama", tuple(prompt_ids(n, 5))) for n in range(3)
    ]


def test_short_rows_beside_a_long_one_are_not_captured(replays):
    """They see another number of columns in each step."""
    engine, own = replays("llama")
    context = engine._cache.context
    engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 8}))
    engine.step()
    inputs = {"input_ids": torch.ones(1, 1)}
    context.query_length, context.past_length, context.kv_length = 1, 5, 6
    assert own._forward(inputs, [5], None) is None
    context.kv_length = context.store_shape[1]
    assert own._forward(inputs, [5], None) is not None


def test_each_capture_is_tried_once(replays, monkeypatch):
    engine, own = replays("llama")
    own._trials, replayed, run = 0, [], Captured.replay
    monkeypatch.setattr(Captured, "replay", lambda captured, *given: replayed.append(captured) or run(captured, *given))
    spoil, trials = engine._cache.spoil_new_tokens, []
    monkeypatch.setattr(engine._cache, "spoil_new_tokens", lambda: trials.append(1) or spoil())
    assert serve(engine) == expected("llama")
    assert 3 < len(set(replayed)) == len(trials) < len(replayed)


def test_what_is_another_number_in_each_forward_is_noticed_at_once(replays, caplog):
    engine, own = replays("llama")
    if isinstance(own._backend, cuda_graphs.CudaGraphs) and DEVICE.type == "cpu":
        pytest.skip("what stands for a graph runs anew")
    own._trials, forwards = 0, itertools.count(1)
    handle = make_model("llama").lm_head.register_forward_hook(lambda *given: given[-1] * next(forwards))
    try:
        assert serve(engine) == expected("llama")
    finally:
        handle.remove()
    assert not own._is_on and "other numbers" in caplog.text


@pytest.mark.parametrize("trials", [0, 3])
@pytest.mark.parametrize("at", [0, 2])
def test_a_forward_that_cannot_be_captured_is_run(replays, monkeypatch, caplog, at, trials):
    engine, own = replays("llama")
    own._trials, made, capture = trials, [], own._backend.capture

    def fail(forward, size, like):
        made.append(forward)
        if len(made) <= at:
            return capture(forward, size, like)
        cache = engine._cache
        cache.direct_to(torch.zeros(size, dtype=torch.long, device=DEVICE))
        cache.context.rows.zero_()  # what is captured has not run
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(own._backend, "capture", fail)
    assert serve(engine) == expected("llama")
    assert len(made) == at + 1 and not own._is_on and "not permitted" in caplog.text


def test_captures_make_way_when_memory_ends(replays, monkeypatch):
    engine, own = replays("llama")
    job = engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 20}))
    other = engine.submit(Request(prompt_ids(1, 5), {"max_new_tokens": 20}))
    while not own._captured:
        engine.step()
    forward = own.forward

    def fail(*_):
        monkeypatch.setattr(own, "forward", forward)
        raise torch.OutOfMemoryError("planned")

    monkeypatch.setattr(own, "forward", fail)
    engine.step()
    assert other.error is not None and not own._captured
    while engine.has_work:
        engine.step()
    assert job.sequences[0].token_ids == reference("llama", tuple(prompt_ids(0, 5)))[:20]


def test_no_capture_outlives_the_memory_that_it_reads(replays, monkeypatch):
    engine, _ = replays("llama")
    stores, run = [], Captured.replay

    def record(captured, *given):
        stores.append({store.data_ptr() for store in engine._cache._stores()})
        captured.stores = getattr(captured, "stores", stores[-1])
        assert captured.stores == stores[-1]
        return run(captured, *given)

    monkeypatch.setattr(Captured, "replay", record)
    job = engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 110, "min_new_tokens": 110}))
    while engine.has_work:
        engine.step()
        if job.sequences[0].length in (20, 40):  # rows come, and the store moves, and go
            for seed in (1, 2, 3):
                engine.submit(Request(prompt_ids(seed, 5), {"max_new_tokens": 3}))
    assert job.error is None and len(set(map(frozenset, stores))) > 2 and len(stores) > 60


def test_what_is_captured_is_let_go_before_keys_and_values_grow(replays, monkeypatch):
    """It would hold on to those that they are copied from."""
    engine, own = replays("llama")
    held, resized = [], kv_cache._resized
    monkeypatch.setattr(kv_cache, "_resized", lambda *given: held.append(len(own._captured)) or resized(*given))
    job = engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 60, "min_new_tokens": 60}))
    while not own._captured:
        engine.step()
    held.clear()
    engine.submit(Request(prompt_ids(1, 5), {"max_new_tokens": 60}))
    while engine.has_work:
        engine.step()
    assert job.error is None and held and not any(held)


def test_more_rows_than_at_first(replays):
    engine, own = replays("llama")
    long = [Request(prompt_ids(seed, 5), {"max_new_tokens": 20}) for seed in range(3)]
    jobs = [engine.submit(long[0])]
    for seed in (3, 4):  # memory for three rows, and for not so many that it goes back
        engine.submit(Request(prompt_ids(seed, 5), {"max_new_tokens": 1}))
    while not own._captured:
        engine.step()
    stores = [store.data_ptr() for store in engine._cache._stores()]
    jobs += [engine.submit(request) for request in long[1:]]
    while engine.has_work:
        engine.step()
    assert len(own._captured) > 1 and [store.data_ptr() for store in engine._cache._stores()] == stores
    answers = [reference("llama", tuple(prompt_ids(seed, 5)))[:20] for seed in range(3)]
    assert [job.sequences[0].token_ids for job in jobs] == answers


@pytest.fixture
def stand_ins(monkeypatch):
    """Forwards of how many rows were run by captured ones of how many others, where the model's code takes for ever."""
    monkeypatch.setattr(replay, "_timed", lambda forward: (forward(), math.inf))
    taken, run = [], Captured.replay

    def replayed(captured, forward):
        logits = run(captured, forward)
        if forward.row is None and captured.is_for_more(forward):
            taken.append((len(forward.columns), len(captured.columns)))
        return logits

    monkeypatch.setattr(Captured, "replay", replayed)
    return taken


can_pass_over = pytest.mark.skipif(DEVICE.type == "cuda" or not has_code_for(torch.float32), reason="writes all rows")


@can_pass_over
@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_stand_in_for_fewer(kind, stand_ins):
    engine, own = replaying_engine(kind)
    for _ in range(2):  # of what takes long nothing is known at first
        assert serve(engine) == expected(kind)
    assert own._is_on and len(stand_ins) > 3


@can_pass_over
def test_rows_that_are_missing_write_nothing(stand_ins):
    """Another sequence, whose prompt is not through, may be in them."""
    engine, _ = replaying_engine("llama")
    jobs = [engine.submit(Request(prompt_ids(n, 5), {"max_new_tokens": 40 - 16 * (n > 1)})) for n in range(4)]
    while not all(job.finished for job in jobs[2:]):
        engine.step()
    engine.step()  # how long it takes is known now
    with torch.inference_mode():
        for store in engine._cache._stores():  # else the same would be written once more
            store[2:] = 7
    before = [store.clone() for store in engine._cache._stores()]
    stand_ins.clear()
    engine.step()
    assert stand_ins == [(2, 4)]
    for old, new in zip(before, engine._cache._stores(), strict=True):
        assert not torch.equal(old[:2], new[:2]) and torch.equal(old[2:], new[2:])


@can_pass_over
def test_rows_that_go_on_are_captured_themselves(stand_ins, monkeypatch):
    monkeypatch.setattr(replay, "_STAND_INS", 5)
    engine, own = replaying_engine("llama")
    for n in range(4):
        engine.submit(Request(prompt_ids(n, 5), {"max_new_tokens": 40 - 16 * (n > 1)}))
    while engine.has_work:
        engine.step()
    assert stand_ins.count((2, 4)) == 4 and 2 in {rows for rows, _ in own._captured}


@can_pass_over
def test_no_rows_stand_in_that_would_write(stand_ins, monkeypatch):
    engine, own = replaying_engine("llama")
    monkeypatch.setattr(kv_cache, "can_scatter", lambda *_: False)
    assert serve(engine) == expected("llama")
    assert own._captured and not stand_ins


def test_rows_stand_in_where_that_takes_no_longer():
    _, own = replaying_engine("llama")
    own._trials, kind = 0, ("kind",)
    for rows in (4, 8):
        own._captured[rows, kind] = more = Captured(Forward({}, [1] * rows), rows, torch.device("cpu"))
        more.seconds, more.num_replays, more.takes_fewer, more.tried = 2.0, 3, True, {False}
    own._seconds |= {(1, kind): 1.9, (2, kind): 2.0, (3, ("another",)): 2.0}
    assert own._usable((2, kind), 2) == (4, kind) and own._usable((4, kind), 4) == (4, kind)
    assert own._usable((5, kind), 5) == (8, kind)  # which the model's code does not do sooner than fewer
    assert own._usable((1, kind), 1) is None and own._usable((3, ("another",)), 3) is None
    own._captured[4, kind].num_replays = 2
    assert own._usable((2, kind), 2) is None
    own._captured[8, kind].tried = set()
    assert own._usable((5, kind), 5) is None


def test_prompts_are_replayed_where_that_takes_no_longer():
    _, own = replaying_engine("llama")
    own._captured[16, replay._PROMPT] = one = Captured(Forward({}, range(12), 0), 16, torch.device("cpu"))
    one.seconds, one.num_replays, one.takes_fewer = 2.0, 3, True
    key = 16, replay._PROMPT
    own._seconds |= {(11, replay._PROMPT): 1.9, (13, replay._PROMPT): 2.0}
    assert own._usable(key, 11) is None and own._usable(key, 12) is None
    assert own._usable(key, 13) == key and own._usable(key, 16) == key
    assert not own._is_due(key, 11)  # again
    del own._seconds[13, replay._PROMPT]
    assert own._usable(key, 16) is None
    one.num_replays = 2
    assert own._usable(key, 11) == key
    own.forget()
    assert own._seconds  # of prompts, wherever keys and values are


def test_long_forwards_of_prompts_are_not_captured():
    _, own = replaying_engine("llama")
    key = 16, replay._PROMPT
    own._seen[key] = 3
    own._seconds[16, replay._PROMPT] = replay._MOST_SECONDS
    assert not own._is_due(key, 16) and own._is_due(key, 15)
    own._seconds[12, replay._PROMPT], own._seconds[13, replay._PROMPT] = replay._MOST_SECONDS, 0.1
    assert own._is_due(key, 13)  # as fewer took longer once


@can_pass_over
def test_the_first_that_stands_in_is_tried(stand_ins, monkeypatch, caplog):
    """As one of all rows was, which may give what fewer do not."""
    engine, own = replaying_engine("llama")
    replay_all = Captured.replay

    def wrong(captured, forward):
        logits = replay_all(captured, forward)
        return logits.roll(1, dims=-1) if captured.is_for_more(forward) else logits

    monkeypatch.setattr(Captured, "replay", wrong)
    assert serve(engine) == expected("llama")
    assert len(stand_ins) == 1 and not own._is_on and "other numbers" in caplog.text


@pytest.fixture
def prompts(monkeypatch):
    """Tokens, row and size of each replayed prompt, where prompts are captured when they are first met and the model's
    code takes long."""
    monkeypatch.setattr(replay, "_SIGHTINGS", 1)
    monkeypatch.setattr(replay.Replays, "_code_seconds", lambda *_: 0.4)
    taken, run = [], Captured.replay

    def replayed(captured, forward):
        if forward.row is not None:
            taken.append((len(forward.columns), forward.row, len(captured.columns)))
        return run(captured, forward)

    monkeypatch.setattr(Captured, "replay", replayed)
    return taken


def prompting_engine(kind):
    """With room for several rows."""
    engine = Engine(make_model(kind), make_tokenizer(), EngineConfig(max_batch_size=4, num_speculative_tokens=0))
    for seed in range(2):
        engine.submit(Request(prompt_ids(90 + seed, 5), {"max_new_tokens": 30}, ignore_eos=True))
    while engine.has_work:
        engine.step()
    answer(engine, prompt_ids(92, 12))  # takes few columns, which stay
    assert engine._cache.num_rows == 2
    return engine, engine._runner._replays


def answer(engine, ids, new=4, **parameters):
    job = engine.submit(Request(ids, {"max_new_tokens": new} | parameters))
    while not job.finished:
        engine.step()
    return job.sequences[0].token_ids


@can_pass_over
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_replayed_in_any_row(kind, prompts):
    engine, own = prompting_engine(kind)
    for seed in range(4):  # they make room, and two of them stay
        engine.submit(Request(prompt_ids(30 + seed, 3), {"max_new_tokens": 150 - 50 * (seed > 1)}, ignore_eos=True))
    for _ in range(110):
        engine.step()
    answers = {}
    for n, length in enumerate((12, 16, 11, 9)):
        if n == 3:
            engine.submit(Request(prompt_ids(20, 3), {"max_new_tokens": 60}, ignore_eos=True))
            engine.step()
        ids = tuple(prompt_ids(n, length))
        answers[ids] = answer(engine, list(ids), 2)
    assert answers == {ids: reference(kind, ids)[:2] for ids in answers}
    assert own._is_on and prompts == [(16, 2, 16), (11, 2, 16), (3, 2, 16), (9, 3, 16)]


@can_pass_over
def test_a_prompt_writes_no_more_than_its_tokens(prompts):
    engine, _ = prompting_engine("llama")
    for seed, length in enumerate((12, 11)):
        answer(engine, prompt_ids(seed, length))
    engine.submit(Request(prompt_ids(5, 11), {"max_new_tokens": 1}, ignore_eos=True))
    with torch.inference_mode():
        for store in engine._cache._stores():
            store.fill_(7)
    prompts.clear()
    engine.step()
    assert prompts == [(11, 0, 16)]
    for store in engine._cache._stores():
        assert (store[0, :, :11] != 7).any(-1).all() and (store[0, :, 11:] == 7).all()
        assert len(store) > 1 and (store[1:] == 7).all()


@can_pass_over
def test_to_record_a_prompt_writes_nothing(prompts, monkeypatch):
    """What it would write has not been held against anything."""
    engine, own = prompting_engine("llama")
    stores = []

    def record(forward, *given):
        kept = [store.clone() for store in engine._cache._stores()]
        captured = capture(forward, *given)
        if forward.row is not None:
            stores.append(all(map(torch.equal, kept, engine._cache._stores())))
        return captured

    capture = own._backend.capture
    monkeypatch.setattr(own._backend, "capture", record)
    with torch.inference_mode():
        for store in engine._cache._stores():
            store.fill_(7)
    answer(engine, prompt_ids(1, 11))
    assert stores == [True]


@can_pass_over
def test_nothing_is_left_of_the_prompt_before(prompts):
    """A token that makes no number would make none of others'."""
    engine, own = prompting_engine("llama")
    for seed, length in enumerate((16, 11, 16, 11)):
        answer(engine, prompt_ids(seed, length), 1)
    assert prompts[-2:] == [(16, 0, 16), (11, 0, 16)]
    inputs = own._captured[16, replay._PROMPT].inputs
    assert not any(inputs[name][0, 11:].any() for name in ("input_ids", "position_ids", "attention_mask"))


@can_pass_over
@pytest.mark.parametrize("wrong", [{"row": 1}, {"columns": range(1, 12)}, {"columns": range(11)[::-1]}], ids=str)
def test_a_prompt_that_is_written_elsewhere_is_not_believed(prompts, monkeypatch, caplog, wrong):
    """Though its own logits are right."""
    engine, own = prompting_engine("llama")
    answer(engine, prompt_ids(1, 12))
    run = Captured.replay

    def elsewhere(captured, forward):
        return run(captured, forward if forward.row is None else replace(forward, **wrong))

    monkeypatch.setattr(Captured, "replay", elsewhere)
    ids = tuple(prompt_ids(0, 11))
    assert answer(engine, list(ids)) == reference("llama", ids)[:4]
    assert prompts and own._is_on and not own._takes_prompts and "prompts are run by" in caplog.text
    assert not any(store.isnan().any() for store in engine._cache._stores())


@can_pass_over
def test_a_prompt_that_cannot_be_recorded_is_run_and_steps_are_replayed(prompts, monkeypatch, caplog):
    engine, own = prompting_engine("llama")
    monkeypatch.setattr(kv_cache, "can_scatter", lambda *_: False)
    for seed in range(3):
        ids = tuple(prompt_ids(seed, 11))
        assert answer(engine, list(ids), 12) == reference("llama", ids)[:12]
    assert own._is_on and own._captured and not own._takes_prompts
    assert not prompts and caplog.text.count("prompts are run by") == 1


@can_pass_over
def test_prompts_for_which_memory_ends_leave_steps_alone(prompts, monkeypatch):
    engine, own = prompting_engine("llama")
    capture = own._backend.capture

    def fail(forward, *given):
        if forward.row is not None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return capture(forward, *given)

    monkeypatch.setattr(own._backend, "capture", fail)
    own._memory_ended[False] = 2  # of steps, some time ago
    for seed in range(4):
        ids = tuple(prompt_ids(seed, 11))
        assert answer(engine, list(ids), 12) == reference("llama", ids)[:12]
    assert own._is_on and own._captured and not own._takes_prompts and not prompts


@can_pass_over
def test_memory_that_ends_before_a_prompt_is_tried_spoils_nothing(prompts, monkeypatch):
    engine, own = prompting_engine("llama")
    answer(engine, prompt_ids(1, 12))
    monkeypatch.setattr(engine._cache, "parts", mock.Mock(side_effect=torch.OutOfMemoryError("planned")))
    monkeypatch.setattr(engine._cache, "keep_prefix", lambda *_: None)
    monkeypatch.setattr(engine._scheduler, "preempt_all", mock.Mock(side_effect=AssertionError))
    ids = tuple(prompt_ids(0, 11))
    assert answer(engine, list(ids)) == reference("llama", ids)[:4]
    assert own._memory_ended[True] == 1 and own._is_on and own._takes_prompts


@can_pass_over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_whose_attention_is_a_kernel(prompts, dtype, monkeypatch):
    """As of real models: each is held against the model's code."""
    made = mock.Mock(side_effect=block_attention.prompt_attention)
    monkeypatch.setattr(block_attention, "prompt_attention", made)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).to(dtype).eval()
    mend(model)
    pack_weights(model)
    engine = Engine(model, make_tokenizer(), EngineConfig(max_batch_size=2, num_speculative_tokens=0))
    own = engine._runner._replays
    answer(engine, prompt_ids(0, 5), 30, min_new_tokens=30)
    own._trials = 1000
    made.reset_mock()
    for seed, length in enumerate((16, 16, 11, 40, 37)):
        answer(engine, prompt_ids(seed, length), 2)
    assert own._takes_prompts and prompts == [(16, 0, 16), (11, 0, 16), (37, 0, 40)]
    assert made.called


@can_pass_over
def test_which_prompts_are_not_replayed(prompts):
    """Long ones, and those of which more or less than the last token's logits are wanted."""
    engine, own = prompting_engine("llama")
    assert not prompts
    for seed in range(3):
        answer(engine, prompt_ids(seed, replay._MOST_TOKENS + 1))
        engine.submit(Request(prompt_ids(seed, 12), {"max_new_tokens": 1}, prompt_logprobs=True))
        while engine.has_work:
            engine.step()
        pair = [engine.submit(Request(prompt_ids(seed + n, 13), {"max_new_tokens": 1})) for n in (10, 20)]
        while engine.has_work:
            engine.step()
        assert all(job.error is None for job in pair)
    assert not prompts and own._is_on


def test_there_are_not_too_many(replays, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    engine, own = replays("llama")
    most = 0
    jobs = [engine.submit(Request(prompt_ids(n, 5), {"max_new_tokens": 6 + 4 * n})) for n in range(4)]
    while engine.has_work:
        engine.step()
        most = max(most, len(own._captured))
    answers = [reference("llama", tuple(prompt_ids(n, 5)))[: 6 + 4 * n] for n in range(4)]
    assert most == 2 and [job.sequences[0].token_ids for job in jobs] == answers


def test_what_the_host_must_know_cannot_be_captured(replays, monkeypatch, caplog):
    """As of mixtures of experts that ask how many tokens each expert gets."""
    engine, own = replays("llama")
    if isinstance(own._backend, cuda_graphs.CudaGraphs) and DEVICE.type == "cpu":
        pytest.skip("no GPU here")
    model = make_model("llama")
    handle = model.model.norm.register_forward_hook(lambda *given: given[-1] * float(given[-1].isnan().sum() == 0))
    try:
        assert serve(engine) == expected("llama")
    finally:
        handle.remove()
    assert not own._is_on and "by the model's code" in caplog.text


def test_replay_is_for_models_that_one_device_holds_and_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(replay, "_is_used", True)
    model = make_model("llama")
    assert replay.can_replay(model) and not replay.can_replay(offloaded_model("llama", (1,)))
    replay.use_replay(False)
    assert not replay.can_replay(model)
