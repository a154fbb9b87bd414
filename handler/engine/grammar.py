"""Answers that are what they were asked to be: JSON, JSON of a schema, a regular expression, one of some choices.

llguidance tells after each token which may come next. A grammar comes from a client and may take for ever to compile,
so that happens on threads, and first in a process that can be ended.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer

from .errors import InvalidRequest, QueueFull
from .request import Grammar

_MAX_BYTES = 64 * 1024  # of a schema or an expression
_MAX_CHOICES = 1000
_MAX_PENDING = 64  # grammars that wait for a thread
_MAX_REASON = 300  # characters of an error, which quotes the grammar
_THREADS = 2
_REMEMBERED = 128  # grammars of which it is known whether they compile
_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # between the tokens of JSON; without a bound a model may never leave it
# The library's units. One of ten formats takes 25,000 of fuel in a step, a string of at most 5,000 characters 50,000
# states of 2 kB.
_LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 50_000, "max_lexer_states": 100_000}
# Of the processor's time, for one sequence. Most tokens take 0.05 ms, of 250,000 in a bounded string 3 ms.
_SECONDS_AT_ONCE, _SECONDS_PER_TOKEN = 0.05, 0.01
# Compiles as the worker will, but with 256 tokens, one a byte.
_TRIAL = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))  # seconds
if sys.platform == "linux":  # macOS refuses it
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]
    def __call__(self, text):
        return list(text)
limits = LLParserLimits(**json.loads(sys.argv[1]), precompute_large_lexemes=False, verbose_errors=False)
matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0, limits=limits)
matcher.compute_bitmask()
print(matcher.get_error())
"""
_TRIAL_TIMEOUT = 10.0  # seconds by the clock


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


@dataclass(frozen=True)
class Compilation:
    """A grammar that is compiled, or will be: `future` says. Its error is an InvalidRequest that names the field."""

    grammar: Grammar
    future: "Future[LLMatcher]"
    tokenizer: LLTokenizer


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
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._pending: list[Future[LLMatcher]] = []

    def compile(self, grammar: Grammar) -> Compilation:
        """Begin to compile. Raises InvalidRequest where the tokenizer allows no grammar, and QueueFull."""
        if self._tokenizer is None:
            raise InvalidRequest(f"{grammar.field}: not with this model's tokenizer: {self._unusable}")
        self._pending = [future for future in self._pending if not future.done()]
        if len(self._pending) >= _MAX_PENDING:
            raise QueueFull(f"{_MAX_PENDING} grammars are being compiled already; send the request again later")
        future = self._threads.submit(self._compile, grammar, self._tokenizer)
        self._pending.append(future)
        return Compilation(grammar, future, self._tokenizer)

    def _compile(self, grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
        try:
            definition = _definition(grammar)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{grammar.field}: {error}") from None
        if refusal := _try(definition):
            raise _refused(grammar, refusal)
        limits = LLParserLimits(**_LIMITS, precompute_large_lexemes=False, verbose_errors=False)
        matcher = LLMatcher(tokenizer, definition, log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first is the most work
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher


class GrammarState:
    """How far one sequence is in its grammar. It depends on the sequence's tokens alone.

    prompt_length: so many tokens at the beginning are no part of it.
    eos_token_ids: allowed where the grammar may end, and alone where it must.
    """

    def __init__(self, compilation: Compilation, prompt_length: int, eos_token_ids: Iterable[int]):
        self._compilation, self._consumed, self._eos_token_ids = compilation, prompt_length, list(eos_token_ids)
        self._seconds_left = _SECONDS_AT_ONCE
        if not self._eos_token_ids:
            field = compilation.grammar.field
            raise InvalidRequest(f"{field}: the model has no eos token to end an answer with; send an eos_token_id")

    @functools.cached_property
    def matcher(self) -> LLMatcher:
        return self._compilation.future.result().deep_copy()

    def next_tokens(self, token_ids: list[int]) -> np.ndarray:
        """Which tokens may follow prompt and continuation: booleans [at least vocab].

        Raises InvalidRequest where finding out takes so long that it holds the others up.
        """
        start = time.thread_time()
        self.matcher.consume_tokens(token_ids[self._consumed :])
        self._seconds_left += _SECONDS_PER_TOKEN * (len(token_ids) - self._consumed)
        self._consumed = len(token_ids)
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self._seconds_left -= time.thread_time() - start
        if self.matcher.is_error() or self._seconds_left < 0:
            raise _refused(self._compilation.grammar, self.matcher.get_error() or "it takes too long for each token")
        allowed = np.unpackbits(bits, bitorder="little").view(bool)
        allowed[self._compilation.tokenizer.eos_tokens] = False  # the request may have others
        allowed[self._eos_token_ids] = self.matcher.is_accepting()
        return allowed


def keep(scores: torch.Tensor, allowed: np.ndarray) -> None:
    """Set all other scores [vocab] to -inf. By their indices, as there are few of the ones or of the others: a mask of
    250,000 takes several times longer."""
    allowed = allowed[: len(scores)]
    if 2 * np.count_nonzero(allowed) > len(allowed):
        scores[torch.from_numpy(np.flatnonzero(~allowed)).to(scores.device)] = -torch.inf
    else:
        indices = torch.from_numpy(np.flatnonzero(allowed)).to(scores.device)
        kept = scores[indices]
        scores.fill_(-torch.inf)[indices] = kept


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


@functools.lru_cache(_REMEMBERED)
def _try(definition: str) -> str:
    """Compile in a process that may use little time and memory. What is wrong with the grammar, or nothing.

    Raises QueueFull where the machine gives it no time.
    """
    command = [sys.executable, "-c", _TRIAL, json.dumps(_LIMITS)]
    try:
        trial = subprocess.run(command, input=definition, capture_output=True, encoding="utf-8", timeout=_TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise QueueFull("there is no time to compile a grammar; send the request again later") from None
    if trial.returncode > 0:
        raise RuntimeError(f"a grammar could not be tried: {trial.stderr}")
    return "it takes too long or too much memory to compile" if trial.returncode else trial.stdout.strip()


def _refused(grammar: Grammar, why: str) -> InvalidRequest:
    reason = " ".join(why.split("\n<")[0].split())[:_MAX_REASON]  # without the state of the library's parser
    return InvalidRequest(f"{grammar.field}: {reason}; send a simpler one")
