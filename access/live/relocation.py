# SPDX-License-Identifier: Apache-2.0
"""Moves the disks of a running machine from an archive to their targets: looks, and does.

What is to be done is decided in moves.py; here QEMU is asked, the archive's server kept alive,
and what was decided carried out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vmapipe.access.live.carrier import MoveCarrier
from vmapipe.access.live.moves import (
    IO_ERROR,
    PAUSED,
    GiveUp,
    MachineView,
    Note,
    Step,
    changes,
    is_finished,
    next_steps,
)
from vmapipe.access.live.record import LiveNote, NoteFile
from vmapipe.access.live.server import ArchiveServer
from vmapipe.control.qmp.connection import Command, QmpGone, QmpRefused
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import DoneEvent

# A server that has ended, and an event of QEMU's, are seen at once.
_LOOK_S = 1.0
_PROGRESS_S = 0.5
# Of QEMU's events that come without an end, no more is looked at.
_LEAST_LOOK_S = 0.02
_RETRY_S = 1.0
# A switch takes milliseconds. What takes longer is the target's storage, which has to be waited for.
_SLOW_SWITCH_S = 10.0
# QEMU deletes a node that it needs no more at once; one of a user's -drive never.
_DELETE_TRIES = 20
_MUST_SUCCEED = frozenset({"blockdev-add", "blockdev-mirror"})


class Relocation:
    """One run: all disks of the note, as fast as `speed_bytes_s` (0: no limit)."""

    def __init__(
        self,
        carrier: MoveCarrier,
        server: ArchiveServer,
        note: LiveNote,
        note_file: NoteFile,
        emit: Emit,
        cancel: Cancel,
        speed_bytes_s: int = 0,
    ) -> None:
        self._carrier = carrier
        self._server = server
        self._note = note
        self._note_file = note_file
        self._emit = emit
        self._cancel = cancel
        self._speed = speed_bytes_s
        self._moves = carrier.moves(note.disks)
        self._before: MachineView | None = None
        self._retried = 0.0
        self._tries: dict[str, int] = {}
        # By job, and "" for the machine: since when it fails, and how far it was then.
        self._failing: dict[str, tuple[float, int]] = {}
        self._held_since = time.monotonic()
        self._told = 0.0

    def run(self) -> None:
        """Until all disks are on their targets.

        Raises Failure, QmpGone, Cancelled; the machine runs on then, or stands still unharmed.
        """
        waiting = [move.source for move in self._moves if move.job not in self._note.noted.moved]
        self._carrier.check_policies(waiting)
        while True:
            seen = self.look()
            self._tell(seen)
            if is_finished(self._moves, seen, self._note.noted):
                self._tell_progress(seen)
                return
            steps = next_steps(self._moves, seen, self._note.noted, self._speed)
            did = self._do(steps)
            if not self._note.noted.held:
                self._cancel.check()
                if self._server.tend(self._cancel):
                    self._notice("the archive's server had ended and was started again")
            self._wait(busy=did)

    # --- Looking ---

    def look(self) -> MachineView:
        """See what is there. Raises QmpGone."""
        sight = self._carrier.look()
        self._mark("", sight.run_state == IO_ERROR, 0)
        for name, job in sight.jobs.items():
            is_waiting = job.io_status != "ok" or job.status in PAUSED
            self._mark(name, is_waiting or bool(job.error), job.done)
        now = time.monotonic()
        return MachineView(
            *sight,
            {key: now - since for key, (since, _) in self._failing.items()},
            self._server.damage,
            frozenset(node for node, tries in self._tries.items() if tries > _DELETE_TRIES),
            now - self._retried >= _RETRY_S,
        )

    def _mark(self, key: str, failing: bool, done: int) -> None:
        """Keep since when something fails without getting further."""
        known = self._failing.get(key)
        # A job that was let go on looks well for a moment before it fails again at the same place.
        if failing and (known is None or known[1] != done):
            self._failing[key] = (time.monotonic(), done)
        elif not failing and known and self._before and time.monotonic() - self._retried > _RETRY_S:
            del self._failing[key]

    # --- Telling ---

    def _tell(self, seen: MachineView) -> None:
        for text in changes(self._moves, self._before, seen):
            self._notice(text)
        self._before = seen
        if time.monotonic() - self._told >= _PROGRESS_S:
            self._told = time.monotonic()
            self._tell_progress(seen)

    def _tell_progress(self, seen: MachineView) -> None:
        done = total = 0
        for disk in self._note.disks:
            job = seen.jobs.get(disk.job)
            if disk.job in self._note.noted.moved or job is None or not job.total:
                total += disk.size_bytes
                done += disk.size_bytes if disk.job in self._note.noted.moved else 0
            else:
                done, total = done + min(job.done, job.total), total + job.total
        self._emit(
            {"event": "progress", "done_bytes": done, "total_bytes": total, "archive_bytes": done}
        )

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    # --- Doing ---

    def _do(self, steps: Sequence[Step]) -> bool:
        """Carry out steps; whether any has changed something, so that it is worth looking again."""
        did = False
        for step in steps:
            if isinstance(step, GiveUp):
                raise Failure(step.text)
            if isinstance(step, Note):
                self._take_note(step)
                did = True
            else:
                did = self._execute(step) or did
        return did

    def _take_note(self, step: Note) -> None:
        """Bring it to the disk first."""
        arrived = step.noted.moved - self._note.noted.moved
        if step.noted.held:
            self._flush_targets()
            self._held_since = time.monotonic()
        self._note = self._note._replace(noted=step.noted)
        self._note_file.write(self._note)
        for disk in self._note.disks:
            if disk.job in arrived:
                self._emit(
                    {
                        "event": "moved",
                        "device": disk.name,
                        "path": disk.path,
                        "bytes": disk.size_bytes,
                    }
                )

    def _flush_targets(self) -> None:
        """What QEMU has written is flushed while the machine still runs: later it would wait for it."""
        jobs = self._before.jobs if self._before else {}
        ready = [d for d in self._note.disks if d.job in jobs and jobs[d.job].status == "ready"]
        for disk in ready:
            with contextlib.suppress(OSError):
                fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)

    def _execute(self, command: Command) -> bool:
        """Whether it has succeeded. Raises Failure where it has to, QmpGone."""
        if command.name in ("cont", "block-job-resume", "blockdev-mirror"):
            self._retried = time.monotonic()
        try:
            self._carrier.execute(command)
        except QmpRefused as error:
            if command.name in _MUST_SUCCEED:
                raise Failure(f"QEMU refuses {command.name}: {error}") from error
            if command.name == "blockdev-del":
                node = str(command.arguments["node-name"])
                self._tries[node] = self._tries.get(node, 0) + 1
            # It ended meanwhile, or cannot yet: look again.
            return False
        # These are seen to have worked, or not, by looking; not in a circle as fast as we can.
        return command.name not in ("cont", "block-job-resume", "block-job-complete")

    def _wait(self, *, busy: bool) -> None:
        """For an event of QEMU's, the server's end, a stop; `busy`: there is more to do."""
        began = time.monotonic()
        if not busy:
            fds = [self._carrier.fd, self._server.fd]
            if not self._note.noted.held:
                fds.append(self._cancel.fd)
            limit_s = _LEAST_LOOK_S if self._note.noted.held else _LOOK_S
            readable([fd for fd in fds if fd >= 0], limit_s)
            left_s = _LEAST_LOOK_S - (time.monotonic() - began)
            if left_s > 0:
                readable([] if self._note.noted.held else [self._cancel.fd], left_s)
        self._carrier.drop_events()
        if self._note.noted.held and time.monotonic() - self._held_since > _SLOW_SWITCH_S:
            self._held_since = time.monotonic()
            self._notice("the machine stands still until its targets have what was written")


def explained(
    error: Failure, again: str, start_again: str, notice: Callable[[str], None]
) -> Failure:
    """Add to an error what has become of the machine, and the way on.

    `again`, `start_again`: the commands that go on, while the machine runs and when it has ended.
    """
    if isinstance(error, Cancelled):
        notice(f"the machine goes on, on its overlays; to go on: {again}")
        return error
    if isinstance(error, QmpGone):
        return Failure(
            f"{error}: its disks are not restored yet, and what it wrote is kept; to start it "
            f"again where it was: {start_again}"
        )
    return Failure(
        f"{error}; nothing is lost: the machine runs on its overlays, or stands still until it "
        f"can be read again; to go on: {again}"
    )


def done_event(note: LiveNote, began: float, speed_bytes_s: int) -> DoneEvent:
    """Return the event of the end; `began`: by the monotonic clock."""
    return {
        "event": "done",
        "seconds": round(time.monotonic() - began, 3),
        "read_bytes": sum(disk.size_bytes for disk in note.disks),
        "speed_bytes_s": speed_bytes_s,
        "cpu_s": round(time.process_time(), 3),
        "peak_rss_bytes": 0,
    }
