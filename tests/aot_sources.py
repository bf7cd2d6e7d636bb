"""One digest of all that shipped kernels are compiled from and by: while it stays, so does their machine code.

What is left out says nothing to a compiler: comments, docstrings, where a line stands. Versions of Python agree on it.
"""

import ast
import functools
import hashlib
from pathlib import Path
from typing import Any

import aot
import aot_calls

import torch_paged

_PACKAGE = Path(torch_paged.__file__).parent
# Launches and what they decide, too. `test_imports` sees to it that kernels need nothing else of the package.
FILES = (
    *sorted((_PACKAGE / "kernels").rglob("*.py")),
    _PACKAGE / "options.py",
    Path(aot_calls.__file__),
    Path(aot.__file__),
)


def digest(target: str, files: tuple[Path, ...] = FILES) -> str:
    """Names the code in `files` and the compiler of `target`."""
    return hashlib.sha256("\n".join((aot.compiler(target), *_code(files))).encode()).hexdigest()[:16]


@functools.cache
def _code(files: tuple[Path, ...]) -> list[str]:
    return [f"{path.name}: {_plain(ast.parse(path.read_text()))}" for path in files]


def _plain(node: Any) -> Any:
    """A syntax tree as tuples and lists, without what is empty: versions of Python differ in fields that few use."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.AST):
        fields = sorted((name, value) for name, value in vars(node).items() if name in node._fields)
        return type(node).__name__, [(name, _plain(value)) for name, value in fields if value not in (None, [])]
    return node


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
