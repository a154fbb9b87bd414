"""Weights that a GPU does not hold reach it unharmed, in memory that is bounded."""

import random
from collections import deque
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader
from torch import nn
from transformers import AutoModelForCausalLM

from handler.engine import Engine, EngineConfig, Request
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import onloading, placement, streaming
from handler.weights.foresight import Foresight
from handler.weights.onloading import OnloadedWeights, Ring
from handler.weights.placement import align_hooks

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Done:
    """Stands for what a stream has done."""


def test_places_of_a_ring_do_not_overlap_before_they_are_released():
    dice = random.Random(0)
    for size in (5_000, 20_000, 100_000):
        ring, held, refused, waited = Ring(size), [], 0, 0
        released, waited_for = {}, set()
        for _ in range(3_000):
            place = ring.take(dice.randrange(1, 8_000))
            if place is None:
                refused += 1
            else:
                assert 0 <= place.start < place.end and place.start % 512 == 0
                assert not any(other.start < place.end and place.start < other.end for other in held)
                overlapped = [p for p in released if p.start < place.end and place.start < p.end]
                waited_for |= set(place.free_after)  # by the one stream that writes
                assert {released.pop(p) for p in overlapped} <= waited_for
                waited += len(overlapped)
                held.append(place)
            while held and (place is None or dice.random() < 0.4):
                place = held.pop(dice.randrange(min(2, len(held))))  # about in order
                released[place] = place.released = Done()
        assert refused and waited > 500


def test_a_ring_has_no_room_for_what_is_larger():
    ring = Ring(4096)
    assert ring.take(4097) is None
    first = ring.take(4096)
    assert first is not None and ring.take(1) is None
    first.released = Done()
    second = ring.take(4096)
    assert second is not None and second.free_after == [first.released]


def test_what_is_foreseen_follows_the_order_of_the_last_time():
    begun, forgotten, room = [], [], 2
    foresight = Foresight(
        lambda name: begun.append(name) or name if room > len(foresight.ahead) else None, forgotten.append
    )
    for name in "abcd":
        assert foresight.take(name) is None
        foresight.go_on()
    assert not begun  # nobody knows yet what comes after d
    assert foresight.take("a") is None
    foresight.go_on()
    assert list(foresight.ahead) == ["b", "c"]
    assert foresight.take("c") == "c" and forgotten == ["b"]
    foresight.go_on()
    assert list(foresight.ahead) == ["d", "a"]  # across the end
    foresight.forget_all()
    assert forgotten == ["b", "d", "a"] and not foresight.ahead


class Streams:
    """Streams of a GPU on which nothing happens until somebody waits, and then in any order that events allow."""

    def __init__(self, dice, patch):
        self.dice, self.current = dice, Stream(self)
        self.all = [self.current]
        patch.setattr(torch.cuda, "Stream", lambda device: self.new())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.on)

    def new(self):
        self.all.append(Stream(self))
        return self.all[-1]

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run_some(self, until=None):
        """Until an event has happened, or for as long as the dice say."""
        while ready := [s for s in self.all if s.todo and s.todo[0][0]()]:
            if until.has_happened if until else self.dice.random() < 0.2:
                return
            self.dice.choice(ready).todo.popleft()[1]()


class Stream:
    def __init__(self, streams):
        self.streams, self.todo = streams, deque()

    def launch(self, work, when=lambda: True):
        self.todo.append((when, work))

    def record_event(self):
        event = Event(self.streams)
        self.launch(event.happen)
        return event

    def wait_event(self, event):
        self.launch(lambda: None, when=lambda: event.has_happened)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Event:
    def __init__(self, streams):
        self.streams, self.has_happened = streams, False

    def happen(self):
        self.has_happened = True

    def synchronize(self):
        self.streams.run_some(self)
        assert self.has_happened


def test_whatever_happens_when_the_right_weights_are_multiplied(monkeypatch):
    """On streams that go on as late, or as early, as their events allow."""
    dice = random.Random(1)
    in_vain = own = 0
    for round in range(60):
        streams = Streams(dice, monkeypatch)

        def launch_copy(target, source, streams=streams):
            streams.current.launch(lambda: target.copy_(source))

        monkeypatch.setattr(onloading, "_launch_copy", launch_copy)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        names = [f"{n}" for n in range(dice.randrange(3, 9))]
        stored = {name: torch.full((dice.randrange(1, 3000),), 1.0 + n) for n, name in enumerate(names)}
        host = {name: tensor for name, tensor in stored.items() if dice.random() < 0.7}
        buffer = torch.empty(3000)  # of what is read from disk: each time the same

        class Source(dict):
            def __getitem__(self, name, stored=stored, host=host, buffer=buffer):
                return host[name] if name in host else buffer[: len(stored[name])].copy_(stored[name])

        weights = OnloadedWeights(Source(), host, "cpu", dice.choice([6_000, 20_000, 60_000]))
        wrong, computed = [], []

        def compute(name, tensor, streams=streams, stored=stored, wrong=wrong, computed=computed):
            def work(tensor=tensor):
                computed.append(name)
                if not torch.equal(tensor, stored[name]):
                    wrong.append(name)

            streams.current.launch(work)

        for _ in range(8):
            weights.begin_pass()
            order = names if dice.random() < 0.8 else dice.sample(names, len(names))
            for at, name in enumerate(order):
                tensor = weights.bring(name)
                inner = order[at - 1] if dice.random() < 0.2 and at else None
                if inner:  # a module within a module
                    compute(inner, weights.bring(inner))
                    weights.let_go(inner)
                compute(name, tensor)
                own += tensor.untyped_storage().data_ptr() != weights._memory.untyped_storage().data_ptr()
                streams.run_some()
                if dice.random() < 0.03:
                    break  # it failed, and nobody lets go
                weights.let_go(name)
            in_vain += len(weights._foresight.ahead)
        while any(stream.todo for stream in streams.all):
            streams.run_some()
        assert len(computed) > 10 and not wrong, (round, wrong)
    assert in_vain > 50 and own > 10


class Parent(nn.Module):
    """Has weights of its own, and a buffer, beside those of the modules in it; one fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 400))
        self.register_buffer("shift", torch.rand(400))
        self.first, self.second = nn.Linear(400, 300), nn.Linear(300, 400)
        self.fails = False

    def forward(self, x):
        inner = self.first(x * self.scale + self.shift)
        if self.fails:
            raise RuntimeError("planned")
        return self.second(inner) * self.scale


@pytest.fixture
def offloaded(monkeypatch):
    """offloaded(model, ...) -> the same through Accelerate's hooks, all of it in the host's memory. "GPU" is this CPU,
    and all happens when it is launched."""
    stream = Stream(SimpleNamespace(run_some=lambda _: None))
    monkeypatch.setattr(Stream, "launch", lambda stream, work, when=lambda: True: work())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    registered = []
    monkeypatch.setattr(onloading, "register", registered.append)

    def offloaded(model, room, **options):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        cpu_offload(model, "cpu", state_dict=state, **options)
        loader = OffloadedWeightsLoader(state_dict=state)
        for hook in (hook for module in model.modules() for hook in align_hooks(module) if hook.offload):
            hook.weights_map.dataset = loader
        weights = onloading.onload_weights(model, room)
        assert len(registered) == 1 and registered[0].nbytes >= sum(t.nbytes for t in loader.state_dict.values())
        return weights

    return offloaded


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("small", [0, 10_000, 10**6])
@pytest.mark.parametrize("room", [0, 500_000, 1_000_000, 2_000_000])
def test_modules_within_modules_and_buffers(offloaded, monkeypatch, buffers, small, room):
    monkeypatch.setattr(onloading, "SMALL_BYTES", small)
    model = nn.Sequential(Parent(), Parent())
    x = torch.rand(2, 400)
    expected = model(x)
    weights = offloaded(model, room, offload_buffers=buffers)
    for round in range(6):
        model[1].fails = round == 3
        if model[1].fails:
            with pytest.raises(RuntimeError, match="planned"):
                model(x)
        else:
            torch.testing.assert_close(model(x), expected)
            assert not weights._in_use
            large = {name for name, p in model.named_parameters() if p.device.type == "meta"}
            assert large == {name for name, p in model.named_parameters() if p.nbytes > small}
    assert (len(weights._foresight.ahead) > 0) == (small < 10**6 and room > 0)


def test_tied_weights_take_memory_once(monkeypatch):
    registered = []
    monkeypatch.setattr(onloading, "register", registered.append)
    weight, other = torch.rand(300, 300), torch.rand(300, 300)
    given = {"embedding": weight, "other": other, "head": weight, "none": torch.empty(0)}
    moved = onloading.pinned(given)
    assert not given and moved["embedding"].data_ptr() == moved["head"].data_ptr() != weight.data_ptr()
    assert torch.equal(moved["head"], weight) and torch.equal(moved["other"], other) and moved["none"].numel() == 0
    assert registered[0].nbytes < 2 * weight.nbytes + 4096


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    refused = SimpleNamespace(cudaHostRegister=lambda *_: 801)

    kernels = []

    def check(error):
        raise RuntimeError(f"CUDA error {error}: operation not supported")

    def launch(*_, device):
        kernels.append(device)
        raise RuntimeError("an error of before")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: refused)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch, "zeros", launch)
    tensors = {"a": torch.rand(5, 7), "b": torch.arange(3)}
    moved = onloading.pinned(dict(tensors))
    assert "cannot be pinned" in caplog.text and kernels == ["cuda"]
    assert all(torch.equal(moved[name], tensors[name]) for name in tensors)


# Bytes in float32, of an embedding of 49 kB and 4 layers of 51. Accelerate leaves room for one more on each device.
LIMITS = {
    "gpu 0, cpu": {0: 170_000, "cpu": 10**6},
    "gpu 0, cpu, disk": {0: 170_000, "cpu": 130_000},
    "gpu 0, disk": {0: 170_000, "cpu": 0},
    "gpu 0": {0: 10**6, "cpu": 0},
}


def logits(model, ids):
    with torch.inference_mode():
        return model(ids.to("cuda")).logits.cpu()


@on_gpu
@pytest.mark.parametrize("small", [0, 1000, 256 << 10])
@pytest.mark.parametrize("tiers", LIMITS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_logits_are_those_of_a_model_that_fits(bloom, tmp_path, monkeypatch, tiers, small, dtype):
    for module in (onloading, placement, streaming):
        monkeypatch.setattr(module, "SMALL_BYTES", small)
    ids = torch.arange(5, 13)[None]
    expected = logits(load_model(bloom, Settings(dtype=dtype), tmp_path).model, ids)
    limits = {device: limit * getattr(torch, dtype).itemsize // 4 for device, limit in LIMITS[tiers].items()}
    loaded = load_model(bloom, Settings(max_memory=limits, dtype=dtype), tmp_path)
    assert ", ".join(loaded.placement.tiers) == tiers and loaded.placement.main_device == "gpu 0"
    for _ in range(4):
        torch.testing.assert_close(logits(loaded.model, ids), expected)


@on_gpu
@pytest.mark.parametrize("room", [0, 3000, 8192, 20_000])
def test_a_ring_of_any_size_gives_the_same(bloom, tmp_path, monkeypatch, room):
    for module in (onloading, placement, streaming):
        monkeypatch.setattr(module, "SMALL_BYTES", 0)
    ids = torch.arange(5, 13)[None]
    expected = logits(AutoModelForCausalLM.from_pretrained(bloom).cuda(), ids)
    made = []
    monkeypatch.setattr(
        "handler.loading.onload_weights", lambda model, _: made.append(onloading.onload_weights(model, room))
    )
    loaded = load_model(bloom, Settings(max_memory=LIMITS["gpu 0, cpu, disk"]), tmp_path)
    for _ in range(5):
        torch.testing.assert_close(logits(loaded.model, ids), expected)
    assert made[0] is not None and not made[0]._in_use


@on_gpu
def test_a_forward_that_fails_leaves_nothing_in_use(bloom, tmp_path, monkeypatch):
    monkeypatch.setattr(onloading, "SMALL_BYTES", 0)
    loaded = load_model(bloom, Settings(max_memory=LIMITS["gpu 0, cpu"]), tmp_path)
    ids = torch.arange(5, 13)[None]
    expected = logits(loaded.model, ids)
    last = loaded.model.transformer.h[-1].mlp.dense_4h_to_h

    def fail(*_):
        raise RuntimeError("planned")

    handle = last.register_forward_pre_hook(fail)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="planned"):
            logits(loaded.model, ids)
    handle.remove()
    for _ in range(3):
        torch.testing.assert_close(logits(loaded.model, ids), expected)


@on_gpu
@pytest.mark.parametrize("tiers", LIMITS)
def test_many_at_once_on_a_model_that_does_not_fit(bloom, tmp_path, monkeypatch, tiers):
    for module in (onloading, placement, streaming):
        monkeypatch.setattr(module, "SMALL_BYTES", 500)

    def answers(max_memory):
        loaded = load_model(bloom, Settings(max_memory=max_memory), tmp_path)
        engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_batch_size=8))
        jobs = [engine.submit(Request(list(range(5, 6 + n)), {"max_new_tokens": 30 + n})) for n in range(12)]
        while engine.has_work:
            engine.step()
        return [job.sequences[0].token_ids for job in jobs]

    assert answers(LIMITS[tiers]) == answers(None)
