"""A small model in memory that guesses what a large one, whose weights are read at each step, will say next."""

import time
from typing import cast

import torch
from transformers import PreTrainedModel

from .architecture import Architecture
from .forward_cost import ForwardCost
from .kv_cache import KVCache
from .model_runner import ModelRunner, Row
from .sampler import largest
from .scheduler import Batch
from .sequence import Sequence

_MAX_TOKENS = 4096  # rows x columns of its keys and values: longer texts, and more of them, are not followed
_CHUNK = 256  # rows x new columns of a forward over tokens that it has not seen yet


class DraftRow(Row):
    """token_ids: those of the sequence that it follows, and behind them its drafts."""

    def follow(self, sequence: Sequence) -> None:
        """Keep of what is cached that which the sequence has come to; its last token is always computed."""
        token_ids = sequence.all_token_ids
        pairs = enumerate(zip(self.token_ids[: self.num_cached_tokens], token_ids, strict=False))
        common = next((at for at, (own, other) in pairs if own != other), self.num_cached_tokens)
        self.token_ids, self.num_cached_tokens = token_ids, min(common, len(token_ids) - 1)


class DraftModel:
    """Follows sequences in rows and a cache of its own, whatever becomes of theirs.

    model: its tokens are those of the large model, which may have more of them, or fewer, behind the tokenizer's.
    vocab_size: how many the large one has.
    Raises UnsupportedModel.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        architecture = Architecture.of(model)
        self._vocab_size = min(vocab_size, architecture.vocab_size)
        self._max_length = min(_MAX_TOKENS, architecture.max_length or _MAX_TOKENS)
        self._cache = KVCache(_MAX_TOKENS, None, architecture.kv_bytes_per_token)
        self._runner, self._cost = ModelRunner(model, architecture, self._cache), ForwardCost()
        self._rows: dict[Sequence, DraftRow] = {}
        with torch.inference_mode():
            for _ in range(2):  # what a forward takes is known from the second: the first is slow
                self._forward([DraftRow([0], row=0)], 1)

    @staticmethod
    def cache_bytes(model: PreTrainedModel) -> int:
        """The most bytes of keys and values, and of what attention copies of them. The model may be on the meta
        device. Activations are not counted: the large model's are larger, and not there at the same time."""
        architecture = Architecture.of(model)
        layers = architecture.num_layers
        return _MAX_TOKENS * architecture.kv_bytes_per_token * (layers + architecture.copied_layers) // max(1, layers)

    def followed(self, sequences: list[Sequence], limit: int) -> list[Sequence]:
        """The shortest of them, as many as there is room for with `limit` drafts each, whose tokens it knows."""
        able = [sequence for sequence in sequences if max(sequence.all_token_ids) < self._vocab_size]
        able.sort(key=lambda sequence: sequence.length)
        while able and able[-1].length + limit > min(self._max_length, _MAX_TOKENS // len(able)):
            able.pop()
        return able

    def seconds(self, sequences: list[Sequence], count: int) -> float:
        """What `count` drafts for each of them take in a step; what it has not seen yet counts for the rest of them."""
        unseen = 0.0
        for sequence in sequences:
            seen = self._rows[sequence].num_cached_tokens if sequence in self._rows else 0
            unseen += max(0, sequence.length - seen) / max(1, sequence.max_length - sequence.length)
        return count * self._cost.seconds(len(sequences)) + unseen * self._cost.per_position

    def release_memory(self) -> None:
        """Give back what can be made anew."""
        self._runner.release_memory()

    def begin_anew(self) -> None:
        """Follow nobody, and keep nothing that was spoiled."""
        self._rows = {}
        for row in range(self._cache.num_rows):
            self._cache.zero_row(row)

    def forget(self) -> None:
        """Believe that forwards have become a little faster, so that who is not asked is asked again some day."""
        self._cost.reading *= 0.99
        self._cost.per_extra_position *= 0.99

    def propose(self, sequences: list[Sequence], count: int) -> dict[Sequence, list[int]]:
        """`count` tokens for each sequence, one after the other the likeliest. To be called in inference mode."""
        rows = self._arrange_rows(sequences)
        share = max(1, _CHUNK // len(rows))
        while max(row.length - row.num_cached_tokens for row in rows) > share:
            self._forward(rows, share)
            for row in rows:  # those that are there already wait for the others
                row.num_cached_tokens = min(row.num_cached_tokens, row.length - 1)
        for _ in range(count):
            tokens = self._forward(rows, share)
            for row, token in zip(rows, tokens, strict=True):
                row.token_ids.append(token)
        return {sequence: self._rows[sequence].token_ids[sequence.length :] for sequence in sequences}

    def _arrange_rows(self, sequences: list[Sequence]) -> list[DraftRow]:
        """Give each of them a row, without gaps; who has to move begins again. The rows in their order."""
        self._rows = {sequence: self._rows.get(sequence) or DraftRow() for sequence in sequences}
        taken = {row.row for row in self._rows.values()}
        free = [at for at in range(len(sequences)) if at not in taken]
        for sequence, row in self._rows.items():
            if row.row not in range(len(sequences)):
                row.row, row.num_cached_tokens = free.pop(), 0
            row.follow(sequence)
        return sorted(self._rows.values(), key=lambda row: row.row)

    def _forward(self, rows: list[DraftRow], share: int) -> list[int]:
        """Up to `share` tokens more of each row; the likeliest next one of those that come to their end by that."""
        start = time.monotonic()
        counts = [min(row.length - row.num_cached_tokens, share) for row in rows]
        for_all = len(rows), max(row.num_cached_tokens + count for row, count in zip(rows, counts, strict=True))
        batch = Batch(cast("list[Sequence]", rows), counts, for_all)
        logits: torch.Tensor = self._runner.forward(batch)
        tokens = largest(logits[:, : self._vocab_size])[1].tolist()
        for row, count in zip(rows, counts, strict=True):
            row.num_cached_tokens += count
        self._cost.record(batch.num_positions, time.monotonic() - start)
        return tokens
