"""Checkpoints in int8 and int4, as `make shard QUANTIZE=…` writes them: ordinary safetensors with plain tensors.

Importing this file tells transformers of them. Where config.json names the method, each matrix's module is changed
before anything is loaded, so that tensors on any tier, the disk included, are read as they lie in the files.
"""

import functools
import inspect
import re
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from handler.errors import LoadError
from handler.weights.integer_linear import KERNEL_BLOCK, fits_int4_kernel, integer_linear, reordered

METHOD = "plain-int"
_GROUP_SIZES = (32, 64, 128, 256)  # that PyTorch's kernel knows
_FORMATS = [(8, None, None), *((4, size, block) for size in _GROUP_SIZES for block in (None, 64))]


class QuantizedLinear(nn.Linear):
    """Its `weight`, `weight_scale` and `row_block` are those of `integer_linear`."""

    weight_scale: nn.Parameter
    row_block: int | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return integer_linear(input, self.weight, self.weight_scale, self.bias, self.row_block)


class QuantizedConv1D(Conv1D):
    """GPT-2's linear layer. Its `weight` lies as a `Linear`'s does, transposed to what it was."""

    weight_scale: nn.Parameter
    row_block: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return integer_linear(x, self.weight, self.weight_scale, self.bias, self.row_block)


class QuantizedEmbedding(nn.Embedding):
    """Of int8. Its tensors may be those of a tied `QuantizedLinear`."""

    weight_scale: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return scaled(self, self.weight[input] * self.weight_scale[input].unsqueeze(-1))


def scaled(embedding: nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., hidden] of an embedding as its forward gives them: the library has many classes of scaled ones."""
    factor = getattr(embedding, "embed_scale", None)
    if factor is None:
        return rows
    return rows * (factor.to(rows.dtype) if isinstance(factor, torch.Tensor) else factor)


_LINEAR: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    FalconLinear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
}
# With BLOOM's slow_but_exact, and with embeddings in place of tokens.
_READ_IN_UNUSED_BRANCHES = ("BloomAttention", "BloomMLP", "Gemma4TextModel")


@register_quantization_config(METHOD)
class PlainIntConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    bits: 8, with a scale for each row of a matrix, or 4, with a scale and a zero for each `group_size` numbers of it;
        some are in 8 bits also then, see `matrices`.
    row_block: 64 where matrices of 4 bits are stored in blocks of so many rows, see `stored_block`.
    modules_to_not_convert: matrices that are stored as they were.
    Raises LoadError for other values.
    """

    def __init__(
        self,
        bits: int,
        group_size: int | None = None,
        row_block: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
    ):
        if (bits, group_size, row_block) not in _FORMATS:
            named = f"bits {bits}, group_size {group_size} and row_block {row_block}"
            raise LoadError(f"config.json names {METHOD} with {named}: shard it again")
        self.bits = bits
        self.group_size = group_size
        self.row_block = row_block
        self.modules_to_not_convert = modules_to_not_convert or []
        self.quant_method = quant_method  # type: ignore[assignment]  # the library's own are an enumeration


@register_quantizer(METHOD)
class PlainIntQuantizer(HfQuantizer):
    """Changes the modules before loading, and after it brings int4 in memory into the order of this CPU's kernel."""

    quantization_config: PlainIntConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        changed = matrices(model, config.group_size)
        for name in config.modules_to_not_convert:
            changed.pop(name, None)
        for name, bits in changed.items():
            _change(model.get_submodule(name), config.group_size if bits == 4 else None, config.row_block, model.dtype)
        tied = model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if target.removesuffix(".weight") in changed:
                tied[f"{target}_scale"] = f"{source}_scale"

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in (m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedConv1D)):
            if module.row_block != KERNEL_BLOCK and fits_int4_kernel(module.weight, module.weight_scale):
                weight = reordered(module.weight, module.row_block, KERNEL_BLOCK)
                module.weight, module.row_block = nn.Parameter(weight, requires_grad=False), KERNEL_BLOCK

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def quantize_modules(model: PreTrainedModel) -> None:
    """Change the modules of a model without weights as loading would, where its config names the method."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization and quantization["quant_method"] == METHOD:
        AutoHfQuantizer.from_config(quantization).preprocess_model(model)


def matrices(model: PreTrainedModel, group_size: int | None) -> dict[str, int]:
    """The modules whose `weight` can be integers, and of how many bits: linear layers, and embeddings as large as the
    words' own. Small embeddings, such as those of positions, are left out, and so are modules that must stay in float32
    and those whose weight another's code takes in its own hands.

    group_size: None for 8 bits everywhere. Otherwise 4, but for embeddings and the head, where it would do more harm
    than in all other matrices together, and matrices that groups of this size do not divide.
    """
    words = cast(nn.Parameter, model.get_input_embeddings().weight).numel()
    in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    found = {
        name: module
        for name, module in model.named_modules()
        if (type(module) in _LINEAR or (_is_embedding(module) and module.weight.numel() >= words))
        and not in_float32 & set(name.split("."))
        and not _reads_weight(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    }
    for tied in model.all_tied_weights_keys.items():  # both, or neither
        names = [name.removesuffix(".weight") for name in tied]
        if not all(name in found for name in names):
            for name in names:
                found.pop(name, None)
    head = model.get_output_embeddings()
    wide = {name for name, module in found.items() if isinstance(module, nn.Embedding) or module is head}
    if group_size is None:
        return dict.fromkeys(found, 8)
    return {name: 8 if name in wide or shape_of(module)[1] % group_size else 4 for name, module in found.items()}


def stored_block(row_block: int | None, height: int) -> int | None:
    """The `row_block` that an int4 matrix of `height` rows is stored in, where config.json names `row_block`: None, the
    plain order, unless the blocks are full."""
    return row_block if row_block and height % row_block == 0 else None


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))


def _reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether a module's code multiplies by its child's weight itself, or looks at its dtype: that would take integers
    for numbers."""
    kind = type(parent)
    if kind.__name__ in _READ_IN_UNUSED_BRANCHES:
        return False
    return re.search(rf"self\.{child}\.weight\b", _source(kind)) is not None  # type: ignore[arg-type]  # a type has a hash


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # it has no file
        return ""


def shape_of(module: nn.Module) -> tuple[int, int]:
    """[out, in] of its matrix."""
    shape = cast(nn.Parameter, module.weight).shape
    return (shape[1], shape[0]) if type(module) is Conv1D else (shape[0], shape[1])


def _change(module: nn.Module, group_size: int | None, row_block: int | None, dtype: torch.dtype) -> None:
    """Make `module`, which has no weights yet, one of int4 in groups (and blocks), or of int8. It keeps all else."""
    kind, before = type(module), cast(nn.Parameter, module.weight)
    height, width = shape_of(module)
    if group_size is None:
        weight = before.new_empty(height, width, dtype=torch.int8)
        scale = before.new_empty(height, dtype=dtype)
    else:
        weight = before.new_empty(height, width // 2, dtype=torch.uint8)
        scale = before.new_empty(width // group_size, height, 2, dtype=dtype)
        cast(QuantizedLinear, module).row_block = stored_block(row_block, height)
    if kind in _LINEAR:
        module.__class__ = _LINEAR[kind]
    else:  # a scaled embedding stays one: its model sets the scale of those it knows by their class
        bases = (QuantizedEmbedding,) if kind is nn.Embedding else (QuantizedEmbedding, kind)
        module.__class__ = type(f"Quantized{kind.__name__}", bases, {})
    for name, tensor in (("weight", weight), ("weight_scale", scale)):
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers cannot draw random integers
        setattr(module, name, parameter)
