"""The text: the source of Python's own standard library, which every machine with an interpreter has.

It is under the PSF licence, which allows this use.
"""

import sysconfig
from pathlib import Path

from model import END_OF_TEXT

STDLIB = Path(sysconfig.get_path("stdlib"))

# Never trained on: the validation text, and the prompts of generate.py.
HELD_OUT = (
    "asyncio/queues.py",
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "contextlib.py",
    "fileinput.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "mailbox.py",
    "queue.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "wave.py",
    "zipapp.py",
)

# Others' packages, and tables and test data that are hardly code.
SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3", "tokenizedata"}
TESTS = {"test", "tests", "idle_test"}


def read(paths: list[Path]) -> bytes:
    """The files one after another, `END_OF_TEXT` before each and at the end."""
    end = bytes([END_OF_TEXT])
    return end + b"".join(path.read_bytes() + end for path in paths)


def validation_text(stdlib: Path = STDLIB) -> bytes:
    return read([stdlib / name for name in HELD_OUT if (stdlib / name).exists()])


def training_text(stdlib: Path = STDLIB) -> bytes:
    """Every other file in a fixed order, the library twice and its tests once (they are twice as long)."""
    held_out = {stdlib / name for name in HELD_OUT}
    paths = [path for path in sorted(stdlib.rglob("*.py")) if path not in held_out]
    parts = {path: set(path.relative_to(stdlib).parts) for path in paths}
    tests = [path for path in paths if parts[path] & TESTS and not parts[path] & SKIPPED]
    library = [path for path in paths if not parts[path] & (TESTS | SKIPPED)]
    return read(library + library + tests)
