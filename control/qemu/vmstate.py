# SPDX-License-Identifier: Apache-2.0
"""Saves a machine's memory at the instant at which its disks' backup begins.

A running guest by QEMU's background snapshot: it is stopped, the disks' jobs
begin, QEMU copies the devices' state and write-protects the memory, and the guest
runs on while its memory is written out. Where that cannot be, by a live
migration into the same pipe: when it is complete QEMU has stopped the guest, the
jobs begin, and the guest goes on. A guest that stands still is saved the second
way, and stays where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu import vmstate_commands
from vmapipe.control.qemu.jobs import BackupCommands
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qemu.vmstate_commands import MIGRATED, RUNNING, STANDING, STOPPED, MemoryNote
from vmapipe.control.qmp.connection import ANSWER_S, Command, QmpLink, QmpRefused
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import readable

# As much as the kernel gives everybody: fewer wake-ups.
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031
# A busy QEMU is not asked more often than this how far it is.
_ASK_S = 0.1
_POLL_S = 0.005


class Instant(NamedTuple):
    """The instant: how long a guest's writes, or the guest itself, stood still for it.

    `how`: the way in which its memory was saved; empty: it was not.
    """

    how: str
    seconds: float


class MemorySaving:
    """The saving of one machine's memory: `begin`, then `poll` until `is_done`. Both raise Failure."""

    def __init__(self, link: QmpLink, run: str, folder: SinkFolder, guest_wait_s: int) -> None:
        self.is_done = False
        #: Set as soon as it is known.
        self.instant: Instant | None = None
        self._link = link
        self._name = vmstate_commands.memory_note_name(run)
        self._folder = folder
        self._guest_wait_s = guest_wait_s
        self._note: MemoryNote | None = None
        self._jobs: BackupCommands | None = None
        self._was_running = False
        self._ask_at = 0.0
        self._stopped_at = 0.0
        # By another client, after the instant.
        self._stopped_since = False
        self._qemu_fd, self.stream_fd = folder.make_stream()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._qemu_fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.verdict_fd, self._verdict = os.pipe()

    @property
    def has_begun(self) -> bool:
        """True when there is something to undo in QEMU."""
        return self._note is not None

    def estimate_bytes(self) -> int:
        sizes = self._ask("query-memory-size-summary")
        return max(1, int(sizes.get("base-memory", 0)) + int(sizes.get("plugged-memory", 0)))

    def started(self) -> None:
        """Close the ends of the pipes that producer and guardian have inherited."""
        _close(self.stream_fd, self.verdict_fd)
        self.stream_fd = self.verdict_fd = -1

    def close(self) -> None:
        self.started()
        _close(self._qemu_fd, self._verdict)
        self._qemu_fd = self._verdict = -1

    def begin(self, jobs: BackupCommands) -> None:
        """The jobs should be slow until the guest runs again: what they have under way would have
        to end first.
        """
        self._jobs = jobs
        state = str(self._ask("query-status").get("status", ""))
        if vmstate_commands.migration_progress(self._ask("query-migrate")).is_moving:
            raise Failure("the machine is being migrated: wait for the end of that")
        if state != RUNNING and state not in STANDING:
            raise Failure(
                f"the machine's run state is {state!r}: its memory can be saved when it is running "
                "or paused (without --state its disks can be backed up all the same)"
            )
        self._was_running = state == RUNNING
        parameters = self._ask("query-migrate-parameters")
        if (mode := parameters.get("mode", vmstate_commands.NORMAL)) != vmstate_commands.NORMAL:
            raise Failure(
                f"the machine's migration mode is {mode!r}: with it a migration, which is how its "
                f"memory is saved, does something else; set it to {vmstate_commands.NORMAL!r}"
            )
        on = vmstate_commands.enabled_capabilities(
            self._link.execute(Command("query-migrate-capabilities", {}))
        )
        bandwidth = int(parameters.get("max-bandwidth", 0))
        self._note = MemoryNote(self._folder.path, not self._was_running, "", on, bandwidth)
        self._execute(vmstate_commands.write_memory_note(self._name, self._note))
        self._execute(vmstate_commands.lift_bandwidth())
        if self._was_running and self._background_works(on):
            self._save_in_background(jobs)
        else:
            self._execute(vmstate_commands.enable_capabilities(on, background=False))
            self._rewrite(is_live=True, resume=MIGRATED if self._was_running else "")
            self._give_stream()
            self._execute(vmstate_commands.start_migration())

    def poll(self) -> None:
        """Poll the migration's progress, at most every `_ASK_S` and after QEMU's events."""
        if self._note is None or self.is_done or time.monotonic() < self._ask_at:
            return
        self._check_it_runs()
        progress = vmstate_commands.migration_progress(self._ask("query-migrate"))
        self._ask_at = time.monotonic() + _ASK_S
        if progress.is_complete:
            self._finish()
        elif not progress.is_moving:
            raise Failure(f"QEMU could not save the machine's memory: {progress.why}")
        elif self._note.is_live and progress.is_endless:
            raise Failure(
                "the guest changes its memory faster than the archive takes it: back it up at a "
                "quieter time, or paused, or without --state"
            )

    def handle_event(self, event: dict[str, Any]) -> None:
        """Take one of QEMU's events into account."""
        name = event.get("event")
        if name == "STOP" and self.instant is None:
            self._stopped_at = _time_of(event)
        elif name == "STOP":
            self._stopped_since = True
        if name in ("MIGRATION", "STOP"):
            self._ask_at = 0.0

    # --- by background snapshot ---

    def _background_works(self, on: Sequence[str]) -> bool:
        """Try a background snapshot: refused without QEMU's or the kernel's support, or with shared
        memory.
        """
        try:
            self._link.execute(vmstate_commands.enable_capabilities(on, background=True))
        except QmpRefused:
            return False
        return True

    def _save_in_background(self, jobs: BackupCommands) -> None:
        self._add_nodes(jobs)
        self._give_stream()
        self._rewrite(resume=STOPPED)
        try:
            self._execute(Command("stop", {}))
            self._execute(jobs.transaction)
            self._execute(vmstate_commands.start_migration())
        except Failure:
            # The sooner the better; the cleanup would do it, too.
            with contextlib.suppress(Failure):
                self._link.execute(Command("cont", {}))
            raise
        self._wait_for_guest(vmstate_commands.BACKGROUND)
        self._ask_at = time.monotonic() + _ASK_S

    def _wait_for_guest(self, how: str) -> None:
        """Wait until the guest goes on; QEMU's events tell how long it stood still."""
        deadline = time.monotonic() + self._guest_wait_s + ANSWER_S
        while self.instant is None:
            readable([self._link.fd], _POLL_S)
            for event in self._link.events():
                self.handle_event(event)
                if event.get("event") == "RESUME":
                    self.instant = Instant(how, _time_of(event) - self._stopped_at)
            progress = vmstate_commands.migration_progress(self._ask("query-migrate"))
            if self.instant is None and not progress.is_moving and not progress.is_complete:
                raise Failure(f"QEMU could not save the machine's memory: {progress.why}")
            if self.instant is None and progress.saved_pages and self._stays_stopped():
                self._execute(Command("cont", {}))
            if time.monotonic() > deadline:
                raise Failure("the guest does not go on after its memory was saved")

    def _stays_stopped(self) -> bool:
        """Tell whether QEMU leaves a guest stopped that was so when its saving began.

        7.2 lets it go on, 10.0 does not. Pages are saved after the devices, when the memory is
        protected and letting it go on is QEMU's next step, which only a first question may overtake.
        """
        self._ask("query-status")
        return not self._ask("query-status").get("running")

    def _check_it_runs(self) -> None:
        """Note that the guest runs, or resume it: QEMU 10 restores, unasked, the state that it
        found.
        """
        if self._note is None or self._note.is_live or not self._note.resume:
            return
        if self._stopped_since or self._ask("query-status").get("running"):
            self._rewrite(resume="")
        else:
            self._execute(Command("cont", {}))

    # --- by migration ---

    def _finish(self) -> None:
        if self._note is not None and self._note.is_live:
            self._begin_jobs()
        # The stream's end alone could be QEMU's death.
        with contextlib.suppress(OSError):  # its producer is dead: others say so
            os.write(self._verdict, b"!")
        if self._note is not None:
            for command in vmstate_commands.restore_settings(self._note):
                self._execute(command)
        self._execute(Command("object-del", {"id": self._name}))
        self.is_done = True

    def _begin_jobs(self) -> None:
        """The guest stands still since its memory is complete: this is the instant."""
        if self._jobs is None:
            raise RuntimeError("nothing has begun")
        for block in self._link.execute(Command("query-block", {})):
            node = (block.get("inserted") or {}).get("node-name", "")
            add, delete = vmstate_commands.activate_disks(node, self._folder.qemus_socket())
            # Where such exports are not built in, the transaction may do without.
            with contextlib.suppress(QmpRefused):
                self._link.execute(add)
                self._link.execute(delete)
        self._add_nodes(self._jobs)
        self._execute(self._jobs.transaction)
        if not self._was_running:
            self.instant = Instant("the guest stood still", 0.0)
        else:
            self._execute(Command("cont", {}))
            self._wait_for_guest("live migration")
        self._rewrite(resume="")

    # --- both ---

    def _add_nodes(self, jobs: BackupCommands) -> None:
        for command in jobs.targets:
            self._execute(command)
        for command in jobs.filters:
            with contextlib.suppress(QmpRefused):
                self._link.execute(command)

    def _give_stream(self) -> None:
        """Give QEMU the pipe's end; no other process holds one that writes."""
        self._link.give_fd(self._qemu_fd, vmstate_commands.FD_NAME)
        _close(self._qemu_fd)
        self._qemu_fd = -1

    def _rewrite(self, **changes: Any) -> None:
        if self._note is not None:
            self._note = self._note._replace(**changes)
            self._execute(vmstate_commands.rewrite_memory_note(self._name, self._note))

    def _execute(self, command: Command) -> None:
        try:
            self._link.execute(command)
        except QmpRefused as error:
            raise Failure(f"QEMU refuses the backup: {command.name}: {error}") from error

    def _ask(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._link.execute(Command(name, {}))
        return answer


def _time_of(event: dict[str, Any]) -> float:
    stamp = event.get("timestamp") or {}
    return float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
