# SPDX-License-Identifier: Apache-2.0
"""One restore: opens the targets, has the workers write the archive to them, publishes them."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, cluster_count
from vmapipe.protocol.restore import Setup
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.reader import Archive, ArchiveTotals, FoundExtent
from vmapipe.restore.archive.slots import ExtentSlots
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.archive.survey import Gap, survey
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.plan import Plan, renamed_configs
from vmapipe.restore.targets.resume import Journal
from vmapipe.restore.targets.targets import OpenTargets
from vmapipe.restore.verify.ledger import Ledger, open_manifest
from vmapipe.restore.verify.report import (
    JSON_NAME,
    MAX_DAMAGE,
    TEXT_NAME,
    Damage,
    DiskState,
    Salvaged,
    SalvageMap,
    range_fields,
    range_text,
    restored_part_text,
    salvage_advice,
    state_text,
)
from vmapipe.restore.workers.pool import WorkerPool, start_workers
from vmapipe.restore.workers.sockets import ReaderLink
from vmapipe.restore.workers.work import (
    ALL_DEVICES,
    Feed,
    InlineFeed,
    Marks,
    RateLimits,
    ThreadFeed,
    Work,
    WorkBuilder,
)
from vmapipe.restore.workers.writer import TargetWriter
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Children
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import OwnFolder
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import ClusterRun, Extent

# More writers than this were not quicker, whatever the storage.
_MAX_WORKERS = 4
# A worker takes a tenth of a second to start, in which another writes so much.
_BYTES_PER_WORKER = 64 << 20
# Often enough for a bar that moves, seldom enough to cost nothing.
_PROGRESS_S = 0.25
# Zeroed between two looks at whether to stop: 256 MiB.
_ZERO_CLUSTERS = 4096


class Options(NamedTuple):
    """`workers`: 0 for one a core, at most 4. `manifest`: where it is not beside the archive.

    `check_digests`: compare the data with the manifest, where there is one. `bytes_per_s`:
    of data, all devices together; 0: as fast as it goes. `resume`: go on with an interrupted
    restore, and leave what another one can go on with. `salvage_folder`: restore what there
    is of a damaged archive, and write there what is missing. `before_publish`: is called with the
    descriptors of the new files by their paths, when all is written, and they get their names.
    """

    workers: int = 0
    check_digests: bool = True
    manifest: str | None = None
    bytes_per_s: int = 0
    resume: bool = False
    salvage_folder: str | None = None
    before_publish: Callable[[Mapping[str, int]], None] | None = None


class Restored(NamedTuple):
    """A device and its target's path (None: it was skipped)."""

    dev_id: int
    name: str
    size_bytes: int
    path: str | None


class Result(NamedTuple):
    """`totals` are of the whole archive; `digests_checked`: all data was compared with a manifest.

    `states`: of all the archive's devices; `damage`: the first thing that is wrong with the
    archive, of which what was restored may be free.
    """

    devices: tuple[Restored, ...]
    totals: ArchiveTotals
    digests_checked: bool
    states: tuple[DiskState, ...]
    damage: str | None
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

    A damaged archive is refused, unless all devices of a plan that chooses them are whole, or
    for a salvage. Raises RestoreError, ArchiveError, PlanError, Cancelled or another Failure;
    then no new file is left. An existing target may then hold a part of the
    data, which a `notice` event says.
    """
    options = options or Options()
    manifest_path: str | None = None
    if options.check_digests:
        manifest_path = options.manifest or manifest_beside(archive.source.place, cancel)
    with ExitStack() as stack:
        manifest: Manifest | None = None
        wrong: ArchiveError | None = None
        if manifest_path is not None:
            manifest, wrong = open_manifest(archive, manifest_path, cancel)
            if manifest is not None:
                stack.enter_context(manifest)
            if wrong is not None and options.salvage_folder is None:
                raise wrong
        if folders is None:
            folders = stack.enter_context(Folders())
        journal: Journal | None = None
        if options.resume and folders.own is not None:
            journal = stack.enter_context(Journal(folders.own, archive, plan))
        targets = stack.enter_context(OpenTargets(archive, plan, folders, journal))
        for text in folders.notices:
            emit({"event": "notice", "text": text})
        if plan.configs_folder is not None:
            for text in renamed_configs(archive.header):
                emit({"event": "notice", "text": text})
        job = _RestoreJob(archive, targets, manifest, options, emit, cancel, journal)
        for error in (archive.header_error, wrong):
            if error is not None:
                job.note(error)
        return job.run(options.workers or default_workers())


def default_workers() -> int:
    """Return the number of usable cores, at most 4."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


class _RestoreJob:
    def __init__(
        self,
        archive: Archive,
        targets: OpenTargets,
        manifest: Manifest | None,
        options: Options,
        emit: Emit,
        cancel: Cancel,
        journal: Journal | None,
    ) -> None:
        self._archive = archive
        self._targets = targets
        self._manifest = manifest
        self._salvage_folder = options.salvage_folder
        self._before_publish = options.before_publish
        self._emit = emit
        self._cancel = cancel
        self._finds: list[Damage] = []
        self._find_count = 0
        # A stream is read in a thread, and the workers are heard in another one.
        self._knowing = threading.Lock()
        self._ledger = Ledger(archive, manifest, self._find, self._data_of)
        self._setups = targets.setups
        self._wanted = {setup.dev_id for setup in self._setups}
        self._limits = targets.limits
        if options.bytes_per_s:
            self._limits[ALL_DEVICES] = options.bytes_per_s
        self._maker = WorkBuilder(
            wanted=self._wanted,
            zeroed={setup.dev_id for setup in self._setups if setup.write_zeroes},
            limited=set(self._limits),
            from_stream=not isinstance(archive.source, PlainFile),
            written_before=journal.mark if journal is not None else 0,
        )
        self._journal = journal
        self._marks = Marks()
        self._kept_bytes = 0
        self._slots: ExtentSlots | None = None
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
        states = tuple(self._ledger.states())
        wanted = [state for state in states if state.device.dev_id in self._wanted]
        if self._salvage_folder is not None and (self._ledger.error is not None):
            self._write_map(self._salvage_folder, states)
        self._targets.publish(self._before_publish)
        if self._journal is not None:
            self._journal.remove()
        result = Result(
            devices,
            self._maker.totals,
            self._manifest is not None and all(s.checked_by == "manifest" for s in wanted),
            states,
            None if self._ledger.error is None else str(self._ledger.error),
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
        pool: WorkerPool | None = None
        finished = False
        try:
            with ExitStack() as stack:
                source = self._archive.source
                if isinstance(source, PlainFile):
                    workers = min(workers, 1 + source.size_bytes // _BYTES_PER_WORKER)
                else:
                    self._slots = stack.enter_context(closing(ExtentSlots(workers)))
                children = stack.enter_context(Children(fork=True))
                setup, fds = self._setup()
                # Before the socket: ZeroMQ has threads, and a copy of us would not have them.
                start_workers(children, workers, endpoint, fds)
                link = ReaderLink(endpoint)
                pace = RateLimits(self._limits, self._started)
                pool = WorkerPool(link, children, self._cancel, pace, self._done, folder.clear)
                pool.welcome(setup)
                with closing(self._feed()) as feed:
                    pool.carry_out(feed)
                self._judge()
                self._targets.set_vmstate_sizes(self._ledger.vmstate_clusters)
                pool.carry_out(InlineFeed(self._maker.syncs(s.dev_id for s in self._setups)))
                pool.finish()
                self._kept_bytes = pool.kept_bytes
                finished = True
            return children
        finally:
            if link is not None:
                link.close(in_order=finished)
            if not finished and pool is not None and pool.gave_work:
                self._warn()

    def _setup(self) -> tuple[Setup, list[int]]:
        """Return the message that sets up a worker, and the descriptors that it inherits."""
        source = self._archive.source
        archive_fd = source.fd if isinstance(source, PlainFile) else -1
        memory_fd = self._slots.fd if self._slots is not None else -1
        setup = Setup(
            self._archive.header.uuid,
            archive_fd,
            memory_fd,
            self._setups,
            isinstance(source, PlainFile) and source.lost is not None,
        )
        fds = [archive_fd, memory_fd]
        fds += [target.fd for target in self._setups]
        fds += self._targets.remover_fds
        return setup, sorted({fd for fd in fds if fd >= 0})

    def _feed(self) -> Feed:
        source = self._archive.source
        slots = self._slots
        works = self._maker.works(self._pieces(slots))
        if isinstance(source, PlainFile) or slots is None:
            return InlineFeed(works)
        return ThreadFeed(works, source.stop, slots.stop)

    def _pieces(self, slots: ExtentSlots | None) -> Iterator[FoundExtent]:
        """Yield the extents to restore, with the digests that they must have."""
        for find in survey(self._archive, self._cancel.check, slots):
            with self._knowing:
                if isinstance(find, Gap):
                    self._ledger.gap(find)
                    self._maker.totals.archive_bytes = find.offset + find.length
                    continue
                piece = self._ledger.take(find)
                is_hopeless = self._is_hopeless()
            if piece is None or is_hopeless:
                # Read on all the same: the error has to say which disks are whole.
                if find.slot >= 0 and slots is not None:
                    slots.give(find.slot)
                continue
            yield piece

    def _is_hopeless(self) -> bool:
        """Return whether it is clear already that nothing will be restored."""
        if self._salvage_folder is not None:
            return False
        if self._targets.plan.is_chosen:
            return self._ledger.are_spoilt(self._wanted)
        return self._ledger.error is not None

    def _data_of(self, piece: FoundExtent) -> bytes | memoryview | None:
        if piece.slot < 0 or self._slots is None:
            return piece.data
        return self._slots.view(piece.slot, piece.extent.data_bytes)

    def _find(self, find: Damage) -> None:
        self._find_count += 1
        if len(self._finds) < MAX_DAMAGE:
            self._finds.append(find)

    def note(self, error: ArchiveError) -> None:
        """Something is wrong with the archive or its manifest that was found before."""
        self._ledger.found(error)

    def _judge(self) -> None:
        """Judge what was read and compared. Raises ArchiveError for what may not be published."""
        ledger = self._ledger
        ledger.finish(self._maker.totals.archive_bytes, self._cancel.check)
        error = ledger.error
        if error is None:
            return
        states = ledger.states()
        wanted = [state for state in states if state.device.dev_id in self._wanted]
        if self._salvage_folder is not None:
            self._zero_missing()
            return
        broken = next((state for state in wanted if not state.is_whole), None)
        is_chosen = self._targets.plan.is_chosen
        if is_chosen and broken is None and not ledger.manifest_failed:
            self._emit({"event": "notice", "text": restored_part_text(error, wanted, states)})
            return
        if is_chosen and broken is not None:
            first = range_fields(*broken.ranges[0])
            error = ArchiveError(
                f"{state_text(broken.fields())}: {range_text(first)}; the first thing that is wrong with "
                f"the archive: {error}",
                reference_text=error.reference_text,
            )
        error.advice = salvage_advice(states)
        raise error

    def _zero_missing(self) -> None:
        """Zero what is missing in targets that may hold old data."""
        devices = {device.dev_id: device for device in self._archive.header.devices}
        for setup in self._setups:
            if not setup.write_zeroes:
                continue
            writer = TargetWriter((setup,))
            for one in self._ledger.ranges(devices[setup.dev_id]):
                first = one.offset // CLUSTER_BYTES
                end = first + cluster_count(one.length) if one.state == "missing" else first
                for at in range(first, end, _ZERO_CLUSTERS):
                    self._cancel.check()
                    masks = (0,) * min(_ZERO_CLUSTERS, end - at)
                    run = ClusterRun(setup.dev_id, at, masks, 0)
                    writer.write(Extent(0, 0, (run,)), memoryview(b""))
                    writer.flush()

    def _write_map(self, folder: str, states: Sequence[DiskState]) -> None:
        ledger = self._ledger
        disks = [
            Salvaged(
                state,
                self._targets.path(state.device.dev_id),
                functools.partial(ledger.ranges, state.device),
            )
            for state in states
        ]
        salvage = SalvageMap(
            self._archive.source.name,
            self._archive.header.uuid,
            disks,
            self._archive.notes,
            self._finds,
            self._find_count,
        )
        for name, lines in (
            (JSON_NAME, salvage.json_lines()),
            (TEXT_NAME, salvage.text_lines()),
        ):
            self._targets.add_text(os.path.join(folder, name), lines)

    def _done(self, work: Work, damaged: Sequence[int]) -> None:
        with self._knowing:
            for index in damaged:
                if index >= len(work.extents):
                    raise Failure("a worker calls an extent damaged that it was not given")
                self._ledger.wrong_digest(work.extents[index])
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
                "salvaged": self._salvage_folder is not None and self._ledger.error is not None,
                "devices": [
                    {**state.fields(), "path": self._targets.path(state.device.dev_id)}
                    for state in result.states
                ],
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
