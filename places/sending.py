# SPDX-License-Identifier: Apache-2.0
"""An archive's contents on their way to an archiver service: as the producers of all its devices, read once.

The service stores them by its own rules. What is damaged, or changes while it is read, is told before
any device's END, so that nothing is stored of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, MAX_DEVICE_BYTES
from vmapipe.control.coordinator.remote_archiver import conduct
from vmapipe.places.ordering import DiskRun, normal, zeroes_together
from vmapipe.places.reading import SoundArchive
from vmapipe.places.repack import Changes, Tell, changed_header, ordered_runs, runs_of
from vmapipe.places.spool import Spool
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.runs import Run, largest_frame_bytes, piece_bytes
from vmapipe.producer.session import Session
from vmapipe.protocol import limits, service
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.transfer import masked_bytes
from vmapipe.restore.archive.reader import FoundExtent
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.event_types import StoredEvent
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.keys import ClientKeys, read_client_keys
from vmapipe.runtime.rate_limit import RateLimiter
from vmapipe.vma.header import Header, encode_header

# Runs that are read ahead, of at most an extent's data each: reader and network both work.
_AHEAD_RUNS = 8
# All sessions are looked at so often, whatever one of them waits for; below any heartbeat.
_LOOK_S = 0.25
# What a session that has ended, or a reader that is told to, may take; then it is left behind.
_END_S = 10.0
# The end of the runs, in the queue.
_END = None


class ServiceLink(NamedTuple):
    """How a service is reached. `keys`: the folder of the client's, or None; `speed`: bytes a second, 0: no limit."""

    endpoint: str
    keys: str | None
    connect_timeout_s: int
    speed: int = 0


class ArchiveRequest(NamedTuple):
    """What the service is asked to make: a name of its own, and how it is compressed ("": not at all)."""

    name: str
    compress: str
    digests: bool = False


class Contents(NamedTuple):
    """What is sent. `runs` is called with what hears how many bytes of the source are read, in another thread.

    It yields the devices' clusters; each device's memory in order. It raises ArchiveError, Failure, Cancelled for what
    is wrong with the source, at the latest at its end. The data of a run does not change any more.
    """

    header: Header
    runs: Callable[[Tell], Iterator[DiskRun]]
    stable: bool = False


def contents_of(source: SoundArchive) -> Contents:
    """Return all that an archive holds, in its own order."""
    header = source.archive.header
    sizes = _sizes(header)

    def runs(tell: Tell) -> Iterator[DiskRun]:
        for found in source.extents():
            tell(found.extent.offset + found.extent.total_bytes)
            for run, _ in runs_of(found):
                yield normal(_on_its_own(run, found), sizes[run.dev_id])

    return Contents(header, lambda tell: zeroes_together(runs(tell)))


@contextlib.contextmanager
def repacked_contents(
    source: SoundArchive, changes: Changes, spool_folder: str, spool_bytes: int, cancel: Cancel
) -> Iterator[Contents]:
    """Yield what becomes of an archive's contents, disk after disk. Raises UsageError, LimitError."""
    header = changed_header(source.archive.header, changes)
    encode_header(header)  # what no archive can hold is told before the service hears of it
    sizes = _sizes(header)
    with Spool(source.source, spool_folder, spool_bytes, cancel) as spool:

        def runs(tell: Tell) -> Iterator[DiskRun]:
            for run in ordered_runs(source, header, spool, tell):
                yield normal(run, sizes[run.dev_id])

        yield Contents(header, runs, changes.stable)


def _sizes(header: Header) -> dict[int, int]:
    """How long each device is; of a machine's memory that is not known."""
    return {
        device.dev_id: MAX_DEVICE_BYTES if device.is_vmstate else device.size_bytes
        for device in header.devices
    }


def _on_its_own(run: DiskRun, found: FoundExtent) -> DiskRun:
    """A small part that waits for its acknowledgement would hold all of the extent's memory."""
    if 2 * len(run.data) >= len(found.data or b""):
        return run
    return run._replace(data=memoryview(bytes(run.data)))


def send_archive(
    contents: Contents,
    request: ArchiveRequest,
    link: ServiceLink,
    tell: Tell,
    emit: Emit,
    cancel: Cancel,
) -> StoredEvent:
    """Return what the service says of the archive that it has stored. `tell` hears how far the source is read.

    Raises ArchiveError where the source is damaged, RefusedJob, Failure, Cancelled; nothing was stored then.
    """
    with _RemoteJob(_open(contents, request), link) as job:
        job.await_opened(cancel)
        with _Sender(contents, job, link, cancel) as sender:
            try:
                sender.send(tell, lambda: job.tell_notices(emit))
            except BaseException as error:
                sender.fail(str(error))
                if not (sender.is_source_bad or cancel.asked):
                    # The producers hear of a job's end before its coordinator does, and less of the reason.
                    job.await_reason()
                raise
            stored = job.stored()
            job.tell_notices(emit)
            return stored


def _open(contents: Contents, request: ArchiveRequest) -> service.Open:
    header = contents.header
    return service.Open(
        limits.VERSION,
        os.urandom(limits.UUID_BYTES),
        request.name,
        tuple(device.name for device in header.devices),
        tuple((config.name, config.data) for config in header.configs),
        request.compress,
        uuid=header.uuid if any(header.uuid) else b"",
        program="vmapipe",
        stable=contents.stable,
        digests=request.digests,
        time=max(0, header.ctime_s),
    )


class _RemoteJob:
    """A job at the service, watched by a thread of its own. A context manager."""

    def __init__(self, request: service.Open, link: ServiceLink) -> None:
        self.id = request.job
        self._options = argparse.Namespace(
            archiver=link.endpoint,
            keys=link.keys,
            connect_timeout=link.connect_timeout_s,
            job=request.job,
            device=list(request.devices),
            output=request.name,
            base=None,
        )
        self._request = request
        self._cancel = Cancel()
        self._opened = threading.Event()
        self._stored: StoredEvent | None = None
        self._error: BaseException | None = None
        self._notices: deque[Event] = deque()
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)

    def __enter__(self) -> _RemoteJob:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel.ask("the copy has ended")
        self._thread.join(2 * _END_S)
        if not self._thread.is_alive():
            self._cancel.close()

    def _run(self) -> None:
        try:
            conduct(self._request, self._options, self._cancel, self._take)
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            self._error = error
        self._opened.set()

    def _take(self, event: Event) -> None:
        match event["event"]:
            case "listening":
                self._opened.set()
            case "stored":
                self._stored = event
            case "notice":
                self._notices.append(event)

    def await_opened(self, cancel: Cancel) -> None:
        """Return when producers may come. It ends: the thread waits for no answer without a limit."""
        while not self._opened.wait(_LOOK_S):
            cancel.check()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def tell_notices(self, emit: Emit) -> None:
        while self._notices:
            emit(self._notices.popleft())

    def stored(self) -> StoredEvent:
        """Return how it was stored, which the producers have been told already. Raises Failure."""
        self._thread.join()
        self.check()
        if self._stored is None:
            raise Failure(f"{self._options.archiver} has not said that the archive is stored")
        return self._stored

    def await_reason(self) -> None:
        """Raises what the service says of the job's end, if it says anything."""
        self._thread.join(_END_S)
        self.check()


class _Sender:
    """The sessions of all devices, and the thread that reads the archive for them. A context manager."""

    def __init__(
        self, contents: Contents, job: _RemoteJob, link: ServiceLink, cancel: Cancel
    ) -> None:
        self._contents = contents
        self._job = job
        self._cancel = cancel
        self._limiter = RateLimiter(link.speed, time.monotonic())
        self._speed = link.speed
        self._runs: queue.Queue[DiskRun | BaseException | None] = queue.Queue(_AHEAD_RUNS)
        self._reader = threading.Thread(target=self._read, name="reader", daemon=True)
        self._stopped = False
        #: The archive itself cannot be read, is damaged or has changed.
        self.is_source_bad = False
        self._read_bytes = 0
        self._looked = 0.0
        self._connections: list[ArchiverConnection] = []
        self._sessions: dict[int, Session] = {}
        keys = read_client_keys(link.keys) if link.keys else None
        try:
            for device in contents.header.devices:
                connection = self._connect(link, keys)
                self._sessions[device.dev_id] = Session(
                    device.name, device.size_bytes, connection, job.id, None, cancel
                )
        except BaseException:
            self._close()
            raise

    def _connect(self, link: ServiceLink, keys: ClientKeys | None) -> ArchiverConnection:
        connection = ArchiverConnection(link.endpoint, keys, link.connect_timeout_s)
        self._connections.append(connection)
        connection.watch(self._cancel.fd)
        return connection

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        if self._reader.is_alive():
            # It waits for room in the queue, or for its source.
            with contextlib.suppress(queue.Empty):
                while True:
                    self._runs.get_nowait()
            self._reader.join(_END_S)
        self._close()

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()

    def send(self, tell: Tell, on_look: Callable[[], None]) -> None:
        """From HELLO to DONE of all devices. Raises ArchiveError, Failure, ProtocolError, Cancelled."""
        sessions = list(self._sessions.values())
        for session in sessions:
            session.say_hello()
        self._until(sessions, Session.is_accepted)
        self._reader.start()
        for run in self._arriving():
            self._send_run(self._sessions[run.dev_id], run)
            tell(self._read_bytes)
            on_look()
        # Nothing was wrong with the source, to its very end: only now it may be stored.
        for session in sessions:
            session.say_end()
        self._until(sessions, Session.is_over)
        for session in sessions:
            session.say_bye()

    def fail(self, reason: str) -> None:
        """Tell the service that this is no archive. Raises nothing."""
        for session in self._sessions.values():
            if not session.is_over():
                with contextlib.suppress(Failure, ProtocolError, OSError):
                    session.fail(reason)

    def _until(self, sessions: list[Session], reached: Callable[[Session], bool]) -> None:
        """Return when all have reached it; the others live on while one is waited for."""
        for session in sessions:
            while not reached(session):
                self._step(session, _LOOK_S)

    def _step(self, session: Session, longest_s: float) -> None:
        session.step(longest_s)
        self._look()

    def _look(self) -> None:
        """Keep all sessions alive that nobody waits for."""
        self._cancel.check()
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            for session in self._sessions.values():
                if not session.is_over():
                    session.poll()

    def _send_run(self, session: Session, run: DiskRun) -> None:
        for piece, data in frames_of(run, largest_frame_bytes(session.frame_bytes, self._speed)):
            charge = limits.charge(piece.clusters, piece.length)
            while session.credit < charge:
                self._step(session, _LOOK_S)
            session.send_data(piece, data)
            self._limiter.took(piece.length, time.monotonic())
            while (wait_s := self._limiter.wait_s(time.monotonic())) > 0:
                self._step(session, min(wait_s, _LOOK_S))
        session.poll()

    def _arriving(self) -> Iterator[DiskRun]:
        """Yield the runs as the thread has read them. Raises what it has met."""
        while True:
            self._look()
            try:
                found = self._runs.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if found is _END:
                return
            if isinstance(found, BaseException):
                self.is_source_bad = True
                raise found
            yield found

    def _read(self) -> None:
        try:
            for run in self._contents.runs(self._advanced):
                self._runs.put(run)
                if self._stopped:
                    return
        except BaseException as error:  # noqa: BLE001  raised in the thread that sends
            self._runs.put(error)
            return
        self._runs.put(_END)

    def _advanced(self, read_bytes: int) -> None:
        self._read_bytes = read_bytes


def frames_of(run: DiskRun, frame_bytes: int) -> Iterator[tuple[Run, memoryview]]:
    """Cut a run into pieces whose charge is at most `frame_bytes`, with their data. Pure."""
    if not run.masks:
        room_bytes = frame_bytes - limits.CHARGE_PER_FRAME
        most = min(limits.MAX_RUN_CLUSTERS, room_bytes // limits.CHARGE_PER_CLUSTER)
        for at in range(0, run.clusters, most):
            yield Run(run.first + at, min(most, run.clusters - at), b"", 0, 0), run.data[:0]
        return
    most, start = piece_bytes(frame_bytes) // CLUSTER_BYTES, 0
    for at in range(0, run.clusters, most):
        masks = run.masks[2 * at : 2 * (at + most)]
        length = masked_bytes(masks)
        words = masks if length else b""
        yield (
            Run(run.first + at, len(masks) // 2, words, 0, length),
            run.data[start : start + length],
        )
        start += length
