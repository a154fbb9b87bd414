"""What a token looks like in log-probabilities: the text that it adds, or its bytes."""

import re
from itertools import pairwise
from typing import Any, NamedTuple

from handler.engine.detokenizer import REPLACEMENT, Detokenizer, TextStream


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte; GPT-2's table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Piece(NamedTuple):
    """The characters of a text that a token completes, and how many there are up to their end."""

    text: str
    end: int


class TokenText:
    """The text of a tokenizer's tokens. Each token's is made once: an answer may list 20 candidates a token."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        # Decoders drop a space at the beginning, so that a token shows its own only after another.
        self._before = tokenizer("a", add_special_tokens=False).input_ids
        self._skipped = len(self._decode(self._before))
        self._own: dict[int, tuple[str, bytes | None]] = {}

    def own(self, token_id: int) -> tuple[str, bytes | None]:
        """A token's text, and its bytes if they are no text on their own: "bytes:\\xf0\\x9f", as OpenAI writes it."""
        if token_id not in self._own:
            text = self._decode([*self._before, token_id])[self._skipped :]
            data = self._bytes(token_id) if REPLACEMENT in text else None
            if data:
                text = "bytes:" + "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in data)
            self._own[token_id] = text, data
        return self._own[token_id]

    def shown(self, token_id: int, piece: Piece) -> tuple[str, bytes | None]:
        """The same for a token of a text. Its piece may begin with bytes of earlier tokens that turned out to be no
        text, lack the space, or be cut by a stop string."""
        own, data = self.own(token_id)
        if data:
            return own, data
        return (piece.text if REPLACEMENT in own else piece.text.lstrip(REPLACEMENT)[-len(own) :]), None

    def of_prompt(self, prompt_ids: list[int]) -> list[Piece]:
        """The piece of each of the tokens."""
        stream = self._detokenizer.stream([], ())
        for token_id in prompt_ids:
            stream.push(token_id)
        stream.flush()
        return pieces(stream)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def _bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that is no text on its own; None if they are not known, or are text after all."""
        token = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if not all(character in _BYTES for character in token):
            return None
        data = bytes(_BYTES[character] for character in token)
        return None if REPLACEMENT.encode() in data else data


def pieces(stream: TextStream, first: int = 0, last: int | None = None) -> list[Piece]:
    """The piece of each of a stream's tokens, or of those from `first` to before `last`; nothing where it is part of
    a stop string."""
    text, before = stream.text, stream.ends[first - 1] if first else 0
    return [Piece(text[start:end], min(end, len(text))) for start, end in pairwise([before, *stream.ends[first:last]])]
