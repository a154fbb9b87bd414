"""Linear layers of 16-bit weights on a CPU that has no instructions for them.

There, PyTorch's product of many rows in bfloat16 or float16 takes a time in proportion to the rows, as if each
row were alone. Widening the weights to float32, block by block in the cache, costs about as much as four rows, and
then float32's fast product does the rest.
"""

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from handler.kernels.cpu import cpu_has, has_code_for

_WORTH_ROWS = 12  # below, PyTorch's own product is as fast (python -m benchmarks.cpu_linear)
_EXACT_ROWS = 32  # those of decoding steps
_BLOCK_ELEMENTS = 1 << 20  # 4 MB in float32: stays in the cache between being widened and being used


class WideLinear(TorchFunctionMode):
    """While entered, `linear` on the CPU multiplies 16-bit weights in float32 when there are many rows.

    A mode rather than changed modules: Accelerate's hooks hold on to each module's own forward. Results are as
    near to the exact product as PyTorch's, or nearer; they are rounded once, to the weights' dtype.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is linear and not kwargs and _is_slow(*args[:2]):
            return wide_linear(*args)
        return function(*args, **(kwargs or {}))


def cpu_lacks(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products in `dtype`. oneDNN takes bfloat16 wherever there is AVX512, and
    is three times as slow as in float32 where there is no more."""
    if dtype == torch.bfloat16:
        is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        has_instructions = not is_x86 or cpu_has("avx512bf16") or cpu_has("amx-bf16")
        return not (has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def widens(dtype: torch.dtype) -> bool:
    """Whether products with packed matrices in `dtype` are made in float32, by code of ours."""
    return cpu_lacks(dtype) and has_code_for(dtype)


def padded_rows(rows: int) -> int:
    """Rows to multiply for so many, at most an eighth more: oneDNN makes a kernel for each number that it meets, and
    some of its memory is never returned."""
    step = 1 << max(0, rows.bit_length() - 4) if rows > _EXACT_ROWS else 1
    return -(-rows // step) * step


def wide_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """inputs [..., in] times weight [out, in] transposed, plus bias [out]; [..., out] in the dtype of `inputs`."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    block = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    wide = torch.empty(min(block, len(weight)), weight.shape[1])  # one buffer, used for every block
    output = inputs.new_empty(len(rows), len(weight))
    for start in range(0, len(weight), block):
        part = weight[start : start + block]
        product = rows @ wide[: len(part)].copy_(part).t()
        if bias is not None:
            product += bias[start : start + block]
        output[:, start : start + block] = product
    return output.view(*inputs.shape[:-1], len(weight))


def _is_slow(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    rows = inputs.numel() // inputs.shape[-1]
    return weight.device.type == "cpu" and weight.dtype == inputs.dtype and weight.itemsize == 2 and rows >= _WORTH_ROWS
