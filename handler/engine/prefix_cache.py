"""Keys and values of texts that were here, for those that begin the same. What was used least lately goes first."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

SHORTEST = 32  # tokens that are worth being kept, or copied
_MOST = 256  # prefixes, all of which are looked at for each text


@dataclass(eq=False)
class Prefix:
    """A text's tokens and, for each store of the cache, its part [kv_heads, length, head_dim]."""

    owner: str
    token_ids: np.ndarray
    parts: list[torch.Tensor]


class PrefixCache:
    """Prefixes by their owner: who does not name it never gets anything of theirs.

    num_tokens: of all prefixes.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._prefixes: OrderedDict[Prefix, None] = OrderedDict()  # what was used last comes last

    def longest(self, owner: str, token_ids: np.ndarray) -> tuple[list[torch.Tensor], int]:
        """Parts of the prefix that has most tokens in common with the beginning of a text, and how many these are;
        ([], 0) where they are too few."""
        common = {prefix: num_common(prefix.token_ids, token_ids) for prefix in self._of(owner)}
        best = max(common, key=common.__getitem__, default=None)
        if best is None or common[best] < SHORTEST:
            return [], 0
        self._prefixes.move_to_end(best)
        return list(best.parts), common[best]

    def has(self, owner: str, token_ids: np.ndarray) -> bool:
        """Whether a text is there, or the beginning of one."""
        return any(num_common(prefix.token_ids, token_ids) == len(token_ids) for prefix in self._of(owner))

    def add(self, prefix: Prefix) -> None:
        """Take the place of what it begins with."""
        for other in self._of(prefix.owner):
            if num_common(other.token_ids, prefix.token_ids) == len(other.token_ids):
                self._remove(other)
        if len(self._prefixes) == _MOST:
            self._remove(next(iter(self._prefixes)))
        self._prefixes[prefix] = None
        self.num_tokens += len(prefix.token_ids)

    def shrink(self, num_tokens: int) -> None:
        """Let go of prefixes until they have so many tokens or fewer."""
        while self._prefixes and self.num_tokens > num_tokens:
            self._remove(next(iter(self._prefixes)))

    def _of(self, owner: str) -> list[Prefix]:
        return [prefix for prefix in self._prefixes if prefix.owner == owner]

    def _remove(self, prefix: Prefix) -> None:
        del self._prefixes[prefix]
        self.num_tokens -= len(prefix.token_ids)


def num_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens at the beginning are the same; 0 where they are too few to matter. Of arrays, as many long texts
    may begin alike, and a list takes twenty times as long."""
    if not np.array_equal(one[:SHORTEST], other[:SHORTEST]):
        return 0  # most texts, in no time
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size
