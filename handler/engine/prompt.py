"""A prompt to token ids, in a time that its limit bounds and not its length."""

from collections.abc import Sequence
from typing import Any

from .errors import InvalidRequest, PromptTooLong

_EXACT_CHARACTERS = 16_384  # so many are tokenized at once, and a prompt that is too long is told its length
_CHARACTERS_PER_TOKEN = 8  # more than texts have, so that the first part of a long text mostly decides
_SLACK_TOKENS = 64  # where a text is cut, it may have more tokens than the whole has there


def encode(
    tokenizer: Any, prompt: str | Sequence[int], max_tokens: int, vocab_size: int, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a prompt, at most `max_tokens`. An empty one starts from the tokenizer's bos token. May be
    called from any thread.

    Raises InvalidRequest for what is no prompt, and PromptTooLong, for a long text without tokenizing all of it.
    """
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt, max_tokens, add_special_tokens)
    elif isinstance(prompt, list | tuple) and all(type(i) is int for i in prompt):
        ids = list(prompt)
    else:
        raise InvalidRequest("prompt: send a string or a list of token ids")
    if not ids and tokenizer.bos_token_id is None:
        raise InvalidRequest("prompt: it is empty and the tokenizer has no bos token; send some text")
    ids = ids or [tokenizer.bos_token_id]
    if len(ids) > max_tokens:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens, at most {max_tokens} fit; send fewer")
    if not all(0 <= i < vocab_size for i in ids):
        raise InvalidRequest(f"prompt: token ids must be at least 0 and below {vocab_size}")
    return ids


def _encode_text(tokenizer: Any, text: str, max_tokens: int, add_special_tokens: bool) -> list[int]:
    """Tokenizes the beginning of a long text first, then twice as much, until it is too long or all of it is done."""
    length = max(_EXACT_CHARACTERS, _CHARACTERS_PER_TOKEN * max_tokens)
    while True:
        try:
            ids = tokenizer(text[:length], add_special_tokens=add_special_tokens).input_ids
        except (TypeError, ValueError) as error:  # half a surrogate pair, for one
            raise InvalidRequest(f"prompt: send text that can be tokenized: {error}") from error
        if length >= len(text):
            return list(ids)
        if len(ids) > max_tokens + _SLACK_TOKENS:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters, of which the first {length} are {len(ids)} tokens; "
                f"at most {max_tokens} fit; send fewer"
            )
        length *= 2
