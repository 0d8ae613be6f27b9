# SPDX-License-Identifier: Apache-2.0
"""`vmapipe --help` answers at once: it imports no command."""

from __future__ import annotations

import resource
import subprocess
import sys

from tests.machine import VMAPIPE

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
