# SPDX-License-Identifier: Apache-2.0
"""A target in place of a dead sink: takes QEMU's requests, acknowledges and drops them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from collections.abc import Sequence

from vmapipe.control.qemu.sink_folder import STREAM_NAME, open_stream
from vmapipe.producer.nbd.backend import Write, WriteOnlyBackend, sink_export
from vmapipe.producer.nbd.server import Offer, Server


class DropTarget(WriteOnlyBackend):
    """The `Backend` of one disk, and its server. Nothing is accepted until `start`."""

    def __init__(self, listener: socket.socket, size_bytes: int) -> None:
        #: Whether QEMU has sent something.
        self.served = False
        self._started = False
        self._server = Server([listener], [Offer(sink_export(size_bytes), self)])

    @property
    def clients(self) -> int:
        return self._server.clients

    def start(self) -> None:
        if not self._started:
            self._started = True
            self._server.start()

    def stop(self) -> None:
        """Shuts the listening socket down, for all that hold it."""
        self._server.stop()

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        self.served = True
        return [None] * len(writes)

    def try_zeroes(self, offset: int, length: int) -> bool:
        self.served = True
        return True

    def write(self, data: memoryview, offset: int) -> None:
        self.served = True

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        self.served = True

    def flush(self) -> None:
        self.served = True


_DROP_BYTES = 1 << 20
_STREAM = re.compile(rf"(/.*)/{re.escape(STREAM_NAME)}(?: \(deleted\))?")


class StreamDrain:
    """Of the pipe `fd`, which is ours. Nothing is read until `start`; then all, to its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="drain", daemon=True)
            self._thread.start()

    def _drain(self) -> None:
        try:
            while os.read(self._fd, _DROP_BYTES):
                pass
        except OSError:
            pass  # it is gone, and nobody waits for us any more
        finally:
            os.close(self._fd)


def streams_of(qmp: str) -> dict[str, int]:
    """Of the QEMU behind this monitor: pipes of ours that it writes memory to, open for reading.

    By their folder. Found without asking it: while nobody reads there, it may
    answer nobody. Empty also when we may not look.
    """
    found = {}
    with contextlib.suppress(OSError):  # it ended, or is another user's
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(qmp)
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        folder = f"/proc/{struct.unpack('3i', peer)[0]}/fd"
        for name in os.listdir(folder):
            match = _STREAM.fullmatch(os.readlink(f"{folder}/{name}"))
            if match and match[1] not in found:
                fd = open_stream(f"{folder}/{name}")
                if fd is not None:
                    found[match[1]] = fd
    return found
