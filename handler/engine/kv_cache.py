"""Keys and values of all running sequences: one row a sequence, its tokens in columns 0..length-1.

Beside the rows it keeps what they held before (`prefixes`), as far as they leave room.

The cache knows no sequences and no lengths. Before each forward `prepare_forward` says which rows it is for and
where their new tokens go; a forward that fails has therefore changed nothing that anybody relies on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from handler.kernels.scatter import can_scatter, scatter

from .heap import mapping_blocks
from .prefix_cache import Prefix, PrefixCache

# The store has more columns than are needed now, so that it is not copied at every step: the next multiple of
# COLUMN_STEP after an eighth more. Not many more: attention computes with them. Its rows double.
COLUMN_STEP = 32
_SPARE_COLUMNS = 1.125
# By longer steps where forwards are replayed, which are captured for one size: by so many in all, or so many for each
# row, if that is no more than this part of what there may be. Rows that are no more than that part stay.
_LONG_STEP, _LONG_STEP_OF_EACH, _LONG_PART = 512, 128, 16


def replayed_step(rows: int, capacity: int) -> int:
    """Columns that are allocated at once where forwards of so many rows are replayed. capacity: the most rows x columns
    that may be allocated."""
    step = min(max(_LONG_STEP // rows, _LONG_STEP_OF_EACH), capacity // _LONG_PART // rows)
    return max(1, step // COLUMN_STEP) * COLUMN_STEP


def with_spare_columns(columns: int, step: int) -> int:
    """Columns that are allocated, in such steps, where so many are needed and memory does not end."""
    return math.ceil(columns * _SPARE_COLUMNS / step) * step


class ForwardContext:
    """Where the keys and values of one forward belong. Shared by all layers.

    first_row, num_rows: the rows first_row..first_row + num_rows - 1 take part.
    past_length: columns in use before the forward: the longest row's tokens.
    query_length: columns that the forward adds: the most new tokens of any row.
    kv_length: columns of the keys and values that attention gets, and of its mask. Where each row adds one token,
        all columns of the store: keys and values then lie without gaps, and torch.bmm need not copy them first. Not
        where other rows are twice as long.
    store_shape: rows and columns that the store must have.
    passes_over: whether all that was written since `direct_to` would leave out a column that the store does not have.
    is_ragged: whether rows differ in length. Only then are set:
    rows, steps, columns: int64 [tokens], or rows [1], on the CPU unless they are those of `direct_to`. New token i, at
        [rows[i], steps[i]] of the forward's keys, counting rows from first_row, goes to column columns[i] of that row.
    slots: int64 [tokens * kv_heads], where the new tokens go in a store seen as [rows * kv_heads * columns, head_dim];
        by its kv heads, columns and device.
    """

    def __init__(self) -> None:
        self.first_row = self.num_rows = self.past_length = self.query_length = self.kv_length = 0
        self.store_shape = (0, 0)
        self.rows = self.steps = self.columns = torch.empty(0)
        self.slots: dict[tuple, torch.Tensor] = {}
        self.is_ragged = self.passes_over = False


class KVCache(Cache):
    """A transformers cache over rows of a store that is allocated with the first forward and grows in place.

    max_tokens: the most rows x columns that may be allocated.
    max_bytes: the most bytes of all layers together, or None.
    bytes_per_token: an estimate of one token's keys and values in all layers, until they exist.
    """

    def __init__(self, max_tokens: int, max_bytes: int | None, bytes_per_token: int):
        self.context, self.prefixes = ForwardContext(), PrefixCache()
        # Called before keys and values move in memory; set where forwards are captured for the place that they have.
        self.on_move: Callable[[], None] | None = None
        self._max_tokens, self._max_bytes, self._bytes_per_token = max_tokens, max_bytes, bytes_per_token
        super().__init__(layer_class_to_replicate=partial(RowLayer, self))  # type: ignore[arg-type]

    @property
    def capacity_tokens(self) -> int:
        """The most rows x columns that may be allocated."""
        if self._max_bytes is None:
            return self._max_tokens
        return min(self._max_tokens, self._max_bytes // self.bytes_per_token)

    @property
    def bytes_per_token(self) -> int:
        """In all layers, as far as they exist."""
        real = sum(s.shape[1] * s.shape[3] * s.element_size() for s in self._stores())
        return max(real, self._bytes_per_token)

    @property
    def growth(self) -> int:
        """Bytes that the next forward allocates for more rows and columns."""
        more = math.prod(self.context.store_shape) - math.prod(self._allocated)
        return max(0, more) * self.bytes_per_token

    @property
    def growth_is_due(self) -> bool:
        """Whether the next forward makes the stores of another size."""
        return self.context.store_shape != self._allocated

    def direct_to(self, columns: torch.Tensor, row: torch.Tensor | None = None) -> None:
        """Let the forward that is prepared read from tensors where its tokens go.

        columns: int64 [tokens]. row: int64 [1], which all tokens go to; it holds nothing yet, need not be the one that
        the forward is prepared for, and may get more tokens than that. Without it each row gets one token, and is shown
        all that the mask shows, whatever its length.
        """
        context = self.context
        context.is_ragged = context.passes_over = True
        context.columns, context.slots = columns, {}
        if row is None:
            context.past_length = context.kv_length - 1
            context.rows = torch.arange(len(columns), device=columns.device)
        else:
            context.first_row, context.rows = 0, row
            context.query_length = context.kv_length = len(columns)

    def spoil_new_tokens(self) -> None:
        """Make what the prepared forward has written something that no attention overlooks."""
        for layer in self._row_layers():
            layer.spoil_new_tokens()

    def prepare_forward(
        self, first_row: int, lengths: Sequence[int], num_new_tokens: Sequence[int], shape: tuple[int, int]
    ) -> ForwardContext:
        """Direct the next forward to rows first_row..: row first_row + i holds lengths[i] tokens and gets
        num_new_tokens[i].

        shape: rows and columns that all running rows fill after this step; the store may shrink to that.
        """
        context = self.context
        context.first_row, context.num_rows = first_row, len(lengths)
        context.store_shape = self._next_shape(*shape)
        self.prefixes.shrink(self.capacity_tokens - math.prod(context.store_shape))
        context.past_length, context.query_length = max(lengths), max(num_new_tokens)
        # A first token gets no spare columns: where nothing is in the cache yet, the library drops a mask that leaves
        # out only columns that are still to come.
        context.kv_length = context.past_length + context.query_length
        if context.query_length == 1 and context.past_length > 0 and shape[1] < 2 * context.kv_length:
            context.kv_length = context.store_shape[1]
        context.is_ragged = min(lengths) < context.past_length
        if context.is_ragged:
            tokens = [(row, step) for row, count in enumerate(num_new_tokens) for step in range(count)]
            places = [(row, step, lengths[row] + step) for row, step in tokens]
            context.rows, context.steps, context.columns = torch.tensor(places).unbind(1)
            context.slots = {}
        return context

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the mask and the first of them, also before there are layers."""
        return self.context.kv_length, 0

    @property
    def num_rows(self) -> int:
        """Rows that every layer has, empty ones too."""
        return min((len(store) for store in self._stores()), default=0)

    def copy_rows(self, sources: Sequence[int], destinations: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of rows to other rows, all at once: rows may change places."""
        for store in self._stores():
            store[destinations, :, :length] = store[sources, :, :length]

    def parts(self, row: int, length: int) -> list[torch.Tensor]:
        """The first `length` columns of a row, for each store; views."""
        return [store[row, :, :length] for store in self._stores()]

    def keep_prefix(self, row: int, owner: str, token_ids: np.ndarray) -> None:
        """Keep what a row holds of these tokens, its first ones, for other texts of this owner, if there is room."""
        rows, columns = self._allocated
        room = self.capacity_tokens - rows * columns - len(token_ids)
        if room >= 0 and not self.prefixes.has(owner, token_ids):
            self.prefixes.shrink(room)
            parts = [part.clone() for part in self.parts(row, len(token_ids))]
            self.prefixes.add(Prefix(owner, token_ids, parts))

    def reserve(self, shape: tuple[int, int]) -> None:
        """Have the rows and columns that all running rows fill before the next forward makes them."""
        for _ in self._reserved_layers(shape):
            pass

    def use_prefix(self, parts: list[torch.Tensor], length: int, row: int, shape: tuple[int, int]) -> None:
        """Reserve that shape, and write the first `length` columns of parts into a row. Each part is taken out of the
        list: the memory of a prefix that had to make way is free before the next layer needs it."""
        for layer in self._reserved_layers(shape):
            for store in (layer.keys, layer.values):
                store[row, :, :length] = parts.pop(0)[:, :length]

    def _reserved_layers(self, shape: tuple[int, int]) -> Iterator["RowLayer"]:
        """The layers that exist so far, one after the other made as large as is needed."""
        rows, columns = self._next_shape(*shape)
        self.prefixes.shrink(self.capacity_tokens - rows * columns)
        for layer in self._row_layers():
            layer.resize(rows, columns)
            yield layer

    def zero_row(self, row: int) -> None:
        """Zero a row that broke: masked columns still meet a weight of 0 in attention, and 0 x NaN is NaN."""
        for store in self._stores():
            store[row : row + 1] = 0  # none where the store has no such row

    def _next_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns to allocate where so many are needed.

        The columns that are there stay unless they are too few, or twice as many as needed or more; a long step more
        counts as needed. The rows stay unless they are too few, or four times as many; those too where forwards are
        replayed, while columns are enough and all is a small part of what there may be. Where memory ends, the spare
        ones go.
        """
        # After a forward that ran out of memory some layers have grown and others not: what all have counts.
        allocated_rows, allocated_columns = self._allocated
        capacity = self.capacity_tokens
        room = capacity - self.prefixes.num_tokens
        is_small = allocated_rows * allocated_columns <= capacity // _LONG_PART
        stays = self.on_move and is_small and columns <= allocated_columns
        if rows > allocated_rows or (rows <= allocated_rows // 4 and not stays):
            allocated_rows = 2 * min(rows, allocated_rows)
        many = rows if stays else max(rows, allocated_rows)
        step = replayed_step(many, capacity) if self.on_move else COLUMN_STEP
        if columns <= allocated_columns < 2 * (columns + step if step > COLUMN_STEP else columns):
            columns = max(columns, min(allocated_columns, room // rows))
        else:  # prefixes make way for the spare columns too, or the store would be copied for each few tokens
            columns = max(columns, min(with_spare_columns(columns, step), capacity // rows))
        return max(rows, min(allocated_rows, room // columns)), columns

    @property
    def _allocated(self) -> tuple[int, int]:
        """Rows and columns that every layer has."""
        return self.num_rows, min((store.shape[2] for store in self._stores()), default=0)

    def _row_layers(self) -> list["RowLayer"]:
        """The layers that exist so far."""
        return [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]

    def _stores(self) -> list[torch.Tensor]:
        """Their keys and values."""
        return [store for layer in self._row_layers() for store in (layer.keys, layer.values)]


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
        """Store keys and values [rows, kv_heads, query_length, head_dim]; return them with the past before them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.resize(*self._cache.context.store_shape)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def resize(self, rows: int, columns: int) -> None:
        """Have so many rows and columns."""
        if self.keys.shape[0] != rows or self.keys.shape[2] != columns:
            if self._cache.on_move:
                self._cache.on_move()
            resized = _resized(self.keys, rows, columns), _resized(self.values, rows, columns)
            self.keys, self.values = resized  # both or none: the second may be one too many for the memory

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        context = self._cache.context
        rows = store[context.first_row : context.first_row + context.num_rows]
        if context.is_ragged:
            # Whole vectors by one index: several times as fast as an assignment with one for rows and one for columns.
            tokens = new.transpose(1, 2)
            if 1 in (context.query_length, context.num_rows):  # all go somewhere
                tokens = tokens.flatten(0, 1)
            else:
                tokens = tokens[context.rows, context.steps]
            target, slots = store.view(-1, store.shape[3]), self._slots(store)
            if can_scatter(target, slots, tokens):
                scatter(target, slots, tokens)
            else:
                context.passes_over = False
                target.index_copy_(0, slots, tokens.flatten(0, 1))
        else:
            rows[:, :, context.past_length : context.past_length + context.query_length] = new
        if context.is_ragged and context.query_length > 1:
            if context.past_length == 0:
                return new
            # Causality is tested by column, so several new tokens must stand in the same columns for all rows
            # while the forward runs. A copy for one layer at a time beats spare columns in every layer for good.
            return torch.cat([rows[:, :, : context.past_length], new], dim=2)
        return rows[:, :, : context.kv_length]

    def spoil_new_tokens(self) -> None:
        context = self._cache.context
        for store in (self.keys, self.values):
            if context.is_ragged:
                store.view(-1, store.shape[3]).index_fill_(0, self._slots(store), torch.nan)
            else:
                rows = store[context.first_row : context.first_row + context.num_rows]
                rows[:, :, context.past_length : context.past_length + context.query_length] = torch.nan

    def _slots(self, store: torch.Tensor) -> torch.Tensor:
        context, (_, heads, columns, _) = self._cache.context, store.shape
        key = heads, columns, store.device
        if key not in context.slots:
            head = torch.arange(heads, device=context.rows.device)
            of_heads = (context.first_row + context.rows).unsqueeze(1) * heads + head
            context.slots[key] = (of_heads * columns + context.columns.unsqueeze(1)).flatten().to(store.device)
        return context.slots[key]

    def get_seq_length(self) -> int:
        return self._cache.context.past_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, 0)

    def get_max_length(self) -> int:
        return -1


def _resized(store: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A store of that size with the same content in the same place; zero elsewhere, as in `zero_row`."""
    with mapping_blocks():
        fresh = store.new_zeros(rows, store.shape[1], columns, store.shape[3])
    common_rows, common_columns = min(rows, store.shape[0]), min(columns, store.shape[2])
    fresh[:common_rows, :, :common_columns] = store[:common_rows, :, :common_columns]
    return fresh
