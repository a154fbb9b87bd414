"""Products a second in a thread for each core, in as many as `FreeCores` finds free, and in as many as the control
group's quota has CPUs: beside busy processes, alone, or with a quota.

    GOMP_SPINCOUNT=20000 python -m benchmarks.threads --busy 1
    GOMP_SPINCOUNT=20000 python -m benchmarks.threads --busy 0 --quota 1    # root, control groups of version 1
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.machine import control_group, inside, processor
from handler.weights.threads import FreeCores
from server.torchserve import cpu_quota

ROWS, OUT, IN, LAYERS, SECONDS = 8, 1536, 576, 100, 4
CPU_GROUPS, PERIOD = Path("/sys/fs/cgroup/cpu"), 100_000  # microseconds


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


@contextmanager
def limited(cpus: float | None) -> Iterator[None]:
    """This process in a control group that may use as much time as so many CPUs have."""
    if cpus is None:
        yield
        return
    group = control_group(CPU_GROUPS / "benchmark-threads", "cpu.cfs_quota_us", int(cpus * PERIOD))
    (group / "cpu.cfs_period_us").write_text(str(PERIOD))
    try:
        with inside(group):
            yield
    finally:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=1, help="processes that compute beside it (default: 1)")
    parser.add_argument("--quota", type=float, help="CPUs whose time it may use")
    args = parser.parse_args()
    print(json.dumps({"processor": processor(), "busy": args.busy, "quota": args.quota}))
    most = torch.get_num_threads()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        with limited(args.quota):
            for _ in range(2):
                torch.set_num_threads(most)
                report = {"one_for_each_core": rate(None)}
                torch.set_num_threads(most)
                report |= {"matched": rate(FreeCores()), "threads_then": torch.get_num_threads()}
                torch.set_num_threads(max(1, int(cpu_quota() or most)))
                print(json.dumps(report | {"as_the_quota_has": rate(None)}), flush=True)
    finally:
        for process in others:
            process.kill()


if __name__ == "__main__":
    main()
