"""What keeps kernels readable: few parameters, and a formula or a picture of the grid."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "torch_paged" / "kernels"


def kernel_functions():
    """Every function in `kernels` that Triton compiles, and whether it is one that is launched."""
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in map(ast.unparse, node.decorator_list):
                    if decorator.startswith(("triton.jit", "gluon.jit")):
                        yield pytest.param(node, "do_not_specialize" in decorator, id=f"{path.stem}-{node.name}")


FUNCTIONS = list(kernel_functions())


@pytest.mark.parametrize(("function", "launched"), FUNCTIONS)
def test_functions_read_well(function, launched):
    of = function.args
    assert len(of.posonlyargs + of.args + of.kwonlyargs) <= 25
    docstring = ast.get_docstring(function) or ""
    if launched and function.name != "deal_pieces":  # whose grid is that of the kernel which takes its pieces
        assert "grid" in docstring.lower()


def test_every_launched_kernel_is_seen():
    launched = {parameter.values[0].name for parameter in FUNCTIONS if parameter.values[1]}
    assert {"_attention", "attention_hopper", "_combine", "_append", "_merge_attention", "_move_blocks"} <= launched
    assert len(launched) == 10
