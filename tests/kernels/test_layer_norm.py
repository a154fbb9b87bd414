"""Layer norms beside PyTorch's."""

import pytest
import torch

from handler.kernels.layer_norm import can_normalize_layer, layer_norm


def exact(inputs, weight, bias, epsilon):
    inputs, weight, bias = (one.double() for one in (inputs, weight, bias))
    return torch.nn.functional.layer_norm(inputs, weight.shape, weight, bias, epsilon)


@pytest.mark.parametrize("size", [1, 15, 64, 100, 576])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (7, 1, 3), (40,)])
def test_norms(dtype, threads, size, shape):
    torch.manual_seed(0)
    inputs, weight, bias = ((torch.randn(*given, size) * 3 + 1).to(dtype) for given in (shape, (), ()))
    assert can_normalize_layer(inputs, weight, bias)
    outputs, rounding = layer_norm(inputs, weight, bias, 1e-5), torch.finfo(dtype).eps / 2
    assert outputs.shape == inputs.shape and outputs.dtype == dtype
    torch.testing.assert_close(
        outputs.double(), exact(inputs, weight, bias, 1e-5), rtol=max(rounding, 1e-6) * 1.01, atol=4e-6
    )


def test_a_mean_that_is_far_from_zero(dtype):
    inputs = (torch.randn(4, 256) + 100).to(dtype)
    ones, zeros = torch.ones(256, dtype=dtype), torch.zeros(256, dtype=dtype)
    outputs = layer_norm(inputs, ones, zeros, 1e-5)
    torch.testing.assert_close(outputs.double(), exact(inputs, ones, zeros, 1e-5), rtol=2**-8, atol=1e-4)


def test_what_is_not_finite_and_what_does_not_differ(dtype):
    inputs, ones = torch.ones(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    inputs[1, 5], inputs[2, 6] = torch.nan, torch.inf
    outputs = layer_norm(inputs, ones, ones, 1e-5)
    assert outputs[0].eq(1).all() and outputs[1:].isnan().all(-1).all()


def test_what_it_does_not_take(dtype):
    inputs, weight = torch.ones(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    assert can_normalize_layer(inputs, weight, weight)
    assert not can_normalize_layer(inputs.double(), weight.double(), weight.double())
    assert not can_normalize_layer(inputs, weight.double(), weight)
    assert not can_normalize_layer(inputs, weight, weight.to("meta"))
    assert not can_normalize_layer(inputs, weight[:1], weight[:1])
    assert not can_normalize_layer(inputs, weight, weight[:1].expand(8))
    assert not can_normalize_layer(inputs[:, :1].expand(2, 8), weight, weight)
    assert not can_normalize_layer(inputs[:0], weight, weight)
    assert not can_normalize_layer(torch.ones(8, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype), weight)
