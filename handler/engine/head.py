"""Which positions of a forward get logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def head_sees_only(model: PreTrainedModel, kept: torch.Tensor | None) -> Iterator[None]:
    """Project only some positions on the vocabulary. kept: int64, counted through a forward's rows, on any device; None
    for all.

    Not the library's `logits_to_keep`: Accelerate moves its tensor to the first device, and the head may be on
    another.
    """

    if kept is None:
        yield
        return

    def select(module, args):
        return (args[0].flatten(0, 1).index_select(0, kept.to(args[0].device)),)  # [kept positions, hidden]

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
