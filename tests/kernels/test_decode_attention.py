"""Attention of one new token a row, beside the formula in float64."""

import pytest
import torch

from handler.kernels.decode_attention import can_decode, decode_attention
from tests.kernels.attention import OTHERS, agree, exact, large, tensors


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("size", [48, 96, 256])
def test_shapes(dtype, heads, kv_heads, size):
    for columns in (1, 2, 15, 17, 256, 257, 700):
        query, key, value = tensors(dtype, 2, heads, kv_heads, size, columns, columns + 3)
        assert can_decode(query, key, value, None)
        agree(decode_attention(query, key, value, None, 0.125), exact(query, key, value), dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("is_bool", [True, False])
def test_masks_and_biases(dtype, threads, is_bool, biased):
    columns = 300
    query, key, value = tensors(dtype, 5, 4, 4, 64, columns)
    visible = torch.arange(columns) < torch.tensor([[1], [16], [150], [299], [300]])
    visible[3, :200] = False  # filled up on the left
    visible[4, ::3] = False
    bias = torch.randn(20, 1, columns).to(dtype) if biased else None
    mask = visible[:, None, None]
    if not is_bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    assert can_decode(query, key, value, mask)
    agree(decode_attention(query, key, value, mask, 0.125, bias), exact(query, key, value, visible, bias), dtype)
    one = mask[3:4]  # for all rows
    agree(decode_attention(query, key, value, one, 0.125, bias), exact(query, key, value, visible[3:4], bias), dtype)


def test_an_infinite_mask_hides_too(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 32, 40)
    visible = torch.arange(40)[None] < 20
    mask = torch.zeros(1, 1, 1, 40, dtype=dtype).masked_fill(~visible, -torch.inf)
    agree(decode_attention(query, key, value, mask, 0.125), exact(query, key, value, visible), dtype)


def test_who_sees_nothing_sees_all_alike(dtype):
    query, key, value = tensors(dtype, 2, 2, 2, 32, 300)
    visible = torch.ones(2, 300, dtype=torch.bool)
    visible[0] = False
    outputs = decode_attention(query, key, value, visible[:, None, None], 0.125)
    agree(outputs[0, 0], value[0].double().mean(1), dtype)


def test_large_scores_do_not_overflow(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 32, 600)
    query, key = query * 16, key * 16
    outputs, expected = decode_attention(query, key, value, None, 0.125), exact(query, key, value)
    agree(outputs, expected, dtype, off=1e-3)  # e to the power of what is off by 1e-7 of some hundreds


def test_views_with_gaps(dtype):
    """As BLOOM's queries come, out of a product of queries, keys and values."""
    _, key, value = tensors(dtype, 3, 4, 4, 64, 50)
    fused = torch.randn(3, 1, 4, 3, 64).to(dtype)
    query = fused[..., 0, :].transpose(1, 2)
    agree(decode_attention(query, key, value, None, 0.125), exact(query, key, value), dtype)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)  # column by column, all heads of each
    assert can_decode(query, key, value, None)
    agree(decode_attention(query, key, value, None, 0.125), exact(query, key, value), dtype)


def test_masks_and_biases_that_share_memory_or_have_gaps(dtype):
    query, key, value = tensors(dtype, 3, 2, 2, 32, 60)
    visible = (torch.arange(60) < 41)[None]
    mask = visible[:, None, None].expand(3, 1, 1, 60)
    bias = torch.randn(60, 6).to(dtype).t()[:, None]
    assert can_decode(query, key, value, mask, bias) and not bias.is_contiguous()
    agree(decode_attention(query, key, value, mask, 0.125, bias), exact(query, key, value, visible, bias), dtype)


def test_long_rows_with_fewer_key_heads_than_half_the_threads_are_left(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    for columns, heads, is_taken in ((1024, 1, True), (1025, 8, True), (1025, 7, False)):
        query, key, value = tensors(torch.float32, 1, heads, heads, 16, columns)
        assert can_decode(query, key, value, None) is is_taken


def test_what_is_hidden_weighs_nothing(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 32, 40)
    visible = torch.arange(40)[None] < 35
    value[:, :, 35:] = large(dtype)
    agree(decode_attention(query, key, value, visible[:, None, None], 0.125), exact(query, key, value, visible), dtype)


@pytest.mark.parametrize("is_bool", [True, False])
def test_what_is_hidden_is_not_read_beyond_the_last_visible_vector(dtype, is_bool):
    query, key, value = tensors(dtype, 2, 2, 2, 32, 200)
    visible = torch.arange(200) < torch.tensor([[64], [200]])
    key[0, :, 64:], value[0, :, 64:] = torch.nan, torch.nan
    mask = visible[:, None, None]
    if not is_bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    outputs = decode_attention(query, key, value, mask, 0.125)
    clean = exact(query, key.nan_to_num(), value.nan_to_num(), visible)
    agree(outputs, clean, dtype)


def test_a_broken_row_stays_broken_and_others_do_not(dtype):
    query, key, value = tensors(dtype, 3, 2, 2, 32, 40)
    clean = decode_attention(query, key, value, None, 0.125)
    key[1, :, 7, 3] = torch.nan
    outputs = decode_attention(query, key, value, None, 0.125)
    assert outputs[1].isnan().all() and torch.equal(outputs[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.expand(-1, -1, 2, -1), k, v, m),  # two tokens
        lambda q, k, v, m: (q.repeat(1, 3, 1, 1), k[:, :1], v[:, :1], m),  # 12 of a key head
        *OTHERS,
    ],
)
def test_what_it_does_not_take(dtype, change):
    query, key, value = tensors(dtype, 2, 4, 4, 64, 33)
    mask = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    assert can_decode(query, key, value, mask, torch.zeros(8, 1, 33, dtype=dtype))
    assert not can_decode(*change(query, key, value, mask))
