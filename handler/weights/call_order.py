"""Which matrices of a model are multiplied by the same tensor one after the other: queries, keys and values; the two of
a gated MLP. And which products go to an activation function as they are. It is found by watching a model without
weights run, whatever its modules are called."""

import copy
import logging
from collections import Counter
from collections.abc import Set
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from handler.weights.quantized import matrices, shape_of

logger = logging.getLogger(__name__)


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
    """Calls in a forward, in their order; none of a model whose code cannot run so, or with outputs that have gaps
    between rows."""
    try:
        twin = _twin(model)
        with _Watch(twin) as watched:
            ids = torch.zeros(2, 3, dtype=torch.long)
            twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return watched.calls
    except Exception as error:  # of the model's own code
        logger.debug("the order of its products is not known: %s", error)
    return []


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model in bfloat16, which experts want, with matrices that have no numbers, and all else zeros."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).bfloat16().eval()
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _zeros(buffer)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() < 2:
                module._parameters[name] = nn.Parameter(_zeros(parameter))
    return twin


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _Watch(TorchDispatchMode):
    """Hooks on a model's linear layers and functions, and on all operations."""

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
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        for one in tensors:
            if (readers := self._readers.get(id(one))) is not None:
                readers.add(self._within)
        if function is torch.ops.aten.embedding.default:  # without numbers PyTorch would import sympy for it
            return torch.zeros(*args[1].shape, args[0].shape[1], dtype=args[0].dtype)
        if len({one.is_meta for one in tensors}) < 2:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs or {}))
        made = function(*args, **kwargs)
        if tensors[0].is_meta:  # a part of a matrix, an expert's
            return made
        return tree_map_only(torch.Tensor, _zeros, made)

    def _product(self, name: str, out: int, input: torch.Tensor) -> torch.Tensor:
        with_gaps = input.new_zeros(*input.shape[:-1], 2 * out)[..., :out]
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
