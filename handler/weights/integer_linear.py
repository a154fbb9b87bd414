"""Products with matrices of integers: int8 with a scale for each row, int4 with a scale and a zero for each group.

int8: `weight` [out, in], `scale` [out]; a number is weight * scale.
int4: `weight` [out, in / 2] uint8. A byte holds column j in its low half and column j + in / 2 in its high half: so a
    row comes apart in two passes without strides. `scale` [in / group, out, 2] holds scale and zero, as PyTorch's
    kernel wants them; a number is (nibble - 8) * scale + zero.
packed int4: the same bytes in the order of PyTorch's kernel for this CPU. In each block of 64 rows (AVX512) or 32
    (AVX2) a byte holds one column of row r and of the row half a block further on: [out / block, in, block / 2].

Few rows go through PyTorch's kernels, which read the integers once. Those are right in bfloat16 only, and fast there.
Many rows of int8 are multiplied as bytes where the CPU can do that (byte_linear.py), and those of packed int4 by the
kernel too where it is AVX512's. Otherwise a block of the matrix is widened at a time, in a buffer that stays in the
cache, and a dense product does the rest: in bfloat16 for int4 where the CPU has instructions for it, in float32 else
(python -m benchmarks.integer_linear).
"""

from collections.abc import Iterator

import torch

from .byte_linear import byte_product, multiplies_bytes
from .cpu_linear import cpu_lacks

# Rows in a block of PyTorch's packed int4 layout on this CPU; 0 where it has no fast kernel.
_PACKED_BLOCK = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
_FASTEST_BLOCK = 64  # with it PyTorch's int4 kernel is the best for any number of rows
_FEW_ROWS, _FEW_BESIDE_BYTES = 32, 16
_IN_BFLOAT16 = 1 << 20  # elements at a time
_WIDENED = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements at a time: 1 MB in float32; a GPU wants more at once


@torch.no_grad()
def integer_linear(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, packed: bool = False
) -> torch.Tensor:
    """inputs [..., in] times the matrix transposed, plus bias [out]; [..., out] in the dtype of `inputs`."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    out = len(weight)
    in_bfloat16 = rows.device.type == "cpu" and rows.dtype == scale.dtype == torch.bfloat16 and len(rows) > 0
    as_bytes = in_bfloat16 and weight.dtype == torch.int8 and multiplies_bytes()
    few = len(rows) <= (_FEW_BESIDE_BYTES if as_bytes else _FEW_ROWS)
    if in_bfloat16 and packed and (few or _PACKED_BLOCK == _FASTEST_BLOCK):
        group = rows.shape[1] // len(scale)
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, group, scale)
    elif in_bfloat16 and few and weight.dtype == torch.int8 and _are_aligned(rows := rows.contiguous(), weight):
        output = torch._weight_int8pack_mm(rows, weight, scale)
    elif as_bytes:
        output = byte_product(rows, weight, scale)
    else:
        output = _widened_product(rows, weight, scale, packed)
    if bias is not None:
        output += bias
    return output.to(inputs.dtype).view(*inputs.shape[:-1], out)


def can_pack(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether PyTorch's int4 kernel is for this matrix."""
    fits = _PACKED_BLOCK > 0 and len(weight) % _PACKED_BLOCK == 0
    return fits and weight.dtype == torch.uint8 and weight.device.type == "cpu" and scale.dtype == torch.bfloat16


@torch.no_grad()
def pack(weight: torch.Tensor) -> torch.Tensor:
    """An int4 matrix in the order of PyTorch's kernel for this CPU; as many bytes, and no more than few of it twice."""
    packed = torch.empty_like(weight)
    blocks = packed.view(len(weight) // _PACKED_BLOCK, -1, _PACKED_BLOCK // 2)
    columns = weight.new_empty(_PACKED_BLOCK, blocks.shape[1])
    for index in range(len(blocks)):
        _split_nibbles(weight[index * _PACKED_BLOCK : (index + 1) * _PACKED_BLOCK], columns)
        low, high = columns.t().chunk(2, dim=-1)
        torch.bitwise_or(low, high << 4, out=blocks[index])
    return packed


def nibbles_to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    """[out, in] of 0 to 15 -> [out, in / 2], as int4 weights are stored."""
    low, high = nibbles.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _split_nibbles(stored: torch.Tensor, columns: torch.Tensor) -> None:
    """Back again: [rows, in / 2], as stored, into columns [rows, in] of 0 to 15."""
    low, high = columns.chunk(2, dim=1)
    torch.bitwise_and(stored, 15, out=low)
    torch.bitwise_right_shift(stored, 4, out=high)


def _are_aligned(*matrices: torch.Tensor) -> bool:
    """Whether PyTorch's int8 kernel can read every row with instructions that want aligned addresses: it does not
    look, and ends the process with a segmentation fault."""
    return all(matrix.shape[1] % 16 == 0 and matrix.data_ptr() % (16 * matrix.itemsize) == 0 for matrix in matrices)


def _widened_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, packed: bool) -> torch.Tensor:
    """rows [rows, in] -> [rows, out], in their own dtype on a GPU. On the CPU in float32, but int4 as it is stored in
    bfloat16 where rows and scale are and the CPU has instructions for it."""
    on_cpu, is_int4 = rows.device.type == "cpu", weight.dtype == torch.uint8
    whole = on_cpu and is_int4 and not packed and rows.dtype == scale.dtype == torch.bfloat16
    whole = whole and not cpu_lacks(torch.bfloat16)
    rows = rows.to(torch.float32 if on_cpu and not whole else rows.dtype)
    scale = scale.to(rows.dtype)
    output = rows.new_empty(len(rows), len(weight))
    width = rows.shape[1]
    blocks = _widened_packed(weight, scale, width) if packed else _widened_rows(weight, scale, width, whole)
    for where, block in blocks:
        torch.mm(rows, block, out=output[:, where])
    if not is_int4:
        return output.mul_(scale)
    if whole:
        return output
    # What zeros add is the same for all columns of a group: [rows, groups] times [groups, out].
    sums = rows.unflatten(1, (len(scale), -1)).sum(-1)
    return output.addmm_(sums, scale[..., 1] - 8 * scale[..., 0])


def _widened_rows(
    weight: torch.Tensor, scale: torch.Tensor, width: int, whole: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which rows of the matrix, and these rows transposed [in, rows] in the dtype of `scale`. int8 is not scaled. int4
    is scaled and has no zeros yet, or is the numbers as a `whole`: a sum in bfloat16 is not exact enough to add to.
    A block is overwritten by the next."""
    height = max(1, (_IN_BFLOAT16 if whole else _WIDENED[weight.device.type]) // width)
    wide, nibbles = scale.new_empty(height, width), weight.new_empty(height, width)
    if weight.dtype == torch.uint8:
        scales, zeros = (part.t().contiguous().unsqueeze(-1) for part in scale.unbind(-1))  # [out, groups, 1]
    for start in range(0, len(weight), height):
        where = slice(start, start + height)
        part = weight[where]
        block = wide[: len(part)]
        if weight.dtype == torch.int8:
            block.copy_(part)
        else:
            columns = nibbles[: len(part)]
            _split_nibbles(part, columns)
            block.copy_(columns.view(torch.int8).sub_(8) if whole else columns)
            numbers = block.view(len(part), len(scale), -1).mul_(scales[where])
            if whole:
                numbers.add_(zeros[where])
        yield where, block.t()


def _widened_packed(weight: torch.Tensor, scale: torch.Tensor, width: int) -> Iterator[tuple[slice, torch.Tensor]]:
    half = _PACKED_BLOCK // 2
    wide, nibbles = scale.new_empty(width, half), weight.new_empty(width, half)
    scales = scale[..., 0].contiguous().unsqueeze(1)  # [groups, 1, out]: a strided one takes four times as long
    for index, stored in enumerate(weight.view(-1, width, half)):
        for operation, operand, start in (
            (torch.bitwise_and, 15, 2 * index),
            (torch.bitwise_right_shift, 4, 2 * index + 1),
        ):
            where = slice(start * half, (start + 1) * half)
            operation(stored, operand, out=nibbles)
            wide.copy_(nibbles).view(len(scale), -1, half).mul_(scales[..., where])
            yield where, wide
