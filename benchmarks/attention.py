"""BLOOM's attention by blocks beside the library's code: milliseconds of one layer of BLOOM-560m's shape, without its
products with weights, the least of five, in turns. Keys have no gaps between heads, as most have when rows decode.

    GOMP_SPINCOUNT=20000 python -m benchmarks.attention    # half a minute
"""

import json
from functools import partial
from types import MethodType

import torch
from torch import nn
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from benchmarks.machine import processor
from benchmarks.running import least_in_turns
from handler.engine.bloom import _attention

HEADS, HIDDEN, TURNS = 16, 1024, 5
CASES = [(32, 1, 96), (32, 5, 1024), (32, 32, 1024), (8, 128, 1024), (1, 1000, 1000), (1, 1024, 2048)]


class Kept:
    """A cache that has all keys and values already."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def update(self, *_):
        return self.keys, self.values


@torch.inference_mode()
def milliseconds(rows: int, new: int, columns: int, dtype: torch.dtype) -> dict[str, float]:
    """Of `new` tokens of each row, the last of `columns`."""
    layer = BloomAttention(BloomConfig(hidden_size=HIDDEN, n_head=HEADS), layer_idx=0).eval()
    layer.query_key_value = layer.dense = nn.Identity()
    fused, residual = torch.randn(rows, new, 3 * HIDDEN, dtype=dtype), torch.randn(rows, new, HIDDEN, dtype=dtype)
    past = Kept(*torch.randn(2, rows, HEADS, columns, HIDDEN // HEADS, dtype=dtype))
    seen = torch.ones(new, columns, dtype=torch.bool).tril(columns - new)
    mask = torch.zeros(rows, 1, new, columns).masked_fill(~seen, torch.finfo(dtype).min).to(dtype)
    alibi = build_alibi_tensor(torch.ones(rows, columns, dtype=torch.long), HEADS, dtype)
    code = {"library": layer.forward, "blocks": MethodType(_attention, layer)}
    calls = {name: partial(forward, fused, residual, alibi, mask, layer_past=past) for name, forward in code.items()}
    return {name: round(value * 1000, 1) for name, value in least_in_turns(calls, TURNS).items()}


def main() -> None:
    print(json.dumps({"processor": processor(), "threads": torch.get_num_threads()}))
    for dtype in (torch.bfloat16, torch.float32):
        for rows, new, columns in CASES:
            of = {"rows": rows, "new": new, "columns": columns, "dtype": str(dtype).removeprefix("torch.")}
            print(json.dumps(of | milliseconds(rows, new, columns, dtype)), flush=True)


if __name__ == "__main__":
    main()
