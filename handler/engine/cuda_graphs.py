"""Forwards on a GPU that are launched once and then replayed.

A GPU is through with the kernels of a step in which each row gets one token before Python has launched them
(docs/gpu.md). So such forwards are captured as CUDA graphs, where all weights are on one GPU:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from handler.weights.placement import align_hooks

from .errors import CacheSpoiled
from .kv_cache import KVCache
from .rounding import differences, tolerance

logger = logging.getLogger(__name__)

_MOST = 32  # graphs at once: of different rows, and of columns that other rows do not let be as many
_SIGHTINGS = 3  # of a forward, before it is worth capturing
_TRIALS = 3  # later replays that are tried, and not only the first one of each graph

_Inputs = Mapping[str, Any]
_is_used = True


def use_cuda_graphs(is_used: bool) -> None:
    """Whether models that the process loads from now on get graphs."""
    global _is_used
    _is_used = is_used


def can_replay(model: PreTrainedModel) -> bool:
    """Whether one GPU holds all of a model, so that a forward is nothing but kernels."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    is_moved = any(True for module in model.modules() for _ in align_hooks(module))
    return _is_used and len(devices) == 1 and next(iter(devices)).type == "cuda" and not is_moved


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
        self._seen: Counter[tuple] = Counter()
        self._logits = torch.empty(0, 0)  # [rows, vocab], of whichever graph was replayed last
        self._stream: Any = None  # that captures

    def forward(self, inputs: _Inputs, lengths: Sequence[int], ordinary: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Logits [rows, vocab] of the forward that the cache is prepared for, until the next one.

        inputs: of the model's forward. lengths: tokens that each row holds. ordinary: runs the forward kernel by
        kernel, and returns its logits.
        Raises CacheSpoiled where a replay was tried and was wrong.
        """
        key = self._key(inputs)
        if key is None:
            return ordinary()
        is_new = key not in self._graphs
        if is_new:
            self._seen[key] += 1
            captured = self._captured(inputs, lengths, ordinary) if self._seen[key] >= _SIGHTINGS else None
            if captured is None:
                return ordinary()
            self._graphs[key] = captured
        graph = self._graphs[key] = self._graphs.pop(key)  # the last used is the last
        if not is_new and not self._trials:
            return graph.replay(inputs, lengths)
        self._trials -= not is_new
        return self._tried(graph, inputs, lengths, ordinary())

    def forget(self) -> None:
        """Give back the memory of all graphs."""
        self._forget_graphs()
        self._logits = torch.empty(0, 0)

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._seen.clear()
        self._pool = None  # it is gone with the last graph of it

    def _key(self, inputs: _Inputs) -> tuple | None:
        """Equal for forwards that one graph can stand for; None where none can."""
        context = self._cache.context
        if not self._is_on or context.query_length > 1 or context.past_length == 0 or self._cache.growth_is_due:
            return None
        if self._version != self._cache.version:
            self._forget_graphs()
            self._version = self._cache.version
        shapes = [tuple(tensor.shape) for tensor in _tensors(inputs)]  # a mask may be one tensor or several
        return context.first_row, context.num_rows, context.kv_length, str(shapes)

    def _captured(
        self, inputs: _Inputs, lengths: Sequence[int], ordinary: Callable[[], torch.Tensor]
    ) -> "_Graph | None":
        if len(lengths) > len(self._logits):  # all graphs write their logits to the same place
            self._forget_graphs()
            like = ordinary()
            self._logits = like.new_empty(2 * len(like), like.shape[1])
            self._stream = self._stream or torch.cuda.Stream(like.device)
        if len(self._graphs) >= _MOST:
            del self._graphs[next(iter(self._graphs))]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        context = self._cache.context
        prepared = dict(vars(context))
        try:
            logits = self._logits[: len(lengths)]
            return _Graph(self._model, self._cache, inputs, lengths, logits, self._stream, self._pool)
        except torch.OutOfMemoryError:
            self.forget()
        except Exception as error:
            self._turn_off(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        finally:
            vars(context).update(prepared)  # in a graph that is captured, and in none that was not, nothing has run
        return None

    def _tried(self, graph: "_Graph", inputs: _Inputs, lengths: Sequence[int], expected: torch.Tensor) -> torch.Tensor:
        """Hold a replay against the logits that are expected. It has to write everything anew."""
        self._cache.spoil_new_tokens()
        self._logits.fill_(torch.nan)
        logits = graph.replay(inputs, lengths)
        known = ~expected.isnan().any(-1)  # a row that is broken anyway says nothing
        off = differences(logits[known], expected[known]).nan_to_num(torch.inf).max().item() if known.any() else 0.0
        if off > tolerance(self._model):
            self._turn_off(f"they give other logits, off by {off:.2g} standard deviations")
            raise CacheSpoiled
        return logits

    def _turn_off(self, reason: str) -> None:
        logger.warning("forwards are launched kernel by kernel, not as CUDA graphs: %s", reason)
        self._is_on = False
        self.forget()


class _Graph:
    """A captured forward, and the tensors that it reads its inputs from.

    logits: [rows, vocab], what the forward's are written to. stream: to capture on, of the device of logits. pool: of
    memory, shared by graphs of which one runs at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        inputs: _Inputs,
        lengths: Sequence[int],
        logits: torch.Tensor,
        stream: Any,
        pool: Any,
    ) -> None:
        self._inputs, self._logits = _copied(inputs), logits
        self._columns = torch.tensor(lengths).to(logits.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(logits.device):
            before = torch.cuda.current_stream()
            try:
                # Other threads may ask the driver for something meanwhile.
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                    cache.direct_to(self._columns)  # what it makes is read by the graph, and so is made in it
                    self._logits.copy_(model(**self._inputs).logits.flatten(0, -2))
            except Exception:
                _leave_capture(before, pool)
                raise

    def replay(self, inputs: _Inputs, lengths: Sequence[int]) -> torch.Tensor:
        for own, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            own.copy_(given)
        self._columns.copy_(torch.tensor(lengths))
        self._graph.replay()
        return self._logits


def _leave_capture(stream: torch.cuda.Stream, pool: Any) -> None:
    """What `torch.cuda.graph` of PyTorch 2.11 and 2.13 leaves out where the capture cannot even be ended: to go back to
    the stream that was, and to let the allocator free memory again. Nothing is done where it was ended."""
    torch.cuda.set_stream(stream)
    device = stream.device_index
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it was ended
    torch._C._cuda_releasePool(device, pool)


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
