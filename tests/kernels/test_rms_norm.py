"""RMS norms beside the models' own code."""

import pytest
import torch

from handler.kernels.rms_norm import KINDS, can_normalize, rms_norm


def exact(inputs, weight, epsilon, kind):
    numbers = inputs.float()
    normal = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + epsilon)
    if kind == "rounded":
        return weight * normal.to(inputs.dtype)
    return (normal * (weight.float() + (kind == "offset"))).to(inputs.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 15, 64, 100, 576])
def test_norms(dtype, threads, kind, size):
    torch.manual_seed(0)
    for shape in ((0,), (1,), (3, 2), (7, 1, 3), (700,)):
        inputs, weight = torch.randn(*shape, size).to(dtype) * 3, torch.rand(size).to(dtype) + 0.5
        outputs, expected = rms_norm(inputs, weight, 1e-5, kind), exact(inputs, weight, 1e-5, kind)
        assert outputs.shape == expected.shape and outputs.dtype == dtype
        torch.testing.assert_close(outputs, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
        if dtype == torch.bfloat16 and inputs.numel() > 1000:
            assert (outputs == expected).float().mean() > 0.99


def test_zeros_large_numbers_and_what_is_not_finite(dtype):
    inputs = torch.zeros(4, 64, dtype=dtype)
    inputs[1], inputs[2, 5], inputs[3, 6] = 3e4 if dtype == torch.float16 else 1e15, torch.nan, torch.inf
    outputs = rms_norm(inputs, torch.ones(64, dtype=dtype), 1e-6, "whole")
    assert outputs[0].eq(0).all() and torch.allclose(outputs[1], torch.ones(64, dtype=dtype))
    assert outputs[2].isnan().all() and outputs[3, 6].isnan()


def test_inputs_with_gaps(dtype):
    inputs, weight = torch.randn(3, 4, 128).to(dtype)[..., ::2], torch.ones(64, dtype=dtype)
    torch.testing.assert_close(rms_norm(inputs, weight, 1e-6, "whole"), exact(inputs, weight, 1e-6, "whole"))


def test_what_it_does_not_take(dtype):
    weight = torch.ones(8, dtype=dtype)
    assert can_normalize(torch.ones(2, 8, dtype=dtype), weight)
    assert not can_normalize(torch.ones(2, 8, dtype=torch.float64), weight)
    assert not can_normalize(torch.ones(2, 8, dtype=torch.float64), weight.double())
    assert not can_normalize(torch.ones(2, 8, dtype=dtype), weight.to("meta"))
    assert not can_normalize(torch.ones(2, 8, dtype=dtype), weight.view(2, 4))
    assert not can_normalize(torch.ones(2, 8, dtype=dtype), weight[:1].expand(8))
    assert not can_normalize(torch.ones(2, 4, dtype=dtype), weight)
    assert not can_normalize(torch.ones(2, 0, dtype=dtype), weight[:0])
