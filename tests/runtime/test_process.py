# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong, the user sees one line and the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Damaged, Failure, UsageError
from vmapipe.runtime.process import failure_of, run
from vmapipe.vma.errors import HeaderError, LimitError


def failing(error: BaseException) -> int:
    def work() -> None:
        raise error

    return run("vmapipe test", work)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Failure("it broke"), 1, "it broke"),
        (UsageError("no such thing"), 2, "no such thing"),
        (Damaged("3 things"), 4, "3 things"),
        (Cancelled("cancelled by SIGTERM", 15), 143, "cancelled by SIGTERM"),
        (LimitError("too many drives"), 1, "too many drives"),
        (HeaderError("bad", offset=7), 1, "bad (archive offset 7)"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "/x: No such file"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "No space left on device: where our output goes, or in the folder for temporary files "
            "(TMPDIR, else /tmp)",
        ),
        (Failure("x\x1b[2Jy\nz"), 1, "x\\x1b[2Jy\\nz"),
        (KeyboardInterrupt(), 130, "cancelled by SIGINT"),
        (MemoryError(), 1, "out of memory (see ulimit -v, and MemoryMax= of systemd)"),
        (
            RuntimeError("can't start new thread"),
            1,
            "no more threads can be started here (see ulimit -u and -v, and TasksMax= of systemd)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_user_can_cause_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == f"vmapipe test: {line}\n"


def test_a_folder_that_was_removed_meanwhile_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run("vmapipe test", lambda: print(os.path.abspath("vm.vma"))) == 1
    assert "has been removed: change to another one (cd)" in capsys.readouterr().err


def test_a_defect_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
    assert failure_of(ValueError("x")) is None


def test_work_that_ends_well_is_exit_code_0() -> None:
    assert run("vmapipe test", lambda: None) == 0


def test_the_first_reason_to_stop_counts_and_wakes_whoever_waits() -> None:
    cancel = Cancel()
    try:
        assert not cancel.asked
        cancel.check()
        waiter = threading.Thread(target=lambda: os.read(cancel.fd, 1))
        waiter.start()
        cancel.ask("first", signal.SIGTERM)
        cancel.ask("second")
        waiter.join(60)
        assert not waiter.is_alive()
        with pytest.raises(Cancelled, match="first") as caught:
            cancel.check()
        assert caught.value.exit_code == 143
    finally:
        cancel.close()


def leaving(work: str, stdout: str = "") -> subprocess.CompletedProcess[str]:
    """A process that leaves after `work`, an expression."""
    code = f"import sys, vmapipe.runtime.process as p; p.leave('vmapipe', lambda: {work})"
    with open(stdout or os.devnull, "w") as target:
        return subprocess.run(
            [sys.executable, "-c", code],
            stdout=target if stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )


@pytest.mark.parametrize(
    ("work", "code"), [("4", 4), ("None", 0), ("sys.exit(2)", 2), ("sys.exit('no')", 1)]
)
def test_a_process_that_leaves_has_the_exit_code_of_its_work(work: str, code: int) -> None:
    assert leaving(work).returncode == code


def test_what_waits_in_stdout_is_written_before_a_process_leaves() -> None:
    assert leaving("print('last words')").stdout == "last words\n"


def test_who_leaves_with_words_that_could_not_be_written_has_failed() -> None:
    assert leaving("print('last words')", "/dev/full").returncode == 1


def test_a_defect_is_shown_whole_by_a_process_that_leaves() -> None:
    done = leaving("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


PROGRAM = """
import os, threading
from vmapipe.runtime.process import lower_priority

def tell():
    print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_BATCH)

lower_priority()
thread = threading.Thread(target=tell)
thread.start()
thread.join()
"""


def told(*prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.strip()


def test_the_threads_of_a_process_that_stands_back_are_low_and_do_not_interrupt_others() -> None:
    assert told() == f"{max(5, os.getpriority(os.PRIO_PROCESS, 0))} True"


def test_who_was_lower_already_stays_there() -> None:
    assert told("nice", "-n", "15").startswith(f"{min(19, 15 + os.getpriority(0, 0))} ")


# From what Python itself needs to what each command needs; not each MiB, for the time that it takes.
MEMORY_MIB = (18, 28, 38, 50)


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "vmapipe.control.main", "verify", "ARCHIVE"),
        ("-m", "vmapipe.control.main", "backup", "--quiet", "--disk", "d=DISK", "NEW"),
        ("-m", "vmapipe.control.main", "restore", "ARCHIVE", "NEW"),
        ("-m", "vmapipe.control.cli.vma", "verify", "ARCHIVE"),
    ],
    ids=lambda words: f"{words[1][16:]}-{words[2]}",
)
def test_a_limit_of_address_space_is_one_line_whatever_it_is(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    disk = tmp_path / "DISK"
    disk.write_bytes(bytes(range(256)) * 256)
    good = [sys.executable, "-P", "-m", "vmapipe.control.main", "backup", "--quiet"]
    made = [*good, "--disk", f"d={disk}", str(tmp_path / "ARCHIVE")]
    subprocess.run(made, check=True, timeout=60)
    for mib in MEMORY_MIB:
        named = [
            word.replace("DISK", str(disk))
            .replace("NEW", str(tmp_path / f"new{mib}"))
            .replace("ARCHIVE", str(tmp_path / "ARCHIVE"))
            for word in words
        ]
        done = subprocess.run(
            ["prlimit", f"--as={mib << 20}", sys.executable, "-P", *named],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, 1), (mib, done)
        if done.returncode:
            assert len(done.stderr.splitlines()) == 1, (mib, done.stderr)
            assert done.stderr.startswith(("vmapipe", "vma")), (mib, done.stderr)
            assert not (tmp_path / f"new{mib}").is_file()
