"""Packed matrices: their products, tied embeddings, and what is left alone."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from handler import loading
from handler.engine import Engine, EngineConfig, block_attention, model_runner
from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.kernels.cpu import has_code_for
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import cpu_linear, packed
from handler.weights.cpu_linear import cpu_lacks
from tests.engine.conftest import KINDS, make_model, make_tokenizer

DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(cpu_lacks(torch.bfloat16), reason="no bfloat16 here")),
]
NARROW = (torch.bfloat16, torch.float16)
IDS = torch.tensor([[5, 7, 319, 0, 5], [64, 65, 63, 128, 2]])


def packed_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_packed(module)]


def is_packed(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.layout == torch._mkldnn


class Holder(nn.Module):
    def __init__(self, matrix: nn.Module):
        super().__init__()
        self.matrix = matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear, Conv1D])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("sizes", [(24, 50), (37, 64), (96, 1)])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 0), (3, 5), (70,)])
def test_products(dtype, kind, biased, sizes, rows):
    torch.manual_seed(0)
    width, height = sizes
    module = Conv1D(height, width) if kind is Conv1D else kind(width, height, bias=biased)
    module = module.to(dtype)
    inputs = torch.randn(*rows, width).to(dtype)
    rows_of = module.weight.t() if kind is Conv1D else module.weight
    with torch.inference_mode():
        exact = linear(inputs.double(), rows_of.double(), None if module.bias is None else module.bias.double())
        assert packed._pack(module.weight, [module]) and is_packed(module)
        product = module(inputs)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU("tanh"), *(ACT2FN[name] for name in ("gelu", "gelu_new", "gelu_fast"))]
)
def test_an_activation_becomes_a_part_of_its_product(dtype, activation):
    torch.manual_seed(0)
    linear, inputs, activation = nn.Linear(24, 50).to(dtype), torch.randn(70, 24).to(dtype), copy.deepcopy(activation)
    with torch.inference_mode():
        exact = activation(copy.deepcopy(linear).double()(inputs.double()))
        assert packed._pack(linear.weight, [linear], activation)
        product = linear(inputs)
        torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert activation(product) is product


class Doubled(nn.GELU):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("activation", [nn.SiLU(), Doubled(), ACT2FN["quick_gelu"]])
def test_other_activations_stay_as_they_are(activation):
    linear, inputs = nn.Linear(24, 50), torch.randn(7, 24)
    with torch.inference_mode():
        exact = activation(linear(inputs))
        assert packed._pack(linear.weight, [linear], activation)
        torch.testing.assert_close(activation(linear(inputs)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_as_many_bytes_as_before_and_tied_embeddings_once(kind, dtype):
    plain = copy.deepcopy(make_model(kind)).to(dtype)
    model = copy.deepcopy(plain)
    assert packed.pack_weights(model) > 0
    assert model.get_memory_footprint() == plain.get_memory_footprint()
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert is_packed(head)
    assert (inputs.weight is head.weight) == (
        plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    )
    with torch.inference_mode():
        assert torch.equal(inputs(IDS), plain.get_input_embeddings()(IDS))
        exact = copy.deepcopy(plain).float()(IDS).logits
        off, plain_off = ((m(IDS).logits.float() - exact).std() for m in (model, plain))
    assert off <= 1.25 * plain_off + 1e-5
    assert set(model.state_dict()) == set(plain.state_dict())


def test_a_scaled_tied_embedding():
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=323, hidden_size=32, intermediate_size=40, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        expected = model.get_input_embeddings()(IDS)
        packed.pack_weights(model)
        assert is_packed(model.get_input_embeddings())
        assert torch.equal(model.get_input_embeddings()(IDS), expected)


def test_a_tied_matrix_whose_rows_are_not_found_is_left(monkeypatch):
    model = copy.deepcopy(make_model("bloom"))
    monkeypatch.setattr(packed, "_HEIGHTS", ())
    packed.pack_weights(model)
    assert packed_modules(model)
    assert not is_packed(model.get_output_embeddings()) and not is_packed(model.get_input_embeddings())


def test_rows_that_differ_in_one_number_are_not_found():
    rows = torch.randn(5000, 32)
    order = torch.ops.mkldnn._reorder_linear_weight(rows, 256)
    assert packed._blocks(order, rows) is not None
    rows[4999, 31] += 1
    assert packed._blocks(order, rows) is None


def test_all_rows_may_be_one_block():
    """As bfloat16 is packed by a CPU with AVX512 that has no bfloat16."""
    rows = torch.randn(1000, 32)
    order = rows.t().contiguous().to_mkldnn()
    blocks = packed._blocks(order, rows)
    assert blocks is not None and torch.equal(blocks[0, :, 7].flatten(), rows[7])


def test_nothing_is_in_memory_twice(monkeypatch):
    """Weights of another dtype than the file's are: a matrix is gone once it is packed, before the next ones are."""
    model = copy.deepcopy(make_model("llama"))
    before = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    left = []

    def counted(pack):
        return lambda *args: left.append(sum(ref() is not None for ref in before)) or pack(*args)

    monkeypatch.setattr(packed, "_pack", counted(packed._pack))
    monkeypatch.setattr(packed, "_pack_joined", counted(packed._pack_joined))
    packed.pack_weights(model)
    layers = model.config.num_hidden_layers  # of each, three are packed as one, two as one, and two alone
    assert left[0] == len(before) and left[2 * layers] == len(before) - 5 * layers
    assert left[-1] <= 2  # the last one, and the embedding, which is not packed


def test_what_this_cpu_cannot_multiply_and_embeddings_alone_are_left():
    llama = copy.deepcopy(make_model("llama"))
    packed.pack_weights(llama)
    assert not is_packed(llama.get_input_embeddings())  # not tied: a step looks up a few rows
    double = copy.deepcopy(make_model("llama")).double()
    assert packed.pack_weights(double) == 0 and not packed_modules(double)
    exact = copy.deepcopy(make_model("bloom"))
    exact.config.slow_but_exact = True  # its code takes weights in its own hands
    assert packed.pack_weights(exact) == 0


def test_layers_that_stream_are_left_and_hooks_go_on(bloom, tmp_path):
    plain = load_model(bloom, Settings(pack_weights=False), tmp_path)
    assert not packed_modules(plain.model) and plain.products == "float32"
    places = {"transformer.word_embeddings": "cpu", "transformer.word_embeddings_layernorm": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.h.{i}": "disk" if i % 2 else "cpu" for i in range(4)} | {"transformer.ln_f": "cpu"}
    loaded = load_model(bloom, Settings(device_map=places), tmp_path)
    names = packed_modules(loaded.model)
    assert "lm_head" in names and "transformer.h.0.mlp.dense_h_to_4h" in names
    assert not any(name.startswith(("transformer.h.1", "transformer.h.3")) for name in names)
    assert "packed" in loaded.products
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, plain.model(ids).logits)


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without 16-bit instructions, and without code of ours, for who loads."""
    for module in (loading, packed):
        monkeypatch.setattr(module, "cpu_lacks", lambda dtype: dtype in NARROW)
        monkeypatch.setattr(module, "widens", lambda dtype: False)


@pytest.fixture
def widening(monkeypatch):
    """The same with code of ours."""
    if not all(map(has_code_for, NARROW)):
        pytest.skip("not on this CPU")
    for module in (cpu_linear, loading, packed, model_runner, block_attention):
        monkeypatch.setattr(module, "cpu_lacks", lambda dtype: dtype in NARROW, raising=False)


@pytest.fixture(scope="module")
def bloom_bfloat16(bloom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bloom-bfloat16")
    loaded = load_model(bloom, Settings(dtype="bfloat16", pack_weights=False), folder)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_16_bits_that_a_cpu_has_no_instructions_for_are_held_in_float32(lacking, bloom_bfloat16, tmp_path, dtype):
    loaded = load_model(bloom_bfloat16, Settings(dtype=dtype), tmp_path)
    assert loaded.model.dtype == torch.float32
    assert loaded.products.startswith("float32") and "packed" in loaded.products
    off = load_model(bloom_bfloat16, Settings(dtype=dtype, pack_weights=False), tmp_path)
    assert off.model.dtype == getattr(torch, "bfloat16" if dtype == "auto" else dtype)


def test_unless_they_do_not_fit_so(lacking, bloom_bfloat16, tmp_path):
    size = load_model(bloom_bfloat16, Settings(pack_weights=False), tmp_path).model.get_memory_footprint()
    for settings in (
        Settings(max_memory={"cpu": 2 * size - 1}),
        Settings(device_map={"transformer": "disk", "lm_head": "disk"}),
    ):
        loaded = load_model(bloom_bfloat16, settings, tmp_path)
        assert loaded.model.dtype == torch.bfloat16
        assert loaded.products == "bfloat16, of many rows in blocks of float32"
    assert load_model(bloom_bfloat16, Settings(max_memory={"cpu": 2 * size}), tmp_path).model.dtype == torch.float32


def test_nor_where_max_memory_allows_more_than_there_is(lacking, bloom_bfloat16, tmp_path, monkeypatch):
    """A pod that was planned for 16 bits is not killed on such a CPU."""
    settings = Settings(max_memory={"cpu": 10**9})
    empty = loading.meta_model(loading.read_config(bloom_bfloat16, settings), settings, [])
    taken = 2 * empty.get_memory_footprint() + Capacity.of(Architecture.of(empty), settings).activation_bytes
    monkeypatch.setattr(loading, "free_memory", lambda gpus: {"cpu": taken})
    assert load_model(bloom_bfloat16, settings, tmp_path).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_stay_and_are_widened_on_the_way_by_code_of_ours(widening, dtype, kind):
    model = copy.deepcopy(make_model(kind)).to(dtype)
    exact = copy.deepcopy(model).float()
    words = model.get_input_embeddings()
    matrices = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    size = sum(reference().nbytes for reference in set(matrices))
    with torch.inference_mode():
        looked_up = words(IDS)
        assert packed.has_plain_matrices(model)
        packed_bytes = packed.pack_weights(model)
        assert size <= packed_bytes < 2 * size  # the tests' matrices do not fill their panels
        assert not any(reference() for reference in matrices)
        assert model.dtype == dtype and not packed.has_plain_matrices(model)
        before = [
            parameter.data_ptr() for parameter in model.parameters() if isinstance(parameter, packed.PackedMatrix)
        ]
        packed.own_resident_weights(model)
        after = [parameter.data_ptr() for parameter in model.parameters() if isinstance(parameter, packed.PackedMatrix)]
        assert before and after == before
        assert torch.equal(words(IDS), looked_up)
        given, expected = model(IDS).logits, exact(IDS).logits
    assert given.dtype == dtype
    assert (given - expected).std() < (0.02 if dtype == torch.bfloat16 else 0.003) * expected.std()


def test_a_checkpoint_of_16_bits_is_loaded_so(widening, bloom_bfloat16, tmp_path):
    loaded = load_model(bloom_bfloat16, Settings(), tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.products.startswith("bfloat16") and loaded.products.endswith("packed and multiplied in float32")
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig())
    assert engine._runner._products is nullcontext
    off = load_model(bloom_bfloat16, Settings(pack_weights=False), tmp_path)
    assert Engine(off.model, off.tokenizer, EngineConfig())._runner._products is cpu_linear.WideLinear
    half = off.model.get_memory_footprint() // 2
    part = load_model(bloom_bfloat16, Settings(max_memory={"cpu": half}), tmp_path)
    assert "packed and multiplied in float32, the rest of many rows in blocks" in part.products
    assert part.streamed is not None
    assert Engine(part.model, part.tokenizer, EngineConfig())._runner._products is cpu_linear.WideLinear


def test_experts_in_one_tensor_are_not_and_make_it_float32(widening, tmp_path):
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert not packed.can_pack_all(model)
    assert all(packed.can_pack_all(make_model(kind)) for kind in KINDS)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, Settings(), tmp_path)
    assert loaded.model.dtype == torch.float32 and loaded.products.startswith("float32")
    sliced = copy.deepcopy(make_model("bloom")).bfloat16()
    sliced.config.slow_but_exact = True
    assert not packed.can_pack_all(sliced)


def test_scales_of_integers_are_no_matrices():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.weight_scale = nn.Parameter(torch.zeros(2, 4, 2, dtype=torch.bfloat16))
    assert not packed.has_plain_matrices(model)
    model.bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    assert not packed.has_plain_matrices(model)
    model.experts = nn.Parameter(torch.zeros(2, 4, 2, dtype=torch.bfloat16))
    assert packed.has_plain_matrices(model)


def test_few_kernels_are_made_for_all_numbers_of_rows():
    padded = {rows: packed.padded_rows(rows) for rows in range(1025)}
    assert all(rows <= more <= rows * 9 / 8 for rows, more in padded.items())
    assert all(padded[rows] == rows for rows in range(33))
    assert len(set(padded.values())) < 80


@pytest.mark.parametrize("rows", [33, 100, 1000])
def test_rows_that_are_added_change_nothing(rows):
    model = copy.deepcopy(make_model("llama"))
    inputs, layer = torch.randn(1, rows, 32), model.model.layers[0].mlp.up_proj
    expected = layer(inputs)
    assert packed.pack_weights(model)
    assert torch.allclose(layer(inputs), expected, atol=1e-5) and layer(inputs).shape == expected.shape
