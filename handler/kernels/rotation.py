"""Rotary position embedding (Su et al., arXiv:2104.09864) in one pass over memory, where the models' own code makes a
dozen operators of it. Each product is rounded, and their sum, as there: the results are equal bit by bit."""

import functools

import torch

from .cpu import has_code_for, lanes
from .function import Function, share
from .machine_code import Code, Place, Value


def can_rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    tensors = query, key, cos, sin
    if any(one.device.type != "cpu" or one.dtype != query.dtype or one.stride()[-1:] != (1,) for one in tensors):
        return False
    if [one.dim() for one in tensors] != [4, 4, 3, 3] or cos.shape != sin.shape or cos.stride() != sin.stride():
        return False
    (rows, _, new, size), per_row = query.shape, (1, query.shape[0])
    is_alike = (key.shape[0], *key.shape[2:]) == (rows, new, size) and cos.shape[1:] == (new, size)
    return is_alike and cos.shape[0] in per_row and size % 2 == 0 and has_code_for(query.dtype)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [rows, heads, new, size] and key [rows, kv heads, new, size], the first half of each vector rotated with
    its second half by the angles whose cosines and sines are cos and sin [1 or rows, new, size]; all in one dtype."""
    (rows, heads, new, size), kv_heads = query.shape, key.shape[1]
    outputs = [one.new_empty(rows, new, one.shape[1], size) for one in (query, key)]
    function = _function(query.dtype, size)
    call = function.for_numbers(query.numel())
    strides = *query.stride()[:3], *key.stride()[:3], 0 if len(cos) == 1 else cos.stride(0), cos.stride(1)
    call(query, key, cos, sin, *outputs, *strides, heads, kv_heads, rows * new, new)
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


@functools.cache
def _function(dtype: torch.dtype, size: int) -> Function:
    return Function(functools.partial(_write, dtype, size), 18)


def _write(dtype: torch.dtype, size: int, code: Code, thread: Value, threads: Value, *arguments: Value) -> None:
    pointers, (*strides, angle_row, angle_step, heads, kv_heads, tokens, new) = arguments[:6], arguments[6:]
    query, key, cos, sin, *outputs = (code.place(pointer, dtype) for pointer in pointers)
    with code.loop(*share(tokens, thread, threads)) as token:
        row, step = token // new, token % new
        angle = row * angle_row + step * angle_step
        for source, output, of_strides, count in (
            (query, outputs[0], strides[:3], heads),
            (key, outputs[1], strides[3:], kv_heads),
        ):
            of_row, of_head, of_step = of_strides
            with code.loop(0, count) as head:
                given = source[row * of_row + head * of_head + step * of_step]
                _write_vector(code, size, given, output[(token * count + head) * size], cos[angle], sin[angle])


def _write_vector(code: Code, size: int, source: Place, output: Place, cos: Place, sin: Place) -> None:
    half = size // 2
    for at in range(0, half, lanes()):
        within = code.first_lanes(code.integer(half - at))
        first, second = source[at].floats(within), source[half + at].floats(within)

        def times(numbers: Value, factors: Place, within: Value = within) -> Value:
            return code.rounded(numbers * factors.floats(within), source.dtype)

        output[at].store(times(first, cos[at]) - times(second, sin[at]), within)
        output[half + at].store(times(second, cos[half + at]) + times(first, sin[half + at]), within)
