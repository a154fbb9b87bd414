"""Tokens to text: nothing shown is ever taken back, and at the end nothing is missing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.engine.detokenizer import Detokenizer, TextStream, _overlap
from tests.models import make_sentencepiece

from .conftest import make_tokenizer

TOKENIZERS = {"bytes": make_tokenizer, "sentencepiece": make_sentencepiece}
words = st.text(alphabet="ab lo.éß語日🙂🚀👩‍💻", max_size=40)


def stream(tokenizer, prompt, ids, stop=()):
    """The text after each token, then at the end; and how many tokens it took."""
    text = Detokenizer(tokenizer).stream(prompt, stop)
    shown = []
    for count, token in enumerate(ids, 1):
        stopped = text.push(token)
        shown.append(text.text)
        if stopped:
            return shown, text.text, count
    text.flush()
    return shown, text.text, len(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompt=words, reply=words, special=st.integers(0, 40))
def test_shown_text_only_grows_into_the_decoded_text(name, prompt, reply, special):
    tokenizer = TOKENIZERS[name]()
    before = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + reply).input_ids
    new = ids[len(before) :] if ids[: len(before)] == before else tokenizer(reply).input_ids
    new[special:special] = [tokenizer.eos_token_id] * 3
    shown, text, _ = stream(tokenizer, before, new)
    whole = tokenizer.decode(before + new, skip_special_tokens=True)
    assert text == whole[len(tokenizer.decode(before, skip_special_tokens=True)) :]
    for part in shown:
        assert text.startswith(part) and "\ufffd" not in part


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    reply=words,
    stops=st.lists(st.text(alphabet="ab lo.é語🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_part_of_a_stop_string_is_shown(name, reply, stops):
    tokenizer = TOKENIZERS[name]()
    prompt, ids = tokenizer("ab").input_ids, tokenizer(reply).input_ids
    _, plain, _ = stream(tokenizer, prompt, ids)
    shown, text, count = stream(tokenizer, prompt, ids, stops)
    hits = [at for at in map(plain.find, stops) if at >= 0]
    if not hits:
        assert text == plain
        return
    _, enough, _ = stream(tokenizer, prompt, ids[:count])
    assert any(stop in enough for stop in stops)
    _, less, _ = stream(tokenizer, prompt, ids[: count - 1])
    assert not any(stop in less for stop in stops)
    assert not any(stop in text for stop in stops)
    assert plain.startswith(text) and any(plain[len(text) :].startswith(stop) for stop in stops)
    assert all(text.startswith(part) for part in shown)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab", max_size=9), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6)))
def test_the_longest_beginning_of_any_stop_string_is_held_back(text, stops):
    beginnings = (stop[:length] for stop in stops for length in range(len(stop)))
    assert _overlap(text, sorted(stops)) == max((len(one) for one in beginnings if text.endswith(one)), default=0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_what_may_yet_change_is_held_back(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer("lo lo").input_ids
    shown, _, _ = stream(tokenizer, tokenizer("ab").input_ids, ids, stop=["lol"])
    _, plain, _ = stream(tokenizer, tokenizer("ab").input_ids, ids)
    assert all(plain.startswith(part) for part in shown)
    assert len(plain) - len(shown[-1]) == 2  # "lo" may become "lol"


def test_half_a_character_appears_when_it_is_whole_or_at_the_end():
    tokenizer = make_tokenizer()
    ids = tokenizer("🚀" + "x").input_ids
    pieces = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    assert "\ufffd" in pieces[0]  # the test needs a character of several tokens
    shown, text, _ = stream(tokenizer, [], ids)
    assert shown[0] == "" and text == "🚀x"
    _, cut, _ = stream(tokenizer, [], ids[:1])
    assert cut == tokenizer.decode(ids[:1])


def test_a_character_may_begin_in_the_prompt():
    tokenizer = make_tokenizer()
    ids = tokenizer("a🚀b").input_ids
    _, text, _ = stream(tokenizer, ids[:2], ids[2:])
    assert text == "🚀b"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("garbage", [[0xFF], [0xE2, 0x82], [0x80, 0x41]])
def test_bytes_that_are_no_text_cost_no_more_and_hold_nothing_up(name, garbage):
    tokenizer = TOKENIZERS[name]()
    table = {i: byte for byte in range(256) for i in [_byte_token(name, tokenizer, byte)]}
    ids = {byte: i for i, byte in table.items()}
    longest = 0
    text = Detokenizer(tokenizer).stream([], ())
    decode = text._decode
    shown = []

    def counting(window):
        nonlocal longest
        longest = max(longest, len(window))
        return decode(window)

    text._decode = counting
    for _ in range(100):
        for byte in garbage:
            text.push(ids[byte])
            shown.append(text.text)
    for token in tokenizer("a b").input_ids:
        text.push(token)
    text.flush()
    assert longest < 40
    assert len(shown[-1]) > 50
    assert text.text.endswith("b")


def _byte_token(name, tokenizer, byte):
    if name == "sentencepiece":
        return tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return tokenizer.convert_tokens_to_ids(chr(byte if byte in printable else 256 + rest.index(byte)))


def test_a_token_costs_the_same_at_any_length():
    tokenizer = make_tokenizer()
    text = Detokenizer(tokenizer).stream(tokenizer("ab " * 300).input_ids, ())
    decode, windows = text._decode, []
    text._decode = lambda ids: windows.append(len(ids)) or decode(ids)
    for token in tokenizer("日本語 one two " * 60).input_ids:
        text.push(token)
    assert max(windows) < 16


def test_the_first_stop_string_in_a_token_counts():
    pieces = ["a", "b.c;d.e"]
    text = TextStream(lambda ids: "".join(pieces[i] for i in ids), frozenset(), [], (";", "."))
    assert not text.push(0)
    assert text.push(1)
    text.flush()
    assert text.text == "ab"
