"""Matrices of a checkpoint -> integers, and how far off those are. `make shard QUANTIZE=…` does it tensor by tensor."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from handler.errors import CheckpointError
from handler.loading import read_config
from handler.settings import Settings
from handler.weights.integer_linear import nibbles_to_bytes
from handler.weights.quantized import METHOD, matrices, stored_block

# Numbers that share a scale and a zero. In int4 that makes 5 bits a weight; 64 would make 4.5 and twice the divergence.
GROUP_SIZES = {"int8": None, "int4": 32}
ROW_BLOCK = 64  # rows of int4 that are stored together: the order of PyTorch's kernel for CPUs with AVX512
_AT_ONCE = 2**20  # weights quantised at once: they stay in the cache
# Where the search for a group's scale begins: with its whole range, and with less, where the ends are cut off.
_RANGES = (1.0, 0.91, 0.82, 0.73, 0.64)
_REFITS = 2


@dataclass(frozen=True)
class Matrix:
    """How a tensor of the checkpoint is quantised: group_size as in `matrices`. transposed: it is stored [in, out]."""

    group_size: int | None
    transposed: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.group_size else torch.int8

    def shapes(self, shape: Iterable[int]) -> tuple[list[int], list[int]]:
        """Of `weight` and `weight_scale`, for a tensor of `shape`."""
        height, width = reversed(list(shape)) if self.transposed else shape
        if self.group_size is None:
            return [height, width], [height]
        return [height, width // 2], [width // self.group_size, height, 2]


@dataclass
class Quantization:
    """How a checkpoint is quantised, and the error that it made.

    matrices: by the checkpoint's names of tensors.
    squares: by the same names, once quantised: the sum of squares of the errors, and of the weights.
    """

    group_size: int | None
    modules_to_not_convert: list[str]
    matrices: dict[str, Matrix]
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """`quantization_config` for config.json."""
        return {
            "quant_method": METHOD,
            "bits": 4 if self.group_size else 8,
            "group_size": self.group_size,
            **({"row_block": ROW_BLOCK} if self.group_size else {}),
            "modules_to_not_convert": self.modules_to_not_convert,
        }

    def blocks(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`weight` and `weight_scale`, a few rows at a time. Adds up the error.

        Raises CheckpointError for weights that are no numbers.
        """
        matrix = self.matrices[name]
        rows = tensor.t() if matrix.transposed else tensor
        row_block = stored_block(ROW_BLOCK, len(rows)) if matrix.group_size else None
        multiple = row_block or 1
        error = total = 0.0
        for block in rows.split(math.ceil(_AT_ONCE / rows.shape[1] / multiple) * multiple):
            block = block.float().contiguous()
            total += block.square().sum(dtype=torch.float64).item()
            if not math.isfinite(total):
                raise CheckpointError(f"{name} holds numbers that are not finite: it cannot be quantised")
            size = matrix.group_size
            weight, scale, off = _to_int4(block, size, row_block) if size else _to_int8(block)
            error += off
            yield weight, scale
        self.squares[name] = error, total

    def summary(self) -> str:
        """A sentence on the error, relative to the weights' root mean square: of all, and of the tensor with most."""
        if not self.squares:
            return "nothing was quantised"
        error, total = (sum(column) for column in zip(*self.squares.values(), strict=True))
        worst = max(self.squares, key=lambda name: _relative(*self.squares[name]))
        counts = Counter("int4" if matrix.group_size else "int8" for matrix in self.matrices.values())
        kinds = " and ".join(f"{count} in {kind}" for kind, count in counts.most_common())
        return (
            f"matrices: {kinds}, off by {_relative(error, total):.2%} (root mean square), "
            f"most in {worst}: {_relative(*self.squares[worst]):.2%}"
            f"{f', int4 in blocks of {ROW_BLOCK} rows' if self.group_size else ''}"
        )


def plan_quantization(model_dir: Path, kind: str, shapes: dict[str, list[int]]) -> Quantization:
    """What to quantise in the checkpoint in `model_dir`, whose tensors have `shapes`.

    Raises LoadError for what is not a causal language model of transformers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(model_dir, Settings()))
    bits = matrices(model, group_size := GROUP_SIZES[kind])
    names = _checkpoint_names(model, shapes)
    found = {
        names[f"{module}.weight"]: Matrix(group_size if of == 4 else None, type(model.get_submodule(module)) is Conv1D)
        for module, of in bits.items()
        if f"{module}.weight" in names
    }
    # A tied head is not stored. Others are put together of several tensors while loading, and stay as they are.
    stored = {module for module in bits if f"{module}.weight" in names}
    for pair in model.all_tied_weights_keys.items():
        ends = {name.removesuffix(".weight") for name in pair}
        stored |= ends if ends & stored else set()
    return Quantization(group_size, sorted(bits.keys() - stored), found)


def _checkpoint_names(model: PreTrainedModel, shapes: dict[str, list[int]]) -> dict[str, str]:
    """The model's own names of tensors -> the checkpoint's, for those that are loaded as they are."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name, shape in shapes.items():
        target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target in state and converted is None and list(state[target].shape) == shape:
            names[target] = name
    return names


def _to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows [rows, in] -> int8, a bfloat16 scale for each, and the sum of squared errors."""
    scale = (rows.abs().amax(1) / 127).bfloat16()
    wide = scale.float().unsqueeze(1)
    quantized = (rows / torch.where(wide > 0, wide, 1)).round_().clamp_(-127, 127)
    error = (quantized * wide - rows).square().sum(dtype=torch.float64).item()
    return quantized.to(torch.int8), scale, error


def _to_int4(
    rows: torch.Tensor, group_size: int, row_block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows [rows, in] -> bytes of two nibbles [rows, in / 2], bfloat16 scales and zeros [groups, rows, 2], the sum of
    squared errors."""
    parts = [_nearest_nibbles(groups) for groups in rows.view(-1, group_size).split(_AT_ONCE // group_size)]
    nibbles, scale, error = (torch.cat(column) for column in zip(*parts, strict=True))
    scale = scale.view(len(rows), -1, 2).transpose(0, 1).contiguous()
    return nibbles_to_bytes(nibbles.view_as(rows), row_block), scale, error.sum(dtype=torch.float64).item()


def _nearest_nibbles(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups [groups, size] -> nibbles of 0 to 15 of the same shape, bfloat16 scales and zeros [groups, 2], the squared
    errors [groups, 1].

    For each group the best of some ranges is taken, each made better by least squares: the scale and zero that suit
    the nibbles best, then the nibbles that suit those.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    centre, mean = (low + high) / 2, groups.mean(1, keepdim=True)
    best = torch.full_like(low, math.inf)
    nibbles, scales, zeros = torch.empty_like(groups), torch.empty_like(low), torch.empty_like(low)
    for share in _RANGES:
        scale = (high - low) * (share / 15)
        zero = centre + scale / 2  # the value of nibble 8
        for refit in range(_REFITS + 1):
            scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
            tried = ((groups - zero) / torch.where(scale > 0, scale, 1)).round_().clamp_(-8, 7)
            error = torch.addcmul(zero, tried, scale).sub_(groups).square_().sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            nibbles = torch.where(better, tried, nibbles)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
            if refit < _REFITS:
                middle = tried.mean(1, keepdim=True)
                spread = tried - middle
                scale = (spread * groups).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp_min(1e-9)
                zero = mean - scale * middle
    return (nibbles + 8).to(torch.uint8), torch.cat((scales, zeros), 1).bfloat16(), best


def _relative(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0
