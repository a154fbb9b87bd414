"""Products with int8 matrices in bytes, on CPUs with instructions for them (VNNI), for inputs in bfloat16.

A row of inputs is upper * first + lower * second, where first and second are whole numbers of 8 bits, and upper and
lower belong to the row: so each number has 16 bits, counted from the largest of its row, where bfloat16 has 8 of its
own. Both halves are multiplied with the matrix as rows of one product, whose sums are exact. What a row gives does not
depend on the rows beside it.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from .cpu_linear import padded_rows

_MOST = 127
BYTES_AT_ONCE = 32 << 20  # of what a product makes on its way; more rows take turns


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this CPU's products of bytes are exact: without VNNI two products are added in 16 bits, which saturates.
    It is tried, because oneDNN can be told to leave instructions out."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    inputs, weight = torch.full((2, 64), _MOST), torch.full((64, 64), -_MOST)
    as_stored = torch._int_mm(inputs.to(torch.int8), weight.to(torch.int8).t())
    packed = _packed_product((inputs + 128).to(torch.uint8), pack_bytes(weight.to(torch.int8)), torch.ones(64))
    return torch.equal(as_stored.long(), inputs @ weight.t()) and torch.equal(
        packed.long(), (inputs + 128) @ weight.t()
    )


def pack_bytes(weight: torch.Tensor) -> torch.Tensor:
    """An int8 matrix [out, in] in the order of oneDNN's kernels."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def byte_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows [rows, in] -> [rows, out], for an int8 matrix [out, in] as it is stored, with a scale [out]."""

    def multiply(halves: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(halves.to(torch.int8), weight.t()).float().mul_(scale)

    return _in_turns(rows, len(scale), multiply, 16)


@torch.no_grad()
def packed_byte_product(
    packed: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """As byte_product, for a matrix that pack_bytes has packed. sums: int32 [out], of the numbers in its rows."""
    scale = scale.float()
    excess = 128 * sums.float() * scale  # oneDNN's fast products take unsigned inputs: 128 too much each

    def multiply(halves: torch.Tensor) -> torch.Tensor:
        return _packed_product(halves.add_(128).to(torch.uint8), packed, scale).sub_(excess)

    return lambda rows: _in_turns(rows, len(scale), multiply, 8)


@torch.no_grad()
def _in_turns(
    rows: torch.Tensor, out: int, multiply: Callable[[torch.Tensor], torch.Tensor], out_bytes: int
) -> torch.Tensor:
    """[rows, out] in the dtype of `rows`, for a `multiply` that takes whole numbers [2 * rows, in] in float32 and
    makes `out_bytes` for each number of the output."""
    output = rows.new_empty(len(rows), out)
    # Of the inputs: the rows that are padded, the same in float32, and both halves.
    step = max(1, BYTES_AT_ONCE // (out_bytes * out + 14 * rows.shape[1]))
    if padded_rows(step) > step:  # by an eighth at most
        step = step * 8 // 9
    for part, where in zip(rows.split(step), output.split(step), strict=True):
        where.copy_(_turn(part, multiply))
    return output


def _turn(rows: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Some rows' product in float32; nothing of it is left when the next begin."""
    halves, upper, lower = _halves(pad(rows, (0, 0, 0, padded_rows(len(rows)) - len(rows))))
    first, second = multiply(halves).chunk(2)
    return first.mul_(upper).addcmul_(second, lower)[: len(rows)]


def _halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """first and second [2 * rows, in], one below the other, upper [rows, 1], lower [rows, 1]; all in float32.

    Of a row that is not finite, upper and lower are not finite either.
    """
    rows = rows.float()
    upper = (rows.abs().amax(-1, keepdim=True) / _MOST).clamp_min(torch.finfo(torch.float32).tiny)
    halves = rows.new_empty(2, *rows.shape)
    first, scaled = halves
    torch.div(rows, upper, out=scaled)
    torch.round(scaled, out=first)
    scaled.sub_(first).mul_(2 * _MOST).round_()  # the second half
    return halves.flatten(0, 1), upper, upper / (2 * _MOST)


def _packed_product(inputs: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, in] times a packed matrix transposed, times scale [out]; float32 [rows, out]."""
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
