"""Attention of several new tokens a row, beside the formula in float64."""

import pytest
import torch

from handler.kernels import prompt_attention as module
from handler.kernels.prompt_attention import can_attend, prompt_attention
from tests.kernels.attention import OTHERS, agree, exact, large, tensors


def causal(new, columns):
    """[1, new, columns]: new tokens are the last ones."""
    return torch.ones(1, new, columns, dtype=torch.bool).tril(columns - new)


def as_mask(visible, dtype, is_bool=True):
    mask = visible[:, None]
    return mask if is_bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (12, 1)])
@pytest.mark.parametrize("size", [48, 96, 160])
def test_shapes(dtype, heads, kv_heads, size):
    for new, columns in ((2, 2), (2, 9), (6, 6), (7, 64), (5, 65), (97, 97), (100, 130), (33, 300)):
        query, key, value = tensors(dtype, 2, heads, kv_heads, size, columns, columns + 3, new)
        is_taken = size % 32 == 0 or not module.has_tiles()
        assert can_attend(query, key, value, None) is is_taken
        expected = exact(query, key, value, causal(new, columns))
        agree(prompt_attention(query, key, value, None, 0.125), expected, dtype)
        mask = as_mask(causal(new, columns), dtype)
        assert can_attend(query, key, value, mask) is is_taken
        agree(prompt_attention(query, key, value, mask, 0.125), expected, dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("is_bool", [True, False])
def test_masks_and_biases(dtype, threads, is_bool, biased):
    new, columns = 50, 300
    query, key, value = tensors(dtype, 5, 4, 4, 64, columns, new=new)
    visible = causal(new, columns).repeat(5, 1, 1)
    visible[1, :, :200] = False  # filled up on the left, by blocks and more
    visible[2] &= ~torch.ones(new, columns, dtype=torch.bool).tril(columns - new - 70)  # a window
    visible[3, ..., 250:] = False  # of columns that come later
    visible[4, ::2, ::3] = False
    bias = torch.randn(20, 1, columns).to(dtype) if biased else None
    mask = as_mask(visible, dtype, is_bool)
    assert can_attend(query, key, value, mask, bias)
    agree(prompt_attention(query, key, value, mask, 0.125, bias), exact(query, key, value, visible, bias), dtype)
    one = mask[1:2]  # for all rows
    expected = exact(query, key, value, visible[1:2], bias)
    agree(prompt_attention(query, key, value, one, 0.125, bias), expected, dtype)


def test_an_infinite_mask_hides_too(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 32, 140, new=20)
    visible = causal(20, 140)
    visible[..., :70] = False
    mask = torch.zeros(1, 1, 20, 140, dtype=dtype).masked_fill(~visible[:, None], -torch.inf)
    agree(prompt_attention(query, key, value, mask, 0.125), exact(query, key, value, visible), dtype)


@pytest.mark.parametrize("is_bool", [True, False])
def test_who_sees_nothing_gets_numbers_and_others_are_not_harmed(dtype, is_bool):
    query, key, value = tensors(dtype, 2, 2, 2, 32, 140, new=20)
    visible = causal(20, 140).repeat(2, 1, 1)
    visible[0], visible[1, 3] = False, False
    outputs = prompt_attention(query, key, value, as_mask(visible, dtype, is_bool), 0.125)
    assert outputs.isfinite().all()
    seeing = [index for index in range(20) if index != 3]
    agree(outputs[1, seeing].contiguous(), exact(query, key, value, visible)[1, seeing], dtype)


def test_large_scores_do_not_overflow(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 32, 600, new=40)
    query, key = query * 16, key * 16
    outputs = prompt_attention(query, key, value, None, 0.125)
    agree(outputs, exact(query, key, value, causal(40, 600)), dtype, off=1e-3)


def test_views_with_gaps(dtype):
    _, key, value = tensors(dtype, 3, 4, 4, 64, 50)
    query = torch.randn(3, 7, 4, 3, 64).to(dtype)[..., 0, :].transpose(1, 2)
    expected = exact(query, key, value, causal(7, 50))
    agree(prompt_attention(query, key, value, None, 0.125), expected, dtype)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)  # column by column, all heads of each
    mask = as_mask(causal(7, 60), dtype)[..., 10:]  # of a longer one
    assert can_attend(query, key, value, mask) and not mask.is_contiguous()
    agree(prompt_attention(query, key, value, mask.expand(3, 1, 7, 50), 0.125), expected, dtype)


def test_a_mask_with_more_columns_than_there_are(dtype):
    """As of a store of rows, whose columns beyond are not handed over."""
    query, key, value = tensors(dtype, 2, 2, 2, 64, 70, new=9)
    mask = torch.ones(2, 1, 9, 80, dtype=torch.bool)
    mask[..., :70] = as_mask(causal(9, 70), dtype)
    agree(prompt_attention(query, key, value, mask, 0.125), exact(query, key, value, causal(9, 70)), dtype)


@pytest.mark.parametrize("is_bool", [True, False])
def test_blocks_that_nobody_sees_are_not_read(dtype, is_bool):
    query, key, value = tensors(dtype, 1, 2, 2, 64, 256, new=9)
    visible = torch.zeros(1, 9, 256, dtype=torch.bool)
    visible[..., 64:100] = True
    for tensor in (key, value):
        tensor[:, :, :64] = tensor[:, :, 128:] = torch.nan
    outputs = prompt_attention(query, key, value, as_mask(visible, dtype, is_bool), 0.125)
    agree(outputs, exact(query, key.nan_to_num(), value.nan_to_num(), visible), dtype)


def test_what_is_hidden_weighs_nothing(dtype):
    query, key, value = tensors(dtype, 1, 2, 2, 64, 140, new=9)
    visible = causal(9, 140)
    visible[..., 5:70] = False
    value[:, :, 5:70] = large(dtype)
    outputs = prompt_attention(query, key, value, as_mask(visible, dtype), 0.125)
    agree(outputs, exact(query, key, value, visible), dtype)


def test_a_broken_row_stays_broken_and_others_do_not(dtype):
    query, key, value = tensors(dtype, 3, 2, 2, 64, 40, new=9)
    clean = prompt_attention(query, key, value, None, 0.125)
    key[1, :, 7, 3] = torch.nan
    outputs = prompt_attention(query, key, value, None, 0.125)
    assert outputs[1].isnan().all() and torch.equal(outputs[[0, 2]], clean[[0, 2]])


def test_neighbours_do_not_change_a_row(dtype, threads):
    query, key, value = tensors(dtype, 3, 4, 2, 64, 200, new=120)
    everyone = prompt_attention(query, key, value, None, 0.125)
    for row in range(3):
        own = slice(row, row + 1)
        assert torch.equal(prompt_attention(query[own], key[own], value[own], None, 0.125), everyone[own])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q[:, :, :1], k, v, m[:, :, :1]),  # one token
        lambda q, k, v, m: (q.repeat(1, 1, 17, 1), k, v, None),  # more of them than columns
        *OTHERS,
    ],
)
def test_what_it_does_not_take(dtype, change):
    query, key, value = tensors(dtype, 2, 4, 4, 64, 33, new=2)
    mask = torch.ones(2, 1, 2, 33, dtype=torch.bool)
    assert can_attend(query, key, value, mask, torch.zeros(8, 1, 33, dtype=dtype))
    assert not can_attend(*change(query, key, value, mask))


def test_long_rows_of_fewer_chunks_than_half_the_threads_are_left(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    for columns, heads, new, is_taken in (
        (1024, 1, 5, True), (1025, 8, 5, True), (1025, 7, 5, False), (1025, 4, 97, True),
    ):  # fmt: skip
        query, key, value = tensors(torch.float32, 1, heads, heads, 16, columns, new=new)
        assert can_attend(query, key, value, None) is is_taken


def test_large_heads_are_left():
    """What a chunk of them takes is on a thread's stack."""
    for size, is_taken in ((512, True), (528, False)):
        query, key, value = tensors(torch.float32, 1, 2, 2, size, 9, new=3)
        assert can_attend(query, key, value, None) is is_taken


def test_a_mask_for_all_queries_alike_is_left():
    query, key, value = tensors(torch.float32, 2, 4, 4, 64, 33, new=5)
    assert not can_attend(query, key, value, torch.ones(2, 1, 1, 33, dtype=torch.bool))


def test_with_amx_bfloat16_that_fills_no_pairs_is_left(monkeypatch):
    monkeypatch.setattr(module, "has_tiles", lambda: True)
    monkeypatch.setattr(module, "multiplies_pairs", lambda dtype, size: dtype == torch.bfloat16 and size % 32 == 0)
    for dtype, size, is_taken in ((torch.bfloat16, 80, False), (torch.bfloat16, 64, True), (torch.float32, 80, True)):
        query, key, value = tensors(dtype, 2, 4, 4, size, 33, new=5)
        assert can_attend(query, key, value, None) is is_taken
