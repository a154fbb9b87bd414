"""Attention as two products of matrices, a block of queries at a time: of scores there never is more than a block's.

In bfloat16, on a CPU that has instructions for it but no AMX, PyTorch's SDPA takes as long as in float32: twice what
these take, for a prompt and for rows that decode. BLOOM's attention goes so in every dtype, on any device: SDPA takes
no ALiBi without making it a mask for all heads. The sizes are right for a CPU's caches; a GPU wants fewer and larger
blocks.

Scores are rounded to the dtype between the products, as in the library's "eager" attention; the softmax counts in
float32 (python -m benchmarks.step, python -m benchmarks.attention). Only what handler/kernels does not take goes so.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from handler.kernels.cpu import has_code_for
from handler.kernels.decode_attention import can_decode, decode_attention
from handler.kernels.prompt_attention import can_attend, prompt_attention
from handler.kernels.tiles import has_tiles
from handler.weights.cpu_linear import cpu_lacks

_FEW_KEYS = 1024  # of all rows and heads: SDPA is through with so few before two products have begun
_BLOCK_QUERIES = 256
_FEW_QUERIES = 16  # in a block that has many keys: they are read so often that SDPA is faster, if it need not copy them
_NOT_HERE = ("softcap", "cache", "position_bias", "is_causal")  # what only some models ask SDPA for
# Of the scores of a block of more than the fewest queries. A prompt of 1,000 tokens of BLOOM-7b1's shape took an H100
# 88 to 141 ms with blocks of 4 MiB, 41 to 57 with 32, and 34 to 43 with 128 and 512.
BLOCK_BYTES, GPU_BLOCK_BYTES = 4 << 20, 32 << 20
# Up to so many queries of a key head are transposed in place of keys, if those have gaps between their heads: oneDNN
# copies such keys, which takes two to four times as long as reading them.
_FEW_TO_TRANSPOSE = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 4}


def use_block_attention() -> None:
    """Let models that are to use SDPA use this where it can and is faster; all of the process's, as the library has one
    table."""
    if has_code_for(torch.float32) or not cpu_lacks(torch.bfloat16):
        AttentionInterface.register("sdpa", attention)


def attention(module, query, key, value, attention_mask, **kwargs):
    """The library's attention function. query [rows, heads, new, size]; key, value [rows, kv heads, columns, size];
    attention_mask [rows or 1, heads or 1, new, columns], booleans or what is to be added; None: causality by column.
    Returns [rows, new, heads, size], and None for weights."""
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not kwargs.get("dropout") and all(kwargs.get(name) is None for name in _NOT_HERE):
        if can_decode(query, key, value, attention_mask):
            return decode_attention(query, key, value, attention_mask, scaling), None
        if _shows_columns(module, query, key, attention_mask) and can_attend(query, key, value, attention_mask):
            return prompt_attention(query, key, value, attention_mask, scaling), None
        if _is_for_products(module, query, key, attention_mask):
            return in_blocks(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    fewest: int = 1,
) -> torch.Tensor:
    """Attention's output, [rows, new, heads, size]; tensors and mask as of `attention`.

    causal: whether a mask shows no query the columns of later ones, so that these can be left out.
    bias: what is added to scores, [rows * heads, 1, columns], of heads that share no keys.
    fewest: queries of a row in a block, unless there are fewer.
    """
    rows, heads, new, size = query.shape
    kv_heads, columns = key.shape[1:3]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    output = query.new_empty(rows, new, heads, value.shape[-1])
    block = max(fewest, min(_BLOCK_QUERIES, _most_scores(query) // (rows * heads * columns)))
    # A part of the columns has gaps between heads. That costs more than it spares where most columns are everyone's.
    cuts = mask is None or (causal and new >= columns // 2)
    for start in range(0, new, block):
        end = min(start + block, new)
        seen = columns - new + end if cuts else columns
        queries = query[:, :, start:end].reshape(rows * kv_heads, -1, size)  # those that share a key head
        scores = _scores(queries, keys[:, :seen], scaling, None if bias is None else bias[..., :seen])
        _mask(scores.view(rows, heads, end - start, seen), mask, start)
        part = torch.bmm(scores.softmax(-1), values[:, :seen])
        output[:, start:end] = part.view(rows, heads, end - start, -1).transpose(1, 2)
    return output


def _scores(queries: torch.Tensor, keys: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> torch.Tensor:
    """queries [matrices, queries, size], keys [matrices, columns, size], bias [matrices, 1, columns] or None; returns
    [matrices, queries, columns]."""
    beta = 0 if bias is None else 1
    bias = queries.new_empty(1) if bias is None else bias
    few = _FEW_TO_TRANSPOSE.get(queries.dtype, 0) if queries.device.type == "cpu" else 0
    if queries.shape[1] > few or keys.is_contiguous():
        return torch.baddbmm(bias, queries, keys.transpose(1, 2), beta=beta, alpha=scaling)
    scores = torch.baddbmm(bias.mT if beta else bias, keys, queries.transpose(1, 2), beta=beta, alpha=scaling)
    return scores.transpose(1, 2).contiguous()


def _most_scores(query: torch.Tensor) -> int:
    return (BLOCK_BYTES if query.device.type == "cpu" else GPU_BLOCK_BYTES) // query.itemsize


def _is_for_products(module, query, key, mask) -> bool:
    rows, heads, new, _ = query.shape
    kv_heads, columns = key.shape[1:3]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or cpu_lacks(query.dtype) or 0 in query.shape:
        return False
    if new == 1:
        return rows * kv_heads * columns > _FEW_KEYS
    if has_tiles() or (mask is not None and mask.shape[2] != new):  # SDPA has tiles, too; one for all queries
        return False
    if heads == kv_heads and _most_scores(query) // (rows * heads * columns) < min(new, _FEW_QUERIES):
        return False
    return _shows_columns(module, query, key, mask)


def _shows_columns(module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a mask says what a query sees, or it sees what is not later. Without a mask the library means other
    columns where there are more of them than queries."""
    return mask is not None or (query.shape[2] == key.shape[2] and getattr(module, "is_causal", True))


def _mask(scores: torch.Tensor, mask: torch.Tensor | None, start: int) -> None:
    """Hide scores [rows, heads, queries, seen columns] of the queries from `start` on. Not infinitely: whoever sees
    nothing sees everything alike."""
    queries, seen = scores.shape[2:]
    least = torch.finfo(scores.dtype).min
    if mask is None:
        later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., seen - queries :].masked_fill_(later, least)
        return
    mask = mask[:, :, start : start + queries, :seen]
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, least)
    else:
        scores.add_(mask.clamp_min(least))
