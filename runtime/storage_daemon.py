# SPDX-License-Identifier: Apache-2.0
"""Runs qemu-storage-daemon or qemu-nbd, which open images of every format that QEMU knows."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import OwnFolder

# It starts in some 20 ms; an image on a network may take longer to open.
_START_S = 30.0
# At its end it writes what it has cached: metadata, not data.
_STOP_S = 60.0
_POLL_S = 0.005
# A program that has given up takes no longer to end.
_LAST_WORDS_S = 2.0
# It says why just before it hangs up.
_REASON_S = 0.2
_LONGEST_LINE_BYTES = 4096
# Warnings come before an error, and are some lines.
_KEPT_LINES = 100
_PACKAGES = {"qemu-storage-daemon": "qemu-system-common", "qemu-nbd": "qemu-utils"}


class DaemonTooSlow(Failure):
    """It runs, and does not listen in time."""


class LastWords:
    """Collects a process's output while it runs: a full pipe would make it wait.

    `prefix` begins the lines that count: QEMU puts its name before an error, and not before a hint.
    """

    def __init__(self, stream: IO[bytes], prefix: str = "") -> None:
        self._stream = stream
        self._prefix = prefix
        #: The last line, how many there were, and the latest of them.
        self.last = ""
        self.count = 0
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._read, name="daemon-words", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Read the rest, the process having ended, unless another process holds the pipe, too."""
        self._thread.join(_LAST_WORDS_S)

    def _read(self) -> None:
        with self._stream:
            while raw := self._stream.readline(_LONGEST_LINE_BYTES):
                if line := raw.decode(errors="replace").strip():
                    if not self.last or line.startswith(self._prefix):
                        self.last = line
                    self.lines.append(line)
                    self.count += 1


class StorageDaemon:
    """One daemon, `program`, with one socket, `socket`, in a folder that only we can enter.

    `options` makes its options out of that socket's path. `what` begins its messages.
    """

    def __init__(
        self,
        what: str,
        program: str,
        options: Callable[[str], Sequence[str]],
        cancel: Cancel | None = None,
    ) -> None:
        """Returns when it listens. Raises Failure: it is missing, or cannot open an image."""
        path = shutil.which(program)
        if path is None:
            raise Failure(
                f"{what}: images that are not raw need {program} "
                f"(Debian: {_PACKAGES.get(program, program)}), which is not installed"
            )
        self._what = what
        self._program = program
        self._folder = OwnFolder("storage")
        self.socket = os.path.join(self._folder.path, "daemon.sock")
        self._process: subprocess.Popen[bytes] | None = None
        self._words: LastWords | None = None
        # What it said before it listened, warnings of the image, is not why it hangs up.
        self._words_before = 0
        try:
            self._process = subprocess.Popen(
                [*dying_with_parent("TERM"), path, *options(self.socket)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            if self._process.stderr is not None:
                self._words = LastWords(self._process.stderr)
            self._wait_until_it_listens(self._process, cancel)
        except BaseException:
            self.close()
            raise

    def opened_files(self) -> list[str]:
        """Return paths by which its open files and block devices can be inspected; empty: it has ended."""
        if self._process is None:
            return []
        found = []
        with contextlib.suppress(OSError):
            # setpriv has become it: the number is its own.
            folder = f"/proc/{self._process.pid}/fd"
            for number in os.listdir(folder):
                kind = os.stat(f"{folder}/{number}").st_mode
                if stat.S_ISREG(kind) or stat.S_ISBLK(kind):
                    found.append(f"{folder}/{number}")
        return found

    def stop(self) -> None:
        """Let it write what it has and end. Raises Failure when it does not, or complains."""
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise Failure(
                f"{self._what}: {self._program} does not end within {_STOP_S:.0f} s"
            ) from None
        if process.returncode not in (0, -signal.SIGTERM):
            raise Failure(f"{self._what}: {self._last_line()}")
        self._process = None
        self.close()

    def reason(self) -> str:
        """Why it has hung up, in its words, or how it has ended; empty: it does not say."""
        process = self._process
        if process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_REASON_S)
            if code < 0:
                return f"{self._program} was killed by {signal.Signals(-code).name}"
            if self._words is not None:
                self._words.finish()
        if self._words is None or self._words.count == self._words_before:
            return ""
        return self._words.last.removeprefix(f"{self._program}: ")

    def last_words(self) -> str:
        """End it; what it said if it had ended by itself, else nothing."""
        said = ""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_S)
                self._process = None
                said = self._last_line()
        self.close()
        return said

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            self._process = None
        if self._words is not None:
            self._words.finish()
        self._folder.remove()

    def _wait_until_it_listens(
        self, process: subprocess.Popen[bytes], cancel: Cancel | None
    ) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(self.socket)
                    self._words_before = self._words.count if self._words else 0
                    return
                except OSError:
                    pass  # not yet
            if cancel is not None:
                cancel.check()
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise DaemonTooSlow(
                        f"{self._what}: {self._program} is not ready after {_START_S:.0f} s"
                    ) from None
                continue
            self._process = None
            raise Failure(f"{self._what}: {self._last_line()}")

    def _last_line(self) -> str:
        """It has ended."""
        said = ""
        if self._words is not None:
            self._words.finish()
            said = self._words.last
        if not said:
            return f"{self._program} ended without a word"
        return said.removeprefix(f"{self._program}: ")


def option_text(text: str) -> str:
    """Return a value as it stands among QEMU's options, which commas separate."""
    return text.replace(",", ",,")


def dying_with_parent(signal_name: str) -> list[str]:
    """Return the words before a command that send it a signal when the thread that starts it ends.

    So it ends even when we are killed. util-linux has the program on every Debian.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return []
    # If we were killed before the kernel knew the wish, that signal would never be sent.
    check = '[ "$PPID" = "$0" ] && exec "$@"'
    return [setpriv, "--pdeathsig", signal_name, "sh", "-c", check, str(os.getpid())]
