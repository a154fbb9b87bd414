"""How much fits: tokens in a sequence and in a step, bytes of keys and values, bytes of activations.

The engine runs by these figures and `make plan` shows them; there is no second arithmetic.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from handler.settings import EngineConfig

from .architecture import Architecture
from .block_attention import BLOCK_BYTES, GPU_BLOCK_BYTES
from .bloom import FEWEST_QUERIES
from .heap import HEAP_BYTES

logger = logging.getLogger(__name__)

_FALLBACK_LENGTH = 2048  # tokens, for a model whose config names no limit
_MOST_DRAFTS = 32  # of all sequences in a step
_IDLE_CHUNKS = 4  # times prefill_chunk, when there is nobody to be stalled
# Logits that are drawn from at once: to sort rows of them, as typical_p asks, takes up to _SORT_BYTES for each.
DRAWN_LOGITS, _SORT_BYTES = 1 << 20, 50
# Prompt positions whose logits are kept in a step, for log-probabilities, and of which float32 is made at once.
PROMPT_LOGPROB_TOKENS, PROMPT_LOGPROB_ROWS = 128, 8
# oneDNN keeps what it made for a matrix and a number of rows, 0.6 MB, and of these the last KERNELS (its own limit is
# 1024); server/torchserve.py sets it. Of what oneDNN gives up 0.3 MB stays for good, which is not counted: it grows
# with the numbers of rows that were ever met.
KERNELS = 64
KERNEL_BYTES = 600_000


@dataclass(frozen=True)
class Capacity:
    """What an engine of a configuration can hold of an architecture.

    max_sequence_length: most tokens of prompt and continuation together.
    max_prompt_tokens: most tokens of a prompt.
    prefill_chunk, idle_prefill_chunk: most prompt tokens in a step that others decode in, and in one that nobody
        decodes in.
    padded_tokens: most rows x new columns of a forward, whose rows are padded to the one with the most new tokens.
    kv_cache_tokens, kv_cache_bytes: most rows x columns of the KV cache, and its most bytes.
    activation_bytes: the most bytes of activations on a CPU that computes.
    gpu_activation_bytes: the same on a GPU, where attention goes by larger blocks.
    copied_layers: layers' worth of the keys and values that attention copies besides.
    kv_copy_bytes: bytes of those copies.
    max_logits: most positions in a step whose logits are computed to be sampled from.
    """

    max_sequence_length: int
    max_prompt_tokens: int
    prefill_chunk: int
    idle_prefill_chunk: int
    padded_tokens: int
    kv_cache_tokens: int
    kv_cache_bytes: int
    activation_bytes: int
    gpu_activation_bytes: int
    copied_layers: int
    kv_copy_bytes: int
    max_logits: int

    @classmethod
    def of(cls, architecture: Architecture, config: EngineConfig) -> "Capacity":
        chunk, idle_chunk = config.prefill_chunk, _IDLE_CHUNKS * config.prefill_chunk
        length = _max_sequence_length(architecture, config)
        tokens = config.max_batch_size * length
        kv_cache_bytes = tokens * architecture.kv_bytes_per_token
        if config.kv_cache_memory is not None:
            kv_cache_bytes = min(kv_cache_bytes, config.kv_cache_memory)
        padded = min(max(idle_chunk, config.max_batch_size), tokens)
        cached = kv_cache_bytes // architecture.kv_bytes_per_token
        step = architecture, config.max_batch_size, padded, cached, length
        return cls(
            max_sequence_length=length,
            max_prompt_tokens=config.max_prompt_tokens or length,
            prefill_chunk=chunk,
            idle_prefill_chunk=idle_chunk,
            padded_tokens=padded,
            kv_cache_tokens=tokens,
            kv_cache_bytes=kv_cache_bytes,
            activation_bytes=activation_bytes(*step),
            gpu_activation_bytes=activation_bytes(*step, GPU_BLOCK_BYTES),
            copied_layers=architecture.copied_layers,
            kv_copy_bytes=kv_copy_bytes(architecture, kv_cache_bytes),
            max_logits=config.max_batch_size + _MOST_DRAFTS,
        )

    def activation_bytes_on(self, device: int | str) -> int:
        """On "cpu"; on a GPU, such as 0 or "gpu 0"."""
        return self.activation_bytes if device == "cpu" else self.gpu_activation_bytes

    def max_width(self, lengths: Sequence[int]) -> int:
        """Most new columns of a forward whose rows hold so many tokens.

        Attention sees past + width columns of each row, past being the longest one's tokens, which may be more than any
        of them will ever have: of scores, rows x width x (past + width), there are to be no more than where the longest
        chunk is a row's last one.
        """
        rows, past = len(lengths), max(lengths)
        scores = self.padded_tokens * self.max_sequence_length // rows
        return min(self.padded_tokens // rows, (math.isqrt(past**2 + 4 * scores) - past) // 2)


def kv_copy_bytes(architecture: Architecture, kv_cache_bytes: int) -> int:
    """What attention copies of so many bytes of keys and values."""
    return kv_cache_bytes * architecture.copied_layers // max(1, architecture.num_layers)


def activation_bytes(
    architecture: Architecture, rows: int, padded: int, cached: int, length: int, block_bytes: int = BLOCK_BYTES
) -> int:
    """The most bytes of tensors that live at the same time in a step, but for weights and all keys and values.

    rows: that are sampled for. padded: rows x new columns of its forward. cached: rows x columns of keys and values.
    length: most tokens of a row. block_bytes: of scores that block_attention.py makes at once.
    Counted in the forwards of BLOOM, Llama and GPT-2 by which tensors live at the peak;
    python -m benchmarks.plan_memory measures it.
    """
    item, hidden, inner = architecture.itemsize, architecture.hidden_size, architecture.intermediate_size
    columns = min(length, cached)
    # The residual and its norm, the product with the fused matrix and its parts; the mask as booleans and as numbers;
    # new keys and values behind copies of those in the cache.
    attention = padded * (item * (3 * hidden + 2 * architecture.qkv_size) + columns * (1 + item))
    attention += kv_copy_bytes(architecture, padded * architecture.kv_bytes_per_token)
    if architecture.keeps_scores:
        # The last layer's probabilities, this one's scores, and the same masked; then their softmax in float32, for
        # which 16-bit scores are widened first.
        each = 3 * item + (4 if item == 4 else 8)
        attention += padded * columns * architecture.num_attention_heads * each
    elif architecture.is_mended or item == 2:  # scores of a block of queries, and their softmax, in block_attention.py
        scores, fewest = item * architecture.num_attention_heads, FEWEST_QUERIES if architecture.is_mended else 1
        attention += 2 * min(max(block_bytes, scores * fewest * (cached + padded)), scores * padded * columns)
        attention += scores * cached if architecture.is_mended else 0  # what ALiBi adds
    # Four tensors of the inner size, if an activation function goes in steps.
    inner_tensors = 2 if architecture.is_mended else 4
    # 16-bit inputs are widened where the CPU lacks them.
    mlp = padded * (item * (5 * hidden + inner_tensors * inner) + (4 * inner if item < 4 else 0))
    # Logits of a prompt, and of what other rows sample from. Of the first some rows in float32 with their logarithms;
    # then the others in float32 with theirs, or while some of their rows are sorted.
    reported, sampled = min(padded, PROMPT_LOGPROB_TOKENS), rows + _MOST_DRAFTS
    logits = item * (reported + sampled if rows > 1 else max(reported, sampled))
    drawn = min(rows, max(1, DRAWN_LOGITS // architecture.vocab_size))
    widened = max(12 * min(padded, PROMPT_LOGPROB_ROWS), 12 * rows, 4 * rows + _SORT_BYTES * drawn)
    head = architecture.vocab_size * (logits + widened)
    most = max(attention, mlp, head)
    # Holes are as those that benchmarks.plan_memory meets: of what lies around them three quarters, and no more.
    return most + min(most * 3 // 4, HEAP_BYTES) + architecture.product_bytes + KERNELS * KERNEL_BYTES


def _max_sequence_length(architecture: Architecture, config: EngineConfig) -> int:
    asked, own = config.max_sequence_length, architecture.max_length
    limit = min(asked or own or _FALLBACK_LENGTH, own or asked or _FALLBACK_LENGTH)
    if asked and limit < asked:
        logger.warning("max_sequence_length %d is beyond the model; using %d", asked, limit)
    return limit
