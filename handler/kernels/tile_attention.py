"""Attention of several new tokens a row, whose products are made in tiles (AMX)."""

from collections.abc import Iterable

import torch

from . import tiles
from .cpu import lanes
from .machine_code import Place, Value
from .prompt_chunks import KEYS, ChunkWriter
from .tiles import UNITS

_SUMS, _LEFT, _RIGHT = range(4), 4, (5, 6, 7)  # registers


class TileAttention(ChunkWriter):
    """Of bfloat16 in pairs."""

    at_once = tiles.TILE_ROWS
    values_at_once = 2 * UNITS

    def write(self, thread: Value, threads: Value) -> None:
        code = self._code
        tiles.configure(code, code.room(UNITS), [tiles.TILE_ROWS] * 8)
        super().write(thread, threads)
        tiles.release(code)

    def _write_scores(self, first: Value) -> None:
        code = self._code
        for tile in _SUMS:
            tiles.zero(code, tile)
        for unit in range(0, self._units, UNITS):
            tiles.load(code, _LEFT, self._queries[first * self._units + unit], self._units)
            self._multiply_left((self._keys[unit * KEYS + tile * UNITS] for tile in _SUMS), KEYS)
        for tile in _SUMS:
            tiles.store(code, tile, self._scores[tile * UNITS], KEYS)

    def _write_sums(self, first: Value, starts: range, keys: Value) -> None:
        code, size = self._code, self._size
        with code.loop(0, self.at_once) as index:
            factor = self._factors[index * lanes()].bits()
            for at in starts:
                place = self._sums[(first + index) * size + at]
                place.store(place.bits() * factor)
        for tile, at in enumerate(starts):
            tiles.load(code, tile, self._sums[first * size + at], size)
        weights = self._scores.as_dtype(torch.bfloat16)
        with code.loop(0, keys, self.values_at_once) as key:
            tiles.load(code, _LEFT, weights[key], 2 * KEYS)
            self._multiply_left((self._values[key // 2 * size + at] for at in starts), size)
        for tile, at in enumerate(starts):
            tiles.store(code, tile, self._sums[first * size + at], size)

    def _multiply_left(self, places: Iterable[Place], stride: int) -> None:
        """Add the left tile's products with those that lie at some places to the sums, one to each."""
        for tile, place in enumerate(places):
            right = _RIGHT[tile % len(_RIGHT)]
            tiles.load(self._code, right, place, stride)
            tiles.multiply_add(self._code, tile, _LEFT, right)
