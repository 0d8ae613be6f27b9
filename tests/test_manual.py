# SPDX-License-Identifier: Apache-2.0
"""Manual pages and completions, as `make man` builds them from the option tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, good
from vmapipe.control.main import COMMANDS, DESCRIPTION

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    words = [sys.executable, str(ROOT / "scripts" / "manual"), str(folder)]
    subprocess.run(words, check=True, timeout=LIMIT_S)
    return folder


def test_each_command_has_a_page_with_all_its_options(built: Path) -> None:
    pages = {path.stem for path in (built / "man" / "man1").iterdir()}
    assert pages == {"vma", "vmapipe", *(f"vmapipe-{command}" for command in COMMANDS)}
    for command in COMMANDS:
        page = (built / "man" / "man1" / f"vmapipe-{command}.1").read_text().replace("\\-", "-")
        for word in good(command, "--help").decode().split():
            if word.startswith("--") and word.strip("-,.;:)").isalpha() and word != "--help":
                assert word.strip(",.;:)") in page, (command, word)
        assert "exit codes" in page or "example" in page


def test_troff_has_nothing_to_complain_of(built: Path, need: Callable[..., list[str]]) -> None:
    (groff,) = need("groff")
    for page in sorted((built / "man" / "man1").iterdir()):
        words = [groff, "-man", "-ww", "-z", "-Kutf8", "-Tutf8", str(page)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
        assert (done.returncode, done.stderr) == (0, ""), page.name


def test_completion_in_bash_knows_commands_and_options(built: Path) -> None:
    script = (built / "completions" / "vmapipe").read_text()
    for word in (*COMMANDS, "--keep-daily", "--hook", "--watch"):
        assert word in script
    subprocess.run(["bash", "-n"], input=script.encode(), check=True, timeout=LIMIT_S)


def test_the_first_page_names_every_command() -> None:
    named = [line.split()[0] for line in DESCRIPTION.splitlines() if line.startswith("  ")]
    assert sorted(named) == sorted(COMMANDS)
