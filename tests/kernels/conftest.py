import pytest
import torch
from llvmlite import ir

from handler.kernels import decode_attention, prompt_attention
from handler.kernels.cpu import cpu_has, has_code_for, lanes
from handler.kernels.machine_code import Code, Value

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


@pytest.fixture(params=["float32", "float16", "bfloat16", "bfloat16 in pairs"])
def dtype(request, monkeypatch):
    """bfloat16 both ways, whatever this CPU has."""
    name, _, in_pairs = request.param.partition(" ")
    dtype = getattr(torch, name)
    if not has_code_for(dtype) or (in_pairs and lanes() != 16):
        pytest.skip("not on this CPU")
    for module in (decode_attention, prompt_attention):
        monkeypatch.setattr(
            module, "multiplies_pairs", lambda dtype, size: bool(in_pairs) and size % (2 * lanes()) == 0
        )
        monkeypatch.setattr(module, "cpu_has", lambda feature: False, raising=False)  # AMX
    if in_pairs and not cpu_has("avx512bf16"):
        monkeypatch.setattr(Code, "multiply_add", multiply_add)
    return dtype


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
