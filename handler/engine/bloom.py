"""BLOOM's layers in fewer passes over memory than the library's code makes, and without all scores at once."""

from types import MethodType

import torch
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

from handler.kernels.decode_attention import can_decode, decode_attention
from handler.kernels.prompt_attention import can_attend, prompt_attention
from handler.weights.placement import replace_forward

from .block_attention import in_blocks

FEWEST_QUERIES = 8  # of a block: for each, all keys and values are read again


def is_mended(model: PreTrainedModel) -> bool:
    """Whether `mend_bloom` mends the model: loading does, and a plan is for what is loaded."""
    attention = [module for module in model.modules() if isinstance(module, BloomAttention)]
    return bool(attention) and all(
        type(module) is BloomAttention and not (module.pretraining_tp > 1 and module.slow_but_exact)
        for module in attention
    )


def mend_bloom(model: PreTrainedModel) -> None:
    """Let attention go by blocks of queries, and PyTorch's GELU do what BLOOM's does in eight passes over the
    activations, rounding after each: the same formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and
    Gimpel, arXiv:1606.08415)."""
    if not is_mended(model):
        return
    for module in list(model.modules()):
        if type(module) is BloomAttention:
            replace_forward(module, MethodType(_attention, module))
        for name, child in module.named_children():
            if type(child) is BloomGelu:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _attention(
    self: BloomAttention,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer_past=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The library's arguments: hidden_states, residual [rows, new, hidden], alibi [rows * heads, 1, columns],
    attention_mask [rows, 1, new, columns], to be added, causal. It makes 14 bytes a score in bfloat16, for all queries
    at once."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    scaling = self.inv_norm_factor
    if can_decode(query, key, value, attention_mask, alibi):
        context = decode_attention(query, key, value, attention_mask, scaling, alibi)
    elif can_attend(query, key, value, attention_mask, alibi):
        context = prompt_attention(query, key, value, attention_mask, scaling, alibi)
    else:
        context = in_blocks(query, key, value, attention_mask, scaling, causal=True, bias=alibi, fewest=FEWEST_QUERIES)
    return residual + self.dense(context.flatten(2)), None
