"""What this CPU and this PyTorch have for code of ours."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from llvmlite import binding

OF_THREADS = ("omp_get_thread_num", "omp_get_num_threads")
BARRIER = "GOMP_barrier"
_is_used = True


@functools.cache
def lanes() -> int:
    """float32 numbers in a vector; 0 where nothing is compiled: a CPU other than an x86 with AVX2, another OpenMP than
    GNU's interface, or PyTorch told to leave instructions out."""
    return {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability(), 0) if parallel() else 0


def use_machine_code(is_used: bool) -> None:
    """Whether PyTorch's operators are replaced, in what the process loads and runs from now on. What was packed before
    goes on as it was."""
    global _is_used
    _is_used = is_used


def has_code_for(dtype: torch.dtype) -> bool:
    """Whether numbers of that dtype can be read and computed with, and are to be. Those of 16 bits are widened to
    float32, unless `multiplies_pairs`."""
    is_known = dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and cpu_has("f16c"))
    return _is_used and is_known and lanes() > 0


def multiplies_pairs(dtype: torch.dtype, size: int = 0) -> bool:
    """Whether the CPU multiplies two numbers of that dtype in each lane, and adds them up: bfloat16, with AVX512-BF16.
    size: of what is read whole vectors at a time."""
    return dtype == torch.bfloat16 and lanes() == 16 and cpu_has("avx512bf16") and size % (2 * lanes()) == 0


@functools.cache
def features() -> dict[str, bool]:
    """What this CPU has, by LLVM's names; without AVX512 and what came after it if PyTorch leaves that out."""
    left_out = () if lanes() == 16 else ("avx512", "avx10", "amx")
    return {name: has and not name.startswith(left_out) for name, has in binding.get_host_cpu_features().items()}


def cpu_has(feature: str) -> bool:
    """By LLVM's name."""
    return features().get(feature, False)


@functools.cache
def parallel() -> Callable[..., None] | None:
    """What PyTorch's own parallel loops call: of who has put itself before all others, or of the library that PyTorch
    has loaded; None if it has another."""
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            openmp = ctypes.CDLL(name)  # and what it depends on
            parallel = openmp.GOMP_parallel
            for function in (*OF_THREADS, BARRIER):
                binding.add_symbol(function, ctypes.cast(getattr(openmp, function), ctypes.c_void_p).value)
        except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
            continue
        parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return parallel
    return None
