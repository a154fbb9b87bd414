"""Which tokens a grammar allows next: JSON, JSON of a schema, a regular expression, one of some choices.

llguidance tells after each token which may follow. `grammar_compiler.py` makes what it needs for that.
"""

import functools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from .errors import InvalidRequest, ModelError
from .request import Grammar

# Of the processor's time, for a row and for all rows of one request. Most rows take 0.1 ms, and of 250,000 tokens in a
# bounded string 3.
_SECONDS_PER_ROW, _SECONDS_PER_STEP = 0.01, 0.05
_MAX_REASON = 300  # characters of an error, which quotes the grammar
# Eight bits of a mask as limits of eight scores.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS_OF_BITS = torch.where(torch.from_numpy(_BITS) == 1, torch.inf, -torch.inf)


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


class GrammarState:
    """How far one sequence is in its grammar. It depends on the sequence's tokens alone.

    prompt_length: so many tokens at the beginning are no part of it.
    eos_token_ids: allowed where the grammar may end, and alone where it must.
    """

    def __init__(self, compilation: Compilation, prompt_length: int, eos_token_ids: Iterable[int]):
        self.compilation, self._consumed = compilation, prompt_length
        self._eos_token_ids = [i for i in eos_token_ids if 0 <= i < compilation.tokenizer.vocab_size]
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
            raise refused(self.compilation.grammar, why)
        _set_bits(bits, self.compilation.tokenizer.eos_tokens, False)  # the request may have others
        _set_bits(bits, self._eos_token_ids, self.matcher.is_accepting())
        return bits


def apply_grammars(
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


def refused(grammar: Grammar, why: str) -> InvalidRequest:
    """The error of a grammar that cannot be honoured, in the library's words."""
    reason = " ".join(why.split("\n<")[0].split())[:_MAX_REASON]  # without the state of the library's parser
    if reason.startswith("NoExtension"):
        reason = "there is no text, or none of this model's tokens, that it allows"
    return InvalidRequest(f"{grammar.field}: {reason}; send a simpler one")
