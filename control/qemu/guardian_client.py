# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of its guardian: started before QEMU is touched, told when it is over."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.control.qemu.guardian import BYE, MAX_MESSAGE_BYTES, READY, TAKE_OVER, WATCH
from vmapipe.control.qmp.addresses import Address
from vmapipe.runtime.errors import Failure

# A Python starts within a tenth of a second, on a loaded machine within some.
_START_S = 20.0
# What it needs to clean up is CLEAN_S and what comes before; then it goes on alone.
_TAKE_OVER_S = 60.0


class SinkSocket(NamedTuple):
    """A listening socket at `path` for a disk of so many bytes."""

    listener: socket.socket
    path: str
    size_bytes: int


def monitor_arguments(address: Address, *, share: bool) -> list[str]:
    """Return the options that name QEMU's monitor to a guardian, which works in another folder."""
    return ["--qmp", address.absolute, *(["--qmp-share"] if share else [])]


class GuardianClient:
    """A guardian process, started here.

    Raises Failure when it does not start: no backup without one.
    """

    def __init__(
        self,
        monitor: Sequence[str],
        run: str,
        folder: str,
        sinks: Sequence[SinkSocket],
        stream_fd: int = -1,
    ) -> None:
        """`monitor`: QEMU's, from monitor_arguments.

        `stream_fd`: what the machine's memory is read from; -1: it is not saved.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [*monitor, "--run", run, "--folder", folder]
        words += [f"--sink={sink.listener.fileno()}={sink.size_bytes}" for sink in sinks]
        fds = [sink.listener.fileno() for sink in sinks]
        if stream_fd >= 0:
            words.append(f"--stream={stream_fd}")
            fds.append(stream_fd)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "vmapipe.control.qemu.guardian", *words),
                    *("--control-fd", str(theirs.fileno())),
                ],
                pass_fds=[theirs.fileno(), *fds],
                # It may outlive us: readers of our output must see its end,
                # and no terminal's signal is meant for it.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        self._socket.settimeout(_START_S)
        try:
            is_ready = self._socket.recv(MAX_MESSAGE_BYTES) == READY
        except OSError:
            is_ready = False
        if not is_ready:
            self._process.kill()
            self._process.wait()
            self._socket.close()
            raise Failure("the guardian, which protects the guest's writes, does not start")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def watch(self, index: int, pid: int) -> None:
        """Register the producer of this sink, which must not have been reaped."""
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._socket, [WATCH + str(index).encode()], [pidfd])
        except OSError as error:
            raise Failure("the guardian, which protects the guest's writes, was killed") from error
        finally:
            os.close(pidfd)

    def dismiss(self) -> None:
        """Let it exit: QEMU is clean."""
        self._end(BYE)

    def take_over(self) -> bool:
        """Let it end what is left in QEMU; False: it is not done yet."""
        return self._end(TAKE_OVER)

    def _end(self, word: bytes) -> bool:
        with contextlib.suppress(OSError):
            self._socket.send(word)
        self._socket.close()
        try:
            return self._process.wait(_TAKE_OVER_S) == 0
        except subprocess.TimeoutExpired:
            return False
