"""Checkpoints in int8 and int4: the products, and models that load, place, generate and plan as any other does."""

import copy
import functools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from handler.engine import Engine, EngineConfig, Request
from handler.errors import LoadError
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import integer_linear as products
from handler.weights import packed
from handler.weights import quantized as quantized_modules
from handler.weights.byte_linear import multiplies_bytes
from handler.weights.cpu_linear import cpu_lacks
from handler.weights.quantized import QuantizedEmbedding, QuantizedLinear
from scripts import quantize
from scripts.plan import make_plan
from scripts.quantize import _to_int4, _to_int8
from scripts.shard import shard
from tests.engine.architectures import RUNS
from tests.engine.conftest import make_model, make_tokenizer, prompt_ids

GROUP = 32
FORMATS = ["int8", "int4"]


def quantized(kind: str, rows: torch.Tensor, row_block: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale, _ = _to_int8(rows) if kind == "int8" else _to_int4(rows, GROUP, row_block)
    return weight, scale


def nibbles_of(weight: torch.Tensor, row_block: int | None) -> torch.Tensor:
    """[out, in] of 0 to 15, by the format's definition."""
    if row_block is None:
        return torch.cat((weight & 15, weight >> 4), 1)
    blocks = weight.view(len(weight) // row_block, -1, row_block // 2)
    return torch.cat([torch.cat((block & 15, block >> 4), 1).t() for block in blocks])


def numbers(weight: torch.Tensor, scale: torch.Tensor, row_block: int | None = None) -> torch.Tensor:
    """The matrix that is stored, in float64, by the format's definition."""
    scale = scale.double()
    if weight.dtype == torch.int8:
        return weight * scale.unsqueeze(1)
    nibbles = nibbles_of(weight, row_block).view(len(weight), len(scale), -1)
    return ((nibbles.double() - 8) * scale[..., 0].t().unsqueeze(-1) + scale[..., 1].t().unsqueeze(-1)).flatten(1)


def moved(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same, at an address so many elements behind an aligned one."""
    return torch.cat((tensor.new_zeros(elements), tensor.flatten()))[elements:].view(tensor.shape)


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
@pytest.mark.parametrize(
    "kind, width, row_block, at_once",  # of 192 rows; there is a rest but for the last ones
    [("int8", 96, None, 7), ("int8", 41, None, 7), ("int4", 96, None, 7), ("int4", 96, 64, 130), ("int4", 96, 32, 1)],
)
def test_a_product_is_the_stored_numbers_product(monkeypatch, kind, width, row_block, at_once, rows, biased, dtype):
    monkeypatch.setattr(products, "_WIDENED", dict.fromkeys(products._WIDENED, at_once * width))
    torch.manual_seed(0)
    weight, scale = quantized(kind, torch.randn(192, width), row_block)
    exact = numbers(weight, scale, row_block)
    scale, inputs, bias = scale.to(dtype), torch.randn(*rows, width).to(dtype), torch.randn(192).to(dtype)
    product = products.integer_linear(inputs, weight, scale, bias if biased else None, row_block)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_block, at_once", [(None, 7), (64, 130), (32, 1)])
def test_a_matrix_is_widened_to_what_it_stands_for(monkeypatch, row_block, at_once, dtype):
    """In every dtype, as on a GPU. In float32 zeros are added later."""
    monkeypatch.setattr(products, "_WIDENED", {dtype: at_once * 96})
    torch.manual_seed(0)
    weight, scale = quantized("int4", torch.randn(192, 96), row_block)
    zeros_later = scale.clone()
    zeros_later[..., 1] = 8 * scale[..., 0]
    expected = numbers(weight, zeros_later if dtype == torch.float32 else scale, row_block)
    parts = [(where, part.clone()) for where, part in products._widened(weight, scale.to(dtype), 96, row_block)]
    assert [where.start for where, _ in parts] == [*range(0, 192, {None: 7, 64: 128, 32: 32}[row_block])]
    widened = torch.cat([part.t() for _, part in parts])
    torch.testing.assert_close(widened.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("row_block", [None, 64, 32])
@pytest.mark.parametrize("new_block", [64, 32])
def test_an_order_becomes_another(row_block, new_block):
    nibbles = torch.randint(0, 16, (192, 96), dtype=torch.uint8)
    stored = products.nibbles_to_bytes(nibbles, row_block)
    assert stored.shape == (192, 48) and stored.dtype == torch.uint8
    assert torch.equal(nibbles_of(stored, row_block), nibbles)
    new = products.reordered(stored, row_block, new_block)
    assert new.is_contiguous() and torch.equal(new, products.nibbles_to_bytes(nibbles, new_block))


needs_int4_kernel = pytest.mark.skipif(not products.KERNEL_BLOCK, reason="PyTorch has no int4 kernel for this CPU")


@needs_int4_kernel
def test_the_int4_kernel_takes_few_rows_of_a_matrix_in_its_order(kernels):
    nibbles = torch.randint(0, 16, (128, 64))
    weight, scale = products.nibbles_to_bytes(nibbles, products.KERNEL_BLOCK), torch.rand(2, 128, 2).bfloat16()
    assert torch.equal(weight, torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1))
    most = 32 if products.KERNEL_BLOCK == 32 else 1000 if cpu_lacks(torch.bfloat16) else 64
    for rows, row_block in ((most, products.KERNEL_BLOCK), (most + 1, products.KERNEL_BLOCK), (1, None), (1, 16)):
        products.integer_linear(torch.randn(rows, 64).bfloat16(), weight, scale, None, row_block)
    assert kernels == ["_weight_int4pack_mm_for_cpu"] * (2 if most == 1000 else 1)


@needs_int4_kernel
@pytest.mark.parametrize("of_weight, of_scale, of_inputs", [(1, 0, 0), (31, 1, 0), (0, 3, 1), (5, 7, 3)])
def test_the_int4_kernel_takes_what_lies_at_an_odd_address(kernels, of_weight, of_scale, of_inputs):
    """As tensors that stream do, which lie in memory as they do in their file."""
    weight, scale = quantized("int4", torch.randn(128, 96), block := products.KERNEL_BLOCK)
    for rows in (1, 3, 32):
        inputs = torch.randn(rows, 96).bfloat16()
        tensors = moved(inputs, of_inputs), moved(weight, of_weight), moved(scale, of_scale)
        product = products.integer_linear(*tensors, None, block)
        assert torch.equal(product, products.integer_linear(inputs, weight, scale, None, block))
    assert len(kernels) == 6


@pytest.mark.parametrize("of_weight, of_inputs", [(1, 0), (8, 0), (0, 1)])
def test_what_lies_at_an_odd_address_is_kept_from_the_int8_kernel(kernels, of_weight, of_inputs):
    """It ends the process with a segmentation fault on a CPU with AVX512."""
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
            row_block = getattr(module, "row_block", None)
            matrix = numbers(module.weight, module.weight_scale, row_block).to(weight.dtype)
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
    # In a step that only begins with a prompt, nobody needs logits.
    engine = Engine(model, make_tokenizer(), EngineConfig(max_batch_size=1, prefill_chunk=4))
    job = engine.submit(Request(prompt_ids(0, 40), {"max_new_tokens": 1}))
    while engine.has_work:
        engine.step()
    assert len(job.sequences[0].token_ids) == 1


@pytest.fixture(scope="module")
def int4_orders(tmp_path_factory):
    """model kind -> folders of its int4 checkpoint, in blocks and as it was stored before there were any."""

    @functools.cache
    def orders(kind: str) -> tuple[Path, Path]:
        model, folder = make_model(kind), tmp_path_factory.mktemp(kind)
        new = make_checkpoint(folder / "new", model, "int4")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize, "ROW_BLOCK", None)
            old = make_checkpoint(folder / "old", model, "int4")
        config = json.loads((old / "config.json").read_text())
        assert config["quantization_config"].pop("row_block") is None
        (old / "config.json").write_text(json.dumps(config))
        return new, old

    return orders


@pytest.mark.parametrize("kind", ["bloom", "llama", "gpt2"])
def test_blocks_of_rows_change_no_size_and_are_full(int4_orders, kind):
    new, old = ({p.name: load_file(p) for p in folder.glob("*.safetensors")} for folder in int4_orders(kind))
    assert new.keys() == old.keys()
    counts = Counter()
    for file in new:
        assert new[file].keys() == old[file].keys()
        for name, tensor in new[file].items():
            before = old[file][name]
            assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype)
            in_blocks = tensor.dtype == torch.uint8 and len(tensor) % 64 == 0
            assert torch.equal(nibbles_of(tensor, 64), nibbles_of(before, None)) if in_blocks else tensor.equal(before)
            counts[tensor.dtype == torch.uint8, in_blocks] += 1
    assert counts[True, True] and counts[True, False]


@pytest.mark.parametrize("kind", ["bloom", "llama", "gpt2"])
@pytest.mark.parametrize("limit", [10**9, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_orders_give_the_same_answers(int4_orders, tmp_path, kernels, kind, limit, dtype):
    settings = Settings(dtype=dtype, max_memory={"cpu": limit})
    given = {}
    for folder in int4_orders(kind):
        model = load_model(folder, settings, tmp_path).model
        for length in (3, 40, 100):
            kernels.clear()
            with torch.inference_mode():
                given[folder, length] = model(torch.tensor([prompt_ids(0, length)])).logits
            ran = "_weight_int4pack_mm_for_cpu" in kernels
            if length == 3 and folder == int4_orders(kind)[0]:
                readable = products.KERNEL_BLOCK if limit else products.KERNEL_BLOCK == 64
                assert ran == bool(dtype == "bfloat16" and readable)
    for length in (3, 40, 100):
        new, old = (given[folder, length] for folder in int4_orders(kind))
        if limit and dtype == "bfloat16" and products.KERNEL_BLOCK:
            assert torch.equal(new, old)  # both are in the kernel's order
        assert (new - old).std() < {"float32": 1e-5, "bfloat16": 0.05}[dtype] * old.std()


def test_what_is_in_the_kernels_order_is_left_as_it_was_loaded(int4_orders, tmp_path, monkeypatch):
    orders = set()

    def spy(weight, row_block, new_block):
        orders.add(row_block)
        return products.reordered(weight, row_block, new_block)

    monkeypatch.setattr(quantized_modules, "reordered", spy)
    expected = {64: (set(), {None}), 32: ({64, None}, {None})}.get(products.KERNEL_BLOCK, (set(), set()))
    for folder, before in zip(int4_orders("llama"), expected, strict=True):  # some of it has 32 rows
        load_model(folder, Settings(dtype="float32"), tmp_path)
        assert not orders
        load_model(folder, Settings(dtype="bfloat16"), tmp_path)
        assert orders == before
        orders.clear()


@pytest.mark.parametrize("shape, transposed", [((192, 96), False), ((96, 192), True), ((100, 64), False)])
def test_integers_do_not_depend_on_how_many_are_made_at_once(monkeypatch, shape, transposed):
    tensor = torch.randn(shape)

    def integers():
        matrix = quantize.Matrix(GROUP, transposed)
        quantization = quantize.Quantization(GROUP, [], {"name": matrix})
        blocks = [*quantization.blocks("name", tensor)]
        return torch.cat([weight for weight, _ in blocks]), torch.cat([scale for _, scale in blocks], 1), len(blocks)

    weight, scale, count = integers()
    assert [list(weight.shape), list(scale.shape)] == list(quantize.Matrix(GROUP, transposed).shapes(shape))
    monkeypatch.setattr(quantize, "_AT_ONCE", 5 * GROUP)
    *same, more = integers()
    assert count == 1 < more and torch.equal(weight, same[0]) and torch.equal(scale, same[1])


@pytest.mark.parametrize("key, value", [("bits", 3), ("row_block", 48)])
def test_an_unknown_format_is_refused(checkpoints, tmp_path, key, value):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"{key} {value}.* shard it again"):
        load_model(folder, Settings(), tmp_path)
