"""README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs_as_printed(capsys):
    loop, prefixes, serving, operators = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(loop, str(README), "exec"), names)
    assert "tokens=56" in capsys.readouterr().out  # prompts of 11 and 7, then 19 tokens each
    exec(compile(prefixes, str(README), "exec"), names)
    assert capsys.readouterr().out == "48\n"
    exec(compile(serving, str(README), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[-1] in ("length", "stop")
    assert len(names["engine"].run([])) == 0  # the others, to their ends
    assert all(len(sample.written) == 30 for other in names["others"] for sample in other.samples)
    exec(compile(operators, str(README), "exec"), names)
    assert capsys.readouterr().out == "torch.Size([2, 8, 64])\n"
