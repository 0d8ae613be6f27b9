# SPDX-License-Identifier: Apache-2.0
"""A stock QEMU that we start ourselves: its process, its monitor, and an end to both.

    with OwnFolder("machine") as folder, OwnQemu("the guest", folder, words, cancel) as machine:
        machine.qmp.execute(Command("cont", {}))

Start it in the main thread: the kernel ends it when the thread that started it has ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone, QmpPeer
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.storage_daemon import LastWords, dying_with_parent
from vmapipe.runtime.syscalls import readable

# Debian and others; Fedora's and RHEL's, which is on no PATH.
_PROGRAMS = ("qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm")
# It listens after some 0.1 s. Opening its disks, and a busy machine, may take longer.
_START_S = 60.0
# One attempt to be greeted: a stop that was asked for is seen between two of them.
_GREETING_S = 1.0
_POLL_S = 0.01
# The kernel frees a killed QEMU's memory in less; a disk that hangs may hold it for ever.
_END_S = 10.0
_QMP = "vmapipe-qmp"
# The guest's programs are a stranger's, and QEMU is what keeps them in.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class MachineEnded(Failure):
    """A QEMU that we have started could not start, or has ended by itself."""


class _Peer(QmpPeer):
    """Our own QEMU: nobody else is connected to it."""

    greeting_s = _GREETING_S


def find_qemu() -> str:
    """Return the program's path. Raises Failure: there is none, and how to get it."""
    for name in _PROGRAMS:
        if path := shutil.which(name):
            return path
    raise Failure("QEMU is not installed (qemu-system-x86_64; Debian: qemu-system-x86)")


def quoted(path: str) -> str:
    """Return a path as it stands in an option of QEMU: a comma would end it."""
    return path.replace(",", ",,")


class OwnQemu:
    """One QEMU in a session of its own. It ends with `close`, with its `with`, or with us.

    A Ctrl-C at the terminal does not reach it; it ends also when this process is killed.
    """

    def __init__(
        self,
        name: str,
        folder: OwnFolder,
        words: Sequence[str],
        cancel: Cancel,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        file_limit_bytes: int | None = None,
    ) -> None:
        """Returns when QEMU answers on QMP. Raises Failure, MachineEnded, Cancelled.

        `name` begins messages. `words`: the options behind -nodefaults, -no-user-config, -display none,
        -sandbox and the monitor. `folder` holds the monitor's socket, and whatever the caller has
        put there; once all is open, its `clear` leaves nothing that would have to be removed.
        `file_limit_bytes`: QEMU is killed where it writes to a file beyond that.
        """
        self.name = name
        self._cancel = cancel
        self._socket = os.path.join(folder.path, "qmp")
        command = [
            *(find_qemu(), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-sandbox", _SANDBOX),
            *("-chardev", f"socket,id={_QMP},path={quoted(self._socket)},server=on,wait=off"),
            *("-mon", f"chardev={_QMP},mode=control"),
            *words,
        ]
        self._process = subprocess.Popen(
            [*dying_with_parent("KILL"), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=pass_fds,
            env=environment,
        )
        if file_limit_bytes is not None:
            limits = (file_limit_bytes, file_limit_bytes)
            with contextlib.suppress(ProcessLookupError):  # it has ended at once
                resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, limits)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._words = LastWords(self._process.stderr, "qemu") if self._process.stderr else None
        self._qmp: QmpClient | None = None
        try:
            self._qmp = self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OwnQemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def qmp(self) -> QmpClient:
        """Its monitor. Raises MachineEnded after `close`."""
        if self._qmp is None:
            raise MachineEnded(f"{self.name}: QEMU has been ended")
        return self._qmp

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> list[str]:
        """The latest lines of its standard error."""
        return list(self._words.lines) if self._words is not None else []

    @property
    def fd(self) -> int:
        """Readable when QEMU has ended; -1 after `close`."""
        return self._pidfd

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False: it still runs. Raises Cancelled."""
        readable([self._pidfd, self._cancel.fd], timeout_s)
        self._cancel.check()
        return self._process.poll() is not None

    def run(self, limit_s: float) -> int | None:
        """Let a machine that was started with -S run; its exit code, None: it still runs then.

        Raises Cancelled, QmpRefused.
        """
        with contextlib.suppress(QmpGone):  # it may end before it answers
            self.qmp.execute(Command("cont", {}))
        return self._process.returncode if self.wait(limit_s) else None

    def ended(self) -> MachineEnded:
        """Return the error for a QEMU that has ended by itself: how, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It has closed a socket, so its end is a matter of moments.
            self._process.wait(_GREETING_S)
        code = self._process.poll()
        if code is None:
            return MachineEnded(f"{self.name}: QEMU has closed its monitor, and still runs")
        if self._words is not None:
            self._words.finish()
        if code < 0:
            return MachineEnded(f"{self.name}: QEMU was killed by {signal.Signals(-code).name}")
        said = self._words.last if self._words else ""
        # Its name, by which it was called, tells nothing.
        said = said.partition(": ")[2] if said.startswith("qemu") else said
        return MachineEnded(f"{self.name}: QEMU has ended: {said or f'exit code {code}'}")

    def close(self) -> None:
        """End QEMU at once, whatever it does; what its guest has not written is lost."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process.returncode is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        if self._words is not None:
            self._words.finish()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _connect(self) -> QmpClient:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return QmpClient(self._socket, _Peer())
            except QmpGone:
                if self.wait(_POLL_S):
                    raise self.ended() from None
                if time.monotonic() >= deadline:
                    raise MachineEnded(
                        f"{self.name}: QEMU is not ready after {_START_S:.0f} s"
                    ) from None
