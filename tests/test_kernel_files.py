"""What keeps kernels readable: few parameters, and a formula or a picture of the grid."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "torch_paged" / "kernels"


def is_compiled(node):
    """Whether Triton compiles this function."""
    decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
    return any(decorator.startswith(("triton.jit", "gluon.jit")) for decorator in decorators)


def names(nodes):
    return {it.id for node in nodes for it in ast.walk(node) if isinstance(it, ast.Name)}


STATEMENTS = {path.stem: ast.parse(path.read_text()).body for path in sorted(KERNELS.glob("*.py"))}
FUNCTIONS = {(file, node.name): node for file, body in STATEMENTS.items() for node in body if is_compiled(node)}
NAMES = {name for _, name in FUNCTIONS}
LAUNCHED = NAMES - names(statement for function in FUNCTIONS.values() for statement in function.body)


@pytest.mark.parametrize("function", [pytest.param(node, id="-".join(key)) for key, node in FUNCTIONS.items()])
def test_functions_read_well(function):
    of = function.args
    assert len(of.posonlyargs + of.args + of.kwonlyargs) <= 25
    docstring = ast.get_docstring(function) or ""
    if function.name in LAUNCHED:
        assert "grid" in docstring.lower()


def test_every_launched_kernel_is_seen():
    """They are what no kernel calls: code that Triton does not compile names each."""
    host = names(node for body in STATEMENTS.values() for node in body if not is_compiled(node))
    assert {"_attention", "attention_hopper", "_combine", "_append", "_merge_attention"} <= LAUNCHED <= host
