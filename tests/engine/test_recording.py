"""What is recorded does to other numbers what the forward would do, or is refused."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, masking_utils

from handler.engine import Engine, EngineConfig, Request, recording
from handler.engine.recording import CannotRecord
from handler.engine.rooms import Rooms
from handler.kernels.cpu import has_code_for
from handler.kernels.function import in_turn
from handler.kernels.layer_norm import layer_norm
from handler.kernels.rms_norm import rms_norm
from handler.loading import mend
from handler.weights.packed import pack_weights
from tests.models import DEVICE

from .conftest import make_model, make_tokenizer, prompt_ids

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="of a CPU")

ROWS, SIZE = 3, 32
HAS_CODE = pytest.mark.skipif(not has_code_for(torch.float32), reason="no code for this CPU")


def recorded(forward, rooms=None):
    return recording.recorded(forward, rooms or Rooms())


WEIGHT = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
STORE = torch.zeros(ROWS, SIZE)


@torch.jit.script
def scripted(x):
    return x * 2 - 1  # Python does not see these calls, but the dispatcher does


def in_place(x):
    y = x.clone()
    y += 1
    y[:, 0] = 0
    y[:, 1].mul_(3)
    torch.add(y, y, out=y)
    return y


def views_of_what_stays(x):
    STORE[1:].copy_(x[1:])
    STORE.view(-1)[:2] = x[0, :2]
    return STORE.mT.contiguous() + STORE.sum()


def of_several(x):
    a, b = x.split(SIZE // 2, dim=-1)
    values, indices = torch.max(torch.cat([b, a], dim=1), dim=1)
    _, (c, d) = None, x.chunk(2, dim=-1)
    return values + indices + torch.stack((c, d)).sum((0, 2))


def by_index(x):
    rows = torch.arange(ROWS).flip(0)
    return x[rows, torch.tensor([2, 0, 1])] + x.index_select(0, rows)[:, 3] + x[None, ..., 1:3].sum()


def by_properties(x):
    return x.data.T.mT.unsqueeze(0).real.detach()[0] * x.shape[0] + x.new_zeros(x.size())


def by_functions(x):
    y = torch.nn.functional.layer_norm(x, (SIZE,), WEIGHT, eps=1e-3)
    y = torch.nn.functional.gelu(y, approximate="tanh") + torch.full_like(x, 0.5)
    return torch.where(y > 0, y, -y).softmax(-1).to(torch.float64)


def what_is_given(x):
    return x.contiguous().to(x.dtype).view_as(x) + 0


def by_a_list_that_grows(x):
    columns = [0, 1]
    y = x[:, columns].sum(1)
    columns.append(2)
    return y + x[:, columns].sum(1)


def other_data(x):
    y = x + 1
    y.data = x * 2
    return y


def unseen(x):
    y = x * 2
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        z = y.view(-1)
    return z + 1


FORWARDS = [
    by_a_list_that_grows,
    lambda x: scripted(x) + scripted(-x * 3),
    in_place,
    views_of_what_stays,
    of_several,
    by_index,
    by_properties,
    by_functions,
    what_is_given,
    lambda x: torch.ops.aten.mul.Tensor(x, 3),
]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("inference", [True, False])
def test_other_numbers(forward, inference):
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.randn(ROWS, SIZE)
        again = recorded(lambda: forward(x))
        for seed in range(3):
            x.copy_(torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed)))
            result = again().clone()
            assert torch.equal(result, forward(x))


@HAS_CODE
def test_kernels():
    model = copy.deepcopy(make_model("llama"))
    assert pack_weights(model)
    mlp = model.model.layers[0].mlp
    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        again = recorded(lambda: rms_norm(mlp(x), WEIGHT, 1e-5, "whole"))
        x.copy_(torch.randn(ROWS, SIZE))
        assert torch.equal(again(), rms_norm(mlp(x), WEIGHT, 1e-5, "whole"))


def norm(x):
    return rms_norm(x, WEIGHT, 1e-5, "whole")


def layers(x):
    for _ in range(20):
        x = x + norm(x) * torch.nn.functional.silu(x)
    return x


def of_what_is_written_to(x):
    y = x - 1
    one = norm(y)
    y.mul_(3)
    return one + norm(y)


def of_what_is_expanded(x):
    return norm((x - 1)[:1].expand(ROWS, SIZE)) + norm((x - 2)[1:2])


def of_what_others_read(x):
    y = norm(x)
    y += 1
    return y.sum(1) + norm(y).softmax(-1)[:, 0]


def of_16_bits(x):
    y = x.bfloat16()
    y = torch.nn.functional.dropout(y.float() + x, 0.5, training=False)
    return layer_norm(y, WEIGHT, WEIGHT, 1e-3) + norm(y)


def of_views_like_others(x):
    y = norm(x)
    return y.view_as(x - 1) * 2 + y.expand_as(x - 1) + y


def of_what_grows(x):
    y = torch.empty(0)
    return torch.mm(norm(x), x.T, out=y) @ norm(x)


def of_copies_side_by_side(x):
    return x[:, None].expand(ROWS, 2, SIZE) + torch.ones(ROWS, 2, SIZE)


def of_strides(x):
    y = x.new_empty_strided((ROWS, SIZE), (1, ROWS))
    return norm(y.copy_(x)) + norm(torch.add(x, x, alpha=2))


@HAS_CODE
@pytest.mark.parametrize(
    "forward",
    [
        of_views_like_others,
        of_what_grows,
        of_copies_side_by_side,
        of_strides,
        layers,
        of_what_is_written_to,
        of_what_is_expanded,
        of_what_others_read,
        of_16_bits,
    ],
)
def test_kernels_between_operators(forward):
    rooms = Rooms()
    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        again = recorded(lambda: forward(x), rooms)
        for seed in range(3):
            x.copy_(torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed)))
            rooms.spoil()
            assert torch.equal(again(), forward(x))


@HAS_CODE
def test_rooms_stay_with_who_writes_to_them():
    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        rooms = Rooms()
        gone = weakref.ref(rooms)
        again = recorded(lambda: layers(x), rooms)
        del rooms
        gc.collect()
        assert gone() is not None and torch.equal(again(), layers(x))


@HAS_CODE
def test_what_another_forward_has_left_is_refused():
    rooms, left = Rooms(), []
    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        recorded(lambda: left.append(norm(x)) or left[0] + 1, rooms)
        with pytest.raises(CannotRecord, match="another forward"):
            recorded(lambda: norm(x) + left[0], rooms)


@pytest.fixture
def joined(monkeypatch):
    """How many kernels are in each call that is made of some."""
    counts = []
    monkeypatch.setattr(recording, "in_turn", lambda calls: counts.append(len(calls)) or in_turn(calls))
    return counts


@HAS_CODE
def test_other_threads_have_no_part_in_it(joined):
    def forward():
        with ThreadPoolExecutor(1) as thread:
            thread.submit(norm, x).result()
        return norm(x)

    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        assert torch.equal(recorded(forward)(), norm(x)) and joined == [1]


@HAS_CODE
@pytest.mark.parametrize("config", [BloomConfig, LlamaConfig])
def test_all_layers_are_one_call(config, joined):
    """Before it, and in the first layer, operators make what all layers read."""
    sizes = {"vocab_size": 384, "hidden_size": 128, "num_attention_heads": 2, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(config(num_hidden_layers=7, initializer_range=0.5, **sizes)).eval()
    ids = torch.tensor([prompt_ids(0, 5)])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0].tolist()
    mend(model)
    assert pack_weights(model)
    engine = Engine(model, make_tokenizer(), EngineConfig(num_speculative_tokens=0))
    job = engine.submit(Request(ids[0].tolist(), {"max_new_tokens": 24}))
    while engine.has_work:
        engine.step()
    assert job.sequences[0].token_ids == expected[5:]
    assert len(joined) <= 5 and joined[-1] > 60


@HAS_CODE
def test_what_is_gone_leaves_its_room_to_others():
    rooms = Rooms()
    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        again = recorded(lambda: layers(x), rooms)
        assert 1 < len(rooms._blocks) < 6
        blocks = set(rooms._blocks)
        other = recorded(lambda: layers(x * 2), rooms)
        assert set(rooms._blocks) == blocks
        assert torch.equal(again(), layers(x))
        assert torch.equal(other(), layers(x * 2))


READERS = [
    lambda x: x if x.sum() > 0 else -x,
    lambda x: x * x.sum().item(),
    lambda x: x * float(x[0, 0]),
    lambda x: x[: int(x[0, 0])],
    lambda x: x[: x[0, 0].long()],
    lambda x: x.new_empty((x[0, 0].long() + 1, 2)).fill_(1),
    lambda x: torch.empty((x[0, 0].long() + 1, 2)).fill_(1),
    lambda x: x + torch.tensor(x.tolist()),
    lambda x: x + torch.from_numpy(x.numpy()),
    lambda x: x + torch.from_numpy(np.asarray(x)),
    lambda x: x[x > 0],
    lambda x: x[x.sum(1) > 0],
    lambda x: x.nonzero(),
    lambda x: torch.where(x > 0)[0],
    lambda x: x.masked_select(x > 0),
    lambda x: x if torch.equal(x, x) else -x,
    lambda x: x if 0.5 in x else -x,
    lambda x: torch.from_dlpack(x.clone()) + 1,
    lambda x: torch.from_dlpack(x.clone().__dlpack__()) + 1,
    lambda x: copy.deepcopy(x * 2) + 1,
    other_data,
    unseen,
    lambda x: (x * 2).unsqueeze_(0),
    lambda x: torch.ones(3) * list(x.sum(1)).index(x.sum(1).max()),
    lambda x: x.repeat_interleave(x[:, 0].long().abs(), 0),
]


@pytest.mark.parametrize("forward", READERS)
@pytest.mark.parametrize("inference", [True, False])
def test_what_depends_on_numbers_is_refused(forward, inference):
    before = masking_utils.is_tracing
    with torch.inference_mode(inference), torch.no_grad(), pytest.raises(CannotRecord):
        x = torch.rand(ROWS, SIZE)
        recorded(lambda: forward(x))
    assert masking_utils.is_tracing is before
    assert torch.ones(2).tolist() == [1, 1]  # no mode is left on


class Alive(TorchDispatchMode):
    """The most tensors that operators have made and that are there at the same time."""

    def __init__(self):
        super().__init__()
        self.now, self.most = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.now.add(result)
        self.most = max(self.most, len(self.now))
        return result


def test_tensors_go_after_their_last_use():
    def forward():
        y = x
        for _ in range(20):
            y = (y + 1) * 2
        return y

    with torch.inference_mode():
        x = torch.randn(ROWS, SIZE)
        again = recorded(forward)
        gc.collect()
        with Alive() as alive:
            result = again()
        assert torch.equal(result, forward()) and 1 < alive.most <= 3


def test_a_recording_of_another_size_is_compiled_once():
    def forward(x):
        return (x.view(-1, 2) @ torch.ones(2, 2)).sum(0)

    with torch.inference_mode():
        recording._compiled.cache_clear()
        for size in (2, 4, 6):
            x = torch.randn(size, 2)
            assert torch.equal(recorded(lambda x=x: forward(x))(), forward(x))
    assert recording._compiled.cache_info().misses == 1
