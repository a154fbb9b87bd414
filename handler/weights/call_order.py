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
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from handler.kernels.cpu import pytorch_alone
from handler.weights.quantized import matrices, shape_of

logger = logging.getLogger(__name__)

_INDEX = torch.ops.aten.index.Tensor
_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_STORAGES = ("data_ptr", "storage", "untyped_storage")
_READS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "__array__", "__dlpack__", *_STORAGES)}
_MOST_NUMBERS = 1 << 23  # that an operation may make of so few tokens: scans of some models take seconds


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
    """Calls in a forward, in their order; none of a model whose code looks at numbers, which may do something else with
    others, or cannot run with outputs that have gaps between rows."""
    ids = torch.zeros(2, 3, dtype=torch.long)
    # As attention uses a mask: at the numbers of any other most models would look. BLOOM and OPT count in it.
    for mask in (torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16), None):
        try:
            twin = _twin(model)
            with pytorch_alone(), _Blind(), _Watch(twin) as watched:
                twin(input_ids=ids, attention_mask=mask, use_cache=False)
            return watched.calls
        except Exception as error:  # of the model's own code
            logger.debug("the order of its products is not known: %s", error)
    return []


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model in bfloat16, which experts want, with zeros in vectors and buffers, and no numbers in matrices. On the
    meta device all would take three times as long, and PyTorch would import sympy."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).bfloat16().eval()
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _zeros(buffer)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() < 2:
                module._parameters[name] = nn.Parameter(_zeros(parameter), requires_grad=False)
    return twin


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _of_matrices(function: OpOverload, args: tuple, kwargs: dict) -> object:
    """What an operation makes of matrices without numbers and tensors with some, without numbers."""
    if function is torch.ops.aten.embedding.default:  # PyTorch would import sympy for it
        return args[0].new_empty(*args[1].shape, args[0].shape[1])
    args, kwargs = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs))
    return function(*args, **kwargs)


class _Blind(TorchFunctionMode):
    """Refuses what looks at numbers and is no operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READS:
            raise NotImplementedError(f"{function} looks at numbers")
        return function(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Sees all operations, and stands in for a model's linear layers: nothing is multiplied."""

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
        kwargs, tensors = kwargs or {}, _tensors((args, kwargs))
        for one in tensors:
            if (readers := self._readers.get(id(one))) is not None:
                readers.add(self._within)
        is_part = function is _INDEX and all(at is None or at.dtype == torch.long for at in args[1])  # at no mask
        if not is_part and not _LOOKS.isdisjoint(function.tags):
            raise NotImplementedError(f"{function} looks at numbers")
        are_meta = {one.is_meta for one in tensors}
        made = _of_matrices(function, args, kwargs) if len(are_meta) > 1 else function(*args, **kwargs)
        if is_part or are_meta == {True}:
            return made
        if any(one.numel() > _MOST_NUMBERS for one in _tensors(made)):
            raise NotImplementedError(f"{function} makes too many numbers")
        return made if len(are_meta) < 2 else tree_map_only(torch.Tensor, _zeros, made)

    def _product(self, name: str, out: int, input: torch.Tensor) -> torch.Tensor:
        with_gaps = input.new_zeros(*input.shape[:-1], out + 1)[..., :out]
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
