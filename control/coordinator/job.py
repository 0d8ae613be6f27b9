# SPDX-License-Identifier: Apache-2.0
"""One backup: starts the archiver and a producer a disk, watches them, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.clusters.sizes import VMSTATE_NAME
from vmapipe.control.coordinator.output_spec import is_path
from vmapipe.control.coordinator.priorities import AS_INHERITED, Priorities
from vmapipe.control.coordinator.service import Service, await_opened
from vmapipe.control.coordinator.steering import LatencyWish, Measurable, Steering
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import EXIT_USAGE, Cancelled, DoubtfulBase, Failure, UsageError
from vmapipe.runtime.events import ChildCommands, Command, Emit, Event, speed_command, speed_in
from vmapipe.runtime.folders import OwnFolder
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import check_disk_names

if TYPE_CHECKING:
    from vmapipe.control.coordinator.snapshot import Snapshot
    from vmapipe.control.coordinator.status_socket import JobServer
    from vmapipe.control.qemu.freezing import Freezing
    from vmapipe.control.qemu.machine import RunningMachine
    from vmapipe.control.qemu.vmstate import Instant
    from vmapipe.runtime.child_event_types import BaseChosenEvent
    from vmapipe.runtime.event_types import BaseEvent, DoneEvent, InstantEvent


# When one process has failed, the others hear of it from the archiver and end
# by themselves, and the archiver knows the reason best. It takes milliseconds.
_VERDICT_S = 2.0
# Between a service's word to us that all is stored and that to the producers: a connection
# that was lost in this moment is noticed after 9 s, and the answer is asked for again.
_ALL_TOLD_S = 60.0


class _FirstFailure:
    """The process of a job that failed first, and the time the archiver still has to say why."""

    def __init__(self, archiver: Child) -> None:
        self._archiver = archiver
        self._failed: Child | None = None
        self._settled_at = float("inf")

    def note(self, child: Child, event: Event | None) -> None:
        if self._failed is None and _has_failed(child, event):
            self._failed = child
            # Of a process that was killed the archiver knows no better reason.
            was_killed = (child.exit_code or 0) < 0
            grace_s = 0.0 if was_killed or child is self._archiver else _VERDICT_S
            self._settled_at = time.monotonic() + grace_s

    @property
    def wait_s(self) -> float:
        """The longest time to wait for the processes' next events."""
        return min(1.0, max(0.0, self._settled_at - time.monotonic()))

    @property
    def is_settled(self) -> bool:
        """True when one has failed and the archiver will not say more."""
        if self._failed is None:
            return False
        return not self._archiver.running or time.monotonic() >= self._settled_at

    def report(self, emit: Emit) -> None:
        """Raises Failure, or UsageError, if one has failed before the archive was stored."""
        if self._failed is None:
            return
        if self._archiver.exit_code == 0:
            emit({"event": "notice", "text": f"{self._failed.verdict()}, after all was stored"})
            return
        archiver_spoke = self._archiver.exit_code and self._archiver.error
        told = self._archiver if archiver_spoke else self._failed
        raise (UsageError if told.exit_code == EXIT_USAGE else Failure)(told.verdict())


class Disk(NamedTuple):
    """A raw image, a block device or the URI of an NBD export, and its name in the archive.

    `guard`: the control socket of the process that serves it to a guest; empty:
    the disk is at rest, or a running QEMU's.
    """

    name: str
    path: str
    guard: str = ""
    #: The producer's options for an image that is not simply raw.
    reading: tuple[str, ...] = ()
    #: The disk of a running QEMU.
    size_bytes: int = 0


class JobPlan(NamedTuple):
    """`archive` is an output as the archiver takes it; `speed_bytes_s` 0: no limit."""

    job_id: bytes
    disks: Sequence[Disk]
    archive: str
    archiver_options: Sequence[str]
    speed_bytes_s: int = 0
    #: What the guest of disks in use may feel at most; None: that is not measured.
    latency: LatencyWish | None = None
    #: Descriptors that the archiver inherits: its output, configs that are not files.
    pass_fds: Sequence[int] = ()
    #: For the producers of disks in use.
    buffer_options: Sequence[str] = ()
    #: The QEMU whose disks these are, all of them.
    machine: RunningMachine | None = None
    #: Its memory, too.
    with_memory: bool = False
    #: What keeps the disks as they were, where they are a running machine's that is not `machine`.
    snapshot: Snapshot | None = None
    #: The archiver, if that is a service elsewhere; `archive` is a name there.
    service: Service | None = None
    #: How the guest's file systems are frozen for the instant; None: they are not.
    freezing: Freezing | None = None
    #: Disks are read one after the other.
    in_turn: bool = False
    priorities: Priorities = AS_INHERITED
    #: An earlier archive, of which unchanged clusters are taken, `auto`: which a service chooses; empty: all is sent.
    base: str = ""
    #: What a service needs to know to choose it, as options of its archiver.
    base_options: Sequence[str] = ()
    #: Told which base a service has chosen, before anything begins.
    on_base: Callable[[BaseChosenEvent], None] | None = None
    #: The archive can be the base of a later one that reads all: digests of its clusters are made.
    with_digests: bool = False
    #: Answers questions about the job from outside.
    server: JobServer | None = None


class BackupJob:
    """Runs once what its plan says."""

    def __init__(self, plan: JobPlan) -> None:
        self.plan = plan
        #: What is wrong with the base, where that is why this backup failed: a full one would do.
        self.base_damage = ""
        #: Uploads to object stores that the archiver has begun: name and id.
        self.uploads: list[tuple[str, str]] = []
        # What the archiver says of the base, until QEMU has said what it knows of the disks.
        self._base_event: BaseEvent | None = None
        # Devices of which all is sent.
        self._ending = set[str]()
        # When the producers of what a service has stored must have heard so.
        self._told_by = float("inf")

    def run(self, emit: Emit, cancel: Cancel, commands: ChildCommands | None = None) -> None:
        """Raises Failure when nothing was stored. `commands` may change the speed meanwhile."""
        commands = commands or ChildCommands()
        self._check()
        names = [disk.name for disk in self.plan.disks]
        self._steering = Steering(
            self.plan.speed_bytes_s, names, self.plan.latency, in_turn=self.plan.in_turn
        )
        started = time.monotonic()
        with OwnFolder("job") as folder:
            children = Children(fork=True)
            try:
                with children:
                    children.watch(cancel.fd)
                    children.watch(commands.fd)
                    try:
                        self._start_archiver(children, folder, emit, cancel)
                        if self.plan.snapshot:
                            self._report_instant(self.plan.snapshot.begin(emit, cancel), emit)
                            children.watch(self.plan.snapshot.fd)
                            self._steer(self.plan.snapshot, children, emit)
                        self._start_producers(children, folder, self._steering.share)
                        if self.plan.server:
                            self.plan.server.begin(self.plan.speed_bytes_s, children.pids)
                            children.watch(self.plan.server.fd)
                        self._watch(children, emit, cancel, folder, commands)
                        self._release(emit, stored=children.all[0].exit_code == 0)
                    except DoubtfulBase as doubt:
                        self.base_damage = str(doubt)
                        raise
                    finally:
                        self._release(emit)
            finally:
                self._remove_leftovers(children)
            done: DoneEvent = {
                "event": "done",
                "seconds": round(time.monotonic() - started, 3),
                "read_bytes": self._steering.read_bytes,
                "speed_bytes_s": self._steering.limit_bytes_s,
                "cpu_s": round(sum(child.cpu_s for child in children.all), 3),
                "peak_rss_bytes": sum(child.peak_rss_bytes for child in children.all),
            }
            if felt := self._steering.result():
                done["guest_latency"] = felt
            emit(done)

    def _start_archiver(
        self, children: Children, folder: OwnFolder, emit: Emit, cancel: Cancel
    ) -> None:
        if self.plan.service:
            module = "vmapipe.control.coordinator.remote_archiver"
            args = [f"--archiver={self.plan.service.endpoint}", *self.plan.service.link_options]
        else:
            module = "vmapipe.archiver.main"
            args = [f"--listen=ipc://{folder.path}/sock"]
            if self.plan.priorities.nice is None and any(disk.guard for disk in self.plan.disks):
                args.append("--stand-back")
        # With "=", because a name may begin with a dash.
        args += [f"--output={self.plan.archive}", f"--job={self.plan.job_id.hex()}"]
        args += [f"--device={name}" for name in self.names]
        args += self.plan.archiver_options
        if self.plan.with_digests:
            args.append("--digests")
        if self.plan.base:
            args += [f"--base={self.plan.base}", *self.plan.base_options]
        archiver = children.start("the archiver", module, args, self.plan.pass_fds)
        self.plan.priorities.apply(archiver.pid, guest_waits=False)
        if self.plan.service:
            await_opened(children, archiver, emit, cancel, self.plan.on_base)

    def _start_producers(self, children: Children, folder: OwnFolder, speed: int) -> None:
        if self.plan.machine:
            self.plan.machine.prepare(speed)
        if self.plan.service:
            common = [f"--archiver={self.plan.service.endpoint}", *self.plan.service.link_options]
        else:
            common = [f"--archiver=ipc://{folder.path}/sock"]
        common.append(f"--job={self.plan.job_id.hex()}")
        for index, disk in enumerate(self.plan.disks):
            args = [*common, f"--name={disk.name}"]
            more, fds = self._source_args(index, disk)
            args += [f"--speed={speed}", *more]
            name = f"the producer of {disk.name!r}"
            child = children.start(name, "vmapipe.producer.main", args, fds)
            self.plan.priorities.apply(child.pid, guest_waits=bool(disk.guard or self.plan.machine))
        if self.plan.machine and self.plan.with_memory:
            args = [*common, *self.plan.buffer_options]
            more, fds = self.plan.machine.stream_arguments()
            name = "the producer of the machine's memory"
            child = children.start(name, "vmapipe.producer.main", [*args, *more], fds)
            self.plan.priorities.apply(child.pid, guest_waits=True)
        if self.plan.machine:
            self.plan.machine.protect(children.all[1:])
            children.watch(self.plan.machine.fd)

    def _source_args(self, index: int, disk: Disk) -> tuple[list[str], list[int]]:
        """Return a producer's options for its disk, and the descriptors that it needs for them."""
        if self.plan.machine:
            fd = self.plan.machine.sink_fd(index)
            args = [f"--disk={disk.name}", f"--sink-fd={fd}", f"--size={disk.size_bytes}"]
            args += ["--await-sample"] if self.plan.machine.takes_samples else []
            return [*args, "--await-job", *self.plan.buffer_options], [fd]
        args = [f"--disk={disk.path}", *disk.reading]
        if disk.guard:
            args += [f"--guard={disk.guard}", *self.plan.buffer_options, *self._steering.options]
        return args, []

    def _remove_leftovers(self, children: Children) -> None:
        """Remove what an archiver that failed or was killed could not remove itself."""
        exit_code = (children.all and children.all[0].exit_code) or 0
        if not exit_code or self.plan.service:
            return
        # Also where the archiver has done so: it waits for few seconds only, and a part
        # that was still on its way then may have reached the store after that.
        for name, upload in self.uploads:
            from vmapipe.archiver.outputs.object import abort_upload

            abort_upload(name, upload)
        if exit_code > 0:
            return
        # Imported here: it is seldom needed, and a backup starts sooner without.
        from vmapipe.archiver.outputs.file import remove_leftover
        from vmapipe.archiver.outputs.manifests import files_of

        named = [
            w.removeprefix("--manifest=") for w in self.plan.archiver_options if "--manifest=" in w
        ]
        ours = files_of(self.plan.archive) if is_path(self.plan.archive) else []
        for path in (*ours, *filter(is_path, named)):
            remove_leftover(path)

    def _check(self) -> None:
        if not self.plan.disks and not any(
            "--config" in word for word in self.plan.archiver_options
        ):
            raise UsageError(
                "nothing to back up: name a disk with --disk or --nbd, or a machine that runs with "
                "--qmp, --libvirt, --pve or --monitor"
            )
        try:
            check_disk_names([disk.name for disk in self.plan.disks], int(self.plan.with_memory))
        except LimitError as error:
            raise UsageError(str(error)) from error

    def _watch(
        self,
        children: Children,
        emit: Emit,
        cancel: Cancel,
        folder: OwnFolder,
        commands: ChildCommands,
    ) -> None:
        """Return when all processes have ended well. Raises Failure with the best reason there is."""
        first = _FirstFailure(children.all[0])
        unattached = {disk.name for disk in self.plan.disks if disk.guard}
        if self.plan.machine:
            unattached = set(self.names)
        while any(child.running for child in children.all):
            for child, event in children.wait(min(first.wait_s, self._steering.wait_s)):
                if event is not None:
                    if event["event"] == "begun":
                        # All are connected: the socket's name is not needed any more, and
                        # when this process is killed after it has said so, no folder is left.
                        folder.clear()
                    self._take(event, unattached, emit, cancel, children)
                first.note(child, event)
            self._attend(children, commands, emit)
            if cancel.asked:
                self._stop_cancelled(children, emit, cancel)
                return
            if first.is_settled or self._is_over(children.all[0]):
                break
        self._is_over(children.all[0])
        first.report(emit)

    def _stop_cancelled(self, children: Children, emit: Emit, cancel: Cancel) -> None:
        """Stop all processes. Raises Cancelled unless the archive was stored before."""
        self._release(emit)
        children.stop()
        if children.all[0].exit_code != 0 or (self.plan.service and self._unsent):
            raise Cancelled(cancel.reason, cancel.signum)
        emit({"event": "notice", "text": f"{cancel.reason}: too late, it is stored"})

    @property
    def _unsent(self) -> list[str]:
        return [name for name in self.names if name not in self._ending]

    def _is_over(self, archiver: Child) -> bool:
        """True when a service has stored all, and has had the time to tell the producers, too.

        What a producer told before that has been heard by then. Raises Failure if it lies.
        """
        if not self.plan.service or archiver.exit_code != 0:
            return False
        if self._unsent:
            raise Failure(
                f"{self.plan.service.endpoint}: this is not a vmapipe archiver: it stored all before "
                f"{self._unsent[0]!r} was sent"
            )
        self._told_by = min(self._told_by, time.monotonic() + _ALL_TOLD_S)
        return time.monotonic() >= self._told_by

    def _take(
        self,
        event: Event,
        unattached: set[str],
        emit: Emit,
        cancel: Cancel,
        children: Children,
    ) -> None:
        """Take what a child has told. Raises Failure."""
        if event["event"] == "attached":
            unattached.discard(event["device"])
            if not unattached:
                self._steer(self.plan.machine or self._steering.told, children, emit)
                self._begin(emit, cancel)
        elif event["event"] == "ending":
            self._ending.add(event["device"])
        elif event["event"] == "base" and self.plan.machine:
            self._base_event = event
        elif event["event"] == "base-damaged":
            self.base_damage = event["text"]
        elif event["event"] == "upload":
            self.uploads.append((event["archive"], event["upload"]))
        elif event["event"] == "job-speed":
            if self.plan.machine:
                self.plan.machine.set_job_speed(event["device"], event["bytes_per_s"])
        elif event["event"] not in ("draining", "error", "felt"):
            emit(event)
        if self._steering.take(event):
            self._send_share(children)

    def _attend(self, children: Children, commands: ChildCommands, emit: Emit) -> None:
        """Take what others say: QEMU, and who asks or steers us. Raises Failure."""
        for command in commands.take():
            self._carry_out(command, children, emit)
        if self.plan.machine:
            self.plan.machine.poll()
            self._tell(self.plan.machine.notices, emit)
            if self.plan.machine.is_done:
                children.unwatch(self.plan.machine.fd)
            self._report_instant(self.plan.machine.take_instant(), emit)
        if self.plan.snapshot:
            self.plan.snapshot.poll()
            self._tell(self.plan.snapshot.notices, emit)
        if self._steering.poll(emit):
            self._send_share(children)
        if self.plan.server:
            self.plan.server.serve()

    @staticmethod
    def _tell(notices: list[str], emit: Emit) -> None:
        while notices:
            emit({"event": "notice", "text": notices.pop(0)})

    def _carry_out(self, command: Command, children: Children, emit: Emit) -> None:
        """While it runs: another speed, of all disks together."""
        speed = speed_in(command)
        if speed is None:
            return
        self._steering.limit(speed)
        self._send_share(children)
        emit({"event": "speed", "bytes_per_s": speed})

    def _steer(self, source: Measurable, children: Children, emit: Emit) -> None:
        """Measure from now on what the guest feels, if that is wanted. Raises Failure."""
        self._steering.begin(source, emit)
        self._send_share(children)

    def _send_share(self, children: Children) -> None:
        share = self._steering.share
        if self.plan.machine:
            self.plan.machine.set_speed(share)
        for child in children.all[1:]:
            child.tell(speed_command(share))

    @property
    def names(self) -> list[str]:
        """The names of all devices of the archive."""
        return [disk.name for disk in self.plan.disks] + [VMSTATE_NAME] * self.plan.with_memory

    def _begin(self, emit: Emit, cancel: Cancel) -> None:
        """All disks in use are ready: choose the instant. Raises Failure."""
        if self.plan.freezing and self.plan.machine and not self.plan.machine.is_running:
            # The guest is paused: nothing in it can answer, nor write.
            text = "the guest is not running: its file systems are backed up without its agent"
            emit({"event": "notice", "text": text})
            held = self._choose_instant()
        elif self.plan.freezing:
            # Imported here: it takes as long as all the rest of a start.
            from vmapipe.control.qemu.freezing import frozen_by

            with frozen_by(self.plan.freezing, emit, cancel):
                held = self._choose_instant()
        else:
            held = self._choose_instant()
        self._report_instant(held, emit)

    def _report_instant(self, held: Instant | None, emit: Emit) -> None:
        if held is None:
            return
        instant: InstantEvent = {"event": "instant", "held_s": round(held.seconds, 4)}
        if held.how:
            instant["memory"] = held.how
        emit(instant)
        if self.plan.machine and self.plan.machine.methods:
            from vmapipe.control.coordinator.live_base import base_report

            emit(base_report(self._base_event, self.plan.machine.methods))

    def _choose_instant(self) -> Instant | None:
        """For how long disks, or the machine, were held; None: it will be known later."""
        if self.plan.machine:
            return self.plan.machine.begin()
        # Imported here, as all that only disks in use need: a backup starts sooner without.
        from vmapipe.control.monitor.client import begin_together
        from vmapipe.control.qemu.vmstate import Instant

        guards: dict[str, list[str]] = {}
        for disk in self.plan.disks:
            if disk.guard:
                guards.setdefault(disk.guard, []).append(disk.name)
        return Instant("", begin_together(guards, self.plan.job_id))

    def _release(self, emit: Emit, *, stored: bool = False) -> None:
        """QEMU is rid of us, while the producers still serve it."""
        for source in (self.plan.machine, self.plan.snapshot):
            if source is not None:
                text = source.end(stored=stored)
                self._tell([text] if text else [], emit)
                self._tell(source.notices, emit)


def _has_failed(child: Child, event: Event | None) -> bool:
    """It has ended badly, or has nothing left to do but to keep QEMU content."""
    if event is not None and event["event"] == "draining":
        child.error = child.error or str(event["text"])
        return True
    return event is None and bool(child.exit_code)
