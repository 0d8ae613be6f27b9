# SPDX-License-Identifier: Apache-2.0
"""packaging/vmapipe-archiver.service is held against the program that it starts, and for how much it may."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from vmapipe.archiver.main import add_options

ROOT = Path(__file__).parents[3]
UNIT = (ROOT / "packaging" / "vmapipe-archiver.service").read_text(encoding="utf-8")


def setting(name: str) -> str:
    found = re.search(rf"^{name}=((?:.*\\\n)*.*)$", UNIT, re.MULTILINE)
    assert found, name
    return found[1].replace("\\\n", " ")


def test_the_unit_starts_a_service_with_options_that_there_are_and_stops_it_in_time() -> None:
    program, command, *words = shlex.split(setting("ExecStart"))
    assert (program, command) == ("/usr/bin/vmapipe", "archiver")
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(words)
    assert options.directory == setting("ReadWritePaths") == setting("RequiresMountsFor")
    assert options.keys.startswith(setting("ReadOnlyPaths"))
    assert options.stop_timeout + 10 < int(setting("TimeoutStopSec"))
    assert setting("Type") == "notify"


def test_what_a_broken_service_could_do_to_its_host_is_little(
    need: Callable[..., list[str]],
) -> None:
    """By systemd's measure, from 0 to 10; a unit without any of these settings has 9.6."""
    (analyze,) = need("systemd-analyze")
    unit = ROOT / "packaging" / "vmapipe-archiver.service"
    words = [analyze, "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
