"""Text from tokens: whole characters, stop strings over any cut of the text into tokens, what is held back."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_paged.serving.text import TextStop


def utf8(tokens):
    return bytes(tokens).decode(errors="replace")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    """Bytes as tokens. What was ready is never taken back, and in the end everything is."""
    stopping = TextStop(utf8, stops)
    ready = ""
    for token in text.encode():
        stopped = stopping.feed(token)
        assert stopping.text[: stopping.ready].startswith(ready)
        ready = stopping.text[: stopping.ready]
        if stopped:
            break
    stopping.finish()
    # The first stop string to be complete ends the text; of several that are complete at once, the earliest begins.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    first_end = min(ends)[0] if ends else None
    expected = text if first_end is None else text[: min(start for end, start in ends if end == first_end)]
    assert stopping.text == expected
    assert stopping.ready == len(expected)
    assert stopping.stopped == bool(ends)


def test_words_keep_their_spaces():
    """A tokenizer that drops the first word's space: decoded one by one, the words would run together."""
    words = ["▁to", "▁be", "or", "▁not"]

    def decode(tokens):
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    text = TextStop(decode, [])
    for token in range(4):
        text.feed(token)
    assert text.text == "to beor not"


def test_the_first_word_keeps_its_space_behind_a_prompt():
    words = [" hello", " world", "!"]
    text = TextStop(lambda tokens: "".join(words[token] for token in tokens).removeprefix(" "), [" world"], [0])
    assert text.feed(1)
    assert text.text == ""


def test_a_character_of_the_prompt_is_not_ours():
    text = TextStop(utf8, [], b"\xc3")
    for token in b"\xa9b":
        text.feed(token)
    assert text.text == utf8(b"\xa9b")


def test_tokens_of_the_prompt_need_not_be_decodable():
    text = TextStop(utf8, [], [300])
    for token in b"ab":
        text.feed(token)
    assert text.text == "ab"


def test_a_stop_string_ends_the_text_before_its_token_does():
    tokens = [b"x", b"END\xe2"]
    text = TextStop(lambda each: b"".join(tokens[token] for token in each).decode(errors="replace"), ["END"])
    assert [text.feed(0), text.feed(1)] == [False, True]
    assert text.text == "x"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_any_bytes_come_as_they_are_together(vocabulary, data):
    """Tokens of several bytes, broken ones and such as begin a character that another ends."""
    vocabulary += [b"\xff", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98\x80a"]
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=40))

    def decode(each):
        return utf8(b"".join(vocabulary[token] for token in each))

    assert fed(decode, tokens) == decode(tokens)


@pytest.mark.parametrize(
    ("vocabulary", "tokens"),
    [
        ([b"\xf0", b"\xac\x98"], [0, 1, 1, 1, 1]),
        ([b"\xf0", b"\xa9"], [1, 0, 1, 1, 0]),
        ([b"\x98\xf0", b"\xf0", b"a\xa9\x82\xa9", b"\x82\xac", b"\xa9", b"\x82\xc3\xc3"], [5, 2, 2, 5, 0, 4, 4, 2, 3]),
    ],
)
def test_bytes_that_were_hard(vocabulary, tokens):
    assert fed(lambda each: utf8(b"".join(vocabulary[token] for token in each)), tokens) == utf8(
        b"".join(vocabulary[token] for token in tokens)
    )


def fed(decode, tokens):
    text = TextStop(decode, [])
    for token in tokens:
        text.feed(token)
    text.finish()
    return text.text


def byte_fallback(tokens):
    """As SentencePiece: rare characters are tokens of a byte, broken ones spoil all others beside them."""
    text = ""
    for is_byte, run in itertools.groupby(tokens, lambda token: isinstance(token, int)):
        run = [*run]
        if not is_byte:
            text += "".join(run)
            continue
        try:
            text += bytes(run).decode()
        except UnicodeDecodeError:
            text += "\N{REPLACEMENT CHARACTER}" * len(run)
    return text.removeprefix(" ")


PIECES = [[" hi"], ["x"], [""], [10], *(list(character.encode()) for character in "é日😀")]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8))
@example([[10], list("é".encode())])
@example([list("日".encode())] * 2)
@example([[10], [""], [" hi"]])
@example([[" hi"], *[[""]] * 5, [" hi"]])
def test_rare_characters_one_after_another(pieces):
    tokens = [*itertools.chain(*pieces)]
    assert fed(byte_fallback, tokens) == byte_fallback(tokens)


def test_broken_bytes_do_not_fill_the_window():
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return utf8(tokens)

    text = TextStop(decode, ["END"])
    for _ in range(1000):
        text.feed(0xFF)
    assert longest < 10
    assert text.ready >= 990


def test_broken_characters_come_at_the_end():
    text = TextStop(utf8, [])
    for token in b"ab\xe2\x82":
        text.feed(token)
    assert (text.text, text.ready) == ("ab", 2)
    text.finish()
    assert (text.text, text.ready) == ("ab\N{REPLACEMENT CHARACTER}", 3)
