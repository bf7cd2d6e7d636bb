"""README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs_as_printed(capsys):
    loop, prefixes = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(loop, str(README), "exec"), names)
    assert "tokens=56" in capsys.readouterr().out  # prompts of 11 and 7, then 19 tokens each
    exec(compile(prefixes, str(README), "exec"), names)
    assert capsys.readouterr().out == "48\n"
