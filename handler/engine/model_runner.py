"""One forward of the model over neighbouring rows, through its ordinary `forward` and Accelerate's hooks."""

import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from handler.weights.cpu_linear import WideLinear, cpu_lacks
from handler.weights.packed import has_plain_matrices
from handler.weights.placement import align_hooks

from .architecture import Architecture
from .attention import UNSEEN, gpt_neo_sees, key_positions, longrope_by_row, window_masks
from .capacity import activation_bytes, kv_copy_bytes
from .head import head_sees_only
from .heap import release_freed_memory, reusing_blocks
from .kv_cache import ForwardContext, KVCache
from .replay import Replays, can_replay
from .scheduler import Batch

_MANY_POSITIONS = 256  # of a forward that leaves holes in the heap, and takes long enough for them to be closed


@dataclass(eq=False)
class Row:
    """What a forward must know of a row, by the names that a `Sequence` has for it; for rows that are no sequences."""

    token_ids: list[int] = field(default_factory=list)
    row: int = -1
    num_cached_tokens: int = 0
    needs_prompt_logprobs: bool = False

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def next_token_ids(self, count: int) -> list[int]:
        return self.token_ids[self.num_cached_tokens : self.num_cached_tokens + count]


class ModelRunner:
    """Runs batches of rows of the cache.

    device: where the model wants its inputs.
    streams_weights: whether layers are brought to their device for each forward.
    bytes_to_come: memory of the device that the last forward, when it began, might still take, if it streamed weights.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, cache: KVCache):
        self.device = _input_device(model)
        streaming = [hook for module in model.modules() for hook in align_hooks(module) if hook.offload]
        self.streams_weights = bool(streaming)
        self._streamed = getattr(streaming[0].weights_map, "dataset", None) if streaming else None
        self._model, self._cache, self._architecture = model, cache, architecture
        self.bytes_to_come = 0
        self._takes_position_ids = architecture.takes_position_ids
        self._config = model.config.get_text_config()
        self._window, self._longrope_border = architecture.sliding_window, architecture.longrope_border
        # What is done around a forward for these is not replayed.
        is_plain = self._longrope_border is None and self._config.model_type != "gpt_neo"
        self._replays = Replays(model, cache) if is_plain and can_replay(model) else None
        widens = cpu_lacks(model.dtype) and has_plain_matrices(model)
        self._products = WideLinear if widens else nullcontext  # which looks at each operator

    @property
    def wait_seconds(self) -> float:
        """For how long forwards have waited for weights so far, where that is known."""
        return getattr(self._streamed, "wait_seconds", 0.0)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run a batch; the cache holds its new tokens afterwards. To be called in inference mode.

        Returns logits [sum(batch.logits_to_keep), vocab] in the model's dtype, the sequences one after the other, until
        the next forward.
        """
        sequences, num_new_tokens = batch.sequences, batch.num_scheduled_tokens
        lengths = [sequence.num_cached_tokens for sequence in sequences]
        context = self._cache.prepare_forward(sequences[0].row, lengths, num_new_tokens, batch.cache_shape)
        if self.streams_weights:  # who reads them asks
            self.bytes_to_come = self._bytes_to_come(context)
        width = context.query_length
        token_ids = [batch.token_ids(index) + [0] * (width - count) for index, count in enumerate(num_new_tokens)]
        new = torch.arange(width)  # [width]
        count, length = torch.tensor(num_new_tokens)[:, None], torch.tensor(lengths)[:, None]  # [rows, 1]
        keep = (new < count) & (new >= count - torch.tensor(batch.logits_to_keep)[:, None])
        kept = None if keep.all() else keep.flatten().nonzero().squeeze(1)  # here: a GPU would be waited for to know
        inputs = {
            "input_ids": torch.tensor(token_ids).to(self.device),  # [rows, width]
            "past_key_values": self._cache,
            "use_cache": True,
            "return_dict": True,
        }
        if self._takes_position_ids:
            # Padding gets position 0, which every model has.
            inputs["position_ids"] = torch.where(new < count, length + new, 0).to(self.device)
        with ExitStack() as during:
            during.enter_context(reusing_blocks())
            during.enter_context(self._products())
            inputs["attention_mask"] = self._attention_mask(length, count, context, during)
            border = self._longrope_border
            is_long = [border is not None and sequence.length > border for sequence in sequences]
            # Drafts may be beyond the border that their sequence is not at yet.
            if border is not None and (any(is_long) or (length + count).max() > border):
                during.enter_context(longrope_by_row(self._model, torch.tensor(is_long), border))

            def ordinary() -> torch.Tensor:
                with head_sees_only(self._model, kept):
                    return self._model(**inputs).logits.flatten(0, -2)

            replays = self._replays
            logits = replays.forward(inputs, lengths, kept, ordinary) if replays else ordinary()
        if self.streams_weights and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # who measures what a forward costs looks at a clock
        if batch.num_positions >= _MANY_POSITIONS:
            release_freed_memory()
        return logits

    def release_memory(self) -> None:
        """Give back what can be made anew, after a forward that ran out of it."""
        if self._replays:
            self._replays.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _bytes_to_come(self, context: ForwardContext) -> int:
        """More keys and values, copies of them, activations."""
        rows, tokens = context.num_rows, math.prod(context.store_shape)
        copies = kv_copy_bytes(self._architecture, tokens * self._cache.bytes_per_token)
        new = rows * context.query_length
        activations = activation_bytes(self._architecture, rows, new, tokens, context.kv_length)
        return self._cache.growth + copies + activations

    def _attention_mask(
        self, length: torch.Tensor, count: torch.Tensor, context: ForwardContext, during: ExitStack
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """For rows that hold `length` tokens and get `count` new ones, both [rows, 1], what forward takes as mask."""
        keys = key_positions(length, count, context).to(self.device)
        if self._window is None or context.kv_length <= self._window:
            return (keys != UNSEEN).long()  # the library adds causality, which is one of columns too
        # Padding attends to what its row's last token does: never to nothing.
        queries = (length + torch.minimum(torch.arange(context.query_length), count - 1)).to(self.device)
        masks = window_masks(self._config, queries, keys, self._window, self._model.dtype)
        if self._config.model_type == "gpt_neo":
            during.enter_context(gpt_neo_sees(self._model, masks))
            return masks["full_attention"]
        return masks if hasattr(self._config, "layer_types") else masks["sliding_attention"]


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its inputs; `model.device` may be "meta" when layers are offloaded."""
    for hook in (hook for module in model.modules() for hook in align_hooks(module)):  # the model's own first
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
