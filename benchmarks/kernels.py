"""Each of handler/kernels beside what it stands in for: microseconds, the least of eleven, in turns, two threads.

GOMP_SPINCOUNT=20000 python -m benchmarks.kernels    # some minutes
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 GOMP_SPINCOUNT=20000 python -m benchmarks.kernels
"""

import json
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.machine import processor
from benchmarks.running import least_in_turns
from handler.engine.block_attention import in_blocks
from handler.kernels.cpu import has_code_for
from handler.kernels.decode_attention import decode_attention
from handler.kernels.packed_linear import in_panels, widened_product, with_few_rows
from handler.kernels.prompt_attention import prompt_attention
from handler.kernels.rms_norm import rms_norm
from handler.weights.cpu_linear import widens

MATRICES = [(1024, 4096), (4096, 1024), (576, 3072), (1024, 250880)]  # in, out
ROWS = (1, 8, 32, 128, 256)
WIDENED_ROWS = (1, 8, 32, 256)
HEADS = [(1, 16, 16, 96), (8, 16, 16, 96), (32, 16, 16, 96), (32, 16, 16, 1000), (32, 9, 3, 96), (1, 9, 3, 2000)]
PROMPTS = [  # rows, heads, key heads, new tokens, columns
    (1, 16, 16, 1000, 1000),
    (1, 9, 3, 1000, 1000),
    (1, 16, 16, 1024, 2048),
    (8, 16, 16, 128, 1024),
    (32, 16, 16, 5, 1024),
    (32, 9, 3, 32, 32),
]
TURNS, BYTES = 11, 100_000_000  # of matrices that take turns, so that no cache holds them


def microseconds(calls: dict[str, list[Callable[[], object]]]) -> dict[str, int]:
    """Of one of each name's calls, which are made one after the other."""
    rounds = {name: lambda each=each: [call() for call in each] for name, each in calls.items()}
    return {name: round(took / len(calls[name]) * 1e6) for name, took in least_in_turns(rounds, TURNS).items()}


def products(dtype: torch.dtype, columns: int, out: int) -> None:
    count = max(1, BYTES // (columns * out * dtype.itemsize))
    multiply = torch.ops.mkldnn._linear_pointwise.default
    matrices = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, columns).to(dtype), 256) for _ in range(count)]
    theirs = [lambda inputs, packed=packed: multiply(inputs, packed, None, "none", [], "") for packed in matrices]
    ours = [with_few_rows(product, packed, None, None) for product, packed in zip(theirs, matrices, strict=True)]
    for rows in ROWS:
        inputs = torch.randn(rows, columns).to(dtype)
        calls = {"onednn": [partial(f, inputs) for f in theirs], "ours": [partial(f, inputs) for f in ours]}
        report(dtype, {"product": [columns, out], "rows": rows}, calls)


def attention(dtype: torch.dtype, rows: int, heads: int, kv_heads: int, columns: int) -> None:
    size, layers = 64, 8
    query = torch.randn(rows, heads, 1, size).to(dtype)
    stores = torch.randn(layers, 2, rows, kv_heads, columns, size).to(dtype)
    mask = (torch.arange(columns) < torch.randint(columns // 2, columns, (rows, 1)))[:, None, None]
    sdpa = partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    calls = {
        "sdpa": [partial(sdpa, query, key, value) for key, value in stores],
        "ours": [partial(decode_attention, query, key, value, mask, size**-0.5) for key, value in stores],
    }
    report(dtype, {"rows": rows, "heads": heads, "kv_heads": kv_heads, "columns": columns}, calls)


def widened_products(dtype: torch.dtype, columns: int, out: int) -> None:
    """Of 16 bits that the CPU has no instructions for: as oneDNN makes them, out of float32, and ours."""
    count = max(1, BYTES // (columns * out * dtype.itemsize))
    multiply = torch.ops.mkldnn._linear_pointwise.default
    matrices = [torch.randn(out, columns).to(dtype) for _ in range(count)]
    onednn = [torch.ops.mkldnn._reorder_linear_weight(matrix, 256) for matrix in matrices] if is_taken(dtype) else []
    wide = [torch.ops.mkldnn._reorder_linear_weight(matrix.float(), 256) for matrix in matrices]
    ours = [widened_product(in_panels(matrix), out, None, None) for matrix in matrices]
    for rows in WIDENED_ROWS:
        inputs = torch.randn(rows, columns).to(dtype)
        numbers = inputs.float()
        calls = {
            "onednn": [partial(multiply, inputs, matrix, None, "none", [], "") for matrix in onednn],
            "onednn_float32": [partial(multiply, numbers, matrix, None, "none", [], "") for matrix in wide],
            "ours": [partial(product, inputs) for product in ours],
        }
        report(
            dtype,
            {"widened_product": [columns, out], "rows": rows},
            {name: each for name, each in calls.items() if each},
        )


def is_taken(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prompts(dtype: torch.dtype, rows: int, heads: int, kv_heads: int, new: int, columns: int) -> None:
    size, layers = 64, 4
    query = torch.randn(rows, heads, new, size).to(dtype)
    stores = torch.randn(layers, 2, rows, kv_heads, columns, size).to(dtype)
    mask = torch.ones(new, columns, dtype=torch.bool).tril(columns - new).repeat(rows, 1, 1, 1)
    sdpa = partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    calls = {
        "sdpa": [partial(sdpa, query, key, value) for key, value in stores],
        "two products": [partial(in_blocks, query, key, value, mask, size**-0.5, causal=True) for key, value in stores],
        "ours": [partial(prompt_attention, query, key, value, mask, size**-0.5) for key, value in stores],
    }
    report(dtype, {"rows": rows, "heads": heads, "kv_heads": kv_heads, "new": new, "columns": columns}, calls)


def norms(dtype: torch.dtype, rows: int) -> None:
    module, inputs = LlamaRMSNorm(576).to(dtype), torch.randn(rows, 1, 576).to(dtype)
    ours = partial(rms_norm, inputs, module.weight, module.variance_epsilon, "rounded")
    report(dtype, {"norm": 576, "rows": rows}, {"library": [partial(module, inputs)] * 50, "ours": [ours] * 50})


def report(dtype: torch.dtype, what: dict[str, object], calls: dict[str, list[Callable[[], object]]]) -> None:
    print(json.dumps({"dtype": str(dtype).removeprefix("torch.")} | what | microseconds(calls)), flush=True)


@torch.inference_mode()
def main() -> None:
    print(json.dumps({"processor": processor(), "threads": torch.get_num_threads()}))
    torch.manual_seed(0)
    for dtype in filter(has_code_for, (torch.bfloat16, torch.float32)):
        for matrix in MATRICES:
            (widened_products if widens(dtype) else products)(dtype, *matrix)
        for heads in HEADS:
            attention(dtype, *heads)
        for prompt in PROMPTS:
            prompts(dtype, *prompt)
        for rows in (1, 32, 256):
            norms(dtype, rows)


if __name__ == "__main__":
    main()
