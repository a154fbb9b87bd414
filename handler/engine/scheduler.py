"""Who runs, in which row, and how many tokens of each go into the next forward."""

from collections import deque

from .kv_cache import KVCache
from .sequence import Batch, Sequence


class Scheduler:
    """First come, first served. running[i] has row i of the cache; decoding rows come before prefilling ones.

    max_rows: most sequences that run at once; max_waiting: most that wait.
    chunk: most prompt tokens in a step that others decode in; idle_chunk: in one that nobody decodes in.
    one_forward: decoding and prefilling rows share one padded forward, since a pass over the weights is what
        costs; otherwise they get one each, since padding decoding rows to a chunk multiplies their work.
    """

    def __init__(self, cache: KVCache, max_rows: int, max_waiting: int, chunk: int, idle_chunk: int, one_forward: bool):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_waiting = max_waiting
        self._cache = cache
        self._max_rows = max_rows
        self._chunk, self._idle_chunk = chunk, idle_chunk
        self._budget = chunk  # this step's
        self._one_forward = one_forward

    def schedule(self) -> list[Batch]:
        """Admit who fits and plan this step's forwards."""
        while self.waiting and self._fits(self.waiting[0]):
            self.waiting[0].row = len(self.running)
            self.running.append(self.waiting.popleft())
        decode, prefill = Batch(), Batch()
        decoding = any(not sequence.prefilling for sequence in self.running)
        budget = self._budget = self._chunk if decoding else self._idle_chunk
        for sequence in self.running:
            batch = prefill if sequence.prefilling else decode
            missing = min(sequence.length - sequence.cached, budget if sequence.prefilling else 1)
            if missing:
                batch.sequences.append(sequence)
                batch.counts.append(missing)
                budget -= missing if sequence.prefilling else 0
        if self._one_forward:
            batches = [Batch(decode.sequences + prefill.sequences, decode.counts + prefill.counts)]
        else:
            batches = [decode, prefill]
        return [batch for batch in batches if batch.sequences]

    def shape(self) -> tuple[int, int]:
        """Rows and columns that running sequences fill at most after this step."""
        return len(self.running), max(min(s.cached + self._budget, s.length) for s in self.running)

    def release_finished(self) -> None:
        """Take finished sequences out and close the gaps: the last decoding rows fill those among their
        kind, prefilling rows move up in their order, so that the oldest goes on first."""
        self.waiting = deque(s for s in self.waiting if not s.choice.finish_reason)
        alive = [s for s in self.running if not s.choice.finish_reason]
        decoding = [s for s in alive if not s.prefilling]
        staying = {s.row: s for s in decoding if s.row < len(decoding)}
        moving = (s for s in decoding if s.row >= len(decoding))
        order = [staying.get(row) or next(moving) for row in range(len(decoding))]
        self.running = order + [s for s in alive if s.prefilling]
        for row, sequence in enumerate(self.running):
            if sequence.row != row and sequence.cached:
                self._cache.move(sequence.row, row, sequence.cached)
            sequence.row = row

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the rectangular store has room for one more row, all as long as the longest may get."""
        if not self.running:
            return True  # `submit` has seen to it
        rows = len(self.running) + 1
        columns = max(s.columns for s in [*self.running, sequence])
        return rows <= self._max_rows and rows * columns <= self._cache.max_cells
