"""The limit on keys and values follows the memory that is left."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from handler import memory
from handler.engine import Engine, Request
from handler.errors import LoadError
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import reading, streaming
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


def test_javas_heap_has_room_to_grow(tmp_path):
    """What weights take is not given back when Java needs it; what the page cache takes is."""
    code = (
        "import psutil; from handler import memory; memory.free_host_memory = lambda: 2 * memory.JAVA_BYTES;"
        "java = psutil.Process().parent(); left = memory.free_memory(0)['cpu'];"
        "print(java.name(), left - memory.JAVA_BYTES, java.memory_info().rss)"
    )
    run = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {code!r}], check=True)"
    (tmp_path / "java").symlink_to(Path(sys.executable).resolve())
    names = []
    for parent in (tmp_path / "java", sys.executable):
        printed = subprocess.run([parent, "-c", run], capture_output=True, text=True, check=True).stdout.split()
        name, beside_the_heap, taken = printed[0], *map(int, printed[1:])
        names.append(name)
        expected = taken if name == "java" else memory.JAVA_BYTES
        assert beside_the_heap == pytest.approx(expected, abs=MB)
    assert names[0] == "java" != names[1]


def needs(activation_bytes, copied_layers=0):
    return SimpleNamespace(activation_bytes_on=lambda device: activation_bytes, copied_layers=copied_layers)


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
    placement = Placement(layers, "gpu 0", ring_bytes=3_000, small_bytes=100)  # these are there already
    assert memory.kv_cache_budget(placement, needs(1_000)) == (10_000 - 1_000 - 3_000) * 9 // 10


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
HEAP = 32_000_000  # freed blocks between others
# Of BLOOM-560m's words: logits of 128 tokens of a prompt, of 32 rows, and of as many drafts; the rows' three times in
# float32.
WORKSPACE = 250_880 * (2 * (128 + 32 + 32) + 3 * 4 * 32) + HEAP + KEPT


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
        # GPUs share the keys and values; the host has none, and keeps a tenth free.
        (
            {"kv_cache_memory": 10**9},
            {0: 10**10, 1: 5 * 10**9, "cpu": 10**9},
            {
                0: (10**10 - WORKSPACE) * 0.9 - 5e8 - 1e9 / 24,
                1: (5 * 10**9 - WORKSPACE) * 0.9 - 5e8 - 1e9 / 24,
                "cpu": 9 * 10**8,
            },
        ),
        # What is on disk is read ahead into the host's memory.
        (
            {},
            {0: 1_235_000_000, "cpu": 3 * 10**8},
            {0: (1_235_000_000 - WORKSPACE) * 0.9 * 0.8, "cpu": 3 * 10**8 * 0.9 - 4 * 1024 * 1024 * 2 - 2**26},
        ),
    ],
)
def test_what_is_free_is_shared_by_weights_keys_and_values(settings, free, limits):
    assert memory.device_limits(bloom_560m(), Settings(**settings), free) == pytest.approx(
        {device: max(0, limit) for device, limit in limits.items()}, abs=1
    )


def answers(engine, count, after_step=lambda: None):
    """What `count` requests get together, as token ids."""
    parameters = {"max_new_tokens": 9, "min_new_tokens": 9}
    jobs = [engine.submit(Request([5 + n, 6, 7, 8], parameters)) for n in range(count)]
    while engine.has_work:
        engine.step()
        after_step()
    return [job.sequences[0].token_ids for job in jobs]


def test_the_page_cache_has_what_keys_and_values_do_not_take_now(bloom, tmp_path, monkeypatch):
    """One request leaves room for weights, many take it, and give it back; no answer is another one."""
    monkeypatch.setattr(streaming, "SMALL_BYTES", 0)
    monkeypatch.setattr(reading, "_PIECE", reading.ALIGNMENT)
    monkeypatch.setattr(reading.Reader, "_is_cached", lambda *_: True)  # the kernel takes nothing back meanwhile
    settings = Settings(max_memory={"cpu": 0}, max_batch_size=32, num_speculative_tokens=0)
    loaded = load_model(bloom, settings, tmp_path)
    engine, streamed = Engine(loaded.model, loaded.tokenizer, settings), loaded.streamed
    streamed._arena = streaming._Arena(reading.ALIGNMENT)  # what is read ahead may count for either of two steps
    reader, size = streamed.reader, sum(piece.size for piece in streamed._pieces)
    free, read, pieces = KEPT + 2_900_000, reader._read, set(streamed._pieces)
    from_disk, stored_before, steps = [], [], []

    def stored():
        return sum(store.nbytes for store in engine._cache._stores())

    def counted(piece, *rest):
        if piece in pieces and piece not in reader._cached:  # no row of the embedding
            from_disk.append(piece.size)
        read(piece, *rest)

    def after_step():
        steps.append((stored(), streamed.page_cache_bytes, sum(from_disk)))
        from_disk.clear()
        # What came in the forward had been foreseen when it began.
        grown = stored() - stored_before[-1]
        assert grown <= max(0, engine.bytes_to_come - KEPT)
        assert streamed.page_cache_bytes <= max(0, free - stored() - KEPT)

    monkeypatch.setattr(memory, "free_host_memory", lambda: free - stored())
    monkeypatch.setattr(reader, "_read", counted)
    streamed.page_cache_room = partial(memory.page_cache_room, engine)
    loaded.model.register_forward_pre_hook(lambda *_: stored_before.append(stored()))
    expected = answers(Engine(AutoModelForCausalLM.from_pretrained(bloom), loaded.tokenizer, settings), 32)
    ends = []
    for count in (1, 32, 1):
        assert answers(engine, count, after_step) == expected[:count]
        ends.append(steps[-1])
    (few_stored, all_kept, little_read), (many_stored, some_kept, much_read), again = ends
    assert many_stored > 10 * few_stored
    assert all_kept == again[1] == size and 0 < some_kept < size // 2
    assert little_read < size // 8
    assert size - some_kept <= much_read < size - some_kept + size // 8


def test_on_a_gpu_the_host_holds_no_keys_and_values(loaded, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 10**9)
    engine = Engine(loaded.model, loaded.tokenizer, Settings())
    engine._runner.bytes_to_come = 10**8
    assert memory.page_cache_room(engine) == int(9 * 10**8 * 0.97)
    engine._runner.device = torch.device("cuda")
    assert memory.page_cache_room(engine) == int(10**9 * 0.97)
