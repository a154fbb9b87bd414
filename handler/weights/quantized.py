"""Checkpoints in int8 and int4, as `make shard QUANTIZE=…` writes them: ordinary safetensors with plain tensors.

Importing this file tells transformers of them. Where config.json names the method, each matrix's module is changed
before anything is loaded, so that tensors on any tier, the disk included, are read as they lie in the files.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from handler.errors import LoadError
from handler.weights.integer_linear import can_pack, integer_linear, pack, rows_of

METHOD = "plain-int"
_FORMATS = [(8, None), *((4, size) for size in (32, 64, 128, 256))]  # the sizes that PyTorch's kernel knows


class QuantizedLinear(nn.Linear):
    """Its `weight` and `weight_scale` are those of `integer_linear`."""

    weight_scale: nn.Parameter
    packed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return integer_linear(input, self.weight, self.weight_scale, self.bias, self.packed)


class QuantizedConv1D(Conv1D):
    """GPT-2's linear layer. Its `weight` lies as a `Linear`'s does, transposed to what it was."""

    weight_scale: nn.Parameter
    packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return integer_linear(x, self.weight, self.weight_scale, self.bias, self.packed)


class QuantizedEmbedding(nn.Embedding):
    """Its tensors may be those of a tied `QuantizedLinear`."""

    weight_scale: nn.Parameter
    packed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return rows_of(input, self.weight, self.weight_scale, self.packed)


_LINEAR: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    FalconLinear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
}


@register_quantization_config(METHOD)
class PlainIntConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    bits: 8, with a scale for each row of a matrix, or 4, with a scale and a zero for each `group_size` numbers of it.
    modules_to_not_convert: matrices that are stored as they were.
    Raises LoadError for other values.
    """

    def __init__(
        self,
        bits: int,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
    ):
        if (bits, group_size) not in _FORMATS:
            raise LoadError(f"config.json names {METHOD} with bits {bits} and group_size {group_size}: shard it again")
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert or []
        self.quant_method = quant_method  # type: ignore[assignment]  # the library's own are an enumeration


@register_quantizer(METHOD)
class PlainIntQuantizer(HfQuantizer):
    """Changes the modules before loading, and packs int4 for this CPU after it."""

    quantization_config: PlainIntConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        modules = matrices(model)
        for name in config.modules_to_not_convert:
            modules.pop(name, None)
        for module in modules.values():
            _change(module, config, model.dtype)
        tied = model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if target.removesuffix(".weight") in modules:
                tied[f"{target}_scale"] = f"{source}_scale"

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        packed: dict[int, nn.Parameter] = {}  # by the id of what was packed: a tied head is its embedding
        for module in model.modules():
            if isinstance(module, QuantizedLinear | QuantizedConv1D | QuantizedEmbedding):
                weight = module.weight
                if can_pack(weight, module.weight_scale):
                    if id(weight) not in packed:
                        packed[id(weight)] = nn.Parameter(pack(weight), requires_grad=False)
                    module.weight, module.packed = packed[id(weight)], True

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules, by name, whose `weight` can be integers: linear layers, and embeddings as large as the words' own.

    Small embeddings, such as those of positions, and modules that must stay in float32 are left out.
    """
    words = cast(nn.Parameter, model.get_input_embeddings().weight).numel()
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    found = {
        name: module
        for name, module in model.named_modules()
        if (type(module) in _LINEAR or (isinstance(module, nn.Embedding) and module.weight.numel() >= words))
        and not kept & set(name.split("."))
    }
    for tied in model.all_tied_weights_keys.items():  # both, or neither
        names = [name.removesuffix(".weight") for name in tied]
        if not all(name in found for name in names):
            for name in names:
                found.pop(name, None)
    return found


def _change(module: nn.Module, config: PlainIntConfig, dtype: torch.dtype) -> None:
    """Make `module`, which has no weights yet, one of integers. It keeps all else, its class's own forward too where
    that is an embedding's which goes on with what nn.Embedding gives it."""
    kind, before = type(module), cast(nn.Parameter, module.weight)
    height, width = before.t().shape if kind is Conv1D else before.shape
    if config.group_size is None:
        weight = before.new_empty(height, width, dtype=torch.int8)
        scale = before.new_empty(height, dtype=dtype)
    else:
        weight = before.new_empty(height, width // 2, dtype=torch.uint8)
        scale = before.new_empty(width // config.group_size, height, 2, dtype=dtype)
    if kind in _LINEAR:
        module.__class__ = _LINEAR[kind]
    elif kind is nn.Embedding:
        module.__class__ = QuantizedEmbedding
    else:
        module.__class__ = type(f"Quantized{kind.__name__}", (kind, QuantizedEmbedding), {})
    for name, tensor in (("weight", weight), ("weight_scale", scale)):
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers cannot draw random integers
        setattr(module, name, parameter)
