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
import time
from collections.abc import Sequence

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
_PACKAGES = {"qemu-storage-daemon": "qemu-system-common", "qemu-nbd": "qemu-utils"}


class StorageDaemon:
    """One daemon with one socket, `socket`, in a folder that only we can enter.

    `words` are the program and its options, in which SOCKET stands for that
    socket's path. `what` begins its messages.
    """

    def __init__(self, what: str, words: Sequence[str], cancel: Cancel | None = None) -> None:
        """Returns when it listens. Raises Failure: it is missing, or cannot open an image."""
        program = shutil.which(words[0])
        if program is None:
            raise Failure(
                f"{what}: images that are not raw need {words[0]} "
                f"(Debian: {_PACKAGES.get(words[0], words[0])}), which is not installed"
            )
        self._what = what
        self._program = words[0]
        self._folder = OwnFolder("storage")
        self.socket = os.path.join(self._folder.path, "daemon.sock")
        self._process: subprocess.Popen[str] | None = None
        try:
            command = [program, *(word.replace("SOCKET", self.socket) for word in words[1:])]
            self._process = subprocess.Popen(
                [*_dying_with_us(), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self._wait_until_it_listens(self._process, cancel)
        except BaseException:
            self.close()
            raise

    def opened_files(self) -> list[str]:
        """Where files and block devices that it has open can be looked at; empty: it has ended."""
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
            _, said = process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            raise Failure(
                f"{self._what}: {self._program} does not end within {_STOP_S:.0f} s"
            ) from None
        if process.returncode not in (0, -signal.SIGTERM):
            raise Failure(f"{self._what}: {self._last_line(said)}")
        self._process = None
        self.close()

    def last_words(self) -> str:
        """End it; what it said if it had ended by itself, else nothing."""
        process, said = self._process, ""
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, said = process.communicate(timeout=_LAST_WORDS_S)
                self._process = None
        self.close()
        return self._last_line(said) if said else ""

    def close(self) -> None:
        """Whatever it is doing, it is gone afterwards."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=_STOP_S)
            self._process = None
        self._folder.remove()

    def _wait_until_it_listens(self, process: subprocess.Popen[str], cancel: Cancel | None) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(self.socket)
                    return
                except OSError:
                    pass  # not yet
            if cancel is not None:
                cancel.check()
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise Failure(
                        f"{self._what}: {self._program} is not ready after {_START_S:.0f} s"
                    ) from None
                continue
            _, said = process.communicate()
            self._process = None
            raise Failure(f"{self._what}: {self._last_line(said)}")

    def _last_line(self, text: str) -> str:
        lines = [line for line in text.strip().splitlines() if line]
        if not lines:
            return f"{self._program} ended without a word"
        return lines[-1].removeprefix(f"{self._program}: ")


def _dying_with_us() -> list[str]:
    """So that it ends even when we are killed. util-linux has it on every Debian."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
