# SPDX-License-Identifier: Apache-2.0
"""Reads what QEMU still writes of a machine's memory, and drops it, so that the guest goes on."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading

from vmapipe.control.qemu.sinkfolder import STREAM_NAME, open_stream

_DROP_BYTES = 1 << 20
_STREAM = re.compile(rf"(/.*)/{re.escape(STREAM_NAME)}(?: \(deleted\))?")


class Draining:
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
