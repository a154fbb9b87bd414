"""Forwards that are captured once and then replayed, without the Python of the model and of the library.

A GPU is through with the kernels of a step in which each row gets one token before Python has launched them
(docs/gpu.md), and a CPU waits for Python between the products of a small one, and of a short prompt
(docs/performance.md). So such forwards are captured where all weights are on one device: as CUDA graphs, or call by
call.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from handler.errors import first_line
from handler.weights.placement import align_hooks

from .captured import Captured, Forward, tensors_of
from .cuda_graphs import CudaGraphs
from .errors import CacheSpoiled, is_out_of_memory
from .kv_cache import KVCache
from .recording import Recordings
from .rounding import differences, tolerance

logger = logging.getLogger(__name__)

_MOST = 48  # captured at once: of different rows and prompts, and of columns that other rows do not let be as many
_SIGHTINGS = 3  # of a forward, before it is worth capturing; and replays, before they are too slow for fewer tokens
_STAND_INS = 30  # uses of one of more tokens, before a forward is worth capturing that one stands in for
_TRIALS = 3  # later replays that are tried, and not only the first ones of each capture
_MOST_TOKENS, _TOKEN_STEP = 128, 8  # of a prompt that is captured, and multiples that it is filled up to
_MOST_SECONDS = 0.5  # that its forward takes: of a longer one Python is little
_PATIENCE = 3  # times that memory ends, before there is no more of it

_Key = tuple[int, tuple]  # tokens, and what is the same in forwards of more that can stand in

_PROMPT = ("prompt",)  # what is the same in them

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
    """Replays forwards in which each row gets one token, over the same rows and columns of a cache, and, where tokens
    that are not there can be passed over, those of one row's first few.

    model: of which `can_replay` is true.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache
        on_cpu = torch.device("cpu") in _devices(model)
        self._backend: Recordings | CudaGraphs = Recordings(model, cache) if on_cpu else CudaGraphs(model, cache)
        self._is_on, self._takes_prompts = True, self._backend.takes_prompts
        self._trials = _TRIALS
        self._memory_ended: Counter[bool] = Counter()  # for prompts, and for steps
        self._captured: dict[_Key, Captured] = {}
        self._seen: Counter[_Key] = Counter()
        self._seconds: dict[_Key, float] = {}  # of the model's code, at best
        cache.on_move = self.forget  # what is captured has the addresses of keys and values, or holds on to them

    def forward(
        self,
        inputs: Mapping[str, Any],
        lengths: Sequence[int],
        kept: torch.Tensor | None,
        ordinary: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Logits [kept positions, vocab] of the forward that the cache is prepared for, until the next one.

        inputs: of the model's forward. lengths: tokens that each row holds. kept: positions that get logits, int64, or
        None where all do. ordinary: runs the forward as the model's code does, and returns its logits.
        Raises CacheSpoiled where a replay was tried and was wrong.
        """
        forward = self._forward(inputs, lengths, kept)
        if forward is None:
            return ordinary()
        key, count = self._key(forward), len(forward.columns)
        self._seen[key] += 1
        used = self._usable(key, count)
        if used is None:
            logits = self._run(ordinary, count, key)
            if self._is_due(key, count) and (captured := self._capture(forward, key[0], logits)):
                self._keep(key, captured)
            return logits
        captured = self._captured.pop(used)
        self._keep(used, captured)
        if self._trials or captured.is_for_more(forward) not in captured.tried:
            expected = self._run(ordinary, count, key)
            self._try(captured, forward, expected)
            return expected
        try:
            return captured.replay(forward)
        except Exception as error:
            self._failed(error, forward)
        del captured  # as the error, with what it holds of memory
        return ordinary()

    def forget(self) -> None:
        """Give back the memory of all that is captured."""
        self._captured.clear()
        self._seen.clear()
        self._seconds = {key: seconds for key, seconds in self._seconds.items() if key[1] == _PROMPT}
        self._backend.forget()

    def _forward(self, inputs: Mapping[str, Any], lengths: Sequence[int], kept: torch.Tensor | None) -> Forward | None:
        """None where none that is captured can stand for it, or each such would have another: short rows beside one
        twice as long see no columns that are to come."""
        context = self._cache.context
        if not self._is_on or self._cache.growth_is_due:
            return None
        if context.past_length:
            sees_all = context.query_length == 1 and context.kv_length == context.store_shape[1]
            return Forward(inputs, lengths) if sees_all and kept is None else None
        tokens = context.query_length
        if not self._takes_prompts or context.num_rows > 1 or tokens > _MOST_TOKENS or kept is None:
            return None
        is_plain = all(tensor.dim() == 2 for tensor in tensors_of(inputs))  # no mask of its own for each query
        return Forward(inputs, range(tokens), context.first_row) if is_plain and kept.tolist() == [tokens - 1] else None

    def _key(self, forward: Forward) -> _Key:
        """Equal for forwards that one capture can stand for."""
        if forward.row is not None:
            return -(-len(forward.columns) // _TOKEN_STEP) * _TOKEN_STEP, _PROMPT
        context = self._cache.context
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors_of(forward.inputs)]  # a mask may be one or several
        return context.num_rows, (context.first_row, context.kv_length, str(shapes))

    def _usable(self, key: _Key, count: int) -> _Key | None:
        """What is captured of as many tokens, or of the next more where to replay that takes no longer than the model's
        code takes."""
        size, kind = key
        used = min((other for other in self._captured if other[0] >= size and other[1] == kind), default=None)
        if used is None or (used[0] == count and kind != _PROMPT):
            return used
        captured = self._captured[used]
        is_known = captured.num_replays >= _SIGHTINGS
        if used != key and (self._trials or self._seen[key] > _STAND_INS or not (captured.tried and is_known)):
            return None
        is_worth_it = not is_known or captured.seconds <= self._code_seconds(count, kind)
        return used if is_worth_it and (captured.takes_fewer or used[0] == count) else None

    def _is_due(self, key: _Key, count: int) -> bool:
        """Whether a forward is worth capturing."""
        is_short = key[1] != _PROMPT or self._code_seconds(count, key[1]) < _MOST_SECONDS
        return is_short and key not in self._captured and self._seen[key] >= _SIGHTINGS

    def _code_seconds(self, count: int, kind: tuple) -> float:
        """That the model's code takes for so many tokens; where that is not known, what it took for fewer."""
        fewer = (seconds for (tokens, of), seconds in self._seconds.items() if tokens < count and of == kind)
        return self._seconds.get((count, kind)) or max(fewer, default=0.0)

    def _run(self, ordinary: Callable[[], torch.Tensor], count: int, key: _Key) -> torch.Tensor:
        """The model's code, of so many tokens; how long it takes is remembered."""
        logits, seconds = _timed(ordinary)
        self._seconds[count, key[1]] = min(seconds, self._seconds.get((count, key[1]), math.inf))
        return logits

    def _keep(self, key: _Key, captured: Captured) -> None:
        """The last used is the last."""
        self._captured[key] = captured
        if len(self._captured) > _MOST:
            oldest = next(iter(self._captured))
            del self._captured[oldest], self._seen[oldest]

    def _capture(self, forward: Forward, size: int, like: torch.Tensor) -> Captured | None:
        """The forward that has just run, but for where it wrote to; size: of tokens; like: its logits."""
        context = self._cache.context
        prepared = dict(vars(context))
        try:
            return self._backend.capture(forward, size, like)
        except Exception as error:
            self._failed(error, forward)
        finally:
            vars(context).update(prepared)
        return None

    def _try(self, captured: Captured, forward: Forward, expected: torch.Tensor) -> None:
        """Hold a replay against the logits that are expected. It has to write everything anew, and other numbers than
        when it was captured."""
        is_for_more = captured.is_for_more(forward)
        try:
            before = [part.clone() for part in self._written(forward)]
        except Exception as error:  # nothing is spoiled yet
            self._failed(error, forward)
            return
        try:
            self._cache.spoil_new_tokens()
            captured.spoil()
            logits = captured.replay(forward)
            broken = (expected.isnan() | expected.isposinf()).any(-1)  # rows that say nothing
            rows = (~broken).nonzero().flatten().tolist()
            pairs = [(logits[row], expected[row]) for row in rows]
            pairs += zip(self._written(forward), before, strict=True) if rows else []
            off, is_tried = max((_difference(*pair) for pair in pairs), default=0.0), bool(rows)
        except Exception as error:
            self._failed(error, forward)
            raise CacheSpoiled from error
        if off > tolerance(self._model):
            self._turn_off(f"they give other numbers, off by {off:.2g} standard deviations", forward)
            raise CacheSpoiled
        if is_tried:
            self._trials -= is_for_more in captured.tried
            captured.tried.add(is_for_more)

    def _written(self, forward: Forward) -> list[torch.Tensor]:
        """A prompt's keys and values, which its own attention does not read from the cache."""
        return [] if forward.row is None else self._cache.parts(forward.row, len(forward.columns))

    def _failed(self, error: Exception, forward: Forward) -> None:
        is_prompt = forward.row is not None
        self._memory_ended[is_prompt] += is_out_of_memory(error)
        if is_out_of_memory(error) and self._memory_ended[is_prompt] < _PATIENCE:
            self.forget()
        else:
            self._turn_off(f"{type(error).__name__}: {first_line(error)}", forward)

    def _turn_off(self, reason: str, forward: Forward) -> None:
        """All replays, or those of prompts alone, if it is one that went wrong."""
        which = "forwards" if forward.row is None else "prompts"
        logger.warning("%s are run by the model's code, and not replayed: %s", which, reason)
        if forward.row is None:
            self._is_on = False
            self._cache.on_move = None
        self._takes_prompts = False
        self.forget()


def _timed(forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What it returns, and the seconds that it takes."""
    start = time.monotonic()
    return forward(), time.monotonic() - start


def _difference(numbers: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits of one row, or keys or values, in standard deviations: one after the other takes less memory."""
    if torch.equal(numbers, expected):  # which may have no deviation
        return 0.0
    return differences(numbers.flatten()[None], expected.flatten()[None]).nan_to_num(torch.inf).item()
