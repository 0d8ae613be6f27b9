# SPDX-License-Identifier: Apache-2.0
"""Disks to back up, and vmapipe's commands run as a user runs them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from tests.copies import Copies
from vmapipe.control.coordinator.job_client import JobClient
from vmapipe.control.coordinator.status_socket import sockets
from vmapipe.control.main import COMMANDS
from vmapipe.runtime.errors import Failure

VMAPIPE = (sys.executable, "-P", "-m", "vmapipe.control.main")
VMA = (sys.executable, "-P", "-m", "vmapipe.control.cli.vma")
#: No command of these tests takes longer, however slow the machine.
LIMIT_S = 90.0


# The fixture of that name, in conftest.py.
Need = Callable[..., list[str]]


def make_disk(path: Path, pattern: str, tail_bytes: int = 65536, seed: int = 1) -> Path:
    """A disk image, a letter a cluster: `A` random, `0` zeroes, `h` a hole, `p` one block.

    The last cluster has `tail_bytes` bytes.
    """
    chance = random.Random(seed)
    with path.open("wb") as disk:
        for index, letter in enumerate(pattern):
            disk.seek(index * 65536)
            match letter:
                case "A":
                    disk.write(chance.randbytes(65536))
                case "0":
                    disk.write(bytes(65536))
                case "p":
                    disk.seek(7 * 4096 + 5, os.SEEK_CUR)
                    disk.write(b"p")
        disk.truncate((len(pattern) - 1) * 65536 + tail_bytes)
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(
    *words: str | Path, tool: Sequence[str] = VMAPIPE, as_patched: bool = False, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; never raises for its exit code.

    Ours run in a copy of a process, without the half second that Python takes to start, unless
    `more` asks for what only a new process has, or the variable VMAPIPE_TESTS_EXEC is set.
    `as_patched`: what the test has replaced in our modules is replaced in the command.
    """
    entry = _ENTRIES.get(tuple(tool))
    if as_patched or (entry is not None and more.keys() <= _FOR_A_COPY and not ALWAYS_NEW):
        return _run_in_copy(entry or "", [*map(str, words)], as_patched=as_patched, **more)
    options: dict[str, Any] = {"capture_output": True, "timeout": LIMIT_S, **more}
    if "stdout" in more or "stderr" in more:
        options.pop("capture_output")
    return subprocess.run([*tool, *map(str, words)], check=False, **options)


# The modules whose `main` the tools are.
_ENTRIES: dict[tuple[str, ...], str] = {
    VMAPIPE: "vmapipe.control.main",
    VMA: "vmapipe.control.cli.vma",
}
_FOR_A_COPY = {"stdin", "cwd", "env"}
ALWAYS_NEW = bool(os.environ.get("VMAPIPE_TESTS_EXEC"))
COPIES = Copies()


def _run_in_copy(
    entry: str,
    words: list[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    cwd: Path | str = ".",
    env: Mapping[str, str] | None = None,
    as_patched: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    is_command = entry == _ENTRIES[VMAPIPE] and words and words[0] in COMMANDS
    loads = COMMANDS[words[0]][0] if is_command else entry
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        Path(os.devnull).open("rb") as null,
    ):
        given = null if stdin == subprocess.DEVNULL else stdin
        fds = [given if isinstance(given, int) else given.fileno(), out.fileno(), err.fileno()]
        folder = str(Path.cwd() / cwd)
        environ = dict(os.environ if env is None else env)
        code = COPIES.run(entry, loads, words, fds, int(LIMIT_S), folder, environ, as_patched)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def good(*words: str | Path, **more: Any) -> bytes:
    """Run a command that must succeed; its standard output."""
    done = run(*words, **more)
    assert done.returncode == 0, (done.stdout or b"").decode() + (done.stderr or b"").decode()
    return bytes(done.stdout or b"")


def bad(*words: str | Path, code: int = 1, **more: Any) -> str:
    """Run a command that must fail with `code`, in one line and without a traceback."""
    done = run(*words, **more)
    text = done.stderr.decode()
    assert done.returncode == code, f"exit code {done.returncode}: {text}"
    assert "Traceback" not in text
    lines = text.strip().splitlines()
    if code != 2:
        assert len(lines) == 1, text
    return lines[-1]


@contextmanager
def started(*words: str | Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs while the block does; killed at its end if it still does."""
    process = subprocess.Popen(
        [*VMAPIPE, *map(str, words)],
        # With a buffer, what next_event has read ahead would be lost to communicate().
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_event(process: subprocess.Popen[bytes], name: str) -> dict[str, Any]:
    """Read the JSON events of a command until one is called `name`."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name:
            return event
    _, said = process.communicate(timeout=LIMIT_S)
    raise AssertionError(f"the command ended without an event {name!r}: {said.decode()}")


def children(process: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    """The processes that a command has started and whose command line has `word`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if any(word in part for part in child.cmdline()):
                found.append(child)
    return found


def without_limit(process: subprocess.Popen[bytes]) -> None:
    """Let a backup go on as quickly as it can, which began with a --speed that would take for ever.

    So what a test does in between has all the time that it needs.
    """
    for path in sockets().values():
        # One of the others may have just ended.
        with suppress(Failure), JobClient(path) as job:
            if job.execute("query-job")["processes"][0]["pid"] == process.pid:
                job.execute("backup-set-speed", speed=0)
                return
    raise AssertionError("no such backup is running")


def listens(path: Path) -> bool:
    """Whether somebody listens on this Unix socket; its file is there a moment sooner.

    Asked of the kernel: a connection would be some servers' only one.
    """
    listening = "00010000"  # SO_ACCEPTCON, in the column of flags
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        columns = line.split(maxsplit=7)
        if columns[7:] == [str(path)] and columns[3] == listening:
            return True
    return False


def eventually(reached: Callable[[], bool]) -> bool:
    """Whether it comes to be, within the time that any command may take."""
    deadline_s = time.monotonic() + LIMIT_S
    while not reached():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait for the end of a command: its exit code, and what it said last on stderr."""
    _, stderr = process.communicate(timeout=LIMIT_S)
    text = stderr.decode()
    assert "Traceback" not in text
    return process.returncode, text.strip()
