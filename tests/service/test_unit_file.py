# SPDX-License-Identifier: Apache-2.0
"""packaging/vmapipe-archiver.service is held against the program that it starts."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from vmapipe.archiver.main import add_options

ROOT = Path(__file__).parents[2]
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
