# SPDX-License-Identifier: Apache-2.0
"""A running QEMU during one backup: its jobs begun, watched and ended, its guest unharmed."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmapipe.control.qemu.bitmaps import DiskMethod, archive_of, records_in
from vmapipe.control.qemu.cbw_filters import (
    Handover,
    SnapshotCheck,
    broken_reason,
    choose_method,
)
from vmapipe.control.qemu.change_tracking import ChangeTracking, TrackingOptions
from vmapipe.control.qemu.disks import (
    DiskChoice,
    DiskChoiceOptions,
    MachineDisk,
    choose_disks,
)
from vmapipe.control.qemu.features import find_features
from vmapipe.control.qemu.guardian import GuardianClient, SinkSocket, monitor_arguments
from vmapipe.control.qemu.guest_latency import GuestLatency
from vmapipe.control.qemu.holes import Holes
from vmapipe.control.qemu.image_damage import TruncatedLook, used_images
from vmapipe.control.qemu.job_errors import JobErrors
from vmapipe.control.qemu.jobs import (
    SLOW_BYTES_S,
    BackupSettings,
    BackupTarget,
    Depth,
    NodeBitmap,
    absent_name,
    begin_commands,
    check_name,
    depth_for,
    filter_name,
    job_name,
    refusal_hint,
    run_prefix,
)
from vmapipe.control.qemu.leftovers import (
    connect_or_unblock,
    remove_leftovers,
    remove_worthless_records,
)
from vmapipe.control.qemu.machine_view import check_run_state, is_running, qemu_pid, see_machine
from vmapipe.control.qemu.poweroff import PoweroffHold
from vmapipe.control.qemu.qemu_process import uid_of_qemu
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qemu.tpm import TpmState
from vmapipe.control.qemu.undo import clean_up
from vmapipe.control.qemu.vmstate import Instant, MemorySaving
from vmapipe.control.qmp.addresses import parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import Command, QmpRefused
from vmapipe.producer.nbd.backend import EXPORT_NAME
from vmapipe.runtime.children import Child
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import JOB_SPEED_SET, JobCopied, copied_command

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import Rest

# Any of these may mean that a job of ours has changed; what it is, QEMU is asked.
_JOB_EVENTS = frozenset(
    {"BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_PENDING"}
)
# With sinks that answer, jobs end within a tenth of a second. One that does not
# (its process hangs) makes a guest wait: the guardian ends it, and cleans up itself.
_CLEAN_S = 5.0
# How often QEMU is asked about its jobs where it is asked only now and then; and what its guest
# feels, which takes it less than a millisecond.
_SHARED_POLL_S, _LATENCY_S, _SHARED_LATENCY_S = 0.5, 0.25, 1.0


class RunningMachine:
    """One backup's connection to its QEMU.

    Call in this order: `choose`, `prepare`, `protect`, `begin`, `poll` …, `end`. All but `end` raise
    Failure.
    """

    def __init__(
        self, qmp: str, guest_wait_s: int, *, with_memory: bool = False, share: bool = False
    ) -> None:
        """Connect. `share`: QEMU's monitor is ours for the moment of each command only."""
        self._guest_wait_s = guest_wait_s
        self._with_memory = with_memory
        self._saving: MemorySaving | None = None
        self._qmp = qmp
        self._address = parse_address(qmp)
        # Also in a node's name, of which QEMU takes 31 characters.
        self._run = secrets.token_hex(4)
        # First of all: it is ready when it is needed.
        guardian = GuardianClient(monitor_arguments(self._address, share=share), self._run)
        try:
            self._link = connect_or_unblock(qmp, share=share)
        except BaseException:
            guardian.kill()
            raise
        self._guardian: GuardianClient | None = guardian
        self._disks: tuple[MachineDisk, ...] = ()
        self._speed_bytes_s = 0
        self._folder: SinkFolder | None = None
        self._sinks: list[SinkSocket] = []
        self._producers: list[Child] = []
        self._handover: Handover | None = None
        self._tracking: ChangeTracking | None = None
        # Those whose producers know that QEMU's job has ended well, by index.
        self._reported: set[int] = set()
        self._holes = Holes(self._link, self._run)
        self._errors = JobErrors(self._link)
        self._look = TruncatedLook()
        #: Texts for the user; the caller that prints them removes them.
        self.notices: list[str] = []
        # Whose state is one of the disks.
        self._tpm: TpmState | None = None
        self._poweroff = PoweroffHold(self._link, self._run)
        self._latency: GuestLatency | None = None
        self._depth: Depth | None = None
        self._poll_at = 0.0
        self._pid: int | None = None
        self._has_begun = self._jobs_ended = self._is_clean = self._link_closed = False

    @property
    def fd(self) -> int:
        """Readable when `poll` has something to see."""
        return self._link.fd

    @property
    def is_done(self) -> bool:
        """QEMU holds nothing of ours any more: whether it ends does not matter now."""
        return self._is_clean

    def choose(self, wishes: DiskChoiceOptions) -> DiskChoice:
        """Remove what a crashed backup has left, and choose the disks."""
        remove_leftovers(self._link, self._owner_of_qemu)
        check_run_state(self._link)
        machine, self._tpm = see_machine(self._link, self._run)
        choice = choose_disks(machine, wishes)
        self._disks = choice.disks
        self._look.expect(used_images(choice.disks, machine.blocks, machine.nodes, machine.graph))
        if self._tpm and not any(disk.device == self._tpm.disk.device for disk in self._disks):
            self._tpm = None
        return choice

    def prepare(self, speed_bytes_s: int) -> None:
        """Make the sockets of the sinks, and start their guardian. `speed_bytes_s` is each disk's."""
        self._speed_bytes_s = speed_bytes_s
        folder = self._folder = SinkFolder.make()
        for index, disk in enumerate(self._disks):
            name = f"{index}.sock"
            path = os.path.join(folder.path, name)
            self._sinks.append(SinkSocket(folder.listen(name), path, disk.size_bytes))
        self._give_to_qemu(folder)
        stream_fd: int | None = None
        if self._with_memory:
            self._saving = MemorySaving(self._link, self._run, folder, self._guest_wait_s)
            stream_fd = self._saving.stream_fd
        self._known_guardian.protect(folder.path, self._sinks, stream_fd)
        # From here on until the guardian is told otherwise it answers for QEMU.

    def sink_fd(self, index: int) -> int:
        """The listening socket for the producer of this disk."""
        return self._sinks[index].listener.fileno()

    def stream_arguments(self) -> tuple[list[str], list[int]]:
        """Return the options of the memory's producer, and the descriptors that it inherits."""
        if self._saving is None:
            raise RuntimeError("the memory is not saved")
        fds = [self._saving.stream_fd, self._saving.verdict_fd]
        size_bytes = self._saving.estimate_bytes()
        return [f"--stream-fd={fds[0]}", f"--verdict-fd={fds[1]}", f"--size={size_bytes}"], fds

    def protect(self, producers: Sequence[Child]) -> None:
        """Register the producers with the guardian, in the order of the disks; last the memory's,
        if any.
        """
        self._producers = list(producers)
        for index, child in enumerate(producers):
            self._known_guardian.watch(index, child.pid)
        for sink in self._sinks:
            sink.listener.close()
        if self._saving is not None:
            self._saving.started()

    @property
    def is_running(self) -> bool:
        """True while the guest runs; a qemu-storage-daemon has none, and counts as running."""
        return is_running(self._link)

    def recorded_archives(self) -> frozenset[bytes]:
        """Return the uuids of the archives since which QEMU has recorded what changes."""
        nodes = self._link.execute(Command("query-named-block-nodes", {"flat": True}))
        return frozenset(archive_of(record.name) for record in records_in(nodes))

    @property
    def takes_samples(self) -> bool:
        """True when producers are told of what they have to compare with the base."""
        return self._tracking is not None and self._tracking.takes_samples

    def track_changes(self, options: TrackingOptions) -> None:
        """Send only what has changed where that is certain, and record what changes from now on.

        Before `begin`.
        """
        self._tracking = ChangeTracking(self._link, self._run, options)

    @property
    def methods(self) -> Mapping[str, DiskMethod]:
        """How each disk is backed up, when the jobs have begun; empty: changes are not tracked."""
        return self._tracking.methods if self._tracking else {}

    def measure(self, bound_s: float, notices: list[str]) -> GuestLatency | None:
        """Measure what the guest feels from now on. Before `begin`."""
        every_s = _SHARED_LATENCY_S if self._link.is_shared else _LATENCY_S
        self._latency = GuestLatency(self._link, bound_s, every_s, notices)
        if self._latency.begin():
            self._depth = depth_for(bound_s)
            return self._latency
        notices.append(
            "--guest-latency has no effect: this QEMU has no device whose requests it counts (a "
            "storage daemon's exports are not counted)"
        )
        return None

    def begin(self) -> Instant | None:
        """Begin the jobs of all disks: this is the instant.

        None: it comes later, see `take_instant`.
        """
        features = find_features(self._link, absent_name(self._run))
        way = choose_method(self._link, self._run, features, self._disks, self._guest_wait_s)
        bitmaps = self._bitmaps()
        targets = [
            BackupTarget(
                *(disk, sink.path, EXPORT_NAME, index in way.handed_over, way.timeout_s),
                *(bitmaps.get(disk.name), self._depth),
            )
            for index, (disk, sink) in enumerate(zip(self._disks, self._sinks, strict=True))
        ]
        if way.handed_over:
            taken = {index: targets[index] for index in way.handed_over}
            self._handover = Handover(self._link, self._run, taken, way.features)
        speed = SLOW_BYTES_S if self._saving else self._speed_bytes_s
        settings = BackupSettings(self._run, speed, self._guest_wait_s)
        jobs = begin_commands(targets, settings, way.features)
        if self._tpm is not None:
            jobs = jobs._replace(targets=[self._tpm.add(self._folder), *jobs.targets])
        if self._saving is not None:
            self._saving.begin(jobs)
            return self.take_instant()
        try:
            for command in jobs.targets:
                self._link.execute(command)
            for command in jobs.filters:
                with contextlib.suppress(QmpRefused):
                    self._link.execute(command)
            started = time.monotonic()
            self._link.execute(jobs.transaction)
        except QmpRefused as error:
            raise Failure(f"QEMU refuses the backup: {error}{refusal_hint(str(error))}") from error
        instant = Instant("", time.monotonic() - started)
        self._go_on()
        return instant

    def _bitmaps(self) -> Mapping[str, NodeBitmap]:
        """Return what is to be copied of those disks of which it is not all, by name."""
        bitmaps: Mapping[str, NodeBitmap] = {}
        self._pid = qemu_pid(self._link)
        if self._folder is None:
            return bitmaps
        if self._tracking is not None:
            made = [self._tpm.disk.name] if self._tpm else []
            bitmaps = self._tracking.prepare(self._disks, made, self._folder)
            self.notices += self._tracking.notices
        else:
            remove_worthless_records(self._link)
        rest = [disk for disk in self._disks if disk.name not in bitmaps]
        return {**self._holes.leave_out(rest, self._pid, self._folder), **bitmaps}

    def _go_on(self) -> None:
        """Continue after the instant: from now on the jobs are as quick as they may be."""
        self._has_begun = True
        if self._tpm is not None:
            self._tpm.check()
        if self._handover is not None:
            copied = self._handover.carry_out()
            for index in set(self._handover.indices).difference(copied):
                self._holes.copies_all(self._disks[index].name)
                if self._tracking is not None:
                    self._tracking.copies_all(self._disks[index])
        self.set_speed(self._speed_bytes_s)
        if self._tracking is not None and self._folder is not None:
            self._tracking.tell_samples(self._disks, self._producers, self._folder)
        self._poweroff.begin(self._pid, self._folder.path if self._folder else "")
        self._poll_jobs()  # short ones may have ended

    def take_instant(self) -> Instant | None:
        """Return the instant of a backup with memory, once, as soon as it is known."""
        if self._has_begun or self._saving is None or self._saving.instant is None:
            return None
        self._go_on()
        return self._saving.instant

    def set_speed(self, bytes_per_s: int) -> None:
        """Limit each disk's job from now on; 0: no limit."""
        self._speed_bytes_s = bytes_per_s
        if not self._has_begun or self._is_clean or self._link_closed:
            return
        for index in range(len(self._disks)):
            self._set_job_speed(index, bytes_per_s)

    def set_job_speed(self, disk: str, bytes_per_s: int) -> None:
        """Lift the limit of one disk's job while it copies no data, or put it in force again.

        A job's own limit counts holes and zeroes as well; what comes of data, its sink knows.
        """
        current = bytes_per_s in (0, self._speed_bytes_s)  # else it is of a limit before
        if current and self._has_begun and not self._is_clean and not self._link_closed:
            index = [known.name for known in self._disks].index(disk)
            self._set_job_speed(index, bytes_per_s)
            self._producers[index].tell(JOB_SPEED_SET)

    def _set_job_speed(self, index: int, bytes_per_s: int) -> None:
        arguments = {"device": job_name(self._run, index), "speed": bytes_per_s}
        # A job that has ended needs no limit.
        with contextlib.suppress(QmpRefused):
            self._link.execute(Command("block-job-set-speed", arguments))

    def poll(self) -> None:
        """Process QEMU's events and the state of its jobs. Raises Failure for one that has failed."""
        if self._is_clean or self._link_closed:
            return
        if self._guardian is not None and not self._guardian.is_alive:
            raise Failure(
                "the guardian, which protects the guest's writes, was killed; without it the "
                "backup does not go on"
            )
        events = self._link.events()
        is_due = any(event["event"] in _JOB_EVENTS for event in events)
        if self._link.is_shared and time.monotonic() >= self._poll_at:
            # Events are missed.
            is_due, self._poll_at = True, time.monotonic() + _SHARED_POLL_S
        if self._saving is not None:
            for event in events:
                self._saving.handle_event(event)
            self._saving.poll()
        for event in events:
            self._errors.note(event)
        if self._poweroff.is_off_now(events, asks=is_due and self._link.is_shared):
            self.notices.append("the guest has powered off; QEMU ends when its backup is done")
        if self._has_begun:
            self._look.poll(self._pid, self.notices)
        if self._has_begun and is_due:
            self._poll_jobs()
        if self._jobs_ended and (self._saving is None or self._saving.is_done):
            self._clean_up()

    def _poll_jobs(self) -> None:
        answer: list[dict[str, Any]] = self._link.execute(Command("query-jobs", {}))
        jobs = {job["id"]: job for job in answer}
        done = 0
        for index, disk in enumerate(self._disks):
            job = jobs.get(job_name(self._run, index))
            if job is None:
                raise Failure(f"disk {disk.name!r}: somebody has removed QEMU's backup job")
            if job.get("error"):
                reason = self._handover.why_covered(index) if self._handover else ""
                raise Failure(f"disk {disk.name!r}: {reason or self._errors.why_failed(disk, job)}")
            if job["status"] == "pending":
                self._finish(index)
            if job["status"] == "concluded":
                done += 1
                self._report_copied(index, job.get("current-progress"))
        self._jobs_ended = done == len(self._disks)

    def _finish(self, index: int) -> None:
        """Let a job end that has copied all, if what it has copied is of the instant."""
        look = SnapshotCheck(check_name(self._run, index), filter_name(self._run, index))
        if reason := broken_reason(self._link, look):
            raise Failure(f"disk {self._disks[index].name!r}: {reason}")
        # An event tells that it has ended.
        with contextlib.suppress(QmpRefused):
            self._link.execute(Command("job-finalize", {"id": job_name(self._run, index)}))

    def _report_copied(self, index: int, copied_bytes: int | None) -> None:
        """Report the job's end to its producer, without which nothing is stored.

        Raises Failure when it is not known how much should have come.
        """
        disk = self._disks[index]
        is_incremental = disk.name in self.methods and self.methods[disk.name].is_incremental
        is_thin = disk.is_thin or self._holes.are_left_out(disk.name)
        if copied_bytes is None and (is_thin or is_incremental):
            raise Failure(f"disk {disk.name!r}: QEMU does not tell how much its job has copied")
        if index not in self._reported:
            self._reported.add(index)
            rest: Rest = "unchanged" if is_incremental else "zero" if is_thin else "none"
            self._producers[index].tell(copied_command(JobCopied(copied_bytes or 0, rest)))

    def _clean_up(self) -> None:
        if self._latency is not None:
            self._latency.end()
        clean_up(self._link, run_prefix(self._run), lambda job: True, _CLEAN_S)
        self._is_clean = True

    def end(self, *, stored: bool = False) -> str:
        """Remove all that is ours from QEMU; return a text when something remains. Never raises.

        Call it while the producers still serve: QEMU's requests have to be
        answered until its jobs have ended. `stored`: the archive is on disk; what is recorded
        since its instant stays.
        """
        text = ""
        if self._guardian is not None and not self._guardian.protects:
            self._guardian.kill()
        elif self._guardian is not None and not self._is_clean:
            text = self._end_jobs()
        elif self._guardian is not None:
            self._guardian.dismiss()
        self._guardian = None
        self._look.end(self.notices, stored=stored)
        self._settle_records(stored=stored)
        self._close_link()
        for sink in self._sinks:
            sink.listener.close()
        if self._saving is not None:
            self._saving.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            if not text:
                folder.remove()
            folder.close()
        return text

    def _settle_records(self, *, stored: bool) -> None:
        """Remove the records of changes that are of no use any more, once. Raises nothing."""
        tracking, self._tracking = self._tracking, None
        if tracking is None or not tracking.methods:
            return
        with contextlib.suppress(Failure):
            if self._link_closed:  # the guardian needed the monitor
                self._link = open_link(self._qmp, share=self._link.is_shared)
                self._link_closed = False
            tracking.settle(self._link, stored=stored)

    def _end_jobs(self) -> str:
        guardian = self._guardian
        if guardian is None:
            return ""
        # While the memory is being saved the guest may wait for its reader: the
        # guardian does so at once.
        saving = self._saving is not None and self._saving.has_begun and not self._saving.is_done
        can_wait = not (saving and guardian.is_alive)
        if can_wait and all(child.running for child in self._producers):
            with contextlib.suppress(Failure):
                self._clean_up()
                guardian.dismiss()
                return ""
        # A target is gone, or QEMU does not answer us: the guardian knows the
        # order that spares the guest. The monitor serves one client at a time.
        self._close_link()
        if guardian.take_over():
            return ""
        return (
            f"jobs and nodes named {run_prefix(self._run)}… may still be in QEMU; the guardian "
            f"goes on trying, and `vmapipe cleanup --qmp {self._address}` removes them later"
        )

    @property
    def _known_guardian(self) -> GuardianClient:
        if self._guardian is None:
            raise RuntimeError("the backup has ended")
        return self._guardian

    def _close_link(self) -> None:
        if not self._link_closed:
            self._link_closed = True
            self._link.close()

    def _give_to_qemu(self, folder: SinkFolder) -> None:
        """Another user's QEMU, when we are root, has to reach the sockets."""
        owner = self._owner_of_qemu()
        if owner != os.geteuid() == 0:
            folder.give_to(owner)

    def _owner_of_qemu(self) -> int:
        return uid_of_qemu(self._address.path, qemu_pid(self._link))
