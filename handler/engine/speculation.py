"""More tokens for one pass over the weights: guess the next ones, and let one forward verify them all.

The last token and its drafts go through the model as a chain. Whatever is sampled at a position is what would have
been sampled without drafts, from the same logits with the same random number; the chain goes on as long as that is
the draft. So greedy answers are the same, and seeded ones too. For a draft that is certain this accepts as often as
speculative sampling does (Leviathan et al. 2023, arXiv:2211.17192): with the probability that the model gives it.
"""

import logging
from collections.abc import Callable

import numpy as np

from .capacity import Capacity
from .draft_model import DraftModel
from .errors import CacheSpoiled
from .forward_cost import ForwardCost
from .kv_cache import KVCache
from .scheduler import Batch
from .sequence import Sequence

logger = logging.getLogger(__name__)

# That get drafts where a CPU has all weights in memory: a product of few positions waits for it, as that of one does.
# With four rows wrong drafts cost more than right ones save (python -m benchmarks.reuse).
RESIDENT_ROWS = 1
_SHORTEST, _LONGEST = 2, 5  # tokens that have to be there once more for what followed them to be a draft
_MEMORY = 6  # drafts over which the share that is accepted is a mean


class Speculator:
    """Adds drafts to batches: as many as pay, by what is accepted and what their positions cost.

    num_drafted, num_accepted: tokens so far.
    draft_model: what guesses where the text suggests nothing, or None.
    """

    def __init__(self, limit: int, most_rows: int, capacity: Capacity, cache: KVCache, cost: ForwardCost):
        """limit: most drafts of a sequence in a step.
        most_rows: in a batch; with more of them there are no drafts.
        """
        self.num_drafted = self.num_accepted = 0
        self.draft_model: DraftModel | None = None
        self._asked: set[Sequence] = set()  # whose drafts are the draft model's
        self._limit, self._most_rows = limit, most_rows
        self._capacity, self._cache, self._cost = capacity, cache, cost

    def add_drafts(self, batches: list[Batch]) -> None:
        """Let sequences that bring their last token bring drafts too."""
        for batch in batches if self._limit else ():
            rooms = {sequence: self._room(sequence, batch) for sequence in batch.sequences}
            drafts = {s: prompt_lookup(s.all_token_ids, room) if room else [] for s, room in rooms.items()}
            self._asked = set()
            if self.draft_model and any(rooms.values()):
                drafts |= self._ask(self.draft_model, batch, rooms, drafts)
            _, width = self._best_width(batch, {sequence: len(chain) for sequence, chain in drafts.items()})
            for index, sequence in enumerate(batch.sequences):
                if chain := drafts[sequence][:width]:
                    batch.draft_token_ids[sequence] = chain
                    batch.num_scheduled_tokens[index] += len(chain)
                    self.num_drafted += len(chain)
        longest = max((s.length + len(chain) for b in batches for s, chain in b.draft_token_ids.items()), default=0)
        for batch in batches:  # the store that they share keeps its shape
            rows, columns = batch.cache_shape
            batch.cache_shape = rows, max(columns, longest)

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """After a chain of `drafted` tokens was verified."""
        self.num_accepted += accepted
        tried = min(accepted + 1, drafted)
        share = (_MEMORY * self._acceptance(sequence) + accepted) / (_MEMORY + tried)
        if sequence in self._asked:
            sequence.draft_acceptance = share
        else:
            sequence.acceptance = share

    def _room(self, sequence: Sequence, batch: Batch) -> int:
        """How many may be: the cache has room, and the last token of an answer needs no draft after it."""
        if sequence.is_prefilling or len(batch.sequences) > self._most_rows:
            return 0
        columns = self._cache.capacity_tokens // batch.cache_shape[0]
        return max(0, min(columns, sequence.max_length - 1, sequence.length + self._limit) - sequence.length)

    def _ask(
        self, model: DraftModel, batch: Batch, rooms: dict[Sequence, int], drafts: dict[Sequence, list[int]]
    ) -> dict[Sequence, list[int]]:
        """The draft model's guesses, where the text suggests nothing, if there are more tokens a second with them. It
        follows all who decode, so that they keep their rows. An error is the end of it, and of no request."""
        try:
            lengths = {sequence: len(chain) for sequence, chain in drafts.items()}
            without, _ = self._best_width(batch, lengths)
            followed = model.followed([s for s in batch.sequences if not s.is_prefilling], self._limit)
            self._asked = {sequence for sequence in followed if not drafts[sequence]}
            lengths |= {sequence: rooms[sequence] for sequence in self._asked}
            rate, width = self._best_width(batch, lengths, lambda count: model.seconds(followed, count))
            if rate > without:
                proposed = model.propose(followed, width)
                return {sequence: proposed[sequence][: rooms[sequence]] for sequence in self._asked}
            model.forget()
        except CacheSpoiled:  # by a replay, which will not happen often
            model.begin_anew()
        except Exception:
            logger.exception("the draft model is not asked any more")
            self.draft_model = None
        return {}

    def _acceptance(self, sequence: Sequence) -> float:
        return sequence.draft_acceptance if sequence in self._asked else sequence.acceptance

    def _best_width(
        self, batch: Batch, lengths: dict[Sequence, int], seconds: Callable[[int], float] = lambda count: 0.0
    ) -> tuple[float, int]:
        """The most tokens a second, and at how many drafts a row, at most. All rows are padded to the widest.

        lengths: most drafts of each sequence.
        seconds: that it takes to guess so many, beside the forward.
        """

        def tokens_a_second(width: int) -> float:
            chains = {sequence: min(width, length) for sequence, length in lengths.items()}
            widest = max(1 + width, *batch.num_scheduled_tokens)
            if width and (widest > most or rows + sum(chains.values()) > self._capacity.max_logits):
                return 0.0
            accepted = sum(
                self._acceptance(s) ** depth for s, length in chains.items() for depth in range(1, length + 1)
            )
            guessing = seconds(width) if width else 0.0
            return (rows + accepted) / max(self._cost.seconds(rows * widest) + guessing, 1e-9)

        rows = len(batch.sequences)
        most = self._capacity.max_width([sequence.num_cached_tokens for sequence in batch.sequences])
        rate, narrow = max((tokens_a_second(width), -width) for width in range(1 + max(lengths.values())))
        return rate, -narrow


def prompt_lookup(token_ids: list[int], limit: int) -> list[int]:
    """Up to `limit` tokens: what followed when the last tokens, as many of them as possible, were there before. A text
    that repeats itself is carried on beyond its end."""
    tokens = np.array(token_ids)
    found = np.flatnonzero(tokens[:-1] == tokens[-1])  # where they end
    for size in range(2, _LONGEST + 1):
        longer = found[found >= size - 1]
        longer = longer[tokens[longer - size + 1] == tokens[-size]] if len(longer) else longer
        if not len(longer):
            if size <= _SHORTEST:
                return []
            break
        found = longer
    following = tokens[found[-1] + 1 :]
    return np.resize(following, limit).tolist()
