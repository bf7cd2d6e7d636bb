"""What needs a process of its own: Triton interprets, compiles or believes in an absent GPU, for good."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


# Two processes side by side, of about the same length.
INTERPRETED = (
    ["tests/test_attention_options.py", "tests/test_errors.py"],
    ["tests", "--ignore=tests/test_attention_options.py", "--ignore=tests/test_errors.py"],
)


@pytest.mark.slow
def test_interpreter_suite():
    """The operators' grids on Triton's kernels, interpreted: at least a hundred tests each, and all of them pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for files in INTERPRETED
    ]
    for process in running:
        report, _ = process.communicate()
        assert process.returncode == 0, report[-5000:]
        passed = re.search(r"(\d+) passed", report)
        assert passed and int(passed[1]) >= 100, report[-5000:]


def test_nothing_compiles_while_serving():
    """Every kernel that caches of either layout need, at any batch size, is among those that `warmup` compiles."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/identities.py"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert len(re.findall(r"[1-9]\d* compiled, 0 lacking", done.stdout)) == 31
