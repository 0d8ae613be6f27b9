# SPDX-License-Identifier: Apache-2.0
"""A program of the user's at the phases of a backup, called as vzdump calls its hook script."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, NamedTuple

from vmapipe.control.coordinator.status import JobState, now_s
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit, Event, ignore
from vmapipe.runtime.folders import temporary_folder
from vmapipe.runtime.syscalls import readable

if TYPE_CHECKING:
    import subprocess

# Of a hook's words so much goes into the report, from the end.
_MAX_WORDS_BYTES = 16 << 10
# Between being asked to end and being killed.
_END_S = 5.0
# Becomes the hook. Beside it, in the same process group and nobody's child (a hook
# may wait for all of its own), somebody reads our pipe: a line, and he leaves; its
# end without one, because we were killed, and he kills the group and himself.
_WATCHED = """\
exec 3<&0 </dev/null
( { trap '' TERM INT HUP; read -r _ || kill -KILL 0; } <&3 >/dev/null 2>&1 & )
exec "$@" 3<&-
"""


class _Running(NamedTuple):
    phase: str
    process: subprocess.Popen[bytes]
    words: IO[bytes]
    #: Where its watcher hears of us.
    lifeline: int
    deadline: float


class HookOptions(NamedTuple):
    """`program` empty: there is none."""

    program: str
    timeout_s: int
    mode: str = ""
    vmid: str = ""
    #: More variables: DUMPDIR, LOGFILE, … as vzdump has them.
    environment: Mapping[str, str] = {}


class Hooks:
    """Runs the program at each phase. `emit` is told what it says, and at which phases it failed."""

    def __init__(
        self, options: HookOptions, state: JobState, cancel: Cancel, emit: Emit = ignore
    ) -> None:
        self.options = options
        self.state = state
        self.cancel = cancel
        self.emit = emit
        self._running: _Running | None = None

    def check(self) -> None:
        """Raises UsageError, before anything has begun."""
        if not self.options.program:
            return
        # Imported here, as all that only hooks need: a backup starts sooner without.
        import shutil

        if shutil.which(self.options.program) is None:
            raise UsageError(f"--hook {self.options.program}: no program of this name can be run")

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """job-start, then log-end and job-end; or job-abort. Raises Failure."""
        with self.whole("job-start"), self.log():
            yield

    @contextlib.contextmanager
    def whole(self, *first: str) -> Iterator[None]:
        """These phases, then job-end; or job-abort: around the backups of any number of machines."""
        try:
            for phase in first:
                self.must(phase)
        except BaseException as error:
            self.state.fail(str(error), now_s())
            self.may("job-abort")
            raise
        try:
            yield
        finally:
            self.may("job-end")

    @contextlib.contextmanager
    def log(self) -> Iterator[None]:
        """log-end, when the log of one backup is complete."""
        try:
            yield
        finally:
            self.may("log-end")

    @contextlib.contextmanager
    def backup(
        self, hold: contextlib.AbstractContextManager[object] | None = None
    ) -> Iterator[None]:
        """backup-start, then backup-end or backup-abort. Raises Failure.

        `hold`: what is held from before the first to after backup-end, or before backup-abort.
        """
        try:
            with hold or contextlib.nullcontext():
                self.must("backup-start")
                yield
                self._wait_for_disconnect()
                self.may("backup-end")
        except BaseException as error:
            self.state.fail(str(error), now_s())
            self._wait_for_disconnect()
            self.may("backup-abort")
            raise

    def take(self, event: Event) -> None:
        """At the instant its hook is started; the backup goes on meanwhile."""
        if event["event"] == "instant" and self.options.program:
            try:
                self._running = self._start("snapshot-taken")
            except Failure as failure:
                self.emit({"event": "notice", "text": str(failure)})
        elif self._running is not None and self._has_ended(self._running, 0.0):
            self._wait_for_disconnect()

    def must(self, phase: str) -> None:
        """Run one of the phases in between. Raises Failure, Cancelled."""
        if self.options.program:
            self._finish(self._start(phase), self.cancel)

    def may(self, phase: str) -> None:
        """The same; a failure is told, and changes nothing: the archive is stored, or is not."""
        if self.options.program:
            with self._told():
                self._finish(self._start(phase), None)

    def _wait_for_disconnect(self) -> None:
        """The one that was started at the instant."""
        running, self._running = self._running, None
        if running is not None:
            with self._told():
                self._finish(running, None)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Failure as failure:
            self.emit({"event": "notice", "text": str(failure)})

    def _start(self, phase: str) -> _Running:
        import subprocess
        import tempfile

        argv = [self.options.program, phase]
        if not phase.startswith("job-"):
            argv += [self.options.mode, self.options.vmid]
        said = tempfile.TemporaryFile(dir=temporary_folder())  # noqa: SIM115  closed by _finish
        reading, lifeline = os.pipe()
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "hook", *argv],
                stdin=reading,
                # Standard output may be the archive.
                stdout=said,
                stderr=said,
                env={**os.environ, **self._variables(phase)},
                start_new_session=True,
            )
        except OSError as error:
            said.close()
            os.close(lifeline)
            raise Failure(
                f"hook {phase}: {self.options.program}: {os_error_text(error)}"
            ) from error
        finally:
            os.close(reading)
        return _Running(phase, process, said, lifeline, time.monotonic() + self.options.timeout_s)

    def _variables(self, phase: str) -> dict[str, str]:
        state = self.state
        seconds = round((state.ended or now_s()) - state.started)
        variables = {
            **self.options.environment,
            "VMTYPE": "qemu",
            "VMAPIPE_PHASE": phase,
            "VMAPIPE_JOB": state.job,
            "VMAPIPE_UUID": state.uuid,
            "VMAPIPE_ARCHIVE": state.archive,
            "VMAPIPE_STATUS": state.status,
            "VMAPIPE_ERROR": state.errmsg,
            "VMAPIPE_TOTAL_BYTES": str(state.total_bytes),
            "VMAPIPE_STORED_BYTES": str(state.stored_bytes),
            "VMAPIPE_SECONDS": str(seconds),
        }
        if phase == "backup-end":
            variables["TARGET"] = state.archive
        if phase != "log-end":
            variables.pop("LOGFILE", None)
        # What an error's text must not have in an environment.
        return {name: value.replace("\0", "") for name, value in variables.items()}

    def _has_ended(self, running: _Running, timeout_s: float, *fds: int) -> bool:
        pidfd = os.pidfd_open(running.process.pid)
        try:
            return pidfd in readable([pidfd, *fds], timeout_s)
        finally:
            os.close(pidfd)

    def _finish(self, running: _Running, cancel: Cancel | None) -> None:
        """Raises Failure, Cancelled; one that had to be ended leaves nothing in its process group."""
        phase, process = running.phase, running.process
        fds = [cancel.fd] if cancel else []
        with running.words:
            in_time = self._has_ended(running, max(0.0, running.deadline - time.monotonic()), *fds)
            if not in_time:
                self._end(running)
            code = process.wait()
            self._release(running, in_time=in_time)
            self._repeat(running)
        if cancel and cancel.asked:
            raise Cancelled(cancel.reason, cancel.signum)
        if not in_time:
            raise Failure(
                f"hook {phase}: not done within {self.options.timeout_s} s, so it was ended"
            )
        if code:
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            raise Failure(f"hook {phase} failed: {how}")

    def _release(self, running: _Running, *, in_time: bool) -> None:
        """Its watcher leaves; what it has left behind it goes on only if it ended by itself."""
        with contextlib.suppress(BrokenPipeError):
            if in_time:
                os.write(running.lifeline, b"\n")
        os.close(running.lifeline)

    def _end(self, running: _Running) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signum)
            if self._has_ended(running, _END_S):
                return

    def _repeat(self, running: _Running) -> None:
        """Put what the hook has printed into the report."""
        size = running.words.seek(0, os.SEEK_END)
        running.words.seek(max(0, size - _MAX_WORDS_BYTES))
        for line in running.words.read().decode(errors="replace").splitlines():
            self.emit({"event": "notice", "text": f"hook {running.phase}: {line}"})
