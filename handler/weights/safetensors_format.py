"""The safetensors format, as its README has it: a length, a header in JSON, the tensors' bytes."""

import json
from pathlib import Path
from typing import Any

import torch

DTYPES = {  # by the format's names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and at which byte the tensors begin. Raises OSError, and ValueError for no JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
