import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, T5Config

from handler.engine import Engine
from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.engine.heap import HEAP_BYTES
from handler.loading import load_model, meta_model, read_config
from handler.memory import JAVA_BYTES, RESERVE
from handler.settings import Settings
from scripts.console import UserError, parse_gpus
from scripts.plan import Bandwidth, make_plan
from scripts.plan.__main__ import main
from scripts.plan.make_plan import (
    CHECK_BYTES,
    GPU_CONTEXT_BYTES,
    GPU_HOST_BYTES,
    RUNTIME_BYTES,
    STREAMING_BYTES,
    WORKER_BYTES,
)
from scripts.plan.remedies import remedies
from scripts.plan.report import format_table
from server.torchserve import MEMORY
from tests.models import save_bloom_7b1_config, train_tokenizer

GB = 10**9
KV_BYTES_PER_TOKEN = 2 * 30 * 4096 * 2  # of BLOOM-7b1 in 16 bits: keys and values, layers, hidden size, bytes
NORM_BYTES = 2 * 4096 * 2  # of BLOOM-7b1's last norm
LAYER_BYTES = 402_759_680  # of BLOOM-7b1: (12 h² + 13 h) weights of 2 bytes
TOTAL_BYTES = 14_138_032_128  # 7,069,016,064 weights
VOCABULARY = 250_880 * (360 + 11 * 72)  # in tokenizer and grammars, where there is no tokenizer.json


@pytest.fixture
def tiny(bloom):
    return bloom


@pytest.fixture(scope="module")
def bloom_7b1(tmp_path_factory):
    return save_bloom_7b1_config(tmp_path_factory.mktemp("bloom-7b1"))


def capacity(folder, settings=Settings()):  # noqa: B008  # it is frozen
    return Capacity.of(Architecture.of(meta_model(read_config(folder, settings), settings, [])), settings)


def sizes(limits):
    return Settings(dtype="bfloat16", max_memory=limits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("limit", [0, 30_000, 60_000, 100_000, 150_000, 250_000, 10**9, None])
def test_the_map_is_what_the_loader_makes(tiny, tmp_path, limit, dtype):
    # Packed ones are held in float32 on a CPU without 16-bit instructions.
    settings = Settings(dtype=dtype, max_memory=None if limit is None else {"cpu": limit}, pack_weights=dtype == "auto")
    loaded, plan = load_model(tiny, settings, tmp_path), make_plan(tiny, settings, gpus=[])
    assert plan.device_map == loaded.device_map
    tiers = {device.name: (device.layers, device.weights) for device in plan.devices if device.weights}
    assert tiers == {name: (tier.layers, tier.bytes) for name, tier in loaded.placement.tiers.items()}
    assert plan.dtype == str(loaded.model.dtype).removeprefix("torch.")


def test_a_map_of_modules_is_taken_as_it_is(tiny, tmp_path):
    settings = Settings(device_map={"transformer": 0, "lm_head": 0})
    (cpu, _), loaded = make_plan(tiny, settings, gpus=[]).devices, load_model(tiny, settings, tmp_path)
    assert (cpu.layers, cpu.weights) == (loaded.placement.tiers["cpu"].layers, loaded.placement.tiers["cpu"].bytes)
    assert make_plan(tiny, settings, gpus=[GB]).devices[0].layers == 4


def test_bloom_7b1_on_the_samples_two_gpus_of_10_gb_does_not_fit_with_32_long_sequences(bloom_7b1):
    plan = make_plan(bloom_7b1, sizes({0: 10 * GB, 1: 10 * GB, "cpu": 10 * GB}), [10 * GB] * 2, 32 * GB)
    assert plan.weights == TOTAL_BYTES
    assert plan.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    assert plan.kv_cache == pytest.approx(32 * 2048 * KV_BYTES_PER_TOKEN, abs=2)
    first, second, cpu, disk = plan.devices
    assert first.layers + second.layers == 30
    assert first.weights + second.weights == TOTAL_BYTES
    assert not cpu.weights and not disk.weights
    assert set(plan.missing) == {"gpu 0", "gpu 1"}
    assert plan.verdict.startswith("does not fit: ")
    assert plan.memory_request == RUNTIME_BYTES + GPU_HOST_BYTES + 2 * GB  # a shard passes through


def test_it_fits_with_fewer_keys_and_values_as_the_remedy_says(bloom_7b1):
    settings = sizes({0: 10 * GB, 1: 10 * GB, "cpu": 10 * GB})
    plan = make_plan(bloom_7b1, settings, [10 * GB] * 2, 32 * GB)
    advice = remedies(plan, bloom_7b1)[0]
    assert advice.endswith("in setup_config.json it fits")
    advised = json.loads("{" + advice.removeprefix("with ").partition(" in setup_config.json")[0] + "}")
    changed = Settings(dtype="bfloat16", **({"max_memory": settings.max_memory} | advised))
    better = make_plan(bloom_7b1, changed, [10 * GB] * 2, 32 * GB)
    assert better.verdict == "fits"
    assert not remedies(better, bloom_7b1)


def test_hardware_that_is_not_named_is_what_is_needed(bloom_7b1):
    plan = make_plan(bloom_7b1, sizes({0: 10 * GB, "cpu": 10 * GB}))
    assert [device.name for device in plan.devices] == ["gpu 0", "cpu", "disk"]
    assert not plan.missing
    assert plan.verdict.endswith(f"given {plan.gpus[0].needed / 1e9:.2f} GB of gpu 0, given 10.60 GB of cpu")


def test_layers_on_the_cpu_come_over_pcie_and_keep_their_keys_on_the_gpu(bloom_7b1):
    settings = sizes({0: 10 * GB, "cpu": 10 * GB}).model_copy(update={"max_batch_size": 1, "max_sequence_length": 512})
    plan = make_plan(bloom_7b1, settings, [16 * GB], 32 * GB, Bandwidth(pcie=10e9))
    gpu, cpu, _ = plan.devices
    assert cpu.layers and cpu.weights == cpu.layers * LAYER_BYTES + NORM_BYTES
    assert plan.streamed == {"disk": 0, "pcie": cpu.weights, "ram": 0}
    assert plan.seconds_a_step == pytest.approx(cpu.weights / 10e9)
    assert plan.tokens_per_second(8) == pytest.approx(8 * 10e9 / cpu.weights)
    assert gpu.kv_cache == 512 * KV_BYTES_PER_TOKEN and not cpu.kv_cache
    assert plan.verdict.startswith("fits with offload at about ")
    assert plan.memory_request == cpu.weights + RUNTIME_BYTES + GPU_HOST_BYTES + 2 * GB


def test_without_gpus_layers_on_disk_are_read_and_then_multiplied(bloom_7b1):
    plan = make_plan(bloom_7b1, sizes({"cpu": 10 * GB}), [], 64 * GB)
    cpu, disk = plan.devices
    assert disk.layers == 11 and disk.weights == 11 * LAYER_BYTES
    assert plan.streamed == {"disk": disk.weights, "pcie": 0, "ram": TOTAL_BYTES}
    assert cpu.kv_cache == plan.kv_cache == 32 * 2048 * KV_BYTES_PER_TOKEN
    assert plan.memory_request == cpu.needed


def test_a_node_must_hold_the_shard_that_is_being_read(bloom_7b1):
    plan = make_plan(bloom_7b1, sizes({0: 80 * GB}), [80 * GB], 5 * GB)
    assert plan.verdict == "does not fit: 0.77 GB on cpu missing"
    assert remedies(plan, bloom_7b1) == ["it fits on 5.77 GB of cpu instead of 5.00 GB"]


def test_without_max_memory_one_gpu_keeps_a_fifth_for_keys_and_values_and_two_are_balanced(bloom_7b1):
    one = make_plan(bloom_7b1, Settings(), [12 * GB])
    usable = 12 * GB - GPU_CONTEXT_BYTES - capacity(bloom_7b1).gpu_activation_bytes
    limit = usable * (1 - RESERVE) * (1 - 0.2)
    assert limit - 2 * LAYER_BYTES < one.devices[0].weights <= limit + LAYER_BYTES
    two = make_plan(bloom_7b1, Settings(), [80 * GB, 80 * GB], 6 * GB)
    assert abs(two.devices[0].layers - two.devices[1].layers) <= 8
    assert two.verdict == "fits"


def test_float32_on_disk_is_read_as_it_is_stored(tiny):
    plan = make_plan(tiny, Settings(dtype="bfloat16", max_memory={"cpu": 0}), [])
    stored = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert plan.checkpoint_bytes == stored
    assert plan.streamed["disk"] == pytest.approx(stored, rel=0.001)
    assert plan.weights < 0.55 * stored
    assert plan.largest_shard == max(path.stat().st_size for path in tiny.glob("*.safetensors"))


def test_bin_checkpoints_take_their_offloaded_layers_once_more_of_disk(tiny, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0" * 400_000)
    settings = Settings(max_memory={"cpu": 0})
    plan, in_place = make_plan(tmp_path, settings, []), make_plan(tiny, settings, [])
    assert plan.offload_bytes == plan.weights == plan.streamed["disk"]
    assert not in_place.offload_bytes
    assert plan.disk_request("no-archive") - in_place.disk_request("no-archive") == plan.weights


def test_a_config_without_dtype_is_computed_in_what_is_stored(tiny, tmp_path):
    model = load_model(tiny, Settings(dtype="bfloat16", pack_weights=False), tmp_path).model
    model.save_pretrained(tmp_path / "bf16")
    load_model(tiny, Settings(), tmp_path).tokenizer.save_pretrained(tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    del config["dtype"]
    (tmp_path / "bf16/config.json").write_text(json.dumps(config))
    plan = make_plan(tmp_path / "bf16", Settings(), [])
    assert plan.dtype == "bfloat16"
    assert load_model(tmp_path / "bf16", Settings(pack_weights=False), tmp_path).model.dtype == model.dtype


def test_where_both_kinds_of_weights_lie_safetensors_are_read_and_both_are_archived(tiny, tmp_path):
    both = shutil.copytree(tiny, tmp_path / "both")
    (both / "pytorch_model.bin").write_bytes(b"\0" * 10_000_000)
    plan, one = (
        make_plan(both, Settings(max_memory={"cpu": 0}), []),
        make_plan(tiny, Settings(max_memory={"cpu": 0}), []),
    )
    assert (plan.streamed, plan.largest_shard, plan.offload_bytes) == (one.streamed, one.largest_shard, 0)
    assert plan.checkpoint_bytes == one.checkpoint_bytes + 10_000_000


def test_the_plan_has_the_engines_own_limits(tmp_path):
    """A sliding window bounds neither chunks nor sequences."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "sliding_window": 512, "max_position_embeddings": 4096}
    config = MistralConfig(vocab_size=300, **shape)
    config.save_pretrained(tmp_path)
    settings = Settings(prefill_chunk=256, max_batch_size=2)
    limits = Engine(AutoModelForCausalLM.from_config(config), train_tokenizer(), settings).capacity
    plan = make_plan(tmp_path, settings.model_copy(update={"kv_cache_memory": limits.kv_cache_bytes}), gpus=[])
    assert plan.max_sequence_length == limits.max_sequence_length == 4096
    assert plan.kv_cache == limits.kv_cache_bytes == 2 * 4096 * plan.kv_bytes_per_token
    kept = 300 * (360 + 11 * 72)
    assert plan.cpu.workspace + plan.cpu.kv_copies == limits.activation_bytes + limits.kv_copy_bytes + kept


def test_shared_heads_make_keys_and_values_small(tmp_path):
    LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    assert make_plan(tmp_path, Settings(), []).kv_bytes_per_token == 2 * 32 * 8 * 128 * 2


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """Llama-3.1-8B's shape: 131,072 tokens of 131,072 bytes each."""
    folder = tmp_path_factory.mktemp("llama-8b")
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    LlamaConfig(**shape, **heads, dtype="bfloat16").save_pretrained(folder)
    return folder


def test_a_long_context_model_asks_for_one_whole_row_and_not_for_32(llama_8b):
    plan = make_plan(llama_8b, Settings(), [])
    assert plan.kv_cache == 131072 * 131072
    assert plan.memory_request < 45 * GB  # and not the 561 GiB of 32 rows
    # Each of 32 query heads gets a copy of its group's keys and values, a layer at a time.
    assert plan.cpu.kv_copies == plan.kv_cache * (1 + 4) // 32
    explicit = make_plan(llama_8b, Settings(kv_cache_memory=100 * GB), [])
    assert explicit.kv_cache == 100 * GB


def test_a_long_context_model_is_advised_shorter_or_fewer_sequences(llama_8b):
    gpu = parse_gpus("1xA10G")
    plan = make_plan(llama_8b, Settings(max_memory={0: 20 * GB}), gpu, 32 * GB)
    assert "gpu 0" in plan.missing
    advised = json.loads("{" + remedies(plan, llama_8b)[0].removeprefix("with ").partition(" in setup_config")[0] + "}")
    assert advised["max_sequence_length"] == 32768 and "kv_cache_memory" in advised
    better = make_plan(llama_8b, Settings(**{"max_memory": {0: 20 * GB}} | advised), gpu, 32 * GB)
    assert better.verdict == "fits"
    many = Settings(max_memory={0: 20 * GB}, max_sequence_length=2048, max_batch_size=64)
    fewer = remedies(make_plan(llama_8b, many, gpu, 32 * GB), llama_8b)
    assert any('with "max_batch_size": 16 ' in line for line in fewer)


def test_a_gpu_keeps_a_reserve(bloom_7b1):
    """For CUDA's context, and for the fragments of PyTorch's allocator."""
    gpu, other, cpu, _ = make_plan(bloom_7b1, sizes({0: 80 * GB}), [80 * GB] * 2, 32 * GB).devices
    assert gpu.runtime == GPU_CONTEXT_BYTES
    assert gpu.reserve == (gpu.kv_cache + gpu.kv_copies + gpu.workspace) // 9
    assert not other.needed
    assert cpu.runtime == RUNTIME_BYTES + GPU_HOST_BYTES


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1xT4, A10G", [15 * 2**30, 45 * 2**29]),
        ("2x16GiB", [2**34] * 2),
        ("16GB, 1x8GB", [16 * GB, 8 * GB]),
        ("0", []),
        ("", []),
    ],
)
def test_gpus_as_people_write_them(text, expected):
    assert parse_gpus(text) == expected


@pytest.mark.parametrize("text", ["2xA100", "x16GiB", "16gb", "2x", ","])
def test_other_gpus_are_refused_with_what_to_write(text):
    with pytest.raises(UserError, match="write 2x16GiB"):
        parse_gpus(text)


def test_what_is_no_language_model_is_said_in_one_line(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 is an encoder-decoder model"):
        main(["--model-dir", str(tmp_path)])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--cpu", "32gb"], "CPU is '32gb'"),
        (["--disk-bandwidth", "fast"], "disk is 'fast'"),
        (["--setup-config", "missing.json"], "missing.json does not exist"),
    ],
)
def test_bad_options_say_what_to_send(tiny, more, message):
    with pytest.raises(UserError, match=message):
        main(["--model-dir", str(tiny), *more])


def test_the_command_writes_a_table_json_and_a_picture(bloom_7b1, tmp_path, capsys):
    setup, drawn, numbers = tmp_path / "setup_config.json", tmp_path / "plan.svg", tmp_path / "plan.json"
    setup.write_text(Path("setup_config.json").read_text())
    hardware = ["--gpus", "2x10GB", "--cpu", "32GiB"]
    main(["--model-dir", str(bloom_7b1), *hardware, "--setup-config", str(setup), "--json", str(numbers)])
    main(["--model-dir", str(bloom_7b1), *hardware, "--setup-config", str(setup), "--picture", str(drawn)])
    printed = capsys.readouterr()
    assert "gpu 1: max_memory in setup_config.json does not name it" in printed.out
    assert "verdict          does not fit" in printed.out
    assert "all on GPUs      2 such nodes, 2 GPUs each, on vLLM" in printed.out
    assert not printed.err
    plan = json.loads(numbers.read_text())
    assert plan["weights"] == TOTAL_BYTES
    assert plan["verdict"].startswith("does not fit") and plan["devices"][0]["missing"] > 0
    assert set(plan["tokens_per_second"]) == {"1", "32"}
    assert drawn.read_text().startswith("<?xml") and "<svg" in drawn.read_text()


def test_a_batch_that_costs_nothing_is_recommended(bloom_7b1, capsys):
    """Two operations for each of the weights but the head's bias-free norm: 14.1 GB in 14.1 s at 1 GB/s."""
    matrices = TOTAL_BYTES // 2 - 30 * (4096 * 13) - 4 * 4096  # without biases and norms
    settings = Settings(dtype="bfloat16", max_memory={"cpu": 0}, max_sequence_length=128)
    plan = make_plan(bloom_7b1, settings, [], None, Bandwidth(disk=1e9, ram=1e15, flops=1e11))
    assert plan.multiplied == matrices
    assert plan.balanced_rows == pytest.approx(TOTAL_BYTES / 1e9 * 1e11 / (2 * matrices), rel=0.001)
    assert plan.recommended_batch_size == int(plan.balanced_rows) == 100
    few = make_plan(bloom_7b1, settings, [], plan.cpu.needed - 12 * 128 * KV_BYTES_PER_TOKEN, plan.bandwidth)
    assert few.recommended_batch_size == 20  # of 32
    setup = Path("setup_config.json")
    main(["--model-dir", str(bloom_7b1), "--gpus", "0", "--setup-config", str(setup), "--tflops", "0.2"])
    assert "computing takes as long as that at 67 rows; recommended with this memory: max_batch_size 67" in (
        capsys.readouterr().out
    )


def test_the_small_files_of_a_checkpoint_are_enough(tiny, tmp_path):
    """As they come before the shards: sizes are then the config's."""
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(tiny / name, tmp_path)
    assert make_plan(tmp_path, Settings(), []).weights == make_plan(tiny, Settings(), []).weights


def test_memory_grows_from_ready_over_one_sequence_to_all_that_run_at_once(bloom_7b1):
    limits = {"dtype": "bfloat16", "max_memory": {"cpu": 4 * GB}, "max_sequence_length": 64}
    plan = make_plan(bloom_7b1, Settings(**limits), [])
    largest = 2 * 4 * 4096 * 4096  # bytes of a matrix; two are in memory when one is computed with
    assert plan.ready == plan.cpu.weights + WORKER_BYTES + VOCABULARY + 2 * largest + STREAMING_BYTES + CHECK_BYTES
    # A row of 64 tokens has room for 96, and one sequence's prompt may ask for log-probabilities.
    logits = 250_880 * (2 * 64 + 12 * 8)
    kept = 96 * KV_BYTES_PER_TOKEN * 31 // 30 + logits + HEAP_BYTES + 64 * 600_000 - CHECK_BYTES
    assert plan.serving[1] == pytest.approx(plan.ready + kept, abs=10)
    assert plan.serving[32] == plan.cpu.needed - JAVA_BYTES > plan.serving[1] + 31 * 64 * KV_BYTES_PER_TOKEN
    alone = make_plan(bloom_7b1, Settings(**limits, max_batch_size=1), [])
    assert alone.serving == {1: alone.cpu.needed - JAVA_BYTES}
    on_gpu = make_plan(bloom_7b1, sizes({0: 80 * GB}), [80 * GB])
    assert set(on_gpu.serving.values()) == {on_gpu.cpu.needed - JAVA_BYTES}  # keys and values are the GPU's
    assert on_gpu.ready <= on_gpu.serving[1]


def test_a_vocabulary_takes_memory_by_its_text(bloom_7b1, tmp_path):
    shutil.copy(bloom_7b1 / "config.json", tmp_path)
    without = make_plan(bloom_7b1, Settings(), []).ready
    (tmp_path / "tokenizer.json").write_bytes(b" " * 1_000_000)
    assert without - make_plan(tmp_path, Settings(), []).ready == 11 * (72 * 250_880 - 1_000_000)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert make_plan(tmp_path, Settings(), []).ready == without


WORKER = """
import pathlib, re, sys
from handler.engine import Engine
from handler.loading import load_model
from handler.settings import Settings

folder, settings = pathlib.Path(sys.argv[1]), Settings()
loaded = load_model(folder, settings, folder)
engine = Engine(loaded.model, loaded.tokenizer, settings)
print(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much of it is no file's")
def test_a_worker_without_a_model_to_speak_of_takes_what_is_planned(tiny):
    """Besides it has pages of its libraries, by the machine: benchmarks/plan_memory.py counts them."""
    command = [sys.executable, "-c", WORKER, str(tiny)]
    environment = os.environ | MEMORY | {"OMP_NUM_THREADS": "1"}  # the kernel's figure is off by some pages a core
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 0.5 < int(ended.stdout) * 1024 / make_plan(tiny, Settings(), []).ready < 1


def test_the_table_says_what_the_worker_takes(bloom_7b1):
    limits = {"dtype": "bfloat16", "max_memory": {"cpu": 4 * GB}, "max_sequence_length": 64}
    plan = make_plan(bloom_7b1, Settings(**limits), [])
    ready, alone, full = (f"{size / GB:.2f} GB" for size in (plan.ready, plan.serving[1], plan.serving[32]))
    assert f"{ready} at READY, {alone} with one sequence, {full} with all keys and values" in format_table(plan)
    assert json.loads(json.dumps(plan.as_json()))["serving"] == {"1": plan.serving[1], "32": plan.serving[32]}
