"""Imports run one way, and the package loads cold without Triton, quickly."""

import ast
import graphlib
import subprocess
import sys

import pytest
from imported_names import PACKAGE, imported

# Who may import whom within the package; a name stands for a file or a folder. Everything else is forbidden.
ALLOWED = {
    "__init__": {"batch", "cache", "functional", "layers", "memory", "quantise", "warming"},
    "functional": {"ops"},
    "warming": {"checks", "memory", "ops"},
    "ops": {"bounds", "checks", "guard", "options"},  # and, by name, cpu and kernels on first use
    "checks": {"matching", "options"},
    "matching": set(),
    "bounds": set(),
    "guard": set(),
    "cache": {
        "batch",
        "capacity",
        "functional",
        "layers",
        "layout",
        "memory",
        "options",
        "quantise",
        "staging",
        "steps",
        "swapping",
        "token_feed",
        "transfer",
        "untraced",
    },
    "steps": {"batch", "functional", "memory", "staging", "token_feed"},
    "swapping": {"memory", "transfer"},
    "layout": {"memory", "options", "storage"},
    "capacity": {"memory"},
    "storage": set(),
    "layers": {"batch", "functional", "options"},
    "staging": {"batch", "memory", "uploads"},
    "uploads": set(),
    "token_feed": {"memory"},
    "transfer": {"functional", "memory"},
    "batch": set(),
    "untraced": set(),
    "memory": set(),
    "options": set(),
    "cpu": {"options"},
    "kernels": {"options"},
    "quantise": {"functional", "options"},
    "reference": set(),
    "testing": set(),
    "serving": {"batch", "cache", "memory"},
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = room(path)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("torch_paged.")}
    assert own - {here} <= ALLOWED[here]
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"torch_paged"}
    assert outside <= {"memory": {"numpy"}, "kernels": {"torch", "triton", "numpy"}}.get(here, {"torch", "numpy"})


def test_no_circles():
    """No file needs one that needs it, for types neither: `prepare` raises CycleError and names the circle."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    files = set(names.values())
    needs = {}
    for path, name in names.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        pairs = [(node.module, f"{node.module}.{alias.name}") for node in nodes for alias in node.names]
        needs[name] = {inner if inner in files else outer for outer, inner in pairs} & files
    assert "torch_paged.memory.records" in needs["torch_paged.memory.manager"]
    graphlib.TopologicalSorter(needs).prepare()


def test_scheduling_knows_no_torch():
    host = {"random_numbers", "requests", "text", "waiting", "residents", "plan", "scheduler", "stream", "writers"}
    for name in host:
        modules = set(imported(PACKAGE / "serving" / f"{name}.py"))
        assert not any(module.split(".")[0] == "torch" for module in modules)
        own = {module.split(".")[2] for module in modules if module.startswith("torch_paged.serving.")}
        assert own <= host


def test_cold_import_without_triton():
    """No triton, no compiler, under 0.3 s more than torch itself (three times that on a busy machine)."""
    script = (
        "import sys, time; sys.modules['triton'] = None; import torch; start = time.perf_counter();"
        "import torch_paged; took = time.perf_counter() - start;"
        "assert took < 0.9, took; assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules);"
        "q = torch.randn(2, 4, 32); kv = torch.randn(3, 4, 2, 32);"
        "print(torch.ops.paged.attention(q, kv, kv, torch.zeros(2, 1, dtype=torch.int32),"
        "torch.ones(2, dtype=torch.int32)).shape)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[2, 4, 32]" in done.stdout
