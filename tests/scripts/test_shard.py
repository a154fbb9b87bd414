"""The shard script on tiny BLOOMs, judged by what transformers then loads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from handler.weights.safetensors_format import DTYPES, read_header
from scripts import console, shard
from server.torchserve import MEMORY

ROOT = Path(__file__).parents[2]
LIMIT = 50_000  # bytes: the embedding has 49,152
MB = 10**6


@pytest.fixture(scope="module")
def model(bloom) -> BloomForCausalLM:
    return BloomForCausalLM.from_pretrained(bloom).eval()


def save(model: BloomForCausalLM, folder: Path, form: str) -> Path:
    """`model` as a checkpoint in one of the forms that the script reads."""
    if form == "single":
        model.save_pretrained(folder)
    elif form == "sharded":
        model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        model.config.save_pretrained(folder)
        state = model.state_dict()
        assert state["lm_head.weight"].data_ptr() == state["transformer.word_embeddings.weight"].data_ptr()
        if form == "sharded bin":
            save_sharded_bin(state, folder)
        else:
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_sharded_bin(state: dict[str, torch.Tensor], folder: Path) -> None:
    names = list(state)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, keys in halves.items():
        torch.save({key: state[key].clone() for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def offset_in(file: Path, name: str) -> int:
    header, start = read_header(file)
    return start + header[name]["data_offsets"][0]


def run(*args: object) -> int:
    return console.run(lambda: shard.main([str(arg) for arg in args]))


def resharded(source: Path, *args: object) -> Path:
    output = source.with_name(source.name + "-out")
    assert run("--model-dir", source, "--output-dir", output, "--max-shard-size", LIMIT, *args) == 0
    return output


def fails_with(capsys: pytest.CaptureFixture[str], args: list[object], *words: str) -> None:
    """One line on stderr, which begins with "error: " and holds all `words`, and exit code 1."""
    capsys.readouterr()
    assert run(*args) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    for word in words:
        assert word in error[0]


def assert_same_model(folder: Path, model: BloomForCausalLM) -> None:
    result: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, info = result
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "old bin", "sharded bin"])
def test_the_same_model_comes_back_in_shards_within_the_limit(model, tmp_path, form) -> None:
    output = resharded(save(model, tmp_path / "in", form))

    assert_same_model(output, model)
    shards = sorted(output.glob("*.safetensors"))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert [path.name for path in shards] == names
    assert len(shards) > 4
    for path in shards:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= LIMIT
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert {path.name for path in output.iterdir()}.difference(names, ["generation_config.json"]) == {
        *("config.json", "tokenizer.json", "model.safetensors.index.json", "shard.json")
    }


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_one_shard_is_one_file_without_an_index(model, tmp_path, form) -> None:
    output = resharded(save(model, tmp_path / "in", form), "--max-shard-size", "2GB")
    assert (output / "model.safetensors").exists()
    assert not (output / "model.safetensors.index.json").exists()
    assert_same_model(output, model)


def test_tied_weights_are_stored_once(model, tmp_path) -> None:
    output = resharded(save(model, tmp_path / "in", "bin"), "--max-shard-size", "2GB")
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_weights_that_only_share_memory_are_all_stored(tmp_path) -> None:
    shared = torch.rand(4, 4)
    torch.save({"a.weight": shared, "b.weight": shared, "c": shared[:2]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    stored = load_file(resharded(tmp_path) / "model.safetensors")
    assert stored.keys() == {"a.weight", "b.weight", "c"}
    assert torch.equal(stored["b.weight"], shared)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_converts_floats_and_the_config(model, tmp_path, key) -> None:
    source = save(model, tmp_path / "in", "single")
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps({**config, key: "float32"}))

    output = resharded(source, "--dtype", "bfloat16")

    assert json.loads((output / "config.json").read_text())[key] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name


def test_every_kind_of_tensor_survives(tmp_path) -> None:
    tensors = {name: torch.arange(3).to(dtype) for name, dtype in reversed(DTYPES.items())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    file = resharded(tmp_path) / "model.safetensors"
    stored = load_file(file)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        assert stored[name].tolist() == tensor.tolist()
        # Although the source begins with three single bytes: only aligned tensors can be used where they are mapped.
        assert offset_in(file, name) % tensor.itemsize == 0


def test_a_transposed_tensor_and_a_parameter_are_written_as_they_are(tmp_path) -> None:
    transposed = torch.rand(3, 5).T
    torch.save({"t": transposed, "p": torch.nn.Parameter(transposed)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    stored = load_file(resharded(tmp_path) / "model.safetensors")
    assert torch.equal(stored["t"], transposed)
    assert torch.equal(stored["p"], transposed)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}, tmp_path / "model.safetensors")
    output = resharded(tmp_path, "--max-shard-size", "100")
    assert [sorted(load_file(path)) for path in sorted(output.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("text", ["", "big", "2XB", "-1GB", "0", "0.1", "GB", "1e9", "2gb"])
def test_a_bad_size_is_told_with_what_is_allowed(capsys, tmp_path, text) -> None:
    args = ["--model-dir", tmp_path, "--output-dir", tmp_path / "out", f"--max-shard-size={text}"]
    fails_with(capsys, args, "--max-shard-size", repr(text), "allowed")


# Memory. RssAnon, because pages of mapped files are the kernel's to take back.


def peak_memory(*command: str) -> int:
    """Bytes of anonymous memory that a Python process had at most, sampled all the time that it ran."""
    # What the C library keeps of freed memory depends on when threads meet, and on the order of sizes.
    environment = os.environ | MEMORY | {"MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(Path(f"/proc/{process.pid}/status").read_text()))
        time.sleep(0.001)
    assert process.returncode == 0, process.communicate()[1]
    process.communicate()
    return peak


@pytest.fixture(scope="module")
def import_memory() -> int:
    """What it has in the end, which samples might miss."""
    code = "import scripts.shard; print(open('/proc/self/status').read())"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return anonymous_bytes(printed)


def anonymous_bytes(status: str) -> int:
    """Of a process by its /proc/PID/status; 0 once it has ended."""
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, import_memory, form) -> None:
    state = {f"layer.{i}.weight": torch.rand(5 * MB) for i in range(12)}  # 240 MB
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    output = tmp_path.with_name(tmp_path.name + "-out")
    args = ["--model-dir", str(tmp_path), "--output-dir", str(output), "--max-shard-size", "25MB"]
    peak = peak_memory("-m", "scripts.shard", *args, "--dtype", "bfloat16")

    assert len(list(output.glob("*.safetensors"))) == 6  # two tensors, 20 MB, each
    assert peak - import_memory <= 2 * 25 * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_memory_does_not_grow_with_what_is_quantized(tmp_path, kind) -> None:
    peaks = []
    for layers in (4, 20):  # of 13 MB
        model, output = tmp_path / f"{layers}", tmp_path / f"{layers}-out"
        shape = {"vocab_size": 256, "hidden_size": 512, "n_head": 4}
        BloomForCausalLM(BloomConfig(**shape, n_layer=layers)).save_pretrained(model)
        args = ["--model-dir", str(model), "--output-dir", str(output), "--max-shard-size", "5MB"]
        peaks.append(peak_memory("-m", "scripts.shard", *args, "--quantize", kind))
    assert peaks[1] - peaks[0] <= 25 * MB  # of 200


# Integers. What models make of them: tests/weights/test_quantized.py.


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matrices_become_integers_beside_their_scales_and_the_rest_stays(model, tmp_path, form, kind, capsys) -> None:
    source = save(model, tmp_path / "in", form)
    output = resharded(source, "--quantize", kind, "--max-shard-size", 15_000)

    small = torch.uint8 if kind == "int4" else torch.int8
    stored = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if tensor.dim() == 1:
            assert torch.equal(stored[name], tensor), name
            continue
        words = name == "transformer.word_embeddings.weight"
        assert stored[name].dtype == (torch.int8 if words else small), name
        assert stored[f"{name}_scale"].dtype == torch.bfloat16
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    for name in stored:
        assert index[name] == index[name.removesuffix("_scale")]
        # PyTorch's kernel ends the process where int8 begins at an address that is no multiple of 16.
        assert stored[name].dtype != torch.int8 or offset_in(output / index[name], name) % 16 == 0
    for path in output.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 15_000
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "plain-int",
        "bits": 4 if kind == "int4" else 8,
        "group_size": 32 if kind == "int4" else None,
        "modules_to_not_convert": [],
    } | ({"row_block": 64} if kind == "int4" else {})
    said = capsys.readouterr().out.splitlines()[-1]
    wide = 2 if "lm_head.weight" in stored else 1  # embedding and head, where two files hold what is tied
    counts = f"16 in int4 and {wide} in int8" if kind == "int4" else f"{16 + wide} in int8"
    assert said.startswith(f"matrices: {counts}, off by ") and "%" in said and "most in transformer." in said
    assert said.endswith(", int4 in blocks of 64 rows") == (kind == "int4")


def test_names_without_the_models_prefix_as_blooms_own_checkpoints_have_them(model, tmp_path) -> None:
    source = tmp_path / "in"
    model.transformer.save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["BloomForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    stored = load_file(resharded(source, "--quantize", "int8", "--max-shard-size", "2GB") / "model.safetensors")
    assert stored["h.0.mlp.dense_h_to_4h.weight"].dtype == torch.int8
    assert stored["word_embeddings.weight_scale"].shape == (model.config.vocab_size,)


def test_what_cannot_be_quantized_is_refused(model, tmp_path, capsys) -> None:
    source = save(model, tmp_path / "in", "single")
    args = ["--output-dir", tmp_path / "out", "--model-dir", source, "--quantize"]
    with pytest.raises(SystemExit):
        run(*args, "int3")
    assert "invalid choice: 'int3' (choose from int8, int4)" in capsys.readouterr().err.replace(
        "'int8', 'int4'", "int8, int4"
    )

    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.1.mlp.dense_h_to_4h.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors")
    assert run(*args, "int4") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: transformer.h.1.mlp.dense_h_to_4h.weight") and "not finite" in error
    assert not (tmp_path / "out").exists()

    quantized = resharded(save(model, tmp_path / "again", "single"), "--quantize", "int8")
    again = ["--output-dir", tmp_path / "out", "--model-dir", quantized]
    fails_with(capsys, [*again, "--quantize", "int8"], "quantized already")
    fails_with(capsys, [*again, "--dtype", "float16"], "quantized", "--dtype keep")
    (source / "config.json").write_text('{"model_type": "vit"}')
    fails_with(capsys, [*args, "int8"], "no causal language model")


# What goes wrong.


def test_an_interrupted_run_leaves_nothing_and_the_next_one_succeeds(model, tmp_path, monkeypatch, capsys) -> None:
    source, output = save(model, tmp_path / "in", "sharded"), tmp_path / "in-out"
    write_shard, written = shard._write_shard, []

    def interrupted(path: Path, *args: Any) -> None:
        write_shard(path, *args)
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard, "_write_shard", interrupted)
    assert run("--model-dir", source, "--output-dir", output, "--max-shard-size", LIMIT) == 130
    assert len(written) == 3
    assert capsys.readouterr().err.endswith("stopped: nothing was kept, run the same command again\n")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}

    monkeypatch.undo()
    assert_same_model(resharded(source), model)


def test_a_killed_run_leaves_no_result_and_the_next_one_succeeds(model, tmp_path) -> None:
    source, output = save(model, tmp_path / "in", "sharded"), tmp_path / "in-out"
    code = (
        "import os, signal; from scripts import shard;"
        "shard._set_config_dtype = lambda *args: os.kill(os.getpid(), signal.SIGKILL);"
        f"shard.main(['--model-dir', {str(source)!r}, '--output-dir', {str(output)!r}, '--dtype', 'bfloat16'])"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert_same_model(resharded(source), model)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in-out"}


def test_a_second_run_does_nothing_and_says_so(model, tmp_path, capsys) -> None:
    source = save(model, tmp_path / "in", "single")
    output = resharded(source)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    resharded(source)
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_an_output_folder_in_use_is_refused(model, tmp_path, capsys) -> None:
    source = save(model, tmp_path / "in", "single")
    output = resharded(source)
    args = ["--model-dir", source, "--output-dir"]
    fails_with(capsys, [*args, output, "--max-shard-size", "1MB"], str(output), "not empty")  # other shards
    os.utime(source / "config.json", ns=(1, 1))
    fails_with(capsys, [*args, output, "--max-shard-size", LIMIT], str(output), "not empty")  # another input
    fails_with(capsys, [*args, tmp_path], str(tmp_path), "not empty")
    fails_with(capsys, [*args, source], "--model-dir")
    fails_with(capsys, [*args, source / "shards"], "--model-dir")


def test_a_broken_checkpoint_is_told_by_file(model, tmp_path, capsys) -> None:
    empty = tmp_path / "empty"
    args = ["--output-dir", tmp_path / "out", "--model-dir"]
    fails_with(capsys, [*args, empty], str(empty), "not a folder")
    empty.mkdir()
    fails_with(capsys, [*args, empty], "no weights", "model.safetensors")

    source = save(model, tmp_path / "in", "sharded")
    first = sorted(source.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    for damaged in (whole[:-10], b"\xff" * 100, b""):
        first.write_bytes(damaged)
        fails_with(capsys, [*args, source], first.name, "damaged")
    first.unlink()
    fails_with(capsys, [*args, source], "model.safetensors.index.json", first.name, "not beside it")
    (source / "model.safetensors.index.json").write_text("[]")
    fails_with(capsys, [*args, source], "model.safetensors.index.json")
    assert not (tmp_path / "out").exists()


def test_a_bin_that_is_no_state_dict_is_refused(tmp_path, capsys) -> None:
    args = ["--model-dir", tmp_path, "--output-dir", tmp_path.with_name("out")]
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"junk")
    fails_with(capsys, args, str(file), "damaged")
    torch.save({"model": {"a": torch.ones(1)}}, file)
    fails_with(capsys, args, str(file), "model", "state dict")
    torch.save({"a": Path("x")}, file)  # an object: weights_only does not make it
    fails_with(capsys, args, str(file))
    torch.save([torch.ones(1)], file)
    fails_with(capsys, args, str(file))


def test_too_little_space_and_quantized_weights_are_refused(model, tmp_path, monkeypatch, capsys) -> None:
    source = save(model, tmp_path / "in", "single")
    args = ["--model-dir", source, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    fails_with(capsys, args, "needed", "1.00kB free")
    monkeypatch.undo()
    (source / "config.json").write_text('{"quantization_config": {}}')
    fails_with(capsys, [*args, "--dtype", "float16"], "quantized", "--dtype keep")
