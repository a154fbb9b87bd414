import pytest
import torch
from llvmlite import ir

from handler.kernels import decode_attention, prompt_attention
from handler.kernels.cpu import cpu_has, has_code_for, lanes
from handler.kernels.machine_code import Code, Value
from handler.kernels.tiles import has_tiles

if not lanes():
    collect_ignore_glob = ["test_*"]  # elsewhere PyTorch's operators do it all


def multiply_add(code, one, other, sum, dtype=torch.float32):
    """What a CPU with AVX512-BF16 does in one instruction."""
    if dtype == torch.float32:
        return code.intrinsic(f"llvm.fma.v{lanes()}f32", code.floats, one.of, other.of, sum.of)
    integers = ir.VectorType(ir.IntType(32), lanes())
    for keep, shift in ((0xFFFF, 16), (0xFFFF0000, 0)):
        numbers = []
        for pairs in (one, other):
            kept = code.ir.and_(code.ir.bitcast(pairs.of, integers), ir.Constant(integers, [keep] * lanes()))
            numbers.append(code.ir.shl(kept, ir.Constant(integers, [shift] * lanes())))
        sum = multiply_add(code, *(Value(code, code.ir.bitcast(number, code.floats)) for number in numbers), sum)
    return sum


@pytest.fixture(params=["float32", "float16", "bfloat16", "bfloat16 in pairs", "bfloat16 in tiles"])
def dtype(request, monkeypatch):
    """bfloat16 both ways, whatever this CPU has; in tiles where it has them."""
    name, _, how = request.param.partition(" ")
    dtype, in_pairs, in_tiles = getattr(torch, name), how != "", how == "in tiles"
    if not has_code_for(dtype) or (in_pairs and lanes() != 16) or (in_tiles and not has_tiles()):
        pytest.skip("not on this CPU")
    monkeypatch.setattr(prompt_attention, "has_tiles", lambda: in_tiles)
    for module in (decode_attention, prompt_attention):
        monkeypatch.setattr(module, "multiplies_pairs", lambda dtype, size: in_pairs and size % (2 * lanes()) == 0)
    if in_pairs and not cpu_has("avx512bf16"):
        monkeypatch.setattr(Code, "multiply_add", multiply_add)
    return dtype


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
