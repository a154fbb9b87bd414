"""Tokens to text, one token at a time: never half a character, never part of a stop string."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_WINDOW = 8  # tokens decoded together: enough context for any decoder, and the cost of a token stays constant
_GARBAGE = 32  # so many tokens without one clean end are bytes that are no text
_HALF_BYTES = 3  # the most bytes an unfinished character has
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how decoders show bytes that are not, or not yet, a character


class Detokenizer:
    """Makes a TextStream for each sequence. `tokenizer` is any transformers tokenizer."""

    def __init__(self, tokenizer: Any):
        # Cleaning up spaces rewrites text that has been shown already ("do n" + "'t"), so it is off.
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = frozenset(i for i, token in added.items() if token.special)

    def stream(self, prompt_ids: Sequence[int], stop: Sequence[str], min_tokens: int = 0) -> "TextStream":
        return TextStream(self._decode, self._special, prompt_ids, stop, min_tokens)


class TextStream:
    """The text of one growing sequence; `text` only ever gets longer.

    Without a stop string, `text` ends as decode(prompt + new tokens) minus its prefix decode(prompt).
    min_tokens: a stop string counts if it is complete after more tokens than these.
    ends: for each token, how many characters are complete with it, shown or held back.
    """

    def __init__(
        self,
        decode: Callable,
        special: frozenset[int],
        prompt: Sequence[int],
        stop: Sequence[str],
        min_tokens: int = 0,
    ):
        self.text = ""
        self.ends: list[int] = []
        self._min_tokens = min_tokens
        self._decode = decode
        self._special = special  # decoders skip them, so they are no context either
        self._stop = sorted(stop)
        self._maybe_stop = ""  # decoded, held back: a stop string may begin here
        self._stopped = False
        self._window = self._context_of(prompt)
        self._shown = self._decode(self._window)  # the part of the window's text that is out
        self._clean = len(self._window)  # a place in the window where no character is cut

    def push(self, token_id: int) -> bool:
        """Add a token. True if it completes a stop string: `text` then ends before that string."""
        if not (self._stopped or token_id in self._special):
            self._add(token_id)
        self.ends.append(len(self.text) + len(self._maybe_stop))
        return self._stopped

    def _add(self, token_id: int) -> None:
        self._window.append(token_id)
        text = self._decode(self._window)
        # While a run of bytes ends in half a character, byte-fallback decoders replace all of the run.
        held = len(text) - len(text.rstrip(REPLACEMENT))
        garbage = len(self._window) - self._clean > _GARBAGE
        if garbage:
            held = min(held, _HALF_BYTES)
        self._release(text, len(text) - held)
        if not held:
            self._slide(self._clean, held)
        elif garbage:
            self._slide(len(self._window) - _HALF_BYTES - 1, held)

    def flush(self) -> None:
        """The sequence ended: what was held back is text after all."""
        text = self._decode(self._window)
        self._release(text, len(text))
        self.text += self._maybe_stop
        self._maybe_stop = ""

    def _context_of(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from where a character begins."""
        size = _WINDOW
        while True:
            window = [i for i in prompt[-size:] if i not in self._special]
            if size >= len(prompt) or not self._decode(window).startswith(REPLACEMENT):
                return window
            size *= 2

    def _release(self, text: str, complete: int) -> None:
        """Pass on what is new in the window's text up to `complete`."""
        # Not just len(shown): a prompt may end in half a character that the first token completes.
        same = _common(self._shown, text)
        piece = text[same:complete]
        if piece and not self._stopped:
            self._shown = text[:complete]
            self._pass_on(piece)

    def _slide(self, start: int, held: int) -> None:
        """Drop a long window's tokens before `start`; all but `held` characters of the rest is shown."""
        end = len(self._window)
        if end > _WINDOW:
            self._window = self._window[start:]
            text = self._decode(self._window)
            self._shown = text[: len(text) - held]
            end -= start
        self._clean = end

    def _pass_on(self, piece: str) -> None:
        """Show decoded text as far as no stop string is, or may yet be, in it."""
        buffer = self._maybe_stop + piece
        may_stop = len(self.ends) >= self._min_tokens  # this token is not among them yet
        found = [at for at in map(buffer.find, self._stop) if at >= 0] if may_stop else []
        self._stopped = bool(found)
        end = min(found, default=len(buffer) - _overlap(buffer, self._stop))
        self.text += buffer[:end]
        self._maybe_stop = "" if found else buffer[end:]


def _common(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    if other.startswith(one):
        return len(one)
    return next(i for i in range(len(one)) if one[: i + 1] != other[: i + 1])


def _overlap(text: str, stop: list[str]) -> int:
    """How many characters at the end of `text` are the beginning, but not all, of one of the sorted stop strings."""
    longest = max(map(len, stop), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        end = text[start:]
        following = bisect_right(stop, end)  # whatever is longer and begins so comes next
        if following < len(stop) and stop[following].startswith(end):
            return len(end)
    return 0
