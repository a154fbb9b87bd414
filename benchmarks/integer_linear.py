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
from handler.weights.integer_linear import can_pack, nibbles_to_bytes, pack

BYTES = 100e6  # of 8-bit weights, used in turn, so that no cache holds them
GROUP = 64
SHAPES = ((4096, 1024), (4096, 4096))  # out, in
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)


def milliseconds(product: Callable[[int], object], count: int) -> float:
    """Of one product: the quickest quarter's slowest, because other programs only ever slow it down."""
    product(0)
    times = []
    for index in [*range(count)] * 2:
        started = time.perf_counter()
        product(index)
        times.append(time.perf_counter() - started)
    return round(statistics.quantiles(times, n=4)[0] * 1e3, 2)


def measure(out: int, width: int) -> dict[str, dict[str, float]]:
    """By number of rows and way, milliseconds."""
    count = int(BYTES // (out * width))
    int8 = [torch.randint(-127, 128, (out, width), dtype=torch.int8) for _ in range(count)]
    int4 = [nibbles_to_bytes(torch.randint(0, 16, (out, width))) for _ in range(count)]
    scale = torch.rand(out).bfloat16()
    scales = torch.rand(width // GROUP, out, 2).bfloat16()
    dense = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, width).bfloat16(), 256) for _ in range(count)]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    in_bytes = [packed_byte_product(pack_bytes(w), scale, w.sum(1)) for w in int8] if multiplies_bytes() else []
    packed = [pack(weight) for weight in int4] if can_pack(int4[0], scales) else []
    widened = integer_linear._widened_product
    report = {}
    for rows in ROWS:
        inputs = torch.randn(rows, width).bfloat16()
        ways = {
            "bfloat16 packed": lambda i, x=inputs: multiply(x, dense[i], None, "none", [], ""),
            "int8 kernel": lambda i, x=inputs: torch._weight_int8pack_mm(x, int8[i], scale),
            "int8 widened": lambda i, x=inputs: widened(x, int8[i], scale, False),
            "int4 widened": lambda i, x=inputs: widened(x, int4[i], scales, False),
        }
        if in_bytes:
            ways["int8 as bytes"] = lambda i, x=inputs: byte_product(x, int8[i], scale)
            ways["int8 as bytes, packed"] = lambda i, x=inputs: in_bytes[i](x)
        if packed:
            ways["int4 kernel"] = lambda i, x=inputs: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, packed[i], GROUP, scales
            )
            ways["int4 packed, widened"] = lambda i, x=inputs: widened(x, packed[i], scales, True)
        report[f"{rows} rows"] = {name: milliseconds(way, count) for name, way in ways.items()}
    return report


def main() -> None:
    for out, width in SHAPES:
        name = f"{out} x {width}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, ms"
        print(json.dumps({name: measure(out, width)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
