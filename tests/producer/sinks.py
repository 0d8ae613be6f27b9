# SPDX-License-Identifier: Apache-2.0
"""An archiver and a producer that is a sink, by hand, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.machine import LIMIT_S, VMAPIPE
from vmapipe.runtime.events import Command, encode_line


class SinkRun:
    """Two processes; `path` is where NBD clients go, `archive` what comes of it."""

    def __init__(self, folder: Path, size_bytes: int, *options: str) -> None:
        self.path = folder / "sink.sock"
        self.archive = folder / "vm.vma"
        endpoint = f"ipc://{folder}/archiver.sock"
        words = ("archiver", "--listen", endpoint, "--expect", "1", "--output", str(self.archive))
        self.archiver = subprocess.Popen([*VMAPIPE, *words], stderr=subprocess.PIPE)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen()
            fd = listener.fileno()
            self.events, theirs = socket.socketpair()
            with theirs:
                self.producer = subprocess.Popen(
                    [
                        *(*VMAPIPE, "producer", "--archiver", endpoint, "--name", "drive-scsi0"),
                        *("--disk", "drive-scsi0", "--sink-fd", str(fd), "--size", str(size_bytes)),
                        *("--parent-fd", str(theirs.fileno()), *options),
                    ],
                    pass_fds=[fd, theirs.fileno()],
                )
        self.events.settimeout(LIMIT_S)
        self._lines = self.events.makefile("rb")

    def next_event(self, name: str) -> dict[str, Any]:
        for line in self._lines:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"the producer ended without an event {name!r}")

    def tell(self, order: Command) -> None:
        """What its parent says."""
        self.events.sendall(encode_line(order))

    def ends(self) -> tuple[int, int]:
        """The exit codes of archiver and producer."""
        return self.archiver.wait(LIMIT_S), self.producer.wait(LIMIT_S)

    def close(self) -> None:
        for process in (self.producer, self.archiver):
            process.kill()
            process.communicate()
        self._lines.close()
        self.events.close()


@contextlib.contextmanager
def sink(folder: Path, size_bytes: int, *options: str) -> Iterator[SinkRun]:
    run = SinkRun(folder, size_bytes, *options)
    try:
        run.next_event("attached")
        yield run
    finally:
        run.close()
