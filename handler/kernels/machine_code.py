"""The instructions that functions for this very CPU are written of, in Python, because a pod has no compiler.

Nothing here knows how long what lies at an address is: who calls a function has looked at shapes, dtypes and devices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from llvmlite import ir

from .cpu import BARRIER, lanes, multiplies_pairs

LINE = 64  # bytes of the CPU's caches
_I8, _I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, POINTER = ir.FloatType(), ir.PointerType()
_LOG2_E = math.log2(math.e)
_WHOLE = 1.5 * 2**23  # a float32 with it added has the nearest whole number in its lowest bits
_WHOLE_BITS = 0x4B400000  # its own
# 2^f for |f| <= 1/2 as a polynomial in f, the greatest power first: its Taylor series, off by 1.2e-7 at most.
_EXP2 = tuple(math.log(2) ** power / math.factorial(power) for power in range(6, -1, -1))
# erf(x) = 1 - (a1 t + ... + a5 t^5) e^-x^2 with t = 1 / (1 + p x), off by 1.5e-7 at most; Abramowitz and Stegun 7.1.26.
_ERF_P, _ERF_A = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)
# SLEEF's expf (https://sleef.org, u10), which is PyTorch's: ln 2 in two parts, the first of which times a small integer
# is exact, and (e^x - 1 - x) / x^2 as a polynomial.
_LN2 = (0.693145751953125, 1.428606765330187045e-06)
_EXP = (1.98527617612854e-4, 1.39304355252535e-3, 8.3333607763052e-3, 0.0416664853692055, 0.16666667163372, 0.5)


class _BFloat(ir.Type):
    """What llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"


_BF16 = _BFloat()
_MEMORY = {torch.float32: _F32, torch.bfloat16: _I16, torch.float16: _I16, torch.bool: _I8, torch.int64: I64}


class Value:
    """What an instruction gives: an integer of 64 bits, or a vector with a float32 in each lane. Operators write more
    instructions; Python's numbers may stand on their right. Comparisons of vectors are for `Code.where`."""

    def __init__(self, code: "Code", of: ir.Value):
        self.code, self.of = code, of

    def __add__(self, other: "Value | float") -> "Value":
        return self._written("add", other)

    def __sub__(self, other: "Value | float") -> "Value":
        return self._written("sub", other)

    def __mul__(self, other: "Value | float") -> "Value":
        return self._written("mul", other)

    def __truediv__(self, other: "Value | float") -> "Value":
        return self._written("div", other)

    def __floordiv__(self, other: "Value | int") -> "Value":
        return Value(self.code, self.code.ir.udiv(self.of, self._like(other)))

    def __mod__(self, other: "Value | int") -> "Value":
        return Value(self.code, self.code.ir.urem(self.of, self._like(other)))

    def __lt__(self, other: "Value | float") -> "Value":
        return self._compared("<", other)

    def __gt__(self, other: "Value | float") -> "Value":
        return self._compared(">", other)

    def _written(self, name: str, other: "Value | float") -> "Value":
        write = getattr(self.code.ir, f"f{name}" if self._is_float else name)
        return Value(self.code, write(self.of, self._like(other)))

    def _compared(self, sign: str, other: "Value | float") -> "Value":
        compare = self.code.ir.fcmp_ordered if self._is_float else self.code.ir.icmp_signed
        return Value(self.code, compare(sign, self.of, self._like(other)))

    @property
    def _is_float(self) -> bool:
        return self.of.type == self.code.floats

    def _like(self, other: "Value | float") -> ir.Value:
        if isinstance(other, Value):
            return other.of
        return (self.code.number(other) if self._is_float else self.code.integer(int(other))).of


class Variable:
    """A value that changes; LLVM makes it a register."""

    def __init__(self, code: "Code", value: Value):
        self._code = code
        with code.ir.goto_entry_block():
            self._place = code.ir.alloca(value.of.type)
        self.set(value)

    def get(self) -> Value:
        return Value(self._code, self._code.ir.load(self._place))

    def set(self, value: Value) -> None:
        self._code.ir.store(value.of, self._place)


class Place:
    """An address of numbers of a dtype. `place[index]` is the address of the index-th."""

    def __init__(self, code: "Code", of: ir.Value, dtype: torch.dtype):
        self._code, self.of, self.dtype = code, of, dtype

    def __getitem__(self, index: Value | int) -> "Place":
        index = index.of if isinstance(index, Value) else I64(index)
        return Place(self._code, self._code.ir.gep(self.of, [index], source_etype=_MEMORY[self.dtype]), self.dtype)

    def as_dtype(self, dtype: torch.dtype) -> "Place":
        return Place(self._code, self.of, dtype)

    def bits(self) -> Value:
        """A vector as it lies there, of float32 or of pairs of bfloat16."""
        return Value(self._code, self._code.ir.load(self.of, typ=self._code.floats, align=self.dtype.itemsize))

    def numbers(self) -> Value:
        """A vector of the numbers that lie there, as float32."""
        code = self._code
        if self.dtype == torch.float32:
            return self.bits()
        return code.widened(code.ir.load(self.of, typ=ir.VectorType(_I16, lanes()), align=2), self.dtype)

    def vector(self, computed: torch.dtype) -> Value:
        """What is multiplied in a dtype: as it lies there if that is its own, or widened."""
        return self.bits() if computed == self.dtype else self.numbers()

    def spread_bits(self) -> Value:
        """The first float32, or pair of bfloat16, in every lane."""
        return self._code.same(self._code.ir.load(self.of, typ=_F32, align=self.dtype.itemsize))

    def floats(self, within: Value) -> Value:
        """A vector of the numbers that lie there, in the lanes that are true; 0 in others, whose memory is not read."""
        code = self._code
        if self.dtype == torch.float32:
            return self._masked("f32", within, code.number(0.0).of)
        halves = self._masked("i16", within, ir.Constant(ir.VectorType(_I16, lanes()), None))
        return code.widened(halves.of, self.dtype)

    def integer(self) -> Value:
        return Value(self._code, self._code.ir.load(self.of, typ=I64, align=8))

    def store_integer(self, value: Value) -> None:
        self._code.ir.store(value.of, self.of, align=8)

    def add_integer(self, value: Value) -> Value:
        """What was there before; no other thread comes between."""
        return Value(self._code, self._code.ir.atomic_rmw("add", self.of, value.of, "acq_rel"))

    def booleans(self, within: Value) -> Value:
        none = ir.Constant(ir.VectorType(_I8, lanes()), None)
        return Value(self._code, self._code.ir.icmp_unsigned("!=", self._masked("i8", within, none).of, none))

    def _masked(self, kind: str, within: Value, otherwise: ir.Value) -> Value:
        name = f"llvm.masked.load.v{lanes()}{kind}.p0"
        return self._code.intrinsic(name, otherwise.type, self.of, I32(self.dtype.itemsize), within.of, otherwise)

    def store(self, values: Value, within: Value | None = None) -> None:
        """A vector, in this place's dtype; within: of those lanes alone."""
        code, of, kind = self._code, values.of, "f32"
        if self.dtype != torch.float32:
            of, kind = code.narrowed(values, self.dtype), "i16"
        if within is None:
            code.ir.store(of, self.of, align=self.dtype.itemsize)
        else:
            name, align = f"llvm.masked.store.v{lanes()}{kind}.p0", I32(self.dtype.itemsize)
            code.intrinsic(name, ir.VoidType(), of, self.of, align, within.of)

    def fetch(self, size: int, level: int = 2) -> None:
        """Have so many bytes from here on brought into a cache, the first or the second, while other things go on."""
        for at in range(0, size, LINE):
            line = self._code.ir.gep(self.of, [I64(at)], source_etype=_I8)
            # Read, the nearer the greater, data.
            self._code.intrinsic("llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(4 - level), I32(1))


class Code:
    """A function's instructions."""

    counters: tuple[Place, Place]  # of a call, 0 when it begins and when it ends

    def __init__(self, function: ir.Function):
        self.ir = ir.IRBuilder(function.append_basic_block())

    @property
    def floats(self) -> ir.VectorType:
        return ir.VectorType(_F32, lanes())

    def integer(self, value: int) -> Value:
        return Value(self, I64(value))

    def number(self, value: float) -> Value:
        """In every lane."""
        return Value(self, ir.Constant(self.floats, [value] * lanes()))

    def place(self, address: Value, dtype: torch.dtype) -> Place:
        return Place(self, self.ir.inttoptr(address.of, POINTER), dtype)

    def room(self, floats: int) -> Place:
        """For so many float32, on the thread's stack."""
        with self.ir.goto_entry_block():
            place = self.ir.alloca(self.floats, I64(-(-floats // lanes())))
        place.type = POINTER  # llvmlite's own says of what
        return Place(self, place, torch.float32)

    def integers(self, count: int) -> Place:
        """Room for so many."""
        return self.room(2 * count).as_dtype(torch.int64)

    @contextmanager
    def loop(
        self, start: Value | int, stop: Value | int, step: Value | int | Callable[[], Value] = 1
    ) -> Iterator[Value]:
        """What is written inside runs for each number from `start` to below `stop`, which is what it gets. step: what
        is between them, or what gives the next."""
        start, stop = (self.integer(end) if isinstance(end, int) else end for end in (start, stop))
        counter = Variable(self, start)
        test, body, end = (self.ir.append_basic_block() for _ in range(3))
        self.ir.branch(test)
        self.ir.position_at_end(test)
        index = counter.get()
        self.ir.cbranch((index < stop).of, body, end)
        self.ir.position_at_end(body)
        yield index
        counter.set(step() if callable(step) else index + step)
        self.ir.branch(test)
        self.ir.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.ir.if_then(condition.of):
            yield

    def call_one(self, functions: Sequence[ir.Function], number: Value, arguments: Sequence[Value | Place]) -> None:
        """Call the first function if the number is 1, the second if it is 2, and so on."""
        done = self.ir.append_basic_block()
        switch = self.ir.switch(number.of, done)
        for count, function in enumerate(functions, start=1):
            switch.add_case(I64(count), case := self.ir.append_basic_block())
            self.ir.position_at_end(case)
            self.ir.call(function, [argument.of for argument in arguments])
            self.ir.branch(done)
        self.ir.position_at_end(done)

    def call_at(self, address: Value, argument: Value) -> None:
        """Call the function that lies at an address, with another address."""
        function = self.ir.inttoptr(address.of, ir.FunctionType(ir.VoidType(), [POINTER]).as_pointer())
        self.ir.call(function, [self.ir.inttoptr(argument.of, POINTER)])

    def wait_for_all(self) -> None:
        """Until each thread of the parallel region is here."""
        self.intrinsic(BARRIER, ir.VoidType())

    def function(self, name: str, arguments: Sequence[torch.dtype | None], write: Callable[..., None]) -> ir.Function:
        """Another function, which this one calls. arguments: the dtype of what lies at a place, or None for an integer;
        `write` gets its code and these."""
        kinds = [I64 if dtype is None else POINTER for dtype in arguments]
        function = ir.Function(self.ir.module, ir.FunctionType(ir.VoidType(), kinds), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        code = Code(function)
        given = zip(function.args, arguments, strict=True)
        write(code, *(Value(code, of) if dtype is None else Place(code, of, dtype) for of, dtype in given))
        code.ir.ret_void()
        return function

    def where(self, condition: Value, one: Value, other: Value) -> Value:
        return Value(self, self.ir.select(condition.of, one.of, other.of))

    def least(self, one: Value, other: Value) -> Value:
        """Of vectors, in each lane; NaN if the first is."""
        return self.where(one > other, other, one)

    def most(self, one: Value, other: Value) -> Value:
        return self.where(one < other, other, one)

    def first_lanes(self, count: Value) -> Value:
        """Booleans, true in the first `count` lanes, or in all."""
        numbers = ir.Constant(ir.VectorType(I32, lanes()), list(range(lanes())))
        count = self.same(self.ir.trunc(self.least(count, self.integer(lanes())).of, I32))
        return Value(self, self.ir.icmp_signed("<", numbers, count.of))

    def float_of_bits(self, bits: Value) -> Value:
        """The float32 with the integer's lower bits, in every lane."""
        return self.same(self.ir.bitcast(self.ir.trunc(bits.of, I32), _F32))

    def float_of(self, integer: Value) -> Value:
        """In every lane."""
        return self.same(self.ir.sitofp(integer.of, _F32))

    def rounded(self, values: Value, dtype: torch.dtype) -> Value:
        """To a dtype and back."""
        return values if dtype == torch.float32 else self.widened(self.narrowed(values, dtype), dtype)

    def widened(self, halves: ir.Value, dtype: torch.dtype) -> Value:
        """The bits of so many numbers of 16 bits as float32."""
        if dtype == torch.float16:
            return Value(
                self, self.ir.fpext(self.ir.bitcast(halves, ir.VectorType(ir.HalfType(), lanes())), self.floats)
            )
        integers = ir.VectorType(I32, lanes())
        shifted = self.ir.shl(self.ir.zext(halves, integers), ir.Constant(integers, [16] * lanes()))
        return Value(self, self.ir.bitcast(shifted, self.floats))

    def narrowed(self, values: Value, dtype: torch.dtype) -> ir.Value:
        """The bits of float32 as numbers of 16 bits, rounded to the nearest one, or to the even one of two."""
        halves = ir.VectorType(_I16, lanes())
        if dtype == torch.float16 or multiplies_pairs(dtype):
            kind = ir.HalfType() if dtype == torch.float16 else _BF16
            return self.ir.bitcast(self.ir.fptrunc(values.of, ir.VectorType(kind, lanes())), halves)
        integers = ir.VectorType(I32, lanes())

        def number(bits: int) -> ir.Constant:
            return ir.Constant(integers, [bits] * lanes())

        bits = self.ir.bitcast(values.of, integers)
        is_odd = self.ir.and_(self.ir.lshr(bits, number(16)), number(1))
        rounded = self.ir.add(bits, self.ir.add(is_odd, number(0x7FFF)))
        is_nan = self.ir.fcmp_unordered("uno", values.of, values.of)
        chosen = self.ir.select(is_nan, self.ir.or_(bits, number(0x400000)), rounded)
        return self.ir.trunc(self.ir.lshr(chosen, number(16)), halves)

    def root(self, values: Value) -> Value:
        return self.intrinsic(f"llvm.sqrt.v{lanes()}f32", self.floats, values.of)

    def same(self, value: ir.Value) -> Value:
        kind = ir.VectorType(value.type, lanes())
        nothing, first = ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes()), None)
        return Value(self, self.ir.shuffle_vector(self.ir.insert_element(nothing, value, I32(0)), nothing, first))

    def shuffle(self, one: Value, other: Value, order: Sequence[int]) -> Value:
        """Lanes of two vectors, counted through both."""
        order = ir.Constant(ir.VectorType(I32, len(order)), list(order))
        return Value(self, self.ir.shuffle_vector(one.of, other.of, order))

    def transposed(self, vectors: Sequence[Value]) -> list[Value]:
        """As many vectors as there are lanes: of all of them the first lanes, of all of them the second, and so on."""
        vectors, step = list(vectors), 1
        while step < lanes():
            upper = [lane & step for lane in range(lanes())]
            low = [lanes() + lane - step if is_upper else lane for lane, is_upper in enumerate(upper)]
            high = [lanes() + lane if is_upper else lane + step for lane, is_upper in enumerate(upper)]
            for index in range(lanes()):
                if not index & step:
                    one, other = vectors[index], vectors[index + step]
                    vectors[index], vectors[index + step] = (
                        self.shuffle(one, other, low),
                        self.shuffle(one, other, high),
                    )
            step *= 2
        return vectors

    def shuffle_halves(self, one: Value, other: Value, order: Sequence[int]) -> Value:
        """The same of 16 bits each, twice as many."""
        kind = ir.VectorType(_I16, 2 * lanes())
        first, second = (Value(self, self.ir.bitcast(value.of, kind)) for value in (one, other))
        return Value(self, self.ir.bitcast(self.shuffle(first, second, order).of, self.floats))

    def intrinsic(self, name: str, result: ir.Type, *values: ir.Value, fastmath: tuple[str, ...] = ()) -> Value:
        kind = ir.FunctionType(result, [value.type for value in values])
        function = self.ir.module.globals.get(name) or ir.Function(self.ir.module, kind, name)
        return Value(self, self.ir.call(function, values, fastmath=fastmath))

    def multiply_add(self, one: Value, other: Value, sum: Value, dtype: torch.dtype = torch.float32) -> Value:
        """one * other + sum in each lane. In bfloat16 a lane of `one` and `other` is two numbers, whose products go to
        one sum."""
        if dtype == torch.float32:
            return self.intrinsic(f"llvm.fma.v{lanes()}f32", self.floats, one.of, other.of, sum.of)
        pairs = [self.ir.bitcast(value.of, ir.VectorType(_BF16, 2 * lanes())) for value in (one, other)]
        return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", self.floats, sum.of, *pairs)

    def sum_of(self, value: Value) -> Value:
        """Of all lanes, in every lane."""
        name = f"llvm.vector.reduce.fadd.v{lanes()}f32"
        return self.same(self.intrinsic(name, _F32, _F32(0.0), value.of, fastmath=("reassoc",)).of)

    def most_of(self, value: Value) -> Value:
        """Of all lanes, in every lane: LLVM would compare one after the other. A NaN stays in its own lane, and other
        lanes may miss numbers then."""
        for distance in (lanes() >> turn for turn in range(1, lanes().bit_length())):
            value = self.most(value, self.shuffle(value, value, [lane ^ distance for lane in range(lanes())]))
        return value

    def any_of(self, condition: Value) -> Value:
        return self.intrinsic(f"llvm.vector.reduce.or.v{lanes()}i1", ir.IntType(1), condition.of)

    def polynomial(self, value: Value, coefficients: Sequence[float]) -> Value:
        """coefficients: of the greatest power first."""
        result = self.number(coefficients[0])
        for coefficient in coefficients[1:]:
            result = self.multiply_add(result, value, self.number(coefficient))
        return result

    def exp(self, value: Value) -> Value:
        """e to the power of each; 0 below -87, and e^88 beyond."""
        integers = ir.VectorType(I32, lanes())
        scaled = self.least(self.most(value, self.number(-87.0)), self.number(88.0)) * _LOG2_E
        shifted = scaled + _WHOLE
        power = self.ir.bitcast(self.polynomial(scaled - (shifted - _WHOLE), _EXP2).of, integers)
        exponents = self.ir.shl(self.ir.bitcast(shifted.of, integers), ir.Constant(integers, [23] * lanes()))
        result = Value(self, self.ir.bitcast(self.ir.add(power, exponents), self.floats))
        return self.where(value < -87.0, self.number(0.0), result)

    def exact_exp(self, value: Value) -> Value:
        """e to the power of each, off by one in the last place at most, and bit by bit what PyTorch's operators have;
        more instructions than `exp`."""
        integers = ir.VectorType(I32, lanes())

        def every(number: int) -> ir.Constant:
            return ir.Constant(integers, [number] * lanes())

        def power_of_two(exponents: ir.Value) -> Value:
            bits = self.ir.shl(self.ir.add(exponents, every(127)), every(23))
            return Value(self, self.ir.bitcast(bits, self.floats))

        shifted = value * _LOG2_E + _WHOLE
        whole = shifted - _WHOLE
        rest = value
        for part in _LN2:
            rest = self.multiply_add(whole, self.number(-part), rest)
        series = self.multiply_add(rest * rest, self.polynomial(rest, _EXP), rest) + 1.0
        exponents = self.ir.sub(self.ir.bitcast(shifted.of, integers), every(_WHOLE_BITS))
        half = self.ir.ashr(exponents, every(1))  # so that neither power is beyond what float32 has
        series = series * power_of_two(half) * power_of_two(self.ir.sub(exponents, half))
        return self.where(value < -104.0, self.number(0.0), self.where(value > 100.0, self.number(math.inf), series))

    def gelu(self, value: Value, approximate: str) -> Value:
        """As torch.nn.functional.gelu, "tanh" or "none"."""
        one = self.number(1.0)
        if approximate == "tanh":  # x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
            factor = -2 * math.sqrt(2 / math.pi)
            return value / (self.exp(self.polynomial(value * value, (factor * 0.044715, factor)) * value) + 1.0)
        scaled = self.intrinsic(f"llvm.fabs.v{lanes()}f32", self.floats, (value * math.sqrt(0.5)).of)
        series = self.polynomial(one / (scaled * _ERF_P + 1.0), _ERF_A)
        tail = series * self.exp(self.number(0.0) - scaled * scaled) * 0.5
        return value * self.where(value > 0.0, one - tail, tail)
