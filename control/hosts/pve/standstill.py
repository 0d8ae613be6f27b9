# SPDX-License-Identifier: Apache-2.0
"""A machine that stands still for the instant of its backup, as with vzdump's modes: paused (suspend), or shut down and started anew (stop).

A process of its own does it, which outlives all others of the backup: when it is told to, when its parent dies
and after a bound, it lets the machine go on. A note on the disk tells of it where that process was killed, too.

python -m vmapipe.control.hosts.pve.standstill MODE VMID MONITOR NOTE STOP_S --control-fd N
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vmapipe.control.hosts.pve.node import PveNode
from vmapipe.control.qmp.addresses import parse_address
from vmapipe.control.qmp.client import SharedQmp
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, os_error_text
from vmapipe.runtime.events import Emit, LineSplitter
from vmapipe.runtime.outliving import ignore_ending_signals, start_outliving
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

# From here to the instant a backup takes less than a second. A guest that is paused for longer loses
# its network connections: the backup fails then.
_STANDS_S = 60.0
# A machine that was started anew stops as soon as its monitor answers: before its firmware has done anything.
_START_S = 300.0
_AGAIN_S = 0.01
# `qm start` ends when QEMU runs: its monitor answers a moment later, on a busy host after some seconds.
_UP_S = 5.0
# `qm` ends by itself when its own limit is over; what it waits for otherwise is other commands of the node's.
_LATE_S = 60.0
# A monitor that others use becomes free.
_RESUME_S = 60.0
_LOOK_AGAIN_S = 0.2
# A process that was killed may still have its lock; one that goes on has it for as long as a guest shuts down.
_DIES_S = 5.0
# A note is written over by another one, which is whole or not there at all.
_NOTE_BYTES, _MAX_NOTE_BYTES = 256, 4096
_MAX_WORDS_CHARS = 300


@dataclass(frozen=True)
class Stand:
    """What is done to a machine. `monitor`: its QMP socket; `note`: the file that tells of it; `stop_s`: for its shutdown."""

    mode: str
    vmid: int
    monitor: str
    note: str
    stop_s: int


class StandingMachine:
    """A machine that stands still until `go_on`."""

    def __init__(self, control: socket.socket, heard: _Heard) -> None:
        self._control = control
        self._heard = heard

    def go_on(self) -> None:
        """Again: nothing. Does not wait. Raises Failure: the machine has gone on before, or nobody knows."""
        self._heard.look()
        self.let_go()

    def let_go(self) -> None:
        """The same, whatever the machine does."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def standing_still(stand: Stand, cancel: Cancel, emit: Emit) -> Iterator[StandingMachine]:
    """The machine stands still from the block's begin to `go_on`, or its end. Raises Failure, Cancelled.

    Whatever happens in the block, a machine that could not be let go on is told.
    """
    words = (stand.mode, str(stand.vmid), stand.monitor, stand.note, str(stand.stop_s))
    try:
        control, process = start_outliving(__name__, words)
    except OSError as error:
        raise Failure(f"VM {stand.vmid}: cannot begin: {os_error_text(error)}") from error
    with control:
        heard = _Heard(control)
        standing = StandingMachine(control, heard)
        try:
            heard.wait("standing", stand.stop_s + _START_S + _LATE_S, cancel, emit)
            yield standing
        except BaseException as error:
            standing.let_go()
            if isinstance(error, Cancelled) and stand.mode == "stop" and not heard.events:
                text = "it is being shut down for its backup, and is started again by itself after that"
                emit({"event": "notice", "text": f"VM {stand.vmid}: {text}"})
                raise
            trouble = _let_go(stand, heard, process, emit)
            if trouble in ("", str(error)):
                raise
            if isinstance(error, Failure) and not isinstance(error, Cancelled):
                raise Failure(f"{error}; {trouble}") from error
            emit({"event": "notice", "text": trouble})
            raise
        standing.let_go()
        if trouble := _let_go(stand, heard, process, emit):
            raise Failure(trouble)


def _let_go(stand: Stand, heard: _Heard, process: subprocess.Popen[bytes], emit: Emit) -> str:
    """Wait until the machine goes on; return what is wrong with it, else nothing."""
    try:
        heard.wait("gone-on", _RESUME_S + _START_S, None, emit)
    except Failure as failure:
        if heard.failure:
            return str(failure)
        # It was killed.
        return _undone_at_last(stand, emit)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    return ""


def _undone_at_last(stand: Stand, emit: Emit) -> str:
    """Undo what was left, when the guest is off that was told to shut down; return what is wrong, else nothing."""
    has_said_so = False
    while True:
        try:
            undo(stand.note, stand.vmid, stand.monitor)
            return ""
        except _ShutsDown:
            if not has_said_so:
                has_said_so = True
                text = "is waited for: it was told to shut down, and has to be started again"
                emit({"event": "notice", "text": f"VM {stand.vmid} {text}"})
            time.sleep(_LOOK_AGAIN_S)
        except Failure as failure:
            return str(failure)


class _Heard:
    """What the other process says, a JSON line each."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._splitter = LineSplitter()
        self.events: set[str] = set()
        #: Why the other process has given up.
        self.failure = ""

    def wait(self, event: str, limit_s: float, cancel: Cancel | None, emit: Emit) -> None:
        """Return when `event` was said. Raises Failure, Cancelled."""
        deadline = time.monotonic() + limit_s
        fds = [self._control.fileno(), *([cancel.fd] if cancel else [])]
        while event not in self.events:
            if cancel:
                cancel.check()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Failure(f"the process that holds the machine has not said {event!r} in time")
            if self._control.fileno() in readable(fds, left_s):
                for text in self._take():
                    emit({"event": "notice", "text": text})

    def look(self) -> None:
        """Take in what has been said. Raises Failure."""
        if not self.failure and readable([self._control.fileno()], 0.0):
            self._take()

    def _take(self) -> list[str]:
        """Return what is for the user. Raises Failure."""
        if self.failure:
            raise Failure(self.failure)
        data = self._control.recv(4096)
        if not data:
            raise Failure("the process that holds the machine has ended")
        texts = []
        for said in self._splitter.feed(data):
            self.events.add(str(said["event"]))
            if said["event"] == "failed":
                self.failure = str(said["text"])
                raise Failure(self.failure)
            if "text" in said:
                texts.append(str(said["text"]))
        return texts


class _ShutsDown(Failure):
    """The machine runs, but may have been told to shut down: later it is known."""


class _NotUndone(Failure):
    """The machine is not as it was."""


# --- the process that outlives the others ---


def main(argv: Sequence[str] | None = None) -> int:
    mode, vmid, monitor, note, stop_s, control = sys.argv[1:] if argv is None else argv
    ignore_ending_signals()
    stand = Stand(mode, int(vmid), monitor, note, int(stop_s))
    with socket.socket(fileno=int(control.partition("=")[2])) as parent:
        try:
            with noted(stand) as was_shut_down:
                _stand(stand, parent, was_shut_down)
        except Failure as failure:
            _say(parent, "failed", str(failure))
            return 1
    return 0


def _stand(stand: Stand, parent: socket.socket, was_shut_down: Callable[[], None]) -> None:
    """Make the machine stand, wait, and let it go on. Raises Failure."""
    began = time.monotonic()
    # One that its administrator has paused stays so.
    is_ours = True
    if stand.mode == "stop":
        _shut_down(stand)
        with contextlib.suppress(OSError):
            was_shut_down()
        _start(stand)
    else:
        is_ours = _runs(stand.monitor)
    try:
        if is_ours and stand.mode != "stop":
            # It may have stopped although no answer comes.
            _pause(stand.monitor)
        _say(parent, "standing")
        in_time = bool(readable([parent.fileno()], _STANDS_S))
    finally:
        if is_ours:
            _resume(stand)
    text = f"VM {stand.vmid}: went on after {time.monotonic() - began:.1f} s"
    if not in_time:
        raise Failure(f"{text}: the backup had not begun by then")
    _say(parent, "gone-on", text if is_ours else "")


def _say(parent: socket.socket, event: str, text: str = "") -> None:
    """Whoever has died hears nothing."""
    said = {"event": event, **({"text": text} if text else {})}
    with contextlib.suppress(OSError):
        parent.sendall(json.dumps(said).encode() + b"\n")


def _shut_down(stand: Stand) -> None:
    """As vzdump: the guest is asked, by its agent or ACPI, and not forced. Raises Failure."""
    words = ["shutdown", str(stand.vmid), "--skiplock", "1", "--keepActive", "1"]
    try:
        _qm([*words, "--timeout", str(stand.stop_s)], stand.stop_s + _LATE_S)
    except Failure as failure:
        if _status(stand.monitor):
            raise Failure(
                f"VM {stand.vmid} does not shut down within {stand.stop_s} s ({failure}); it runs on, unless its "
                "guest still does: see whether ACPI or the agent work in it, or leave out --mode stop"
            ) from failure
        # It is off all the same.
        return
    if _status(stand.monitor):
        raise Failure(
            f"VM {stand.vmid} still runs although `qm shutdown` says that it is off: see what `qm` is here, or "
            "leave out --mode stop"
        )


def _start(stand: Stand) -> None:
    """Start the machine, and stop it before it has done anything. Raises Failure."""
    for is_last in (False, True):
        with _start_qm(["start", str(stand.vmid), "--skiplock", "1"]) as process:
            deadline = time.monotonic() + _START_S
            is_paused = _pause_by(stand.monitor, deadline, process)
            said = _ended(process, max(1.0, deadline - time.monotonic()))
        up_s = 0.0 if process.returncode else _UP_S
        if is_paused or _pause_by(stand.monitor, time.monotonic() + up_s, None):
            return
        if is_last:
            raise _NotUndone(
                f"VM {stand.vmid} WAS SHUT DOWN FOR ITS BACKUP AND CANNOT BE STARTED AGAIN: `qm start` says: {said}"
            )


def _pause_by(monitor: str, deadline: float, starting: subprocess.Popen[bytes] | None) -> bool:
    """Pause a machine that is starting; tell whether it is. The last look is when `starting` has ended."""
    while True:
        with contextlib.suppress(Failure):
            if _pause(monitor) or _status(monitor) == "paused":
                return True
        if time.monotonic() >= deadline or (starting and starting.poll() is not None):
            return False
        time.sleep(_AGAIN_S)


def _runs(monitor: str) -> bool:
    """Tell whether the machine's processors run. Raises Failure."""
    with contextlib.closing(SharedQmp(parse_address(monitor))) as link:
        return bool(link.execute(Command("query-status", {}))["running"])


def _pause(monitor: str) -> bool:
    """Pause a machine that runs; tell whether it did. Raises Failure."""
    with contextlib.closing(SharedQmp(parse_address(monitor))) as link:
        if not link.execute(Command("query-status", {}))["running"]:
            return False
        link.execute(Command("stop", {}))
    return True


def _status(monitor: str) -> str:
    """Return the machine's run state; empty: it does not run."""
    with (
        contextlib.suppress(Failure),
        contextlib.closing(SharedQmp(parse_address(monitor))) as link,
    ):
        return str(link.execute(Command("query-status", {}))["status"])
    return ""


def _resume(stand: Stand) -> None:
    """Raises Failure."""
    deadline = time.monotonic() + _RESUME_S
    while True:
        try:
            with contextlib.closing(SharedQmp(parse_address(stand.monitor))) as link:
                if link.execute(Command("query-status", {}))["status"] == "paused":
                    link.execute(Command("cont", {}))
            return
        except Failure as failure:
            if not os.path.exists(stand.monitor) or time.monotonic() > deadline:
                raise _NotUndone(
                    f"VM {stand.vmid} MAY STILL STAND STILL: {failure}. `qm resume {stand.vmid}`"
                ) from failure
        time.sleep(_LOOK_AGAIN_S)


def _start_qm(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Raises Failure."""
    null = subprocess.DEVNULL
    try:
        return subprocess.Popen(["qm", *words], stdin=null, stdout=null, stderr=subprocess.PIPE)
    except OSError as error:
        raise Failure(f"cannot run qm: {os_error_text(error)}") from error


def _qm(words: Sequence[str], limit_s: float) -> None:
    """Raises Failure."""
    with _start_qm(words) as process:
        said = _ended(process, limit_s)
    if process.returncode:
        raise Failure(f"`qm {words[0]}` says: {said}")


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait for its end; return what it said."""
    try:
        _, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"nothing for {limit_s:.0f} s"
    text = said.decode(errors="replace").strip()
    return one_line(text, _MAX_WORDS_CHARS) or f"nothing, with exit code {process.returncode}"


# --- the note ---


def _write_note(fd: int, stand: Stand, until: float) -> None:
    """`until`: then (of the host's run, in seconds) a machine that still runs will not shut down any more."""
    note = {"mode": stand.mode, "boot": _boot(), "until": round(until)}
    os.pwrite(fd, json.dumps(note).encode().ljust(_NOTE_BYTES), 0)
    os.fsync(fd)


def _host_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def noted(stand: Stand) -> Iterator[Callable[[], None]]:
    """A file that tells what has to be undone, locked while somebody is at it. Raises Failure.

    What is yielded notes that the machine has shut down: if it runs afterwards, it has been started.
    """
    try:
        os.makedirs(os.path.dirname(stand.note), mode=0o700, exist_ok=True)
        # As long as another one may take with the same machine.
        fd = _hold(stand.note, os.O_CREAT, stand.stop_s + _START_S)
        with open(fd, "r+b", buffering=0) as file:
            file.truncate()
            _write_note(fd, stand, _host_s() + stand.stop_s + _LATE_S)
            try:
                yield lambda: _write_note(fd, stand, 0.0)
            except _NotUndone:
                raise  # the next backup tries
            except BaseException:
                os.unlink(stand.note)
                raise
            os.unlink(stand.note)
    except OSError as error:
        raise Failure(f"cannot write {stand.note}: {os_error_text(error)}") from error


def _hold(note: str, flags: int, limit_s: float) -> int:
    """Open and lock a note that still has its name then: whoever had it before may have removed it.

    Raises BlockingIOError when somebody else has it until `limit_s` is over, OSError.
    """
    deadline = time.monotonic() + limit_s
    while True:
        fd = os.open(note, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            else:
                if os.path.exists(note) and os.path.samestat(os.fstat(fd), os.stat(note)):
                    stack.pop_all()
                    return fd
        time.sleep(_AGAIN_S)


def undo_for(node: PveNode, vmid: int) -> str:
    """Undo what a killed backup has left of a node's machine; return what was done, else nothing. Raises Failure."""
    if node.is_dead:
        return ""
    return undo(node.note_path(vmid, "standstill"), vmid, node.socket(vmid, "qmp"))


def undo(note: str, vmid: int, monitor: str) -> str:
    """Let a machine go on whose backup was killed with all of its processes; return what was done, else nothing.

    Nothing is done while one of them is at it. Raises Failure.
    """
    try:
        fd = _hold(note, 0, _DIES_S)
    except (FileNotFoundError, BlockingIOError):
        return ""
    except OSError as error:
        raise Failure(f"cannot open {note}: {os_error_text(error)}") from error
    with open(fd, "r+b", buffering=0) as file:
        mode, boot, until = _read(file.read(_MAX_NOTE_BYTES))
        done = ""
        if boot == _boot():
            stand = Stand(mode, vmid, monitor, note, 0)
            status = _status(monitor)
            if status == "paused":
                _resume(stand)
                done = f"VM {vmid} goes on: a backup that was killed had it stand still"
            elif not status and mode == "stop":
                _start_again(stand)
                done = f"VM {vmid} was started: a backup that was killed had shut it down"
            elif mode == "stop" and (left_s := until - _host_s()) > 0:
                raise _ShutsDown(
                    f"VM {vmid} runs, but a backup that was killed may have told it to shut down; `vmapipe cleanup "
                    f"--pve {vmid}` starts it then: run it in {left_s:.0f} s, or when the machine is off"
                )
        os.unlink(note)
    return done


def _start_again(stand: Stand) -> None:
    """Start a machine, unless somebody else does that now. Raises Failure."""
    try:
        _qm(["start", str(stand.vmid), "--skiplock", "1"], _START_S)
    except Failure:
        if not _status(stand.monitor):
            raise
    until = time.monotonic() + _UP_S
    while not _status(stand.monitor) and time.monotonic() < until:
        time.sleep(_AGAIN_S)


def _read(data: bytes) -> tuple[str, str, float]:
    """Return the mode, the boot and the end of a note; one that is cut off was written before anything was done."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(data)
        return str(found["mode"]), str(found["boot"]), float(found.get("until", 0.0))
    return "", "", 0.0


def _boot() -> str:
    """Name the host's run: a machine that is off since another one was not shut down by us."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


if __name__ == "__main__":
    sys.exit(main())
