"""Checkpoints in int8 and int4: the products, and models that load, place, generate and plan as any other does."""

import copy
import functools
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from handler.engine import Engine, EngineConfig, Request
from handler.errors import LoadError
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import integer_linear as products
from handler.weights import packed
from handler.weights.byte_linear import multiplies_bytes
from handler.weights.quantized import QuantizedEmbedding, QuantizedLinear
from scripts.plan import make_plan
from scripts.quantize import _to_int4, _to_int8
from scripts.shard import shard
from tests.engine.architectures import RUNS
from tests.engine.conftest import make_model, make_tokenizer, prompt_ids

GROUP = 32
FORMATS = ["int8", "int4"]


def quantized(kind: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale, _ = _to_int8(rows) if kind == "int8" else _to_int4(rows, GROUP)
    return weight, scale


def numbers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrix that is stored, in float64, by the format's definition."""
    scale = scale.double()
    if weight.dtype == torch.int8:
        return weight * scale.unsqueeze(1)
    nibbles = torch.cat((weight & 15, weight >> 4), 1).view(len(weight), len(scale), -1)
    return ((nibbles.double() - 8) * scale[..., 0].t().unsqueeze(-1) + scale[..., 1].t().unsqueeze(-1)).flatten(1)


@pytest.fixture
def kernels(monkeypatch):
    """The list of PyTorch's kernels that ran."""
    ran = []

    def spy(space, name):
        kernel = getattr(space, name)
        monkeypatch.setattr(space, name, lambda *args: ran.append(name) or kernel(*args))

    spy(torch, "_weight_int8pack_mm")
    spy(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 3), (32,), (33,), (200,)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind, width", [("int8", 96), ("int8", 41), ("int4", 96)])
def test_a_product_is_the_stored_numbers_product(monkeypatch, kind, width, packed, rows, biased, dtype):
    monkeypatch.setitem(products._WIDENED, "cpu", 7 * width)  # 192 rows of the matrix: 27 blocks and a rest
    monkeypatch.setattr(products, "_IN_BFLOAT16", 7 * width)
    torch.manual_seed(0)
    weight, scale = quantized(kind, torch.randn(192, width))
    exact = numbers(weight, scale)
    scale, inputs, bias = scale.to(dtype), torch.randn(*rows, width).to(dtype), torch.randn(192).to(dtype)
    if packed:
        if kind == "int8" or not products.can_pack(weight, scale):
            return
        weight = products.pack(weight)
    product = products.integer_linear(inputs, weight, scale, bias if biased else None, packed)
    expected = inputs.double() @ exact.t() + (bias.double() if biased else 0)
    assert product.dtype == dtype and product.shape == expected.shape
    tolerance = 1e-4 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps * width**0.5
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=tolerance)


def test_few_rows_in_bfloat16_take_pytorchs_kernels_and_others_do_not(kernels):
    weight, scale = quantized("int8", torch.randn(64, 96))
    for dtype, rows in ((torch.bfloat16, 33), (torch.float32, 1), (torch.float16, 1)):
        products.integer_linear(torch.randn(rows, 96).to(dtype), weight, scale.to(dtype), None)
    assert kernels == []
    products.integer_linear(torch.randn(16, 96).bfloat16(), weight, scale, None)
    assert kernels == ["_weight_int8pack_mm"]
    products.integer_linear(torch.randn(17, 96).bfloat16(), weight, scale, None)
    assert len(kernels) == (1 if multiplies_bytes() else 2)


@pytest.mark.skipif(not products._PACKED_BLOCK, reason="PyTorch has no int4 kernel for this CPU")
def test_packed_int4_is_in_the_order_of_pytorchs_own_packing(kernels):
    weight, scale = quantized("int4", torch.randn(2 * products._PACKED_BLOCK, 64))
    nibbles = torch.cat((weight & 15, weight >> 4), 1).int()
    assert torch.equal(products.pack(weight), torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
    products.integer_linear(torch.randn(32, 64).bfloat16(), products.pack(weight), scale, None, packed=True)
    assert kernels == ["_weight_int4pack_mm_for_cpu"]
    products.integer_linear(torch.randn(33, 64).bfloat16(), products.pack(weight), scale, None, packed=True)
    products.integer_linear(torch.randn(1, 64).bfloat16(), weight, scale, None)
    assert len(kernels) == (2 if products._PACKED_BLOCK == products._FASTEST_BLOCK else 1)


@pytest.mark.parametrize("of_weight, of_inputs", [(1, 0), (8, 0), (0, 1)])
def test_what_lies_at_an_odd_address_is_kept_from_the_int8_kernel(kernels, of_weight, of_inputs):
    """It ends the process with a segmentation fault on a CPU with AVX512."""

    def moved(tensor, elements):
        return torch.cat((tensor.new_zeros(elements), tensor.flatten()))[elements:].view(tensor.shape)

    weight, scale = quantized("int8", torch.randn(64, 96))
    inputs = torch.randn(3, 96).bfloat16()
    product = products.integer_linear(moved(inputs, of_inputs), moved(weight, of_weight), scale, None)
    assert not kernels
    torch.testing.assert_close(product.double(), inputs.double() @ numbers(weight, scale).t(), rtol=0, atol=0.3)


@pytest.mark.parametrize("kind, most", [("int8", 0.008), ("int4", 0.075)])
def test_the_error_of_random_weights(kind, most):
    """Rounding to nearest, with the largest weight's scale, is off by 0.097 in int4 with the same groups."""
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    weight, scale, squares = _to_int8(rows) if kind == "int8" else _to_int4(rows, GROUP)
    error = (numbers(weight, scale) - rows).square().sum()
    assert squares == pytest.approx(error.item(), rel=1e-4)
    assert (error / rows.square().sum()).sqrt() < most


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_and_of_one_number_are_exact(kind):
    rows = torch.zeros(3, 64)
    rows[1] = 0.5
    rows[2, :32] = -3.0
    stored = numbers(*quantized(kind, rows))
    torch.testing.assert_close(stored.float(), rows, rtol=0.004 if kind == "int8" else 0, atol=0)


# Models.


def make_checkpoint(folder: Path, model, kind: str) -> Path:
    model.save_pretrained(folder / "16", max_shard_size="30KB")
    make_tokenizer().save_pretrained(folder / "16")
    shard(folder / "16", folder / kind, 30_000, "keep", kind)
    return folder / kind


@pytest.fixture(scope="module", params=FORMATS)
def checkpoints(request, tmp_path_factory):
    """model kind -> folder of its quantised checkpoint."""

    @functools.cache
    def checkpoint(kind: str) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(kind), make_model(kind), request.param)

    return checkpoint


@pytest.mark.parametrize("kind", ["bloom", "llama", "gpt2"])
@pytest.mark.parametrize("limit", [10**9, 35_000, 0])
def test_greedy_rows_that_come_and_go_are_what_generate_gives_each_alone(checkpoints, tmp_path, kind, limit):
    whole = AutoModelForCausalLM.from_pretrained(checkpoints(kind))
    loaded = load_model(checkpoints(kind), Settings(max_memory={"cpu": limit}), tmp_path)
    assert ("disk" in loaded.placement.tiers) == (limit < 10**9)
    assert not any(tmp_path.glob("offload/*"))
    engine = Engine(loaded.model, make_tokenizer(), EngineConfig(max_batch_size=3, prefill_chunk=4))
    prompts = [prompt_ids(seed, length) for seed, length in enumerate([1, 13, 5, 30, 2])]
    jobs = []
    while engine.has_work or len(jobs) < len(prompts):
        if len(jobs) < len(prompts):
            jobs.append(engine.submit(Request(prompts[len(jobs)], {"max_new_tokens": 16})))
        engine.step()
    for prompt, job in zip(prompts, jobs, strict=True):
        ids = torch.tensor([prompt])
        expected = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert job.sequences[0].token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["bloom", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("limit", [0, 10_000, 25_000, 40_000, 10**9, None])
def test_the_plan_is_what_the_loader_makes(checkpoints, tmp_path, kind, dtype, limit):
    settings = Settings(dtype=dtype, max_memory=None if limit is None else {"cpu": limit})
    folder = checkpoints(kind)
    loaded, plan = load_model(folder, settings, tmp_path), make_plan(folder, settings, gpus=[])
    assert plan.device_map == loaded.device_map
    tiers = {device.name: (device.layers, device.weights) for device in plan.devices if device.weights}
    assert tiers == {name: (tier.layers, tier.bytes) for name, tier in loaded.placement.tiers.items()}
    assert plan.dtype == str(loaded.model.dtype).removeprefix("torch.")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plan.weights < 0.8 * make_plan(folder.parent / "16", settings, gpus=[]).weights
    assert plan.checkpoint_bytes == stored


def test_tied_embeddings_and_head_are_one_int8_tensor(checkpoints, tmp_path):
    model = load_model(checkpoints("bloom"), Settings(), tmp_path).model
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(words, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert words.weight is head.weight and words.weight.dtype == torch.int8
    assert words.weight_scale is head.weight_scale


def dense_twin(quantized_model, model):
    """`model`, with the numbers that the integers stand for in place of its weights."""
    for name, module in quantized_model.named_modules():
        if hasattr(module, "weight_scale"):
            weight = model.get_submodule(name).weight
            matrix = numbers(module.weight, module.weight_scale).to(weight.dtype)
            weight.data = matrix.t() if isinstance(module, Conv1D) else matrix
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_every_model_of_the_table_computes_with_the_numbers_in_its_files(tmp_path, case, kind):
    model = case.make_model()
    loaded = load_model(make_checkpoint(tmp_path, model, kind), Settings(), tmp_path)
    Engine(loaded.model, loaded.tokenizer, EngineConfig())
    integers = [name for name, tensor in loaded.model.named_parameters() if not tensor.is_floating_point()]
    assert len(integers) > model.config.get_text_config().num_hidden_layers
    assert not [name for name in integers if "norm" in name or "bias" in name or "position" in name]
    ids = torch.tensor([prompt_ids(0, 12)])
    with torch.inference_mode():
        given = loaded.model(ids, use_cache=False).logits
        expected = dense_twin(loaded.model, model)(ids, use_cache=False).logits
    assert (given - expected).std() < 1e-3 * expected.std()


@pytest.mark.parametrize("kind", ["bloom", "gpt2"])
def test_bfloat16_is_off_by_rounding(checkpoints, tmp_path, kind):
    dense = dense_twin(load_model(checkpoints(kind), Settings(), tmp_path).model, copy.deepcopy(make_model(kind)))
    loaded = load_model(checkpoints(kind), Settings(dtype="bfloat16"), tmp_path)
    for length in (3, 40):  # with the kernels, and without
        ids = torch.tensor([prompt_ids(0, length)])
        with torch.inference_mode():
            given, expected = loaded.model(ids).logits, dense(ids).logits
        assert (given - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["bloom", "llama", "gpt2"])
def test_packed_int8_gives_what_it_gave_to_rounding(checkpoints, tmp_path, monkeypatch, kind):
    """Tied embeddings look up what they did, to the bit."""
    monkeypatch.setattr(packed, "_LEAST_INT8", 0)
    settings = Settings(dtype="bfloat16")
    plain = load_model(checkpoints(kind), settings.model_copy(update={"pack_weights": False}), tmp_path).model
    model = load_model(checkpoints(kind), settings, tmp_path).model
    in_bytes = [name for name, p in model.named_parameters() if p.layout == torch._mkldnn and p.dtype == torch.int8]
    assert bool(in_bytes) == multiplies_bytes()
    words = model.get_input_embeddings(), plain.get_input_embeddings()
    assert not in_bytes or any(model.get_parameter(name) is model.get_output_embeddings().weight for name in in_bytes)
    assert (model.get_output_embeddings().weight is words[0].weight) == (kind != "llama")
    for length in (3, 40):
        ids = torch.tensor([prompt_ids(0, length)])
        with torch.inference_mode():
            assert torch.equal(*(embedding(ids) for embedding in words))
            given, expected = model(ids).logits, plain(ids).logits
        assert (given - expected).std() < 0.05 * expected.std()


def test_an_unknown_format_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    config = folder / "config.json"
    for bits in ('"bits": 8', '"bits": 4'):
        config.write_text(config.read_text().replace(bits, '"bits": 3'))
    with pytest.raises(LoadError, match="bits 3"):
        load_model(folder, Settings(), tmp_path)
