# SPDX-License-Identifier: Apache-2.0
"""One restore: opens the targets, has the archive brought to them, publishes."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.protocol.restore_work import Setup
from vmapipe.restore.archive.reading import Archive, checked_pieces
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.archive.totals import Totals
from vmapipe.restore.checks.manifest import Manifest, manifest_beside
from vmapipe.restore.crew.crew import Crew, start_workers
from vmapipe.restore.crew.feed import Feed, InlineFeed, ThreadFeed
from vmapipe.restore.crew.handout import ALL_DEVICES, Marks, Work, WorkMaker
from vmapipe.restore.crew.link import ReaderLink
from vmapipe.restore.crew.pace import Pace
from vmapipe.restore.crew.slots import Slots
from vmapipe.restore.plan import Plan
from vmapipe.restore.targets.newfile import Folders
from vmapipe.restore.targets.opened import OpenTargets
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Children
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import OwnFolder
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.layout import CLUSTER_BYTES

if TYPE_CHECKING:
    from vmapipe.restore.targets.resuming import Journal

# More writers than this were not quicker, whatever the storage.
_MAX_WORKERS = 4
# A worker takes a tenth of a second to start, in which another writes so much.
_BYTES_PER_WORKER = 64 << 20
# Often enough for a bar that moves, seldom enough to cost nothing.
_PROGRESS_S = 0.25


class Options(NamedTuple):
    """`workers`: 0 for one a core, at most 4. `manifest`: where it is not beside the archive.

    `check_digests`: compare the data with the manifest, where there is one. `bytes_per_s`:
    of data, all devices together; 0: as fast as it goes. `resume`: go on with an interrupted
    restore, and leave what another one can go on with.
    """

    workers: int = 0
    check_digests: bool = True
    manifest: str | None = None
    bytes_per_s: int = 0
    resume: bool = False


class Restored(NamedTuple):
    """One device and where it went (None: it was skipped)."""

    dev_id: int
    name: str
    size_bytes: int
    path: str | None


class Result(NamedTuple):
    """`totals` are of the whole archive; `digests_checked`: the data was compared with a manifest."""

    devices: tuple[Restored, ...]
    totals: Totals
    digests_checked: bool
    seconds: float
    cpu_s: float
    peak_rss_bytes: int


def restore(
    archive: Archive,
    plan: Plan,
    emit: Emit,
    cancel: Cancel,
    options: Options | None = None,
    folders: Folders | None = None,
) -> Result:
    """Bring the devices of an open archive to the plan's targets.

    `folders`: those that are held open already.

    Raises RestoreError, ArchiveError, PlanError, Cancelled or another Failure;
    then no new file is left. An existing target may then hold a part of the
    data, which a `notice` event says.
    """
    options = options or Options()
    manifest_path: str | None = None
    if options.check_digests:
        manifest_path = options.manifest or manifest_beside(archive.source, cancel)
    with ExitStack() as stack:
        manifest: Manifest | None = None
        if manifest_path is not None:
            manifest = stack.enter_context(Manifest(manifest_path, cancel))
        if folders is None:
            folders = stack.enter_context(Folders())
        journal: Journal | None = None
        if options.resume and folders.own is not None:
            # Imported here: few restores need it.
            from vmapipe.restore.targets.resuming import Journal

            journal = stack.enter_context(Journal(folders.own, archive, plan))
        targets = stack.enter_context(OpenTargets(archive, plan, folders, journal))
        for text in folders.notices:
            emit({"event": "notice", "text": text})
        job = _Job(archive, targets, manifest, emit, cancel, options.bytes_per_s, journal)
        return job.run(options.workers or default_workers())


def default_workers() -> int:
    """One a core that we may use, at most 4."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


class _Job:
    def __init__(
        self,
        archive: Archive,
        targets: OpenTargets,
        manifest: Manifest | None,
        emit: Emit,
        cancel: Cancel,
        bytes_per_s: int,
        journal: Journal | None,
    ) -> None:
        self._archive = archive
        self._targets = targets
        self._manifest = manifest
        self._emit = emit
        self._cancel = cancel
        self._coverage = Coverage(archive.header)
        self._setups = targets.setups
        self._limits = targets.limits
        if bytes_per_s:
            self._limits[ALL_DEVICES] = bytes_per_s
        self._maker = WorkMaker(
            wanted={setup.dev_id for setup in self._setups},
            zeroed={setup.dev_id for setup in self._setups if setup.write_zeroes},
            limited=set(self._limits),
            from_stream=not isinstance(archive.source, PlainFile),
            written_before=journal.mark if journal is not None else 0,
        )
        self._journal = journal
        self._marks = Marks()
        self._kept_bytes = 0
        self._slots: Slots | None = None
        self._started = time.monotonic()
        self._next_progress = 0.0
        self._done_bytes = 0
        self._total_bytes = CLUSTER_BYTES * sum(d.clusters for d in archive.header.devices)

    def run(self, workers: int) -> Result:
        devices = tuple(
            Restored(d.dev_id, d.name, d.size_bytes, self._targets.path(d.dev_id))
            for d in self._archive.header.devices
        )
        self._begin(devices)
        if self._journal is not None:
            self._tell_journal(self._journal)
            self._journal.begun = True
        with OwnFolder("job") as folder:
            children = self._bring(folder, workers)
        self._targets.publish()
        if self._journal is not None:
            self._journal.remove()
        result = Result(
            devices,
            self._maker.totals,
            self._manifest is not None,
            time.monotonic() - self._started,
            sum(child.cpu_s for child in children.all),
            sum(child.peak_rss_bytes for child in children.all),
        )
        self._end(result)
        return result

    def _bring(self, folder: OwnFolder, workers: int) -> Children:
        """Everything is written and on the disk when this returns."""
        endpoint = f"ipc://{folder.path}/sock"
        link: ReaderLink | None = None
        crew: Crew | None = None
        finished = False
        try:
            with ExitStack() as stack:
                source = self._archive.source
                if isinstance(source, PlainFile):
                    workers = min(workers, 1 + source.size_bytes // _BYTES_PER_WORKER)
                else:
                    self._slots = stack.enter_context(closing(Slots(workers)))
                children = stack.enter_context(Children(fork=True))
                setup, fds = self._setup()
                # Before the socket: ZeroMQ has threads, and a copy of us would not have them.
                start_workers(children, workers, endpoint, fds)
                link = ReaderLink(endpoint)
                pace = Pace(self._limits, self._started)
                crew = Crew(link, children, self._cancel, pace, self._done, folder.clear)
                crew.welcome(setup)
                with closing(self._feed()) as feed:
                    crew.carry_out(feed)
                self._targets.set_vmstate_size(self._coverage)
                crew.carry_out(InlineFeed(self._maker.syncs(s.dev_id for s in self._setups)))
                crew.finish()
                self._kept_bytes = crew.kept_bytes
                finished = True
            return children
        finally:
            if link is not None:
                link.close(in_order=finished)
            if not finished and crew is not None and crew.gave_work:
                self._warn()

    def _setup(self) -> tuple[Setup, list[int]]:
        """What each worker has to know, and the descriptors that it needs for that."""
        source = self._archive.source
        archive_fd = source.fd if isinstance(source, PlainFile) else -1
        memory_fd = self._slots.fd if self._slots is not None else -1
        partials = self._targets.partials
        setup = Setup(self._archive.header.uuid, archive_fd, memory_fd, self._setups, partials)
        fds = [archive_fd, memory_fd]
        fds += [target.fd for target in self._setups]
        for partial in partials:
            fds += [partial.fd, partial.folder_fd]
        return setup, sorted({fd for fd in fds if fd >= 0})

    def _feed(self) -> Feed:
        source = self._archive.source
        slots = self._slots
        pieces = checked_pieces(self._archive, self._coverage, self._manifest, slots)
        works = self._maker.works(pieces)
        if isinstance(source, PlainFile) or slots is None:
            return InlineFeed(works)
        return ThreadFeed(works, source.stop, slots.stop)

    def _done(self, work: Work) -> None:
        if self._slots is not None and work.slot >= 0:
            self._slots.give(work.slot)
        self._done_bytes += work.cluster_bytes
        self._marks.done(work)
        self._note_mark()
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + _PROGRESS_S
            self._progress()

    def _tell_journal(self, journal: Journal) -> None:
        if not journal.mark:
            return
        against = (
            "the manifest"
            if self._manifest is not None
            else ("the archive's own data, which has to be read for that: there is no manifest")
        )
        text = (
            f"going on with an interrupted restore: what it has written is checked with {against}"
        )
        self._emit({"event": "notice", "text": text})

    def _note_mark(self) -> None:
        if self._journal is not None:
            self._journal.note(self._marks.mark)

    def _progress(self) -> None:
        # vmstate may be longer than its estimate: never beyond 100 %.
        self._emit(
            {
                "event": "progress",
                "done_bytes": min(self._done_bytes, self._total_bytes),
                "total_bytes": self._total_bytes,
                "archive_bytes": self._maker.totals.archive_bytes,
            }
        )

    def _begin(self, devices: tuple[Restored, ...]) -> None:
        self._emit(
            {
                "event": "restoring",
                "archive": self._archive.source.name,
                "uuid": self._archive.header.uuid.hex(),
                "devices": [
                    {"name": d.name, "bytes": d.size_bytes, "path": d.path} for d in devices
                ],
                "digests_checked": self._manifest is not None,
            }
        )

    def _end(self, result: Result) -> None:
        self._progress()
        totals = result.totals
        self._emit(
            {
                "event": "restored",
                "archive": self._archive.source.name,
                "archive_bytes": totals.archive_bytes,
                "data_bytes": totals.data_bytes,
                "zero_bytes": totals.cluster_bytes - totals.data_bytes,
                "kept_bytes": self._kept_bytes,
                "digests_checked": result.digests_checked,
                "seconds": round(result.seconds, 3),
                "cpu_s": round(result.cpu_s, 3),
                "peak_rss_bytes": result.peak_rss_bytes,
            }
        )

    def _warn(self) -> None:
        self._note_mark()
        for path in self._targets.existing_paths():
            text = f"{path} now holds an incomplete restore"
            self._emit({"event": "notice", "text": text})
        if self._journal is not None:
            text = f"what was written is kept ({self._journal.path}): the same command goes on"
            self._emit({"event": "notice", "text": text})
