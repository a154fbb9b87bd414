"""Forwards that are captured once and then replayed, without the Python of the model and of the library.

A GPU is through with the kernels of a step in which each row gets one token before Python has launched them
(docs/gpu.md), and a CPU waits for Python between the products of a small one (docs/performance.md). So such forwards
are captured where all weights are on one device: as CUDA graphs, or call by call.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from handler.errors import first_line
from handler.weights.placement import align_hooks

from .captured import Captured, tensors_of
from .cuda_graphs import CudaGraphs
from .errors import CacheSpoiled, is_out_of_memory
from .kv_cache import KVCache
from .recording import Recordings
from .rounding import differences, tolerance

logger = logging.getLogger(__name__)

_MOST = 32  # captured at once: of different rows, and of columns that other rows do not let be as many
_SIGHTINGS = 3  # of a forward, before it is worth capturing
_STAND_INS = 30  # uses of one of more rows, each up to a third longer, before it is
_TRIALS = 3  # later replays that are tried, and not only the first ones of each capture
_PATIENCE = 3  # times that memory ends, before there is no more of it

_Key = tuple[int, tuple]  # rows, and what is the same in forwards of other rows that can stand in

_is_used = True


def use_replay(is_used: bool) -> None:
    """Whether forwards of models that the process loads from now on are replayed."""
    global _is_used
    _is_used = is_used


def can_replay(model: PreTrainedModel) -> bool:
    """Whether one device holds all of a model, so that a forward is nothing but computing."""
    is_moved = any(True for module in model.modules() for _ in align_hooks(module))
    return _is_used and len(_devices(model)) == 1 and not is_moved


def _devices(model: PreTrainedModel) -> set[torch.device]:
    """That hold something of it. Matrices that are packed as one have no memory of their own."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    return devices - {torch.device("meta")}


class Replays:
    """Replays forwards over the same rows and columns of a cache, in which each row gets one token.

    model: of which `can_replay` is true.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache
        on_cpu = torch.device("cpu") in _devices(model)
        self._kind: Recordings | CudaGraphs = Recordings(model, cache) if on_cpu else CudaGraphs(model, cache)
        self._is_on = True
        self._trials, self._memory_ended = _TRIALS, 0
        self._captured: dict[_Key, Captured] = {}
        self._seen: Counter[_Key] = Counter()
        cache.on_move = self.forget  # what is captured has the addresses of keys and values, or holds on to them

    def forward(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], ordinary: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Logits [rows, vocab] of the forward that the cache is prepared for, until the next one.

        inputs: of the model's forward. lengths: tokens that each row holds. ordinary: runs the forward as the model's
        code does, and returns its logits.
        Raises CacheSpoiled where a replay was tried and was wrong.
        """
        key = self._key(inputs)
        if key is None:
            return ordinary()
        self._seen[key] += 1
        used = key if key in self._captured else self._stand_in(key)
        if used is None:
            logits, seconds = _timed(ordinary)
            if self._seen[key] >= _SIGHTINGS and (captured := self._capture(inputs, lengths, logits)):
                captured.ordinary_seconds = seconds
                self._keep(key, captured)
            return logits
        captured = self._captured.pop(used)
        self._keep(used, captured)
        if self._trials or (used != key) not in captured.tried:
            expected, seconds = _timed(ordinary)
            if used == key:
                captured.ordinary_seconds = min(captured.ordinary_seconds, seconds)
            self._try(captured, inputs, lengths, expected)
            return expected
        try:
            return captured.replay(inputs, lengths)
        except Exception as error:
            self._failed(error)
        del captured  # as the error, with what it holds of memory
        return ordinary()

    def forget(self) -> None:
        """Give back the memory of all that is captured."""
        self._captured.clear()
        self._seen.clear()
        self._kind.forget()

    def _key(self, inputs: Mapping[str, Any]) -> _Key | None:
        """Equal for forwards that one capture can stand for; None where none can, or where each would have another:
        short rows beside one twice as long see no columns that are to come."""
        context = self._cache.context
        is_prompt = context.query_length > 1 or context.past_length == 0
        if not self._is_on or is_prompt or self._cache.growth_is_due or context.kv_length != context.store_shape[1]:
            return None
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors_of(inputs)]  # a mask may be one tensor or several
        return context.num_rows, (context.first_row, context.kv_length, str(shapes))

    def _stand_in(self, key: _Key) -> _Key | None:
        """What is captured of the next more rows, if to replay that takes no longer than the model's code takes for
        these: which is at least their part of what it takes for those."""
        rows, kind = key
        more = min((other for other in self._captured if other[0] > rows and other[1] == kind), default=None)
        if more is None or self._trials or self._seen[key] > _STAND_INS:
            return None
        captured = self._captured[more]
        is_worth_it = captured.seconds * more[0] <= captured.ordinary_seconds * rows
        return more if captured.takes_fewer and captured.tried and is_worth_it else None

    def _keep(self, key: _Key, captured: Captured) -> None:
        """The last used is the last."""
        self._captured[key] = captured
        if len(self._captured) > _MOST:
            oldest = next(iter(self._captured))
            del self._captured[oldest], self._seen[oldest]

    def _capture(self, inputs: Mapping[str, Any], lengths: Sequence[int], like: torch.Tensor) -> Captured | None:
        """The forward that has just run, but for where it wrote to; like: its logits."""
        context = self._cache.context
        prepared = dict(vars(context))
        try:
            return self._kind.capture(inputs, lengths, like)
        except Exception as error:
            self._failed(error)
        finally:
            vars(context).update(prepared)
        return None

    def _try(
        self, captured: Captured, inputs: Mapping[str, Any], lengths: Sequence[int], expected: torch.Tensor
    ) -> None:
        """Hold a replay against the logits that are expected. It has to write everything anew, and other numbers than
        when it was captured."""
        off, is_tried, of_fewer = 0.0, False, len(lengths) < len(captured.columns)
        try:
            self._cache.spoil_new_tokens()
            captured.spoil()
            logits = captured.replay(inputs, lengths)
            broken = (expected.isnan() | expected.isposinf()).any(-1)  # rows that say nothing
            for row in (~broken).nonzero().flatten().tolist():
                off, is_tried = max(off, _difference(logits[row : row + 1], expected[row : row + 1])), True
        except Exception as error:
            self._failed(error)
            raise CacheSpoiled from error
        if off > tolerance(self._model):
            self._turn_off(f"they give other logits, off by {off:.2g} standard deviations")
            raise CacheSpoiled
        if is_tried:
            self._trials -= of_fewer in captured.tried
            captured.tried.add(of_fewer)

    def _failed(self, error: Exception) -> None:
        self._memory_ended += is_out_of_memory(error)
        if is_out_of_memory(error) and self._memory_ended < _PATIENCE:
            self.forget()
        else:
            self._turn_off(f"{type(error).__name__}: {first_line(error)}")

    def _turn_off(self, reason: str) -> None:
        logger.warning("forwards are run by the model's code, and not replayed: %s", reason)
        self._is_on = False
        self.forget()
        self._cache.on_move = None


def _timed(forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What it returns, and the seconds that it takes."""
    start = time.monotonic()
    return forward(), time.monotonic() - start


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Of [1, vocab], in standard deviations: rows apart take less memory."""
    if torch.equal(logits, expected):  # which may have no deviation
        return 0.0
    return differences(logits, expected).nan_to_num(torch.inf).item()
