"""Forwards as CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs"""

from typing import Any

import torch
from transformers import PreTrainedModel

from .captured import Captured, Forward
from .kv_cache import KVCache


class CudaGraphs:
    """Captures forwards of a model that is on one GPU; one of them runs at a time."""

    takes_prompts = False

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        self._model, self._cache = model, cache
        self._pool: Any = None  # of memory
        self._stream: Any = None  # to capture on
        self._logits = torch.empty(0, 0)  # [rows, vocab], of whichever graph was replayed last

    def capture(self, forward: Forward, size: int, like: torch.Tensor) -> Captured:
        """A forward of one token of each row, `size` tokens, which does not run. like: its logits."""
        if len(like) > len(self._logits):  # graphs that are there keep the smaller one
            self._logits = like.new_empty(2 * len(like), like.shape[1])
            self._stream = self._stream or torch.cuda.Stream(like.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        logits = self._logits[:size]
        return _Graph(self._model, self._cache, forward, logits, self._stream, self._pool)

    def forget(self) -> None:
        """Give back what graphs share, once there are none."""
        self._pool, self._logits = None, torch.empty(0, 0)


class _Graph(Captured):
    """logits: [rows, vocab], what the forward's are written to. stream: of its device. pool: shared by graphs of which
    one runs at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        forward: Forward,
        logits: torch.Tensor,
        stream: Any,
        pool: Any,
    ) -> None:
        super().__init__(forward, len(logits), logits.device)
        self._logits, self._graph, self.run = logits, torch.cuda.CUDAGraph(), self._replay
        with torch.cuda.device(logits.device):
            before = torch.cuda.current_stream()
            try:
                # Other threads may ask the driver for something meanwhile.
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                    cache.direct_to(self.columns)  # what it makes is read by the graph, and so is made in it
                    self._logits.copy_(model(**self.inputs).logits.flatten(0, -2))
            except Exception:
                _leave_capture(before, pool)
                raise

    def _replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._logits

    def spoil(self) -> None:
        self._logits.fill_(torch.nan)


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
