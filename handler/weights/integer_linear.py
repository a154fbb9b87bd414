"""Products with matrices of integers: int8 with a scale for each row, int4 with a scale and a zero for each group.

int8: `weight` [out, in], `scale` [out]; a number is weight * scale.
int4: `weight` [out, in / 2] uint8, two numbers a byte, in one of two orders. `scale` [in / group, out, 2] holds scale
    and zero, as PyTorch's kernel wants them; a number is (nibble - 8) * scale + zero.
    Plain: a byte holds column j of its row in its low half and column j + in / 2 in its high one.
    In blocks of `row_block` rows: a byte holds one column of row r and of the row half a block further on,
    [out / row_block, in, row_block / 2]. With 64 it is what PyTorch's kernel reads with AVX512, with 32 with AVX2.

Few rows go through PyTorch's kernels, which read the integers once; int4's takes them at any address. They are right in
bfloat16 only, and fast there. Many rows of int8 are multiplied as bytes where the CPU can do that (byte_linear.py).
Otherwise a part of the matrix is widened at a time, in a buffer that stays in the cache, and a dense product does the
rest: in bfloat16 for int4 where the CPU has instructions for it, in float32 else (python -m benchmarks.integer_linear).
"""

import itertools
from collections.abc import Iterator

import torch

from .byte_linear import byte_product, multiplies_bytes
from .cpu_linear import cpu_lacks

# Rows in a block of the order that PyTorch's int4 kernel for this CPU reads; 0 where it has no fast one.
KERNEL_BLOCK = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
_FEW_ROWS, _FEW_BESIDE_BYTES, _FEW_BESIDE_BFLOAT16 = 32, 16, 64
_WIDENED = {torch.float32: 1 << 18, torch.bfloat16: 1 << 20}  # elements at a time on a CPU: 1 and 2 MB
_WIDENED_ON_GPU = 1 << 24


@torch.no_grad()
def integer_linear(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    row_block: int | None = None,
) -> torch.Tensor:
    """inputs [..., in] times the matrix transposed, plus bias [out]; [..., out] in the dtype of `inputs`.

    row_block: of int4 in blocks.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    out = len(weight)
    in_bfloat16 = rows.device.type == "cpu" and rows.dtype == scale.dtype == torch.bfloat16 and len(rows) > 0
    as_bytes = in_bfloat16 and weight.dtype == torch.int8 and multiplies_bytes()
    few = len(rows) <= (_FEW_BESIDE_BYTES if as_bytes else _FEW_ROWS)
    if in_bfloat16 and row_block == KERNEL_BLOCK and _int4_kernel_is_faster(len(rows)):
        group = rows.shape[1] // len(scale)
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, group, scale)
    elif in_bfloat16 and few and weight.dtype == torch.int8 and _are_aligned(rows := rows.contiguous(), weight):
        output = torch._weight_int8pack_mm(rows, weight, scale)
    elif as_bytes:
        output = byte_product(rows, weight, scale)
    else:
        output = _widened_product(rows, weight, scale, row_block)
    if bias is not None:
        output += bias
    return output.to(inputs.dtype).view(*inputs.shape[:-1], out)


def fits_int4_kernel(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether PyTorch's int4 kernel is for this matrix, in blocks of KERNEL_BLOCK rows."""
    fits = KERNEL_BLOCK > 0 and len(weight) % KERNEL_BLOCK == 0
    return fits and weight.dtype == torch.uint8 and weight.device.type == "cpu" and scale.dtype == torch.bfloat16


@torch.no_grad()
def reordered(weight: torch.Tensor, row_block: int | None, new_block: int) -> torch.Tensor:
    """An int4 matrix in blocks of `row_block` rows, or plain, in blocks of `new_block`; as many bytes, and no more than
    few of it twice."""
    result = torch.empty_like(weight)
    height = max(row_block or 1, new_block)
    for part, place in zip(weight.split(height), result.split(height), strict=True):
        place.copy_(nibbles_to_bytes(_nibbles(part, row_block), new_block))
    return result


def nibbles_to_bytes(nibbles: torch.Tensor, row_block: int | None = None) -> torch.Tensor:
    """[out, in] of 0 to 15 -> [out, in / 2], as int4 weights are stored."""
    nibbles = nibbles.to(torch.uint8)
    if row_block is None:
        low, high = nibbles.chunk(2, dim=1)
    else:  # [blocks, in, row_block / 2]
        low, high = nibbles.unflatten(0, (-1, 2, row_block // 2)).transpose(2, 3).unbind(1)
    return (low | high << 4).reshape(len(nibbles), -1)


def _nibbles(stored: torch.Tensor, row_block: int | None) -> torch.Tensor:
    """Back again. What is in blocks lies in memory one column behind the other."""
    low, high = stored & 15, stored >> 4
    if row_block is None:
        return torch.cat((low, high), dim=1)
    blocks = (half.view(-1, 2 * stored.shape[1], row_block // 2) for half in (low, high))
    return torch.cat([*itertools.chain(*zip(*blocks, strict=True))], dim=1).t()


def _int4_kernel_is_faster(rows: int) -> bool:
    """Than widening, for so many rows."""
    if KERNEL_BLOCK < 64:
        return rows <= _FEW_ROWS
    return rows <= _FEW_BESIDE_BFLOAT16 or cpu_lacks(torch.bfloat16)


def _are_aligned(*matrices: torch.Tensor) -> bool:
    """Whether PyTorch's int8 kernel can read every row with instructions that want aligned addresses: it does not
    look, and ends the process with a segmentation fault."""
    return all(matrix.shape[1] % 16 == 0 and matrix.data_ptr() % (16 * matrix.itemsize) == 0 for matrix in matrices)


def _widened_product(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, row_block: int | None
) -> torch.Tensor:
    """rows [rows, in] -> [rows, out], in their own dtype on a GPU. On the CPU in float32, but int4 in bfloat16 where
    rows and scale are and the CPU has instructions for it."""
    is_int4 = weight.dtype == torch.uint8
    in_bfloat16 = is_int4 and rows.dtype == scale.dtype == torch.bfloat16 and not cpu_lacks(torch.bfloat16)
    rows = rows.to(torch.float32 if rows.device.type == "cpu" and not in_bfloat16 else rows.dtype)
    scale = scale.to(rows.dtype)
    output = rows.new_empty(len(rows), len(weight))
    for where, part in _widened(weight, scale, rows.shape[1], row_block):
        torch.mm(rows, part, out=output[:, where])
    if not is_int4:
        return output.mul_(scale)
    if scale.dtype != torch.float32:
        return output
    # What zeros add is the same for all columns of a group: [rows, groups] times [groups, out].
    sums = rows.unflatten(1, (len(scale), -1)).sum(-1)
    return output.addmm_(sums, scale[..., 1] - 8 * scale[..., 0])


def _widened(
    weight: torch.Tensor, scale: torch.Tensor, width: int, row_block: int | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which rows of the matrix, and these rows transposed [in, rows] in the dtype of `scale`. int8 is not scaled. int4
    is the numbers; in float32 without what zeros add, which is less work: a sum in 16 bits is not exact enough to add
    to. A part is overwritten by the next."""
    elements = _WIDENED[scale.dtype] if weight.device.type == "cpu" else _WIDENED_ON_GPU
    height = max(elements // width // (row_block or 1), 1) * (row_block or 1)
    memory = scale.new_empty(height * width)
    zeros_later, is_int4 = scale.dtype == torch.float32, weight.dtype == torch.uint8
    if is_int4:  # [out, groups, 1], in memory as the numbers are: others take four times as long
        both = scale.permute(2, 1, 0)
        scales, zeros = (both.contiguous() if row_block is None else both.mT.contiguous().mT).unsqueeze(-1)
    for start in range(0, len(weight), height):
        where = slice(start, start + height)
        stored = _nibbles(weight[where], row_block) if is_int4 else weight[where]
        if is_int4 and not zeros_later:
            stored = stored.view(torch.int8).sub_(8)
        part = memory[: stored.numel()].as_strided(stored.shape, stored.stride()).copy_(stored)
        if is_int4:
            numbers = part.unflatten(1, (len(scale), -1))
            if zeros_later:
                numbers.mul_(scales[where])
            elif row_block is None:
                numbers.mul_(scales[where]).add_(zeros[where])
            else:  # plain, this takes longer than both of those
                torch.addcmul(zeros[where], numbers, scales[where], out=numbers)
        yield where, part.t()
