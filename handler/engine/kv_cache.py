"""Keys and values of all running sequences: one row a sequence, its tokens at columns 0..length-1.

The cache knows no sequences and no lengths. Before a forward the runner says with `aim` which rows it is for
and where their new tokens go; a forward that fails has therefore changed nothing that anybody relies on.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Columns come in such steps and an eighth more than needed, for they are computed with too; rows double.
_COLUMN_STEP = 32
_SPARE_COLUMNS = 1.125


class Target:
    """Where the keys and values of the next forward belong. Shared by all layers.

    first, rows: the contiguous rows first..first+rows-1 take part.
    past: columns in use before the forward, the longest row's length.
    new: columns the forward adds.
    seen: columns that the model gets and the mask has. All of the store's where each row adds one token: keys and
        values then lie without gaps, and torch.bmm need not copy them first.
    shape: rows and columns the store must have.
    row, step, column: int64 [tokens], unset when all rows are equally long: token i of the forward, found at
        [row - first, step], is written to [row, column].
    """

    def __init__(self) -> None:
        self.first = self.rows = self.past = self.new = self.seen = 0
        self.shape = (0, 0)
        self.row = self.step = self.column = torch.empty(0)
        self.ragged = False


class KVCache(Cache):
    """A transformers cache over rows of a store that is allocated with the first forward and grows in place.

    max_tokens: the most rows x columns that may be allocated.
    max_bytes: the most bytes of all layers together, or None.
    bytes_per_token: an estimate of one token's keys and values in all layers, until they exist.
    """

    def __init__(self, max_tokens: int, max_bytes: int | None, bytes_per_token: int):
        self.target = Target()
        self._max_tokens, self._max_bytes, self._bytes_per_token = max_tokens, max_bytes, bytes_per_token
        super().__init__(layer_class_to_replicate=partial(RowLayer, self))  # type: ignore[arg-type]

    @property
    def max_cells(self) -> int:
        """The most rows x columns that may be allocated."""
        if self._max_bytes is None:
            return self._max_tokens
        real = sum(s.shape[1] * s.shape[3] * s.element_size() for s in self._stores())
        return min(self._max_tokens, self._max_bytes // max(real, self._bytes_per_token))

    def aim(self, first: int, lengths: Sequence[int], counts: Sequence[int], shape: tuple[int, int]) -> int:
        """Direct the next forward to rows first..: row first + i holds lengths[i] tokens, gets counts[i].

        shape: rows and columns that all running rows fill after this step; the store may shrink to that.
        Returns the columns that the attention mask must have.
        """
        target = self.target
        target.first, target.rows, target.shape = first, len(lengths), self._room(*shape)
        target.past, target.new = max(lengths), max(counts)
        # With nothing in the past the library drops a mask that leaves out only columns that are still to come.
        one_each = target.new == 1 and target.past > 0
        target.seen = target.shape[1] if one_each else target.past + target.new
        target.ragged = min(lengths) < target.past
        if target.ragged:
            where = [(r, s, lengths[r] + s) for r in range(len(counts)) for s in range(counts[r])]
            target.row, target.step, target.column = torch.tensor(where).unbind(1)
        return target.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the mask and the first of them, also before there are layers."""
        return self.target.seen, 0

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a row to another row."""
        for store in self._stores():
            store[destination, :, :length] = store[source, :, :length]

    def scrub(self, rows: Sequence[int]) -> None:
        """Zero rows that broke: masked columns still meet a weight of 0 in attention, and 0 x NaN is NaN."""
        for store in self._stores():
            store[[row for row in rows if row < len(store)]] = 0

    def _room(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns to allocate for those that are needed. After a forward that ran out of memory some layers
        have more than others; what all have counts."""
        shapes = [store.shape for store in self._stores()]
        have_rows, have_columns = min((s[0] for s in shapes), default=0), min((s[2] for s in shapes), default=0)
        cells = self.max_cells
        # Where memory ends, a dimension larger than needed gives way.
        if not columns <= have_columns < 2 * columns:
            have_columns = math.ceil(columns * _SPARE_COLUMNS / _COLUMN_STEP) * _COLUMN_STEP
        columns = max(columns, min(have_columns, cells // rows))
        have_rows = have_rows if rows <= have_rows else 2 * have_rows
        return max(rows, min(have_rows, cells // columns)), columns

    def _stores(self) -> list[torch.Tensor]:
        """Keys and values of the layers that exist so far."""
        layers = [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]
        return [store for layer in layers for store in (layer.keys, layer.values)]


class RowLayer(CacheLayerMixin):
    """One layer's store: `keys` and `values` [rows, kv_heads, columns, head_dim] on the layer's device."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: KVCache):
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:0, :, :0], value_states[:0, :, :0]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Store keys and values [rows, kv_heads, new, head_dim]; return them with the past before them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self._cache.target.shape
        if self.keys.shape[0] < rows or self.keys.shape[2] != columns:
            resized = _resized(self.keys, rows, columns), _resized(self.values, rows, columns)
            self.keys, self.values = resized  # both or none: the second may be one too many for the memory
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        target = self._cache.target
        rows = store[target.first : target.first + target.rows]
        if not target.ragged:
            rows[:, :, target.past : target.past + target.new] = new
            return rows[:, :, : target.seen]
        row, step, column = (index.to(store.device) for index in (target.row, target.step, target.column))
        rows[row, :, column] = new[row, :, step]
        if target.new == 1:
            return rows[:, :, : target.seen]
        # Causality is tested by column, so several new tokens must stand in the same columns for all rows
        # while the forward runs. A copy for one layer at a time beats spare columns in every layer for good.
        return torch.cat([rows[:, :, : target.past], new], dim=2)

    def get_seq_length(self) -> int:
        return self._cache.target.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, 0)

    def get_max_length(self) -> int:
        return -1


def _resized(store: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A store of that size with the same content in the same place; zero elsewhere, as in `scrub`."""
    fresh = store.new_zeros(rows, store.shape[1], columns, store.shape[3])
    kept_rows, kept_columns = min(rows, store.shape[0]), min(columns, store.shape[2])
    fresh[:kept_rows, :, :kept_columns] = store[:kept_rows, :, :kept_columns]
    return fresh
