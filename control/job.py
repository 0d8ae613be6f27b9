# SPDX-License-Identifier: Apache-2.0
"""One backup: starts the archiver and a producer a disk, watches them, ends them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.clusters.sizes import VMSTATE_NAME
from vmapipe.control.jobprocesses import remove_leftovers, start_archiver, start_producers
from vmapipe.control.jobs.shares import Shares
from vmapipe.control.monitor.client import begin_together
from vmapipe.control.priorities import AS_INHERITED, Priorities
from vmapipe.control.qemu.disks import check_names
from vmapipe.control.qemu.vmstate import Instant
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import EXIT_USAGE, Cancelled, Failure, UsageError
from vmapipe.runtime.events import ChildCommands, Emit, Event, speed_command, speed_in
from vmapipe.runtime.folders import OwnFolder
from vmapipe.vma.layout import MAX_DEVICES

if TYPE_CHECKING:
    from vmapipe.control.elsewhere import Service
    from vmapipe.control.jobs.server import JobServer
    from vmapipe.control.qemu.machine import RunningMachine

# When one process has failed, the others hear of it from the archiver and end
# by themselves, and the archiver knows the reason best. It takes milliseconds.
_VERDICT_S = 2.0


class Disk(NamedTuple):
    """A raw image or block device, and its name in the archive.

    `guard`: the control socket of the process that serves it to a guest; empty:
    the disk is at rest, or a running QEMU's.
    """

    name: str
    path: str
    guard: str = ""
    #: The producer's options for an image that is not simply raw.
    reading: tuple[str, ...] = ()
    #: Of a running QEMU's disk.
    size_bytes: int = 0


@dataclass
class BackupJob:
    """`archive` is an output as the archiver takes it; `speed_bytes_s` 0: no limit."""

    disks: Sequence[Disk]
    archive: str
    archiver_options: Sequence[str]
    speed_bytes_s: int = 0
    #: Descriptors that the archiver inherits: its output, configs that are no files.
    pass_fds: Sequence[int] = ()
    #: For the producers of disks in use.
    buffer_options: Sequence[str] = ()
    #: The QEMU whose disks these are, all of them.
    machine: RunningMachine | None = None
    #: Its memory, too.
    with_memory: bool = False
    #: The archiver, if that is a service elsewhere; `archive` is a name there.
    service: Service | None = None
    #: The guest agent's socket, if file systems are to be frozen for the instant.
    agent: str = ""
    #: Disks are read one after the other.
    in_turn: bool = False
    priorities: Priorities = AS_INHERITED
    #: Who is asked about the job from outside.
    server: JobServer | None = None
    job_id: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    #: Uploads to object stores that the archiver has begun: name and id.
    uploads: list[tuple[str, str]] = field(default_factory=list)

    def run(self, emit: Emit, cancel: Cancel, orders: ChildCommands | None = None) -> None:
        """Raises Failure when nothing was stored. `orders` may change the speed meanwhile."""
        orders = orders or ChildCommands()
        self._check()
        self._read_bytes: dict[str, int] = {}
        self._shares = Shares(
            self.speed_bytes_s, [disk.name for disk in self.disks], in_turn=self.in_turn
        )
        started = time.monotonic()
        with OwnFolder("job") as folder:
            children = Children(fork=True)
            try:
                with children:
                    children.watch(cancel.fd)
                    children.watch(orders.fd)
                    try:
                        start_archiver(self, children, folder, emit, cancel)
                        start_producers(self, children, folder, self._shares.share)
                        if self.server:
                            self.server.begin(self.speed_bytes_s, children.pids)
                            children.watch(self.server.fd)
                        self._watch(children, emit, cancel, folder, orders)
                    finally:
                        self._let_go(emit)
            finally:
                remove_leftovers(self, children)
            emit(
                {
                    "event": "done",
                    "seconds": round(time.monotonic() - started, 3),
                    "read_bytes": sum(self._read_bytes.values()),
                    "speed_bytes_s": self._shares.bytes_per_s,
                    "cpu_s": round(sum(child.cpu_s for child in children.all), 3),
                    "peak_rss_bytes": sum(child.peak_rss_bytes for child in children.all),
                }
            )

    def _check(self) -> None:
        if len(self.names) > MAX_DEVICES:
            raise UsageError(f"too many drives: {len(self.disks)}; the limit is {MAX_DEVICES}")
        if not self.disks and not any("--config" in word for word in self.archiver_options):
            raise UsageError("nothing to back up: name a disk with --disk")
        check_names([disk.name for disk in self.disks])

    def _watch(
        self,
        children: Children,
        emit: Emit,
        cancel: Cancel,
        folder: OwnFolder,
        orders: ChildCommands,
    ) -> None:
        """Until all have ended well. Raises Failure with the best reason there is."""
        archiver = children.all[0]
        first_failed: Child | None = None
        give_up = float("inf")
        unattached = {disk.name for disk in self.disks if disk.guard}
        if self.machine:
            unattached = set(self.names)
        while any(child.running for child in children.all):
            for child, event in children.wait(min(1.0, max(0.0, give_up - time.monotonic()))):
                if event is not None:
                    if event["event"] == "begun":
                        # All are connected: nobody needs the socket's name any more, and
                        # whoever kills this process once it has said so leaves no folder.
                        folder.clear()
                    self._take(event, unattached, emit, cancel, children)
                if first_failed is None and _has_failed(child, event):
                    first_failed = child
                    killed = (child.exit_code or 0) < 0 or child is archiver
                    give_up = time.monotonic() + (0.0 if killed else _VERDICT_S)
            self._attend(children, orders, emit)
            if cancel.asked:
                self._let_go(emit)
                children.stop()
                if archiver.exit_code == 0:
                    emit({"event": "notice", "text": f"{cancel.reason}: too late, it is stored"})
                    return
                raise Cancelled(cancel.reason, cancel.signum)
            if first_failed and (not archiver.running or time.monotonic() >= give_up):
                break
        if first_failed is not None and archiver.exit_code == 0:
            # It was stored before the other one failed.
            emit({"event": "notice", "text": f"{first_failed.verdict()}, after all was stored"})
        elif first_failed is not None:
            spoke = archiver.exit_code and archiver.error
            told = archiver if spoke else first_failed
            raise (UsageError if told.exit_code == EXIT_USAGE else Failure)(told.verdict())

    def _take(
        self,
        event: Event,
        unattached: set[str],
        emit: Emit,
        cancel: Cancel,
        children: Children,
    ) -> None:
        """What a child has told. Raises Failure."""
        if event["event"] == "attached":
            unattached.discard(event["device"])
            if not unattached:
                self._begin(emit, cancel)
        elif event["event"] == "upload":
            self.uploads.append((event["archive"], event["upload"]))
        elif event["event"] == "job-speed":
            if self.machine:
                self.machine.set_job_speed(event["device"], event["bytes_per_s"])
        elif event["event"] not in ("draining", "error"):
            emit(event)
            if event["event"] == "progress":
                self._share_again(event, children)
            elif event["event"] == "transfer":
                self._read_bytes[event["device"]] = event["read_bytes"]

    def _attend(self, children: Children, orders: ChildCommands, emit: Emit) -> None:
        """Whoever else has something to say: QEMU, and who asks or steers us. Raises Failure."""
        for order in orders.take():
            self._obey(order, children, emit)
        if self.machine:
            self.machine.poll()
            for text in self.machine.notices:
                emit({"event": "notice", "text": text})
            self.machine.notices.clear()
            if self.machine.is_done:
                children.unwatch(self.machine.fd)
            _tell_instant(self.machine.take_instant(), emit)
        if self.server:
            self.server.serve()

    def _obey(self, order: Event, children: Children, emit: Emit) -> None:
        """While it runs: another speed, of all disks together."""
        speed = speed_in(order)
        if speed is None:
            return
        self._shares.bytes_per_s = speed
        self._tell_share(children)
        emit({"event": "speed", "bytes_per_s": speed})

    def _share_again(self, progress: Event, children: Children) -> None:
        """Disks that are done leave their share to the others."""
        changed = [
            self._shares.done(device["name"])
            for device in progress["devices"]
            if device["done_bytes"] == device["bytes"]
        ]
        if any(changed):
            self._tell_share(children)

    def _tell_share(self, children: Children) -> None:
        share = self._shares.share
        if self.machine:
            self.machine.set_speed(share)
        for child in children.all[1:]:
            child.tell(speed_command(share))

    @property
    def names(self) -> list[str]:
        """Of all devices of the archive."""
        return [disk.name for disk in self.disks] + [VMSTATE_NAME] * self.with_memory

    def _begin(self, emit: Emit, cancel: Cancel) -> None:
        """All disks in use are ready: choose the instant. Raises Failure."""
        if self.agent and self.machine and not self.machine.is_running:
            # Nobody in it can answer, nor write.
            text = "the guest is not running: its file systems are backed up without its agent"
            emit({"event": "notice", "text": text})
            held = self._choose_instant()
        elif self.agent:
            # Imported here: it takes as long as all the rest of a start.
            from vmapipe.control.qemu.guest_agent import frozen

            with frozen(self.agent, emit, cancel):
                held = self._choose_instant()
        else:
            held = self._choose_instant()
        _tell_instant(held, emit)

    def _choose_instant(self) -> Instant | None:
        """For how long disks, or the machine, were held; None: it will be known later."""
        if self.machine:
            return self.machine.begin()
        guards: dict[str, list[str]] = {}
        for disk in self.disks:
            if disk.guard:
                guards.setdefault(disk.guard, []).append(disk.name)
        return Instant("", begin_together(guards, self.job_id))

    def _let_go(self, emit: Emit) -> None:
        """QEMU is rid of us, while the producers still serve it."""
        text = self.machine.end() if self.machine else ""
        if text:
            emit({"event": "notice", "text": text})


def _tell_instant(held: Instant | None, emit: Emit) -> None:
    if held is not None:
        memory = {"memory": held.how} if held.how else {}
        emit({"event": "instant", "held_s": round(held.seconds, 4), **memory})


def _has_failed(child: Child, event: Event | None) -> bool:
    """It has ended badly, or has nothing left to do but to keep QEMU content."""
    if event is not None and event["event"] == "draining":
        child.error = child.error or str(event["text"])
        return True
    return event is None and bool(child.exit_code)
