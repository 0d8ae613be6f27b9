# SPDX-License-Identifier: Apache-2.0
"""A user's QEMU, started in the background by its own command, and not ended by us.

What it does with a device's failed request is looked at first: the machine has to stand still, and
nothing else.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence

from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, Qmp, QmpGone, QmpInvalid, QmpPeer, QmpRefused
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.side_files import open_to_append
from vmapipe.runtime.syscalls import readable

# It opens its disks before its monitor answers. An emulated machine on a busy host takes seconds.
_START_S = 120.0
_POLL_S = 0.05
_TAIL_BYTES = 4096
# It waits for a line before it becomes QEMU: its process is known, and what depends on it started.
_LAUNCH = 'read -r go && [ "$go" = go ] && exec "$@" </dev/null'


class QemuProcess:
    """QEMU on its way: `pid` is known, and it begins with `go`. A context manager.

    In a session of its own, so that Ctrl-C is not meant for it; its output goes to the file `log`.
    """

    def __init__(self, command: Sequence[str], log: str) -> None:
        """Raises Failure."""
        self._log = log
        self._name = os.path.basename(command[0])
        try:
            fd = open_to_append(log, 0o600)
        except OSError as error:
            raise Failure(f"cannot write {log}: {error.strerror}") from error
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=fd,
                stderr=fd,
                start_new_session=True,
            )
        finally:
            os.close(fd)
        self.pid = self._process.pid

    def __enter__(self) -> QemuProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        """End it, unless it was left to itself."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def connect(self, path: str, cancel: Cancel) -> QmpClient:
        """Let it begin; return its monitor. Raises Failure with QEMU's own words, Cancelled."""
        process = self._process
        if process is None or process.stdin is None:
            raise Failure("QEMU was left to itself")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"go\n")
            process.stdin.close()
        deadline = time.monotonic() + _START_S
        while True:
            if process.poll() is not None:
                raise Failure(f"QEMU does not start: {self._last_line()}")
            try:
                return QmpClient(path)
            except QmpInvalid:
                raise
            except QmpGone as error:
                if time.monotonic() > deadline:
                    raise Failure(f"QEMU's monitor does not answer: {error}") from error
            readable([cancel.fd], _POLL_S)
            cancel.check()

    def leave(self) -> None:
        """From now on it runs without us."""
        if self._process is not None:
            self._process.returncode = 0  # nothing that Popen has to clean up
            self._process = None

    def _last_line(self) -> str:
        try:
            with open(self._log, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"{self._name} gave no reason"


class _NotThere(QmpGone):
    """Nobody listens at a monitor's address."""


class _UncertainPeer(QmpPeer):
    """A QEMU that may have ended."""

    def not_reached(self, path: str, why: str) -> QmpGone:
        return _NotThere(str(super().not_reached(path, why)))


def connect_if_alive(path: str) -> QmpClient | None:
    """Connect to the monitor of a machine; None: it has ended.

    Raises QmpGone where something listens there and does not answer.
    """
    try:
        return QmpClient(path, _UncertainPeer())
    except _NotThere:
        return None


def read_graph(qmp: Qmp) -> Graph:
    """Ask QEMU for its block nodes and what stands above them. Raises QmpGone."""
    answer = None
    with contextlib.suppress(QmpRefused):
        answer = qmp.execute(Command("x-debug-query-block-graph", {}))
    return Graph(qmp.execute(Command("query-named-block-nodes", {"flat": True})), answer)


def check_policies(qmp: Qmp, nodes: Sequence[str]) -> None:
    """Refuse a machine whose guest would see an I/O error. Raises UsageError, QmpGone."""
    try:
        blocks = qmp.execute(Command("query-block", {}))
    except QmpRefused:
        return  # a qemu-storage-daemon has no guest
    graph = read_graph(qmp)
    for block in blocks:
        top = str((block.get("inserted") or {}).get("node-name", ""))
        if set(graph.tree(top)) & set(nodes):
            _check_device(qmp, str(block.get("qdev", "")) or str(block.get("device", "")))


def _check_device(qmp: Qmp, name: str) -> None:
    path = name if name.startswith("/") else f"/machine/peripheral/{name}"
    for key in ("rerror", "werror"):
        try:
            policy = qmp.execute(Command("qom-get", {"path": path, "property": key}))
        except QmpRefused:
            raise UsageError(
                f"device {name!r} has no error policy ({key}), so its guest would see an I/O error "
                "when the archive cannot be read for a moment: use virtio-blk, scsi-hd or ide-hd; a "
                "flash memory's disk is restored first, by itself (vmapipe restore --device)"
            ) from None
        if policy != "stop":
            raise UsageError(
                f"device {name!r} has {key}={policy}: start the machine with rerror=stop,werror=stop "
                "on each -device whose disk is in the archive, or its guest would see an I/O error "
                "when the archive cannot be read for a moment"
            )
