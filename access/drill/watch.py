# SPDX-License-Identifier: Apache-2.0
"""One machine under test, watched until there is a verdict: its consoles, screen, events and probes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from vmapipe.access.drill.judge import Decision, Judge
from vmapipe.access.drill.plan import DrillPlan, Step
from vmapipe.access.drill.probes import Heard, Probes, shown
from vmapipe.access.drill.screen import (
    TEXT_ADDRESS,
    TEXT_BYTES,
    Picture,
    is_still,
    looks_graphical,
    parse_ppm,
    text_lines,
)
from vmapipe.access.drill.signs import LOGIN, Sign, failure_in, plain
from vmapipe.access.machine.process import OwnQemu
from vmapipe.control.qmp.connection import Command, QmpGone, QmpRefused
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import human_bytes, one_line

# A search in some KiB takes well under a millisecond, unless an expression repeats what repeats.
_SEARCH_S = 0.5


class PatternTooSlow(Exception):
    """The expression has not come to an end in this text."""


def bounded_search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Search in the main thread. Raises PatternTooSlow.

    Python's engine looks for signals while it works, so a timer of this process's CPU time ends it.
    """
    with _search_limit():
        return pattern.search(text)


@contextmanager
def _search_limit() -> Iterator[None]:
    def expire(signum: int, frame: FrameType | None) -> None:
        raise PatternTooSlow

    # Whoever is woken up by signals has nothing to do with this one.
    wakeup = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGVTALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SEARCH_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


# A boot's messages are some 100 KiB; a guest may write for ever.
_HEAD_BYTES, _TAIL_BYTES = 512 << 10, 512 << 10
# So much is searched at a time: what a pattern looks for is shorter, and one of somebody's
# who writes quickly is not passed over.
_WINDOW_CHARS, _PIECE_BYTES = 8192, 4096


class Transcript:
    """One console. `window`: its latest text, without colours and cursor movements."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0
        self._raw = ""
        self.window = ""
        self.total_bytes = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """Take what has come; yield the window after each piece of it."""
        self.total_bytes += len(data)
        room = _HEAD_BYTES - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[max(0, room) :]
        surplus = len(self._tail) - _TAIL_BYTES
        if surplus > 0:
            del self._tail[:surplus]
            self._left_out += surplus
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES].decode(errors="replace")
            self._raw = (self._raw + piece)[-_WINDOW_CHARS:]
            self.window = plain(self._raw)
            yield self.window

    def forget(self) -> None:
        """What was said so far is not searched any more: the machine has started anew."""
        self._raw = self.window = ""

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.window.splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def kept(self) -> bytes:
        """Return all of it, or its beginning and its end."""
        if not self._left_out:
            return bytes(self._head + self._tail)
        note = f"\n[{self._left_out} bytes are left out here]\n".encode()
        return bytes(self._head) + note + bytes(self._tail)


_TICK_S = 0.25
# A picture costs the guest and us some 30 ms.
_LOOK_S = 1.0
_READ_BYTES = 64 << 10
# So much of a console is looked at in one turn; the rest of the machine has its turn, too.
_TURN_BYTES = 1 << 20
# An agent answers before the screen has its login prompt: a good machine's picture is taken when
# it has not changed for so long, and at the latest then.
_SETTLED_S, _SETTLING_S = 2.0, 10.0
# To a machine that goes on in the middle: who is there answers an empty line.
_KNOCK_S = 3.0
_SLOW = "the plan's expression takes too long on what it said: make it simpler"


class Console:
    """A socket that QEMU writes one of the machine's ports to, and what has come.

    A thread reads it at any time: QEMU waits for its reader with all else standing still, its monitor
    too, and some hundred letters fill a socket. So nobody here may be waiting for the monitor then.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._sock, _ = listener.accept()
        self._come = bytearray()
        self._lock = threading.Lock()
        self._waiting = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.transcript = Transcript()
        self._thread = threading.Thread(target=self._read, name="drill-console", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when something has come."""
        return self._waiting

    def read(self) -> Sequence[str]:
        """Return the windows of what has come since."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._waiting)
        with self._lock:
            data, self._come = bytes(self._come), bytearray()
        return list(self.transcript.feed(data))

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it takes nothing now, or has ended
            self._sock.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()
        os.close(self._waiting)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(_READ_BYTES):
                with self._lock:
                    self._come += data
                    # A guest that writes for ever: what nobody has looked at in time is lost.
                    del self._come[: max(0, len(self._come) - _TURN_BYTES)]
                os.eventfd_write(self._waiting, 1)


class Bounds(NamedTuple):
    """`limit_s`: for the whole; `written_bytes`: what the guest may write to its disks."""

    limit_s: float
    written_bytes: int


class Seen(NamedTuple):
    """How it ended, and what to keep of it."""

    decision: Decision
    picture: Picture | None
    screen_text: str
    bytes_read: int


class Watch:
    """Runs a machine that was started with -S, and watches it. Call `run`, then `close`."""

    def __init__(
        self,
        machine: OwnQemu,
        consoles: tuple[Console, Console],
        plan: DrillPlan,
        bounds: Bounds,
        folder: str,
    ) -> None:
        self._machine = machine
        self._serial, self._firmware = consoles
        self._plan = plan
        self._bounds = bounds
        self._folder = folder
        self.judge = Judge(plan, bounds.limit_s)
        self.probes = Probes()
        self._started = time.monotonic()
        self._picture: Picture | None = None
        self._still_since = 0.0
        self._screen_text = ""
        self._look_at = self._knock_at = 0.0
        #: What the archive has said of damage.
        self.damage: Sequence[str] = ()

    def run(self, cancel: Cancel, written_bytes: Any, *, is_resumed: bool) -> Seen:
        """Raises Cancelled, QmpRefused."""
        self._started = time.monotonic()
        with contextlib.suppress(QmpGone):  # its end is seen below
            self._execute("cont")
        while True:
            fds = [self._serial.fileno(), self._firmware.fileno(), self._machine.fd, cancel.fd]
            readable(fds, _TICK_S)
            cancel.check()
            self._hear_consoles()
            self._hear_events()
            for heard in self.probes.take():
                self._hear(heard)
            self._look()
            if is_resumed and self._now() >= self._knock_at:
                self._knock_at = self._now() + _KNOCK_S
                self._serial.write(b"\r")
            if written_bytes() > self._bounds.written_bytes:
                self.judge.ended(
                    "undecided",
                    f"it has written more than {human_bytes(self._bounds.written_bytes)} to its "
                    "disks, which --scratch-size allows",
                )
            if self._machine.wait(0):
                self._hear_consoles()
                # Somebody else's doing, or a defect of QEMU's: no word about the archive.
                self.judge.ended("undecided", str(self._machine.ended()))
            decision = self.judge.decide(self._now())
            if decision is not None:
                self._take_last_picture(decision, cancel)
                return Seen(decision, self._picture, self._screen_text, self._read_bytes())

    def close(self) -> None:
        self.probes.close()
        self._serial.close()
        self._firmware.close()

    def _now(self) -> float:
        return time.monotonic() - self._started

    # --- Consoles and events ---

    def _hear_consoles(self) -> None:
        for console in (self._serial, self._firmware):
            windows = console.read()
            if windows:
                self.judge.moved(self._now())
            for window in windows:
                if console is self._serial:
                    self._try_steps("serial", window)
                sign = failure_in(window)
                if sign is not None and sign.weight == "final":
                    self.judge.shows(sign)
            if windows:
                self._show_signs()

    def _show_signs(self) -> None:
        texts = (
            self._screen_text,
            self._serial.transcript.window,
            self._firmware.transcript.window,
        )
        found = [sign for sign in map(failure_in, texts) if sign is not None]
        self.judge.shows(min(found, key=lambda sign: sign.weight) if found else None)

    def _try_steps(self, kind: str, text: str) -> None:
        for index, step in enumerate(self._plan.steps):
            if step.kind == kind and step.pattern is not None and not self.judge.is_answered(index):
                self._try(index, step, step.pattern, text)

    def _try(self, index: int, step: Step, pattern: re.Pattern[str], text: str) -> bool:
        """Hold an answer against what is expected; a kind that only listens says nothing of the others."""
        try:
            match = bounded_search(pattern, text)
        except PatternTooSlow:
            self.judge.wrong(index, _SLOW)
            return False
        if match is None:
            return False
        said = shown(match[0] or text)
        self.judge.answered(index, self._now(), f"it said {said}" if said != "''" else "")
        return True

    def _hear(self, heard: Heard) -> None:
        index, step = heard.step, self._plan.steps[heard.step]
        at_s = heard.at - self._started
        if heard.refusal:
            self.judge.wrong(index, one_line(heard.refusal, 400))
        elif step.pattern is None:
            said = shown(heard.text) if heard.text.strip() else ""
            self.judge.answered(index, at_s, f"it said {said}" if said else "")
        elif not self._try(index, step, step.pattern, heard.text):
            self.judge.wrong(index, f"it said {shown(heard.text)}, which is not what was expected")
        if self.judge.is_answered(index):
            self.probes.done_with(index)

    def _hear_events(self) -> None:
        try:
            events = self._machine.qmp.events()
        except QmpGone as error:
            # Most often QEMU has ended, which its process tells.
            if not self._machine.wait(1.0):
                self.judge.ended("undecided", str(error))
            return
        for event in events:
            data = event.get("data", {})
            match event["event"]:
                case "GUEST_PANICKED":
                    self.judge.shows(Sign("final", "the guest has reported a panic (pvpanic)"))
                case "SHUTDOWN" if data.get("guest"):
                    self.judge.ended(
                        "not booted", f"it switched itself off after {self._now():.1f} s"
                    )
                case "RESET" if data.get("guest"):
                    self.judge.reset(self._now())
                case "BLOCK_IO_ERROR":
                    self._stopped(data)

    def _stopped(self, data: dict[str, Any]) -> None:
        if self.damage:
            self.judge.ended(
                "not booted", f"the archive is damaged: {one_line(self.damage[0], 600)}"
            )
        elif data.get("nospace"):
            self.judge.ended("undecided", "no room is left for what it writes (--scratch)")
        else:
            reason = one_line(str(data.get("reason", "")), 200)
            what = "read" if data.get("operation") == "read" else "written"
            self.judge.ended("undecided", f"a disk could not be {what}: {reason}")

    # --- The screen ---

    def _look(self) -> None:
        now = self._now()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        before = self._picture
        self._take_picture()
        picture = self._picture
        if picture is None:
            return
        if before is None or not is_still(before, picture):
            self._still_since = now
            self.judge.moved(now)
        self._show_signs()
        self._try_steps("screen", self._screen_text)
        for index, step in enumerate(self._plan.steps):
            if step.kind == "screen" and not self.judge.is_answered(index):
                self._try_picture(index, step, picture, now - self._still_since)

    def _take_last_picture(self, decision: Decision, cancel: Cancel) -> None:
        """Raises Cancelled."""
        self._take_picture()
        deadline = self._now() + _SETTLING_S
        still_since = self._now()
        while decision.verdict == "booted" and not self._machine.wait(_TICK_S):
            cancel.check()
            self._serial.read()
            before = self._picture
            self._take_picture()
            now = self._now()
            if before is None or self._picture is None or not is_still(before, self._picture):
                still_since = now
            if now - still_since >= _SETTLED_S or now >= deadline:
                return

    def _try_picture(self, index: int, step: Step, picture: Picture, still_s: float) -> None:
        """A picture that stays as it is: of a plan that asks for no more, or no console's."""
        is_usual = step.pattern is LOGIN and looks_graphical(picture)
        is_proof = (is_usual or step.is_lenient) and not picture.is_blank
        if is_proof and still_s >= step.stable_s and failure_in(self._screen_text) is None:
            self.judge.answered(index, self._now(), f"a picture that stays, for {still_s:.0f} s")

    def _take_picture(self) -> None:
        path = os.path.join(self._folder, "screen.ppm")
        try:
            self._execute("screendump", filename=path)
            picture = parse_ppm(_read_and_remove(path))
            text = ""
            if picture.is_text_mode:
                memory = os.path.join(self._folder, "text")
                words = {"val": TEXT_ADDRESS, "size": TEXT_BYTES, "filename": memory}
                self._execute("pmemsave", **words)
                text = "\n".join(text_lines(picture, _read_and_remove(memory)))
        except (OSError, ValueError, Failure):
            return  # QEMU has ended, or the screen changes just now
        self._picture, self._screen_text = picture, text
        self.judge.is_readable = picture.is_text_mode
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.judge.last_line = one_line(lines[-1], 200) if lines else ""

    def _execute(self, name: str, **arguments: Any) -> Any:
        return self._machine.qmp.execute(Command(name, arguments))

    def _read_bytes(self) -> int:
        """How much the guest has read of its disks."""
        try:
            answer = self._execute("query-blockstats")
            counts = [entry["stats"]["rd_bytes"] for entry in answer if entry.get("qdev")]
            return sum(count for count in counts if isinstance(count, int) and count >= 0)
        except (QmpGone, QmpRefused, KeyError, TypeError, AttributeError):
            return 0


def _read_and_remove(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_MAX_PICTURE_BYTES)
    os.unlink(path)
    return data


# More than QEMU's card can show.
_MAX_PICTURE_BYTES = 128 << 20
