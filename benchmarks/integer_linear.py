"""Products with int8 and int4 matrices: PyTorch's kernels, bytes, widening to float32, and the packed 16-bit product
that they replace.

python -m benchmarks.integer_linear
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from handler.weights import integer_linear
from handler.weights.byte_linear import byte_product, multiplies_bytes, pack_bytes, packed_byte_product
from handler.weights.integer_linear import KERNEL_BLOCK, nibbles_to_bytes, reordered
from scripts.quantize import GROUP_SIZES, ROW_BLOCK

BYTES = 100e6  # of 8-bit weights, used in turn, so that no cache holds them
GROUP = GROUP_SIZES["int4"]
SHAPES = ((4096, 1024), (4096, 4096), (16384, 4096), (4096, 16384))  # out, in; the last three are BLOOM-7b1's
ROWS = (1, 8, 32, 64, 128, 256, 512)


def milliseconds(ways: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
    """Of one product of each way, in turn: the quickest quarter's slowest, because other programs only ever slow it
    down."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in [0, *range(count), *range(count)]:
        for name, product in ways.items():
            started = time.perf_counter()
            product(index)
            times[name].append(time.perf_counter() - started)
    return {name: round(statistics.quantiles(of[1:], n=4)[0] * 1e3, 2) for name, of in times.items()}


def measure(out: int, width: int) -> dict[str, dict[str, float]]:
    """By number of rows and way, milliseconds."""
    count = max(2, int(BYTES // (out * width)))
    int8 = [torch.randint(-127, 128, (out, width), dtype=torch.int8) for _ in range(count)]
    int4 = [nibbles_to_bytes(torch.randint(0, 16, (out, width))) for _ in range(count)]
    scale = torch.rand(out).bfloat16()
    scales = torch.rand(width // GROUP, out, 2).bfloat16()
    dense = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, width).bfloat16(), 256) for _ in range(count)]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    in_bytes = [packed_byte_product(pack_bytes(w), scale, w.sum(1)) for w in int8] if multiplies_bytes() else []
    blocks = [reordered(weight, None, ROW_BLOCK) for weight in int4]
    of_kernel = [reordered(weight, ROW_BLOCK, KERNEL_BLOCK) for weight in blocks] if KERNEL_BLOCK else []
    widened = integer_linear._widened_product
    report = {}
    for rows in ROWS:
        inputs = torch.randn(rows, width).bfloat16()
        ways = {
            "bfloat16 packed": lambda i, x=inputs: multiply(x, dense[i], None, "none", [], ""),
            "int8 kernel": lambda i, x=inputs: torch._weight_int8pack_mm(x, int8[i], scale),
            "int8 widened": lambda i, x=inputs: widened(x, int8[i], scale, None),
            "int4 plain, widened": lambda i, x=inputs: widened(x, int4[i], scales, None),
            "int4 in blocks, widened": lambda i, x=inputs: widened(x, blocks[i], scales, ROW_BLOCK),
        }
        if in_bytes:
            ways["int8 as bytes"] = lambda i, x=inputs: byte_product(x, int8[i], scale)
            ways["int8 as bytes, packed"] = lambda i, x=inputs: in_bytes[i](x)
        if of_kernel:
            ways["int4 kernel"] = lambda i, x=inputs: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, of_kernel[i], GROUP, scales
            )
        report[f"{rows} rows"] = milliseconds(ways, count)
    return report


def main() -> None:
    for out, width in SHAPES:
        name = f"{out} x {width}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, ms"
        print(json.dumps({name: measure(out, width)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
