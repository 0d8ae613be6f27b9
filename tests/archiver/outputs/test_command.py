# SPDX-License-Identifier: Apache-2.0
"""exec: the command's end is the archive's end, and its status counts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import leaks
from tests.archiver.outputs.targets import LIMIT_S, in_thread
from vmapipe.archiver.outputs import command
from vmapipe.archiver.outputs.base import OutputFailure
from vmapipe.archiver.outputs.command import CommandOutput
from vmapipe.archiver.outputs.open import open_output
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, UsageError

# More than a pipe holds.
TOO_MUCH = bytes(8 << 20)


def test_the_commit_waits_until_the_command_has_done_all_its_work(tmp_path: Path) -> None:
    output = open_output(f"exec:cat > {tmp_path}/a; sleep 0.2; touch {tmp_path}/done")
    output.write([TOO_MUCH])
    output.commit()
    assert (tmp_path / "a").read_bytes() == TOO_MUCH
    assert (tmp_path / "done").exists()


def test_a_failed_command_fails_the_commit_with_its_status() -> None:
    output = open_output("exec:cat >/dev/null; exit 3")
    output.write([TOO_MUCH])
    with pytest.raises(OutputFailure) as caught:
        output.commit()
    assert str(caught.value) == "exec:cat >/dev/null; exit 3 ended with exit status 3"
    output.abandon()


def test_a_killed_command_fails_the_commit_with_its_signal() -> None:
    output = open_output("exec:cat >/dev/null; kill -9 $$")
    output.write([b"data"])
    with pytest.raises(OutputFailure, match=r"\$\$ was killed by SIGKILL$"):
        output.commit()
    output.abandon()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("exit 7", "ended with exit status 7"),
        ("exit 0", "ended with exit status 0"),
        ("kill -TERM $$", "was killed by SIGTERM"),
    ],
)
def test_a_command_that_ends_too_early_is_named_with_its_end(end: str, words: str) -> None:
    output = open_output(f"exec:head -c 1000 >/dev/null; {end}")
    with pytest.raises(OutputFailure) as caught:
        output.write([TOO_MUCH])
    assert f"{words} after" in str(caught.value)
    assert str(caught.value).endswith(", before the archive's end")
    output.abandon()


def test_a_command_that_cannot_be_found_is_an_error_of_the_shell() -> None:
    output = open_output("exec:/no/such/program 2>/dev/null")
    with pytest.raises(OutputFailure, match="ended with exit status 127"):
        output.write([TOO_MUCH])
    output.abandon()


def test_a_shell_that_is_killed_fails_the_write_though_its_pipeline_still_reads() -> None:
    for words in ("sleep 1000 | cat; exit 0", "cat | cat >/dev/null"):
        one = CommandOutput(words)
        shell = _shell(words)
        shell.kill()
        _wait_for(lambda shell=shell: shell.status() == psutil.STATUS_ZOMBIE)  # type: ignore[misc]
        with pytest.raises(OutputFailure, match=r"was killed by SIGKILL after 0 bytes, before"):
            one.write([b"data"])
        one.abandon()


def test_a_command_that_closes_its_input_and_lives_on_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "STATUS_WAIT_S", 0.05)
    output = open_output("exec:exec sleep 1000 </dev/null")
    with pytest.raises(OutputFailure, match="has closed its standard input after"):
        output.write([TOO_MUCH])
    output.abandon()


def test_a_command_that_does_not_end_is_an_error_in_the_end() -> None:
    output = CommandOutput("cat >/dev/null; sleep 1000", end_wait_s=0.1)
    with pytest.raises(OutputFailure, match=r"has not ended 0\.1 s after the end of the archive"):
        output.commit()
    output.abandon()


@pytest.mark.parametrize("how", ["abandon", "cancel"])
def test_waiting_for_the_commands_end_can_be_ended(how: str) -> None:
    cancel = Cancel()
    words = "cat >/dev/null; exec sleep 1000"
    output = CommandOutput(words, cancel=cancel)
    shell = _shell(words)
    with in_thread(output.commit) as errors:
        # The command has read its input to the end: the commit waits now.
        _wait_for(lambda: shell.pid in _sleeping())
        if how == "abandon":
            output.abandon()
        else:
            cancel.ask("cancelled by a test")
    assert [type(error) for error in errors] == [OutputFailure if how == "abandon" else Cancelled]
    output.abandon()
    cancel.close()


def test_an_abandoned_command_never_sees_the_end_of_its_input(tmp_path: Path) -> None:
    # A command that does would take half an archive for a whole one.
    done = tmp_path / "done"
    output = open_output(f"exec:cat >/dev/null; touch {done}")
    output.write([b"half an archive"])
    output.abandon()
    assert not done.exists()


def test_a_command_that_does_not_mind_being_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "INT_WAIT_S", 0.05)
    monkeypatch.setattr(command, "TERM_WAIT_S", 0.05)
    ready, done = tmp_path / "ready", tmp_path / "done"
    output = open_output(f"exec:trap '' INT TERM; touch {ready}; cat >/dev/null; touch {done}")
    _wait_for(ready.exists)
    output.abandon()
    assert not done.exists()


@pytest.mark.parametrize(
    "traps", ["trap 'touch {}; exit 1' INT", "trap 'touch {}; exit 1' TERM; trap : INT"]
)
def test_an_abandoned_command_may_tidy_up_at_sigint_or_else_at_sigterm(
    traps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "INT_WAIT_S", LIMIT_S if "TERM" not in traps else 0.05)
    monkeypatch.setattr(command, "TERM_WAIT_S", LIMIT_S)  # however slow the machine
    ready, tidied = tmp_path / "ready", tmp_path / "tidied"
    script = f"{traps.format(tidied)}; touch {ready}; sleep 1000 & while :; do wait; done"
    output = open_output(f"exec:{script}")
    _wait_for(ready.exists)
    output.abandon()
    assert tidied.exists()


def test_abandoning_ends_every_process_of_a_pipeline(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    output = open_output(f"exec:(echo $$ >> {pids}; exec cat) | (cat; sleep 1000) >/dev/null")
    _wait_for(pids.exists)
    family = leaks.child_processes()
    output.abandon()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []


def test_what_the_command_says_goes_to_standard_error() -> None:
    program = (
        "from vmapipe.archiver.outputs.open import open_output;"
        "output = open_output('exec:echo hello; cat >/dev/null'); output.commit()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"hello\n")


def test_the_command_inherits_nothing_but_its_input(tmp_path: Path) -> None:
    extra = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(extra, True)
    listed = tmp_path / "listed"
    output = open_output(f"exec:cat >/dev/null; ls /proc/self/fd > {listed}")
    output.commit()
    os.close(extra)
    # 0 to 2, and that of the folder which is listed.
    assert listed.read_text().split() == ["0", "1", "2", "3"]


def test_the_command_gets_the_usual_signals_back() -> None:
    # Python ignores SIGPIPE; a pipeline relies on it.
    output = open_output("exec:cat >/dev/null; yes | head -n 1 >/dev/null; kill -PIPE $$; exit 0")
    with pytest.raises(OutputFailure, match="was killed by SIGPIPE"):
        output.commit()
    output.abandon()


@pytest.mark.parametrize("spec", ["exec:", "exec:  ", "exec:a\0b"])
def test_a_command_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        open_output(spec)


def _shell(words: str) -> psutil.Process:
    """The shell that runs this command, which a test has just started."""
    (shell,) = (each for each in leaks.children() if each.cmdline()[-1:] == [words])
    return shell


def _sleeping() -> set[int]:
    found = set()
    for child in leaks.children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "sleep":
                found.add(child.pid)
    return found


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
