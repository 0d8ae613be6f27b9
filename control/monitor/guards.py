# SPDX-License-Identifier: Apache-2.0
"""The guard processes of a monitor: started, watched, and started again."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vmapipe.control.qmp.sockets import Listener, listen, listen_unix, private_folder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.events import Emit, Event
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import check_disk_names

# A guard that dies is started again, for ever: its guests' connections come back
# to the same socket, and the disks beside it are not to suffer. One that keeps
# dying (its image is gone) is tried less and less often.
_DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_FORGET_S = 120.0
# Opening an image takes milliseconds, and longer when a disk has to spin up.
_START_S = 60.0


@dataclass
class MonitorDisk:
    """A disk, where its exports are, and (once it is served) its size in bytes."""

    name: str
    path: str
    exports: list[str] = field(default_factory=list)
    size_bytes: int = 0


@dataclass
class _Guard:
    """A guard process; disks that share an export's socket share it."""

    disks: list[MonitorDisk]
    control: Listener
    listeners: list[tuple[Listener, list[str]]]
    child: Child | None = None
    deaths: list[float] = field(default_factory=list)
    start_at: float = 0.0


class Guards:
    """Owns sockets and processes of all disks. Use it in a `with`."""

    def __init__(
        self,
        disks: Sequence[MonitorDisk],
        mode: int,
        emit: Emit,
        *,
        folder: str,
        insecure_tcp: bool,
    ) -> None:
        """Make all sockets. `folder`, for the guards' own, is made, or taken over after a crash."""
        self.disks = disks
        self._emit = emit
        self._folder = private_folder(folder)
        self._children = Children()
        self._guards: list[_Guard] = []
        try:
            for number, group in enumerate(_groups(disks)):
                self._guards.append(self._prepare(number, group, mode, insecure_tcp=insecure_tcp))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Guards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all guards; requests of guests are finished first, within a bound."""
        self._children.stop()
        for guard in self._guards:
            for listener, _ in guard.listeners:
                listener.close()
            guard.control.close()
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)

    def start(self, cancel: Cancel) -> None:
        """Start all guards; returns when all disks are served. Raises Failure."""
        self._children.watch(cancel.fd)
        for guard in self._guards:
            self._start(guard)
        waiting = {guard.child for guard in self._guards}
        deadline = time.monotonic() + _START_S
        while waiting:
            cancel.check()
            if time.monotonic() > deadline:
                names = ", ".join(child.name for child in waiting if child)
                raise Failure(f"{names}: not ready after {_START_S:.0f} s")
            for child, event in self._children.wait(1.0):
                if event is None:
                    raise Failure(child.verdict() or f"{child.name} has ended")
                self._take(child, event)
                if event["event"] == "all-served":
                    waiting.discard(child)

    def watch(self, timeout_s: float) -> None:
        """Process events for `timeout_s`; a guard that has ended is started again."""
        for child, event in self._children.wait(timeout_s):
            if event is not None:
                self._take(child, event)
                continue
            guard = next(guard for guard in self._guards if guard.child is child)
            guard.child = None
            now = time.monotonic()
            guard.deaths = [at for at in guard.deaths if now - at < _FORGET_S] + [now]
            delay = _DELAYS_S[min(len(guard.deaths), len(_DELAYS_S)) - 1]
            guard.start_at = now + delay
            why = child.verdict() or f"{child.name} has ended"
            when = f"in {delay:.0f} s" if delay else "at once"
            self._emit({"event": "notice", "text": f"{why}; it is started again {when}"})
        for guard in self._guards:
            if guard.child is None and time.monotonic() >= guard.start_at:
                self._start(guard)

    @property
    def fd(self) -> int:
        """Readable when `watch` has something to see."""
        return self._children.fd

    def describe(self) -> list[dict[str, object]]:
        """The answer to `query-disks`."""
        return [
            {
                "name": disk.name,
                "path": disk.path,
                "size": disk.size_bytes,
                "exports": disk.exports,
                "served": guard.child is not None,
                "guard": os.path.abspath(guard.control.path),
            }
            for guard in self._guards
            for disk in guard.disks
        ]

    def _take(self, child: Child, event: Event) -> None:
        if event["event"] == "serving":
            for disk in self.disks:
                if disk.name == event["disk"]:
                    disk.size_bytes = event["bytes"]
        if event["event"] in ("serving", "notice"):
            self._emit(event)

    def _prepare(
        self, number: int, disks: list[MonitorDisk], mode: int, *, insecure_tcp: bool
    ) -> _Guard:
        path = os.path.join(self._folder, str(number))
        guard = _Guard(disks, listen_unix(path, 0o600, socket.SOCK_SEQPACKET), [])
        try:
            for address in sorted({export for disk in disks for export in disk.exports}):
                listener = listen(address, mode, insecure_tcp=insecure_tcp)
                names = [disk.name for disk in disks if address in disk.exports]
                guard.listeners.append((listener, names))
        except BaseException:
            self._guards.append(guard)  # so that `close` finds what is open
            raise
        return guard

    def _start(self, guard: _Guard) -> None:
        argv = [f"--control={guard.control.fd}"]
        for disk in guard.disks:
            argv += [f"--disk={disk.name}", f"--path={disk.path}"]
        for listener, offered in guard.listeners:
            argv += [f"--serve={listener.fd}={name}" for name in offered]
        names = ", ".join(repr(disk.name) for disk in guard.disks)
        fds = [guard.control.fd, *(listener.fd for listener, _ in guard.listeners)]
        guard.child = self._children.start(
            f"the guard of {names}", "vmapipe.producer.guard.main", argv, fds
        )


def _groups(disks: Sequence[MonitorDisk]) -> list[list[MonitorDisk]]:
    """Disks that have an export in common, directly or through others, belong together."""
    groups: list[list[MonitorDisk]] = []
    for disk in disks:
        related = [g for g in groups if any(set(d.exports) & set(disk.exports) for d in g)]
        groups = [g for g in groups if g not in related]
        groups.append([other for g in related for other in g] + [disk])
    return groups


def check_disks(disks: Sequence[MonitorDisk]) -> None:
    """Refuse disks that cannot be served or backed up together. Raises UsageError."""
    if not disks:
        raise UsageError("no disk to serve: name one with --disk NAME=PATH")
    names = [disk.name for disk in disks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two disks are called {name!r}")
    # What no archive could hold could never be backed up.
    try:
        check_disk_names(names)
    except LimitError as error:
        raise UsageError(str(error)) from error
    paths = [os.path.realpath(disk.path) for disk in disks]
    for disk, path in zip(disks, paths, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"{disk.path} is served twice: two writers would destroy it")
