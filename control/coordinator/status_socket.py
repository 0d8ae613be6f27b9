# SPDX-License-Identifier: Apache-2.0
"""The socket of one running backup: who connects asks how it goes, changes it, ends it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from vmapipe.control.coordinator.status import JobState, now_s
from vmapipe.control.qmp.clients import Clients
from vmapipe.control.qmp.server import QmpError
from vmapipe.control.qmp.sockets import Listener, alone_in, listen_unix, private_folder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import ChildCommands, Event, speed_command
from vmapipe.runtime.folders import HeldFolder, temporary_folder

# What `vma` and QEMU say, so that scripts know it.
CANCELLED = "backup canceled"


class JobServer:
    """Speaks QMP. Its owner calls `serve` when `fd` is readable, and gives it the events.

    Without a socket (the folder cannot be made) nobody can ask: `notice` says why.
    """

    def __init__(self, job: str, archive: str, cancel: Cancel, orders: ChildCommands) -> None:
        self.state = JobState(archive, now_s(), job=job)
        self.notice = ""
        self._cancel = cancel
        self._orders = orders
        self._processes: Callable[[], list[tuple[str, int]]] = list
        self._clients: Clients | None = None
        try:
            listener = listen(job)
        except Failure as error:
            self.notice = f"`vmapipe status` will not see this backup: {error}"
            return
        commands = {
            "query-backup": lambda arguments: self.state.members(),
            "query-job": lambda arguments: self._details(),
            "backup-cancel": self._on_cancel,
            "backup_cancel": self._on_cancel,
            "backup-set-speed": self._on_speed,
        }
        self._clients = Clients(listener, lambda client: commands)

    def __enter__(self) -> JobServer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._clients is not None:
            self._clients.close()

    @property
    def fd(self) -> int:
        """-1: there is none."""
        return self._clients.fd if self._clients else -1

    def begin(self, speed_bytes_s: int, processes: Callable[[], list[tuple[str, int]]]) -> None:
        """It runs now: with this limit, and these processes, each a name and a pid."""
        self.state.speed_bytes_s = speed_bytes_s
        self._processes = processes

    def serve(self) -> None:
        """Answer the clients that have asked; never waits."""
        if self._clients is not None:
            self._clients.serve(0)

    def take(self, event: Event) -> None:
        self.state.take(event, now_s())

    def _details(self) -> dict[str, Any]:
        details = self.state.details(now_s())
        processes = [("the coordinator", os.getpid()), *self._processes()]
        usage = [found for name, pid in processes if (found := process_usage(name, pid))]
        return {**details, "processes": usage}

    def _on_cancel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._cancel.ask(CANCELLED)
        return {}

    def _on_speed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        speed = arguments.get("speed")
        if not isinstance(speed, int) or isinstance(speed, bool) or not 0 <= speed < 1 << 63:
            raise QmpError("Parameter 'speed' expects a number of bytes a second, 0 for no limit")
        # Obeyed by the job's own loop, which is the one that called us.
        self._orders.put(speed_command(speed))
        self.state.speed_bytes_s = speed
        return {}


def process_usage(name: str, pid: int) -> dict[str, Any] | None:
    # Imported here: a backup starts sooner without, and most are never asked.
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
            age_s = round(_age_s(pid), 2)
    except (psutil.Error, OSError):
        return None  # it has ended just now
    cpu_s = round(times.user + times.system, 2)
    return {"name": name, "pid": pid, "age_s": age_s, "cpu_s": cpu_s, "rss_bytes": memory.rss}


def _age_s(pid: int) -> float:
    """By the clock that the kernel notes a start with: it goes on however the time of day is set."""
    with open(f"/proc/{pid}/stat", "rb") as status:
        # proc(5); the fields behind the name in brackets, which may hold anything.
        fields = status.read().rpartition(b")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


_NAME = re.compile(r"[0-9a-f]{32}\.sock")
# A listener answers a connection at once, even while it is stopped.
_PROBE_S = 1.0


def runtime_folder() -> str:
    """The path; it may not be there."""
    chosen = os.environ.get("VMAPIPE_RUNTIME_DIR")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return "/run/vmapipe"
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own:
        return os.path.join(own, "vmapipe")
    return os.path.join(temporary_folder(), f"vmapipe-{os.geteuid()}")


def listen(job: str) -> Listener:
    """The socket of a job that begins; those of killed ones are removed. Raises Failure."""
    folder = private_folder(runtime_folder(), others_may_look=True)
    sockets()
    return listen_unix(os.path.join(folder, f"{job}.sock"), 0o600, socket.SOCK_STREAM)


def sockets() -> dict[str, str]:
    """Return job ids and the sockets that have a listener; the others are removed."""
    try:
        with HeldFolder(runtime_folder()) as folder:
            return {
                name.removesuffix(".sock"): os.path.join(folder.path, name)
                for name in _alive(folder)
            }
    except OSError:
        return {}


def _alive(folder: HeldFolder) -> list[str]:
    """Raises OSError."""
    status = os.fstat(folder.fd)
    # Other users that can make names in it may have made these: they are looked at, and left alone.
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    names = sorted(filter(_NAME.fullmatch, folder.names()))
    alive = {name: _is_alive(folder, name) for name in names}
    if ours and not all(alive.values()):
        # The file is there before its owner listens: while it is our turn, no maker is between.
        with contextlib.suppress(Failure), alone_in(folder):
            for name in [name for name in names if not alive[name]]:
                alive[name] = _is_alive(folder, name, remove=True)
    return [name for name in names if alive[name]]


def _is_alive(folder: HeldFolder, name: str, *, remove: bool = False) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(folder.address(name))
        except (ConnectionRefusedError, FileNotFoundError):
            # Its process died without removing it, or has just ended.
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder.fd)
            return False
        except OSError:
            return True  # a listener is there, and busy
    return True
