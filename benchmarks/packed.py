"""Linear layers: PyTorch's `linear` beside the product with packed weights, in CPU time of one thread.

    python -m benchmarks.packed
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.packed    # as a processor with AVX2 alone

CPU time, so that it can be measured on a machine that has other things to do.
"""

import json
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from handler.weights import packed
from handler.weights.cpu_linear import cpu_lacks

LAYERS, OUT, IN = 16, 4096, 1024  # in turn, so that no cache holds the weights


def microseconds(products: list[Callable[[torch.Tensor], torch.Tensor]], inputs: torch.Tensor) -> int:
    """Of one layer, the best of four rounds."""
    best = float("inf")
    for _ in range(4):
        started = time.thread_time()
        for product in products:
            product(inputs)
        best = min(best, time.thread_time() - started)
    return round(best / LAYERS * 1e6)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability()}))
    for dtype in (torch.float32, torch.bfloat16):
        if cpu_lacks(dtype):
            continue
        plain = [torch.nn.Linear(IN, OUT, bias=False, dtype=dtype) for _ in range(LAYERS)]
        weights = [layer.weight.clone() for layer in plain]
        for layer in plain:
            packed._pack(layer.weight, [layer])
        report: dict[str, object] = {"dtype": str(dtype)}
        for rows in (1, 4, 8, 16, 32, 256):
            inputs = torch.randn(rows, IN).to(dtype)
            theirs = microseconds([lambda x, w=w: linear(x, w) for w in weights], inputs)
            ours = microseconds(list(plain), inputs)
            report[f"{rows} rows"] = {"linear_us": theirs, "packed_us": ours, "gain": round(theirs / ours, 2)}
        print(json.dumps(report))


if __name__ == "__main__":
    main()
