# SPDX-License-Identifier: Apache-2.0
"""The archiver's loop: carries messages to the job's core and its instructions out."""

from __future__ import annotations

import fcntl
import functools
import mmap
import operator
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.archiver.job import spec as core
from vmapipe.archiver.job.device import FrameMark
from vmapipe.archiver.job.job import Job, JobPhase
from vmapipe.archiver.job.spec import JobSpec
from vmapipe.archiver.job.writer import ArchiveWriter, WriterState
from vmapipe.archiver.listener.socket import TURN, ListeningSocket
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.logs import DEBUG, TRACE, Trace, shown
from vmapipe.runtime.process import yield_cpu

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.archiver.outputs.cluster_digests import BaseDigests
    from vmapipe.runtime.keys import ServerKeys

_log = Trace(__name__)

# Some frames of each producer, so that none of them waits for us between two turns.
_RECEIVE_MARK = 32
_BUFFER = operator.attrgetter("buffer")
# Often enough for a bar that moves, seldom enough to cost nothing.
PROGRESS_S = 0.25

MakeStore = Callable[[Callable[[], None]], ArchiveWriter[FrameMark]]


class Listen(NamedTuple):
    """Where producers connect, and for TCP the keys of those that may."""

    endpoint: str
    keys: ServerKeys | None = None
    #: True: producers at ipc:// may be on another host, behind a relay; no memory is shared then.
    from_afar: bool = False


def serve(
    spec: JobSpec,
    at: Listen,
    make_store: MakeStore,
    cancel: Cancel,
    emit: Emit,
    base_digests: BaseDigests | None = None,
) -> None:
    """Make one archive. Raises Failure when nothing was stored."""
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    link: ListeningSocket | None = None
    try:
        store = make_store(functools.partial(os.eventfd_write, wake_fd, 1))
        try:
            link = ListeningSocket(
                at.endpoint, at.keys, receive_mark=_RECEIVE_MARK, from_afar=at.from_afar
            )
            link.watch(wake_fd)
            link.watch(cancel.fd)
            emit({"event": "listening", "endpoint": link.endpoint})
            shares = link.is_local and not at.from_afar
            mapping = map_shared if shares else refuse_shared
            job = Job(spec, time.monotonic(), mapping, base_digests)
            _Server(job, link, store, emit, spec.base).run(wake_fd, cancel)
        finally:
            # Nothing to do where the archive was stored.
            store.abandon()
    finally:
        if link is not None:
            link.close()
        os.close(wake_fd)


class _Server:
    def __init__(
        self,
        job: Job,
        link: ListeningSocket,
        store: ArchiveWriter[FrameMark],
        emit: Emit,
        base: Base | str | None,
    ) -> None:
        self._base = base
        self._job = job
        self._link = link
        self._store = store
        self._emit = emit
        self._next_progress = 0.0
        self._reported = False

    def run(self, wake_fd: int, cancel: Cancel) -> None:
        job = self._job
        self._handle(core.JobStarted())
        ended, cancel_fd = (JobPhase.DONE, JobPhase.FAILED), cancel.fd
        while job.phase not in ended or not (job.over or cancel.asked):
            ready = dict(self._link.wait(1.0))
            if self._link.socket in ready:
                self._receive()
            if wake_fd in ready:
                os.eventfd_read(wake_fd)
                self._handle_writer()
            if cancel_fd in ready and cancel.asked:
                self._handle(core.JobAborted(cancel.reason))
            if (now := time.monotonic()) >= self._next_progress:
                self._pass_time(now)
        self._emit_notices()
        # A stop that comes while the archive gets its name may come too late.
        if job.phase is JobPhase.FAILED and not self._store.committed:
            if cancel.asked:
                raise Cancelled(cancel.reason, cancel.signum)
            raise Failure(job.reason)
        self._report_stored()

    def _receive(self) -> None:
        """Handle some messages; large parts are views of the memory that ZeroMQ received."""
        for _ in range(TURN):
            message = self._link.take_message()
            if message is None:
                return
            peer, client, frames = message
            parts = list(map(_BUFFER, frames))
            self._handle(core.MessageReceived(peer, parts, time.monotonic(), client))
            yield_cpu()

    def _report_stored(self) -> None:
        """Report the archive at once, although a producer that lost its connection has not heard DONE."""
        if not self._reported:
            self._reported = True
            self._progress()
            self._emit(
                {
                    "event": "stored",
                    "archive": self._store.description,
                    "uuid": self._job.uuid.hex(),
                    "stored_bytes": self._store.stored_bytes,
                    "plain_bytes": self._store.plain_bytes,
                    "base_bytes": self._store.base_bytes,
                    "shared_bytes": self._store.shared_bytes,
                }
            )

    def _emit_notices(self) -> None:
        for text in self._link.take_notices():
            self._emit({"event": "notice", "text": text})

    def _handle(self, event: core.JobEvent) -> None:
        is_traced, level = _log.has(DEBUG), DEBUG
        if is_traced:
            level = TRACE if _comes_with_data(event) else level
            _log.log(level, "event %s", shown(event))
        for instruction in self._job.handle(event):
            if is_traced:
                is_data = isinstance(instruction, core.StoreExtent)
                _log.log(TRACE if is_data else level, "instruction %s", shown(instruction))
            match instruction:
                case core.Send(peer, parts):
                    self._link.send(peer, parts)
                case core.StoreExtent(extent):
                    self._store.put(extent)
                case core.FillClusters(run):
                    self._store.fill(run)
                case core.BeginArchive(header, raw_header, bases):
                    self._store.begin(header, raw_header, bases)
                    self._emit_bases(bases)
                    self._emit(
                        {
                            "event": "begun",
                            "uuid": header.uuid.hex(),
                            "devices": [
                                {"dev_id": d.dev_id, "name": d.name, "bytes": d.size_bytes}
                                for d in header.devices
                            ],
                        }
                    )
                case core.FinishArchive():
                    self._store.finish()
                case core.AbandonArchive():
                    self._store.abandon()
                case core.LogNotice(text):
                    self._emit({"event": "notice", "text": text})

    def _emit_bases(self, bases: Sequence[core.BaseUse]) -> None:
        """Tell which devices are filled from the base, and why others are not."""
        base = self._base
        found = None if isinstance(base, str) else base
        if bases:
            self._emit(
                {
                    "event": "base",
                    "archive": found.archive if found else "",
                    "uuid": found.uuid.hex() if found else "",
                    "devices": [
                        {
                            "name": use.device.name,
                            "incremental": bool(use.base_dev_id),
                            "reason": use.reason,
                        }
                        for use in bases
                    ],
                }
            )

    def _handle_writer(self) -> None:
        for extent in self._store.take_written():
            self._handle(core.ExtentWritten(extent.notes, extent.dev_ids))
        if self._store.base_damage:
            self._emit({"event": "base-damaged", "text": self._store.base_damage})
            self._store.base_damage = ""
        match self._store.state:
            case WriterState.FAILED:
                self._handle(core.JobAborted(str(self._store.error)))
            case WriterState.COMMITTED:
                self._handle(core.ArchiveStored())
                self._report_stored()

    def _pass_time(self, now: float) -> None:
        self._next_progress = now + PROGRESS_S
        for client in self._link.revoked(now):
            self._handle(core.KeyRevoked(client))
        self._emit_notices()
        self._handle(core.TimePassed(now))
        if not self._reported:
            self._progress()

    def _progress(self) -> None:
        if not self._job.devices:
            return
        self._emit(
            {
                "event": "progress",
                "stored_bytes": self._store.stored_bytes,
                "plain_bytes": self._store.plain_bytes,
                "devices": [
                    {
                        "name": d.device.name,
                        "bytes": d.device.size_bytes,
                        "done_bytes": d.done_bytes,
                        "zero_bytes": d.zero_bytes,
                        "unchanged_bytes": d.unchanged_bytes,
                    }
                    for d in self._job.devices
                ],
            }
        )


def _comes_with_data(event: core.JobEvent) -> bool:
    """Tell events that come with each extent, or several times a second, from the others."""
    if isinstance(event, core.MessageReceived):
        return len(event.parts) > 1
    return isinstance(event, core.ExtentWritten | core.TimePassed)


# Larger than any ring of a producer; a mapping costs address space only, but no
# peer needs more of it.
MAX_SHARED_BYTES = 256 << 20
# A descriptor of a process, and nothing else: a path from a peer must not make this
# process open (and thereby wake or block on) anything else.
_OFFER = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")
# Without these seals the owner could cut the file, and reading the mapping
# would then kill this process.
_SEALS = fcntl.F_SEAL_SHRINK


def map_shared(offer: str) -> memoryview | None:
    """The memory file at `offer`, read-only; None when it cannot be shared.

    Not being able to is no error (another user, another pid namespace): the
    data then comes in the frames.
    """
    if not _OFFER.fullmatch(offer):
        return None
    try:
        fd = os.open(offer, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= MAX_SHARED_BYTES:
            return None
        # Only memory files have seals; any other file fails here.
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            return None
        return memoryview(mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ))
    except OSError:
        return None
    finally:
        os.close(fd)


def refuse_shared(offer: str) -> memoryview | None:
    """For producers that may be on another host."""
    return None
