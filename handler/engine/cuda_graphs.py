"""Forwards on a GPU that are launched once and then replayed.

A step in which each row gets one token takes a GPU less time than Python takes to launch its kernels: 7 ms instead of
30 for BLOOM-7b1 on an H100 (python -m benchmarks.gpu). So such forwards are captured as CUDA graphs, where all weights
are on one GPU: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from handler.weights.placement import align_hooks

from .kv_cache import KVCache

logger = logging.getLogger(__name__)

_MOST = 64  # graphs at once, of different numbers of rows
_TRIALS = 3  # replays that are held against an ordinary forward before the others are believed
_TOLERANCE = 0.05  # of the length of the logits as a vector: kernels for other shapes may round otherwise

_Inputs = Mapping[str, Any]


def can_replay(model: PreTrainedModel) -> bool:
    """Whether one GPU holds all of a model, so that a forward is nothing but kernels."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    is_moved = any(True for module in model.modules() for _ in align_hooks(module))
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and not is_moved


class DecodeGraphs:
    """Replays forwards over the same rows and columns of a cache, in which each row gets one token.

    model: of which `can_replay` is true.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache
        self._is_on = True
        self._trials = _TRIALS
        self._pool: Any = None
        self._version = -1  # of the cache whose addresses the graphs hold
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: set[tuple] = set()

    def forward(
        self, inputs: _Inputs, lengths: Sequence[int], ordinary: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Logits [rows, vocab] of the forward that the cache is prepared for; None where it is to run as any other.

        inputs: of the model's forward. lengths: tokens that each row holds. ordinary: runs the forward, and returns
        its logits. The logits are overwritten by the next forward.
        """
        context = self._cache.context
        if not self._is_on or context.query_length > 1 or context.past_length == 0 or self._cache.growth_is_due:
            return None
        if self._version != self._cache.version:
            self._forget_graphs()
            self._seen.clear()
            self._version = self._cache.version
        # A mask may be one tensor or several.
        key = context.first_row, context.num_rows, context.kv_length, str(_shapes(inputs))
        if key not in self._graphs and key not in self._seen:
            self._seen.add(key)  # an ordinary forward also loads the kernels
            return None
        expected = ordinary() if self._trials else None
        graph = self._graphs.pop(key, None) or self._captured(inputs, lengths)
        if graph is None:
            return expected
        self._graphs[key] = graph  # the last used is the last
        logits = graph.replay(inputs, lengths)
        return logits if expected is None else self._believed(logits, expected)

    def _captured(self, inputs: _Inputs, lengths: Sequence[int]) -> "_Graph | None":
        if len(self._graphs) >= _MOST:
            del self._graphs[next(iter(self._graphs))]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return _Graph(self._model, self._cache, inputs, lengths, self._pool)
        except Exception as error:
            self._turn_off(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None

    def _believed(self, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """The logits, if they are those that are expected, but for rounding."""
        difference = (logits.float() - expected.float()).norm() / expected.float().norm()
        if not difference <= _TOLERANCE:
            self._turn_off(f"they give other logits, off by {difference:.2g}")
            return expected
        self._trials -= 1
        return logits

    def _turn_off(self, reason: str) -> None:
        logger.warning("forwards are launched kernel by kernel, not as CUDA graphs: %s", reason)
        self._is_on = False
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._pool = None  # it is gone with the last graph of it


class _Graph:
    """A captured forward, and the tensors that it reads its inputs from."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, inputs: _Inputs, lengths: Sequence[int], pool: Any
    ) -> None:
        self._inputs = _copied(inputs)
        self._columns = torch.tensor(lengths).to(next(model.parameters()).device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may ask the driver for something meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            cache.direct_to(self._columns)  # what it makes is read by the graph, and so is made in it
            self._logits = model(**self._inputs).logits.flatten(0, -2)

    def replay(self, inputs: _Inputs, lengths: Sequence[int]) -> torch.Tensor:
        for own, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            own.copy_(given)
        self._columns.copy_(torch.tensor(lengths))
        self._graph.replay()
        return self._logits


def _copied(inputs: _Inputs) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.clone()
        elif isinstance(value, dict):
            value = _copied(value)
        copied[name] = value
    return copied


def _tensors(inputs: _Inputs) -> list[torch.Tensor]:
    tensors = []
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            tensors += _tensors(value)
    return tensors


def _shapes(inputs: _Inputs) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(inputs)]
