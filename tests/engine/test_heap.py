"""What was freed is used again within a forward, goes back to the system after it, and after a long prompt also from
between blocks in use."""

import ctypes
import gc
import platform
import resource

import psutil
import pytest
import torch

from handler.engine import Engine, EngineConfig, Request, heap, model_runner
from server.torchserve import MEMORY
from tests.engine.conftest import make_model, make_tokenizer, prompt_ids

BLOCK, BLOCKS = 64 << 10, 1600  # 105 MB
PAGES = 4 << 20 >> 12
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def pages_faulted() -> int:
    """By blocks of 4 MiB, ten one after the other, with nothing in the heap that they fit in."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    heap.release_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(PAGES << 12)
        ctypes.memset(block, 1, PAGES << 12)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_blocks_are_mapped_once_in_a_forward_and_each_time_outside_of_it():
    with heap.reusing_blocks():
        assert pages_faulted() < 2 * PAGES
        with heap.mapping_blocks():
            assert pages_faulted() > 9 * PAGES
        assert pages_faulted() < 2 * PAGES
    assert pages_faulted() > 9 * PAGES
    with heap.mapping_blocks():
        assert pages_faulted() > 9 * PAGES
    assert pages_faulted() > 9 * PAGES


@needs_glibc
def test_the_model_runs_so_and_keys_and_values_do_not(monkeypatch):
    model, faults = make_model("bloom"), {}

    def note(what):
        faults.setdefault(what, pages_faulted())

    served = Engine(model, make_tokenizer(), EngineConfig(max_sequence_length=400))
    model.transformer.ln_f.register_forward_hook(lambda *_: note("forward"))
    served.submit(Request(prompt_ids(0, 20), {"max_new_tokens": 1}))
    zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda *a, **k: (note("keys and values"), zeros(*a, **k))[1])
    while served.has_work:
        served.step()
    assert faults["forward"] < 2 * PAGES
    assert faults["keys and values"] > 9 * PAGES
    assert pages_faulted() > 9 * PAGES


def test_the_launcher_begins_with_what_is_so_outside_of_forwards():
    begun_with = int(MEMORY["MALLOC_TRIM_THRESHOLD_"]), int(MEMORY["MALLOC_MMAP_THRESHOLD_"])
    assert begun_with == heap.OUTSIDE


@needs_glibc
def test_holes_between_blocks_in_use_are_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for index, block in enumerate(blocks):
        if index % 16:
            libc.free(block)
    gc.collect()
    before = psutil.Process().memory_info().rss
    heap.release_freed_memory()
    released = before - psutil.Process().memory_info().rss
    for block in blocks[::16]:
        libc.free(block)
    assert released > BLOCK * BLOCKS / 2


@pytest.mark.parametrize("tokens, times", [(20, 0), (300, 1)])
def test_a_forward_of_many_positions_is_followed_by_it(monkeypatch, tokens, times):
    calls = []
    monkeypatch.setattr(model_runner, "release_freed_memory", lambda: calls.append(1))
    served = Engine(make_model("bloom"), make_tokenizer(), EngineConfig(max_sequence_length=400))
    calls.clear()
    served.submit(Request(prompt_ids(0, tokens), {"max_new_tokens": 3}))
    while served.has_work:
        served.step()
    assert len(calls) == times
