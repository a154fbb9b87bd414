"""Who runs, in which row of the KV cache, and how many tokens of each go into the next forward."""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field

import numpy as np

from handler.settings import EngineConfig

from .capacity import PROMPT_LOGPROB_TOKENS, Capacity
from .errors import InvalidRequest, QueueFull
from .forward_cost import ForwardCost
from .kv_cache import KVCache
from .prefix_cache import SHORTEST, num_common
from .sequence import Sequence

logger = logging.getLogger(__name__)

_MARGIN = 32  # tokens, or an eighth of a sequence: so far all may grow before the next has to be preempted
_MAX_PASSED = 8  # so often is one passed who does not fit; and so many requests are looked at for one who does


@dataclass
class Batch:
    """One forward: sequences in neighbouring rows, and how many new tokens each brings.

    num_scheduled_tokens: new tokens of each sequence, prompt tokens or the one generated last, and its drafts.
    draft_token_ids: guesses at what follows a sequence's last token, for those that have any.
    cache_shape: rows and columns that all running sequences, also those of other batches, fill after this step.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    cache_shape: tuple[int, int] = (0, 0)
    draft_token_ids: dict[Sequence, list[int]] = field(default_factory=dict)

    @property
    def num_positions(self) -> int:
        """What is computed: every row is padded to the widest."""
        return len(self.sequences) * max(self.num_scheduled_tokens, default=0)

    def drafts(self, index: int) -> list[int]:
        return self.draft_token_ids.get(self.sequences[index], [])

    def num_own_tokens(self, index: int) -> int:
        """New tokens that are no drafts."""
        return self.num_scheduled_tokens[index] - len(self.drafts(index))

    def token_ids(self, index: int) -> list[int]:
        """A sequence's new tokens."""
        return self.sequences[index].next_token_ids(self.num_own_tokens(index)) + self.drafts(index)

    def completes(self, index: int) -> bool:
        """Whether the forward reaches the sequence's last token, so that the next one can be sampled."""
        sequence = self.sequences[index]
        return sequence.num_cached_tokens + self.num_own_tokens(index) == sequence.length

    @property
    def logits_to_keep(self) -> list[int]:
        """Of how many of its last new positions each sequence needs logits: of all where the prompt's
        log-probabilities are reported, of the last and its drafts where a token is sampled, else of none."""
        return [
            count if sequence.needs_prompt_logprobs else self.completes(index) * (1 + len(self.drafts(index)))
            for index, (sequence, count) in enumerate(zip(self.sequences, self.num_scheduled_tokens, strict=True))
        ]


class Scheduler:
    """Rows are shared fairly among requests, and the cache by what is used of it.

    A row goes to the request (the group of its jobs) that holds the fewest, and among those to the oldest. Where there
    is none, one that holds two more gives its youngest up: alone, a request may have all rows. Who would not fit the
    cache may be passed by others a few times. When the cache is full in the middle of their work, the youngest of the
    largest request is preempted: it waits again, before all that came later, and what it has generated is prefilled
    with its prompt. The oldest never is, so somebody always gets to the end.

    running[i] has row i of the cache while forwards run; decoding rows come before prefilling ones.

    config, capacity: how many sequences run and wait, and how many prompt tokens a step takes.
    mixed_batch: decoding and prefilling rows share one padded forward where a pass over the weights is what costs;
        otherwise they get one each, since padding decoding rows to a chunk multiplies their work.
    cost: says when padding costs more than a pass.
    pass_columns: attention to so many columns of a row costs as much as a pass over the weights. Decoding rows get two
        forwards, one for the long ones, where that saves twice as many; never in a mixed batch.
    """

    def __init__(
        self,
        cache: KVCache,
        config: EngineConfig,
        capacity: Capacity,
        mixed_batch: bool,
        cost: ForwardCost,
        pass_columns: float = math.inf,
    ):
        self.waiting: list[Sequence] = []  # in the order of their submission
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_reused_tokens = 0  # of prefixes
        self._cache, self._config, self._capacity = cache, config, capacity
        self._mixed_batch, self._cost, self._pass_columns = mixed_batch, cost, pass_columns

    @property
    def used_tokens(self) -> int:
        """Rows x columns of the cache, a rectangle, that the running sequences fill."""
        running = list(self.running)
        return len(running) * max((sequence.length for sequence in running), default=0)

    def check_queue_room(self, count: int) -> None:
        """Raises InvalidRequest when so many sequences may never wait together, QueueFull when they may not now."""
        if count > self._config.max_queue:
            raise InvalidRequest(f"n: {count} is more than may wait; send at most {self._config.max_queue}")
        if len(self.waiting) + count > self._config.max_queue:
            raise QueueFull(f"{len(self.waiting)} sequences wait already; send the request again later")

    def add(self, sequences: Collection[Sequence]) -> None:
        """Let sequences wait for a row, for whom `check_queue_room` found room."""
        self.waiting.extend(sequences)

    def schedule(self) -> list[Batch]:
        """Say who runs, in which row, and plan this step's forwards."""
        while len(self.running) > 1 and not self._fits(self.running, margin=False):
            self._preempt(self._youngest(self.running))
        while sequence := self._next():
            self.waiting.remove(sequence)
            self.running.append(sequence)
        num_long = self._arrange_rows()
        long, short, prefill = Batch(), Batch(), Batch()
        anyone_decodes = any(not sequence.is_prefilling for sequence in self.running)
        chunk = budget = self._capacity.prefill_chunk if anyone_decodes else self._capacity.idle_prefill_chunk
        self._reuse_prefixes(chunk)
        mixes, reported = self._mixes(chunk), PROMPT_LOGPROB_TOKENS
        for sequence in self.running:
            if not sequence.is_prefilling:
                batch, count = (long if sequence.row < num_long else short), 1
            else:
                beside = long.sequences + short.sequences if mixes else []
                batch, limit = prefill, min(budget, self._room(prefill, [*beside, sequence]))
                if sequence.needs_prompt_logprobs:
                    limit = min(limit, reported)
                if self._leader(sequence):
                    limit = 0
                count = min(sequence.length - sequence.num_cached_tokens, limit)
                reported -= count if sequence.needs_prompt_logprobs else 0
                budget = budget - count if count else 0  # a forward's rows are neighbours
            if count:
                batch.sequences.append(sequence)
                batch.num_scheduled_tokens.append(count)
        batches = [long, short, prefill]
        if self._mixed_batch:
            decode = _joined(long, short)
            batches = [_joined(decode, prefill)] if mixes else [decode, prefill]
        batches = [batch for batch in batches if batch.sequences]
        for batch in batches:
            batch.cache_shape = self._cache_shape(chunk)
        return batches

    def preempt_all(self, zero: bool = False) -> None:
        """Let all who run begin again, because what is in their rows is not known; zero: nor is what is in others."""
        if zero:
            self._cache.prefixes.shrink(0)
            for row in range(self._cache.num_rows):
                self._cache.zero_row(row)
        for sequence in list(self.running):
            self._preempt(sequence)

    def _mixes(self, chunk: int) -> bool:
        """Whether padding decoding rows to the longest chunk costs no more than a pass of their own."""
        missing = [sequence.length - sequence.num_cached_tokens for sequence in self.running if sequence.is_prefilling]
        padding = (len(self.running) - len(missing)) * (min(chunk, max(missing, default=1)) - 1)
        return self._mixed_batch and not self._cost.outweighs_reading(padding)

    def _room(self, prefill: Batch, more: list[Sequence]) -> int:
        """Of how many tokens a prompt's next chunk may be in a forward that is padded to its longest row, with these
        and `more` rows in it."""
        room = self._capacity.max_width([sequence.num_cached_tokens for sequence in prefill.sequences + more])
        return room if room >= max(prefill.num_scheduled_tokens, default=1) else 0

    def release_finished(self) -> None:
        """After the forwards: let the others have what was computed for them too, and take finished sequences out."""
        self._share_prompts()
        for sequence in self.running:
            if sequence.finished:
                self._keep_prefix(sequence)
                self._clean_row(sequence)
        self.waiting = [sequence for sequence in self.waiting if not sequence.finished]
        self.running = [sequence for sequence in self.running if not sequence.finished]

    # admission

    def _next(self) -> Sequence | None:
        """Whose turn it is to get a row that is free, or has become so by preemption; None if nobody can have one."""
        held = self._rows_held(self.running)
        heads: dict[str, Sequence] = {}
        for sequence in self.waiting:
            if sequence.can_run:
                heads.setdefault(sequence.job.group, sequence)
        turns = sorted(heads.values(), key=lambda head: (held[head.job.group], head.order))[:_MAX_PASSED]
        for index, sequence in enumerate(turns):
            victims = self._victims(sequence)
            if victims is not None:
                for victim in victims:
                    self._preempt(victim)
                for passed in turns[:index]:
                    passed.times_passed += 1
                return sequence
            if sequence.times_passed >= _MAX_PASSED:
                return None
        return None

    def _victims(self, sequence: Sequence) -> list[Sequence] | None:
        """Who must be preempted, of requests that hold at least two rows more, for a sequence to fit; None if that is
        not enough."""
        staying, victims = list(self.running), []
        while not self._fits([*staying, sequence], margin=True):
            held = self._rows_held(staying)
            victim = self._youngest(staying)
            if held[victim.job.group] < held[sequence.job.group] + 2:
                return None
            staying.remove(victim)
            victims.append(victim)
        return victims

    def _fits(self, sequences: Collection[Sequence], margin: bool) -> bool:
        """Whether the cache, a rectangle, has room for sequences as long as they are, or with a margin to grow."""
        if len(sequences) == 1:
            return True  # no request is accepted that cannot run alone
        rows = len(sequences)
        if rows > self._config.max_batch_size:
            return False
        longest = max(_with_margin(sequence) if margin else sequence.length for sequence in sequences)
        return rows * longest <= self._cache.capacity_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self._clean_row(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.order)
        sequence.row, sequence.num_cached_tokens = -1, 0
        self.num_preempted += 1

    def _youngest(self, sequences: Collection[Sequence]) -> Sequence:
        """The youngest of the request with the most rows: never the oldest of all while there are others."""
        held = self._rows_held(sequences)
        return max(sequences, key=lambda sequence: (held[sequence.job.group], sequence.order))

    @staticmethod
    def _rows_held(sequences: Iterable[Sequence]) -> Counter[str]:
        """How many rows each request holds."""
        return Counter(sequence.job.group for sequence in sequences)

    # rows

    def _arrange_rows(self) -> int:
        """Give everyone who runs a row, without gaps: decoding rows first, where as few as can be move, then
        prefilling ones in their order. Those with nothing in the cache come last, by turns of their requests, so
        that nothing is moved to a row that is not there yet; and last of all those who wait for another's prompt.

        Returns how many of the first rows are to decode apart from others because they are long.
        """
        decoding = [sequence for sequence in self.running if not sequence.is_prefilling]
        decoding.sort(key=lambda sequence: -sequence.length)
        num_long = self._num_long([sequence.length for sequence in decoding])
        order = _in_place(decoding[:num_long], 0) + _in_place(decoding[num_long:], num_long)
        order += [s for s in self.running if s.is_prefilling and s.num_cached_tokens]
        held = self._rows_held(order)
        turns: list[tuple[bool, int, int, Sequence]] = []
        for sequence in sorted((s for s in self.running if not s.num_cached_tokens), key=lambda s: s.order):
            turns.append((self._leader(sequence) is not None, held[sequence.job.group], sequence.order, sequence))
            held[sequence.job.group] += 1
        self.running = order + [sequence for *_, sequence in sorted(turns)]
        moved = {row: s for row, s in enumerate(self.running) if s.row != row and s.num_cached_tokens}
        if moved:
            length = max(sequence.num_cached_tokens for sequence in moved.values())
            self._cache.copy_rows([sequence.row for sequence in moved.values()], list(moved), length)
            for sequence in moved.values():
                if sequence.row not in moved:
                    self._clean_row(sequence)
        for row, sequence in enumerate(self.running):
            sequence.row = row
        return num_long

    def _clean_row(self, sequence: Sequence) -> None:
        """Before a sequence leaves its row to others: zero what may be no number, as nothing was sampled from it yet or
        that failed."""
        if sequence.row >= 0 and (sequence.is_prefilling or sequence.finish_reason == "error"):
            self._cache.zero_row(sequence.row)

    def _num_long(self, lengths: list[int]) -> int:
        """How many of the longest decoding rows, whose lengths come first, should have a forward of their own."""
        saved = {index: (len(lengths) - index) * (lengths[0] - lengths[index]) for index in range(len(lengths))}
        best = max(saved, key=saved.__getitem__, default=0)
        return best if saved and saved[best] >= 2 * self._pass_columns else 0

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """The running sequence of the same job whose prompt this one waits for, instead of computing it again."""
        if sequence.num_cached_tokens or not sequence.shared_length or sequence.needs_prompt_logprobs:
            return None
        siblings = [other for other in self.running if other.job is sequence.job and other.shares_prompt]
        leader = max(siblings, key=lambda other: (other.num_cached_tokens, -other.order))
        return None if leader is sequence else leader

    def _share_prompts(self) -> None:
        """Copy the keys and values of prompts to the rows that wait for them, once the store has those rows."""
        for sequence in self.running:
            leader, length = self._leader(sequence), sequence.shared_length
            if leader and leader.num_cached_tokens >= length and sequence.row < self._cache.num_rows:
                try:
                    self._cache.copy_rows([leader.row], [sequence.row], length)
                    sequence.num_cached_tokens = length
                except Exception:  # no memory to copy in: it computes its prompt itself
                    logger.exception("a prompt could not be shared")
                    sequence.shares_prompt = False

    def _reuse_prefixes(self, chunk: int) -> None:
        """Look for prefixes for those whose turn it is to be prefilled: to do so for all at each step takes long."""
        budget = chunk
        for sequence in self.running:
            if budget <= 0:
                return
            self._reuse_prefix(sequence, chunk)
            if sequence.is_prefilling and not self._leader(sequence):
                missing = sequence.length - sequence.num_cached_tokens
                budget -= min(missing, PROMPT_LOGPROB_TOKENS) if sequence.needs_prompt_logprobs else missing

    def _reuse_prefix(self, sequence: Sequence, chunk: int) -> None:
        """Let a sequence with nothing in the cache have what another text, or a running one's prompt, began with."""
        owner = sequence.job.prefix_owner
        if owner is None or sequence.num_cached_tokens or sequence.needs_prompt_logprobs or self._leader(sequence):
            return
        # With two missing it still is a prefilling one, and its row in its place.
        wanted = np.array(sequence.all_token_ids[:-2])
        parts, length = self._cache.prefixes.longest(owner, wanted)
        row = None
        for other in self.running:
            if other.job.prefix_owner == owner and other.num_cached_tokens > length:
                common = num_common(other.job.prompt_array[: other.num_cached_tokens], wanted)
                if common > length:
                    row, length = other.row, common
        sequence.num_cached_tokens = length
        try:
            if length:
                shape = self._cache_shape(chunk)
                if row is None:
                    self._cache.use_prefix(parts, length, sequence.row, shape)
                else:
                    self._cache.reserve(shape)
                    self._cache.copy_rows([row], [sequence.row], length)
                self.num_reused_tokens += length
        except (RuntimeError, MemoryError) as error:  # no memory: its prompt is computed, as ever
            logger.warning("a prefix could not be reused: %s", error)
            sequence.num_cached_tokens = 0

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep what a finished sequence has in the cache, for others; of several continuations only the first's."""
        owner, length = sequence.job.prefix_owner, sequence.num_cached_tokens
        if owner is None or length < SHORTEST or sequence.index or sequence.finish_reason == "error":
            return
        try:
            self._cache.keep_prefix(sequence.row, owner, np.array(sequence.all_token_ids[:length]))
        except (RuntimeError, MemoryError) as error:
            logger.warning("a prefix could not be kept: %s", error)

    def _cache_shape(self, chunk: int) -> tuple[int, int]:
        """Rows and columns that the running sequences fill at most after a step with chunks of this size."""
        longest = max(min(sequence.num_cached_tokens + chunk, sequence.length) for sequence in self.running)
        return len(self.running), longest


def _joined(one: Batch, other: Batch) -> Batch:
    return Batch(one.sequences + other.sequences, one.num_scheduled_tokens + other.num_scheduled_tokens)


def _in_place(sequences: list[Sequence], first: int) -> list[Sequence]:
    """Sequences in the order of the rows that they get, from row `first` on: all that can stay where they are do."""
    rows = range(first, first + len(sequences))
    staying = {sequence.row: sequence for sequence in sequences if sequence.row in rows}
    moving = (sequence for sequence in sequences if sequence.row not in rows)
    return [staying.get(row) or next(moving) for row in rows]


def _with_margin(sequence: Sequence) -> int:
    """Tokens that are kept free for a sequence when somebody is admitted."""
    return min(sequence.length + max(_MARGIN, sequence.length // 8), sequence.max_length)
