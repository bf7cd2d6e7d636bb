"""Text from tokens: whole characters, stop strings over any cut of the text into tokens, what is held back."""

from hypothesis import given, settings
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


def test_broken_characters_come_at_the_end():
    text = TextStop(utf8, [])
    for token in b"ab\xe2\x82":
        text.feed(token)
    assert (text.text, text.ready) == ("ab", 2)
    text.finish()
    assert (text.text, text.ready) == ("ab\N{REPLACEMENT CHARACTER}", 3)
