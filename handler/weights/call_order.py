"""Which matrices of a model are multiplied by the same tensor one after the other: queries, keys and values; the two of
a gated MLP. And which products go to an activation function as they are. It is found by watching a model without
weights run, whatever its modules are called."""

import copy
import logging
from collections import Counter
from collections.abc import Set
from contextlib import suppress
from functools import partial
from itertools import pairwise, zip_longest
from math import inf, prod
from typing import NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from handler.weights.quantized import matrices, shape_of

logger = logging.getLogger(__name__)

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.baddbmm.default}
_NO_LARGER = {  # what they make, than what they are given
    *(_ATEN._to_copy.default, _ATEN.cat.default, _ATEN.cumsum.default, _ATEN.mean.dim, _ATEN.native_layer_norm.default),
    *(_ATEN._softmax.default, _ATEN._safe_softmax.default, _ATEN._unsafe_view.default),
}
_RANGES = {_ATEN.arange.default, _ATEN.arange.start}
_MOST_NUMBERS = 1 << 20  # that an operation is given and makes on the CPU: of some tokens there are fewer


class Call(NamedTuple):
    """Of a linear layer, or of a function: a module that has no parameters.

    version: how often its input had been changed. output: of a linear layer.
    readers: what reads that output: functions, by their names, and None for all else.
    """

    name: str
    input: torch.Tensor
    version: int
    output: torch.Tensor | None = None
    readers: Set[str | None] = frozenset()


@torch.no_grad()  # not inference mode, where tensors do not count their changes
def watch(model: PreTrainedModel) -> list[Call]:
    """Calls in a forward, in their order; none of a model whose code cannot run without numbers, or with outputs that
    have gaps between rows."""
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    # As attention uses a mask: at the numbers of any other most models would look. BLOOM and OPT count in it.
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    for attention_mask in (mask, None):
        try:
            with torch.device("meta"):
                twin = type(model)(copy.deepcopy(model.config)).bfloat16().eval()  # what experts want on this device
            with _Watch(twin) as watched:
                twin(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            return watched.calls
        except Exception as error:  # of the model's own code
            logger.debug("the order of its products is not known: %s", error)
    return []


def _numbers(function: OpOverload, args: tuple, tensors: list[torch.Tensor]) -> float:
    """How many an operation is given and makes, at most; infinitely many if that is not known."""
    given = sum(one.numel() for one in tensors)
    if function in _RANGES:
        return sum(map(abs, args))
    if function is _ATEN.repeat.default:
        return given + given * prod(args[1])
    if function in _PRODUCTS:
        *_, one, other = tensors
        return given + prod(one.shape[:-1]) * other.shape[-1]
    looks = torch.Tag.data_dependent_output in function.tags
    if torch.Tag.pointwise in function.tags and not looks and not function._schema.is_mutable:
        return given + prod(map(max, zip_longest(*(one.shape[::-1] for one in tensors), fillvalue=1)))
    return 4 * given if function in _NO_LARGER else inf  # three that are as large, at most


def _as_of_zeros(function: OpOverload, args: tuple, kwargs: dict) -> object:
    """What an operation makes on the meta device: what it makes of zeros on the CPU, without its numbers. For many
    PyTorch would ask code in Python, which takes three times as long, and imports sympy."""
    if "device" in kwargs:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map_only(torch.Tensor, _zeros, (args, kwargs))
    return tree_map_only(torch.Tensor, _without_numbers, function(*args, **kwargs))


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Watch(TorchDispatchMode):
    """Sees all operations, and stands in for a model's linear layers."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.calls: list[Call] = []
        self._readers: dict[int, set[str | None]] = {}  # by the ids of outputs, which calls keep
        self._within: str | None = None  # a function; one that raises stays here, and nothing after it is fused
        linear = [n for n in matrices(model, None) if not isinstance(model.get_submodule(n), nn.Embedding)]
        for name in linear:
            module = model.get_submodule(name)
            module.forward = partial(self._product, name, shape_of(module)[0])
        for name, module in model.named_modules():
            if name not in linear and not any(module.children()) and not module._parameters:
                module.register_forward_pre_hook(partial(self._begin, name))
                module.register_forward_hook(partial(self._end, name))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        for one in tensors:
            if (readers := self._readers.get(id(one))) is not None:
                readers.add(self._within)
        if not any(one.is_meta for one in tensors) and str(kwargs.get("device")) != "meta":
            return function(*args, **kwargs)
        if function is _ATEN.embedding.default:
            return args[0].new_empty(*args[1].shape, args[0].shape[1])
        with suppress(Exception):  # where a CPU, or whatever the shapes are, does not go with the operation
            if _numbers(function, args, tensors) <= _MOST_NUMBERS:
                return _as_of_zeros(function, args, kwargs)
        return function(*args, **kwargs)

    def _product(self, name: str, out: int, input: torch.Tensor) -> torch.Tensor:
        with_gaps = input.new_empty(*input.shape[:-1], out + 1)[..., :out]
        readers = self._readers[id(with_gaps)] = set()
        self.calls.append(Call(name, input, input._version, with_gaps, readers))
        return with_gaps

    def _begin(self, name: str, module: nn.Module, args: tuple) -> None:
        self._within = name

    def _end(self, name: str, module: nn.Module, args: tuple, output: object) -> None:
        self._within = None
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append(Call(name, args[0], args[0]._version))


def shared_inputs(calls: list[Call]) -> list[list[str]]:
    """Names of linear layers, in the order in which they run, for each tensor that several take in succession and
    unchanged. A layer that runs twice is in no group."""
    calls = [call for call in calls if call.output is not None]
    times = Counter(call.name for call in calls)
    groups: list[list[str]] = []
    before: tuple[torch.Tensor | None, int] = None, 0
    for call in calls:
        once = times[call.name] == 1
        if call.input is before[0] and call.version == before[1] and once:
            groups[-1].append(call.name)
        elif once:
            groups.append([call.name])
        before = call.input if once else None, call.version
    return [group for group in groups if len(group) > 1]


def activations(calls: list[Call]) -> dict[str, str]:
    """Names of linear layers, and of a function that is called next on their unchanged output and alone reads it; each
    runs once."""
    times = Counter(call.name for call in calls)
    return {
        one.name: other.name
        for one, other in pairwise(calls)
        if one.output is other.input and one.readers <= {other.name} and not other.version
        if times[one.name] == times[other.name] == 1
    }
