"""What was freed is used again within a forward, goes back to the system after it, and after a long prompt also from
between blocks in use."""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from handler.engine import Engine, EngineConfig, Request, heap, model_runner
from server.torchserve import MEMORY
from tests.engine.conftest import make_model, make_tokenizer, prompt_ids

BLOCK, BLOCKS = 64 << 10, 1600  # 105 MB
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = SETTING.read_text() if SETTING.exists() else ""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# In a process of its own, whose heap has no room for them: the bytes that the kernel zeroes for ten blocks of 4 MiB,
# one after the other.
ZEROED = """
import ctypes, json, resource
from handler.engine import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def zeroed():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(4 << 20)
        ctypes.memset(block, 1, 4 << 20)
        libc.free(block)
    heap.release_freed_memory()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

measured = {}
with heap.reusing_blocks():
    measured["a forward"] = zeroed()
    with heap.mapping_blocks():
        measured["what stays"] = zeroed()
    measured["a forward that goes on"] = zeroed()
measured["outside"] = zeroed()
with heap.mapping_blocks():
    measured["what stays, outside"] = zeroed()
print(json.dumps(measured))
"""


@needs_glibc
@pytest.mark.skipif("[always]" in HUGE_PAGES, reason="a fault may zero 2 MiB")
def test_blocks_are_mapped_once_in_a_forward_and_each_time_outside_of_it():
    ended = subprocess.run(
        [sys.executable, "-c", ZEROED], capture_output=True, text=True, check=True, env=os.environ | MEMORY
    )
    measured = json.loads(ended.stdout)
    once = {what: zeroed for what, zeroed in measured.items() if "forward" in what}
    assert len(once) == 2 and all(zeroed < 8 << 20 for zeroed in once.values())
    each_time = {what: zeroed for what, zeroed in measured.items() if what not in once}
    assert len(each_time) == 3 and all(zeroed >= 40 << 20 for zeroed in each_time.values())


def test_the_model_runs_so_and_keys_and_values_do_not(monkeypatch):
    model, during = make_model("bloom"), {}
    served = Engine(model, make_tokenizer(), EngineConfig(max_sequence_length=400))
    zeros = torch.Tensor.new_zeros

    def watched(tensor, *shape):
        if len(shape) == 4:  # of keys or values
            during["keys and values"] = heap._now
        return zeros(tensor, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", watched)
    hook = model.transformer.ln_f.register_forward_hook(lambda *_: during.update({"forward": heap._now}))
    served.submit(Request(prompt_ids(0, 20), {"max_new_tokens": 1}))
    while served.has_work:
        served.step()
    hook.remove()
    assert during["forward"] == heap._INSIDE
    assert during["keys and values"] == heap._now == heap.OUTSIDE


def test_a_forward_that_fails_leaves_nothing_behind():
    served = Engine(model := make_model("bloom"), make_tokenizer(), EngineConfig(max_sequence_length=400))

    def fail(*_):
        raise RuntimeError("broken")

    hook = model.transformer.ln_f.register_forward_hook(fail)
    job = served.submit(Request(prompt_ids(0, 20), {"max_new_tokens": 1}))
    while served.has_work:
        served.step()
    hook.remove()
    assert job.error and heap._now == heap.OUTSIDE


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
