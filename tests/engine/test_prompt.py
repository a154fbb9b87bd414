"""A prompt to token ids: exact, and in a time that its limit bounds."""

import pytest

from handler.engine import Engine, EngineConfig, InvalidRequest, PromptTooLong
from handler.engine.prompt import encode

from .conftest import VOCAB, make_model, make_tokenizer


class Counting:
    """A tokenizer that adds up how many characters it was given."""

    def __init__(self):
        self.characters, self._tokenizer = 0, make_tokenizer()
        self.bos_token_id = self._tokenizer.bos_token_id

    def __call__(self, text, **options):
        self.characters += len(text)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("text", ["The dog ran home. ", "x", "日本語のテキスト", "🙂🚀 "])
@pytest.mark.parametrize("length", [10, 16_384, 16_385, 70_000])
def test_a_prompt_that_fits_has_the_tokenizers_own_ids(text, length):
    text = (text * length)[:length]
    assert encode(make_tokenizer(), text, 10**6, VOCAB) == make_tokenizer()(text).input_ids


@pytest.mark.parametrize("text", ["The dog ran home. ", "日本語"])
def test_a_prompt_that_is_far_too_long_is_refused_by_its_beginning(text):
    tokenizer = Counting()
    with pytest.raises(
        PromptTooLong, match=r"3000000 characters, of which the first 16384 are \d+ tokens; at most 100"
    ):
        encode(tokenizer, (text * 10**6)[: 3 * 10**6], 100, VOCAB)
    assert tokenizer.characters == 16_384


def test_a_prompt_that_is_a_little_too_long_is_told_its_length():
    tokenizer = Counting()
    text = "日本語 " * 1000
    tokens = len(make_tokenizer()(text).input_ids)
    with pytest.raises(PromptTooLong, match=f"has {tokens} tokens, at most {tokens - 1} fit"):
        encode(tokenizer, text, tokens - 1, VOCAB)
    assert tokenizer.characters == len(text)
    assert len(encode(tokenizer, text, tokens, VOCAB)) == tokens


def test_a_long_prompt_near_the_limit_is_not_refused_for_where_it_is_cut():
    text = "one two three " * 3000
    tokens = len(make_tokenizer()(text).input_ids)
    assert len(encode(make_tokenizer(), text, tokens, VOCAB)) == tokens
    with pytest.raises(PromptTooLong):
        encode(make_tokenizer(), text, tokens - 1, VOCAB)


def test_special_tokens_are_left_out_where_a_template_has_written_them():
    class Prefixing:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": [1] * add_special_tokens + [5]})

    assert encode(Prefixing(), "a", 9, VOCAB) == [1, 5]
    assert encode(Prefixing(), "a", 9, VOCAB, add_special_tokens=False) == [5]


def test_the_engines_limits_count():
    engine = Engine(make_model("llama"), make_tokenizer(), EngineConfig(max_sequence_length=40, max_prompt_tokens=20))
    assert engine.encode([2] * 20) == [2] * 20
    with pytest.raises(PromptTooLong, match="21 tokens, at most 20"):
        engine.encode([2] * 21)
    with pytest.raises(InvalidRequest, match="below 320"):
        engine.encode([VOCAB])
