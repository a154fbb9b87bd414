"""One forward of the model over neighbouring rows, through its ordinary `forward` and Accelerate's hooks."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from .cpu_linear import WideLinear, cpu_lacks
from .errors import UnsupportedModel
from .kv_cache import KVCache
from .sequence import Batch

logger = logging.getLogger(__name__)

_FALLBACK_LENGTH = 2048  # tokens, for a model whose config names no limit
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_POSITIONS_FROM_MASK = ("bloom",)  # no position_ids: ALiBi counts the ones in the 2D attention mask


class ModelRunner:
    """Runs batches of rows. Raises UnsupportedModel for a model whose cache cannot be kept in rows.

    max_length: tokens in a sequence that the model can take, or None if its config does not say.
    window: the sliding attention window in tokens, or None.
    streams_weights: whether layers are brought to their device for each forward.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        self.window = _sliding_window(model)
        limits = [getattr(config, name, None) for name in _LENGTH_NAMES]
        self.max_length = next((limit for limit in limits if isinstance(limit, int)), None)
        self.vocab_size = config.vocab_size
        self.device = _input_device(model)
        self.streams_weights = any(hook.offload for m in model.modules() for hook in _align_hooks(m))
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        if not self._takes_positions and config.model_type not in _POSITIONS_FROM_MASK:
            raise UnsupportedModel(f"{type(model).__name__} takes no position_ids: rows differ in length")
        self._products = WideLinear if cpu_lacks(model.dtype) else nullcontext
        self._model = model
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise UnsupportedModel(f"{type(model).__name__} has no output embeddings")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values for one token, as far as the config tells."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * size * self._model.dtype.itemsize

    def length_limit(self, asked: int | None, chunk: int) -> int:
        """Most tokens in a sequence, where `asked` are wished for and prompts are prefilled in chunks of `chunk`."""
        own, window = self.max_length, self.window
        limit = min(asked or own or _FALLBACK_LENGTH, own or asked or _FALLBACK_LENGTH)
        if window and limit > window - chunk:
            # The library cuts windows by column, which is not a token's position while a chunk is prefilled.
            limit = max(window - chunk, 1)
            logger.warning("the sliding window of %d limits sequences to %d tokens", window, limit)
        if asked and limit < asked:
            logger.warning("max_sequence_length %d is beyond the model; using %d", asked, limit)
        return limit

    def forward(self, cache: KVCache, batch: Batch, shape: tuple[int, int]) -> torch.Tensor:
        """Run a batch; `cache` holds its new tokens afterwards. To be called in inference mode.

        shape: rows and columns that the cache must hold after this step.
        Returns logits [sum(batch.kept), vocab] in the model's dtype, the sequences one after the other.
        """
        counts, lengths = batch.counts, [s.cached for s in batch.sequences]
        width, past = max(counts), max(lengths)
        ids = [s.next_tokens(n) + [0] * (width - n) for s, n in zip(batch.sequences, counts, strict=True)]
        new = torch.arange(width)  # [new]
        count, length = torch.tensor(counts)[:, None], torch.tensor(lengths)[:, None]  # [rows, 1]
        columns = cache.aim(batch.sequences[0].row, lengths, counts, shape)
        if width == 1:  # each row's new token stands in its own next column
            mask = torch.arange(columns) <= length
        else:  # new tokens stand in common columns behind the longest row
            mask = torch.cat([torch.arange(past) < length, new < count], dim=1)
        keep = (new < count) & (new >= count - torch.tensor(batch.kept)[:, None])
        inputs = {
            "input_ids": torch.tensor(ids).to(self.device),  # [rows, new]
            "attention_mask": mask.long().to(self.device),  # [rows, columns]
            "past_key_values": cache,
            "use_cache": True,
            "return_dict": True,
        }
        if self._takes_positions:
            # Padding gets position 0, which every model has.
            inputs["position_ids"] = torch.where(new < count, length + new, 0).to(self.device)
        with self._head_sees_only(keep), self._products():
            return self._model(**inputs).logits

    @contextmanager
    def _head_sees_only(self, keep: torch.Tensor) -> Iterator[None]:
        """Project only positions `keep` [rows, new] on the vocabulary.

        Not `logits_to_keep`: Accelerate moves its tensor to the first device, and the head may be on another.
        """

        def select(module, args):
            return (args[0][keep.to(args[0].device)],)  # [kept, hidden]

        handle = self._head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


def _align_hooks(module: torch.nn.Module) -> Iterator:
    """Accelerate's hooks on a module that move or load tensors."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if hasattr(one, "offload") and hasattr(one, "execution_device"):
            yield one


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its inputs; `model.device` may be "meta" when layers are offloaded."""
    for hook in _align_hooks(model):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _sliding_window(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{type(model).__name__} keeps more than keys and values of a decoder")
    kinds, settings = get_layer_types_and_kwargs(config)
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{type(model).__name__} has layers other than attention: {sorted(other)}")
    windows = [s["sliding_window"] for s in settings if s.get("sliding_window")]
    return min(windows, default=None)
