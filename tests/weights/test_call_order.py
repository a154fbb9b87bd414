"""Products that share an input are made as one: which are found, and that the parts are right whoever asks."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import embedding
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from handler.loading import load_model
from handler.settings import Settings
from handler.weights import packed
from handler.weights.call_order import Call, _numbers, activations, shared_inputs, watch
from tests.engine.architectures import RUNS
from tests.engine.conftest import make_model
from tests.models import train_tokenizer


def found(model_type: str) -> list[list[str]]:
    model = next(case for case in RUNS if case.model_type == model_type).make_model()
    return [[name.rpartition(".")[2] for name in group] for group in shared_inputs(watch(model))]


def test_they_are_found_by_what_runs_and_not_by_names():
    assert found("llama") == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 4
    assert found("ctrl") == [["Wq", "Wk", "Wv"]] * 4
    assert found("qwen3_moe") == [["q_proj", "k_proj", "v_proj"]] * 4  # beside experts
    assert found("gpt_oss") == [["q_proj", "k_proj", "v_proj"]] * 4  # whose biases are added in place
    assert found("opt") == [["q_proj", "k_proj", "v_proj"]] * 4
    assert found("gpt2") == found("bloom") == []


class Times(nn.Module):
    def forward(self, one, other):
        return one * other


def with_mlps(make: Callable[[], nn.Module]) -> LlamaForCausalLM:
    class Model(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = make()

    config = make_model("llama").config
    with torch.device("meta"):
        return Model(config)


class Gated(nn.Module):
    """An MLP that does something to its input, which layers share if that changes nothing."""

    def __init__(self, between):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
        self.table = nn.Parameter(torch.empty(1 << 10, 1 << 14))
        self.between = between

    def forward(self, x):
        gate = self.gate(x)
        self.between(self, x)
        return self.down(gate * self.up(x))


def is_shared(between: Callable[[Gated, torch.Tensor], object]) -> bool:
    return any(group[0].endswith("gate") for group in shared_inputs(watch(with_mlps(partial(Gated, between)))))


HARMLESS = {
    "a sum": lambda self, x: x.sum(),
    "a choice": lambda self, x: x.topk(2).indices,
    "a part of a matrix": lambda self, x: self.table[torch.zeros(1 << 10, dtype=torch.long)][0] + x.sum(),
    "a product": lambda self, x: x @ self.table[:32],
    "a change of another": lambda self, x: x.clone().add_(self.table[0, :32]),
    "what only the meta device can make": lambda self, x: torch.zeros(1 << 40, device=x.device) + 1,
    "what is repeated": lambda self, x: x[..., None].repeat(1, 1, 1, 1 << 34),
    "what is broadcast": lambda self, x: x.view(-1, 1) * x.new_empty(1 << 38),
    "numbers of its own": lambda self, x: (torch.ones(2) + 1).tolist(),
    "rows of its own": lambda self, x: 1 // (embedding(torch.tensor([1]), torch.ones(2, 1)) == 1).int().item(),
    "a product of much": lambda self, x: x.new_empty(1, 1 << 19, 1).bmm(x.new_empty(1, 1, 1 << 19)),
    "a range": lambda self, x: torch.arange(0, 1 << 38, device=x.device),
    "what a CPU cannot make": lambda self, x: x.to(torch.float8_e4m3fn).sqrt(),
}
LOOKS = {
    "at one": lambda self, x: x.abs().max() > 1 and x.clamp_(-1, 1),
    "whether they are the same": lambda self, x: torch.equal(x, x + 1),
    "where they are": lambda self, x: (x > 0).nonzero(),
    "at those that a mask has": lambda self, x: x[x > 0],
    "as a list": lambda self, x: x.tolist(),
    "with NumPy": lambda self, x: x.float().numpy(),
    "with NumPy's own": lambda self, x: numpy.asarray(x.float()),
    "with whoever": lambda self, x: torch.from_dlpack(x),
}


@pytest.mark.parametrize("between", HARMLESS.values(), ids=HARMLESS.keys())
def test_code_between_products_may_do_what_it_likes(between):
    assert is_shared(between)


@pytest.mark.parametrize("between", LOOKS.values(), ids=LOOKS.keys())
def test_code_that_looks_at_numbers_shares_nothing(between):
    """With others it may do something else."""
    assert not is_shared(between)


CHANGES = {
    "by a number": lambda self, x: x.add_(1),
    "by a matrix": lambda self, x: x.add_(self.table[torch.zeros(1, dtype=torch.long)][:, :32]),
    "through a view": lambda self, x: x.view(-1)[3:].add_(1),
    "through what is no copy": lambda self, x: x.to(self.table.device).mul_(2),
    "as what is written to": lambda self, x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("between", CHANGES.values(), ids=CHANGES.keys())
def test_an_input_that_is_changed_is_not_shared(between):
    assert not is_shared(between)


ATEN = torch.ops.aten
ones = torch.ones
MADE = [
    (ATEN.add.Tensor, ones(4, 1, 3), ones(5, 1)),
    (ATEN.mul.Tensor, ones(2, 3), torch.tensor(2.0)),
    (ATEN.where.self, ones(7, 1) > 0, ones(1, 6), ones(2, 1, 1)),
    (ATEN.mm.default, ones(9, 1), ones(1, 9)),
    (ATEN.bmm.default, ones(2, 9, 1), ones(2, 1, 9)),
    (ATEN.addmm.default, ones(9), ones(9, 1), ones(1, 9)),
    (ATEN.baddbmm.default, ones(2, 1, 1), ones(2, 9, 1), ones(2, 1, 9)),
    (ATEN.arange.default, 8),
    (ATEN.arange.start, -4, 9),
    (ATEN.repeat.default, ones(3, 2), [4, 1, 5]),
    (ATEN.cat.default, [ones(3, 2), ones(4, 2)]),
    (ATEN.cumsum.default, ones(3, 2), 1),
    (ATEN.mean.dim, ones(3, 2), [1]),
    (ATEN.native_layer_norm.default, ones(6, 1), [1], ones(1), ones(1), 1e-5),
    (ATEN._softmax.default, ones(3, 2), 1, False),
    (ATEN._safe_softmax.default, ones(3, 2), 1),
    (ATEN._to_copy.default, ones(3, 2)),
    (ATEN._unsafe_view.default, ones(3, 2), [6]),
]


@pytest.mark.parametrize("function, args", [(made[0], made[1:]) for made in MADE], ids=lambda one: str(one)[:30])
def test_how_many_numbers_are_made_is_known_before(function, args):
    given = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
    numbers = sum(one.numel() for one in [*given, *tree_leaves(function(*args))])
    assert numbers <= _numbers(function, args, given) < 10 * numbers


def test_of_what_looks_at_numbers_or_is_not_known_nothing_is_made():
    for function, *args in ((ATEN.equal.default, ones(2), ones(2)), (ATEN.constant_pad_nd.default, ones(2), [9, 9])):
        assert _numbers(function, args, args[:1]) == math.inf


def test_code_that_cannot_run_with_gaps_shares_nothing():
    class Flat(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            mlp, input = self.model.layers[0].mlp, torch.ones(2, 32, device="meta")
            return self.flat(mlp.gate_proj(input)) + self.flat(mlp.up_proj(input))

    model = Flat(make_model("llama").config)
    Flat.flat = lambda self, output: output.reshape(-1)
    assert len(shared_inputs(watch(model))) == 1
    Flat.flat = lambda self, output: output.view(-1)
    assert watch(model) == []


def shared(*calls: tuple[str, torch.Tensor, int]) -> list[list[str]]:
    return shared_inputs([Call(*call, torch.zeros(1)) for call in calls])


class Refuses(nn.Module):
    def forward(self, input):
        raise ValueError


GATES = {
    "by an operation": lambda mlp, up: mlp.act(up) * up,
    "by another function": lambda mlp, up: mlp.act(up) * mlp.sigmoid(up),
    "as a second argument": lambda mlp, up: mlp.times(mlp.act(up), up),
    "by its name": lambda mlp, up: mlp.times(mlp.act(up), other=up),
    "after a function that has failed": lambda mlp, up: mlp.refused() or mlp.act(up) * up,
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_a_product_that_is_read_besides_has_no_activation(gate):
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 40), nn.Linear(40, 32)
            self.act, self.sigmoid, self.times, self.refuses = nn.GELU(), nn.Sigmoid(), Times(), Refuses()

        def refused(self):
            with suppress(ValueError):
                self.refuses(0)

        def forward(self, x):
            return self.down(gate(self, self.up(x)))

    model = with_mlps(Activated)
    calls, layers = watch(model), len(model.model.layers)
    assert sum(call.name.endswith("mlp.act") for call in calls) == layers
    assert not activations(calls) and len(shared_inputs(calls)) == layers


def test_only_the_same_unchanged_tensor_in_succession_is_shared():
    x, y = torch.zeros(1), torch.zeros(1)
    assert shared(("a", x, 0), ("b", x, 0), ("c", y, 0), ("d", x, 0)) == [["a", "b"]]
    assert shared(("a", x, 0), ("b", x, 1)) == []
    assert shared(("a", x, 0), ("b", x, 0), ("a", y, 0), ("c", y, 0)) == []


def test_only_what_is_called_next_on_an_unchanged_output_is_an_activation():
    x, y = torch.zeros(1), torch.zeros(1)
    linear, function = Call("a", x, 0, y), Call("b", y, 0, None)
    assert activations([linear, function]) == {"a": "b"}
    assert activations([linear, function._replace(version=1)]) == {}
    for readers in ({"b", None}, {"b", "c"}):
        assert activations([linear._replace(readers=frozenset(readers)), function]) == {}
    assert activations([linear, Call("c", x, 0, None), function]) == {}
    assert activations([linear, function, function._replace(input=x)]) == {}
    assert activations([linear, function, linear, function]) == {}


@pytest.mark.parametrize(
    "model_type, names",
    [
        ("bloom", ("mlp.dense_h_to_4h", "mlp.gelu_impl")),
        ("gpt2", ("mlp.c_fc", "mlp.act")),
        ("phi", ("mlp.fc1", "mlp.activation_fn")),
        ("llama", ("mlp.gate_proj", "mlp.act_fn")),
    ],
)
def test_activations_are_found_in_every_layer(model_type, names):
    model = next(case for case in RUNS if case.model_type == model_type).make_model()
    found = activations(watch(model))
    assert sum((a.endswith(names[0]), b.endswith(names[1])) == (True, True) for a, b in found.items()) == 4


@pytest.fixture
def joined():
    """Three layers, one of them with a bias, as they were and packed as one; and the products that were made."""
    torch.manual_seed(0)
    plain = [nn.Linear(24, 8, bias=False), nn.Linear(24, 40), nn.Linear(24, 3, bias=False)]
    layers = copy.deepcopy(plain)
    with torch.inference_mode():
        packed._pack_joined(layers)
    product = layers[0].forward.func.__self__
    made = []
    multiply = product._product
    product._product = lambda input: made.append(input) or multiply(input)
    return plain, layers, product, made


@torch.inference_mode()
def test_one_product_serves_all_and_nothing_is_kept(joined):
    plain, layers, product, made = joined
    for rows in ((1, 1), (3, 5), (70,), (0,)):
        input = torch.randn(*rows, 24)
        for theirs, ours in zip(plain, layers, strict=True):
            torch.testing.assert_close(ours(input), theirs(input))
        assert len(made) == 1 and product._input is None and not product._parts
        made.clear()


@torch.inference_mode()
def test_whoever_is_skipped_called_again_or_called_on_something_else_is_right(joined):
    plain, layers, product, _ = joined
    one, other = torch.randn(2, 24), torch.randn(2, 24)
    for index, input in [(0, one), (2, other), (2, one), (2, one), (0, other), (1, one), (1, other), (1, other)]:
        torch.testing.assert_close(layers[index](input), plain[index](input))
    one.mul_(2)  # the same tensor with other numbers, after a forward that ended before all were served
    for index in (0, 1, 2):
        torch.testing.assert_close(layers[index](one), plain[index](one))
    assert product._input is None


def test_in_a_model_its_hooks_and_its_bytes(tmp_path_factory):
    """Some layers on disk, so that each module has Accelerate's hook."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_model("llama")
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.num_hidden_layers)}
    settings = Settings(device_map=places)
    plain = load_model(folder, Settings(pack_weights=False, device_map=places), folder).model
    loaded = load_model(folder, settings, folder).model
    layer = loaded.model.layers[0]
    product = layer.mlp.gate_proj._old_forward.func.__self__
    assert layer.mlp.up_proj._old_forward.func.__self__ is product
    assert not hasattr(loaded.model.layers[1].mlp.up_proj._old_forward, "func")  # it streams
    assert loaded.get_memory_footprint() == plain.get_memory_footprint()
    assert set(loaded.state_dict()) == set(plain.state_dict())
    calls = []
    multiply = product._product
    product._product = lambda input: calls.append(1) or multiply(input)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)
    assert len(calls) == 1 and product._input is None
