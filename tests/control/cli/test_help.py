# SPDX-License-Identifier: Apache-2.0
"""What `--help` says, how it fits a terminal, and that it answers at once: it imports no command."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from tests.machine import LIMIT_S, VMAPIPE, good, run
from vmapipe.control.main import COMMANDS

# Measured: 2.1 times an empty Python; `backup --help`, which imports its command, takes 6.8 times.
_MOST = 4.5


def _cpu_s(*argv: str) -> float:
    """The least processor time of five runs."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_the_help_takes_a_few_times_as_long_as_an_empty_python() -> None:
    ratio = _cpu_s(*VMAPIPE, "--help") / _cpu_s(sys.executable, "-c", "pass")
    assert ratio < _MOST, ratio


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_prose_of_the_help_fits_a_terminal_of_80_columns(command: str) -> None:
    text = good(command, "--help", env={**os.environ, "COLUMNS": "80"}).decode()
    # Above and below the options; examples and tables are indented, and a title keeps its line.
    prose = [line for line in text.splitlines() if line and not line.startswith((" ", "usage:"))]
    assert [line for line in prose if len(line) > 80 and not line.endswith(":")] == []


def test_the_help_is_shown_where_the_terminals_encoding_lacks_a_letter_of_it() -> None:
    """`restore --help` has an ellipsis, which ISO 8859-1 does not."""
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = run("restore", "--help", env=environ, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"'ssh-ed25519 \\u2026'" in done.stdout


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("bakup", "there is no command 'bakup': did you mean backup?"),
        ("--compress", "there is no option '--compress' (see vmapipe --help)"),
        ("a\nb", "there is no command 'a\\nb' (see vmapipe --help)"),
    ],
)
def test_a_wrong_command_is_told_in_one_line_with_the_one_that_is_like_it(
    word: str, answer: str
) -> None:
    done = run(word, "--help")
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert answer in line
