"""Who runs, in which row and with how many tokens; sequences and a cache made by hand, no model."""

import itertools
import math
from types import SimpleNamespace

import pytest

from handler.engine import EngineConfig, InvalidRequest, Job, QueueFull, Request, Sequence
from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.engine.forward_cost import ForwardCost
from handler.engine.sampler import Sampler
from handler.engine.sampling_params import resolve
from handler.engine.scheduler import Scheduler

order = itertools.count()


def sequences(n, prompt, new=5, **fields):
    """The sequences of a request for `n` continuations of `prompt` tokens, with `new` more each."""
    request = Request([2] * prompt, {"max_new_tokens": new}, n=n, **fields)
    job = Job(request, resolve(request, prompt, {}, 300, 1000), request.prompt)
    job.sequences = [Sequence(job, index, Sampler(), None, frozenset(), next(order)) for index in range(n)]
    return job.sequences


def sequence(prompt, new=5, **fields):
    return sequences(1, prompt, new, **fields)[0]


def make_scheduler(capacity_tokens=10_000, mixed_batch=False, pass_columns=math.inf, **config):
    """A scheduler, and its cache of so many rows x columns, whose `copies` has what was copied."""
    config = EngineConfig(**{"max_batch_size": 4, "max_queue": 9, "prefill_chunk": 8, **config})
    architecture = Architecture(300, 2, 1000, None, 1, True)
    copies = []

    def copy_rows(sources, destinations, length):
        copies.append((list(sources), list(destinations), length))

    cache = SimpleNamespace(capacity_tokens=capacity_tokens, copy_rows=copy_rows, copies=copies, num_rows=0)
    cache.zero_row = lambda row: None
    return Scheduler(cache, config, Capacity.of(architecture, config), mixed_batch, ForwardCost(), pass_columns), cache


def plan(scheduler):
    """What the next step's batches take: (row, tokens) of each sequence."""
    return [
        [(sequence.row, count) for sequence, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)]
        for batch in scheduler.schedule()
    ]


def step(scheduler):
    """As the engine does it: the tokens get into the cache, and who is through gets one more."""
    batches = scheduler.schedule()
    scheduler._cache.num_rows = max(scheduler._cache.num_rows, len(scheduler.running))
    for batch in batches:
        assert math.prod(batch.cache_shape) <= scheduler._cache.capacity_tokens
        completed = [batch.completes(index) for index in range(len(batch.sequences))]
        for sequence, count, complete in zip(batch.sequences, batch.num_scheduled_tokens, completed, strict=True):
            sequence.num_cached_tokens += count
            sequence.token_ids += [7] * complete
    scheduler.release_finished()


def test_first_come_first_served_up_to_the_batch_size():
    scheduler, _ = make_scheduler(max_batch_size=2)
    first, second, third = (sequence(3) for _ in range(3))
    scheduler.add([first, second, third])
    assert plan(scheduler) == [[(0, 3), (1, 3)]]
    assert list(scheduler.waiting) == [third] and third.row == -1
    first.finish_reason = "stop"
    scheduler.release_finished()
    assert plan(scheduler) == [[(0, 3), (1, 3)]] and scheduler.running == [second, third]


def test_rows_are_admitted_by_what_they_hold_and_a_margin():
    lengths = [(10, 900), (3, 2), (10, 10), (1, 1)]  # prompt, new
    for capacity_tokens, rows in [(168, 4), (167, 3), (126, 3), (125, 2), (84, 2), (83, 1)]:  # 10 + 32 columns
        scheduler, _ = make_scheduler(capacity_tokens)
        several = [sequence(*length) for length in lengths]
        scheduler.add(several)
        scheduler.schedule()
        assert scheduler.running == several[:rows]
    scheduler, _ = make_scheduler(8 + 8)
    scheduler.add([sequence(3, 5), sequence(2, 6)])  # never more than they declare
    scheduler.schedule()
    assert len(scheduler.running) == 2


def test_a_full_cache_preempts_the_youngest_which_goes_on_before_all_who_came_later():
    scheduler, _ = make_scheduler(capacity_tokens=2 * 50)
    old, young, late = sequence(10, 60), sequence(10, 60), sequence(12, 60)
    scheduler.add([old, young, late])
    while young in scheduler.running or not young.token_ids:
        step(scheduler)
    assert (young.row, young.num_cached_tokens, len(young.token_ids)) == (-1, 0, 41)
    assert (scheduler.running, scheduler.waiting, scheduler.num_preempted) == ([old], [young, late], 1)
    for _ in range(10):
        step(scheduler)
    assert len(old.token_ids) == 52 and scheduler.num_preempted == 1
    old.finish_reason = "length"
    scheduler.release_finished()
    assert plan(scheduler) == [[(0, 32)]] and scheduler.running == [young]


def test_nobody_is_preempted_again_and_again():
    """Twelve rows that all end up longer than a third of the cache: each is recomputed a few times at most."""
    scheduler, _ = make_scheduler(capacity_tokens=300, max_batch_size=12, max_queue=99)
    several = [sequence(10, 90) for _ in range(12)]
    scheduler.add(several)
    steps = 0
    while scheduler.running or scheduler.waiting:
        oldest = min((s for s in several if not s.finished), key=lambda s: s.order)
        before = len(oldest.token_ids) + oldest.num_cached_tokens
        step(scheduler)
        assert len(oldest.token_ids) + oldest.num_cached_tokens > before  # somebody always gets on
        for row in several:
            if row.length == row.max_length:
                row.finish_reason = "length"
        scheduler.release_finished()
        steps += 1
    assert steps < 12 * 90 / 2 and scheduler.num_preempted < 2 * 12


def test_who_is_alone_runs_whatever_the_cache_says():
    scheduler, _ = make_scheduler(capacity_tokens=1)
    scheduler.add([sequence(10)])
    assert plan(scheduler) == [[(0, 10)]]


def test_a_chunk_is_shared_in_order_and_is_larger_while_nobody_decodes():
    scheduler, _ = make_scheduler(prefill_chunk=4)
    scheduler.add([sequence(8), sequence(20), sequence(3)])
    assert plan(scheduler) == [[(0, 8), (1, 8)]]  # four times 4
    step(scheduler)
    assert plan(scheduler) == [[(0, 1)], [(1, 4)]]
    step(scheduler)
    scheduler.add([sequence(1)])
    assert plan(scheduler) == [[(0, 1)], [(1, 4)]]


def test_a_forward_is_padded_to_no_more_than_there_is_memory_for():
    """One long prompt beside many short ones: all rows of a forward are as wide as the widest."""
    for mixed_batch in (False, True):
        scheduler, _ = make_scheduler(prefill_chunk=4, max_batch_size=8, mixed_batch=mixed_batch)
        scheduler.add([sequence(1), sequence(1), sequence(60), *(sequence(1) for _ in range(5))])
        assert [batch.num_scheduled_tokens for batch in scheduler.schedule()] == [[1, 1, 5]]
        while any(row.is_prefilling for row in scheduler.running):
            for batch in scheduler.schedule():
                assert len(batch.sequences) * max(batch.num_scheduled_tokens) <= 16
            step(scheduler)


def test_attention_makes_no_more_scores_than_there_is_memory_for():
    """New tokens come behind all that the longest row holds, more columns than any row will have: of 32 x 64 scores,
    two rows behind 55 tokens have room for 14 each instead of 16, and four behind 60 for 7 instead of 8."""
    scheduler, _ = make_scheduler(prefill_chunk=8, max_sequence_length=64)
    scheduler.add([sequence(63), sequence(40)])
    step(scheduler)
    scheduler.running[0].num_cached_tokens = 55
    assert plan(scheduler) == [[(0, 8), (1, 14)]]
    scheduler, _ = make_scheduler(prefill_chunk=8, max_sequence_length=64, mixed_batch=True)
    scheduler.add([sequence(2), sequence(2), sequence(61), sequence(9)])
    scheduler.schedule()
    for row, cached in enumerate((1, 1, 60)):
        scheduler.running[row].num_cached_tokens = cached
    assert plan(scheduler) == [[(0, 1), (1, 1), (2, 1), (3, 7)]]


def test_decoding_and_prefilling_share_a_forward_where_weights_are_streamed():
    scheduler, _ = make_scheduler(prefill_chunk=4, mixed_batch=True)
    scheduler.add([sequence(3), sequence(9), sequence(9)])
    step(scheduler)
    assert plan(scheduler) == [[(0, 1), (1, 1), (2, 4)]]


def test_short_rows_decode_apart_from_long_ones_where_that_saves_two_passes():
    for pass_columns, batches in [
        (93, [[(0, 1)], [(1, 1), (2, 1), (3, 1)]]),
        (94, [[(0, 1), (1, 1), (2, 1), (3, 1)]]),
    ]:
        scheduler, cache = make_scheduler(prefill_chunk=128, pass_columns=pass_columns)
        several = [sequence(4), sequence(4), sequence(67), sequence(5)]
        scheduler.add(several)
        step(scheduler)  # all are one token longer
        assert plan(scheduler) == batches  # three rows with 68 - 6 columns less
        assert {batch.cache_shape for batch in scheduler.schedule()} == {(4, 68)}
        is_long_first = scheduler.running[0] is several[2]
        assert is_long_first == (len(batches) == 2) == bool(cache.copies)


def test_long_rows_stay_with_the_others_where_a_pass_streams_weights():
    scheduler, _ = make_scheduler(prefill_chunk=128, mixed_batch=True, pass_columns=1)
    scheduler.add([sequence(4), sequence(4), sequence(67), sequence(5)])
    step(scheduler)
    assert plan(scheduler) == [[(0, 1), (1, 1), (2, 1), (3, 1)]]


def test_the_cache_gets_the_shape_that_all_running_rows_fill():
    scheduler, _ = make_scheduler(prefill_chunk=4)
    scheduler.add([sequence(3), sequence(40)])
    assert [batch.cache_shape for batch in scheduler.schedule()] == [(2, 16)]
    step(scheduler)
    assert [row.num_cached_tokens for row in scheduler.running] == [3, 8]
    assert [batch.cache_shape for batch in scheduler.schedule()] == [(2, 12), (2, 12)]


def test_gaps_are_closed_and_prefilling_rows_stay_in_order_behind_decoding_ones():
    scheduler, cache = make_scheduler(prefill_chunk=8)
    short = [sequence(2) for _ in range(3)]
    long = sequence(60)
    scheduler.add([*short, long])
    step(scheduler)
    short[0].finish_reason = "stop"
    scheduler.release_finished()
    assert plan(scheduler) == [[(0, 1), (1, 1)], [(2, 8)]]
    assert scheduler.running == [short[2], short[1], long]
    assert cache.copies == [([2, 3], [0, 2], 8)]  # from rows, to rows, tokens


def test_continuations_of_one_prompt_prefill_it_once():
    scheduler, cache = make_scheduler(prefill_chunk=4)
    three, other = sequences(3, 20), sequence(3)
    scheduler.add([*three, other])
    assert plan(scheduler) == [[(0, 16)]]
    step(scheduler)
    assert plan(scheduler) == [[(0, 4), (1, 3)]]  # two wait in the rows after it
    step(scheduler)
    assert cache.copies == [([0], [2], 19), ([0], [3], 19)]
    assert plan(scheduler) == [[(0, 1), (1, 1), (2, 1), (3, 1)]]  # two of them their prompt's last token
    step(scheduler)
    assert [len(row.token_ids) for row in three] == [2, 1, 1]


def test_a_prompt_is_shared_even_when_its_first_continuation_is_one_token_long():
    scheduler, cache = make_scheduler()
    first, second = sequences(2, 9, new=1)
    scheduler.add([first, second])
    for batch in scheduler.schedule():
        assert batch.sequences == [first]
    cache.num_rows = 2
    first.num_cached_tokens, first.token_ids, first.finish_reason = 9, [7], "length"
    scheduler.release_finished()
    assert scheduler.running == [second] and second.num_cached_tokens == 8


def test_a_row_that_the_store_does_not_have_yet_gets_its_prompt_one_step_later():
    scheduler, cache = make_scheduler(max_batch_size=2)
    blocker, (first, second) = sequence(2, new=9), sequences(2, 9)
    scheduler.add([blocker, first, second])
    step(scheduler)
    blocker.finish_reason = "stop"
    scheduler.release_finished()
    cache.num_rows = 1  # as after a forward that had no memory for more
    assert plan(scheduler) == [[(0, 1)]] and scheduler.running == [first, second]
    scheduler.release_finished()
    assert second.num_cached_tokens == 0
    step(scheduler)
    assert second.num_cached_tokens == 8


def test_a_waiting_sequence_that_ended_never_runs():
    scheduler, _ = make_scheduler(max_batch_size=1)
    running, gone = sequence(3), sequence(3)
    scheduler.add([running, gone])
    scheduler.schedule()
    gone.finish_reason = "cancel"
    scheduler.release_finished()
    assert not scheduler.waiting and scheduler.running == [running]


def test_the_queue_has_room_for_all_or_says_so():
    scheduler, _ = make_scheduler(max_queue=3)
    scheduler.add([sequence(1), sequence(1)])
    scheduler.check_queue_room(1)
    with pytest.raises(QueueFull, match="2 sequences wait"):
        scheduler.check_queue_room(2)
    with pytest.raises(InvalidRequest, match="at most 3"):
        scheduler.check_queue_room(4)


def test_logits_are_kept_where_a_token_is_sampled_or_the_prompt_is_reported():
    scheduler, _ = make_scheduler(prefill_chunk=8)
    reported = {"logprobs": 0, "prompt_logprobs": True}
    scheduler.add([sequence(2), sequence(5, **reported), sequence(9), sequence(9, **reported)])
    (batch,) = scheduler.schedule()
    assert batch.num_scheduled_tokens == [2, 5, 9]
    assert batch.logits_to_keep == [1, 5, 1]
    scheduler, _ = make_scheduler(prefill_chunk=1)
    scheduler.add([sequence(9), sequence(9, **reported)])
    (batch,) = scheduler.schedule()
    assert (batch.num_scheduled_tokens, batch.logits_to_keep, batch.completes(0)) == ([4], [0], False)


def test_reported_prompts_go_in_small_chunks_and_their_rows_stay_neighbours():
    """Their logits are kept, and a vocabulary is large."""
    scheduler, _ = make_scheduler(prefill_chunk=256)
    reported = {"logprobs": 0, "prompt_logprobs": True}
    scheduler.add([sequence(100, **reported), sequence(90, **reported), sequence(9, **reported), sequence(9)])
    (batch,) = scheduler.schedule()
    assert (batch.num_scheduled_tokens, sum(batch.logits_to_keep)) == ([100, 28], 128)


def test_a_sequence_that_lost_its_row_is_prefilled_with_all_of_its_tokens():
    scheduler, _ = make_scheduler(prefill_chunk=4)
    lost, other = sequence(3, 9), sequence(3, 9)
    scheduler.add([lost, other])
    for _ in range(4):
        step(scheduler)
    assert (lost.length, lost.num_cached_tokens, lost.is_prefilling) == (7, 6, False)
    lost.num_cached_tokens = 0
    assert lost.is_prefilling and lost.next_token_ids(99) == [2, 2, 2, 7, 7, 7, 7]
    assert plan(scheduler) == [[(0, 1)], [(1, 4)]]
    assert scheduler.running == [other, lost]  # behind those who decode
    step(scheduler)
    assert lost.next_token_ids(3) == [7, 7, 7] and len(lost.token_ids) == 4
    step(scheduler)
    assert (len(lost.token_ids), lost.is_prefilling) == (5, False)
