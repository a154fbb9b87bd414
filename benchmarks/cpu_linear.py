"""Linear layers of 16-bit weights: PyTorch's own product beside ours, which widens the weights to float32.

python -m benchmarks.cpu_linear
"""

import json
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from handler.weights.cpu_linear import cpu_lacks, wide_linear

LAYERS, OUT, IN = 20, 4096, 1024  # in turn, so that no cache holds the weights


def microseconds(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, rows: int) -> float:
    """Of one layer, the best of three rounds."""
    weights = [torch.randn(OUT, IN).to(dtype) for _ in range(LAYERS)]
    inputs = torch.randn(rows, IN).to(dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for weight in weights:
            product(inputs, weight)
        best = min(best, time.perf_counter() - started)
    return best / LAYERS * 1e6


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        report: dict[str, object] = {"dtype": str(dtype), "cpu_lacks_instructions": cpu_lacks(dtype)}
        for rows in (1, 4, 8, 12, 16, 32, 256):
            theirs, ours = microseconds(linear, dtype, rows), microseconds(wide_linear, dtype, rows)
            report[f"{rows} rows"] = {
                "pytorch_us": round(theirs),
                "wide_us": round(ours),
                "gain": round(theirs / ours, 2),
            }
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
