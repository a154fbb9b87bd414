"""Matrices of a checkpoint -> integers, and how far off those are. `make shard QUANTIZE=…` does it tensor by tensor."""

import math
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
from handler.weights.quantized import METHOD, matrices
from scripts.console import UserError

BITS = {"int8": 8, "int4": 4}
# Numbers that share a scale and a zero in int4. 32 has a sixth less error and takes 5 bits a weight instead of 4.5:
# only for a matrix that 64 does not divide.
GROUP_SIZES = (64, 32)
_BLOCK = 2**20  # weights quantised at once: they stay in the cache
# Where the search for a group's scale begins: with its whole range, and with less, where the ends are cut off.
_RANGES = (1.0, 0.91, 0.82, 0.73, 0.64)
_REFITS = 2


@dataclass
class Quantization:
    """How each tensor of a checkpoint is quantised, and the error that it made.

    transposed: by the names, in the checkpoint, of the tensors to quantise: whether it is stored [in, out].
    squares: by the same names, once quantised: the sum of squares of the errors, and of the weights.
    """

    bits: int
    group_size: int | None
    modules_to_not_convert: list[str]
    transposed: dict[str, bool]
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """`quantization_config` for config.json."""
        return {
            "quant_method": METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "modules_to_not_convert": self.modules_to_not_convert,
        }

    def shapes(self, name: str, shape: Iterable[int]) -> tuple[list[int], list[int]]:
        """The shapes of `weight` and `weight_scale`, for a tensor of the checkpoint."""
        height, width = reversed(list(shape)) if self.transposed[name] else shape
        if self.group_size is None:
            return [height, width], [height]
        return [height, width // 2], [width // self.group_size, height, 2]

    def blocks(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`weight` and `weight_scale`, a few rows at a time. Adds up the error.

        Raises CheckpointError for weights that are no numbers.
        """
        rows = tensor.t() if self.transposed[name] else tensor
        error = total = 0.0
        for block in rows.split(max(1, _BLOCK // rows.shape[1])):
            block = block.float()
            total += block.square().sum(dtype=torch.float64).item()
            if not math.isfinite(total):
                raise CheckpointError(f"{name} holds numbers that are not finite: it cannot be quantised")
            weight, scale, off = _to_int8(block) if self.group_size is None else _to_int4(block, self.group_size)
            error += off
            yield weight, scale
        self.squares[name] = error, total

    def summary(self) -> str:
        """A sentence on the error, relative to the weights' root mean square: of all, and of the tensor with most."""
        if not self.squares:
            return "nothing was quantised"
        error, total = (sum(column) for column in zip(*self.squares.values(), strict=True))
        worst = max(self.squares, key=lambda name: _relative(*self.squares[name]))
        return (
            f"{len(self.squares)} matrices in int{self.bits}, off by {_relative(error, total):.2%} (root mean square), "
            f"most in {worst}: {_relative(*self.squares[worst]):.2%}"
        )


def plan_quantization(model_dir: Path, kind: str, shapes: dict[str, list[int]]) -> Quantization:
    """What to quantise in the checkpoint in `model_dir`, whose tensors have `shapes`.

    Raises LoadError for what is not a causal language model of transformers, UserError where a matrix does not divide
    into groups.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(model_dir, Settings()))
    modules = matrices(model)
    names = _checkpoint_names(model, shapes)
    found = {f"{module}.weight": names.get(f"{module}.weight") for module in modules}
    transposed = {
        name: isinstance(modules[target.removesuffix(".weight")], Conv1D) for target, name in found.items() if name
    }
    # A tied head is not stored; others are put together of several tensors while loading, and stay as they are.
    tied = model.all_tied_weights_keys
    stored = {target for target, name in found.items() if name}
    stored |= {one for pair in tied.items() if stored & set(pair) for one in pair}
    left = sorted(target.removesuffix(".weight") for target in found if target not in stored)
    group_size = (
        _group_size({name: shapes[name][0 if transposed[name] else 1] for name in transposed})
        if kind == "int4"
        else None
    )
    return Quantization(BITS[kind], group_size, left, transposed)


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


def _group_size(widths: dict[str, int]) -> int:
    for size in GROUP_SIZES:
        odd = [name for name, width in widths.items() if width % size]
        if not odd:
            return size
    raise UserError(f"{odd[0]} has {widths[odd[0]]} columns, which groups of {size} do not divide: use int8")


def _to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows [rows, in] -> int8, a bfloat16 scale for each, and the sum of squared errors."""
    scale = (rows.abs().amax(1) / 127).bfloat16()
    wide = scale.float().unsqueeze(1)
    quantized = (rows / torch.where(wide > 0, wide, 1)).round_().clamp_(-127, 127)
    error = (quantized * wide - rows).square().sum(dtype=torch.float64).item()
    return quantized.to(torch.int8), scale, error


def _to_int4(rows: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows [rows, in] -> bytes of two nibbles [rows, in / 2], bfloat16 scales and zeros [groups, rows, 2], the sum of
    squared errors.

    For each group the best of some ranges is taken, each made better by least squares: the scale and zero that suit
    the nibbles best, then the nibbles that suit those.
    """
    groups = rows.view(-1, group_size)
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
    stored = nibbles_to_bytes((nibbles + 8).view_as(rows))
    scale = torch.stack((scales, zeros), -1).view(len(rows), -1, 2).transpose(0, 1).bfloat16().contiguous()
    return stored, scale, best.sum(dtype=torch.float64).item()


def _relative(error: float, total: float) -> float:
    return math.sqrt(error / total) if total else 0.0
