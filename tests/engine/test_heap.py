"""What was freed goes back to the system after a long prompt, also from between blocks in use."""

import ctypes
import gc
import platform

import psutil
import pytest

from handler.engine import Engine, EngineConfig, Request, heap, model_runner
from tests.engine.conftest import make_model, make_tokenizer, prompt_ids

BLOCK, BLOCKS = 64 << 10, 1600  # 105 MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
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
