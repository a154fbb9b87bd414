"""Products of few rows with oneDNN's matrices of bfloat16, in tiles (AMX).

A matrix [out, in] lies in panels of 32 of its rows there, two tiles for each 32 columns: 2 KB, read one after another.
Up to 32 rows of inputs are two tiles, so all four sums stay in registers for a whole panel, and each part of it is read
once. What lies some KB behind is fetched meanwhile. Of more rows, oneDNN's products are as fast or faster.
"""

import functools

import torch

from . import tiles
from .function import parts
from .machine_code import Code, Place, Value
from .panels import PanelWriter
from .tiles import TILE_ROWS, UNITS

PANEL, COLUMNS, MOST_ROWS = 32, 32, 2 * TILE_ROWS
_LEFT, _RIGHT, _SUMS = (0, 1), (2, 3), ((4, 5), (6, 7))  # registers: of rows, of columns, of both
_AHEAD = 4096 // 2  # numbers of bfloat16


class TileProduct(PanelWriter):
    """For up to 32 rows of inputs, of a multiple of 32 columns."""

    def __init__(self, gelu: str | None, *given: Value, code: Code):
        super().__init__(torch.bfloat16, torch.bfloat16, PANEL, MOST_ROWS, gelu, *given, code=code)
        self._configuration = code.room(UNITS)
        self._tiles_of_rows = (self._rows + (TILE_ROWS - 1)) // TILE_ROWS
        self._first = (self._rows + (self._tiles_of_rows - 1)) // self._tiles_of_rows  # rows in the first tile
        kinds = [torch.bfloat16, None, None, torch.bfloat16, None, torch.float32]
        self._adding = [
            code.function(f"add_{tiles_of_rows}", kinds, functools.partial(self._write_adding, tiles_of_rows))
            for tiles_of_rows in (1, 2)
        ]

    def write(self, thread: Value, threads: Value) -> None:
        code, rows = self._code, self._rows
        first, second = self._first, code.most(rows - self._first, code.integer(1))
        # Of those on the left, on the right, and of sums.
        heights: list[Value | int] = [first, second, TILE_ROWS, TILE_ROWS, first, first, second, second]
        tiles.configure(code, self._configuration, heights)
        with parts(code, self._panels, threads) as part, code.loop(*part) as panel:
            self._write_panel(panel, code.integer(0), rows)
        tiles.release(code)

    def _write_sums(self, panel: Value, inputs: Place, count: Value) -> None:
        matrix = self._matrix[panel * PANEL * self._columns]
        given: list[Value | Place] = [inputs, self._columns, self._first, matrix, self._columns // COLUMNS, self._sums]
        self._code.call_one(self._adding, self._tiles_of_rows, given)

    def _write_adding(
        self,
        tiles_of_rows: int,
        code: Code,
        inputs: Place,
        columns: Value,
        first: Value,
        matrix: Place,
        steps: Value,
        sums: Place,
    ) -> None:
        """Of a function that adds a panel's products with one or two tiles of inputs. first: rows in the first tile."""
        halves = range(PANEL // UNITS)

        def place(tile: int, half: int) -> Place:
            return sums[first * (tile * PANEL) + half * UNITS]

        for tile in range(tiles_of_rows):
            for half in halves:
                tiles.load(code, _SUMS[tile][half], place(tile, half), PANEL)
        with code.loop(0, steps) as step:
            here = matrix[step * (PANEL * COLUMNS)]
            here[_AHEAD].fetch(PANEL * COLUMNS * here.dtype.itemsize, level=1)
            for half in halves:
                tiles.load(code, _RIGHT[half], here[half * UNITS * 2], PANEL * 2)
            for tile in range(tiles_of_rows):
                tiles.load(code, _LEFT[tile], inputs[first * columns * tile + step * COLUMNS], columns)
                for half in halves:
                    tiles.multiply_add(code, _SUMS[tile][half], _LEFT[tile], _RIGHT[half])
        for tile in range(tiles_of_rows):
            for half in halves:
                tiles.store(code, _SUMS[tile][half], place(tile, half), PANEL)
