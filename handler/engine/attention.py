"""What each row of a forward attends to, by the positions of its own tokens.

The library counts a sliding window in columns of the cache, which are tokens only where rows are equally long, and it
chooses longrope's factors by the largest position of the whole forward.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from .kv_cache import ForwardContext

UNSEEN = torch.iinfo(torch.int64).max  # the position of a key that nobody may see


def key_positions(lengths: torch.Tensor, num_new_tokens: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Positions of a forward's keys [rows, kv_length], of rows that hold `lengths` tokens and get
    `num_new_tokens`, both [rows, 1]. Columns that hold nothing of a row are UNSEEN."""
    if context.query_length == 1:  # each row's new token stands in its own next column
        columns = torch.arange(context.kv_length)
        return torch.where(columns <= lengths, columns, UNSEEN)
    # New tokens stand in common columns behind the longest row.
    past, new = torch.arange(context.past_length), torch.arange(context.query_length)
    past, new = torch.where(past < lengths, past, UNSEEN), torch.where(new < num_new_tokens, lengths + new, UNSEEN)
    return torch.cat([past, new], dim=1)


def window_masks(
    config: PreTrainedConfig, queries: torch.Tensor, keys: torch.Tensor, window: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Masks [rows, 1, queries, keys] for each type of layer, bool or additive as the model's attention wants them.

    queries, keys: their positions, [rows, queries] and [rows, keys].
    window: how many tokens a sliding layer attends to, the query's own included.
    """

    def full(row, head, query, key):
        return keys[row, key] <= queries[row, query]

    def sliding(row, head, query, key):
        return full(row, head, query, key) & (keys[row, key] > queries[row, query] - window)

    make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    options = {"allow_is_causal_skip": False, "dtype": dtype, "device": queries.device}
    return {
        layer_type: make(len(queries), queries.shape[1], keys.shape[1], mask_function=visible, **options)
        for layer_type, visible in {"full_attention": full, "sliding_attention": sliding}.items()
    }


@contextmanager
def gpt_neo_sees(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> Iterator[None]:
    """For one forward give GPT-Neo's local layers their mask, and all of its layers a `bias` that hides nothing: their
    own is a window of columns. The model is to be called with the mask for full attention."""

    def mask(module, args, kwargs):
        device = kwargs["attention_mask"].device  # the layer's
        return args, kwargs | {"attention_mask": masks["sliding_attention"].to(device)}

    columns = masks["full_attention"].shape[-1]
    with ExitStack() as undo:
        for layer in (module for module in model.modules() if isinstance(module, GPTNeoSelfAttention)):
            undo.callback(setattr, layer, "bias", layer.bias)
            layer.bias = torch.nn.Buffer(layer.bias.new_ones(1).expand(1, 1, columns, columns), persistent=False)
            if layer.attention_type == "local":
                undo.callback(layer.register_forward_pre_hook(mask, with_kwargs=True).remove)
        yield


@contextmanager
def longrope_by_row(model: PreTrainedModel, is_long: torch.Tensor, border: int) -> Iterator[None]:
    """For one forward rotate rows that `is_long` [rows] by longrope's long factors, the others by its short ones.

    border: most tokens of a short sequence. The library takes the long factors for all if any position is beyond.
    """

    def rotate(module, args, kwargs, output):
        positions = kwargs.pop("position_ids")
        beyond = torch.full_like(positions[:, :1], border)
        long = module.forward(*args, **kwargs, position_ids=torch.cat([positions, beyond], dim=1))
        short = module.forward(*args, **kwargs, position_ids=positions.clamp(max=border - 1))
        choose = is_long[:, None, None].to(positions.device)
        return tuple(torch.where(choose, a[:, :-1], b) for a, b in zip(long, short, strict=True))

    with ExitStack() as undo:
        for module in model.modules():
            if getattr(module, "rope_type", None) == "longrope":
                undo.callback(module.register_forward_hook(rotate, with_kwargs=True).remove)
        yield
