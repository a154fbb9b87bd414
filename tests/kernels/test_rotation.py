"""Rotary embeddings beside the library's own code: equal bit by bit."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from handler.kernels.rotation import can_rotate, rotate

theirs = modeling_llama.apply_rotary_pos_emb


def made(dtype, rows=2, heads=3, kv_heads=1, new=4, size=64, angle_rows=None):
    torch.manual_seed(0)
    query = torch.randn(rows, new, heads, size).to(dtype).transpose(1, 2)
    key = torch.randn(rows, new, kv_heads, size).to(dtype).transpose(1, 2)
    angles = torch.rand(rows if angle_rows is None else angle_rows, new, size) * 6
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


@torch.no_grad()
def check(given):
    assert can_rotate(*given)
    for output, expected in zip(rotate(*given), theirs(*given), strict=True):
        assert output.dtype == expected.dtype and torch.equal(output, expected)


@pytest.mark.parametrize("size", [2, 6, 30, 32, 64, 80, 128])
def test_sizes(dtype, size):
    check(made(dtype, size=size))


@pytest.mark.parametrize("rows, heads, kv_heads, new", [(1, 1, 1, 1), (32, 9, 3, 1), (3, 4, 4, 70), (40, 16, 2, 3)])
@pytest.mark.parametrize("angle_rows", [None, 1])
def test_shapes(dtype, threads, rows, heads, kv_heads, new, angle_rows):
    check(made(dtype, rows, heads, kv_heads, new, angle_rows=angle_rows))


def test_no_tokens(dtype):
    check(made(dtype, new=0))


def test_tensors_with_gaps(dtype):
    query, key, cos, sin = made(dtype)
    joint = torch.cat([query, key, query], dim=1).contiguous()
    both = torch.stack([cos, sin], dim=1)
    check((joint[:, :3], joint[:, 3:4], both[:, 0], both[:, 1]))


def test_what_is_not_finite(dtype):
    query, key, cos, sin = made(dtype)
    query[0, 0, 0, 3], key[1, 0, 2, 40] = torch.nan, torch.inf
    outputs, expected = rotate(query, key, cos, sin), theirs(query, key, cos, sin)
    assert all(torch.equal(o.isnan(), e.isnan()) for o, e in zip(outputs, expected, strict=True))


def test_what_it_does_not_take(dtype):
    query, key, cos, sin = made(dtype)
    assert can_rotate(query, key, cos, sin)
    assert not can_rotate(query.double(), key.double(), cos.double(), sin.double())
    assert not can_rotate(query, key, cos.double(), sin.double())
    assert not can_rotate(query.to("meta"), key, cos, sin)
    assert not can_rotate(query, key, cos[..., :32], sin[..., :32])  # a part of each head
    assert not can_rotate(query, key[..., :32], cos, sin)
    assert not can_rotate(query, key[:1], cos, sin)
    assert not can_rotate(query, key, cos[:, :1], sin[:, :1])
    assert not can_rotate(query, key, cos, sin[:1])
    assert not can_rotate(query, key, cos, sin.transpose(0, 1).contiguous().transpose(0, 1))
    assert not can_rotate(query, key, torch.cat([cos, cos]), torch.cat([sin, sin]))
    assert not can_rotate(query, key, cos.unsqueeze(1), sin.unsqueeze(1))
    assert not can_rotate(query.repeat_interleave(2, -1)[..., ::2], key, cos, sin)
    assert not can_rotate(query[..., :63], key[..., :63], cos[..., :63], sin[..., :63])
