"""What the engine must know of a model's architecture, read from its config and the signature of its forward."""

import inspect
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from handler.weights.byte_linear import BYTES_AT_ONCE

from .bloom import is_mended
from .errors import UnsupportedModel

_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_MLP_NAMES = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_POSITIONS_FROM_MASK = ("bloom",)  # no position_ids: ALiBi counts the ones in the 2D attention mask


@dataclass(frozen=True)
class Architecture:
    """A model that the engine can run. Raises UnsupportedModel when made of one whose rows cannot be told apart by
    position, or whose cache is more than keys and values. The model may be on the meta device.

    max_length: tokens in a sequence that the model can take, or None if its config does not say.
    sliding_window: how many tokens the layers with a sliding window attend to, or None where there are none.
    kv_bytes_per_token: of the keys and values in all layers, as far as the config tells.
    takes_position_ids: whether its forward is told positions; otherwise it counts them in the attention mask.
    longrope_border: most tokens of a sequence that is rotated by longrope's short factors, or None.
    num_layers: layers that store keys and values.
    hidden_size, intermediate_size, qkv_size: numbers that a token is between layers, within an MLP (of all experts
        that it goes to), and in queries, keys and values of one layer.
    copied_layers: layers' worth of the keys and values that attention copies at most: those of rows that are put
        beside new tokens, and once more for each query head where several share one.
    keeps_scores: whether all of a layer's scores become tensors, as in "eager" attention; SDPA makes them in pieces.
    is_mended: whether bloom.py's code takes the place of the library's, which keeps scores.
    itemsize: bytes of a number in activations.
    product_bytes: what products with integers make on their way.
    """

    vocab_size: int
    num_attention_heads: int
    max_length: int | None
    sliding_window: int | None
    kv_bytes_per_token: int
    takes_position_ids: bool
    longrope_border: int | None = None
    num_layers: int = 1
    hidden_size: int = 0
    intermediate_size: int = 0
    qkv_size: int = 0
    copied_layers: int = 1
    keeps_scores: bool = True
    is_mended: bool = False
    itemsize: int = 4
    product_bytes: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Architecture":
        name, config = type(model).__name__, model.config.get_text_config()
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise UnsupportedModel(f"{name} keeps more than keys and values of a decoder")
        layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
        # A "dummy" uses another layer's keys and values, or none.
        if other := set(layer_types) - {"full_attention", "sliding_attention", "dummy"}:
            raise UnsupportedModel(f"{name} has layers other than attention: {sorted(other)}")
        takes_position_ids = "position_ids" in inspect.signature(type(model).forward).parameters
        if not takes_position_ids and config.model_type not in _POSITIONS_FROM_MASK:
            raise UnsupportedModel(f"{name} takes no position_ids: rows differ in length")
        if model.get_output_embeddings() is None:
            raise UnsupportedModel(f"{name} has no output embeddings")
        windows = {kwargs["sliding_window"] for kwargs in layer_kwargs if kwargs.get("sliding_window")}
        if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
            windows.add(config.window_size)
        if len(windows) > 1:
            raise UnsupportedModel(f"{name} has sliding windows of different sizes: {sorted(windows)}")
        rope = getattr(config, "rope_parameters", None) or {}
        if "longrope" in [kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict)]:
            raise UnsupportedModel(f"{name} has longrope in layers of one type only")
        layers = config.per_layer_config
        storing = [layer for kind, layer in zip(layer_types, layers, strict=True) if kind != "dummy"]
        limits = [getattr(config, limit, None) for limit in _LENGTH_NAMES]
        kv_widths = [_kv_width(layer) for layer in storing]
        heads_size = max(layer.num_attention_heads * _head_size(layer) for layer in layers)
        mended = is_mended(model)
        shared_by = heads_size // max(1, max(kv_widths, default=1))
        return cls(
            vocab_size=config.vocab_size,
            num_attention_heads=max(layer.num_attention_heads for layer in layers),
            max_length=next((limit for limit in limits if isinstance(limit, int)), None),
            sliding_window=min(windows, default=None),
            longrope_border=rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None,
            kv_bytes_per_token=2 * sum(kv_widths) * model.dtype.itemsize,
            takes_position_ids=takes_position_ids,
            num_layers=len(storing),
            hidden_size=config.hidden_size,
            intermediate_size=max(_intermediate_size(layer) for layer in layers),
            qkv_size=heads_size + 2 * max(kv_widths, default=0),
            copied_layers=1 + (shared_by if shared_by > 1 else 0),
            keeps_scores=config._attn_implementation == "eager" and not mended,
            is_mended=mended,
            itemsize=model.dtype.itemsize,
            product_bytes=BYTES_AT_ONCE if getattr(model.config, "quantization_config", None) else 0,
        )


def _kv_width(layer: PreTrainedConfig) -> int:
    """Numbers in a token's keys in one layer, and again in its values."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        heads = 1  # Falcon-7B, StarCoder
    return heads * _head_size(layer)


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _intermediate_size(config: PreTrainedConfig) -> int:
    named = (getattr(config, name, None) for name in _MLP_NAMES)
    size = next((size for size in named if isinstance(size, int)), 4 * config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None)
    return size * experts if isinstance(experts, int) else size
