"""Forwards on a CPU that are written down once, call by call, and then repeated without the Python of the model.

Between two products of a small step there is more Python than computing: modules, their hooks, the library's masks.
What is left of it here is one function that makes the same calls of PyTorch, on tensors of the same shapes, and lets
each go after its last use. Kernels of handler/kernels that follow each other are one call of it: what they read and
write stays where it is. Most of a forward is such kernels, where they stand for PyTorch's operators too
(substitutes.py).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from types import CodeType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils

from handler.kernels.cpu import has_code_for
from handler.kernels.function import Function, in_turn, watched

from .captured import BEYOND, Captured, Forward
from .head import head_sees_only
from .kv_cache import KVCache
from .rooms import Rooms
from .substitutes import substitute

_Run = Callable[[], torch.Tensor]

# What these read would be the same in each repetition, or they make tensors that nobody sees come.
_REFUSED = {
    *(
        getattr(torch.Tensor, name)
        for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
    ),
    *(torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.from_dlpack, torch.Tensor.__deepcopy__),
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
}
# They say something of a tensor, and are most of all calls: there is nothing to note.
_SAYING = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device")),
    *(getattr(torch.Tensor, name) for name in ("data_ptr", "stride", "numel", "dim", "__len__", "is_contiguous")),
}
# What kernels write to.
_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}


class CannotRecord(RuntimeError):
    """A forward does something that would have to be another thing the next time."""


class Recordings:
    """Records forwards of a model that is in a CPU's memory.

    takes_prompts: whether those of one row's first tokens, too: of more of them, those that are missing have to be
        passed over.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache
        self.takes_prompts = has_code_for(model.dtype)
        self._rooms = Rooms()

    def capture(self, forward: Forward, size: int, like: torch.Tensor) -> Captured:
        """A forward, which runs once more, of so many tokens, at least as many as it has. like: its logits. Raises
        CannotRecord."""
        captured = _Recording(forward, size, self._rooms)
        # Nothing reads what a prompt writes now, and nobody has looked at it. What would not pass it over fails.
        if forward.row is not None:
            captured.columns.fill_(BEYOND)

        def run() -> torch.Tensor:
            self._cache.direct_to(captured.columns, None if forward.row is None else captured.row)
            return self._model(**captured.inputs).logits.flatten(0, -2)

        with head_sees_only(self._model, None if forward.row is None else captured.last):
            captured.run = recorded(run, self._rooms)
        captured.takes_fewer = self._cache.context.passes_over
        return captured

    def forget(self) -> None:
        """Give back the memory that they share, once there are none."""
        self._rooms = Rooms()


class _Recording(Captured):
    """rooms: what it writes to, but for the cache."""

    def __init__(self, forward: Forward, size: int, rooms: Rooms):
        super().__init__(forward, size, torch.device("cpu"))
        self._rooms = rooms

    def spoil(self) -> None:
        self._rooms.spoil()


def recorded(forward: _Run, rooms: Rooms) -> _Run:
    """Run a forward; what computes it anew, from the tensors that were there before it. Raises CannotRecord.

    rooms: which forwards may share that run one after the other; what one gives is there until the next."""
    notes = _Notes(rooms)
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
        if func in _SAYING or self._notes.is_inside:  # what notes do themselves
            return func(*args, **(kwargs or {}))
        if func in _REFUSED:
            raise CannotRecord(f"{func.__name__} of a tensor")
        if (computing := substitute(func, args, kwargs or {})) is not None:
            with self:
                return computing()
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
    """The lines of a function, in which t0, t1, ... are tensors, and c0, c1, ... all that stays: what was there before,
    and memory in rooms."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._lines: list[tuple[str, set[int]]] = []  # and which tensors are in it
        self._kernels: list[tuple[Function, Sequence[Any]]] = []  # that come after the last line
        self._constants: list[Any] = []
        self._written: set[int | None] = set()  # addresses of rooms
        self._numbers: dict[int, int] = {}  # of the tensors that lines made and that are still there, by their ids
        self._addresses: dict[int, int | None] = {}  # of their memory
        self._copies: dict[int, torch.Tensor] = {}  # of them, in rooms, for kernels
        self._ends: list[weakref.ref] = []
        self._count = 0
        self.is_inside = self._is_written = False  # a call, whose operators are not noted; by one of them

    def outermost(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        """Make a call, and note it unless it gives no tensor and writes to none. Calls within it are part of it."""
        self.is_inside, self._is_written = True, False
        try:
            with torch._C._DisableTorchDispatch() if _only_makes(func, args, kwargs) else nullcontext():
                outputs = func(*args, **kwargs)
                if func in _EMPTY and _has_memory(outputs):
                    return self._room(outputs)
        finally:
            self.is_inside = False
        if self._is_written or (type(outputs) is not torch.Size and _has_tensors(outputs)):
            self._note(func, args, kwargs, outputs, self._is_written)
        return outputs

    def operator(self, func: Callable, args: Sequence, kwargs: dict, outputs: Any, is_writing: bool) -> None:
        if self.is_inside:
            self._is_written |= is_writing
        else:
            self._note(func, args, kwargs, outputs, is_writing)

    def kernel(self, func: Function, args: Sequence) -> None:
        if self.is_inside:
            self._is_written = True
            return
        self.is_inside = True
        try:
            given = [self._argument(value) for value in args]  # which may add lines
            self._kernels.append((func, given))
        finally:
            self.is_inside = False

    def _note(self, func: Callable, args: Sequence, kwargs: dict, outputs: Any, is_writing: bool) -> None:
        given = [*_tensors(args), *_tensors(kwargs.values())]
        ids = set(map(id, given))
        fresh = [tensor for tensor in _tensors([outputs]) if id(tensor) not in ids]
        if not is_writing and (not fresh or self._is_view_of_what_stays(fresh, given)):
            return
        if is_writing:
            self._copies.clear()
        used: set[int] = set()
        words = [self._word(value, used) for value in args]
        words += [f"{name}={self._word(value, used)}" for name, value in kwargs.items()]
        call = f"{self._constant(func)}({', '.join(words)})"
        for tensor in fresh:
            used.add(self._count)
            self._name(tensor)
        self._add(f"{self._target(outputs)} = {call}" if fresh else call, used)

    def _add(self, line: str, used: set[int]) -> None:
        self._join_kernels()
        self._lines.append((line, used))

    def _join_kernels(self) -> None:
        """Make them one line."""
        if self._kernels:
            self._lines.append((f"{self._constant(in_turn(self._kernels))}()", set()))
            self._kernels = []

    def _is_view_of_what_stays(self, fresh: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
        staying = [one for one in given if id(one) not in self._numbers]
        return bool(staying) and all(_shares_memory(one, staying) for one in fresh)

    def _name(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        self._numbers[key], self._addresses[key] = self._count, _address(tensor)
        known = self._numbers, self._addresses, self._copies
        self._ends.append(weakref.ref(tensor, lambda _: [of.pop(key, None) for of in known]))
        self._count += 1

    def _target(self, outputs: Any) -> str:
        if isinstance(outputs, list | tuple):
            return f"[{', '.join(map(self._target, outputs))}]"
        return f"t{self._numbers[id(outputs)]}" if id(outputs) in self._numbers else "_"

    def _word(self, value: Any, used: set[int]) -> str:
        if isinstance(value, torch.Tensor):
            if (number := self._number(value)) is None:
                return self._constant(self._kept(value))
            used.add(number)
            return f"t{number}"
        if isinstance(value, list | tuple) and _has_tensors(value):
            words = "".join(f"{self._word(one, used)}, " for one in value)
            return f"[{words}]" if isinstance(value, list) else f"({words})"
        return self._constant(_frozen(value))

    def _number(self, tensor: torch.Tensor) -> int | None:
        """None if it stays."""
        number = self._numbers.get(id(tensor))
        if number is None and (address := _address(tensor)) and address in self._addresses.values():
            raise CannotRecord("a tensor that shares memory with others, and that nobody saw come")
        return number

    def _argument(self, value: Any) -> Any:
        """What a kernel gets for it: an address, if it is in a room. A tensor that it reads, and that a line makes, is
        copied to one; what it writes to is in one, or was there before."""
        if not isinstance(value, torch.Tensor):
            return value
        if (number := self._number(value)) is None:
            return value.data_ptr() if self._is_room(value) else value
        if id(value) not in self._copies:
            self._copies[id(value)] = self._room(value)
            copy = self._constant(_copier(value, self._kept(self._copies[id(value)])))
            self._add(f"{copy}(t{number})", {number})
        return self._copies[id(value)].data_ptr()

    def _kept(self, value: Any) -> Any:
        """What stands for it in what is repeated: holding on to a tensor in a room would leave the room to it."""
        return self._rooms.kept(value) if isinstance(value, torch.Tensor) and self._is_room(value) else value

    def _is_room(self, tensor: torch.Tensor) -> bool:
        if (address := _address(tensor)) in self._written:
            return True
        if address in self._rooms:
            raise CannotRecord("a tensor that another forward has left, and that is written to in each")
        return False

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        room = self._rooms.tensor(like)
        self._written.add(_address(room))
        return room

    def _constant(self, value: Any) -> str:
        self._constants.append(value)
        return f"c{len(self._constants) - 1}"

    def function(self, result: torch.Tensor) -> _Run:
        """What makes all calls again, and returns what has become of the result."""
        if id(result) not in self._numbers and not self._is_room(result):
            raise CannotRecord("logits that no call made")
        self._join_kernels()
        alive: set[int] = set()
        lines = [f"return {self._word(result, alive)}"]
        for line, used in reversed(self._lines):
            if dead := used - alive:
                lines.append(f"del {', '.join(f't{number}' for number in sorted(dead))}")
            lines.append(line)
            alive |= used
        names = ", ".join(f"c{index}" for index in range(len(self._constants)))
        body = "\n".join(f"  {line}" for line in reversed(lines))
        scope: dict[str, Any] = {}
        # Kernels have addresses in rooms, and nothing else that would keep them.
        exec(_compiled(f"def bind(rooms, {names}):\n def run(keep=rooms):\n{body}\n return run"), scope)
        return scope["bind"](self._rooms, *self._constants)


def _only_makes(func: Callable, args: Sequence, kwargs: dict) -> bool:
    """Whether a call makes memory, of a size that no tensor holds: to see its operators would take long."""
    sizes = args if func in (torch.empty, torch.empty_strided) else args[1:]
    return func in _EMPTY and not _has_tensors([*sizes, *kwargs.values()])


def _copier(source: torch.Tensor, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies all memory of such tensors, of which they may see a part, or see it several times."""
    whole = (source.untyped_storage().nbytes() // source.itemsize,), (1,), 0
    memory = target.as_strided(*whole)
    return lambda tensor: memory.copy_(tensor.as_strided(*whole))


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


def _has_memory(tensor: torch.Tensor) -> bool:
    """On a CPU, and of a size that stays: an empty one may be given to grow."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.numel() > 0


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensors, value)))
