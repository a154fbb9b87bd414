"""Vectors written to the places that an index names, beside PyTorch's operator."""

import pytest
import torch

from handler.kernels.scatter import can_scatter, scatter


@pytest.mark.parametrize("tokens, heads, size", [(1, 1, 1), (3, 2, 64), (8, 3, 80), (32, 4, 15)])
def test_places(dtype, threads, tokens, heads, size):
    torch.manual_seed(0)
    target = torch.randn(tokens * heads * 3, size).to(dtype)
    joint = torch.randn(tokens, heads * 2, size + 1).to(dtype)
    source, index = joint[:, heads:, 1:], torch.randperm(len(target))[: tokens * heads]
    expected = target.index_copy(0, index, source.flatten(0, 1))
    assert can_scatter(target, index, source)
    scatter(target, index, source)
    assert torch.equal(target, expected)


def test_an_index_beyond_is_passed_over(dtype):
    memory = torch.zeros(8, 4, dtype=dtype)
    scatter(memory[2:6], torch.tensor([4, -1, 0, 1 << 62]), torch.ones(2, 2, 4, dtype=dtype))
    assert memory.sum(1).tolist() == [0, 0, 4, 0, 0, 0, 0, 0]


def test_what_it_does_not_take(dtype):
    target, index = torch.zeros(8, 4, dtype=dtype), torch.arange(4)
    source = torch.ones(2, 2, 4, dtype=dtype)
    assert can_scatter(target, index, source)
    assert not can_scatter(target, index.int(), source)
    assert not can_scatter(target, index[:3], source)
    assert not can_scatter(target, torch.arange(8)[::2], source)
    assert not can_scatter(target.t().contiguous().t(), index, source)
    assert not can_scatter(target, index, source.flatten(0, 1))
    assert not can_scatter(target, index, source.double())
    assert not can_scatter(target.double(), index, source.double())
    assert not can_scatter(target, index, source[..., ::2])
    assert not can_scatter(target[:, ::2].contiguous(), index, source[..., ::2])
    assert not can_scatter(target.to("meta"), index, source)
