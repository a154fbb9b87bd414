"""Layer normalization (Ba, Kiros and Hinton, arXiv:1607.06450). Of many rows it is as fast as PyTorch's or
faster by a third, and it can be one call with the kernels beside it."""

import functools
from collections.abc import Callable

import torch

from .cpu import has_code_for, lanes
from .function import Function, bits_of_float, share
from .machine_code import Code, Place, Value, Variable


def can_normalize_layer(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether `layer_norm` takes these."""
    is_here = all(one.device.type == "cpu" and one.dtype == inputs.dtype for one in (inputs, weight, bias))
    is_whole = all(one.is_contiguous() for one in (inputs, weight, bias)) and inputs.numel() > 0
    return is_here and is_whole and inputs.shape[-1:] == weight.shape == bias.shape and has_code_for(inputs.dtype)


def layer_norm(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """inputs [..., size] less their mean, over the root of their variance plus epsilon, times weight [size], plus bias
    [size]; all in one dtype, computed in float32 and rounded once."""
    outputs, size = torch.empty_like(inputs), len(weight)
    call = _function(inputs.dtype).for_numbers(inputs.numel())
    call(inputs, weight, bias, outputs, inputs.numel() // size, size, bits_of_float(epsilon))
    return outputs


@functools.cache
def _function(dtype: torch.dtype) -> Function:
    return Function(functools.partial(_write, dtype), 7)


def _write(dtype: torch.dtype, code: Code, thread: Value, threads: Value, *arguments: Value) -> None:
    *pointers, rows, size, epsilon = arguments
    inputs, weight, bias, outputs = (code.place(pointer, dtype) for pointer in pointers)
    with code.loop(*share(rows, thread, threads)) as row:
        source, target = inputs[row * size], outputs[row * size]
        mean = _mean(code, source, size, lambda number: number)
        variance = _mean(code, source, size, lambda number: (number - mean) * (number - mean))
        factor = code.number(1.0) / code.root(variance + code.float_of_bits(epsilon))
        with code.loop(0, size, lanes()) as at:
            within = code.first_lanes(size - at)
            normal = (source[at].floats(within) - mean) * factor
            target[at].store(code.multiply_add(normal, weight[at].floats(within), bias[at].floats(within)), within)


def _mean(code: Code, source: Place, size: Value, of: Callable[[Value], Value]) -> Value:
    """Of what is computed of each number, in every lane."""
    sums = Variable(code, code.number(0.0))
    with code.loop(0, size, lanes()) as at:
        within = code.first_lanes(size - at)
        sums.set(sums.get() + code.where(within, of(source[at].floats(within)), code.number(0.0)))
    return code.sum_of(sums.get()) / code.float_of(size)
