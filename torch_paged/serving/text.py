"""Text from tokens as they come: whole characters only, and an end where a stop string begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders give for the first bytes of a longer character
_LONGEST = 4  # bytes of a character, and so tokens


class TextStop:
    """The text of a growing list of tokens, up to the first of the stop strings.

    Tokens are decoded in a window that moves on with every token that completes a character, so that a long text
    costs no more a token than a short one. The window reaches one such token back, at first into the prompt, because
    tokenizers write the first word without its space. Behind bytes that make no character it moves on, too, when no
    character can have begun there; tokens without text stay until some comes. What may be the beginning of a stop
    string is held back from `ready`:

        stop strings ["END"], text "the EN"    ready 4

    Attributes:
        text: so far; without the stop string, once stopped.
        ready: characters of it that will not be taken back.
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str], before: Sequence[int] = ()) -> None:
        """`before`: the last token of the prompt, or some more."""
        self._decode = decode
        self._stop_strings = stop_strings
        self._before = before
        self._window: list[int] = []
        self._context = 0  # tokens of the window whose text is in `text` already, or in the prompt
        self._taken = 0  # characters of the others that are in `text`, too
        self.text = ""
        self.ready = 0
        self.stopped = False

    def feed(self, token: int) -> bool:
        """Append a token; True once a stop string came."""
        if self._before:
            self._begin(list(self._before))
        self._window.append(token)
        self._read(_LONGEST - 1)
        return self.stopped

    def finish(self) -> None:
        """No token follows: all of the text is ready, broken characters too."""
        if not self.stopped:
            self._read(0)
        self.ready = len(self.text)

    def _begin(self, before: list[int]) -> None:
        """Let these be the first context, unless they end inside a character, or `decode` does not know them."""
        self._before = ()
        try:
            whole = not self._decode(before).endswith(_INCOMPLETE)
        except Exception:  # the caller's: what it knows of the prompt is none of our business
            return
        if whole:
            self._window, self._context = before, len(before)

    def _read(self, held: int) -> None:
        """Take in the window's text, but for broken characters at its end, up to `held`, that may become whole."""
        before, text = self._decode(self._window[: self._context]), self._decode(self._window)
        whole = len(text.rstrip(_INCOMPLETE))
        if len(self._window) - self._context > held:  # more tokens than what is missing of a character can have
            whole = max(whole, len(text) - held)
        self._extend(text[len(before) + self._taken : whole])
        self._taken = max(self._taken, whole - len(before))
        if len(before) < whole == len(text):  # behind a token without text, a word could lose its space
            self._move_on(len(self._window), len(text) - len(before))
            return
        settled = len(self._window) - held  # tokens before these last ones have no part in a character to come
        if settled > self._context:
            known, left = self._decode(self._window[:settled]), self._window[self._context :]
            context = self._decode(left[: settled - self._context])
            alike = known + self._decode(left).removeprefix(context) == text
            if alike and 0 < len(known) - len(before) <= self._taken:
                self._move_on(settled, len(known) - len(before))

    def _move_on(self, settled: int, characters: int) -> None:
        """The window's tokens up to `settled`, with so many new characters, are its context now."""
        del self._window[: self._context]
        self._context = settled - self._context
        self._taken -= characters

    def _extend(self, new: str) -> None:
        longest = max(map(len, self._stop_strings), default=1)
        start = max(0, len(self.text) - longest + 1)
        self.text += new
        found = [at for at in (self.text.find(stop, start) for stop in self._stop_strings) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ready = len(self.text)
            self.stopped = True
            return
        tails = (self._tail(stop) for stop in self._stop_strings)
        self.ready = len(self.text) - max(tails, default=0)

    def _tail(self, stop: str) -> int:
        """How many of the last characters may be the first ones of `stop`."""
        longest = min(len(stop) - 1, len(self.text))
        return next((size for size in range(longest, 0, -1) if self.text.endswith(stop[:size])), 0)
