# SPDX-License-Identifier: Apache-2.0
"""The units of packaging/, looked at by systemd itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.machine import LIMIT_S

PACKAGING = Path(__file__).parents[3] / "packaging"
TIMER = (PACKAGING / "vmapipe-backup@.timer").read_text()


def test_systemd_finds_nothing_wrong_with_our_units(
    need: Callable[..., list[str]], tmp_path: Path
) -> None:
    analyze, true = need("systemd-analyze", "true")
    units = []
    for unit in sorted(PACKAGING.glob("vmapipe-*")):
        # A template is looked at as what it becomes for a machine.
        copy = tmp_path / unit.name.replace("@.", "@vm100.")
        copy.write_text(unit.read_text().replace("/usr/bin/vmapipe", true))
        units.append(str(copy))
    # A single unit that is not found would be a test of nothing.
    assert len(units) == len(list(PACKAGING.glob("*.service"))) + len(
        list(PACKAGING.glob("*.timer"))
    )
    assert len(units) >= 7
    # Whether our manual pages are installed here is another question.
    done = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")


def test_the_timer_is_due_every_night(need: Callable[..., list[str]]) -> None:
    (analyze,) = need("systemd-analyze")
    (calendar,) = [line.partition("=")[2] for line in TIMER.splitlines() if "OnCalendar" in line]
    words = [analyze, "calendar", "--iterations=2", calendar]
    told = subprocess.run(words, capture_output=True, timeout=LIMIT_S, check=True).stdout.decode()
    assert "Normalized form: *-*-* 02:00:00" in told
