"""Attention of one new token a row, of keys and values as they lie in the cache.

One query has nothing to share with others, so its two products take as long as reading keys and values; `torch.bmm`
copies these first. Here a row's columns are read once, and not beyond the last one that it sees. The softmax is made
along the way (Milakov and Gimelshein, arXiv:1805.02867), of scores in float32; weights are rounded to bfloat16
where the CPU multiplies that, as in the library's "eager" attention.
"""

import torch

from .attention import LEAST, is_enough, is_taken, visible
from .cpu import lanes, multiplies_pairs
from .function import bits_of_float, parts, written_by
from .machine_code import Code, Place, Value, Variable

_KEYS_AT_ONCE = 256
_MOST_SHARED = 8  # queries of a key head: more make products that torch.bmm is good at
_MOST_SUMS = 24  # vectors that registers hold beside others, with AVX512


def can_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> bool:
    """Whether `decode_attention` takes these, and is worth it."""
    rows, heads, new, _ = query.shape
    kv_heads, columns = key.shape[1:3]
    if new != 1 or not is_taken(query, key, value, mask, bias):
        return False
    return heads // kv_heads <= _MOST_SHARED and is_enough(rows * kv_heads, columns)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention's output, [rows, 1, heads, size], of query [rows, heads, 1, size], key and value [rows, kv heads,
    columns, size], mask [rows or 1, 1, 1, columns], booleans or what is to be added, and bias [rows * heads, 1,
    columns], which is added; all in one dtype."""
    (rows, heads, _, size), (kv_heads, columns) = query.shape, key.shape[1:3]
    output = query.new_empty(rows, 1, heads, size)
    bias = None if bias is None else bias.contiguous()
    tensors = (query, key, value, mask, bias, output)
    mask_row = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    strides = *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], mask_row
    kinds = None if mask is None else mask.dtype, bias is not None, multiplies_pairs(query.dtype, size)
    function = written_by(_Writer, 19, query.dtype, size, heads // kv_heads, *kinds)
    function(
        *tensors,
        *strides,
        *(rows * kv_heads, kv_heads, columns, bits_of_float(scaling)),
    )
    return output


class _Writer:
    """Writes the function for `shared` queries of a key head. A vector of keys or values has one float32 in each lane,
    or two bfloat16 where the CPU multiplies these."""

    def __init__(
        self,
        dtype: torch.dtype,
        size: int,
        shared: int,
        mask: torch.dtype | None,
        biased: bool,
        pairs: bool,
        *given: Value,
        code: Code,
    ):
        self._code, self._dtype, self._size, self._shared = code, dtype, size, shared
        self._is_masked, self._is_biased, self._pairs = mask is not None, biased, pairs
        self._computed = dtype if self._pairs else torch.float32
        pointers, strides, (self._items, self._kv_heads, self._columns, scaling) = given[:6], given[6:15], given[15:]
        self._query, self._key, self._value, self._mask, self._bias, self._output = (
            code.place(pointer, kind)
            for pointer, kind in zip(pointers, (dtype, dtype, dtype, mask or dtype, dtype, dtype), strict=True)
        )
        self._query_row, self._query_head, self._mask_row = strides[0], strides[1], strides[8]
        self._key_row, self._key_head, self._key_column = strides[2:5]
        self._value_row, self._value_head, self._value_column = strides[5:8]
        self._scaling = code.float_of_bits(scaling)
        self._in_vector = 4 * lanes() // self._computed.itemsize
        self._scores, self._sums = code.room(shared * _KEYS_AT_ONCE), code.room(shared * size)
        self._best, self._totals = code.room(shared * lanes()), code.room(shared * lanes())

    def write(self, thread: Value, threads: Value) -> None:
        """Key heads of rows, some of which are longer than others."""
        code, shared = self._code, self._shared
        with parts(code, self._items, threads) as part, code.loop(*part) as item:
            row, head = item // self._kv_heads, item % self._kv_heads
            self._write_item(
                self._query[row * self._query_row + head * shared * self._query_head],
                self._key[row * self._key_row + head * self._key_head],
                self._value[row * self._value_row + head * self._value_head],
                self._mask[row * self._mask_row],
                self._bias[item * shared * self._columns],
                self._output[item * (shared * self._size)],
            )

    def _write_item(self, query: Place, key: Place, value: Place, mask: Place, bias: Place, output: Place) -> None:
        """The queries of a key head of a row."""
        code, shared, size = self._code, self._shared, self._size
        seen = self._seen_columns(mask)
        for room, floats, number in (
            (self._best, shared * lanes(), LEAST),
            (self._totals, shared * lanes(), 0.0),
            (self._sums, shared * size, 0.0),
        ):
            with code.loop(0, floats, lanes()) as at:
                room[at].store(code.number(number))
        with code.loop(0, seen, _KEYS_AT_ONCE) as start:
            count = code.least(seen - start, code.integer(_KEYS_AT_ONCE))
            keys, values = key[start * self._key_column], value[start * self._value_column]
            with code.loop(0, shared) as index:
                self._write_scores(
                    index,
                    query[index * self._query_head],
                    keys,
                    values,
                    mask[start],
                    bias[index * self._columns + start],
                    count,
                )
                self._write_weights(index, count)
            # What comes next are more keys of this head, or the next head's.
            ahead = code.where(start + count < seen, (start + count) * self._key_column, self._key_head)
            at_once = max(1, _MOST_SUMS // (size // lanes())) if lanes() == 16 else 1
            for first in range(0, shared, at_once):
                self._write_sums(range(first, min(first + at_once, shared)), values, key[ahead], count)
        with code.loop(0, shared) as index:
            self._write_output(index, output[index * size])

    def _seen_columns(self, mask: Place) -> Value:
        """How many there are up to the last vector of them that has one that is not hidden; all, if there is none."""
        code, columns, seen = self._code, self._columns, Variable(self._code, self._code.integer(0))
        if not self._is_masked:
            return columns
        with code.loop(0, columns, lanes()) as start:
            within = code.first_lanes(columns - start)
            with code.when(code.any_of(visible(code, mask[start], within))):
                seen.set(code.least(start + lanes(), columns))
        return code.where(seen.get() > 0, seen.get(), columns)

    def _write_scores(
        self, index: Value, query: Place, keys: Place, values: Place, mask: Place, bias: Place, count: Value
    ) -> None:
        """Of one query with `count` keys, as many at a time as there are lanes. Values are fetched meanwhile."""
        code, in_vector = self._code, self._in_vector
        starts = range(0, self._size, in_vector)
        query_parts = [query[start].vector(self._computed) for start in starts]
        least, best = code.number(LEAST), Variable(code, code.number(LEAST))
        with code.loop(0, count, lanes()) as start:
            products = []
            for lane in range(lanes()):
                column = code.least(start + lane, count - 1)
                values[column * self._value_column].fetch(self._size * self._dtype.itemsize)
                key, product = keys[column * self._key_column], code.number(0.0)
                for part, query_part in zip(starts, query_parts, strict=True):
                    product = code.multiply_add(key[part].vector(self._computed), query_part, product, self._computed)
                products.append(product)
            within = code.first_lanes(count - start)
            scores = _sums_of_lanes(code, products) * self._scaling
            if self._is_biased:
                scores = scores + bias[start].floats(within)
            if mask.dtype == torch.bool:
                scores = code.where(mask[start].booleans(within), scores, least)
            elif self._is_masked:
                scores = scores + mask[start].floats(within)
            scores = code.where(within, code.most(scores, least), least)
            best.set(code.most(best.get(), scores))
            self._scores[index * _KEYS_AT_ONCE + start].store(scores)
        place, totals = self._best[index * lanes()], self._totals[index * lanes()]
        before = place.bits()
        place.store(code.most(before, code.most_of(best.get())))
        factor = code.exp(before - place.bits())  # by which all that was added up so far is too much
        totals.store(totals.bits() * factor)
        with code.loop(0, self._size, lanes()) as at:
            sums = self._sums[index * self._size + at]
            sums.store(sums.bits() * factor)

    def _write_weights(self, index: Value, count: Value) -> None:
        """Scores of one query become weights."""
        code, totals = self._code, self._totals[index * lanes()]
        best, total = self._best[index * lanes()].bits(), Variable(code, totals.bits())
        with code.loop(0, count, lanes()) as start:
            scores = self._scores[index * _KEYS_AT_ONCE + start].bits()
            weights = code.where(code.first_lanes(count - start), code.exp(scores - best), code.number(0.0))
            total.set(total.get() + weights)
            self._weight(index, start).store(weights)
        totals.store(total.get())

    def _weight(self, index: Value | int, column: Value) -> Place:
        """Where the score of that column was, or before that."""
        first = index * _KEYS_AT_ONCE
        return self._scores[first].as_dtype(self._computed)[column]

    def _write_sums(self, queries: range, values: Place, ahead: Place, count: Value) -> None:
        """Add up values, times the queries' weights; of bfloat16 two columns at a time. Keys ahead are fetched
        meanwhile."""
        code, size = self._code, self._size
        places = [[self._sums[index * size + at] for at in range(0, size, lanes())] for index in queries]
        sums = [[Variable(code, place.bits()) for place in row] for row in places]
        with code.loop(0, count, 2 if self._pairs else 1) as column:
            columns = [column, code.least(column + 1, count - 1)] if self._pairs else [column]
            for one in columns:
                ahead[one * self._key_column].fetch(size * self._dtype.itemsize)
            parts = self._value_parts([values[one * self._value_column] for one in columns])
            for index, row in zip(queries, sums, strict=True):
                weight = self._weight(index, column).spread_bits()
                for part, sum in zip(parts, row, strict=True):
                    sum.set(code.multiply_add(weight, part, sum.get(), self._computed))
        for row, row_places in zip(sums, places, strict=True):
            for sum, place in zip(row, row_places, strict=True):
                place.store(sum.get())

    def _value_parts(self, columns: list[Place]) -> list[Value]:
        """Vectors of a column's values; or of two columns', side by side, in the order that `_in_order` undoes: four
        numbers of each eight, then the four others, which is one instruction."""
        parts = []
        for at in range(0, self._size, self._in_vector):
            vectors = [column[at].vector(self._computed) for column in columns]
            if not self._pairs:
                parts += vectors
                continue
            for half in (0, 4):
                first = [lane // 4 * 8 + half + lane % 4 for lane in range(lanes())]
                both = [number for lane in first for number in (lane, lane + self._in_vector)]
                parts.append(self._code.shuffle_halves(vectors[0], vectors[1], both))
        return parts

    def _write_output(self, index: Value, output: Place) -> None:
        code = self._code
        factor = code.number(1.0) / code.sum_of(self._totals[index * lanes()].bits())
        starts = range(0, self._size, lanes())
        sums = [self._sums[index * self._size + at].bits() for at in starts]
        for at, part in zip(starts, self._in_order(sums) if self._pairs else sums, strict=True):
            output[at].store(part * factor)

    def _in_order(self, sums: list[Value]) -> list[Value]:
        """What `_value_parts` put apart, side by side again."""
        orders = [
            [n // 8 * 4 + n % 4 + (lanes() if n % 8 >= 4 else 0) for n in range(start, start + lanes())]
            for start in (0, lanes())
        ]
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return [self._code.shuffle(low, high, order) for low, high in pairs for order in orders]


def _sums_of_lanes(code: Code, vectors: list[Value]) -> Value:
    """Of as many vectors as there are lanes: the sum of the first one's lanes, of the second one's, and so on."""
    even, odd = range(0, 2 * lanes(), 2), range(1, 2 * lanes(), 2)
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [code.shuffle(one, other, even) + code.shuffle(one, other, odd) for one, other in pairs]
    return vectors[0]
