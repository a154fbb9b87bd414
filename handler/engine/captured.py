"""What a forward that is replayed reads its inputs from: tensors of its own, which stay where they are."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_BEYOND = 1 << 40  # a column that no store has


class Captured:
    """A forward in which each row gets one token, and the tensors that it reads its inputs from.

    inputs: of the model's forward, [rows, ...]. lengths: tokens that each row holds; `columns`, int64 [rows], is where
    its next one goes. Whoever captures it sets `run`, which computes logits [rows, vocab] from these tensors.
    tried: of which replays one has been held against an ordinary forward: of all rows (False), of fewer (True).
    takes_fewer: whether it may be run for fewer rows, because what goes to a column that is not there is passed over.
    seconds, ordinary_seconds: that a replay and the forward by the model's code took, at best.
    """

    run: Callable[[], torch.Tensor]
    takes_fewer = False

    def __init__(self, inputs: Mapping[str, Any], lengths: Sequence[int], device: torch.device):
        self.inputs = _copied(inputs)
        self.columns = torch.tensor(lengths).to(device)
        self.seconds = self.ordinary_seconds = math.inf
        self.tried: set[bool] = set()

    def replay(self, inputs: Mapping[str, Any], lengths: Sequence[int]) -> torch.Tensor:
        """Logits [len(lengths), vocab] for other inputs of the same shapes, or of fewer rows, until the next forward.
        The rows that are missing get what some had before, and write nothing."""
        start, rows = time.monotonic(), len(lengths)
        for own, given in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
            own[: len(given)].copy_(given)
        self.columns[:rows].copy_(torch.tensor(lengths))
        if rows < len(self.columns):
            self.columns[rows:] = _BEYOND
        logits = self.run()[:rows]
        self.seconds = min(self.seconds, time.monotonic() - start)
        return logits

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


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.clone()
        elif isinstance(value, dict):
            value = _copied(value)
        copied[name] = value
    return copied
