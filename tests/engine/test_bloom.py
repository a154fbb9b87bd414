"""BLOOM's attention by blocks gives what the library's does, and no tensor holds all scores."""

import copy
from types import MethodType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention

from handler.engine import Engine, EngineConfig, Request, block_attention, bloom
from handler.engine.architecture import Architecture
from handler.engine.bloom import FEWEST_QUERIES, _attention, mend_bloom
from handler.engine.capacity import Capacity

from .conftest import make_model, make_tokenizer, prompt_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, 4 << 20, 4 * 1000, 1])
@torch.inference_mode()
def test_logits_are_the_librarys(monkeypatch, dtype, block):
    """Of a prompt, of a chunk behind it and of one token more, beside a row that is shorter on the left; in bfloat16 as
    near to float32's. block: None where code of ours may make it."""
    if block is not None:
        monkeypatch.setattr(block_attention, "BLOCK_BYTES", block)
        for name in ("can_decode", "can_attend"):
            monkeypatch.setattr(bloom, name, lambda *given: False)
    theirs = copy.deepcopy(make_model("bloom")).to(dtype)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).float()
    for module in ours.modules():
        if isinstance(module, BloomAttention):
            module.forward = MethodType(_attention, module)
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    caches = [None, None, None]
    for start, end in ((0, 23), (23, 39), (39, 40)):
        outputs = [
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            for model, cache in zip((theirs, ours, exact), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        their_logits, our_logits, logits = (output.logits[mask[:, start:end].bool()].float() for output in outputs)
        off = (our_logits - logits).std() / logits.std()
        if dtype == torch.float32:
            torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-4)
            assert off < 1e-5
        else:
            assert off < 1.5 * (their_logits - logits).std() / logits.std() < 0.05


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@torch.no_grad()
def test_no_tensor_holds_all_scores(monkeypatch):
    monkeypatch.setattr(block_attention, "BLOCK_BYTES", 4 * 16 * 200 * 10)
    assert FEWEST_QUERIES < 10
    model = BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=16, n_layer=1, n_head=16)).eval()
    ids = torch.zeros(1, 200, dtype=torch.long)
    with Largest() as before:
        model(ids)
    mend_bloom(model)
    with Largest() as after:
        model(ids)
    assert before.numbers == 16 * 200 * 200 and after.numbers <= 200 * 200  # that is the mask's


@pytest.mark.parametrize("block", [4 << 20, 1])
def test_rows_that_come_and_go_get_what_generate_gives_each_alone(monkeypatch, block):
    monkeypatch.setattr(block_attention, "BLOCK_BYTES", block)
    library = make_model("bloom")
    model = copy.deepcopy(library)
    mend_bloom(model)
    engine = Engine(model, make_tokenizer(), EngineConfig(prefill_chunk=7, max_batch_size=4))
    prompts = [prompt_ids(seed, length) for seed, length in enumerate((20, 3, 33, 90, 1, 41))]
    jobs = [
        engine.submit(Request(prompt, {"max_new_tokens": 9 + n}, ignore_eos=True)) for n, prompt in enumerate(prompts)
    ]
    while engine.has_work:
        engine.step()
    for n, (prompt, job) in enumerate(zip(prompts, jobs, strict=True)):
        options = {"max_new_tokens": 9 + n, "min_new_tokens": 9 + n, "do_sample": False}
        expected = library.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert job.sequences[0].token_ids == expected


def test_slow_but_exact_products_stay_as_they_are_and_are_planned_for():
    with torch.device("meta"):
        config = BloomConfig(vocab_size=10, hidden_size=32, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True)
        slow, fast = BloomForCausalLM(config), BloomForCausalLM(BloomConfig(**config.to_dict() | {"pretraining_tp": 1}))
    mend_bloom(slow)
    assert not any(isinstance(module, torch.nn.GELU) for module in slow.modules())
    assert Architecture.of(slow).keeps_scores and not Architecture.of(fast).keeps_scores


def test_memory_for_scores_does_not_grow_with_a_long_prompt():
    """Twice as long a chunk of BLOOM-7b1's 2,048 columns: its scores alone were 0.5 GB more in bfloat16."""
    with torch.device("meta"):
        config = BloomConfig(vocab_size=10, hidden_size=4096, n_layer=1, n_head=32, seq_length=2048)
        architecture = Architecture.of(BloomForCausalLM(config).bfloat16())
    chunks = (128, 256)
    planned = [Capacity.of(architecture, EngineConfig(prefill_chunk=chunk)).activation_bytes for chunk in chunks]
    assert 0 < planned[1] - planned[0] < 4 * 128 * 4096 * 2 * 40
