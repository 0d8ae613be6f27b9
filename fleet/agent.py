# SPDX-License-Identifier: Apache-2.0
"""A job of a fleet on its host: one request on standard input, its events on standard output.

`vmapipe fleet agent` is all that a host needs, through ssh as well: its command line is always the same
(so a key can be limited to it), and names travel as JSON, which no shell sees. The end of standard input
is the end of whoever asked, and then the job is ended in order.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from vmapipe.fleet.jobs import MOST_REQUEST_BYTES, Request, check, command_of, words_of
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import EXIT_FAILED, Failure, UsageError
from vmapipe.runtime.text import one_line

#: How often it says that it is there, and how long silence means that it is not.
BEAT_S, SILENCE_S = 5.0, 60.0
# A backup of a running QEMU first ends QEMU's jobs.
_END_S = 60.0
_LINE_BYTES = 1 << 20
_TEXT_CHARS = 2000
_PR_SET_PDEATHSIG = 1
# A request comes at once; whoever sends none is gone.
_REQUEST_S = 60.0

Event = Mapping[str, Any]
Tell = Callable[[Event], None]


def vmapipe_words() -> list[str]:
    """Return how vmapipe is called from here, as this process was."""
    return [sys.executable, "-P", "-m", "vmapipe.control.main"]


def serve_one(
    source: BinaryIO, tell: Tell, cancel: Cancel, probe: Callable[[object], Event]
) -> int:
    """Carry out the request that comes on `source`; return the exit code. Raises Failure.

    `probe` finds the machines of this host by rules.
    """
    line = _read_request(source.fileno(), cancel)
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"a request has to be a line of JSON: {error}") from error
    if isinstance(request, dict) and request.get("verb") == "probe":
        tell({"event": "probed", **probe(request.get("rules"))})
        return 0
    return run_job(check(request), tell, cancel, source.fileno())


def _read_request(fd: int, cancel: Cancel) -> bytes:
    held = b""
    deadline = time.monotonic() + _REQUEST_S
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        selector.register(cancel.fd, selectors.EVENT_READ)
        while b"\n" not in held:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise UsageError(f"no request came on standard input within {_REQUEST_S:.0f} s")
            cancel.check()
            piece = os.read(fd, 1 << 16)
            held += piece
            if len(held) > MOST_REQUEST_BYTES:
                raise UsageError(f"a request of more than {MOST_REQUEST_BYTES} bytes")
            if not piece:
                break
    return held.partition(b"\n")[0]


def die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child does before its program: it ends in order when this process dies, killed or not."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(EXIT_FAILED)

    return prepare


class _Progress:
    """What a job's events say of how far it is, and of what came of it."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self.text = ""
        self.result = dict[str, Any]()
        self._began = time.monotonic()

    def take(self, event: Event) -> None:
        match event.get("event"):
            case "progress":
                devices = event.get("devices")
                if isinstance(devices, list):
                    self.done = sum(_whole(d.get("done_bytes")) for d in devices)
                    self.total = sum(_whole(d.get("bytes")) for d in devices)
                else:
                    self.done = _whole(event.get("done_bytes"))
                    self.total = _whole(event.get("total_bytes"))
            case "failed" | "error":
                self.text = one_line(str(event.get("text", "")), _TEXT_CHARS)
            case "stored" | "done" | "verified" | "drilled" | "copied" as name:
                kept = {k: v for k, v in event.items() if not isinstance(v, list | dict)}
                self.result[str(name)] = kept
            case None:
                if "mark" in event:  # vmapipe prune: a line an archive
                    removed = self.result.setdefault("removed", [])
                    if event.get("removed"):
                        removed.append(os.path.basename(str(event.get("archive"))))

    def take_picture(self, archive: str) -> None:
        """Put what the screen has shown into the result: who makes the report may not reach this host's files."""
        # Imported here: no other job needs it.
        from vmapipe.access.drill.result import PICTURE, read_picture

        drilled = self.result.get("drilled", {})
        png = read_picture(os.path.join(str(drilled.get("evidence")), PICTURE), archive)
        if png is not None:
            self.result["picture"] = base64.b64encode(png).decode()

    def rate(self) -> float:
        return self.done / max(0.1, time.monotonic() - self._began)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def run_job(
    request: Request, tell: Tell, cancel: Cancel, asker: int | None, *, program: Sequence[str] = ()
) -> int:
    """Run the command of a checked request, tell how it goes, and return its exit code. Raises Failure.

    `asker`: the descriptor whose end means that nobody wants it any more.
    """
    words = words_of([*(program or vmapipe_words()), *command_of(request)], request)
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509  this process has one thread
        )
    except OSError as error:
        raise Failure(f"cannot start {words[0]}: {error.strerror}") from error
    tell({"event": "begun"})
    watched = _Watched(child, tell)
    why = ""
    try:
        why = watched.until_end(request["limit_s"], cancel, asker)
    finally:
        code = watched.end(_END_S)
    progress = watched.progress
    if request["verb"] == "drill":
        progress.take_picture(request["archive"])
    text = why or progress.text or ("" if code == 0 else watched.last_words)
    tell(
        {
            "event": "ended",
            "exit_code": code,
            "cancelled": bool(why) and "time limit" not in why,
            "text": one_line(text, _TEXT_CHARS),
            "done_bytes": progress.done,
            "total_bytes": progress.total,
            "result": progress.result,
        }
    )
    return code


class _Watched:
    """A running command: its events, its last words, its end."""

    def __init__(self, child: subprocess.Popen[bytes], tell: Tell) -> None:
        self._child, self._tell = child, tell
        self.progress = _Progress()
        self._held = {"out": b"", "err": b""}
        self._errors: deque[str] = deque(maxlen=5)

    @property
    def last_words(self) -> str:
        words = " ".join(self._errors)
        return words or f"exit code {self._child.returncode}"

    def until_end(self, limit_s: float, cancel: Cancel, asker: int | None) -> str:
        """Return why it has to be ended; empty: it has ended by itself."""
        stdout, stderr = self._child.stdout, self._child.stderr
        if stdout is None or stderr is None:
            return "no pipes"
        deadline, beat = time.monotonic() + limit_s, 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ, "out")
            selector.register(stderr, selectors.EVENT_READ, "err")
            selector.register(cancel.fd, selectors.EVENT_READ, "cancel")
            if asker is not None:
                selector.register(asker, selectors.EVENT_READ, "asker")
            open_streams = 2
            while open_streams:
                now = time.monotonic()
                if now >= beat:
                    self._beat()
                    beat = now + BEAT_S
                if now >= deadline:
                    return f"it was ended at its time limit of {limit_s:.0f} s (time_limit)"
                for key, _ in selector.select(min(beat, deadline) - now):
                    if key.data == "cancel":
                        return cancel.reason or "cancelled"
                    if key.data == "asker":
                        # No more words are expected: whatever comes, and the end, means the same.
                        return "cancelled by who has asked for it"
                    if not self._take(key.fd, key.data):
                        selector.unregister(key.fileobj)
                        open_streams -= 1
        return ""

    def _beat(self) -> None:
        progress = self.progress
        self._tell(
            {
                "event": "progress",
                "done_bytes": progress.done,
                "total_bytes": progress.total,
                "rate_bytes_s": round(progress.rate()),
            }
        )

    def _take(self, fd: int, stream: str) -> bool:
        piece = os.read(fd, 1 << 16)
        *lines, held = (self._held[stream] + piece).split(b"\n")
        self._held[stream] = held[-_LINE_BYTES:]
        for line in lines:
            if stream == "err":
                if line.strip():
                    self._errors.append(one_line(line.decode(errors="replace"), _TEXT_CHARS))
                continue
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                self.progress.take(json.loads(line))
        return bool(piece)

    def end(self, grace_s: float) -> int:
        """End it if it has not, with all that it has started; return its exit code."""
        child = self._child
        with child:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # Its words are read no more: a pipe that is full must not hold it.
                    for stream in (child.stdout, child.stderr):
                        if stream is not None:
                            stream.close()
                    child.wait(grace_s)
                # Not its children: they end when it does, and a guardian of QEMU's has to outlive it.
                if child.poll() is None:
                    child.kill()
        return child.returncode
