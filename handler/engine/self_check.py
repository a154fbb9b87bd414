"""Whether a loaded model gives a row the same logits whoever runs beside it and however its tokens are cut up.

The check is short, so it cannot see what begins at many tokens: a sliding window, or longrope's border.
"""

import math
from typing import cast

import torch
from transformers import PreTrainedModel

from .architecture import Architecture
from .errors import UnsupportedModel, is_out_of_memory
from .kv_cache import KVCache
from .model_runner import ModelRunner, Row
from .rounding import differences, tolerance
from .scheduler import Batch
from .sequence import Sequence

_TOKENS = 12
_COMPARED = 5  # positions after a cut: there what was before it counts most


@torch.inference_mode()
def check_rows(model: PreTrainedModel, architecture: Architecture) -> None:
    """Run the same tokens as one chunk and as several, in rows of different length: two passes over the model, and two
    more where all weights are in memory, in which each row gets one token, and in which a row is alone.

    Raises UnsupportedModel where the forward does, or where the logits differ by more than rounding.
    """
    name = type(model).__name__
    try:
        difference = _largest_difference(model, architecture)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnsupportedModel(f"{name} cannot run rows of different length together: {reason}") from error
    if math.isnan(difference):
        raise UnsupportedModel(f"{name} gives logits that are not numbers in {model.dtype}: set dtype to another one")
    if difference > tolerance(model):
        raise UnsupportedModel(
            f"{name} gives other logits when a prompt is cut into chunks beside other rows: off by {difference:.2g} "
            "standard deviations"
        )


def _largest_difference(model: PreTrainedModel, architecture: Architecture) -> float:
    """Of two rows that are cut from a third that is not, in standard deviations of its logits."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(architecture.vocab_size, (_TOKENS,), generator=generator).tolist()
    longer, shorter, whole = (Row(token_ids, row, needs_prompt_logprobs=True) for row in range(3))
    cache = KVCache(3 * 64, None, architecture.kv_bytes_per_token)
    runner = ModelRunner(model, architecture, cache)
    _forward(runner, {longer: 7, shorter: 3})
    parts = [] if runner.streams_weights else [_forward(runner, {longer: 1, shorter: 1})]
    ones = len(parts)
    rest = {longer: 5 - ones, shorter: 9 - ones}
    if runner.streams_weights:
        *others, of_whole = _forward(runner, rest | {whole: 12})
    else:  # each compiles what it needs
        others, (of_whole,) = list(_forward(runner, rest)), _forward(runner, {whole: 12})
    of_longer, of_shorter = (torch.cat(of_row) for of_row in zip(*parts, others, strict=True))
    cache.layers.clear()  # they refer to the cache, and would live until the interpreter looks for such circles
    return max(_median_difference(of_longer, of_whole[7:]), _median_difference(of_shorter, of_whole[3:]))


def _forward(runner: ModelRunner, new_tokens: dict[Row, int]) -> tuple[torch.Tensor, ...]:
    """Carry rows on by so many tokens; logits [tokens, vocab] of each."""
    rows = 1 + max(row.row for row in new_tokens)
    batch = Batch(cast(list[Sequence], list(new_tokens)), list(new_tokens.values()), (rows, _TOKENS))
    logits = runner.forward(batch)
    for row, count in new_tokens.items():
        row.num_cached_tokens += count
    return logits.split(batch.num_scheduled_tokens)


def _median_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the first positions of logits [positions, vocab]."""
    return differences(logits[:_COMPARED], expected[:_COMPARED]).median().item()
