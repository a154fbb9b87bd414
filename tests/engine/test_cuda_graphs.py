"""A replayed forward gives what an ordinary one gives, or is not believed.

What a graph captures runs anew at each replay where there is no GPU: all but the capture is tested so.
"""

from types import SimpleNamespace

import pytest
import torch

from handler.engine import Engine, EngineConfig, Request, cuda_graphs, model_runner
from tests.models import DEVICE

from .conftest import KINDS, make_model, make_tokenizer, prompt_ids, reference

LENGTHS = (3, 9, 1, 20, 14, 5)


class Rerun(cuda_graphs._Graph):
    """Stands for a graph: the same forward, on the tensors and by the numbers that were there when it was made."""

    def __init__(self, model, cache, inputs, lengths, logits, stream, pool):
        self._inputs, self._columns = cuda_graphs._copied(inputs), torch.tensor(lengths)
        self._model, self._cache, self._logits = model, cache, logits
        self._graph = SimpleNamespace(replay=self._run)
        cache.direct_to(self._columns)
        self._known = dict(vars(cache.context))

    def _run(self):
        context = self._cache.context
        prepared = dict(vars(context))
        vars(context).update(self._known, slots={})
        self._logits.copy_(self._model(**self._inputs).logits.flatten(0, -2))
        vars(context).update(prepared)


@pytest.fixture
def graphs(monkeypatch):
    """graphs(kind) -> an engine, and its graphs."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "_Graph", Rerun)
        monkeypatch.setattr(model_runner, "can_replay", lambda model: True)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")

    def make(kind):
        settings = EngineConfig(max_batch_size=4, num_speculative_tokens=0, prefill_chunk=7)
        engine = Engine(make_model(kind), make_tokenizer(), settings)
        return engine, engine._runner._graphs

    return make


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
def test_answers_are_those_of_generate(kind, graphs, monkeypatch):
    engine, own = graphs(kind)
    replays, replay = [], cuda_graphs._Graph.replay
    monkeypatch.setattr(cuda_graphs._Graph, "replay", lambda *given: replays.append(1) or replay(*given))
    assert serve(engine) == expected(kind)
    assert own._is_on and own._trials == 0 and len(replays) > 20 and own._graphs


def test_a_graph_that_gives_other_logits_is_not_believed(graphs, monkeypatch, caplog):
    engine, own = graphs("llama")
    replay = cuda_graphs._Graph.replay

    def wrong(*given):
        return replay(*given).roll(1, dims=-1)

    monkeypatch.setattr(cuda_graphs._Graph, "replay", wrong)
    assert serve(engine) == expected("llama")
    assert not own._is_on and "other logits" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_replay", [0, 2])
def test_a_graph_that_writes_keys_elsewhere_is_not_believed(kind, graphs, monkeypatch, caplog, from_replay):
    """What it has written over is computed anew, for everyone."""
    engine, own = graphs(kind)
    own._trials, replays, replay = 3, [], cuda_graphs._Graph.replay

    def elsewhere(graph, inputs, lengths):
        replays.append(lengths)
        return replay(graph, inputs, [0] * len(lengths) if len(replays) > from_replay else lengths)

    monkeypatch.setattr(cuda_graphs._Graph, "replay", elsewhere)
    assert serve(engine) == expected(kind)
    assert not own._is_on and len(replays) == from_replay + 1 and "other logits" in caplog.text
    assert not any(store.isnan().any() for store in engine._cache._stores())


def test_each_graph_is_tried_once(graphs, monkeypatch):
    engine, own = graphs("llama")
    own._trials, tried, replayed = 0, [], []
    for name, calls in (("replay", replayed), ("__init__", tried)):
        method = getattr(cuda_graphs._Graph, name)
        monkeypatch.setattr(
            cuda_graphs._Graph, name, lambda *given, method=method, calls=calls: calls.append(1) or method(*given)
        )
    spoil = engine._cache.spoil_new_tokens
    trials = []
    monkeypatch.setattr(engine._cache, "spoil_new_tokens", lambda: trials.append(1) or spoil())
    assert serve(engine) == expected("llama")
    assert 3 < len(tried) == len(trials) < len(replayed)


@pytest.mark.parametrize("trials", [0, 3])
@pytest.mark.parametrize("at", [0, 2])
def test_a_forward_that_cannot_be_captured_is_launched(graphs, monkeypatch, caplog, at, trials):
    engine, own = graphs("llama")
    own._trials, made, init = trials, [], cuda_graphs._Graph.__init__

    def fail(graph, model, cache, inputs, *given):
        made.append(graph)
        if len(made) <= at:
            return init(graph, model, cache, inputs, *given)
        cache.direct_to(torch.zeros(len(inputs["input_ids"]), dtype=torch.long, device=DEVICE))
        cache.context.rows.zero_()  # what is captured has not run
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs._Graph, "__init__", fail)
    assert serve(engine) == expected("llama")
    assert len(made) == at + 1 and not own._is_on and "not permitted" in caplog.text


def test_graphs_make_way_when_memory_ends(graphs, monkeypatch):
    engine, own = graphs("llama")
    job = engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 20}))
    other = engine.submit(Request(prompt_ids(1, 5), {"max_new_tokens": 20}))
    while not own._graphs:
        engine.step()
    forward = own.forward

    def fail(*_):
        monkeypatch.setattr(own, "forward", forward)
        raise torch.OutOfMemoryError("planned")

    monkeypatch.setattr(own, "forward", fail)
    engine.step()
    assert other.error is not None and not own._graphs
    while engine.has_work:
        engine.step()
    assert job.sequences[0].token_ids == reference("llama", tuple(prompt_ids(0, 5)))[:20]


def test_no_graph_outlives_the_memory_that_it_reads(graphs, monkeypatch):
    engine, _ = graphs("llama")
    stores, replay = [], cuda_graphs._Graph.replay

    def record(graph, *given):
        stores.append({store.data_ptr() for store in engine._cache._stores()})
        graph.stores = getattr(graph, "stores", stores[-1])
        assert graph.stores == stores[-1]
        return replay(graph, *given)

    monkeypatch.setattr(cuda_graphs._Graph, "replay", record)
    job = engine.submit(Request(prompt_ids(0, 5), {"max_new_tokens": 90, "min_new_tokens": 90}))
    while engine.has_work:
        engine.step()
        if job.sequences[0].length in (20, 40):  # rows come, and the store moves, and go
            for seed in (1, 2, 3):
                engine.submit(Request(prompt_ids(seed, 5), {"max_new_tokens": 3}))
    assert job.error is None and len(set(map(frozenset, stores))) > 2 and len(stores) > 60


def test_more_rows_than_at_first(graphs):
    engine, own = graphs("llama")
    long = [Request(prompt_ids(seed, 5), {"max_new_tokens": 20}) for seed in range(3)]
    jobs = [engine.submit(long[0])]
    for seed in (3, 4):  # memory for three rows, and for not so many that it goes back
        engine.submit(Request(prompt_ids(seed, 5), {"max_new_tokens": 1}))
    while not own._graphs:
        engine.step()
    version, rows = engine._cache.version, len(own._logits)
    jobs += [engine.submit(request) for request in long[1:]]
    while engine.has_work:
        engine.step()
    assert rows < 3 <= len(own._logits) and engine._cache.version == version
    answers = [reference("llama", tuple(prompt_ids(seed, 5)))[:20] for seed in range(3)]
    assert [job.sequences[0].token_ids for job in jobs] == answers


def test_there_are_not_too_many(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MOST", 2)
    engine, own = graphs("llama")
    most = 0
    jobs = [engine.submit(Request(prompt_ids(n, 5), {"max_new_tokens": 6 + 4 * n})) for n in range(4)]
    while engine.has_work:
        engine.step()
        most = max(most, len(own._graphs))
    answers = [reference("llama", tuple(prompt_ids(n, 5)))[: 6 + 4 * n] for n in range(4)]
    assert most == 2 and [job.sequences[0].token_ids for job in jobs] == answers


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU here")
def test_what_the_host_must_know_cannot_be_captured(graphs, caplog):
    """As of mixtures of experts that ask how many tokens each expert gets."""
    engine, own = graphs("llama")
    model = make_model("llama")
    handle = model.model.norm.register_forward_hook(lambda *given: given[-1] * float(given[-1].isnan().sum() == 0))
    try:
        assert serve(engine) == expected("llama")
    finally:
        handle.remove()
    assert not own._is_on and "kernel by kernel" in caplog.text


def test_graphs_are_for_one_gpu_that_holds_all_and_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_is_used", True)
    model = make_model("llama")
    assert cuda_graphs.can_replay(model) == (DEVICE.type == "cuda")
    cuda_graphs.use_cuda_graphs(False)
    assert not cuda_graphs.can_replay(model)
