"""Attention by its formula in float64."""

import torch


def tensors(dtype, rows, heads, kv_heads, size, columns, store=None, new=1):
    """A query, and keys and values that are the first columns of a longer store."""
    torch.manual_seed(0)
    made = [torch.randn(rows, kv_heads, store or columns, size).to(dtype)[:, :, :columns] for _ in range(2)]
    return torch.randn(rows, heads, new, size).to(dtype), *made


def exact(query, key, value, visible=None, bias=None, scaling=0.125):
    """visible: [rows or 1, columns], or [rows or 1, new, columns]."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(shared, 1) for tensor in (key, value))
    scores = query.double() @ key.mT * scaling
    if bias is not None:
        scores += bias.double().view(len(query), -1, 1, key.shape[2])
    if visible is not None:
        visible = visible[:, None] if visible.dim() == 2 else visible
        scores = scores.masked_fill(~visible[:, None], torch.finfo(torch.bfloat16).min)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def agree(outputs, expected, dtype, off=2e-6):
    assert outputs.dtype == dtype and outputs.is_contiguous()
    off = {torch.float32: off, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(outputs.double(), expected, rtol=off, atol=off)


def large(dtype):
    """A number that is no less than a tenth of the dtype's greatest one."""
    return torch.finfo(dtype).max / 10


# What neither kernel takes, of query, keys, values and mask, with heads and keys of 4 x 64 and 33 columns of 2 rows.
OTHERS = [
    lambda q, k, v, m: (q[..., :20], k[..., :20], v[..., :20], m),  # no whole vectors
    lambda q, k, v, m: (q, k, v[..., :32], m),
    lambda q, k, v, m: (q.double(), k.double(), v.double(), m),
    lambda q, k, v, m: (q, k, v, m[..., :-1]),
    lambda q, k, v, m: (q, k, v, m.expand(-1, 4, -1, -1)),
    lambda q, k, v, m: (q, k, v, m.double()),
    lambda q, k, v, m: (q[:, :3], k[:, :2], v[:, :2], m),  # heads that are not shared alike
    lambda q, k, v, m: (q, k[:, :, :0], v[:, :, :0], m),
    lambda q, k, v, m: (q[:0], k[:0], v[:0], m),
    lambda q, k, v, m: (q, k.mT.contiguous().mT, v, m),
    lambda q, k, v, m: (q, k[:1], v[:1], m),
    lambda q, k, v, m: (q, k, v[:, :, :-1], m),
    lambda q, k, v, m: (q, k.to("meta"), v, m),
    lambda q, k, v, m: (q.repeat(3, 1, 1, 1), k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1), m),  # masks of two rows
    lambda q, k, v, m: (q, k, v, m.to("meta")),
    lambda q, k, v, m: (q, k, v, m, torch.zeros(8, 1, 34, dtype=q.dtype)),
    lambda q, k, v, m: (q, k, v, m, torch.zeros(8, 1, 33, dtype=torch.float64)),
    lambda q, k, v, m: (q, k, v, m, torch.zeros(8, 1, 33, dtype=q.dtype, device="meta")),
]
