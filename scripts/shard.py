"""Cut a checkpoint into safetensors shards: `python -m scripts.shard --model-dir IN --output-dir OUT`.

Any Hugging Face folder goes in: safetensors or `pytorch_model.bin`, sharded or not. Source files are mapped
and written out piece by piece, so memory stays the same however large the checkpoint, a shard or a tensor is.
"""

import argparse
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from handler.errors import first_line
from handler.settings import parse_size
from handler.weights.files import WEIGHTS
from scripts.console import UserError
from scripts.download import DownloadError, require_space, size_text

RECORD = "shard.json"
# Elements converted and written at once: 32 MB of float32. Memory grows by this and no more.
PIECE = 2**23
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The names of the safetensors format.
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Weights in any format and what describes only them. Everything else is copied.
NOT_COPIED = shutil.ignore_patterns(
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
    *("*.index.json", RECORD, ".*"),
)


class ShardError(UserError):
    """What went wrong and what to do about it, in one line."""


@dataclass(frozen=True)
class Entry:
    """A tensor as it will be written."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    size: int  # bytes


def shard_size(text: str) -> int:
    """Bytes of `--max-shard-size`. Raises: ShardError for what is no size, or less than a byte."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ShardError(f"--max-shard-size is {text!r}; allowed: {error}") from None
    if size < 1:
        raise ShardError(f"--max-shard-size is {text!r}; allowed: at least 1 byte")
    return size


def weight_files(model: Path) -> list[Path]:
    """The files that transformers would load the model from.

    Raises: ShardError if there are none, or one that the index names is missing.
    """
    first = next((model / name for name in WEIGHTS if (model / name).is_file()), None)
    if first is None:
        raise ShardError(f"no weights in {model}: --model-dir needs one of {', '.join(WEIGHTS)}")
    if first.suffix != ".json":
        return [first]
    try:
        files = [model / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ShardError(f"{first} is not an index of shards; download it again") from None
    for file in files:
        if not file.is_file():
            raise ShardError(f"{first.name} names {file.name}, which is not in {model}; download it again")
    return files


def tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a weight file, mapped: nothing is read before it is used.

    Raises: ShardError if the file is damaged, or holds something other than tensors.
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
        raise ShardError(f"{file} is damaged or not a checkpoint ({first_line(error)}); download it again") from None


def stored_tensors(files: list[Path], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors to store: of matrices that share their memory only the first, if the model ties weights.

    Not so for other tensors: transformers ties embeddings, but would not find a shared buffer again.

    Raises: ShardError, also for a tensor that safetensors cannot hold.
    """
    for file in files:
        seen = set()
        for name, tensor in tensors(file):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in CODES:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise ShardError(f"{file}: {name} is {kind}, which safetensors cannot hold; is it a state dict?")
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tied and file.suffix == ".bin" and tensor.dim() == 2 and place in seen:
                continue
            seen.add(place)
            yield name, tensor


def plan(files: list[Path], tied: bool, dtype: torch.dtype | None, limit: int) -> list[list[Entry]]:
    """Which tensors go into which shard, in the order of the source: at most `limit` bytes of tensors each.

    A tensor larger than that has a shard of its own. `dtype` is for floating-point tensors; None keeps it.

    Raises: ShardError if the source cannot be read or stored.
    """
    shards: list[list[Entry]] = []
    names: set[str] = set()
    room = 0
    for name, tensor in stored_tensors(files, tied):
        if name in names:
            raise ShardError(f"{name} is in more than one of the files that the index names; download them again")
        names.add(name)
        target = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
        entry = Entry(name, target, list(tensor.shape), tensor.numel() * target.itemsize)
        if not shards or entry.size > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.size
    return shards


def write_shard(path: Path, pairs: Iterable[tuple[Entry, torch.Tensor]], bar: tqdm) -> None:
    """Write a safetensors file without holding it in memory: the header, then each tensor in pieces."""
    # Wider elements first, so that every tensor begins at a multiple of its element size: readers map them.
    pairs = sorted(pairs, key=lambda pair: -pair[0].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry, _ in pairs:
        start, end = end, end + entry.size
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # One buffer for all: an allocation for each piece makes the heap grow by several of them.
    buffer = torch.empty(PIECE * torch.float64.itemsize, dtype=torch.uint8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in pairs:
            for piece in tensor.detach().reshape(-1).split(PIECE):
                raw = buffer[: piece.numel() * entry.dtype.itemsize]
                raw.view(entry.dtype).copy_(piece)
                bar.update(file.write(raw.numpy().data))


def write_shards(folder: Path, shards: list[list[Entry]], source: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write the planned shards and their index; `source` gives the tensors in the plan's order."""
    total = sum(entry.size for entries in shards for entry in entries)
    weight_map = {}
    with tqdm(total=total, desc=f"Writing {len(shards)} shards", unit="B", unit_scale=True) as bar:
        for number, entries in enumerate(shards, start=1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_shard(folder / name, [(entry, next(source)[1]) for entry in entries], bar)
            weight_map.update({entry.name: name for entry in entries})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_config(model: Path) -> dict[str, Any]:
    """config.json, or {} if there is none. Raises: ShardError if it is not JSON."""
    path = model / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error}); download it again") from None


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Make config.json name the new dtype, under the key it uses: `torch_dtype` before transformers 5."""
    config = read_config(folder)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def describe(model: Path, limit: int, dtype: str) -> str:
    """What a result depends on, as JSON: every file of the checkpoint, and the options."""
    files = {path.name: path.stat() for path in sorted(model.iterdir()) if path.is_file()}
    record = {
        "source": [{"name": name, "size": s.st_size, "mtime_ns": s.st_mtime_ns} for name, s in files.items()],
        "max_shard_size": limit,
        "dtype": dtype,
    }
    return json.dumps(record, indent=2) + "\n"


def is_done(output: Path, record: str) -> bool:
    """Whether `output` is the result that `record` describes: it got its name when it was complete.

    Raises: ShardError if there is something else.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    path = output / RECORD
    if path.exists() and path.read_text() == record:
        return True
    raise ShardError(f"{output} is not empty; remove it or choose another --output-dir")


def shard(model: Path, output: Path, limit: int, dtype: str) -> str:
    """Write `model` to `output` in shards of at most `limit` bytes; returns what was done.

    Raises: ShardError; DownloadError if the disk is too full; OSError.
    """
    model, output = model.resolve(), output.resolve()
    if not model.is_dir():
        raise ShardError(f"--model-dir {model} is not a folder")
    if model in (output, *output.parents):
        raise ShardError(f"--output-dir {output} is --model-dir or inside it; choose another")
    files = weight_files(model)
    record = describe(model, limit, dtype)
    if is_done(output, record):
        return f"{output} already holds this checkpoint in these shards: nothing to do"

    config = read_config(model)
    if dtype != "keep" and "quantization_config" in config:
        raise ShardError(f"{model} is quantized, so its weights have no other dtype; use --dtype keep")
    # The absence of the key says nothing: each model class has its own default.
    tied = config.get("tie_word_embeddings", True)
    shards = plan(files, tied, DTYPES.get(dtype), limit)
    total = sum(entry.size for entries in shards for entry in entries)

    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(output.parent, total)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_shards(partial, shards, stored_tensors(files, tied))
        shutil.copytree(model, partial, ignore=NOT_COPIED, copy_function=shutil.copyfile, dirs_exist_ok=True)
        if dtype != "keep":
            set_config_dtype(partial, dtype)
        (partial / RECORD).write_text(record)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{output}: {len(shards)} shards, {size_text(total)}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.shard",
        description="Write a Hugging Face checkpoint as safetensors shards, in memory independent of its size.",
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--output-dir", type=Path, required=True, help="new folder, outside --model-dir")
    parser.add_argument("--max-shard-size", default="2GB", help="2GB, 500MB, 2GiB or bytes (default: %(default)s)")
    parser.add_argument("--dtype", default="keep", choices=["keep", *DTYPES], help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(shard(args.model_dir, args.output_dir, shard_size(args.max_shard_size), args.dtype))
    except (ShardError, DownloadError, OSError) as error:
        print(f"shard: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shard: stopped; nothing was kept, run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
