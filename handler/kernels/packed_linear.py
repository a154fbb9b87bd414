"""Products with packed matrices, as fast as memory gives the matrix: of few rows with oneDNN's, and of any number with
16-bit ones that the CPU has no instructions for.

oneDNN reads a part of a matrix, then computes with it, and the next one is still to wait for. Here the next is on its
way meanwhile.

With AMX, oneDNN has another order for bfloat16, of which up to 32 rows are multiplied in tiles (tile_product.py). In
vectors, all else that is multiplied here, a matrix [out, in] lies in panels of 64 of its rows, column by column. In
oneDNN's order two columns of bfloat16 are together, so a step along a panel is 256 bytes of it and 4 bytes of each row
of inputs, whatever the dtype. Of some steps, 16 KB that stay in the smallest cache, all inputs' part is added up before
the next. Six rows' sums are in registers at a time.

Numbers of 16 bits that the CPU cannot multiply become float32 on their way into registers, where few rows take them, or
once for all rows, which then read them out of the cache.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from llvmlite import ir
from torch.nn.functional import pad

from . import tile_product
from .cpu import has_code_for, lanes, multiplies_pairs
from .function import Function, share, written_by
from .machine_code import LINE, Code, Place, Value, Variable
from .panels import PanelWriter
from .tiles import has_tiles

_MOST_ROWS = 128  # with more, oneDNN is as fast (python -m benchmarks.kernels)
_PANEL, _ARGUMENTS = 64, 7
_STEPS_AT_ONCE = 64
_UNROLLED = 4  # steps: what is done once for them is as much as a tenth of all instructions
_ROWS_AT_ONCE = 6
_ROWS_IN_CACHE = 256  # of inputs and of sums, while a panel is read once
_WIDENED_IN_PLACE = 12  # rows, for which a part of a matrix is widened each time that it is read
_NEAR = 0.02  # of the largest number of a product: two orders of a matrix give others altogether

_Product = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def with_few_rows(product: _Product, packed: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> _Product:
    """The product, but of few rows by the code here, where this CPU has some and oneDNN's order is one of those above.

    product: of inputs [..., in] in the dtype of the matrix; times the matrix transposed, plus bias [out], with a GELU
    if one is named, "tanh" or "none"; [..., out]. packed: the matrix [out, in] in oneDNN's order, which is tried.
    """
    for kernels in _kernels(packed.dtype, packed.shape[1]):
        if (multiply := _tried(kernels, product, packed, bias, gelu)) is not None:
            return multiply
    return product


class _Kernels(NamedTuple):
    """For up to so many rows, of matrices in panels of so many; function: of the GELU's name."""

    panel: int
    most_rows: int
    function: Callable[[str | None], Function]


def _kernels(dtype: torch.dtype, columns: int) -> list[_Kernels]:
    """Those for oneDNN's matrices, which lie in the order of one of them, or of none."""
    found: list[_Kernels] = []
    if not has_code_for(dtype):
        return found
    if dtype == torch.bfloat16 and has_tiles() and columns % tile_product.COLUMNS == 0:
        function = partial(written_by, tile_product.TileProduct, _ARGUMENTS)
        found.append(_Kernels(tile_product.PANEL, tile_product.MOST_ROWS, function))
    if dtype == torch.float32 or multiplies_pairs(dtype):
        found.append(_Kernels(_PANEL, _MOST_ROWS, partial(written_by, _VectorProduct, _ARGUMENTS, dtype, False)))
    return found


def _tried(
    kernels: _Kernels, product: _Product, packed: torch.Tensor, bias: torch.Tensor | None, gelu: str | None
) -> _Product | None:
    """The product with these kernels, if the matrix lies in their order."""
    (out, columns), dtype = packed.shape, packed.dtype
    filled = _filled(out, kernels.panel)
    if torch.ops.mkldnn._nbytes(packed) != filled * columns * dtype.itemsize:
        return None
    biases = _whole_bias(bias, filled)
    matrix = torch.ops.mkldnn.data_ptr(packed)

    def multiply_by(function: Function, biases: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.contiguous()
        outputs, rows = inputs.new_empty(*inputs.shape[:-1], out), inputs.numel() // columns
        function(inputs, matrix, biases, outputs, rows, columns, out)
        return outputs

    # Without the bias and the function, which would hide what another order makes of the product.
    tried = torch.arange(columns).sin().to(dtype).unsqueeze(0)
    ours = multiply_by(kernels.function(None), _zeros(filled), tried).float()
    theirs = torch.ops.mkldnn._linear_pointwise(tried, packed, None, "none", [], "").float()
    if not (ours - theirs).abs().max() < _NEAR * theirs.abs().max():
        return None
    function = kernels.function(gelu)

    def multiply(inputs: torch.Tensor, keep: torch.Tensor = packed) -> torch.Tensor:  # `matrix` is its memory
        is_whole = inputs.shape[-1] == columns and inputs.dtype == dtype and inputs.device.type == "cpu"
        if is_whole and 0 < inputs.numel() <= kernels.most_rows * columns:
            return multiply_by(function, biases, inputs)
        return product(inputs)

    return multiply


@torch.no_grad()
def in_panels(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] in panels, [out / 64, in, 64], the last one filled up with zeros."""
    out, columns = matrix.shape
    panels, whole = matrix.new_empty(_filled(out) // _PANEL, columns, _PANEL), out // _PANEL
    panels[:whole] = matrix[: whole * _PANEL].reshape(whole, _PANEL, columns).transpose(1, 2)
    panels[whole:, :, : out % _PANEL] = matrix[whole * _PANEL :].t()
    panels[whole:, :, out % _PANEL :] = 0
    return panels


@torch.no_grad()
def widened_product(panels: torch.Tensor, out: int, bias: torch.Tensor | None, gelu: str | None) -> _Product:
    """The product of inputs [..., in] with a matrix [out, in] of 16-bit numbers, transposed, plus bias [out], with a
    GELU if one is named, "tanh" or "none"; [..., out]. It is computed in float32, and rounded once.

    panels: the matrix, from `in_panels`; inputs and outputs are in its dtype. Raises TypeError for other inputs."""
    columns, dtype = panels.shape[1], panels.dtype
    biases = _whole_bias(bias, _filled(out))
    function = written_by(_VectorProduct, _ARGUMENTS, dtype, True, gelu)

    def multiply(inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[-1] != columns or inputs.dtype != dtype or inputs.device.type != "cpu":
            given = f"{tuple(inputs.shape)} in {inputs.dtype} on {inputs.device.type}"
            raise TypeError(f"inputs of {given} for a matrix of {columns} columns in {dtype} on cpu")
        outputs, rows = inputs.new_empty(*inputs.shape[:-1], out), inputs.numel() // columns
        if rows:
            wide = inputs.float().contiguous()
            function(wide, panels, biases, outputs, rows, columns, out)
        return outputs

    return multiply


def _filled(out: int, panel: int = _PANEL) -> int:
    return -(-out // panel) * panel


def _whole_bias(bias: torch.Tensor | None, filled: int) -> torch.Tensor:
    return _zeros(filled) if bias is None else pad(bias.float(), (0, filled - len(bias)))


@cache
def _zeros(count: int) -> torch.Tensor:
    """One for all matrices of a size that have no bias."""
    return torch.zeros(count, dtype=torch.float32)


class _VectorProduct(PanelWriter):
    """In vectors. widens: whether the matrix is made float32, which inputs are already."""

    def __init__(self, dtype: torch.dtype, widens: bool, gelu: str | None, *given: Value, code: Code):
        self._dtype = torch.float32 if widens else dtype  # of what is multiplied
        super().__init__(dtype, self._dtype, _PANEL, _ROWS_IN_CACHE, gelu, *given, code=code)
        self._widens = widens
        self._in_step = 4 // self._dtype.itemsize  # columns
        self._steps = self._columns // self._in_step
        self._vectors = 4 if lanes() == 16 else 2  # of a step at a time: with six rows' sums, all that registers hold
        self._wide = code.room(_STEPS_AT_ONCE * _PANEL if widens else 0)
        self._adding = {stored: self._functions(stored) for stored in {dtype, self._dtype}}

    def _functions(self, stored: torch.dtype) -> list[ir.Function]:
        """Those that add, of one row, of two rows and so on."""
        kinds = [self._dtype, None, stored, None, torch.float32, self._matrix.dtype, None]
        at_once = _UNROLLED if stored == self._dtype else 1  # where it is widened here, that would gain nothing
        return [
            self._code.function(f"add_{rows}_{stored}", kinds, partial(self._write_adding, rows, at_once))
            for rows in range(1, _ROWS_AT_ONCE + 1)
        ]

    def write(self, thread: Value, threads: Value) -> None:
        """Each thread gets as many rows of panels as the others, of panels one after the other."""
        code, rows = self._code, self._rows
        begin, end = share(self._panels * rows, thread, threads)
        with code.loop(begin // rows, (end + rows - 1) // rows) as panel:
            first = code.most(begin - panel * rows, code.integer(0))
            stop = code.least(end - panel * rows, rows)
            with code.loop(first, stop, _ROWS_IN_CACHE) as row:
                self._write_panel(panel, row, code.least(stop - row, code.integer(_ROWS_IN_CACHE)))

    def _write_sums(self, panel: Value, inputs: Place, count: Value) -> None:
        code = self._code
        with code.loop(0, self._steps, _STEPS_AT_ONCE) as step:
            steps = code.least(code.integer(_STEPS_AT_ONCE), self._steps - step)
            block = self._matrix[(panel * self._steps + step) * (_PANEL * self._in_step)]
            here = inputs[step * self._in_step]
            if self._widens:
                with code.when(count > _WIDENED_IN_PLACE):
                    with code.loop(0, steps * _PANEL, lanes()) as at:
                        self._wide[at].store(block[at].numbers())
                    self._write_block(block, self._wide, steps, here, count)
                with code.when(count < _WIDENED_IN_PLACE + 1):
                    self._write_block(block, block, steps, here, count)
            else:
                self._write_block(block, block, steps, here, count)

    def _write_block(self, block: Place, numbers: Place, steps: Value, inputs: Place, rows: Value) -> None:
        """Add up some steps for all rows, in groups. The next block, which lies behind it, is fetched meanwhile: each
        step fetches as many lines as make it whole, and the last groups none. numbers: the block, or its numbers
        widened."""
        code = self._code
        chunk = self._vectors * lanes()  # of a panel's rows
        groups, chunks = (rows + (_ROWS_AT_ONCE - 1)) // _ROWS_AT_ONCE, _PANEL // chunk
        turns = groups * chunks
        step_lines = _PANEL * self._in_step * block.dtype.itemsize // LINE
        lines = (turns + (step_lines - 1)) // turns
        next_block = block[steps * (_PANEL * self._in_step)]
        with code.loop(0, groups) as group:
            first = rows * group // groups
            count = rows * (group + 1) // groups - first
            for part in range(chunks):
                fetched = (group * chunks + part) * lines  # of each step
                arguments: list[Value | Place] = [
                    inputs[first * self._columns],
                    self._columns,
                    numbers[part * chunk * self._in_step],
                    steps,
                    self._sums[first * _PANEL + part * chunk],
                    next_block[fetched * steps * (LINE // block.dtype.itemsize)],
                    code.where(fetched < step_lines, lines, code.integer(0)),
                ]
                code.call_one(self._adding[numbers.dtype], count, arguments)

    def _write_adding(
        self,
        rows: int,
        steps_at_once: int,
        code: Code,
        inputs: Place,
        columns: Value,
        matrix: Place,
        steps: Value,
        sums: Place,
        ahead: Place,
        lines: Value,
    ) -> None:
        """Of a function that adds so many rows' products, of some vectors of each step, to their sums. columns: of all
        inputs. ahead: what to fetch meanwhile, so many lines each step."""
        in_step, line = self._in_step, LINE // ahead.dtype.itemsize
        unrolled = steps // steps_at_once * steps_at_once
        places = [[sums[row * _PANEL + at * lanes()] for at in range(self._vectors)] for row in range(rows)]
        totals = [[Variable(code, code.number(0.0)) for _ in row] for row in places]

        def add(step: Value) -> None:
            here = matrix[step * (_PANEL * in_step)]
            vectors = [here[at * lanes() * in_step].vector(self._dtype) for at in range(self._vectors)]
            for row, row_totals in enumerate(totals):
                number = inputs[columns * row + step * in_step].spread_bits()
                for vector, total in zip(vectors, row_totals, strict=True):
                    total.set(code.multiply_add(number, vector, total.get(), self._dtype))

        with code.loop(0, unrolled, steps_at_once) as step:
            for least, first, count in ((1, 0, 1), (2, 1, 1), (4, 2, 2)):
                with code.when(lines > least - 1):
                    ahead[(step * lines + first * steps_at_once) * line].fetch(count * steps_at_once * LINE)
            for at in range(steps_at_once):
                add(step + at)
        if steps_at_once > 1:
            with code.loop(unrolled, steps) as step:
                add(step)
        for row_totals, row_places in zip(totals, places, strict=True):
            for total, place in zip(row_totals, row_places, strict=True):
                place.store(place.bits() + total.get())  # sums of sums round less often than one long sum
