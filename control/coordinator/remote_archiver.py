# SPDX-License-Identifier: Apache-2.0
"""The archiver of a backup when that is elsewhere: opens a job at a service, and watches it.

A process like the archiver of this host, with the same events and exit codes,
so that the coordinator need not know the difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from vmapipe.archiver.arguments import read_configs
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.protocol import limits, service
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.runtime.arguments import (
    add_child_options,
    add_connect_option,
    add_tcp_options,
    job_id,
    make_parser,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.event_types import (
    BackupProgressEvent,
    BaseDevice,
    BegunDevice,
    BegunEvent,
    ProgressDevice,
)
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.keys import read_client_keys
from vmapipe.runtime.logs import Trace, debug
from vmapipe.runtime.process import run_child
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import BaseChosenEvent

_log = Trace(__name__)

# After CANCEL the service has so long to say how the job ended: its archiver
# removes a partial file. Below the time that our parent gives us (children.STOP_S).
_VERDICT_S = 8.0
# A lost connection is tried anew so often.
_PAUSE_S = 1.0
# Notices of a job; an honest one has a line for each connection that was lost.
_MAX_NOTICES = 1000
_MAX_NOTICE_CHARS = 1000
# A base's name, as a service calls it: it was a client's.
_MAX_NAME_CHARS = 200
# Far beyond those of any honest job: a service that sends so many never ends by itself.
_NOTICES_WITHOUT_END = 100_000
# Messages between two looks at the clock and at who cancels.
_MESSAGES_A_TURN = 1000
# A service that lives and stores nothing: as long as its longest silence, and again what
# its disk or object store may take for the end of a large archive.
_IDLE_S = 2.0 * limits.MAX_HEARTBEAT_S
# The first attempt after a lost connection is made at once; this one when a pause has gone by.
_TOLD_ATTEMPT = 2
# See producer/session.py: after a longer sleep we ourselves were stopped.
_STOPPED_S = 5.0


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe backup --archiver") -> int:
    """Started by the coordinator; the options are those of an archiver, as far as a client has them."""
    parser = make_parser(prog, __doc__ or "", "")
    parser.add_argument("--archiver", required=True, metavar="ENDPOINT")
    parser.add_argument("--output", required=True, metavar="NAME")
    parser.add_argument("--job", required=True, type=job_id, metavar="HEX")
    parser.add_argument("--device", action="append", default=[], metavar="NAME")
    parser.add_argument("--config", action="append", default=[], metavar="[NAME=]PATH")
    parser.add_argument("--compress", default="", metavar="zstd[:LEVEL]")
    parser.add_argument("--no-manifest", action="store_true")
    parser.add_argument("--stable", action="store_true")
    parser.add_argument("--base", choices=("auto",))
    parser.add_argument("--digests", action="store_true")
    parser.add_argument("--full-every", type=int, default=0)
    parser.add_argument("--recorded", type=job_id, action="append", default=[])
    parser.add_argument("--uuid", type=job_id, default=b"", metavar="UUID")
    add_tcp_options(parser, "its key pair, and the archiver's server.pub")
    add_connect_option(parser)
    add_child_options(parser)
    options = parser.parse_args(argv)
    return run_child(
        prog, options.parent_fd, lambda cancel, emit: _conduct(options, cancel, emit), _print
    )


def _conduct(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> None:
    request = service.Open(
        limits.VERSION,
        options.job,
        options.output,
        tuple(options.device),
        tuple((config.name, config.data) for config in read_configs(options.config, cancel)),
        options.compress,
        manifest=not options.no_manifest,
        uuid=options.uuid,
        stable=options.stable,
        program="vmapipe",
        base=options.base is not None,
        digests=options.digests,
        full_every=options.full_every,
        recorded=tuple(options.recorded[: service.MAX_JOB_ITEMS]),
    )
    conduct(request, options, cancel, emit)


def conduct(request: service.Open, options: argparse.Namespace, cancel: Cancel, emit: Emit) -> None:
    """Open a job, and watch it to its end. Raises Failure where nothing was stored, Cancelled.

    Of `options` those count that say how the service is reached, and what a `RemoteJob` is told.
    """
    try:
        opening = service.encode(request)
    except ProtocolError as error:
        raise Failure(f"cannot be asked of {options.archiver}: {error}") from error
    keys = read_client_keys(options.keys) if options.keys else None
    link = ArchiverConnection(options.archiver, keys, options.connect_timeout)
    try:
        link.watch(cancel.fd)
        RemoteJob(options, link, cancel, emit).run(opening)
    finally:
        link.close()


class RefusedJob(Failure):
    """The service has not taken the job; `code` says why (docs/wire-protocol.md)."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class RemoteJob:
    """One job at a service, from OPEN to its end."""

    def __init__(
        self,
        options: argparse.Namespace,
        link: ArchiverConnection,
        cancel: Cancel,
        emit: Emit,
        idle_s: float = _IDLE_S,
    ) -> None:
        """`idle_s`: a service that says only that it lives is given up after so long."""
        self._idle_s = idle_s
        self._has_base = options.base is not None
        self._at = options.archiver
        self._job = options.job
        self._devices = options.device
        self._name = options.output
        self._notices = 0
        self._attempts = 0
        self._link = link
        self._cancel = cancel
        self._emit = emit
        self._opened: service.Opened | None = None
        self._begun: service.JobBegun | None = None
        self._opening: list[Part] = []
        self._heard = self._spoke = self._connected = self._advanced = time.monotonic()
        self._progress: service.JobProgress | None = None

    def run(self, opening: list[Part]) -> None:
        """Raises Failure when nothing was stored, as far as we know."""
        self._opening = opening
        self._say(opening)
        deadline = float("inf")
        while True:
            before = time.monotonic()
            wait_s = min(self._heartbeat_s / 3, max(0.0, deadline - before))
            if self._link.lost:
                wait_s = min(wait_s, max(0.0, self._connected + _PAUSE_S - before))
            self._link.wait(wait_s)
            for message in self._messages():
                self._tell_of_return()
                if self._take(message):
                    return
            now = time.monotonic()
            if now - before > wait_s + _STOPPED_S:
                # This process itself was stopped: the service's silence does not count.
                self._heard = self._advanced = now
            if self._cancel.asked and deadline == float("inf"):
                deadline = now + _VERDICT_S
                self._link.unwatch(self._cancel.fd)
                self._say_who_we_are()
            if now >= deadline:
                self._cancel.check()
            if self._link.lost and now >= self._connected + _PAUSE_S:
                self._connected = now
                self._link.reconnect()
                self._say_who_we_are()
                self._tell_of_loss()
            self._keep_alive(now)

    @property
    def _heartbeat_s(self) -> int:
        return self._opened.heartbeat_s if self._opened else limits.GREETING_HEARTBEAT_S

    def _messages(self) -> Iterator[service.FromService]:
        for _ in range(_MESSAGES_A_TURN):
            parts = self._link.receive()
            if parts is None:
                return
            if self._opened is not None:
                # Before that nothing is awaited but the answer to OPEN.
                self._heard = time.monotonic()
            try:
                yield service.decode_of_service(parts)
            except ProtocolError as error:
                raise Failure(f"{self._at}: this is not a vmapipe archiver: {error}") from error

    def _take(self, message: service.FromService) -> bool:
        """Tell whether it was the last one. Raises Failure."""
        debug(_log, f"{self._at} sends", message)
        match message:
            case service.Opened() if self._opened is None:
                self._opened = message
                self._heard = self._advanced = time.monotonic()
                self._link.is_settled = True
                self._tell_base_chosen(message)
                self._emit({"event": "listening", "endpoint": self._at})
            case service.JobBegun() | service.JobProgress() | service.JobStored() if (
                self._opened is None
            ):
                raise Failure(
                    f"{self._at}: this is not a vmapipe archiver: it did not open the job"
                )
            case service.JobBegun() if self._begun is None and len(message.sizes) == len(
                self._devices
            ):
                self._begun = message
                self._advanced = time.monotonic()
                self._tell_base(message)
                self._emit(self._begun_event(message))
            case service.JobProgress() if self._begun is not None:
                if message != self._progress:
                    self._progress, self._advanced = message, time.monotonic()
                self._emit(self._progress_event(message, self._begun))
            case service.JobNotice(text):
                self._pass_on(text)
            case service.JobStored() if self._begun is None:
                raise Failure(
                    f"{self._at}: this is not a vmapipe archiver: it stored what never began"
                )
            case service.JobStored():
                if message.archive == f"{self._name}.age":
                    self._name = message.archive
                self._emit(
                    {
                        "event": "stored",
                        # As we have named it, whatever is said there; or that, encrypted.
                        "archive": f"{self._at}/{self._name}",
                        "uuid": message.uuid.hex(),
                        "stored_bytes": message.stored,
                        "plain_bytes": message.plain,
                        "base_bytes": message.from_base,
                        "shared_bytes": message.shared,
                    }
                )
                return True
            case service.JobFailed():
                self._fail(message)
            case service.JobRefused(code, reason):
                raise RefusedJob(f"the archiver at {self._at} refused: {reason} [{code}]", code)
        return False

    def _fail(self, failed: service.JobFailed) -> NoReturn:
        if self._cancel.asked:
            raise Cancelled(self._cancel.reason, self._cancel.signum)
        text = f"the archiver at {self._at}: {failed.reason}"
        if failed.base_damaged and self._has_base:
            self._emit({"event": "base-damaged", "text": one_line(text, _MAX_NOTICE_CHARS)})
        raise Failure(text)

    def _pass_on(self, text: str) -> None:
        """A service that tells without end tells a terminal or a log only so much."""
        self._notices += 1
        if self._notices <= _MAX_NOTICES:
            said = one_line(text, _MAX_NOTICE_CHARS)
            self._emit({"event": "notice", "text": f"{self._at}: {said}"})
        if self._notices == _MAX_NOTICES:
            self._emit({"event": "notice", "text": f"{self._at}: more notices are left out"})
        if self._notices == _NOTICES_WITHOUT_END:
            raise Failure(f"{self._at}: this is not a vmapipe archiver: its notices have no end")

    def _tell_base_chosen(self, opened: service.Opened) -> None:
        if self._has_base:
            self._emit(self._base_chosen(opened))

    def _base_chosen(self, opened: service.Opened) -> BaseChosenEvent:
        """What the service says of the base; a service that knows none says nothing."""
        why = one_line(opened.why, _MAX_NOTICE_CHARS) or "it knows nothing of bases"
        return {
            "event": "base-chosen",
            "archive": self._base_name(opened),
            "uuid": opened.base.hex(),
            "devices": [{"name": name, "bytes": size} for name, size in opened.disks],
            "compares": opened.compares,
            "reason": "" if opened.base else f"the archiver at {self._at}: {why}",
        }

    def _base_name(self, opened: service.Opened) -> str:
        return f"{self._at}/{one_line(opened.name, _MAX_NAME_CHARS)}" if opened.base else ""

    def _tell_base(self, begun: service.JobBegun) -> None:
        opened = self._opened
        if not self._has_base or opened is None:
            return
        reasons = begun.full
        if not opened.base or len(reasons) != len(self._devices):
            reasons = (self._base_chosen(opened)["reason"],) * len(self._devices)
        devices: list[BaseDevice] = [
            {
                "name": name,
                "incremental": bool(opened.base) and not reason,
                "reason": one_line(reason, _MAX_NOTICE_CHARS),
            }
            for name, reason in zip(self._devices, reasons, strict=True)
        ]
        archive, uuid = self._base_name(opened), opened.base.hex()
        self._emit({"event": "base", "archive": archive, "uuid": uuid, "devices": devices})

    def _begun_event(self, begun: service.JobBegun) -> BegunEvent:
        devices: list[BegunDevice] = [
            {"dev_id": index, "name": name, "bytes": size}
            for index, (name, size) in enumerate(zip(self._devices, begun.sizes, strict=True), 1)
        ]
        return {"event": "begun", "uuid": begun.uuid.hex(), "devices": devices}

    def _progress_event(
        self, progress: service.JobProgress, begun: service.JobBegun
    ) -> BackupProgressEvent:
        devices: list[ProgressDevice] = [
            {"name": name, "bytes": size, "done_bytes": done, "zero_bytes": zero}
            for name, size, done, zero in zip(
                # What does not fit together is not shown.
                self._devices,
                begun.sizes,
                progress.done,
                progress.zero,
                strict=False,
            )
        ]
        for device, unchanged in zip(devices, progress.unchanged, strict=False):
            device["unchanged_bytes"] = unchanged
        return {
            "event": "progress",
            "stored_bytes": progress.stored,
            "plain_bytes": progress.plain,
            "devices": devices,
        }

    def _tell_of_loss(self) -> None:
        """Whoever looks on learns why nothing goes on; not of a loss that the first attempt mends."""
        self._attempts += 1
        if self._opened is not None and self._attempts == _TOLD_ATTEMPT:
            text = f"{self._at}: the connection is lost, and tried again (--reconnect-limit)"
            self._emit({"event": "notice", "text": text})

    def _tell_of_return(self) -> None:
        if self._opened is not None and self._attempts >= _TOLD_ATTEMPT:
            self._emit({"event": "notice", "text": f"{self._at}: the connection is there again"})
        self._attempts = 0

    def _say(self, parts: list[Part]) -> None:
        self._link.send(parts)
        self._spoke = time.monotonic()

    def _keep_alive(self, now: float) -> None:
        if now - self._heard > self._heartbeat_s:
            if self._opened is None:
                raise Failure(
                    f"{self._at}: no answer within {self._heartbeat_s} s; is an archiver running "
                    "there, as a service?"
                )
            raise Failure(
                f"the archiver at {self._at} has been silent for {self._heartbeat_s} s; is it "
                "still running?"
            )
        if now - self._advanced > self._idle_s:
            raise Failure(
                f"the archiver at {self._at} answers, but has stored nothing for {self._idle_s:.0f} s"
            )
        if now - self._spoke >= self._heartbeat_s / 3:
            self._say_who_we_are()

    def _say_who_we_are(self) -> None:
        """Say again what may have been lost with a connection: the service knows a repetition."""
        if self._cancel.asked:
            self._say(service.encode(service.JobCancel(self._job, self._cancel.reason)))
        elif self._opened is None:
            self._say(self._opening)
        else:
            self._say(service.encode(service.Beat(self._job)))


def _print(event: Event) -> None:
    """Report nothing: it is never started by hand, and its exit tells what went wrong."""


if __name__ == "__main__":
    sys.exit(main())
