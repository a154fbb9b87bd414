"""What figures were taken on, and of what."""

import platform
import re
import subprocess
from pathlib import Path

import torch

from handler.weights.cpu_linear import cpu_lacks


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    capability = torch.backends.cpu.get_cpu_capability() + ("" if cpu_lacks(torch.bfloat16) else " with bfloat16")
    return f"{len(names)} x {names[0] if names else platform.processor()}, {capability}"
