# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for dead sinks and dead readers of the memory: they take QEMU's data and drop it."""

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
    """An NBD server in place of a disk's dead sink: acknowledges and drops all.

    Accepts after `start`.
    """

    def __init__(self, listener: socket.socket, size_bytes: int) -> None:
        #: True: QEMU has sent something.
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
    """A reader of the memory's pipe `fd`, which it owns, so that the guest goes on.

    Reads after `start`, to the end.
    """

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
            pass  # the writer is gone, and waits no more
        finally:
            os.close(self._fd)


def streams_of(qmp: str) -> dict[str, int]:
    """Open for reading the pipes of ours that the QEMU behind this monitor writes memory to.

    By their folder. Found in /proc, because a QEMU whose pipe is not read may not answer. Empty also
    without permission to look.
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
