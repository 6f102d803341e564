"""Every command of the README is understood; tests/e2e runs most of them for real, on a tiny model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^(?:\$ )?uv run (.+?)(?:  #.*)?$", README, re.MULTILINE)


def test_the_readme_has_commands():
    assert {"wf", "python", "pytest"} <= {command.split()[0] for command in COMMANDS}
    assert re.search(r"^=+ \d+ passed.* in ", README, re.MULTILINE)  # real output, not a placeholder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_is_understood(command):
    program, *words = shlex.split(command)
    if program == "pytest":
        return
    if program == "wf":
        arguments = ["-m", "wf_deployer", *words, *([] if words[0] == "doctor" else ["--dry-run"])]
    else:
        assert program == "python"
        arguments = [*words, "--cfg"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_python_of_the_readme_names_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        exec("\n".join(line for line in block.splitlines() if line.startswith(("from ", "import "))), {})
