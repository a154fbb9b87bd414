"""Functions that do what no operator of PyTorch does, which LLVM compiles for this very CPU when they are first needed.

Each takes 64-bit numbers, and is run by every thread of a parallel region of PyTorch's OpenMP: threads that have just
computed for PyTorch still spin, and start at once.
"""

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import binding, ir

from .cpu import OF_THREADS, features, lanes, parallel
from .machine_code import I32, I64, POINTER, Code, Place, Value


def share(count: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
    """Where a thread's share of so many things begins and ends."""
    return count * thread // threads, count * (thread + 1) // threads


@contextmanager
def parts(code: Code, count: Value, threads: Value) -> Iterator[tuple[Value, Value]]:
    """Where parts of so many things begin and end; a thread comes for the next when it is through with one. Of two
    cores the one may be several times as fast as the other, half of which is somebody else's.

    Each thread has to come here exactly once in a call, with the same count. Raises AttributeError where that is
    written twice, and in what `Code.function` makes.
    """
    taken, ended = code.counters
    del code.counters  # a second use would begin where the first one ended
    size = code.least(code.most(count // (threads * _PARTS), code.integer(1)), code.integer(_MOST_OF_A_PART))
    with code.loop(taken.add_integer(size), count, lambda: taken.add_integer(size)) as start:
        yield start, code.least(start + size, count)
    with code.when(ended.add_integer(code.integer(1)) > threads - 2):  # all have come in vain: for the next call
        for counter in (taken, ended):
            counter.store_integer(code.integer(0))


@functools.cache
def written_by(writer: Callable[..., Any], arguments: int, *kind: Any) -> "Function":
    """The function of so many integers that a writer writes. kind: what it is told before them."""

    def write(code: Code, thread: Value, threads: Value, *given: Value) -> None:
        writer(*kind, *given, code=code).write(thread, threads)

    return Function(write, arguments)


def bits_of_float(number: float) -> int:
    """What `Code.float_of_bits` takes, to hand a float32 over among integers."""
    (bits,) = struct.unpack("i", struct.pack("f", number))
    return bits


_PARTS = 8  # of what a thread would have to do if all were as fast
_MOST_OF_A_PART = 64  # things: the last part keeps all threads waiting for one
_FEW_NUMBERS = 1 << 15  # one thread is through with them before another has begun
Argument = torch.Tensor | int | None  # a tensor means its address, nothing means address 0
_Watcher = Callable[["Function", tuple[Argument, ...]], None]


class _Watching(threading.local):
    def __init__(self) -> None:
        self.watchers: list[_Watcher] = []


_watching = _Watching()


@contextmanager
def watched(watcher: _Watcher) -> Iterator[None]:
    """Tell of each function that this thread calls, and with what: no operator of PyTorch's shows it."""
    _watching.watchers.append(watcher)
    try:
        yield
    finally:
        _watching.watchers.remove(watcher)


class Function:
    """A compiled function of so many integers, addresses among them.

    What it writes to has to come from `torch.empty` and its like, or to be there for longer than a forward: so recorded
    forwards find it (handler/engine/recording.py)."""

    def __init__(self, write: Callable[..., None], arguments: int):
        """write: gets the code, the number of the thread that runs it, how many run it, and the integers."""
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "run")
        code = Code(function)
        threads = [code.ir.sext(code.intrinsic(name, I32).of, I64) for name in OF_THREADS]
        places = Place(code, function.args[0], torch.int64)
        code.counters = places[arguments], places[arguments + 1]
        given = [*threads, *(places[index].integer().of for index in range(arguments))]
        write(code, *(Value(code, value) for value in given))
        code.ir.ret_void()
        self._engine = _compiled(str(module))  # owns the code
        self._address = self._engine.get_function_address(function.name)
        self._alone = _FUNCTION(self._address)
        self._arguments, self._array = arguments, ctypes.c_int64 * (arguments + 2)

    def __call__(self, *arguments: Argument) -> None:
        """In as many threads as PyTorch computes in; returns when all have."""
        parallel()(self._address, self._given(arguments), torch.get_num_threads(), 0)  # type: ignore[misc]
        for watcher in _watching.watchers:
            watcher(self, arguments)

    def alone(self, *arguments: Argument) -> None:
        """In this thread, which is the first and only one."""
        self._alone(self._given(arguments))
        for watcher in _watching.watchers:
            watcher(self, arguments)

    def for_numbers(self, count: int) -> Callable[..., None]:
        """What to call where so many numbers are gone through once: in as many threads as that is worth."""
        return self.alone if count <= _FEW_NUMBERS else self

    def _given(self, arguments: Sequence[Argument]) -> ctypes.Array:
        """And the counters behind them."""
        if len(arguments) != self._arguments:
            raise TypeError(f"{self._arguments} arguments, not {len(arguments)}")
        numbers = (a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments)
        return self._array(*numbers)


def in_turn(calls: Sequence[tuple[Function, Sequence[Argument]]]) -> Callable[[], None]:
    """What makes calls one after the other in one parallel region, whose threads wait for each other between them. It
    keeps the tensors. To be run by one thread at a time: counters lie behind the arguments."""
    arrays = [function._given(arguments) for function, arguments in calls]
    pairs = ((call[0]._address, ctypes.addressof(array)) for call, array in zip(calls, arrays, strict=True))
    table = (ctypes.c_int64 * (2 * len(calls)))(*itertools.chain.from_iterable(pairs))

    def run(keep: object = (calls, arrays)) -> None:  # functions' code, tensors' memory, and where their addresses are
        _runner()(ctypes.addressof(table), len(arrays))

    return run


@functools.cache
def _runner() -> Function:
    """The function of a table of so many functions' addresses, each before that of its integers, and how many."""

    def write(code: Code, thread: Value, threads: Value, table: Value, count: Value) -> None:
        places = code.place(table, torch.int64)
        with code.loop(0, count) as index:
            code.call_at(places[index * 2].integer(), places[index * 2 + 1].integer())
            code.wait_for_all()

    return Function(write, 2)


def _compiled(text: str) -> binding.ExecutionEngine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu = binding.get_host_cpu_name() if lanes() == 16 else "x86-64-v3"  # AVX2, where others may mean AVX512
    names = ",".join(f"{'+' if has else '-'}{name}" for name, has in features().items())
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=names, opt=3, jit=True)  # the engine's, which frees it
    parsed = binding.parse_assembly(text)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
