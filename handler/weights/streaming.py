"""Weights of the disk tier, read while something else computes.

Accelerate's hooks ask for a module's tensors when its forward begins and let go of them when it ends, in the same order
at each step. So the next ones are read ahead, across the end of a step too, as far as a budget allows. A tensor that
nobody foresaw is read when it is asked for.
"""

import mmap
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from transformers import PreTrainedModel

from .foresight import Foresight
from .placement import SMALL_BYTES, align_hooks
from .reading import ALIGNMENT, Range, fastest_reader
from .safetensors_format import DTYPES, read_header

_GOLDEN = (5**0.5 - 1) / 2
_STEPS = 256  # in which the page cache's part grows, from nothing to everything
_PATIENCE = 64  # passes in which two thirds of what the page cache has lost are forgotten
_UNTOLD = 0.9  # of the room that is used where it cannot be seen that it was too much


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file, and the dtype that the model computes in."""

    range: Range
    dtype: torch.dtype
    shape: tuple[int, ...]
    model_dtype: torch.dtype


def stream_weights(model: PreTrainedModel, budget: int) -> "StreamedWeights | None":
    """Let the hooks of a dispatched model read the disk tier through StreamedWeights; None when it has no disk tier.

    budget: as of StreamedWeights.
    Raises OSError when the files cannot be read.
    """
    hooked = [(module, hook) for module in model.modules() for hook in align_hooks(module) if hook.offload]
    source = next((hook.weights_map.dataset for _, hook in hooked), None)
    if source is None or not source.index:
        return None
    embedding = model.get_input_embeddings()
    hook = next((hook for module, hook in hooked if module is embedding), None)
    table = None
    if hook is not None and torch.device(hook.execution_device).type == "cpu":
        table = f"{hook.weights_map.prefix}weight"
    streamed = StreamedWeights(source, list(model.state_dict()), budget, table)
    for module, hook in hooked:
        hook.weights_map = PrefixedDataset(streamed, hook.weights_map.prefix)
        module.register_forward_hook(lambda *_: streamed.read_ahead())  # into what the module has just let go of
    if table:
        embedding.register_forward_pre_hook(lambda _, args: streamed.look_up(args[0]))
    model.register_forward_pre_hook(lambda *_: streamed.begin_pass())
    return streamed


class StreamedWeights(Mapping[str, torch.Tensor]):
    """What a model's hooks get the disk tier's tensors from, by name. For the thread that runs the model.

    source: where Accelerate would have them from, and has what is in the host's memory.
    reader: reads the files, by the method that was fastest on them; rate: the bytes a second that it then reached.
    wait_seconds: for how long forwards have waited for tensors so far.
    page_cache_room: asked when a forward begins, how many bytes of the tensors the kernel's page cache may keep; set by
        who knows. They come from the disk once, and again only if memory becomes short.
    """

    def __init__(self, source: OffloadedWeightsLoader, names: Sequence[str], budget: int, table: str | None = None):
        """names: the model's tensors in its order.
        budget: bytes of memory for tensors in use and read ahead; a tensor that has no room there gets its own.
        table: of the input embedding, where the CPU computes."""
        self.source = source
        self._arena = _Arena(budget + 4 * ALIGNMENT)  # two large tensors, wherever they begin in their files
        self._stored = _stored_tensors(source, names)
        small = [name for name, stored in self._stored.items() if stored.range.size <= SMALL_BYTES]
        self._small = {name: source[name].clone() for name in small}
        self.reader, self.rate = fastest_reader([self._stored[name].range for name in self._large()])
        self.page_cache_room: Callable[[], int] = int
        self._shortage = 0  # bytes of that room that are not there, as the page cache has lost so much
        self._explained = 0  # of reader.bytes_lost, what is no sign of that
        # What is small is there, and what is of another dtype has to be converted whole.
        rows_suffice = table in self._large() and self._stored[table].dtype == self._stored[table].model_dtype
        self._table = table if rows_suffice else None
        whole = dict.fromkeys(self._stored[name].range for name in self._large() if name != self._table)
        # By multiples of the golden ratio: any beginning of this order is spread evenly over the model.
        pieces = enumerate(piece for wanted in whole for piece in wanted.pieces)
        self._pieces = [piece for _, piece in sorted(pieces, key=lambda numbered: numbered[0] * _GOLDEN % 1)]
        self._sizes = [0, *accumulate(piece.size for piece in self._pieces)]  # of beginnings
        self._looked_up: dict[str, _Arriving] = {}
        self.wait_seconds = 0.0
        self._foresight = Foresight(self._start_ahead, _Arriving.cancel)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. Its memory is used again when nobody holds it any more.

        Raises KeyError for an unknown name, and OSError when a file cannot be read; asking again tries again.
        """
        if name in self._small:
            return self._small[name]
        if name not in self._stored:
            return self.source[name]  # of the CPU tier, when a GPU computes; or unknown
        if name in self._looked_up:
            return self._wait(self._looked_up.pop(name))
        arriving = self._foresight.take(name) or self._start(name)
        self.read_ahead()
        try:
            return self._wait(arriving)
        except OSError:
            # It may have failed a while ago, and so may what was read ahead with it.
            self._foresight.forget_all()
            return self._wait(self._start(name))

    @property
    def memory(self) -> np.ndarray:
        """uint8, that tensors are read into."""
        return self._arena.memory

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def read_ahead(self) -> None:
        """Begin to read what comes next, as far as the budget allows."""
        self._foresight.go_on()

    @property
    def page_cache_bytes(self) -> int:
        """Bytes of the tensors that are left to the page cache now."""
        return self._sizes[len(self.reader.kept)]

    def begin_pass(self) -> None:
        """Leave as much to the page cache as there is room for now.

        Less at once, as a cyclic read of more than memory holds finds nothing there; more in steps, as to let go of
        something and read it again is no gain. What the kernel took back is left to it for a while.
        """
        kept, most, lost = len(self.reader.kept), len(self._pieces), self.reader.bytes_lost
        self._shortage = self._shortage * (_PATIENCE - 1) // _PATIENCE + max(0, lost - self._explained)
        room = int(self.page_cache_room() * (1 if self.reader.tells_what_is_cached else _UNTOLD))
        self._explained = lost + max(0, self.page_cache_bytes - room)  # who took that may have pushed out as much
        number = max(0, bisect_right(self._sizes, room - self._shortage) - 1)
        if number < kept or number >= kept + max(1, most // _STEPS) or number == most > kept:
            self.reader.keep(set(self._pieces[:number]))

    def look_up(self, rows: torch.Tensor) -> None:
        """Of the table [vocab, hidden], which is asked for next, read only these rows, int64 of any shape. The others
        are left as they are, which is nothing: memory that nobody touches takes no room."""
        if (name := self._table) is None:
            return
        stored = self._stored[name]
        width = stored.range.size // stored.shape[0]
        buffer = aligned_memory(stored.range.buffer_size, huge_pages=False)
        pieces = []
        for row in rows.unique().tolist():
            source = Range(stored.range.path, stored.range.start + row * width, width)
            at = source.aligned_start - stored.range.aligned_start
            pieces += self.reader.start(source, buffer.data[at:], drop=False)  # of a tied head's that may be kept
        self._looked_up[name] = _Arriving(stored, buffer, pieces)

    def _large(self) -> list[str]:
        return [name for name in self._stored if name not in self._small]

    def _start_ahead(self, name: str) -> "_Arriving | None":
        buffer = self._arena.take(self._stored[name].range.buffer_size)
        return None if buffer is None else self._start(name, buffer)

    def _start(self, name: str, buffer: np.ndarray | None = None) -> "_Arriving":
        """Begin to read into `buffer`, by default one of the arena, or its own where the arena has no room."""
        stored = self._stored[name]
        size = stored.range.buffer_size
        buffer = buffer if buffer is not None else self._arena.take(size)
        buffer = buffer if buffer is not None else aligned_memory(size)
        return _Arriving(stored, buffer, self.reader.start(stored.range, buffer.data))

    def _wait(self, arriving: "_Arriving") -> torch.Tensor:
        start = time.perf_counter()
        try:
            return arriving.tensor()
        finally:
            self.wait_seconds += time.perf_counter() - start


@dataclass
class _Arriving:
    """A tensor whose bytes are on their way into a buffer."""

    stored: StoredTensor
    buffer: np.ndarray
    pieces: list[Future]

    def tensor(self) -> torch.Tensor:
        """Waits for it. Raises OSError when it cannot be read."""
        for piece in self.pieces:
            piece.result()
        stored = self.stored
        skipped = stored.range.start - stored.range.aligned_start
        data = torch.from_numpy(self.buffer)[skipped : skipped + stored.range.size]
        if skipped % stored.dtype.itemsize:
            data = data.clone()  # safetensors need not align tensors
        return data.view(stored.dtype).view(stored.shape).to(stored.model_dtype)

    def cancel(self) -> None:
        for piece in self.pieces:
            piece.cancel()  # one that has begun holds the buffer until it ends


class _Arena:
    """Memory for tensors that come and go, in one piece: to ask the kernel for more would mean to clear each page."""

    def __init__(self, size: int):
        self.memory = aligned_memory(size)
        self._used: dict[int, int] = {}  # where a piece ends that somebody holds, by where it begins
        self._returned: deque[int] = deque()  # by finalizers, which may run anywhere and so take no lock

    def take(self, size: int) -> np.ndarray | None:
        """uint8 [size], or None when there is no room. Whatever is made of it keeps it from being used again."""
        while self._returned:
            del self._used[self._returned.popleft()]
        start = 0
        for used, end in sorted(self._used.items()):
            if used - start >= size:
                break
            start = end
        if start + size > len(self.memory):
            return None
        self._used[start] = start + size
        piece = self.memory[start : start + size]
        weakref.finalize(piece, self._returned.append, start).atexit = False
        return piece


def aligned_memory(size: int, huge_pages: bool = True) -> np.ndarray:
    """uint8 [size], zeros. Pages take memory once they are touched."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE)  # shared memory gets no huge pages, and counts as a mapped file
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _stored_tensors(source: OffloadedWeightsLoader, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Where those of the names that are on the disk tier lie."""
    headers: dict[Path, tuple[dict[str, Any], int]] = {}
    tensors = {}
    for name, entry in ((name, source.index[name]) for name in names if name in source.index):
        path = Path(entry["safetensors_file"])
        if path not in headers:
            headers[path] = read_header(path)
        header, first = headers[path]
        tensor = header[entry["weight_name"]]
        begin, end = tensor["data_offsets"]
        tensors[name] = StoredTensor(
            range=Range(path, first + begin, end - begin),
            dtype=DTYPES[tensor["dtype"]],
            shape=tuple(tensor["shape"]),
            model_dtype=getattr(torch, entry["dtype"]),
        )
    return tensors
