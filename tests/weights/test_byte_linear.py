"""Products of bytes: as exact as bfloat16's, the same for a row whatever is beside it."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from handler.weights import byte_linear
from handler.weights.byte_linear import byte_product, multiplies_bytes, pack_bytes, packed_byte_product

pytestmark = pytest.mark.skipif(not multiplies_bytes(), reason="this CPU cannot multiply bytes exactly")


@pytest.fixture(params=["as stored", "packed"])
def product(request):
    """product(rows, weight, scale)"""
    if request.param == "as stored":
        return byte_product
    return lambda rows, weight, scale: packed_byte_product(pack_bytes(weight), scale, weight.sum(1))(rows)


def matrix(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (out, width), generator=generator, dtype=torch.int8)
    return weight, torch.rand(out, generator=generator).bfloat16() / 100


@pytest.mark.parametrize("rows", [0, 1, 33, 200])
@pytest.mark.parametrize("shape", [(192, 96), (1000, 41), (33, 50)])
def test_is_nearer_to_the_exact_product_than_bfloat16s(product, rows, shape):
    weight, scale = matrix(*shape)
    inputs = torch.randn(rows, shape[1]).bfloat16()
    inputs[:, 3] *= 50  # as of some channels in large models
    exact = inputs.double() @ (weight * scale.double().unsqueeze(1)).t()
    given = product(inputs, weight, scale)
    assert given.dtype == torch.bfloat16 and given.shape == (rows, shape[0])
    dense = inputs @ (weight * scale.unsqueeze(1)).t()
    assert (given.double() - exact).norm() <= (dense.double() - exact).norm()


def test_the_largest_sums_do_not_saturate(product):
    inputs = torch.ones(3, 4096).bfloat16()
    inputs[1] = -1
    weight = torch.full((64, 4096), 127, dtype=torch.int8)
    given = product(inputs, weight, torch.ones(64).bfloat16())
    torch.testing.assert_close(given.float(), 127 * 4096 * inputs[:, :64].float(), rtol=2**-8, atol=0)


def test_a_row_is_the_same_alone_and_in_a_crowd_of_any_size(product, monkeypatch):
    weight, scale = matrix(192, 96)
    inputs = torch.randn(200, 96).bfloat16()
    crowd = product(inputs, weight, scale)
    monkeypatch.setattr(byte_linear, "BYTES_AT_ONCE", 50_000)  # a few rows at a time
    assert torch.equal(product(inputs, weight, scale), crowd)
    assert all(torch.equal(product(inputs[i : i + 1], weight, scale), crowd[i : i + 1]) for i in (0, 7, 199))


@pytest.mark.parametrize("shape", [(4000, 64), (64, 4000)])
def test_makes_no_more_on_its_way_than_is_planned(monkeypatch, shape):
    monkeypatch.setattr(byte_linear, "BYTES_AT_ONCE", 4 << 20)
    weight, scale = matrix(*shape)
    inputs = torch.randn(500, shape[1]).bfloat16()
    packed = packed_byte_product(pack_bytes(weight), scale, weight.sum(1))
    for multiply in (lambda: byte_product(inputs, weight, scale), lambda: packed(inputs)):
        assert 1 << 20 < most_bytes(multiply) - 2 * 500 * shape[0] <= 4 << 20


def most_bytes(function) -> int:
    """Of tensors that are there at the same time while it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_zeros_and_what_is_not_finite_stay_in_their_rows(product):
    weight, scale = matrix(192, 96)
    inputs = torch.randn(5, 96).bfloat16()
    alone = product(inputs, weight, scale)
    inputs[1], inputs[2, 4], inputs[3, 5] = 0, float("nan"), float("inf")
    given = product(inputs, weight, scale)
    assert torch.equal(given[[0, 4]], alone[[0, 4]]) and not given[1].any()
    assert not given[2].isfinite().any() and not given[3].isfinite().any()


def test_a_cpu_that_saturates_is_found_out(monkeypatch):
    multiplies_bytes.cache_clear()
    exact = byte_linear._packed_product
    monkeypatch.setattr(byte_linear, "_packed_product", lambda *args: exact(*args) - 1)
    try:
        assert not multiplies_bytes()
    finally:
        multiplies_bytes.cache_clear()
