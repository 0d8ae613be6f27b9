# SPDX-License-Identifier: Apache-2.0
"""An archiver with keys that waits for a producer over TCP, as a test needs it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.machine import LIMIT_S, end_of, good, make_disk, sha256, started
from tests.network.cable import Cable
from tests.network.keys import make_client, make_server


class Place:
    """Everything in one folder; what is started ends with `stack`."""

    def __init__(self, folder: Path, stack: ExitStack, *more: str) -> None:
        self.folder = folder
        self.server = make_server(folder / "server")
        self.client = make_client(folder / "client", self.server, "host1")
        self.disk = make_disk(folder / "disk.raw", "A0hAp" * 8)
        self.archive = folder / "vm.vma"
        self.said: list[str] = []
        self._stack = stack
        self.start_archiver("tcp://127.0.0.1:*", *more)

    def start_archiver(self, endpoint: str, *more: str) -> None:
        self.archiver = self._stack.enter_context(
            started(
                *("archiver", "--listen", endpoint, "--keys", self.server, "--expect", "1"),
                "--output",
                self.archive,
                *more,
            )
        )
        self.endpoint = self.line("listening on").rpartition(" ")[2]

    def line(self, words: str) -> str:
        """What the archiver says next, with these words in it."""
        assert self.archiver.stderr is not None
        for raw in self.archiver.stderr:
            line = raw.decode().rstrip("\n")
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"the archiver ended without {words!r}: {self.said}")

    def producer(self, keys: Path | None, *more: str, at: str = "") -> tuple[str | Path, ...]:
        with_keys = ("--keys", keys) if keys else ("--insecure-plain-tcp",)
        endpoint = at or self.endpoint
        return ("producer", "--archiver", endpoint, *with_keys, "--disk", self.disk, *more)

    def honest_job_succeeds(self) -> None:
        good(*self.producer(self.client))
        self.archive_is_good()

    def archive_is_good(self) -> None:
        """The archiver has ended well, and the archive holds the disk."""
        code, text = end_of(self.archiver)
        self.said += text.splitlines()
        assert code == 0, self.said
        good("verify", self.archive, "--require-manifest")
        good("restore", self.archive, self.folder / "restored")
        (restored,) = (self.folder / "restored").iterdir()
        assert sha256(restored) == sha256(self.disk)

    def throw(self, junk: bytes) -> None:
        """Send it to the archiver's port, and wait until the connection is closed."""
        host, port = self.endpoint.removeprefix("tcp://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=LIMIT_S)
        # It is closed as soon as it has said too much.
        with contextlib.suppress(OSError), connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    def nothing_is_stored(self) -> None:
        assert not list(self.folder.glob("vm.vma*"))


def until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for something to happen, while a process lives."""
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lose_connections(
    cable: Cable, process: subprocess.Popen[bytes], after_bytes: int, callers: int = 1
) -> None:
    """All of them, when so much more has passed; who calls again gets through after a while."""
    mark = cable.carried_bytes + after_bytes
    until(lambda: cable.carried_bytes >= mark, process)
    cable.drop()
    refused = cable.connections + callers
    until(lambda: cable.connections >= refused, process)
    cable.refusing = False
