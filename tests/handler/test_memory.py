"""The limit on keys and values follows the memory that is left."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from handler import memory
from handler.errors import LoadError
from handler.loading import load_model
from handler.settings import Settings
from handler.weights.placement import Part, Placement

MB = 10**6
GROUPS = Path("/sys/fs/cgroup/memory")  # version 1, where the tests may be allowed to make one


@pytest.fixture(scope="module")
def loaded(bloom, tmp_path_factory):
    return load_model(bloom, Settings(), tmp_path_factory.mktemp("memory"))


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_with_a_tighter_group_above(tmp_path):
    (tmp_path / "of").write_text("0::/pods/one\n")
    write(tmp_path / "pods", memory__max="900\n", memory__stat="anon 200\nfile 500\nshmem 60\nslab_unreclaimable 40\n")
    write(tmp_path / "pods/one", memory__max="max\n", memory__stat="anon 100\n")
    assert memory._free_in_control_groups(tmp_path, tmp_path / "of") == [600]


def test_version_1_seen_from_inside_a_container(tmp_path):
    (tmp_path / "of").write_text("5:cpu,cpuacct:/x\n4:memory:/kubepods/pod7\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="5000\n", memory__stat="cache 9\ntotal_rss 1000\n")
    assert memory._free_in_control_groups(tmp_path, tmp_path / "of") == [4000]


def test_no_groups(tmp_path):
    assert memory._free_in_control_groups(tmp_path, tmp_path / "missing") == []


@pytest.mark.skipif(not os.access(GROUPS, os.W_OK), reason="no control group of version 1 can be made here")
def test_a_real_group():
    group = GROUPS / f"test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(2_000 * MB))
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()));"
            "from handler.memory import free_host_memory; before = free_host_memory(); taken = b'1' * 500_000_000;"
            "print(before, free_host_memory())"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        free, left = map(int, printed.split())
        assert 1_000 * MB < free < 2_000 * MB
        assert left < free - 400 * MB
    finally:
        group.rmdir()


def needs(activation_bytes, copied_layers=0):
    return SimpleNamespace(activation_bytes=activation_bytes, copied_layers=copied_layers)


def test_a_gpus_room_is_shared_by_the_layers_that_it_computes(monkeypatch):
    free = {0: 1000, 1: 5000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 10**6))
    devices = ["gpu 0"] * 2 + ["gpu 1"] * 4 + ["cpu", "disk"]
    layers = [Part(f"h.{index}", device, 0) for index, device in enumerate(devices)]
    # The first computes what is on the CPU and on disk too: 4 of 8 layers in 900 bytes.
    assert memory.kv_cache_budget(Placement(layers, "gpu 0"), needs(0)) == 1800
    assert memory.kv_cache_budget(Placement(layers, "gpu 0"), needs(500)) == 900
    assert memory.kv_cache_budget(Placement(layers, "gpu 0"), needs(5000)) == 0
    # Where attention copies two layers' keys and values at a time, 6 of 8 must fit.
    assert memory.kv_cache_budget(Placement(layers, "gpu 0"), needs(0, copied_layers=2)) == 1200


def test_what_is_streamed_has_room_beside_keys_and_values(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10_000, 10**6))
    layers = [Part("h.0", "gpu 0", 70), Part("h.1", "cpu", 50), Part("head", "disk", 3_000)]
    assert memory.kv_cache_budget(Placement(layers, "gpu 0"), needs(1_000)) == (10_000 - 1_000 - 3_000) * 9 // 10


@pytest.fixture
def limited(loaded, monkeypatch):
    """The KV cache's limit in tokens under given settings, where memory is left for so many."""
    token_bytes = 2 * 4 * 32 * 4  # keys and values, layers, hidden size, bytes

    def limited(free_tokens, **settings):
        monkeypatch.setattr(memory, "kv_cache_budget", lambda *_: free_tokens * token_bytes)
        limit = memory.with_kv_cache_limit(Settings(**settings), loaded.model, loaded.placement).kv_cache_memory
        return limit and limit / token_bytes

    return limited


@pytest.mark.parametrize("free_tokens, limit", [(10**6, None), (1000, 1000)])
def test_the_default_gives_way_to_the_memory_that_is_left(limited, free_tokens, limit):
    assert limited(free_tokens) == limit


def test_too_little_for_a_model_worth_serving(limited):
    with pytest.raises(LoadError, match=r"memory for 100 tokens .*max_sequence_length"):
        limited(100)


def test_an_explicit_limit_is_obeyed(limited):
    assert limited(0, kv_cache_memory=10 * 1024) == 10


def bloom_560m():
    config = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        return BloomForCausalLM(config).bfloat16()


WEIGHTS = 1_118_425_088  # of BLOOM-560m
KEPT = 64 * 600_000  # oneDNN's kernels
# Of 1024 tokens: 14 bytes for each score of BLOOM-560m's 16 heads, 3 for the mask, and what a token is on its way.
WORKSPACE = 1024 * (2048 * (16 * 14 + 3) + 2 * (3 * 1024 + 2 * 3 * 1024)) + KEPT


@pytest.mark.parametrize(
    "settings, free, limits",
    [
        # Keys and values take a fifth at most, or what is set.
        ({}, {"cpu": 10**10}, {"cpu": (10**10 - WORKSPACE) * 0.9 * 0.8}),
        ({"kv_cache_memory": 10**9}, {"cpu": 10**10}, {"cpu": (10**10 - WORKSPACE) * 0.9 - 10**9 * 25 / 24}),
        # What does not fit is read ahead: a tensor of a layer and 64 MiB.
        ({}, {"cpu": 17 * 10**8}, {"cpu": (17 * 10**8 - WORKSPACE) * 0.9 * 0.8 - 4 * 1024 * 1024 * 2 - 2**26}),
        # If the embedding has to be read too, which is the output's too, that needs all that there is.
        ({}, {"cpu": 10**9}, {"cpu": 0}),
        ({}, {"cpu": 10**6}, {"cpu": 0}),
        # GPUs share the keys and values; the host has none.
        (
            {"kv_cache_memory": 10**9},
            {0: 10**10, 1: 5 * 10**9, "cpu": 10**9},
            {
                0: (10**10 - WORKSPACE) * 0.9 - 5e8 - 1e9 / 24,
                1: (5 * 10**9 - WORKSPACE) * 0.9 - 5e8 - 1e9 / 24,
                "cpu": 10**9,
            },
        ),
    ],
)
def test_what_is_free_is_shared_by_weights_keys_and_values(settings, free, limits):
    assert memory.device_limits(bloom_560m(), Settings(**settings), free) == pytest.approx(
        {device: max(0, limit) for device, limit in limits.items()}, abs=1
    )


def test_the_rest_of_the_memory_is_the_page_caches(loaded, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 10**9)
    settings = Settings(kv_cache_memory=10**8)
    room = memory.page_cache_room(settings, loaded.model, loaded.placement)
    full_rows = 32 * 2048 * 1024  # bytes, less than the limit
    # Of 1024 tokens: 16 bytes for each score of 4 heads, 5 for the mask, and what a token is on its way.
    activations = 1024 * (2048 * (4 * 16 + 5) + 4 * (3 * 32 + 2 * 3 * 32)) + KEPT
    assert room == int((10**9 - activations) * 0.9) * 4 // 5 - full_rows  # of 4 layers, of which one is copied
