"""How much fits: tokens in a sequence and in a step, bytes of keys and values, bytes of activations.

The engine runs by these figures and `make plan` shows them; there is no second arithmetic.
"""

import logging
from dataclasses import dataclass

from handler.settings import EngineConfig

from .architecture import Architecture

logger = logging.getLogger(__name__)

_FALLBACK_LENGTH = 2048  # tokens, for a model whose config names no limit
_IDLE_CHUNKS = 4  # times prefill_chunk, when there is nobody to be stalled


@dataclass(frozen=True)
class Capacity:
    """What an engine of a configuration can hold of an architecture.

    max_sequence_length: most tokens of prompt and continuation together.
    max_prompt_tokens: most tokens of a prompt.
    prefill_chunk, idle_prefill_chunk: most prompt tokens in a step that others decode in, and in one that nobody
        decodes in.
    kv_cache_tokens, kv_cache_bytes: most rows x columns of the KV cache, and its most bytes.
    workspace_bytes: about the most bytes of activations on a device that computes.
    """

    max_sequence_length: int
    max_prompt_tokens: int
    prefill_chunk: int
    idle_prefill_chunk: int
    kv_cache_tokens: int
    kv_cache_bytes: int
    workspace_bytes: int

    @classmethod
    def of(cls, architecture: Architecture, config: EngineConfig) -> "Capacity":
        chunk, idle_chunk = config.prefill_chunk, _IDLE_CHUNKS * config.prefill_chunk
        length = _max_sequence_length(architecture, config)
        tokens = config.max_batch_size * length
        kv_cache_bytes = tokens * architecture.kv_bytes_per_token
        if config.kv_cache_memory is not None:
            kv_cache_bytes = min(kv_cache_bytes, config.kv_cache_memory)
        # Float32 scores of a prompt's chunk against a whole sequence, twice, as eager attention makes them, or the
        # logits of a full batch, twice in float32, for the samplers.
        scores = 2 * architecture.num_attention_heads * min(idle_chunk, length) * length * 4
        logits = 2 * config.max_batch_size * architecture.vocab_size * 4
        return cls(
            max_sequence_length=length,
            max_prompt_tokens=config.max_prompt_tokens or length,
            prefill_chunk=chunk,
            idle_prefill_chunk=idle_chunk,
            kv_cache_tokens=tokens,
            kv_cache_bytes=kv_cache_bytes,
            workspace_bytes=max(scores, logits),
        )


def _max_sequence_length(architecture: Architecture, config: EngineConfig) -> int:
    asked, own = config.max_sequence_length, architecture.max_length
    limit = min(asked or own or _FALLBACK_LENGTH, own or asked or _FALLBACK_LENGTH)
    if asked and limit < asked:
        logger.warning("max_sequence_length %d is beyond the model; using %d", asked, limit)
    return limit
