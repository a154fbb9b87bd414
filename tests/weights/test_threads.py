import time

import pytest
import torch

from handler.weights import threads
from handler.weights.threads import FreeCores


@pytest.fixture
def machine(monkeypatch):
    """machine(others, own): a second passes in which others and this process keep so many of four cores busy, maybe
    others all of them while this one rests; the threads then."""
    seconds = {"clock": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr(threads, "_cores", lambda: {0, 1, 2, 3})
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    cores = FreeCores(lambda: (seconds["busy"], seconds["own"]), lambda: seconds["clock"])

    cores.match()

    def after(others: float, own: float, passed: float = 1.0, rested: float = 0.0, others_resting: float = 4.0) -> int:
        seconds["clock"] += passed
        seconds["busy"] += passed * (others + own)
        seconds["own"] += passed * own
        if rested:
            cores.rest()
            seconds["clock"] += rested
            seconds["busy"] += rested * others_resting
        cores.match()
        return torch.get_num_threads()

    yield after
    torch.set_num_threads(before)


def test_threads_leave_cores_that_others_use_and_come_back(machine):
    assert machine(0, 4) == 4
    assert machine(0.3, 3.7) == 4  # Java and clients
    assert machine(0.7, 3.3) == 3  # a busy process that had to share
    assert machine(1, 3) == 3
    assert machine(3, 1) == 1
    assert machine(4, 0) == 1
    assert machine(0, 1) == 4


def test_short_steps_measure_nothing(machine):
    assert [machine(4, 0, 0.2) for _ in range(3)] == [4, 4, 4]


def test_what_others_do_while_nothing_is_computed_takes_no_thread_away(machine):
    assert machine(0, 4, rested=9) == 4  # clients get ready
    assert machine(0, 4) == 4
    assert machine(1, 3) == 3
    assert machine(4, 0, 0.1, rested=9) == 3
    assert machine(0, 3) == 4


def test_nor_what_they_did_before_anything_was_computed(monkeypatch):
    seconds = {"clock": 0.0, "busy": 0.0}
    monkeypatch.setattr(threads, "_cores", lambda: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    cores = FreeCores(lambda: (seconds["busy"], 0.0), lambda: seconds["clock"])
    for expected in ([], [1]):  # first before, then while something is computed
        seconds["clock"] += 5
        seconds["busy"] += 10
        cores.match()
        assert taken == expected


def test_what_others_leave_is_taken_back_however_short_the_requests_are(machine):
    assert machine(4, 0) == 1
    assert machine(0, 1, 0.5) == 1
    assert machine(0, 1, 0.2, rested=2, others_resting=0) == 4


def test_a_short_rest_is_counted(machine):
    assert machine(0, 4, 0.5, rested=0.9) == 1


def test_no_more_threads_than_at_the_beginning(machine):
    torch.set_num_threads(2)
    cores = FreeCores(lambda: (0.0, 0.0), iter([0.0, 0.0, 0.0, 2.0]).__next__)
    cores.match()
    cores.match()
    assert torch.get_num_threads() == 2


def test_own_time_is_not_that_of_others():
    busy, own = threads._used()
    if not busy:
        pytest.skip("the kernel does not tell how busy its cores are")
    while time.process_time() < own + 0.3:  # however long that takes beside others
        pass
    busy_after, own_after = threads._used()
    assert own_after - own >= 0.3
    assert busy_after - busy > own_after - own - 0.1  # ticks of 10 ms
