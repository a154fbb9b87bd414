"""What all kernels of attention of several new tokens a row have in common: the order, and the softmax along the way
(Dao, arXiv:2307.08691), of scores in float32.
"""

import functools
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch

from .attention import LEAST, visible
from .cpu import lanes
from .function import parts, share
from .machine_code import Code, Place, Value, Variable

CHUNK = 96  # queries for which a block of keys is turned once: whole tiles
KEYS = 64  # in a block


class ChunkWriter(ABC):
    """A unit is what a lane has of keys, queries and values: one float32, or two bfloat16, of neighbouring dimensions
    or, in values, of neighbouring columns. at_once: queries in a tile. values_at_once: columns that are added up
    together, the last of which may have no weight."""

    at_once: int
    values_at_once: int

    def __init__(
        self,
        dtype: torch.dtype,
        size: int,
        mask: torch.dtype | None,
        biased: bool,
        pairs: bool,
        *given: Value,
        code: Code,
    ):
        self._code, self._size, self._is_masked, self._is_biased = code, size, mask is not None, biased
        pointers, strides = given[:6], given[6:17]
        self._rows, self._heads, self._kv_heads, self._new, self._columns, scaling = given[17:]
        self._query, self._key, self._value, self._mask, self._bias, self._output = (
            code.place(pointer, kind)
            for pointer, kind in zip(pointers, (dtype, dtype, dtype, mask or dtype, dtype, dtype), strict=True)
        )
        self._query_row, self._query_head, self._query_new = strides[:3]
        self._key_row, self._key_head, self._key_column = strides[3:6]
        self._value_row, self._value_head, self._value_column = strides[6:9]
        self._mask_row, self._mask_new = strides[9:]
        self._scaling = code.float_of_bits(scaling)
        self._pairs, self._computed = pairs, dtype if pairs else torch.float32
        self._in_unit = 4 // self._computed.itemsize
        self._units = size // self._in_unit
        self._width = (4 if lanes() == 16 else 2) * lanes()  # keys or dimensions whose sums registers hold at a time
        self._shared = self._heads // self._kv_heads
        self._queries = code.room(CHUNK * self._units)
        self._positions, self._query_heads = code.integers(CHUNK), code.integers(CHUNK)
        self._sums = code.room(CHUNK * size)
        self._best, self._totals = code.room(CHUNK * lanes()), code.room(CHUNK * lanes())
        self._keys, self._values = code.room(self._units * KEYS), code.room(KEYS // self._in_unit * size)
        self._scores, self._factors = code.room(self.at_once * KEYS), code.room(self.at_once * lanes())

    def write(self, thread: Value, threads: Value) -> None:
        """Chunks of queries that share a key head, first those that see most."""
        code = self._code
        queries, heads = self._new * self._shared, self._rows * self._kv_heads
        chunks = (queries + (CHUNK - 1)) // CHUNK
        with parts(code, chunks * heads, threads) as part, code.loop(*part) as item:
            first = (chunks - 1 - item // heads) * CHUNK
            row, head = item % heads // self._kv_heads, item % self._kv_heads
            self._write_chunk(row, head, first, code.least(queries - first, code.integer(CHUNK)))

    def _write_chunk(self, row: Value, head: Value, first: Value, count: Value) -> None:
        code = self._code
        tiles = (count + (self.at_once - 1)) // self.at_once
        self._write_start(row, head, first, count, tiles)
        stop = self._columns if self._is_masked else self._limit(count - 1)
        key = self._key[row * self._key_row + head * self._key_head]
        value = self._value[row * self._value_row + head * self._value_head]
        mask, bias = self._mask[row * self._mask_row], self._bias[row * self._heads * self._columns]
        with code.loop(0, stop, KEYS) as column:
            keys = code.least(stop - column, code.integer(KEYS))
            with self._when_seen(mask, code.integer(0), count, column, keys):
                self._write_keys(key, column)
                self._write_values(value, column, keys)
                with code.loop(0, tiles) as tile:
                    self._write_fetching(key, value, column + KEYS, share(code.integer(KEYS), tile, tiles))
                    start = tile * self.at_once
                    with self._when_seen(mask, start, code.least(count, start + self.at_once), column, keys):
                        self._write_tile(start, mask[column], bias[column], keys, column)
        self._write_output(row, count)

    def _write_output(self, row: Value, count: Value) -> None:
        """Of who has seen nothing, some numbers."""
        code = self._code
        with code.loop(0, count) as index:
            position, own = self._positions[index].integer(), self._query_heads[index].integer()
            output = self._output[((row * self._new + position) * self._heads + own) * self._size]
            total = code.sum_of(self._totals[index * lanes()].bits())
            factor = code.where(total > 0.0, code.number(1.0) / total, code.number(0.0))
            for at in range(0, self._size, lanes()):
                output[at].store(self._sums[index * self._size + at].bits() * factor)

    def _write_fetching(self, key: Place, value: Place, column: Value, columns: tuple[Value, Value]) -> None:
        """Some columns of the next block are fetched."""
        code, size = self._code, self._size * self._key.dtype.itemsize
        with code.loop(*columns) as index:
            ahead = code.least(column + index, self._columns - 1)
            key[ahead * self._key_column].fetch(size)
            value[ahead * self._value_column].fetch(size)

    def _limit(self, index: Value) -> Value:
        """How many columns a query of the chunk sees at most, where there is no mask."""
        return self._columns - self._new + self._positions[index].integer() + 1

    def _when_seen(
        self, mask: Place, start: Value, stop: Value, column: Value, keys: Value
    ) -> AbstractContextManager[None]:
        """Where some of the queries see some of the keys, which begin at a column."""
        code = self._code
        if not self._is_masked:
            return code.when(self._limit(stop - 1) > column)
        seen = Variable(code, code.number(0.0))
        with code.loop(start, stop) as index:
            of_query = mask[self._positions[index].integer() * self._mask_new + column]
            for at in range(0, KEYS, lanes()):
                is_seen = visible(code, of_query[at], code.first_lanes(keys - at))
                seen.set(code.where(is_seen, code.number(1.0), seen.get()))
        return code.when(code.any_of(seen.get() > 0.0))

    def _write_start(self, row: Value, head: Value, first: Value, count: Value, tiles: Value) -> None:
        """Queries, of which the last is there again until its tile is full, and where they come from."""
        code = self._code
        with code.loop(0, tiles * self.at_once) as index:
            number = first + code.least(index, count - 1)
            position, own = number // self._shared, head * self._shared + number % self._shared
            self._positions[index].store_integer(position)
            self._query_heads[index].store_integer(own)
            source = self._query[row * self._query_row + own * self._query_head + position * self._query_new]
            for at in range(0, self._units, lanes()):
                self._queries[index * self._units + at].store(source[at * self._in_unit].vector(self._computed))
            self._best[index * lanes()].store(code.number(LEAST))
            self._totals[index * lanes()].store(code.number(0.0))
            for at in range(0, self._size, lanes()):
                self._sums[index * self._size + at].store(code.number(0.0))

    def _write_keys(self, key: Place, column: Value) -> None:
        """Units of one dimension of all keys of a block are side by side."""
        code, last = self._code, self._columns - 1
        with code.loop(0, KEYS, lanes()) as at, code.loop(0, self._units, lanes()) as unit:
            vectors = [
                key[code.least(column + at + lane, last) * self._key_column + unit * self._in_unit].vector(
                    self._computed
                )
                for lane in range(lanes())
            ]
            for lane, vector in enumerate(code.transposed(vectors)):
                self._keys[(unit + lane) * KEYS + at].store(vector)

    def _write_values(self, value: Place, column: Value, keys: Value) -> None:
        """Of bfloat16 two columns are put side by side, number by number. Beyond the last one it is there again."""
        code, last = self._code, self._columns - 1
        filled = (keys + (self.values_at_once - 1)) // self.values_at_once * self.values_at_once
        with code.loop(0, filled, self._in_unit) as index:
            place = self._values[index // self._in_unit * self._size]
            one, other = (value[code.least(column + index + n, last) * self._value_column] for n in (0, 1))
            for at in range(0, self._size, lanes() * self._in_unit):
                if not self._pairs:
                    place[at].store(one[at].numbers())
                    continue
                vectors = one[at].bits(), other[at].bits()
                for half in (0, lanes()):
                    both = [number for lane in range(half, half + lanes()) for number in (lane, lane + 2 * lanes())]
                    place[at + half].store(code.shuffle_halves(*vectors, both))

    def _write_tile(self, first: Value, mask: Place, bias: Place, keys: Value, column: Value) -> None:
        code = self._code
        self._write_scores(first)
        with code.loop(0, self.at_once) as index:
            self._write_weights(first + index, index, mask, bias, keys, column)
        for start in range(0, self._size, self._width):
            self._write_sums(first, range(start, min(start + self._width, self._size), lanes()), keys)

    def _write_weights(self, query: Value, index: Value, mask: Place, bias: Place, keys: Value, column: Value) -> None:
        """A query's scores become weights, and what it has so far is to be multiplied by its factor."""
        code, least = self._code, self._code.number(LEAST)
        position = self._positions[query].integer()
        if self._is_biased:
            bias = bias[self._query_heads[query].integer() * self._columns]
        if not self._is_masked:
            keys = code.least(keys, self._limit(query) - column)
        scores, starts = [], range(0, KEYS, lanes())
        for at in starts:
            within = code.first_lanes(keys - at)
            score = self._scores[index * KEYS + at].bits() * self._scaling
            if self._is_biased:
                score = score + bias[at].floats(within)
            if self._is_masked:
                of_query = mask[position * self._mask_new + at]
                if mask.dtype == torch.bool:
                    within = of_query.booleans(within)
                else:
                    score = score + of_query.floats(within)
            scores.append(code.where(within, code.most(score, least), least))
        place, totals = self._best[query * lanes()], self._totals[query * lanes()]
        before = place.bits()
        best = code.most(before, code.most_of(functools.reduce(code.most, scores)))
        factor = code.exp(before - best)
        total = totals.bits() * factor
        for at, score in zip(starts, scores, strict=True):
            weights = code.where(code.first_lanes(keys - at), code.exp(score - best), code.number(0.0))
            total = total + weights
            self._scores[index * KEYS].as_dtype(self._computed)[at].store(weights)
        place.store(best)
        totals.store(total)
        self._factors[index * lanes()].store(factor)

    @abstractmethod
    def _write_scores(self, first: Value) -> None:
        """Products of a tile's queries with a block's keys, [at_once, KEYS]."""

    @abstractmethod
    def _write_sums(self, first: Value, starts: range, keys: Value) -> None:
        """Add up values of some dimensions, times the queries' weights, to what the queries' factors leave of sums."""
