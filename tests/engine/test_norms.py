"""Which norms of the models are computed in one pass, and that they stay what they were."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from handler.engine.norms import mend_norms
from handler.kernels.cpu import has_code_for, lanes
from handler.loading import load_model
from handler.settings import Settings
from tests.engine.conftest import make_model, make_tokenizer

pytestmark = pytest.mark.skipif(not lanes(), reason="this CPU has no code of ours")
DTYPES = [dtype for dtype in (torch.float32, torch.float16, torch.bfloat16) if has_code_for(dtype)]


def made(kind, dtype, size=96):
    torch.manual_seed(0)
    norm = kind(size).to(dtype)
    norm.weight = nn.Parameter((torch.rand(size) + 0.5).to(dtype))
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_norms_of_models(kind, dtype):
    norm = made(kind, dtype)
    plain = copy.deepcopy(norm)
    assert mend_norms(norm) == 1 and "forward" in vars(norm)
    inputs = (torch.randn(5, 3, 96) * 2).to(dtype)
    with torch.inference_mode():
        outputs, expected = norm(inputs), plain(inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
    assert (outputs == expected).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_another_dtype_are_the_modules_own_affair(dtype):
    norm = made(LlamaRMSNorm, dtype)
    plain = copy.deepcopy(norm)
    mend_norms(norm)
    inputs = torch.randn(2, 96, dtype=torch.float64)
    assert torch.equal(norm(inputs), plain(inputs))


class ThriceRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 3 * super().forward(hidden_states)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (1 if gate is None else gate)


def test_a_gate_is_the_modules_own_affair():
    norm, inputs = made(GatedRMSNorm, torch.float32), torch.randn(2, 96)
    plain = copy.deepcopy(norm)
    assert mend_norms(norm) == 1
    assert torch.equal(norm(inputs, inputs), plain(inputs, inputs)) and torch.equal(
        norm(inputs, gate=inputs), plain(inputs, inputs)
    )


class WideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).double()


class ResidualRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, residual):
        return super().forward(hidden_states + residual)


class PairRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states), hidden_states


class NamedRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x)


def test_arguments_keep_their_names():
    norm, inputs = made(NamedRMSNorm, torch.float32), torch.randn(2, 96)
    assert mend_norms(norm) == 1
    torch.testing.assert_close(norm(x=inputs), norm(inputs), rtol=1e-6, atol=0)


class OtherLayerNorm(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norms(dtype):
    norm = nn.LayerNorm(96, eps=1e-3).to(dtype)
    norm.weight, norm.bias = (nn.Parameter((torch.rand(96) + 0.5).to(dtype)) for _ in range(2))
    plain, inputs = copy.deepcopy(norm), (torch.randn(5, 3, 96) * 2 + 1).to(dtype)
    assert mend_norms(norm) == 1
    with torch.inference_mode():
        outputs, expected = norm(inputs), plain(inputs)
        torch.testing.assert_close(outputs, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=2e-6)
        assert (outputs == expected).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)
        assert torch.equal(norm(inputs.mT.contiguous().mT), plain(inputs.mT.contiguous().mT))
        assert torch.equal(norm(inputs[:0]), plain(inputs[:0]))


@pytest.mark.parametrize(
    "norm",
    [
        WideRMSNorm(8),
        ResidualRMSNorm(8),
        PairRMSNorm(8),
        ThriceRMSNorm(8),
        OtherLayerNorm(8),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm((2, 4)),
        nn.LayerNorm(8).double(),
        nn.Linear(8, 8),
        LlamaRMSNorm(8).double(),
    ],
)
def test_what_computes_something_else_is_left(norm):
    assert mend_norms(norm) == 0 and "forward" not in vars(norm)


def test_norms_on_disk_are_left_and_others_stay_below_their_hooks(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    some = load_model(tmp_path / "llama", Settings(max_memory={"cpu": 60_000}), tmp_path).model
    norms = [module for module in some.modules() if type(module) is LlamaRMSNorm]
    mended = [norm._old_forward.__module__ == "handler.engine.norms" for norm in norms]
    on_disk = [norm.weight.device.type == "meta" for norm in norms]
    assert any(on_disk) and mended == [not is_on_disk for is_on_disk in on_disk]
    ids = torch.tensor([[5, 7, 319, 0, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(some(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
