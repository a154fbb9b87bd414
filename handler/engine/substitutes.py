"""Kernels that stand for operators of PyTorch in recorded forwards, where kernels that follow each other are one call.

Each takes what its operator takes, and gives what computes the same, or None where the operator has to do it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from handler.kernels.elementwise import can_compute, compute

_Computing = Callable[[], torch.Tensor] | None


def substitute(func: Callable, args: Sequence, kwargs: dict[str, Any]) -> _Computing:
    """What computes a call's result with kernels, if something does."""
    ours = _OURS.get(func)
    return ours(*args, **kwargs) if ours else None


def _of_two(operation: str, *inputs: Any, **options: Any) -> _Computing:
    if (
        options
        or len(inputs) != 2
        or not all(isinstance(one, torch.Tensor) for one in inputs)
        or not can_compute(*inputs)
    ):
        return None
    return lambda: compute(operation, *inputs)


def _silu(input: torch.Tensor, inplace: bool = False) -> _Computing:
    return (lambda: compute("silu", input)) if not inplace and can_compute(input) else None


def _float(input: torch.Tensor, **options: Any) -> _Computing:
    if options or input.dtype == torch.float32 or not can_compute(input):
        return None
    return lambda: compute("same", input, dtype=torch.float32)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Computing:
    return None if training else lambda: input


_OURS: dict[Callable, Callable[..., _Computing]] = {
    **dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.__add__), partial(_of_two, "add")),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__), partial(_of_two, "mul")),
    torch.Tensor.float: _float,
    torch.nn.functional.silu: _silu,
    torch.nn.functional.dropout: _dropout,
}
