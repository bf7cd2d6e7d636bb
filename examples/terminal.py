"""How the examples talk: a line that rewrites itself, dim prompts, bright completions. Plain lines when piped."""

import sys
import time

DIM, BRIGHT, RESET, ERASE = "\x1b[2m", "\x1b[1m", "\x1b[0m", "\r\x1b[K"
BAR = 30


class Terminal:
    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")
        self.live = sys.stdout.isatty()
        self.start = time.monotonic()
        self.stage = ""

    def progress(self, share: float, stage: str, text: str) -> None:
        """On a terminal, rewrites the line; elsewhere, prints one for every new stage."""
        bar = "#" * round(share * BAR)
        line = f"{time.monotonic() - self.start:5.1f} s  [{bar:.<{BAR}}]  {stage}: {text}"
        if self.live:
            print(f"{ERASE}{line}", end="", flush=True)
        elif stage != self.stage:
            print(line, flush=True)
        self.stage = stage

    def completions(self, title: str, prompt: bytes, texts: list[bytes]) -> None:
        """Shows the prompt's last lines, and each text that was written after them."""
        before, dim, bright, reset = (ERASE, DIM, BRIGHT, RESET) if self.live else ("", "", "", "")
        shown = printable(prompt.rpartition(b"\n\n")[2])
        print(f"{before}\n--- {title}\n{dim}{shown}{reset}", end="")
        for text in texts:
            print(f">>> {bright}{printable(text.rstrip())}{reset}")

    def table(self, rows: list[tuple[str, str]]) -> None:
        width = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def positive(text: str) -> int:
    """An integer of the command line, at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def printable(text: bytes) -> str:
    """Decoded, without what could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.decode(errors="replace"))
