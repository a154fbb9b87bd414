"""More tokens for one pass over the weights: guess the next ones, and let one forward verify them all.

The last token and its drafts go through the model as a chain. Whatever is sampled at a position is what would have
been sampled without drafts, from the same logits with the same random number; the chain goes on as long as that is
the draft. So greedy answers are the same, and seeded ones too. For a draft that is certain this accepts as often as
speculative sampling does (Leviathan et al. 2023, arXiv:2211.17192): with the probability that the model gives it.
"""

import numpy as np

from .capacity import Capacity
from .forward_cost import ForwardCost
from .kv_cache import KVCache
from .scheduler import Batch
from .sequence import Sequence

_SHORTEST, _LONGEST = 2, 5  # tokens that have to be there once more for what followed them to be a draft
_MEMORY = 8  # drafts over which the share that is accepted is a mean


class Speculator:
    """Adds drafts to batches: as many as pay, by what is accepted and what their positions cost.

    num_drafted, num_accepted: tokens so far.
    """

    def __init__(self, limit: int, capacity: Capacity, cache: KVCache, cost: ForwardCost):
        """limit: most drafts of a sequence in a step."""
        self.num_drafted = self.num_accepted = 0
        self._limit, self._capacity, self._cache, self._cost = limit, capacity, cache, cost

    def add_drafts(self, batches: list[Batch]) -> None:
        """Let sequences that bring their last token bring drafts too."""
        for batch in batches if self._limit else ():
            drafts = {sequence: self._drafts(sequence, batch) for sequence in batch.sequences}
            width = self._best_width(batch, drafts)
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
        sequence.acceptance = (_MEMORY * sequence.acceptance + accepted) / (_MEMORY + tried)

    def _drafts(self, sequence: Sequence, batch: Batch) -> list[int]:
        """As many as may be: the cache has room, and the last token of an answer needs no draft after it."""
        if sequence.is_prefilling:
            return []
        columns = self._cache.capacity_tokens // batch.cache_shape[0]
        room = min(columns - sequence.length, sequence.max_length - sequence.length - 1, self._limit)
        return prompt_lookup(sequence.all_token_ids, room) if room > 0 else []

    def _best_width(self, batch: Batch, drafts: dict[Sequence, list[int]]) -> int:
        """At how many drafts a row, at most, there are most tokens a second. All rows are padded to the widest."""

        def tokens_a_second(width: int) -> float:
            chains = {sequence: min(width, len(chain)) for sequence, chain in drafts.items()}
            padded = rows * max(1 + width, *batch.num_scheduled_tokens)
            fits = padded <= self._capacity.padded_tokens and rows + sum(chains.values()) <= self._capacity.max_logits
            if width and not fits:
                return 0.0
            accepted = sum(s.acceptance**depth for s, length in chains.items() for depth in range(1, length + 1))
            return (rows + accepted) / max(self._cost.seconds(padded), 1e-9)

        rows = len(batch.sequences)
        return max(range(1 + max(map(len, drafts.values()))), key=tokens_a_second)


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
