"""Text from tokens as they come: whole characters only, and an end where a stop string begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders give for the first bytes of a longer character


class TextStop:
    """The text of a growing list of tokens, up to the first of the stop strings.

    Tokens are decoded in a window that moves on with every token that completes a character, so that a long text
    costs no more a token than a short one. The window reaches one such token back, because tokenizers write the
    first word without its space. What may be the beginning of a stop string is held back from `ready`:

        stop strings ["END"], text "the EN"    ready 4

    Attributes:
        text: so far; without the stop string, once stopped.
        ready: characters of it that will not be taken back.
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str]) -> None:
        self._decode = decode
        self._stop_strings = stop_strings
        self._window: list[int] = []
        self._context = 0  # tokens of the window whose text is in `text` already
        self.text = ""
        self.ready = 0
        self.stopped = False

    def feed(self, token: int) -> bool:
        """Append a token; True once a stop string came."""
        self._window.append(token)
        before = self._decode(self._window[: self._context])
        text = self._decode(self._window)
        if not text.endswith(_INCOMPLETE):
            self._extend(text[len(before) :])
            del self._window[: self._context]
            self._context = len(self._window)
        return self.stopped

    def finish(self) -> None:
        """No token follows: all of the text is ready, broken characters too."""
        if not self.stopped:
            before = self._decode(self._window[: self._context])
            self._extend(self._decode(self._window)[len(before) :])
            del self._window[: self._context]
            self._context = len(self._window)
        self.ready = len(self.text)

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
