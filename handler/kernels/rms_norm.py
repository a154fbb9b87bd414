"""Root mean square normalization (Zhang and Sennrich, arXiv:1910.07467) in one pass over memory, where the models' own
code makes six operators of it, most of whose time is their calls."""

import functools

import torch

from .cpu import has_code_for, lanes
from .function import Function, bits_of_float, share
from .machine_code import Code, Value, Variable

KINDS = ("rounded", "whole", "offset")


def can_normalize(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    is_here = inputs.device.type == weight.device.type == "cpu" and inputs.dtype == weight.dtype
    is_vector = weight.dim() == 1 and weight.numel() > 0 and weight.is_contiguous()
    return is_here and is_vector and inputs.shape[-1:] == weight.shape and has_code_for(weight.dtype)


def rms_norm(inputs: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: str) -> torch.Tensor:
    """inputs [..., size] over the root of the mean of their squares plus epsilon, times weight [size], all in one
    dtype, computed in float32. kind: "rounded" before it is multiplied, as in Llama; "whole", as in OLMo 2; "offset",
    times 1 + weight, as in Gemma."""
    inputs = inputs.contiguous()
    outputs, size = torch.empty_like(inputs), len(weight)
    function = _function(inputs.dtype, kind)
    call = function.for_numbers(inputs.numel())
    call(inputs, weight, outputs, inputs.numel() // size, size, bits_of_float(epsilon))
    return outputs


@functools.cache
def _function(dtype: torch.dtype, kind: str) -> Function:
    return Function(functools.partial(_write, dtype, kind), 6)


def _write(dtype: torch.dtype, kind: str, code: Code, thread: Value, threads: Value, *arguments: Value) -> None:
    *pointers, rows, size, epsilon = arguments
    inputs, weight, outputs = (code.place(pointer, dtype) for pointer in pointers)
    with code.loop(*share(rows, thread, threads)) as row:
        source, target = inputs[row * size], outputs[row * size]
        squares = Variable(code, code.number(0.0))
        with code.loop(0, size, lanes()) as at:
            numbers = source[at].floats(code.first_lanes(size - at))
            squares.set(code.multiply_add(numbers, numbers, squares.get()))
        mean = code.sum_of(squares.get()) / code.float_of(size)
        factor = code.number(1.0) / code.root(mean + code.float_of_bits(epsilon))
        with code.loop(0, size, lanes()) as at:
            within = code.first_lanes(size - at)
            normal, weights = source[at].floats(within) * factor, weight[at].floats(within)
            normal = code.rounded(normal, dtype) if kind == "rounded" else normal
            target[at].store(normal * (weights + 1.0 if kind == "offset" else weights), within)
