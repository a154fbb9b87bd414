"""The instructions that functions are written of."""

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import gelu

from handler.kernels.cpu import has_code_for, lanes, use_machine_code
from handler.kernels.function import Function, in_turn, parts, share
from handler.kernels.machine_code import Code, Value, Variable


def applied(function, inputs):
    """What a function that writes instructions for a vector makes of inputs, float32 [whole vectors]."""

    def write(code: Code, thread: Value, threads: Value, source: Value, target: Value, count: Value) -> None:
        source, target = (code.place(at, torch.float32) for at in (source, target))
        with code.loop(0, count, lanes()) as at:
            target[at].store(function(code, source[at].bits()))

    outputs = torch.empty_like(inputs)
    Function(write, 3)(inputs.data_ptr(), outputs.data_ptr(), len(inputs))
    return outputs


def test_exp():
    inputs = torch.cat([torch.linspace(-87, 88, 4096), torch.linspace(-1, 1, 1024)])
    torch.testing.assert_close(applied(Code.exp, inputs).double(), inputs.double().exp(), rtol=5e-6, atol=0)
    near = inputs[4096:]
    torch.testing.assert_close(applied(Code.exp, near).double(), near.double().exp(), rtol=3e-7, atol=0)


def test_the_most_of_all_lanes_is_in_every_lane_and_nan_stays_in_its_own():
    vectors = (-torch.rand(lanes(), lanes())).fill_diagonal_(1.0)  # in each of which another lane has the most
    assert applied(Code.most_of, vectors.flatten()).tolist() == [1.0] * lanes() ** 2
    vectors.fill_diagonal_(math.nan)
    is_nan = applied(Code.most_of, vectors.flatten()).isnan().view(lanes(), lanes())
    assert torch.equal(is_nan, torch.eye(lanes(), dtype=torch.bool))


def test_what_is_beyond_float32_is_nothing_or_its_end_and_nan_stays():
    inputs = torch.tensor([-math.inf, -200.0, 200.0, math.inf, math.nan, -math.nan] + [0.0] * 10)
    first, second, third, fourth, *others = applied(Code.exp, inputs)[:6].tolist()
    assert first == second == 0
    assert third == fourth == pytest.approx(math.exp(88), rel=1e-5) and all(map(math.isnan, others))


def test_another_number_of_arguments_is_an_error():
    function = Function(lambda code, thread, threads, one, other: None, 2)
    for call in (function, function.alone):
        call(1, 2)
        with pytest.raises(TypeError, match="2 arguments, not 1"):
            call(1)


def test_alone_there_is_one_thread(threads):
    def write(code: Code, thread: Value, threads: Value, target: Value) -> None:
        code.place(target, torch.float32)[(thread * 2 + threads) * lanes()].store(code.number(1.0))

    outputs = torch.zeros(8, lanes())
    Function(write, 1).alone(outputs.data_ptr())
    assert outputs[:, 0].tolist() == [0.0, 1.0, *[0.0] * 6]


def test_it_can_be_turned_off():
    try:
        use_machine_code(False)
        assert not has_code_for(torch.float32)
    finally:
        use_machine_code(True)
    assert has_code_for(torch.float32)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu(approximate):
    inputs = torch.cat([torch.linspace(-12, 12, 8192), torch.tensor([-1e4, 1e4, 0.0, -0.0] * 4)])
    exact = gelu(inputs.double(), approximate=approximate)
    outputs = applied(lambda code, value: code.gelu(value, approximate), inputs)
    torch.testing.assert_close(outputs.double(), exact, rtol=2e-6, atol=1e-6)
    assert math.isnan(applied(lambda code, value: code.gelu(value, approximate), torch.full((16,), math.nan))[0])


def test_each_thread_takes_part_and_knows_its_number(threads):
    def write(code: Code, thread: Value, threads: Value, target: Value) -> None:
        place = code.place(target, torch.float32)
        place[thread * lanes()].store(code.number(1.0))
        place[(threads + 3) * lanes()].store(code.number(2.0))

    outputs = torch.zeros(8, lanes())
    Function(write, 1)(outputs.data_ptr())
    assert outputs[:, 0].tolist() == [*[1.0] * threads, *[0.0] * 3, 2.0, *[0.0] * (4 - threads)]


def test_lanes_beyond_the_first_ones_are_neither_read_nor_written():
    def write(code: Code, thread: Value, threads: Value, source: Value, target: Value, count: Value) -> None:
        within, sum = code.first_lanes(count), Variable(code, code.number(0.0))
        sum.set(code.place(source, torch.float32).floats(within) + 1.0)
        code.place(target, torch.float32).store(sum.get(), within)

    function, inputs = Function(write, 3), torch.full((lanes(),), 6.0)
    for count in range(lanes() + 2):
        outputs = torch.zeros(lanes())
        function(inputs.data_ptr() if count else 0, outputs.data_ptr() if count else 0, count)
        assert outputs.tolist() == [7.0 if i < count else 0.0 for i in range(lanes())]


def test_functions_in_turn_wait_for_each_other(threads):
    """Each number is the sum of two that other threads wrote just before."""
    size = 64

    def write(code: Code, thread: Value, threads: Value, source: Value, target: Value) -> None:
        before, after = (code.place(at, torch.float32) for at in (source, target))
        begin, end = share(code.integer(size), thread, threads)
        with code.loop(begin, end) as at:
            first, last = before[at * lanes()], before[(code.integer(size - 1) - at) * lanes()]
            after[at * lanes()].store(first.bits() + last.bits() * 0.5)

    function, numbers = Function(write, 2), [torch.rand(size, lanes()) for _ in range(2)]
    expected = [one.clone() for one in numbers]
    run = in_turn([(function, (numbers[at % 2], numbers[(at + 1) % 2])) for at in range(200)])
    for _ in range(3):
        run()
        for at in range(200):
            one, other = expected[at % 2], expected[(at + 1) % 2]
            other.copy_(one + one.flip(0) * 0.5)
        assert torch.equal(numbers[0], expected[0])
        for one, other in zip(numbers, expected, strict=True):
            other.copy_(one.copy_(torch.rand(size, lanes())))


def test_functions_in_turn_keep_what_they_need():
    def write(code: Code, thread: Value, threads: Value, source: Value, target: Value) -> None:
        code.place(target, torch.float32).store(code.place(source, torch.float32).bits() + 1.0)

    source, target = torch.ones(lanes()), torch.zeros(lanes())
    gone = weakref.ref(source)
    run = in_turn([(Function(write, 2), (source, target))])
    del source
    gc.collect()
    run()
    assert gone() is not None and target.eq(2).all()
    with pytest.raises(TypeError, match="2 arguments, not 1"):
        in_turn([(Function(write, 2), (target,))])


@pytest.fixture(scope="module")
def counting():
    """A function of integers, whose addresses it gets, and of how many there are: each is increased, in parts."""

    def write(code: Code, thread: Value, threads: Value, numbers: Value, count: Value) -> None:
        place = code.place(numbers, torch.int64)
        with parts(code, count, threads) as part, code.loop(*part) as index:
            place[index].store_integer(place[index].integer() + 1)

    return Function(write, 2)


@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 1000])
def test_parts_are_everything_once_and_begin_anew_with_each_call(counting, threads, count):
    numbers = torch.zeros(count + 1, dtype=torch.int64)
    call = in_turn([(counting, (numbers, count))] * 3)
    for more in (0, 2, 1, 0):
        torch.set_num_threads(threads + more)
        counting(numbers, count)
        call()
    assert numbers[:count].eq(4 + 3 * 4).all() and numbers[count] == 0


def test_parts_twice_in_a_function_are_refused():
    def write(code: Code, thread: Value, threads: Value, count: Value) -> None:
        for _ in range(2):
            with parts(code, count, threads):
                pass

    with pytest.raises(AttributeError, match="counters"):
        Function(write, 1)


def test_parts_of_calls_at_the_same_time_are_each_ones_own(counting):
    numbers = [torch.zeros(300, dtype=torch.int64) for _ in range(4)]

    def count(own):
        for _ in range(200):
            counting(own, 300)

    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(count, numbers))
    assert all(own.eq(200).all() for own in numbers)
