"""The tensors that a step makes, counted as they come and go, against what is planned for them."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from handler.engine import Engine, EngineConfig, Request
from handler.engine.capacity import KERNEL_BYTES, KERNELS

from .conftest import make_tokenizer, prompt_ids


class LiveTensors(TorchDispatchMode):
    """Counts bytes of the tensors that are made within it; `peak` is the most that lived at the same time."""

    def __init__(self):
        super().__init__()
        self._bytes, self._live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._bytes:
                    self._bytes[storage._cdata] = storage.nbytes()
                    self._live += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self._live)
        return made

    def _forget(self, storage):
        self._live -= self._bytes.pop(storage)


def peak_of_steps(engine):
    """Most bytes of new tensors, also of those that stay, in any of the steps until all is done."""
    peak = 0
    while engine.has_work:
        with LiveTensors() as live:
            engine.step()
        peak = max(peak, live.peak)
    return peak


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_reported_prompt_beside_those_that_are_sampled_from(dtype, mixed):
    wide = {"vocab_size": 250_000, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**wide, num_hidden_layers=1), dtype=dtype)
    config = EngineConfig(max_batch_size=26, max_sequence_length=256, prefill_chunk=1024, num_speculative_tokens=0)
    engine = Engine(model, make_tokenizer(), config)
    engine._scheduler._mixed_batch = mixed
    engine._cost.outweighs_reading = lambda positions: False
    drawn = {"max_new_tokens": 9, "do_sample": True, "top_k": 0}
    jobs = [engine.submit(Request([5 + n], drawn, ignore_eos=True, logprobs=5)) for n in range(25)]
    for _ in range(3):
        engine.step()
    jobs.append(engine.submit(Request(prompt_ids(0, 200), {"max_new_tokens": 2}, prompt_logprobs=True)))
    assert 0 < peak_of_steps(engine) <= engine.capacity.activation_bytes - KERNELS * KERNEL_BYTES
    assert not any(job.error for job in jobs)


def test_scores_of_new_tokens_that_come_behind_a_long_row():
    """The first row's prompt is nearly through when nobody decodes any more: what is left of it and the second row's
    are then as wide as there is memory for."""
    config = GPTJConfig(vocab_size=384, n_embd=64, n_layer=2, n_head=16, rotary_dim=4)  # keeps all scores
    settings = EngineConfig(max_batch_size=3, max_sequence_length=512, prefill_chunk=96, num_speculative_tokens=0)
    engine = Engine(AutoModelForCausalLM.from_config(config), make_tokenizer(), settings)
    short = engine.submit(Request([5], {"max_new_tokens": 3, "min_new_tokens": 3}))
    jobs = [engine.submit(Request(prompt_ids(seed, 500), {"max_new_tokens": 2})) for seed in range(2)]
    seen = []
    forward = engine._runner.forward

    def seen_forward(batch):
        seen.append((batch.num_scheduled_tokens, [sequence.num_cached_tokens for sequence in batch.sequences]))
        return forward(batch)

    engine._runner.forward = seen_forward
    engine.step()
    peak, kept = peak_of_steps(engine), engine.capacity.kv_cache_bytes + engine.capacity.kv_copy_bytes
    assert any(len(new) == 2 and min(new) > 90 and max(past) > 300 for new, past in seen)
    assert peak <= engine.capacity.activation_bytes - KERNELS * KERNEL_BYTES + kept
    assert not any(job.error for job in (short, *jobs))
