"""Keys and values of new tokens, written to their places in the cache."""

import functools

import torch

from .cpu import has_code_for, lanes
from .function import Function, share
from .machine_code import Code, Value


def can_scatter(target: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether `scatter` takes these."""
    if target.dim() != 2 or index.dim() != 1 or source.dim() != 3:
        return False
    is_here = all(one.device.type == "cpu" for one in (target, index, source))
    is_like = source.dtype == target.dtype and has_code_for(target.dtype) and source.shape[2:] == target.shape[1:]
    is_whole = target.is_contiguous() and index.is_contiguous() and source.stride(2) == 1
    return is_here and is_like and is_whole and index.dtype == torch.int64 and len(index) == source.shape[:2].numel()


def scatter(target: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    """target[index[i * heads + head]] = source[i, head], of target [places, size], index [tokens * heads] and source
    [tokens, heads, size]. An index beyond the target is passed over."""
    heads, size = source.shape[1:]
    _function(target.dtype)(target, index, source, *source.stride()[:2], len(index), heads, size, len(target))


@functools.cache
def _function(dtype: torch.dtype) -> Function:
    def write(code: Code, thread: Value, threads: Value, *arguments: Value) -> None:
        of_token, of_head, count, heads, size, places = arguments[3:]
        target, source = (code.place(arguments[at], dtype) for at in (0, 2))
        index = code.place(arguments[1], torch.int64)
        with code.loop(*share(count, thread, threads)) as item:
            place = index[item].integer()
            given = source[item // heads * of_token + item % heads * of_head]
            with code.when(place < places), code.when(place > -1), code.loop(0, size, lanes()) as at:
                within = code.first_lanes(size - at)
                target[place * size + at].store(given[at].floats(within), within)

    return Function(write, 9)
