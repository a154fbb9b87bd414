"""Attention of several new tokens a row, of keys and values as they lie in the cache.

A block of keys is turned so that its columns are vectors, then multiplied with the queries that see some of it, a tile
of them at a time: six, whose sums stay in registers, or what AMX multiplies (tile_attention.py). What is multiplied is
float32, or bfloat16 where the CPU has instructions for it.
"""

import torch

from .attention import is_enough, is_taken
from .cpu import lanes, multiplies_pairs
from .function import bits_of_float, written_by
from .machine_code import Value, Variable
from .prompt_chunks import CHUNK, KEYS, ChunkWriter
from .tile_attention import TileAttention
from .tiles import has_tiles

_MOST_DIMENSIONS = 512  # of a head: what a chunk of it takes is on the thread's stack


def can_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> bool:
    """Whether `prompt_attention` takes these."""
    rows, heads, new, size = query.shape
    kv_heads, columns = key.shape[1:3]
    if new < 2 or columns < new or size > _MOST_DIMENSIONS or not is_taken(query, key, value, mask, bias):
        return False
    if query.dtype == torch.bfloat16 and has_tiles() and not multiplies_pairs(query.dtype, size):
        return False  # what would be made in float32 here, PyTorch's operators make in tiles
    return is_enough(rows * kv_heads * -(-new * heads // (kv_heads * CHUNK)), columns)


def prompt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention's output, [rows, new, heads, size], of query [rows, heads, new, size], key and value [rows, kv heads,
    columns, size], mask [rows or 1, 1, new, columns], booleans or what is to be added, and bias [rows * heads, 1,
    columns], which is added; all in one dtype. Without a mask the new tokens are the last columns, and see none later
    than themselves."""
    (rows, heads, new, size), (kv_heads, columns) = query.shape, key.shape[1:3]
    output = query.new_empty(rows, new, heads, size)
    bias = None if bias is None else bias.contiguous()
    tensors = (query, key, value, mask, bias, output)
    mask_strides = (0, 0) if mask is None else (0 if len(mask) == 1 else mask.stride(0), mask.stride(2))
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides
    pairs = multiplies_pairs(query.dtype, size)
    kind = query.dtype, size, None if mask is None else mask.dtype, bias is not None, pairs
    function = written_by(TileAttention if pairs and has_tiles() else _VectorAttention, 23, *kind)
    function(
        *tensors,
        *strides,
        *(rows, heads, kv_heads, new, columns, bits_of_float(scaling)),
    )
    return output


class _VectorAttention(ChunkWriter):
    at_once, values_at_once = 6, 2

    def _write_scores(self, first: Value) -> None:
        code = self._code
        width = self._width
        queries = [self._queries[(first + index) * self._units] for index in range(self.at_once)]
        with code.loop(0, KEYS, width) as start:
            sums = [[Variable(code, code.number(0.0)) for _ in range(width // lanes())] for _ in queries]
            with code.loop(0, self._units) as unit:
                place = self._keys[unit * KEYS + start]
                vectors = [place[at * lanes()].bits() for at in range(width // lanes())]
                for query, row in zip(queries, sums, strict=True):
                    number = query[unit].spread_bits()
                    for vector, sum in zip(vectors, row, strict=True):
                        sum.set(code.multiply_add(number, vector, sum.get(), self._computed))
            for index, row in enumerate(sums):
                for at, sum in enumerate(row):
                    self._scores[start + (index * KEYS + at * lanes())].store(sum.get())

    def _write_sums(self, first: Value, starts: range, keys: Value) -> None:
        code = self._code
        places = [[self._sums[(first + index) * self._size + at] for at in starts] for index in range(self.at_once)]
        factors = [self._factors[index * lanes()].bits() for index in range(self.at_once)]
        sums = [
            [Variable(code, place.bits() * factor) for place in row]
            for factor, row in zip(factors, places, strict=True)
        ]
        weights = [self._scores[index * KEYS].as_dtype(self._computed) for index in range(self.at_once)]
        with code.loop(0, keys, self._in_unit) as key:
            value = self._values[key // self._in_unit * self._size]
            vectors = [value[at].bits() for at in starts]
            for weight, query_sums in zip(weights, sums, strict=True):
                number = weight[key].spread_bits()
                for vector, sum in zip(vectors, query_sums, strict=True):
                    sum.set(code.multiply_add(number, vector, sum.get(), self._computed))
        for query_places, query_sums in zip(places, sums, strict=True):
            for place, sum in zip(query_places, query_sums, strict=True):
                place.store(sum.get())
