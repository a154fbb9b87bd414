"""What a forward that is replayed reads its inputs from: tensors of its own, which stay where they are."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BEYOND = 1 << 40  # a column that no store has


@dataclass
class Forward:
    """One that may be captured: of one token of each row, or of the first ones of one row.

    inputs: of the model's forward, [rows, new tokens, ...]. columns: of the cache, where each token goes.
    row: of a prompt, which its tokens go to; it is None in a step. A prompt has the logits of its last token alone.
    """

    inputs: Mapping[str, Any]
    columns: Sequence[int]
    row: int | None = None


class Captured:
    """A forward, and the tensors that it reads its inputs from.

    inputs: of the model's forward. columns: int64 [tokens], where they go. row, last: int64 [1], which row they go to,
    and the token whose logits are kept, where it is of one row's first tokens. Whoever captures it sets `run`, which
    computes logits [rows, vocab] from these tensors.
    tried: of which replays one has been held against an ordinary forward: of all tokens (False), of fewer (True).
    takes_fewer: whether it may be run for fewer, because what goes to a column that is not there is passed over.
    seconds: that a replay took, at best, of so many: `num_replays`.
    """

    run: Callable[[], torch.Tensor]
    takes_fewer = False

    def __init__(self, forward: Forward, size: int, device: torch.device):
        """size: tokens, at least as many as the forward has."""
        self.inputs = _copied(forward.inputs, None if forward.row is None else size)
        self.columns = torch.full([size], BEYOND).to(device)
        self.row, self.last = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.seconds, self.num_replays = math.inf, 0
        self.tried: set[bool] = set()
        self._take(forward)

    def is_for_more(self, forward: Forward) -> bool:
        """Than the forward has, of tokens."""
        return len(forward.columns) < len(self.columns)

    def replay(self, forward: Forward) -> torch.Tensor:
        """Logits [rows, vocab] for other inputs of the same shapes, or of fewer tokens, until the next forward. Those
        that are missing write nothing: rows get what some had before, and a prompt is filled up with zeros."""
        start = time.monotonic()
        self._take(forward)
        logits = self.run()[: len(forward.columns)]
        self.seconds = min(self.seconds, time.monotonic() - start)
        self.num_replays += 1
        return logits

    def _take(self, forward: Forward) -> None:
        count = len(forward.columns)
        for own, given in zip(tensors_of(self.inputs), tensors_of(forward.inputs), strict=True):
            own[tuple(map(slice, given.shape))].copy_(given)
            if forward.row is not None:  # what another's tokens come to may be no number, which no mask hides
                own[:, count:] = 0
        self.columns[:count].copy_(torch.tensor(forward.columns))
        if count < len(self.columns):
            self.columns[count:] = BEYOND
        if forward.row is not None:
            self.row.fill_(forward.row)
            self.last.fill_(count - 1)

    def spoil(self) -> None:
        """Make what a run is to write anew something else."""


def tensors_of(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    tensors = []
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            tensors += tensors_of(value)
    return tensors


def _copied(inputs: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    """With tensors of their own, [rows, width] if there is one."""
    copied: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.clone() if width is None else value.new_zeros(len(value), width)
        elif isinstance(value, dict):
            value = _copied(value, width)
        copied[name] = value
    return copied
