"""What needs a process of its own: Triton interprets, compiles or believes in an absent GPU, for good."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


# Two processes side by side, of about the same length.
_FIRST = [f"tests/test_{name}.py" for name in ("attention_options", "errors", "kernel_attention")]
INTERPRETED = _FIRST, ["tests", *(f"--ignore={file}" for file in _FIRST)]
_interpreters = []  # processes that `begin` started, each with the file of its report


def begin(session):
    """Starts the interpreted tests, which give way to what runs beside them."""
    if not any(item.function is test_interpreter_suite for item in session.items):
        return
    command = ["nice", sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for files in INTERPRETED:
        report = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [*command, *files], cwd=ROOT, env=environment, stdout=report, stderr=subprocess.STDOUT, text=True
        )
        session.config.add_cleanup(process.kill)
        _interpreters.append((process, report))


@pytest.mark.slow
def test_interpreter_suite():
    """The operators' grids on Triton's kernels, interpreted: at least a hundred tests each, and all of them pass."""
    assert len(_interpreters) == len(INTERPRETED)
    for process, file in _interpreters:
        process.wait()
        file.seek(0)
        report = file.read()
        assert process.returncode == 0, report[-5000:]
        passed = re.search(r"(\d+) passed", report)
        assert passed and int(passed[1]) >= 100, report[-5000:]


def compiling(*arguments):
    """What a Python process writes in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_nothing_compiles_while_serving():
    """Every kernel that caches of either layout need, at any batch size, is among those that `warmup` compiles."""
    pytest.importorskip("triton")
    assert len(re.findall(r"[1-9]\d* compiled, 0 lacking", compiling("tests/identities.py"))) == 36


_KEYS = """
import importlib
import sys

from torch_paged.kernels.launch import settle_key

kernels = {
    name: getattr(importlib.import_module(f"torch_paged.kernels.{module}"), name)
    for module, name in (
        ("attention", "_attention"),
        ("attention_combine", "_combine"),
        ("attention_hopper", "attention_hopper"),
        ("deal_pieces", "deal_pieces"),
    )
}
for kernel in list(kernels.values())[:: int(sys.argv[1])]:
    settle_key(kernel)
print({name: kernel.cache_key for name, kernel in kernels.items()})
"""


def test_what_is_launched_first_decides_nothing():
    """Another process finds in Triton's cache on disk what this one compiled."""
    pytest.importorskip("triton")
    keys = compiling("-c", _KEYS, "1")
    assert "attention_hopper" in keys
    assert keys == compiling("-c", _KEYS, "-1")


_INTERPRET = """
import torch

import torch_paged
from torch_paged import reference, testing

inputs = testing.attention_inputs([2, 3], [9, 5], num_heads=2, num_kv_heads=1, head_dim=16, block_size=4)
inputs = inputs._replace(**{name: getattr(inputs, name).bfloat16() for name in ("query", "key_cache", "value_cache")})
exact = inputs.call(reference.attention)
torch.testing.assert_close(inputs.call(torch_paged.attention), exact, rtol=0.02, atol=0.02)
"""


def test_interpreting_needs_the_variable_alone():
    """Also where none of these tests is loaded."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _INTERPRET], env=environment, check=True)
