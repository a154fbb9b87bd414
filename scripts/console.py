"""What the commands share: errors in one line instead of a traceback, and sizes as people read and write them."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from handler.errors import CheckpointError, LoadError, SettingsError
from handler.settings import parse_size
from server.errors import LaunchError

# GiB that CUDA has on a card, which is less than its name says: nvidia-smi's figure.
GPU_GIBIBYTES = {
    "T4": 15.0, "V100": 16.0, "A10": 22.5, "A10G": 22.5, "L4": 22.5, "RTX4090": 24.0, "A100-40": 40.0, "L40S": 45.0,
    "A100-80": 80.0, "H100": 79.6, "H200": 140.4,
}  # fmt: skip


class UserError(Exception):
    """Something that the person at the terminal can mend; the message is one line that says how."""


def run(main: Callable[[], None]) -> int:
    """Run a command's main; its exit status."""
    try:
        main()
    except (UserError, SettingsError, CheckpointError, LoadError, LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed: {(error.stderr or '').strip()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_size_option(name: str, text: str) -> int:
    """Bytes of a size such as 2GiB. Raises UserError, with the option's name, for anything else."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}; allowed: {error}") from None


def parse_gpus(text: str) -> list[int]:
    """Bytes of each GPU in `2xT4`, `2x16GiB`, `16GiB,24GiB` or `0` (none). Raises UserError for anything else."""
    sizes: list[int] = []
    for part in text.split(",") if text.strip() not in ("", "0") else ():
        match = re.fullmatch(r"\s*(?:(\d+)\s*x)?(.+)", part)
        try:
            name = match[2].strip().upper()  # type: ignore[index]
            size = int(GPU_GIBIBYTES[name] * 2**30) if name in GPU_GIBIBYTES else parse_size(match[2])  # type: ignore[index]
            sizes += [size] * int(match[1] or 1)  # type: ignore[index]
        except (ValueError, TypeError):
            known = ", ".join(GPU_GIBIBYTES)
            raise UserError(f"GPUS is {text!r}: write 2x16GiB, or 16GiB,24GiB, 1xT4 ({known}), or 0 for none") from None
    return sizes


def format_size(size: int) -> str:
    """A number of bytes for people: 1500000 is "1.50MB"."""
    return tqdm.format_sizeof(size, "B")


def require_space(folder: Path, needed: int) -> None:
    """Raises UserError when fewer than `needed` bytes are free on the disk of `folder`, which must exist."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough space on the disk of {folder}: {format_size(needed)} needed, {format_size(free)} free; "
            "free some, or choose an --output-dir on another disk"
        )
