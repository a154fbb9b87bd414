"""Grammars -> what llguidance needs to tell which token may come next.

A grammar comes from a client and may take for ever to compile, so that happens on threads, and first in a process that
can be ended. Those that are quick do not wait for the others.
"""

import json
import secrets
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any
from weakref import WeakValueDictionary

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from transformers import PreTrainedTokenizerFast

from .errors import InvalidRequest, QueueFull
from .grammar import Compilation, refused
from .heap import release_freed_memory
from .request import Grammar

_MAX_BYTES = 64 * 1024  # of a schema or an expression
_MAX_CHOICES = 1000
_MAX_PENDING = 64  # grammars that are compiled or wait for it
_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # between the tokens of JSON; without a bound a model may never leave it
_LIMITS: dict[str, Any] = {  # of LLParserLimits, here and in the trial
    # In the library's units. One of ten formats takes 25,000 of fuel in a step, a string of at most 5,000 characters
    # 50,000 states of 2 kB.
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# Of the processor's time, to compile. Most take 5 ms; one that needs more than the first waits for others of its kind.
_QUICK, _SLOW = 0.1, 1.0
_SLOW_GRAMMARS = threading.Lock()
_REMEMBERED = 128  # trials
_TOO_LONG = "it takes too long or too much memory to compile"
_TRIAL = Path(__file__).with_name("grammar_trial.py")


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
            self._tokenizer = _library_tokenizer(tokenizer, max(vocab_size, len(tokenizer)))
        except Exception as error:  # every request that needs it will say so
            self._unusable = str(error)
        release_freed_memory()  # of the vocabulary as text
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


def _library_tokenizer(tokenizer: Any, vocab_size: int) -> LLTokenizer:
    """The library's own. Raises ValueError for one that it cannot be made of.

    Special tokens get names that no grammar can hold: where one asks for the text "</s>", the library would write the
    token, which adds no text.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("only fast tokenizers are supported")
    described = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    model, added = described["model"], described["added_tokens"]
    names = {token["content"]: f"<{secrets.token_hex(16)}>" for token in added if token["special"]}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
    elif "vocab" in model:  # with a score each
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:  # old files have "a b" for ["a", "b"]
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if "".join(pair) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return LLTokenizer(json.dumps(described), n_vocab=vocab_size, eos_token=tokenizer.eos_token_id)


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
        raise refused(grammar, refusal)
    matcher = LLMatcher(tokenizer, definition, log_level=0, limits=LLParserLimits(**_LIMITS))
    matcher.compute_bitmask()  # the first is the most work
    if matcher.is_error():
        raise refused(grammar, matcher.get_error())
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
        process = _TRIALS[seconds].get()
        try:
            refusal = _refusals.get(key)  # another may have tried it meanwhile
            if refusal is None:
                refusal = _refusals[key] = _try(process, definition, seconds)
                for oldest in list(_refusals)[:-_REMEMBERED]:
                    _refusals.pop(oldest, None)
        finally:
            _TRIALS[seconds].put(process)
    return refusal


class _TrialProcess:
    """grammar_trial.py, started when it is first needed. It ends with this process, whose end of a pipe it reads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, definition: str, seconds: float) -> str | int:
        """What the process answers. Raises RuntimeError where it is gone; the next call starts another."""
        if self._process is None:
            command = [sys.executable, "-P", str(_TRIAL), json.dumps(_LIMITS)]
            self._process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        process = self._process
        assert process.stdin and process.stdout
        try:
            print(json.dumps([definition, seconds]), file=process.stdin, flush=True)
            answer: str | int = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process = None
            process.kill()
            raise RuntimeError(f"a grammar could not be tried, the process ended with {process.wait()}") from error
        return answer


def _try(process: _TrialProcess, definition: str, seconds: float) -> str:
    """Compile where little time and memory may be used. What is wrong with the grammar, or nothing.

    Raises QueueFull where the machine gives it no time.
    """
    answer = process.ask(definition, seconds)
    if isinstance(answer, str):
        return answer.strip()
    if answer == -signal.SIGALRM:
        raise QueueFull("there is no time to compile a grammar; send the request again later")
    if answer > 0:
        raise RuntimeError("a grammar could not be tried; the log has why")
    return _TOO_LONG


# One that is warm is taken first.
_TRIALS: dict[float, LifoQueue[_TrialProcess]] = {_QUICK: LifoQueue(), _SLOW: LifoQueue()}
for _seconds in (_QUICK, _QUICK, _SLOW):  # so many at once
    _TRIALS[_seconds].put(_TrialProcess())
