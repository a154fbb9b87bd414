"""What is computed of each number, beside PyTorch's operators."""

import pytest
import torch
from torch.nn.functional import silu

from handler.kernels.elementwise import can_compute, compute

SHAPES = [(1,), (5, 3), (2, 1, 100), (3, 4, 17), (1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["add", "mul"])
def test_two_numbers(dtype, threads, name, shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) for _ in range(2)]
    assert can_compute(*inputs)
    assert torch.equal(compute(name, *inputs), getattr(torch, name)(*inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_widened(dtype, threads, shape):
    numbers = torch.randn(shape).to(dtype)
    assert torch.equal(compute("same", numbers, dtype=torch.float32), numbers.float())
    assert torch.equal(compute("same", numbers), numbers)


def test_silu(dtype):
    parts = torch.linspace(-120, 120, 40_001), torch.linspace(-4, 4, 40_001), torch.tensor([0.0, torch.inf, -torch.inf])
    numbers = torch.cat(parts).to(dtype)
    outputs, expected = compute("silu", numbers), silu(numbers)
    assert torch.equal(outputs.nan_to_num(7), expected.nan_to_num(7))


def test_what_is_not_finite(dtype):
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]).to(dtype)
    assert torch.equal(compute("silu", numbers).nan_to_num(7), silu(numbers).nan_to_num(7))
    assert compute("silu", numbers).isnan().tolist() == [True, False, True, False]
    expected = numbers + numbers.flip(0)
    assert torch.equal(compute("add", numbers, numbers.flip(0)).nan_to_num(7), expected.nan_to_num(7))


def test_rows_with_gaps(dtype):
    joint = torch.randn(4, 2, 60).to(dtype)
    one, other = joint.split([25, 35], dim=-1)
    assert torch.equal(compute("mul", one, other[..., 10:]), one * other[..., 10:])
    assert torch.equal(compute("mul", joint[:, 0], joint[:, 1]), joint[:, 0] * joint[:, 1])
    assert torch.equal(compute("same", joint[:1].expand(3, 2, 60)[:, 0]), joint[:1].expand(3, 2, 60)[:, 0])


def test_what_it_does_not_take(dtype):
    numbers = torch.ones(2, 3, 8, dtype=dtype)
    assert can_compute(numbers, numbers[:, :, :8])
    assert not can_compute(numbers, numbers[:1])
    assert not can_compute(numbers, numbers.double())
    assert not can_compute(numbers.double())
    assert not can_compute(numbers.to("meta"))
    assert not can_compute(numbers.mT)
    assert not can_compute(numbers[..., ::2])
    assert not can_compute(torch.ones(2, 5, 8, dtype=dtype)[:, :3])  # rows at two distances
    assert not can_compute(numbers[:, :1].expand(2, 3, 8)) and can_compute(numbers[:1, :1].expand(2, 3, 8))
    assert not can_compute(numbers[:1].expand(2, 3, 8))
    assert not can_compute(numbers[:0])
    assert not can_compute(numbers[0, 0, 0])
