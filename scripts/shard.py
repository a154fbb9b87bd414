"""Cut a checkpoint into safetensors shards: `python -m scripts.shard --model-dir IN --output-dir OUT`.

Any Hugging Face folder goes in: safetensors or `pytorch_model.bin`, sharded or not. Source files are mapped
and written out piece by piece, so memory stays the same however large the checkpoint, a shard or a tensor is.
`--quantize int8` or `int4` makes integers of the matrices on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from handler.errors import CheckpointError, first_line
from handler.weights import safetensors_format
from handler.weights.files import weight_files
from scripts.console import UserError, format_size, parse_size_option, require_space, run

if TYPE_CHECKING:  # it imports transformers' models, which takes seconds
    from scripts.quantize import Quantization

SHARD_RECORD = "shard.json"
# Elements converted and written at once: 32 MB of float32. Memory grows by this and no more.
PIECE = 2**23
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in safetensors_format.DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Weights in any format and what describes only them. Everything else is copied.
NOT_COPIED = shutil.ignore_patterns(
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
    *("*.index.json", SHARD_RECORD, ".*"),
)


@dataclass(frozen=True)
class Entry:
    """A tensor as it will be written."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    size: int  # bytes

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: list[int]) -> Entry:
        return cls(name, dtype, shape, math.prod(shape) * dtype.itemsize)


def _shard_size(text: str) -> int:
    """Bytes of `--max-shard-size`. Raises UserError for what is no size, or less than a byte."""
    size = parse_size_option("--max-shard-size", text)
    if size < 1:
        raise UserError(f"--max-shard-size is {text!r}; allowed: at least 1 byte")
    return size


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a weight file, mapped: nothing is read before it is used.

    Raises CheckpointError when the file is damaged, or holds something other than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as source:
                yield from ((name, source.get_tensor(name)) for name in source.offset_keys())
        else:
            # Before torch 1.6 a file was one pickle, which cannot be mapped and is read as a whole.
            mapped = zipfile.is_zipfile(file)
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).items()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint ({first_line(error)}); download it again"
        ) from None


def _tensors_to_store(files: list[Path], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors to store. If the model ties weights, only the first of the matrices that share their memory.

    Other tensors that share memory are all stored: transformers ties embeddings again, but not buffers.

    Raises CheckpointError as `_tensors` does, and for a tensor that safetensors cannot hold.
    """
    for file in files:
        stored = set()
        for name, tensor in _tensors(file):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise CheckpointError(f"{file}: {name} is {kind}, which safetensors cannot hold; is it a state dict?")
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tied and file.suffix == ".bin" and tensor.dim() == 2 and memory in stored:
                continue
            stored.add(memory)
            yield name, tensor


def _plan_shards(
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    limit: int,
    quantization: Quantization | None,
) -> list[list[list[Entry]]]:
    """Which tensors go into which shard, in the order of the source: at most `limit` bytes of tensors each.

    A source's tensor is written as one, or as a matrix of integers and its scales, in one shard. What is larger than
    the limit has a shard of its own. `dtype` is for floating-point tensors; None keeps theirs.

    Raises CheckpointError when the source cannot be read or stored.
    """
    shards: list[list[list[Entry]]] = []
    names: set[str] = set()
    room = 0
    for name, tensor in tensors:
        if name in names:
            raise CheckpointError(f"{name} is in more than one of the files that the index names; download them again")
        names.add(name)
        if quantization and (matrix := quantization.matrices.get(name)):
            weight, scale = matrix.shapes(tensor.shape)
            entries = [Entry.of(name, matrix.dtype, weight), Entry.of(f"{name}_scale", torch.bfloat16, scale)]
        else:
            new_dtype = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
            entries = [Entry.of(name, new_dtype, list(tensor.shape))]
        size = sum(entry.size for entry in entries)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(entries)
        room -= size
    return shards


def _write_shard(
    path: Path, pairs: list[tuple[list[Entry], torch.Tensor]], quantization: Quantization | None, bar: tqdm
) -> None:
    """Write a safetensors file without holding it in memory: the header, then each tensor in pieces."""
    # Readers map tensors: each begins at a multiple of what its size is a multiple of, 64 at most. That of its elements
    # is the least; PyTorch's kernel wants 16 for matrices of int8.
    written = sorted((entry for entries, _ in pairs for entry in entries), key=lambda entry: -math.gcd(entry.size, 64))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in written:
        start, end = end, end + entry.size
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    # One buffer for all: an allocation for each piece makes the heap grow by several of them.
    buffer = torch.empty(PIECE * torch.float64.itemsize, dtype=torch.uint8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(entry: Entry, pieces: Iterable[torch.Tensor]) -> None:
            file.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
            for piece in pieces:
                raw = buffer[: piece.numel() * entry.dtype.itemsize]
                raw.view(entry.dtype).copy_(piece)
                bar.update(file.write(raw.numpy().data))

        for entries, tensor in pairs:
            if len(entries) == 1 or quantization is None:
                write(entries[0], tensor.detach().reshape(-1).split(PIECE))
                continue
            matrix, scale = entries
            scales: list[torch.Tensor] = []
            write(matrix, _integers(quantization.blocks(matrix.name, tensor.detach()), scales))
            write(scale, torch.cat(scales, dim=-2 if len(scale.shape) == 3 else 0).reshape(-1).split(PIECE))


def _integers(
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], scales: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The integers of blocks of rows; what they are scaled by is added to `scales`."""
    for weight, scale in blocks:
        scales.append(scale)
        yield weight.reshape(-1)


def _write_shards(
    folder: Path,
    shards: list[list[list[Entry]]],
    source: Iterator[tuple[str, torch.Tensor]],
    quantization: Quantization | None,
) -> None:
    """Write the planned shards and their index; `source` gives the tensors in the plan's order."""
    total = _total(shards)
    weight_map = {}
    with tqdm(total=total, desc=f"Writing {len(shards)} shards", unit="B", unit_scale=True) as bar:
        for number, stored in enumerate(shards, start=1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write_shard(folder / name, [(entries, next(source)[1]) for entries in stored], quantization, bar)
            weight_map.update({entry.name: name for entries in stored for entry in entries})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _total(shards: list[list[list[Entry]]]) -> int:
    """Bytes of all tensors."""
    return sum(entry.size for stored in shards for entries in stored for entry in entries)


def _config_json(model: Path) -> dict[str, Any]:
    """The contents of config.json, {} when there is none. Raises CheckpointError when it is not JSON."""
    path = model / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None


def _set_config_dtype(folder: Path, dtype: str) -> None:
    """Make config.json name the new dtype, under the key it uses: `torch_dtype` before transformers 5."""
    config = _config_json(folder)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _set_quantization(folder: Path, quantization: Quantization) -> None:
    """Make config.json say how the weights are quantised."""
    config = _config_json(folder) | {"quantization_config": quantization.config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _record(model: Path, limit: int, dtype: str, quantize: str | None) -> str:
    """What the result depends on, as JSON: every file of the checkpoint, and the options."""
    files = {path.name: path.stat() for path in sorted(model.iterdir()) if path.is_file()}
    record = {
        "source": [{"name": name, "size": s.st_size, "mtime_ns": s.st_mtime_ns} for name, s in files.items()],
        "max_shard_size": limit,
        "dtype": dtype,
        "quantize": quantize,
    }
    return json.dumps(record, indent=2) + "\n"


def _is_done(output: Path, record: str) -> bool:
    """Whether `output` is the result that `record` describes. A folder gets this name only when it is complete.

    Raises UserError when there is something else.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    path = output / SHARD_RECORD
    if path.exists() and path.read_text() == record:
        return True
    raise UserError(f"{output} is not empty; remove it or choose another --output-dir")


def shard(model: Path, output: Path, limit: int, dtype: str, quantize: str | None = None) -> str:
    """Write `model` to `output` in shards of at most `limit` bytes; a sentence or two about what was done.

    quantize: "int8", "int4" or None. The tensors that are not quantised have `dtype`.

    Raises CheckpointError for a checkpoint that cannot be read, LoadError for one to quantise that is no causal
    language model, UserError for folders and options that cannot be used or a disk that is too full, and OSError.
    """
    model, output = model.resolve(), output.resolve()
    if not model.is_dir():
        raise UserError(f"--model-dir {model} is not a folder")
    if model in (output, *output.parents):
        raise UserError(f"--output-dir {output} is --model-dir or inside it; choose another")
    files = weight_files(model)
    record = _record(model, limit, dtype, quantize)
    if _is_done(output, record):
        return f"{output} already holds this checkpoint in these shards: nothing to do"

    config = _config_json(model)
    if dtype != "keep" and "quantization_config" in config:
        raise UserError(f"{model} is quantized, so its weights have no other dtype; use --dtype keep")
    if quantize and "quantization_config" in config:
        raise UserError(f"{model} is quantized already: give the checkpoint that it was made of")
    # The absence of the key says nothing: each model class has its own default.
    tied = config.get("tie_word_embeddings", True)
    quantization = None
    if quantize:
        from scripts.quantize import plan_quantization

        shapes = {name: list(tensor.shape) for name, tensor in _tensors_to_store(files, tied)}
        quantization = plan_quantization(model, quantize, shapes)
    shards = _plan_shards(_tensors_to_store(files, tied), DTYPES.get(dtype), limit, quantization)
    total = _total(shards)

    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(output.parent, total)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_shards(partial, shards, _tensors_to_store(files, tied), quantization)
        shutil.copytree(model, partial, ignore=NOT_COPIED, copy_function=shutil.copyfile, dirs_exist_ok=True)
        if dtype != "keep":
            _set_config_dtype(partial, dtype)
        if quantization:
            _set_quantization(partial, quantization)
        (partial / SHARD_RECORD).write_text(record)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    done = f"{output}: {len(shards)} shards, {format_size(total)}"
    return f"{done}\n{quantization.summary()}" if quantization else done


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="shard",
        description="Write a Hugging Face checkpoint as safetensors shards, in memory independent of its size.",
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--output-dir", type=Path, required=True, help="new folder, outside --model-dir")
    parser.add_argument("--max-shard-size", default="2GB", help="2GB, 500MB, 2GiB or bytes (default: %(default)s)")
    parser.add_argument("--dtype", default="keep", choices=["keep", *DTYPES], help="default: %(default)s")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="make integers of the matrices")
    args = parser.parse_args(argv)
    try:
        print(shard(args.model_dir, args.output_dir, _shard_size(args.max_shard_size), args.dtype, args.quantize))
    except KeyboardInterrupt:
        print("stopped: nothing was kept, run the same command again", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(run(main))
