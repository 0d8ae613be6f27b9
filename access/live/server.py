# SPDX-License-Identifier: Apache-2.0
"""The `vmapipe serve` below a machine: started, watched, started again on the same socket.

It is no child that ends with us: a machine reads through it for as long as it runs. It ends with
the machine, or when its work is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from vmapipe.control.qmp.connection import QmpGone
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.side_files import open_to_append
from vmapipe.runtime.syscalls import readable

# So quick after its start its end is no accident of a moment.
_EARLY_S = 10.0
# So many early ends in a row are a defect, of the archive's storage or of ours.
_MOST_EARLY_ENDS = 5
_PAUSE_S = 1.0
_POLL_S = 0.02
# A server answers a connection at once; one that is stopped does not.
_CONNECT_S = 1.0
# At its end it lets clients finish: see access/serve.py.
_STOP_S = 10.0
_TAIL_BYTES = 64 << 10
_MOST_SAID = 1000


class ArchiveServer:
    """The server at `path`, whoever has started it. A context manager: its end leaves it running."""

    def __init__(
        self,
        path: str,
        words: Sequence[str],
        log: str,
        report: Callable[[str], None],
        owner: tuple[int, int] | None = None,
    ) -> None:
        """`words`: what starts it, behind `vmapipe serve`; `log`: the file that it writes to.

        `report` is called with each line that a server of ours says of the archive. `owner`: the
        uid and gid that get its socket, if the machine runs as another user.
        """
        self.path = path
        #: The process that it ends with; None: it is not known.
        self.machine_pid: int | None = None
        #: What it has said of damage last; empty: nothing.
        self.damage = ""
        self._words = list(words)
        self._log = log
        self._report = report
        self._owner = owner
        self._said: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._heard_bytes = _size_of(log)
        self._unheard = b""
        self._started = 0.0
        self._early_ends = 0

    def __enter__(self) -> ArchiveServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._forget()

    @property
    def fd(self) -> int:
        """Readable when the server has ended; -1: it is not known which process it is."""
        return self._pidfd

    @property
    def is_ours(self) -> bool:
        """Whether we have started it, not a process before us or the user."""
        return self._process is not None

    def start(self, cancel: Cancel) -> bool:
        """Return whether a server had to be started; when it listens.

        Raises Failure where it cannot serve the archive, Cancelled.
        """
        if self._adopt():
            if self._owner is not None:
                self._give(self._owner)
            return False
        while not self._launch(cancel):
            # Somebody has killed it on its way.
            self._note_end(cancel)
        return True

    def _launch(self, cancel: Cancel) -> bool:
        """Start a process; whether it listens: False: it was killed. As `start`."""
        self._forget()
        words = [sys.executable, "-P", "-m", "vmapipe.control.main", "serve", "--json"]
        if self.machine_pid is not None:
            words += ["--until-exit", str(self.machine_pid)]
        try:
            log = open_to_append(self._log, 0o600)
        except OSError as error:
            raise Failure(f"cannot write {self._log}: {error.strerror}") from error
        try:
            self._process = subprocess.Popen(
                [*words, "--listen", self.path, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is meant for us, not for it
            )
        finally:
            os.close(log)
        self._started = time.monotonic()
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
            return self._await(cancel)
        except BaseException:
            self.stop()
            raise

    def tend(self, cancel: Cancel) -> bool:
        """Start it again if it has ended; return whether it had. As `start`."""
        self.hear()
        is_gone = readable([self._pidfd], 0) if self._pidfd >= 0 else not _listens(self.path)
        if not is_gone:
            return False
        self._note_end(cancel)
        return self.start(cancel)

    def _note_end(self, cancel: Cancel) -> None:
        """Wait a moment where it ends again and again. Raises Failure, Cancelled."""
        early = time.monotonic() - self._started < _EARLY_S
        self._early_ends = self._early_ends + 1 if early else 0
        if self._early_ends > _MOST_EARLY_ENDS:
            raise Failure(f"the archive's server ends again and again: {self._last_words()}")
        if self._early_ends > 1:
            readable([cancel.fd], _PAUSE_S)
            cancel.check()

    def hear(self) -> None:
        """Report what it has written since the last time."""
        try:
            with open(self._log, "rb") as file:
                file.seek(self._heard_bytes)
                data = file.read(_TAIL_BYTES)
        except OSError:
            return
        self._heard_bytes += len(data)
        *lines, self._unheard = (self._unheard + data).split(b"\n")
        for line in lines:
            text = _notice(line)
            if text:
                if "damaged" in text or "does not hold" in text:
                    self.damage = text
                # One that is started again says the same of the archive.
                if text not in self._said:
                    if len(self._said) >= _MOST_SAID:
                        self._said.clear()
                    self._said.add(text)
                    self._report(text)

    def stop(self) -> None:
        """End it: nobody needs it any more."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
                if not readable([self._pidfd], _STOP_S):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._forget()

    def _adopt(self) -> bool:
        """Return whether a server listens there; then its process is watched, where it is known."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_S)
            try:
                probe.connect(self.path)
            except TimeoutError:
                return True  # its queue is full
            except OSError:
                return False
            pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._forget()
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(int(pid[0]))
        return True

    def _await(self, cancel: Cancel) -> bool:
        """Wait until it listens, however long the archive's index takes; False: it was killed.

        Raises Failure, Cancelled.
        """
        while not _listens(self.path):
            if readable([self._pidfd, cancel.fd], _POLL_S):
                cancel.check()
                if readable([self._pidfd], 0):
                    if self._process is not None and self._process.wait() == -signal.SIGKILL:
                        return False
                    if self.machine_pid is not None and _has_ended(self.machine_pid):
                        # It ends with the machine: that is the reason, whatever it says itself.
                        raise QmpGone("the machine has ended")
                    raise Failure(f"the archive cannot be served: {self._last_words()}")
        if self._owner is not None:
            self._give(self._owner)
        return True

    def _give(self, owner: tuple[int, int]) -> None:
        """Give its socket away, and nothing that another program may have put there. Raises Failure."""
        try:
            fd = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if stat.S_ISSOCK(status.st_mode) and status.st_uid in (os.geteuid(), owner[0]):
                    os.chown(f"/proc/self/fd/{fd}", *owner)
            finally:
                os.close(fd)
        except OSError as error:
            raise Failure(
                f"{self.path} cannot be given to the machine's user: {error.strerror}"
            ) from error

    def _last_words(self) -> str:
        """What it said at its end."""
        try:
            with open(self._log, "rb") as file:
                file.seek(max(0, _size_of(self._log) - _TAIL_BYTES))
                lines = file.read(_TAIL_BYTES).decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1].removeprefix("vmapipe serve: ") if lines else "it gave no reason"

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._process is not None:
            self._process.poll()
            # It goes on without us: nothing that Popen has to clean up.
            self._process.returncode = self._process.returncode or 0
            self._process = None


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(path)
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _notice(line: bytes) -> str:
    """The text of a notice of the server's; empty: the line is something else."""
    try:
        event: Any = json.loads(line)
    except ValueError:
        return ""
    if not isinstance(event, dict) or event.get("event") != "notice":
        return ""
    return str(event.get("text", ""))


def _has_ended(pid: int) -> bool:
    """Whether a process has gone, or has only not been waited for yet."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(readable([pidfd], 0))
    finally:
        os.close(pidfd)
