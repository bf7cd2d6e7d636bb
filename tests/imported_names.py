"""What the files of the package import."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "torch_paged"


def imported(path):
    """Dotted names of every import in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "torch_paged":
                yield from (f"torch_paged.{alias.name}" for alias in node.names)
