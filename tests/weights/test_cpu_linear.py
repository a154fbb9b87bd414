"""16-bit products on a CPU without instructions for them, whatever this CPU has."""

import pytest
import torch
from torch.nn.functional import linear

from handler.engine import Engine, EngineConfig, Request, model_runner
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import cpu_linear

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without 16-bit instructions; the list of the row counts that were widened."""
    widened = []

    def spy(inputs, weight, bias=None):
        widened.append(inputs.numel() // inputs.shape[-1])
        return wide(inputs, weight, bias)

    wide = cpu_linear.wide_linear
    monkeypatch.setattr(cpu_linear, "wide_linear", spy)
    monkeypatch.setattr(model_runner, "cpu_lacks", lambda dtype: dtype in DTYPES)
    return widened


@pytest.mark.parametrize(
    "capability, features, trusted",
    [
        ("AVX512", {"avx512f"}, False),  # oneDNN takes bfloat16 there, and is slow
        ("AVX512", {"avx512f", "avx512bf16"}, True),
        ("AVX512", {"amx-bf16"}, True),
        ("DEFAULT", set(), True),  # no x86
    ],
)
def test_bfloat16_is_had_where_there_are_instructions(monkeypatch, capability, features, trusted):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_linear, "cpu_has", lambda feature: feature in features)
    taken = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert cpu_linear.cpu_lacks(torch.bfloat16) == (not taken or not trusted)
    assert not cpu_linear.cpu_lacks(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, biased", [((16, 24), True), ((2, 9, 24), False), ((1, 24), True)])
def test_it_is_the_exact_product_rounded_once(monkeypatch, dtype, shape, biased):
    monkeypatch.setattr(cpu_linear, "_BLOCK_ELEMENTS", 24 * 7)  # 50 outputs: seven blocks and a rest
    torch.manual_seed(0)
    inputs, weight, bias = (torch.randn(size).to(dtype) for size in (shape, (50, 24), (50,)))
    exact = linear(inputs.double(), weight.double(), bias.double() if biased else None)
    product = cpu_linear.wide_linear(inputs, weight, bias if biased else None)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_few_rows_and_other_dtypes_are_left_to_pytorch(lacking):
    few, many = cpu_linear._WORTH_ROWS - 1, cpu_linear._WORTH_ROWS
    weight = torch.randn(4, 3).bfloat16()
    with cpu_linear.WideLinear():
        linear(torch.randn(few, 3).bfloat16(), weight)
        linear(torch.randn(many, 3), weight.float())
        assert not lacking
        linear(torch.randn(many, 3).bfloat16(), weight)
    assert lacking == [many]
    linear(torch.randn(many, 3).bfloat16(), weight)
    assert lacking == [many]


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_generation_is_what_pytorch_makes_it_and_layers_may_be_on_disk(lacking, monkeypatch, bloom, tmp_path, tier):
    settings = Settings(dtype="bfloat16", pack_weights=False, max_memory={"cpu": 0 if tier == "disk" else 10**9})
    loaded = load_model(bloom, settings, tmp_path)
    prompts = [[10 + i, 20 + i, 30 + i] for i in range(16)]

    def texts():
        engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_batch_size=16))
        jobs = [engine.submit(Request(prompt, {"max_new_tokens": 4})) for prompt in prompts]
        while engine.has_work:
            engine.step()
        return [job.sequences[0].token_ids for job in jobs]

    wide = texts()
    assert max(lacking) >= 16
    lacking.clear()
    monkeypatch.setattr(model_runner, "cpu_lacks", lambda dtype: False)
    assert texts() == wide
    assert not lacking
