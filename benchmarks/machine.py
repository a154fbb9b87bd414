"""What figures were taken on, and of what; control groups of version 1 to take them in."""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from handler.kernels.tiles import has_tiles
from handler.weights.cpu_linear import cpu_lacks


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    capability = torch.backends.cpu.get_cpu_capability() + ("" if cpu_lacks(torch.bfloat16) else " with bfloat16")
    capability += " and AMX" if has_tiles() else ""
    return f"{len(names)} x {names[0] if names else platform.processor()}, {capability}"


def control_group(group: Path, limit: str, value: int) -> Path:
    """The group, made if it is not there, with this limit."""
    group.mkdir(exist_ok=True)
    (group / limit).write_text(str(value))
    return group


@contextmanager
def inside(group: Path) -> Iterator[None]:
    """This process, and what it starts meanwhile, in a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
