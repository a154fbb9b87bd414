"""Products a second in two threads, and in as many as `FreeCores` finds free, beside busy processes or alone.

GOMP_SPINCOUNT=20000 python -m benchmarks.threads --busy 1
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from handler.weights.threads import FreeCores

ROWS, OUT, IN, LAYERS, SECONDS = 8, 1536, 576, 100, 4


def rate(cores: FreeCores | None) -> float:
    """Rounds of 100 layers a second."""
    weights = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(OUT, IN), 256) for _ in range(LAYERS)]
    inputs, rounds, end = torch.randn(ROWS, IN), 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        if cores:
            cores.match()
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
        rounds += 1
    return round(rounds / SECONDS, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="threads", description=__doc__)
    parser.add_argument("--busy", type=int, default=1, help="processes that compute beside it (default: 1)")
    args = parser.parse_args()
    most = torch.get_num_threads()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        for _ in range(2):
            torch.set_num_threads(most)
            report = {"always": rate(None)}
            torch.set_num_threads(most)
            print(json.dumps(report | {"matched": rate(FreeCores()), "threads_then": torch.get_num_threads()}))
    finally:
        for process in others:
            process.kill()


if __name__ == "__main__":
    main()
