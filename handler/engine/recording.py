"""Forwards on a CPU that are written down once, call by call, and then repeated without the Python of the model.

Between two products of a small step there is more Python than computing: modules, their hooks, the library's masks.
What is left of it here is one function that makes the same calls of PyTorch and of handler/kernels, on tensors of the
same shapes, and lets each go after its last use.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from types import CodeType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils

from handler.kernels.function import watched

from .captured import Captured
from .kv_cache import KVCache

_Forward = Callable[[], torch.Tensor]

# What these read would be the same in each repetition, or they make tensors that nobody sees come.
_REFUSED = {
    *(
        getattr(torch.Tensor, name)
        for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
    ),
    *(torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.from_dlpack, torch.Tensor.__deepcopy__),
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
}


class CannotRecord(RuntimeError):
    """A forward does something that would have to be another thing the next time."""


class Recordings:
    """Records forwards of a model that is in a CPU's memory."""

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache

    def capture(self, inputs: Mapping[str, Any], lengths: Sequence[int], like: torch.Tensor) -> Captured:
        """The forward, which runs once more, of inputs and `lengths` as of Captured. Raises CannotRecord."""
        captured = Captured(inputs, lengths, like.device)

        def forward() -> torch.Tensor:
            self._cache.direct_to(captured.columns)
            return self._model(**captured.inputs).logits.flatten(0, -2)

        captured.run = recorded(forward)
        return captured

    def forget(self) -> None:
        """They share nothing that would have to go."""


def recorded(forward: _Forward) -> _Forward:
    """Run a forward; what computes it anew, from the tensors that were there before it. Raises CannotRecord."""
    notes = _Notes()
    with _nothing_is_read(), _Calls(notes), _Operators(notes), watched(notes.kernel):
        result = forward()
    return notes.function(result)


@contextmanager
def _nothing_is_read() -> Iterator[None]:
    """The library leaves a mask out when it finds that it hides nothing, unless it is traced."""
    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = before


class _Calls(TorchFunctionMode):
    """Notes what is called by the names that Python has for it: such calls are the quickest."""

    def __init__(self, notes: "_Notes"):
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _REFUSED:
            raise CannotRecord(f"{func.__name__} of a tensor")
        return self._notes.outermost(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Sees which operators a call is made of, whether they write, and whether they can be repeated. Those that no call
    was seen to make, as TorchScript's, are noted themselves."""

    def __init__(self, notes: "_Notes"):
        super().__init__()
        self._notes = notes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a base class' hook: nothing is compiled here, and to forbid it takes time for each operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_refused, is_composite, is_writing = _traits(func)
        if is_refused or (func is _INDEX and any(one.dtype in _MASK_DTYPES for one in args[1] if one is not None)):
            raise CannotRecord(str(func))
        if is_composite:  # of operators, one of which may depend on numbers
            with self:
                return func.decompose(*args, **(kwargs or {}))
        outputs = func(*args, **(kwargs or {}))
        self._notes.operator(func, args, kwargs or {}, outputs, is_writing)
        return outputs


_INDEX, _DETACH = torch.ops.aten.index.Tensor, torch.ops.aten.detach_.default
_MASK_DTYPES = (torch.bool, torch.uint8)


@cache
def _traits(func: OpOverload) -> tuple[bool, bool, bool]:
    """Of an operator: whether the shape of what it gives, or what that is to Python, depends on numbers in tensors, or
    it makes a view another one; whether it is made of others; whether it writes to what it is given."""
    refused = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
    is_refused = func not in (_INDEX, _DETACH) and not refused.isdisjoint(func.tags)
    return is_refused, func._can_decompose(), func._schema.is_mutable


class _Notes:
    """The lines of a function, in which t0, t1, ... are tensors, and c0, c1, ... all that stays."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, set[int]]] = []  # and which tensors are in it
        self._constants: list[Any] = []
        self._numbers: dict[int, int] = {}  # of the tensors that lines made and that are still there, by their ids
        self._addresses: dict[int, int | None] = {}  # of their memory
        self._ends: list[weakref.ref] = []
        self._count = 0
        self._is_inside = self._is_written = False  # a call, whose operators are not noted; by one of them

    def outermost(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        """Make a call, and note it unless it gives no tensor and writes to none. Calls within it are part of it."""
        self._is_inside, self._is_written = True, False
        try:
            outputs = func(*args, **kwargs)
        finally:
            self._is_inside = False
        if self._is_written or (type(outputs) is not torch.Size and _has_tensors(outputs)):
            self._note(func, args, kwargs, outputs, self._is_written)
        return outputs

    def operator(self, func: Callable, args: Sequence, kwargs: dict, outputs: Any, is_writing: bool) -> None:
        if self._is_inside:
            self._is_written |= is_writing
        else:
            self._note(func, args, kwargs, outputs, is_writing)

    def kernel(self, func: Callable, args: Sequence) -> None:
        if self._is_inside:
            self._is_written = True
        else:
            self._note(func, args, {}, None, is_writing=True)

    def _note(self, func: Callable, args: Sequence, kwargs: dict, outputs: Any, is_writing: bool) -> None:
        given = [*_tensors(args), *_tensors(kwargs.values())]
        ids = set(map(id, given))
        fresh = [tensor for tensor in _tensors([outputs]) if id(tensor) not in ids]
        if not is_writing and (not fresh or self._is_view_of_what_stays(fresh, given, ids)):
            return
        used: set[int] = set()
        words = [self._word(value, used) for value in args]
        words += [f"{name}={self._word(value, used)}" for name, value in kwargs.items()]
        call = f"{self._constant(func)}({', '.join(words)})"
        for tensor in fresh:
            used.add(self._count)
            self._name(tensor)
        self._lines.append((f"{self._target(outputs)} = {call}" if fresh else call, used))

    def _is_view_of_what_stays(self, fresh: list[torch.Tensor], given: list[torch.Tensor], ids: set[int]) -> bool:
        return bool(given) and ids.isdisjoint(self._numbers) and all(_shares_memory(one, given) for one in fresh)

    def _name(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        self._numbers[key], self._addresses[key] = self._count, _address(tensor)
        self._ends.append(weakref.ref(tensor, lambda _: (self._numbers.pop(key, None), self._addresses.pop(key, None))))
        self._count += 1

    def _target(self, outputs: Any) -> str:
        if isinstance(outputs, list | tuple):
            return f"[{', '.join(map(self._target, outputs))}]"
        return f"t{self._numbers[id(outputs)]}" if id(outputs) in self._numbers else "_"

    def _word(self, value: Any, used: set[int]) -> str:
        if isinstance(value, torch.Tensor):
            number = self._numbers.get(id(value))
            if number is None:
                if (address := _address(value)) and address in self._addresses.values():
                    raise CannotRecord("a tensor that shares memory with others, and that nobody saw come")
                return self._constant(value)
            used.add(number)
            return f"t{number}"
        if isinstance(value, list | tuple) and _has_tensors(value):
            words = "".join(f"{self._word(one, used)}, " for one in value)
            return f"[{words}]" if isinstance(value, list) else f"({words})"
        return self._constant(_frozen(value))

    def _constant(self, value: Any) -> str:
        self._constants.append(value)
        return f"c{len(self._constants) - 1}"

    def function(self, result: torch.Tensor) -> _Forward:
        """What makes all calls again, and returns what has become of the result."""
        if (returned := self._numbers.get(id(result))) is None:
            raise CannotRecord("logits that no call made")
        alive, lines = {returned}, [f"return t{returned}"]
        for line, used in reversed(self._lines):
            if dead := used - alive:
                lines.append(f"del {', '.join(f't{number}' for number in sorted(dead))}")
            lines.append(line)
            alive |= used
        names = ", ".join(f"c{index}" for index in range(len(self._constants)))
        body = "\n".join(f"  {line}" for line in reversed(lines))
        scope: dict[str, Any] = {}
        exec(_compiled(f"def bind({names}):\n def run():\n{body}\n return run"), scope)
        return scope["bind"](*self._constants)


@lru_cache(maxsize=16)
def _compiled(source: str) -> CodeType:
    """The same for forwards that differ in sizes and addresses alone."""
    return compile(source, "<recorded forward>", "exec")


def _frozen(value: Any) -> Any:
    """The same, though a list in it may grow."""
    return type(value)(map(_frozen, value)) if type(value) in (list, tuple) else value


def _shares_memory(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    address = _address(tensor)
    return address is not None and any(_address(other) == address for other in others)


def _address(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensors, value)))
