"""What is computed of each number apart, as PyTorch's operators do it, bit by bit: for forwards that make no calls of
PyTorch between kernels."""

import functools
from collections.abc import Callable

import torch

from .cpu import has_code_for, lanes
from .function import Function, share
from .machine_code import Code, Value

_OPERATIONS: dict[str, Callable[..., Value]] = {
    "same": lambda code, one: one,
    "add": lambda code, one, other: one + other,
    "mul": lambda code, one, other: one * other,
    "silu": lambda code, one: one / (code.exact_exp(code.number(0.0) - one) + 1.0),
}


def can_compute(*inputs: torch.Tensor) -> bool:
    """Whether they have one shape and dtype, and each row's numbers lie side by side, and rows at equal distances."""
    first = inputs[0]
    return has_code_for(first.dtype) and all(
        one.shape == first.shape and one.dtype == first.dtype and one.device.type == "cpu" and _step(one) is not None
        for one in inputs
    )


def compute(operation: str, *inputs: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What "add", "mul", "silu" or "same" makes of inputs [..., size] in float32, rounded to `dtype`, or to theirs."""
    first = inputs[0]
    size, output = first.shape[-1], first.new_empty(first.shape, dtype=dtype or first.dtype)
    function = _function(operation, first.dtype, output.dtype, len(inputs))
    function(*inputs, output, *map(_step, inputs), first.numel() // size, size)
    return output


def _step(tensor: torch.Tensor) -> int | None:
    """Numbers between rows [..., size] that follow each other, or None if there is no one distance."""
    if tensor.dim() == 0 or tensor.numel() == 0 or tensor.stride(-1) != 1:
        return None
    step, rows = None, 1
    for count, stride in reversed([*zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]):
        if count > 1:
            if step is not None and stride != step * rows:
                return None
            step, rows = stride if step is None else step, rows * count
    return step or 0


@functools.cache
def _function(operation: str, dtype: torch.dtype, output_dtype: torch.dtype, count: int) -> Function:
    def write(code: Code, thread: Value, threads: Value, *arguments: Value) -> None:
        pointers, output = arguments[:count], code.place(arguments[count], output_dtype)
        steps, (rows, size) = arguments[count + 1 : -2], arguments[-2:]
        inputs = [code.place(pointer, dtype) for pointer in pointers]
        with code.loop(*share(rows, thread, threads)) as row, code.loop(0, size, lanes()) as at:
            within = code.first_lanes(size - at)
            numbers = [one[row * step + at].floats(within) for one, step in zip(inputs, steps, strict=True)]
            output[row * size + at].store(_OPERATIONS[operation](code, *numbers), within)

    return Function(write, 2 * count + 3)
