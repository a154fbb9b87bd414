"""AMX: eight registers, each of which holds a tile of up to 16 rows of 64 bytes, and products of them.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import ctypes
import functools
import sys
from collections.abc import Sequence

from llvmlite import ir

from .cpu import cpu_has
from .machine_code import I64, Code, Place, Value

TILE_ROWS, TILE_BYTES = 16, 64
UNITS = TILE_BYTES // 4  # in a row: float32, or pairs of bfloat16
_I8, _I16, _VOID = ir.IntType(8), ir.IntType(16), ir.VoidType()
_FIRST_WIDTH, _FIRST_ROWS = 16, 48  # bytes of a configuration before them
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@functools.cache
def has_tiles() -> bool:
    """Whether this process may compute with tiles of bfloat16: Linux gives the room that they take on request."""
    if sys.platform != "linux" or not cpu_has("amx-bf16"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0


def configure(code: Code, room: Place, rows: Sequence[Value | int]) -> None:
    """From here on each register has so many rows, 1 to 16, of 64 bytes. room: for `UNITS` float32."""

    def store(at: int, value: ir.Value) -> None:
        code.ir.store(value, code.ir.gep(room.of, [I64(at)], source_etype=_I8), align=1)

    room.store(code.number(0.0))
    store(0, _I8(1))  # the palette, of which there is one
    for tile, count in enumerate(rows):
        store(_FIRST_WIDTH + 2 * tile, _I16(TILE_BYTES))
        store(_FIRST_ROWS + tile, _I8(count) if isinstance(count, int) else code.ir.trunc(count.of, _I8))
    code.intrinsic("llvm.x86.ldtilecfg", _VOID, room.of)


def release(code: Code) -> None:
    """The system need not keep them any more when it runs another thread."""
    code.intrinsic("llvm.x86.tilerelease", _VOID)


def zero(code: Code, tile: int) -> None:
    code.intrinsic("llvm.x86.tilezero", _VOID, _I8(tile))


def load(code: Code, tile: int, place: Place, stride: Value | int) -> None:
    """stride: of rows, in numbers of the place's dtype."""
    code.intrinsic("llvm.x86.tileloadd64", _VOID, _I8(tile), place.of, _bytes(place, stride))


def store(code: Code, tile: int, place: Place, stride: Value | int) -> None:
    code.intrinsic("llvm.x86.tilestored64", _VOID, _I8(tile), place.of, _bytes(place, stride))


def multiply_add(code: Code, sums: int, left: int, right: int) -> None:
    """Add the product of two tiles of bfloat16, [rows, 32] and 16 rows of pairs, [16, 16, 2], which are [32, 16] with
    every two rows in one, to a tile of float32, [rows, 16]."""
    code.intrinsic("llvm.x86.tdpbf16ps", _VOID, _I8(sums), _I8(left), _I8(right))


def _bytes(place: Place, stride: Value | int) -> ir.Value:
    size = place.dtype.itemsize
    return I64(stride * size) if isinstance(stride, int) else (stride * size).of
