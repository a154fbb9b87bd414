"""What all kernels of products with packed matrices have in common.

A matrix [out, in] lies in panels of some of its rows, column by column, or two columns of bfloat16 together.
"""

from abc import ABC, abstractmethod

import torch

from .cpu import lanes
from .machine_code import Code, Place, Value


class PanelWriter(ABC):
    """Writes the function of: inputs, matrix, bias in float32 of whole panels, outputs; rows, columns, out.

    panel: rows of the matrix in one. computed: the dtype of inputs. most_rows: of inputs for a panel at a time."""

    def __init__(
        self,
        dtype: torch.dtype,
        computed: torch.dtype,
        panel: int,
        most_rows: int,
        gelu: str | None,
        *given: Value,
        code: Code,
    ):
        inputs, matrix, bias, outputs, self._rows, self._columns, self._out = given
        self._code, self._panel, self._gelu = code, panel, gelu
        self._inputs, self._bias = code.place(inputs, computed), code.place(bias, torch.float32)
        self._matrix, self._outputs = code.place(matrix, dtype), code.place(outputs, dtype)
        self._panels = (self._out + (panel - 1)) // panel
        self._sums = code.room(most_rows * panel)

    @abstractmethod
    def write(self, thread: Value, threads: Value) -> None:
        """What one of the threads does."""

    @abstractmethod
    def _write_sums(self, panel: Value, inputs: Place, count: Value) -> None:
        """Add products of `count` rows of inputs with a panel to what is in `_sums`, [count, panel]."""

    def _write_panel(self, panel: Value, first: Value, count: Value) -> None:
        """Outputs of a panel for `count` rows of inputs from the first."""
        code, column = self._code, panel * self._panel
        with code.loop(0, count) as row, code.loop(0, self._panel, lanes()) as at:
            self._sums[row * self._panel + at].store(self._bias[column + at].bits())
        self._write_sums(panel, self._inputs[first * self._columns], count)
        outputs, left = self._outputs[first * self._out + column], self._out - column
        with code.loop(0, count) as row, code.loop(0, code.least(code.integer(self._panel), left), lanes()) as at:
            values = self._sums[row * self._panel + at].bits()
            if self._gelu:
                values = code.gelu(values, self._gelu)
            outputs[row * self._out + at].store(values, code.first_lanes(left - at))
