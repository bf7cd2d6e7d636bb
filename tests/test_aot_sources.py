"""What names the sources of a report changes with all that a compiler sees, and with nothing else."""

import os
from datetime import date
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels: run without TRITON_INTERPRET=1", allow_module_level=True)

import aot
import aot_calls as calls
import aot_report
import aot_sources
from imported_names import PACKAGE, imported

CODE = """
FACTOR = 2

def kernel(x, tile=8):
    return FACTOR * x
"""
CHANGES = {
    "constant": ("FACTOR = 2", "FACTOR = 3", True),
    "default": ("tile=8", "tile=16", True),
    "operator": ("FACTOR * x", "FACTOR + x", True),
    "name": ("kernel(x", "_kernel(x", True),
    "line": ("def", "\n\ndef", False),
    "comment": ("def", "# Twice.\ndef", False),
    "docstring": ("    return", '    """Twice `x`."""\n    return', False),
    "layout": ("FACTOR * x", "(\n        FACTOR * x\n    )", False),
}


@pytest.mark.parametrize(("before", "after", "matters"), CHANGES.values(), ids=CHANGES)
def test_digest_of_sources(before, after, matters, tmp_path):
    changed = tmp_path / "changed" / "kernel.py"
    changed.parent.mkdir()
    changed.write_text(CODE.replace(before, after))
    plain = tmp_path / "kernel.py"
    plain.write_text(CODE)
    digests = {aot_sources.digest("sm_80", (file,)) for file in (plain, changed)}
    assert (len(digests) == 2) == matters
    assert aot_sources.digest("sm_90", (plain,)) not in digests


def test_sources_import_nothing_else_of_ours():
    for file in aot_sources.FILES:
        for name in imported(file):
            places = [root / name.replace(".", "/") for root in (PACKAGE.parent, Path(aot.__file__).parent)]
            ours = {path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")}
            assert {path for path in ours if path.exists()} <= set(aot_sources.FILES), name


@pytest.mark.parametrize(
    ("sources", "of_today", "known"),
    [("same", False, True), ("same", True, False), ("other", False, False)],
    ids=["known", "compiled-today", "other-sources"],
)
def test_report_knows_a_launch(sources, of_today, known, tmp_path):
    name, variant = next(iter(calls.shipped("sm_80").items()))
    multiple = aot_report.ONE_IN * 10**9 - date.today().toordinal()
    kernels = [
        aot.Kernel(of, "", f"{multiple + rest:016x}", 64, 1024, 2, 2, {"all": 500}, 0, 0, 1)
        for of, rest in (("_attention", 1), ("_combine", 0 if of_today else 2))
    ]
    digest = aot_sources.digest("sm_80") if sources == "same" else "0"
    aot_report.write("sm_80", digest, [(name, kernel) for kernel in kernels], tmp_path)
    expected = {(calls.attention_launch, variant): kernels} if known else {}
    assert aot_report.launched("sm_80", tmp_path) == expected
    assert list(aot_report.read("sm_80", tmp_path).values()) == kernels


def test_a_report_without_one_of_the_figures_is_as_good_as_none(tmp_path):
    kernel = aot.Kernel("_attention", "", "0" * 16, 64, 1024, 2, 2, {"all": 500}, 0, 0, 1)
    aot_report.write("sm_80", "0", [("any", kernel)], tmp_path / "whole")
    whole = (tmp_path / "whole" / "sm_80.csv").read_text()
    (tmp_path / "sm_80.csv").write_text(whole.replace("waits_first", "another"))
    assert aot_report.read("sm_80", tmp_path / "whole") == {kernel.ir: kernel}
    assert aot_report.read("sm_80", tmp_path) == {}
