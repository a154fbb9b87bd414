"""Only what must fail fails, and the engine goes on."""

import copy

import pytest
import torch

from handler.engine import Engine, EngineConfig, ModelError, OutOfMemory, Request
from handler.engine.kv_cache import KVCache
from handler.engine.model_runner import ModelRunner

from .conftest import make_model, prompt_ids, reference

MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


def raise_in_layer(monkeypatch, errors, when=lambda batch: True):
    """Let the next forwards for which `when(batch)` holds fail after the first layer wrote its keys."""
    layer = make_model("llama").model.layers[1]
    current = {}
    forward, run = layer.forward, ModelRunner.forward

    def failing(*args, **kwargs):
        if errors and when(current["batch"]):
            raise errors.pop(0)
        return forward(*args, **kwargs)

    def remember(runner, batch):
        current["batch"] = batch
        return run(runner, batch)

    monkeypatch.setattr(layer, "forward", failing)
    monkeypatch.setattr(ModelRunner, "forward", remember)


@pytest.fixture
def engine(tokenizer):
    return Engine(make_model("llama"), tokenizer, EngineConfig(max_batch_size=3, prefill_chunk=6))


def submit(engine, seed, length=4, new=10):
    return engine.submit(Request(prompt_ids(seed, length), {"max_new_tokens": new}))


def finish(engine, *jobs):
    while engine.has_work:
        engine.step()
    for job in jobs:
        assert job.error is None
        new = job.request.parameters["max_new_tokens"]
        assert job.sequences[0].token_ids == reference("llama", tuple(job.prompt_ids))[:new]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda e: str(e)[-30:] or type(e).__name__)
def test_out_of_memory_fails_the_youngest_only(tokenizer, monkeypatch, error):
    engine = Engine(make_model("llama"), tokenizer, EngineConfig(max_batch_size=2))
    old, young = submit(engine, 0), submit(engine, 1)
    for _ in range(4):
        engine.step()
    raise_in_layer(monkeypatch, [error])
    waiting = submit(engine, 2)
    changed = engine.step()
    assert changed == [young]
    assert isinstance(young.error, OutOfMemory)
    assert young.sequences[0].finish_reason == "error"
    finish(engine, old, waiting)


def test_out_of_memory_takes_who_is_prefilled_before_who_decodes(engine, monkeypatch):
    decoding = submit(engine, 0)
    engine.step()
    oldest, youngest = submit(engine, 1, length=20), submit(engine, 2, length=20)
    raise_in_layer(monkeypatch, [MemoryError()], when=lambda batch: batch.sequences[0].job is decoding)
    engine.step()
    assert isinstance(youngest.error, OutOfMemory)
    finish(engine, decoding, oldest)


def test_out_of_memory_alone_leaves_an_engine_that_serves(engine, monkeypatch):
    job = submit(engine, 0)
    raise_in_layer(monkeypatch, [MemoryError()])
    engine.step()
    assert isinstance(job.error, OutOfMemory)
    finish(engine, submit(engine, 1))


def test_another_error_fails_the_jobs_of_that_forward(engine, monkeypatch, caplog):
    decoding = submit(engine, 0)
    engine.step()
    prefilled = [submit(engine, 1, length=3), submit(engine, 2, length=3)]
    raise_in_layer(monkeypatch, [ValueError("boom in /mnt/models")], when=lambda b: b.sequences[0].is_prefilling)
    changed = engine.step()
    assert "boom in /mnt/models" in caplog.text
    for job in prefilled:
        # The message goes to clients, who are not to know our files.
        assert type(job.error) is ModelError and "ValueError" in str(job.error) and "/mnt" not in str(job.error)
        assert job in changed
    finish(engine, decoding, submit(engine, 3))


@pytest.fixture
def half_copied(monkeypatch):
    """The next copy of rows fails when the keys of the first layer are copied. The list then holds the error."""
    copy, errors = KVCache.copy_rows, []

    def failing(cache, sources, destinations, length):
        if errors:
            return copy(cache, sources, destinations, length)
        keys = cache.layers[0].keys
        keys[destinations, :, :length] = keys[sources, :, :length]
        errors.append(torch.OutOfMemoryError("CUDA out of memory."))
        raise errors[0]

    monkeypatch.setattr(KVCache, "copy_rows", failing)
    return errors


def test_rows_that_are_half_moved_are_computed_again(engine, half_copied):
    first, second, third = (submit(engine, seed, new=20) for seed in range(3))
    for _ in range(3):
        engine.step()
    engine.cancel(first.id)  # somebody moves to its row
    changed = engine.step()
    assert half_copied and changed == [third] and isinstance(third.error, OutOfMemory)
    finish(engine, second, submit(engine, 3))


def test_who_gets_no_copy_of_a_prompt_computes_it(engine, half_copied):
    job = engine.submit(Request(prompt_ids(0, 12), {"max_new_tokens": 10}, n=3))
    finish(engine, job)
    assert half_copied
    assert all(sequence.token_ids == job.sequences[0].token_ids for sequence in job.sequences)


def test_a_failed_choice_ends_the_whole_job(engine, monkeypatch):
    job = engine.submit(Request(prompt_ids(0, 4), {"max_new_tokens": 5}, n=2))
    raise_in_layer(monkeypatch, [MemoryError()])
    engine.step()
    assert job.finished and [c.finish_reason for c in job.sequences] == ["error", "error"]
    assert not engine.has_work and engine.num_running == 0


def test_a_row_that_is_not_a_number_leaves_nothing_behind(engine, monkeypatch):
    """The next sequence in its row meets masked columns only, and 0 x NaN would be NaN."""
    model = make_model("llama")
    embed = model.model.embed_tokens.forward

    def poisoned(ids):
        hidden = embed(ids)
        return torch.where((ids == 300)[..., None], float("nan"), hidden)

    monkeypatch.setattr(model.model.embed_tokens, "forward", poisoned)
    neighbour = submit(engine, 0)
    broken = engine.submit(Request([5, 300, 6, 300, 7], {"max_new_tokens": 5}))
    engine.step()
    engine.step()
    assert isinstance(broken.error, ModelError)
    finish(engine, neighbour, submit(engine, 1, length=2, new=20))


@pytest.mark.parametrize("how", ["cancelled", "preempted", "moved"])
def test_a_prompt_that_gives_no_numbers_harms_nobody_in_its_row(tokenizer, how):
    """Before anything is sampled from it nobody has noticed."""
    model = copy.deepcopy(make_model("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    engine = Engine(model, tokenizer, EngineConfig(max_batch_size=3, prefill_chunk=4, prefix_cache="off"))
    first = engine.submit(Request([30, 31], {"max_new_tokens": 2 if how == "moved" else 30, "eos_token_id": []}))
    engine.step()
    broken = engine.submit(Request([5, 7] * 20, {"max_new_tokens": 4}))
    engine.step()
    if how == "moved":
        assert first.finished
        engine.step()
    elif how == "cancelled":
        engine.cancel(broken.id)
    else:
        with torch.inference_mode():
            engine._scheduler._preempt(broken.sequences[0])
        engine._end(broken, "cancel")
    jobs = [engine.submit(Request([30 + seed, 31], {"max_new_tokens": 4})) for seed in range(2)]
    while engine.has_work:
        engine.step()
    assert not any(job.error for job in [first, *jobs])


def test_an_error_keeps_no_tensors_alive(engine, monkeypatch):
    job = submit(engine, 0)
    raise_in_layer(monkeypatch, [ValueError("boom")])
    engine.step()
    assert job.error.__traceback__ is None and job.error.__cause__ is None
