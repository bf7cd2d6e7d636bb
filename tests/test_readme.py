"""README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_decode_loop_runs_as_printed(capsys):
    (loop,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(loop, str(README), "exec"), {})
    assert "tokens=56" in capsys.readouterr().out  # prompts of 11 and 7, then 19 tokens each
