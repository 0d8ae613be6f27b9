# SPDX-License-Identifier: Apache-2.0
"""Moves the disks of a running machine from an archive to their targets: looks, and does.

What is to be done is decided in moves.py; here QEMU is asked, the archive's server kept alive,
and what was decided carried out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

from vmapipe.access.live.moves import (
    IO_ERROR,
    PAUSED,
    GiveUp,
    MachineView,
    MirrorState,
    Note,
    Step,
    changes,
    is_finished,
    next_steps,
)
from vmapipe.access.live.qemu import check_policies
from vmapipe.access.live.record import LiveNote, NoteFile
from vmapipe.access.live.server import ArchiveServer
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.connection import Answer, Command, QmpLink, QmpRefused
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

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
        qmp: QmpLink,
        server: ArchiveServer,
        note: LiveNote,
        note_file: NoteFile,
        emit: Emit,
        cancel: Cancel,
        speed_bytes_s: int = 0,
    ) -> None:
        self._qmp = qmp
        self._server = server
        self._note = note
        self._note_file = note_file
        self._emit = emit
        self._cancel = cancel
        self._speed = speed_bytes_s
        self._moves = [disk.move for disk in note.disks]
        self._before: MachineView | None = None
        self._retried = 0.0
        self._tries: dict[str, int] = {}
        # By job, and "" for the machine: since when it fails, and how far it was then.
        self._failing: dict[str, tuple[float, int]] = {}
        self._held_since = 0.0
        self._told = 0.0

    def run(self) -> None:
        """Until all disks are on their targets.

        Raises Failure, QmpGone, Cancelled; the machine runs on then, or stands still unharmed.
        """
        check_policies(self._qmp, [move.source for move in self._moves])
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
        """Ask QEMU for all that matters. Raises QmpGone."""
        status = self._ask("query-status") or {}
        block_jobs = {job["device"]: job for job in self._ask("query-block-jobs")}
        jobs = {
            job["id"]: _job(job, block_jobs.get(job["id"], {})) for job in self._ask("query-jobs")
        }
        nodes = self._qmp.execute(Command("query-named-block-nodes", {"flat": True}))
        blocks = self._ask("query-block") or []
        graph = Graph(nodes, self._ask("x-debug-query-block-graph"))
        run_state = str(status.get("status", ""))
        if status.get("running"):
            run_state = "running"
        broken = _broken(blocks, graph)
        used = graph.in_use() | _inserted(blocks)
        is_failing = run_state == IO_ERROR
        self._mark("", is_failing, 0)
        for name, job in jobs.items():
            is_waiting = job.io_status != "ok" or job.status in PAUSED
            self._mark(name, is_waiting or bool(job.error), job.done)
        now = time.monotonic()
        return MachineView(
            run_state,
            jobs,
            frozenset(str(node.get("node-name", "")) for node in nodes),
            used,
            broken,
            {key: now - since for key, (since, _) in self._failing.items()},
            self._server.damage,
            frozenset(node for node, tries in self._tries.items() if tries > _DELETE_TRIES),
            now - self._retried >= _RETRY_S,
        )

    def _ask(self, name: str) -> Any:
        """None where this QEMU does not know the command, or does not give the answer."""
        with contextlib.suppress(QmpRefused):
            return self._qmp.execute(Command(name, {}))
        return None

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
            self._qmp.execute(command)
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
            fds = [self._qmp.fd, self._server.fd]
            if not self._note.noted.held:
                fds.append(self._cancel.fd)
            limit_s = _LEAST_LOOK_S if self._note.noted.held else _LOOK_S
            readable([fd for fd in fds if fd >= 0], limit_s)
            left_s = _LEAST_LOOK_S - (time.monotonic() - began)
            if left_s > 0:
                readable([] if self._note.noted.held else [self._cancel.fd], left_s)
        self._qmp.events()
        if self._note.noted.held and time.monotonic() - self._held_since > _SLOW_SWITCH_S:
            self._held_since = time.monotonic()
            self._notice("the machine stands still until its targets have what was written")


def _job(job: Answer, block_job: Answer) -> MirrorState:
    return MirrorState(
        str(job["status"]),
        str(job.get("error", "")),
        str(block_job.get("io-status", "ok")),
        int(block_job.get("speed", 0)),
        int(block_job.get("offset", 0)),
        int(block_job.get("len", 0)),
    )


def _inserted(blocks: Sequence[Answer]) -> frozenset[str]:
    return frozenset(str((block.get("inserted") or {}).get("node-name", "")) for block in blocks)


def _broken(blocks: Sequence[Answer], graph: Graph) -> frozenset[str]:
    """Return the nodes of devices whose last request failed, and all below."""
    failed = [block for block in blocks if block.get("io-status", "ok") != "ok"]
    return frozenset(node for top in _inserted(failed) for node in graph.tree(top))
