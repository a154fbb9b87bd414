"""Answers that are what they were asked to be: JSON, JSON of a schema, a regular expression, one of some choices.

llguidance tells after each token which may come next. A grammar comes from a client and may take for ever to compile,
so that happens on threads, and first in a process that can be ended. Those that are quick do not wait for the others.
"""

import functools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer

from .errors import InvalidRequest, ModelError, QueueFull
from .request import Grammar

_MAX_BYTES = 64 * 1024  # of a schema or an expression
_MAX_CHOICES = 1000
_MAX_PENDING = 64  # grammars that are compiled or wait for it
_MAX_REASON = 300  # characters of an error, which quotes the grammar
_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # between the tokens of JSON; without a bound a model may never leave it
# The library's units. One of ten formats takes 25,000 of fuel in a step, a string of at most 5,000 characters 50,000
# states of 2 kB.
_LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 50_000, "max_lexer_states": 100_000}
# Of the processor's time, for a row and for all rows of one request. Most rows take 0.1 ms, and of 250,000 tokens in a
# bounded string 3.
_SECONDS_PER_ROW, _SECONDS_PER_STEP = 0.01, 0.05
# Of the processor's time, to compile. Most take 5 ms; one that needs more than the first waits for others of its kind.
_QUICK, _SLOW = 0.1, 1.0
_TRIALS = {_QUICK: threading.Semaphore(2), _SLOW: threading.Semaphore(1)}  # at once
_SLOW_GRAMMARS = threading.Lock()
_REMEMBERED = 128  # trials
_TOO_LONG = "it takes too long or too much memory to compile"
# Compiles as the worker will, but with 256 tokens, one a byte. The worker's own work goes first.
_TRIAL = """
import json, os, resource, signal, sys
os.nice(10)
if sys.platform == "linux":  # macOS refuses it
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]
    def __call__(self, text):
        return list(text)
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))  # ends the process
limits = LLParserLimits(**json.loads(sys.argv[1]), precompute_large_lexemes=False, verbose_errors=False)
matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0, limits=limits)
matcher.compute_bitmask()
print(matcher.get_error())
"""
_TRIAL_TIMEOUT = 20.0  # seconds by the clock
# Eight bits of a mask as limits of eight scores.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS_OF_BITS = torch.where(torch.from_numpy(_BITS) == 1, torch.inf, -torch.inf)


def check_grammar(grammar: Grammar) -> None:
    """Raises InvalidRequest for one that is not worth compiling."""
    try:
        size = len(grammar.text.encode())
        choices = len(json.loads(grammar.text)) if grammar.kind == "choice" and size <= _MAX_BYTES else 1
    except ValueError as error:
        raise InvalidRequest(f"{grammar.field}: {error}") from None
    if size > _MAX_BYTES:
        raise InvalidRequest(f"{grammar.field}: {size} bytes are too many; at most {_MAX_BYTES} are compiled")
    if not 1 <= choices <= _MAX_CHOICES:
        raise InvalidRequest(f"{grammar.field}: {choices} choices; send 1 to {_MAX_CHOICES}")


@dataclass(eq=False)
class Compilation:
    """A grammar that is compiled for the prompts of a request, or will be: `future` says.

    seconds_left: of the processor's time, to find out which tokens may come next in all of the request's rows.
    """

    grammar: Grammar
    tokenizer: LLTokenizer
    future: "Future[LLMatcher]"
    seconds_left: float = _SECONDS_PER_STEP

    @property
    def error(self) -> Exception | None:
        """Why it is refused, an InvalidRequest that names the field, once that is known."""
        error = self.future.exception() if self.future.done() else None
        return cast(Exception | None, error)

    def begin_step(self, rows: int) -> None:
        more = min(rows * _SECONDS_PER_ROW, _SECONDS_PER_STEP)
        self.seconds_left = min(self.seconds_left + more, 2 * _SECONDS_PER_STEP)


class GrammarCompiler:
    """Compiles grammars for a model's tokens, on threads of its own.

    A compiled grammar is not kept for the next request: that takes a millisecond or two, and who shares one shares its
    errors. What is kept is which grammars compile.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        """Takes two seconds for 250,000 tokens, in which no other thread of Python runs."""
        self._tokenizer: LLTokenizer | None = None
        self._unusable = ""
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)))
        except Exception as error:  # every request that needs it will say so
            self._unusable = str(error)
        self._threads = ThreadPoolExecutor(_MAX_PENDING, thread_name_prefix="grammar")  # most of them wait
        self._pending: list[Future[LLMatcher]] = []
        self._compilations: WeakValueDictionary[tuple[str, Grammar], Compilation] = WeakValueDictionary()

    def compile(self, grammar: Grammar, group: str) -> Compilation:
        """Begin to compile, once for all prompts of a group: so each request has one place among those that wait.

        Raises InvalidRequest where the tokenizer allows no grammar, and QueueFull.
        """
        if self._tokenizer is None:
            raise InvalidRequest(f"{grammar.field}: not with this model's tokenizer: {self._unusable}")
        if compilation := self._compilations.get((group, grammar)):
            return compilation
        self._pending = [future for future in self._pending if not future.done()]
        if len(self._pending) >= _MAX_PENDING:
            raise QueueFull(f"{_MAX_PENDING} grammars are being compiled already; send the request again later")
        future = self._threads.submit(_compile, grammar, self._tokenizer)
        self._pending.append(future)
        compilation = self._compilations[group, grammar] = Compilation(grammar, self._tokenizer, future)
        return compilation


class GrammarState:
    """How far one sequence is in its grammar. It depends on the sequence's tokens alone.

    prompt_length: so many tokens at the beginning are no part of it.
    eos_token_ids: allowed where the grammar may end, and alone where it must.
    """

    def __init__(self, compilation: Compilation, prompt_length: int, eos_token_ids: Iterable[int]):
        self.compilation, self._consumed, self._eos_token_ids = compilation, prompt_length, list(eos_token_ids)
        if not self._eos_token_ids:
            field = compilation.grammar.field
            raise InvalidRequest(f"{field}: the model has no eos token to end an answer with; send an eos_token_id")

    @functools.cached_property
    def matcher(self) -> LLMatcher:
        return self.compilation.future.result().deep_copy()

    def next_tokens(self, token_ids: Sequence[int]) -> np.ndarray:
        """Which tokens may follow prompt and continuation: one bit each, the first the lowest, as bytes.

        Raises InvalidRequest where none may, or finding out takes so long that it holds the others up.
        """
        start = time.thread_time()
        self.matcher.consume_tokens(list(token_ids[self._consumed :]))
        self._consumed = len(token_ids)
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8).copy()
        self.compilation.seconds_left -= time.thread_time() - start
        if self.matcher.is_error() or self.compilation.seconds_left < 0:
            why = self.matcher.get_error() or "it takes too long for each token"
            raise _refused(self.compilation.grammar, why)
        _set_bits(bits, self.compilation.tokenizer.eos_tokens, False)  # the request may have others
        _set_bits(bits, self._eos_token_ids, self.matcher.is_accepting())
        return bits


def restrict(
    scores: torch.Tensor,
    logits: torch.Tensor,
    states: Sequence[GrammarState | None],
    token_ids: Sequence[Sequence[int]],
) -> dict[int, Exception]:
    """Set scores [rows, vocab] of tokens that may not come next to -inf, and say in which rows that is impossible.

    logits: the raw scores; a row goes back to them if none of its tokens is left, because the grammar wins over what
        forbids all it allows, as min_new_tokens does where it must end.
    states: None for rows without a grammar.
    token_ids: prompt and continuation of each row.
    """
    for compilation, rows in Counter(state.compilation for state in states if state).items():
        compilation.begin_step(rows)
    masks: dict[int, np.ndarray] = {}
    failed: dict[int, Exception] = {}
    for row, state in enumerate(states):
        try:
            if state:
                masks[row] = state.next_tokens(token_ids[row])
        except Exception as error:
            failed[row] = error
    if not masks:
        return failed
    vocab = scores.shape[-1]
    bits = np.full((len(states), len(next(iter(masks.values())))), 255, dtype=np.uint8)
    bits[list(masks)] = list(masks.values())
    indices = torch.from_numpy(bits).to(scores.device).int().flatten()
    limits = _LIMITS_OF_BITS.to(scores.device).index_select(0, indices).view(len(states), -1)[:, :vocab]
    torch.minimum(scores, limits, out=scores)
    empty = (scores.amax(-1) == -torch.inf).tolist()
    for row in masks.keys() & {row for row, is_empty in enumerate(empty) if is_empty}:
        torch.minimum(logits[row].float(), limits[row], out=scores[row])
        if scores[row].max() == -torch.inf:
            failed[row] = ModelError("the model gives no token a chance that the grammar allows")
    return failed


def _set_bits(bits: np.ndarray, indices: Iterable[int], value: bool) -> None:
    for index in indices:
        byte, bit = index // 8, np.uint8(1 << index % 8)
        bits[byte] = bits[byte] | bit if value else bits[byte] & ~bit


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        definition = _definition(grammar)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{grammar.field}: {error}") from None
    refusal = _refusal(definition, _QUICK)
    if refusal != _TOO_LONG:
        return _matcher(grammar, definition, refusal, tokenizer)
    with _SLOW_GRAMMARS:
        return _matcher(grammar, definition, _refusal(definition, _SLOW), tokenizer)


def _matcher(grammar: Grammar, definition: str, refusal: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Of a grammar that was tried. refusal: what is wrong with it, or nothing."""
    if refusal:
        raise _refused(grammar, refusal)
    limits = LLParserLimits(**_LIMITS, precompute_large_lexemes=False, verbose_errors=False)
    matcher = LLMatcher(tokenizer, definition, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first is the most work
    if matcher.is_error():
        raise _refused(grammar, matcher.get_error())
    return matcher


def _definition(grammar: Grammar) -> str:
    """The grammar as the library wants it. Raises ValueError in its words."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        return grammar_from("choice", grammar.text)
    schema = {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.text)
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    schema.pop("x-guidance", None)  # the library's own options, which would lift the limits here
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})


_refusals: dict[tuple[str, float], str] = {}  # what came of the last trials


def _refusal(definition: str, seconds: float) -> str:
    """What is wrong with a grammar, or nothing; known, or tried when it is its turn."""
    key = definition, seconds
    refusal = _refusals.get(key)
    if refusal is None:
        with _TRIALS[seconds]:
            refusal = _refusals.get(key)  # another may have tried it meanwhile
            if refusal is None:
                refusal = _refusals[key] = _try(definition, seconds)
                for oldest in list(_refusals)[:-_REMEMBERED]:
                    _refusals.pop(oldest, None)
    return refusal


def _try(definition: str, seconds: float) -> str:
    """Compile in a process that may use little time and memory. What is wrong with the grammar, or nothing.

    Raises QueueFull where the machine gives it no time.
    """
    command = [sys.executable, "-c", _TRIAL, json.dumps(_LIMITS), str(seconds)]
    try:
        trial = subprocess.run(command, input=definition, capture_output=True, encoding="utf-8", timeout=_TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise QueueFull("there is no time to compile a grammar; send the request again later") from None
    if trial.returncode > 0:
        raise RuntimeError(f"a grammar could not be tried: {trial.stderr}")
    return _TOO_LONG if trial.returncode else trial.stdout.strip()


def _refused(grammar: Grammar, why: str) -> InvalidRequest:
    reason = " ".join(why.split("\n<")[0].split())[:_MAX_REASON]  # without the state of the library's parser
    if reason.startswith("NoExtension"):
        reason = "there is no text, or none of this model's tokens, that it allows"
    return InvalidRequest(f"{grammar.field}: {reason}; send a simpler one")
