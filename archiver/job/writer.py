# SPDX-License-Identifier: Apache-2.0
"""The queue between a job and its output, and the thread that writes the archive."""

from __future__ import annotations

import contextlib
import enum
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from vmapipe.archiver.job.device import FillRun
from vmapipe.archiver.job.spec import BaseUse
from vmapipe.archiver.outputs.base import IOV_MAX, Output, OutputFailure
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import DigestedOutput, Digests
from vmapipe.clusters.sizes import BLOCK_BYTES, EXTENT_HEADER_BYTES
from vmapipe.runtime.process import yield_cpu
from vmapipe.vma.extent import encode_extent_header
from vmapipe.vma.header import Header
from vmapipe.vma.manifest import VERSION, VERSION_WITH_BASE
from vmapipe.vma.packer import PackedExtent

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.archiver.job.fill import FilledExtent, Filler
    from vmapipe.archiver.outputs.compress import Compression, ZstdOutput
    from vmapipe.crypt.age import Recipient

Note = TypeVar("Note")

# Small extents are written together up to here (an extent of zeroes is 512
# bytes, and 1 TiB of zeroes is 289,000 of them). More does not make a write
# any quicker, and would only delay the acknowledgements.
GATHER_BYTES = 1 << 20
# The thread ends within this after its output let go of it; where the output
# could not (a dead disk), the thread is left to the end of the process.
_END_WAIT_S = 1.0


class WriterState(enum.Enum):
    RUNNING = "running"
    COMMITTED = "committed"
    FAILED = "failed"


class _Begin(NamedTuple):
    header: Header
    raw_header: bytes
    bases: Sequence[BaseUse]


class _Order(enum.Enum):
    FINISH = "finish"
    STOP = "stop"


_Item = _Begin | PackedExtent[Note] | FillRun | _Order


class ArchiveWriter(Generic[Note]):
    """Writes one archive: `begin`, then `put` each extent, then `finish` or `abandon`.

    None of these waits for the output, except `abandon` (seconds at most).
    The queue has no bound of its own: what lies in it is bounded by the credit
    that the archiver gives its producers, see `backlog_bytes`.

    After every write, and when the state changes, `on_progress` is called from
    the writer thread; the other members may then be read from any thread.

    The store owns `output` and `digests` from the start.
    """

    def __init__(
        self,
        output: Output,
        digests: Digests | None,
        on_progress: Callable[[], None],
        compression: Compression | None = None,
        base: Base | None = None,
        recipients: Sequence[Recipient] = (),
    ) -> None:
        as_it_is = compression is None and not recipients
        self._file = output if isinstance(output, FileOutput) and as_it_is else None
        # The digest of the file is that of its bytes as stored: below compression and encryption.
        if digests is not None:
            output = DigestedOutput(output, digests)
        if recipients:
            # Late: a compiled library takes 30 ms, and most backups do not encrypt.
            from vmapipe.archiver.outputs.encrypt import AgeOutput

            output = AgeOutput(output, recipients)
        self._zstd: ZstdOutput | None = None
        if compression is not None:
            from vmapipe.archiver.outputs.compress import ZstdOutput

            output = self._zstd = ZstdOutput(output, compression)
        self.state = WriterState.RUNNING
        self.error: Exception | None = None
        #: Called when the archive has its name; what it raises is the archive's failure, which stays all the same.
        self.after_commit: Callable[[], None] = lambda: None
        #: Bytes of the plain archive that the output has taken.
        self.plain_bytes = 0
        self._output = output
        self._compressed = compression is not None
        self._digests = digests
        self._report = on_progress
        self._put_bytes = 0
        self._base = base
        self._filler: Filler | None = None
        self._uuid: bytes | None = None
        #: What is wrong with the base, where that is why nothing is stored.
        self.base_damage = ""
        self._queue: queue.SimpleQueue[_Item[Note]] = queue.SimpleQueue()
        self._written: deque[PackedExtent[Note] | FillRun] = deque()
        self._ending = threading.Lock()
        self._stopping = False
        # A daemon: one that hangs in the kernel must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    @property
    def description(self) -> str:
        return self._output.description

    @property
    def committed(self) -> bool:
        return self.state is WriterState.COMMITTED

    @property
    def stored_bytes(self) -> int:
        """Bytes that have left for the target: fewer than `plain_bytes` when compressed."""
        return self._output.written_bytes

    @property
    def backlog_bytes(self) -> int:
        """Bytes of extents that were put and are not written yet."""
        return self._put_bytes - self.plain_bytes

    def begin(self, header: Header, raw_header: bytes, bases: Sequence[BaseUse] = ()) -> None:
        self._put_bytes += len(raw_header)
        self._queue.put(_Begin(header, raw_header, bases))
        self._thread.start()

    def put(self, extent: PackedExtent[Note]) -> None:
        """Never waits. After an error the extent is dropped."""
        if self.state is WriterState.RUNNING:
            self._put_bytes += extent.total_bytes
            self._queue.put(extent)

    def fill(self, run: FillRun) -> None:
        """Clusters of a device that has a base; never waits. After an error they are dropped."""
        if self.state is WriterState.RUNNING:
            self._queue.put(run)

    @property
    def base_bytes(self) -> int:
        """Data that was taken from the base so far, in bytes."""
        return self._filler.kept_bytes if self._filler else 0

    def finish(self) -> None:
        """All extents were put: bring them to the disk and the archive to its name."""
        self._queue.put(_Order.FINISH)

    def take_written(self) -> list[PackedExtent[Note] | FillRun]:
        """The extents that were written since the last call, in order, and the runs that were taken.

        Nothing looks at their buffers any more.
        """
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._written.popleft())
        return taken

    def abandon(self) -> None:
        """Leave nothing behind; after a commit it does nothing. Never raises.

        Where a commit was under way, `state` tells afterwards who won.
        """
        self._stopping = True
        # The loop that this wakes may be gone soon.
        self._report = _nobody
        self._queue.put(_Order.STOP)
        self._output.abandon()
        if self._thread.is_alive():
            self._thread.join(_END_WAIT_S)
        self._end(WriterState.FAILED, _abandoned())

    # --- the writer thread ---

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001  a defect, too, must reach the main loop
            if self._base is not None and not self._stopping:
                # Imported here, as all that only bases need: a backup starts sooner without.
                from vmapipe.archiver.base.extents import DamagedBase

                if isinstance(error, DamagedBase):
                    self.base_damage = str(error)
            # After `abandon`, errors are only how the output lets go of us.
            self._end(WriterState.FAILED, _abandoned() if self._stopping else error)
            self._report()
            self._output.abandon()
            self._drop_queue()
        finally:
            if self._filler is not None:
                self._filler.close()

    def _work(self) -> None:
        item = self._queue.get()
        while item is not _Order.STOP:
            if item is _Order.FINISH:
                if self._filler is not None:
                    for filled in self._filler.finish():
                        self._write_filled(filled)
                self._output.commit()
                self.after_commit()
                self._end(WriterState.COMMITTED, None)
                self._report()
                return
            following: _Item[Note] | None = None
            if isinstance(item, _Begin):
                self._write_header(item)
            elif isinstance(item, FillRun):
                self._fill(item)
            else:
                following = self._write_with_following(item)
            item = self._queue.get() if following is None else following

    def _write_with_following(self, extent: PackedExtent[Note]) -> _Item[Note] | None:
        """Write `extent` and what can be written together with it; return the item after that, if any."""
        batch, following = [extent], None
        size_bytes, buffers = extent.total_bytes, list(extent.buffers)
        # What is gathered depends on timing, and a compressor cuts its frames between
        # writes: alone, the same disks give the same bytes.
        most = 0 if self._compressed else GATHER_BYTES
        with contextlib.suppress(queue.Empty):
            while size_bytes < most and len(buffers) < IOV_MAX:
                item = self._queue.get_nowait()
                if not isinstance(item, PackedExtent):
                    following = item
                    break
                batch.append(item)
                size_bytes += item.total_bytes
                buffers += item.buffers
        yield_cpu()
        if self._digests is not None:
            self._digests.extents(batch)
            yield_cpu()
        self._output.write(buffers)
        self.plain_bytes += size_bytes
        self._written.extend(batch)
        self._report()
        return following

    def _fill(self, run: FillRun) -> None:
        if self._filler is None:
            raise RuntimeError("clusters of a device that has a base, without one")
        if run.payload is None and self._digests is not None and self._base is not None:
            self._digests.incrementals = self._base.totals.incrementals + 1
        for filled in self._filler.take(run):
            self._write_filled(filled)
        self._written.append(run)
        self._report()

    def _write_filled(self, filled: FilledExtent) -> None:
        extent = filled.extent
        self._pad(filled.places)
        if self._digests is not None:
            self._digests.extents([extent])
            self._digests.changed(filled.changed)
        if self._zstd is not None and filled.frames:
            self._zstd.write_kept(extent.buffers[0], filled.frames)
        elif isinstance(self._output, FileOutput | DigestedOutput) and self._filler is not None:
            self._output.write_shared(extent.buffers, filled.places, self._filler.fd)
        else:
            self._output.write(extent.buffers)
        self.plain_bytes += extent.total_bytes
        self._put_bytes += extent.total_bytes
        yield_cpu()

    @property
    def shared_bytes(self) -> int:
        """Bytes of the archive's file that it shares with the base's, on the same blocks of the disk."""
        return self._file.shared_bytes if self._file else 0

    def _pad(self, places: Sequence[int]) -> None:
        """Write extents without clusters until what comes lies in its blocks as the base's does."""
        if self._file is None or not self._file.clones:
            return
        first = next((place for place in places if place >= 0), -1)
        if first < 0 or self._uuid is None:
            return
        missing = (first - EXTENT_HEADER_BYTES - self._file.written_bytes) % BLOCK_BYTES
        from vmapipe.archiver.job.fill import FilledExtent

        for _ in range(missing // EXTENT_HEADER_BYTES):
            header = encode_extent_header(self._uuid, [], 0)
            extent: PackedExtent[None] = PackedExtent([header], len(header), [], {}, set())
            self._write_filled(FilledExtent(extent, [-1], []))

    def _write_header(self, begin: _Begin) -> None:
        devices = {use.base_dev_id: use.device for use in begin.bases if use.base_dev_id}
        if self._digests is not None:
            version = VERSION_WITH_BASE if devices else VERSION
            self._digests.begin(begin.header, begin.raw_header, devices, version)
        self._output.write([begin.raw_header])
        self.plain_bytes += len(begin.raw_header)
        if self._base is not None and devices:
            from vmapipe.archiver.base.extents import BaseExtents
            from vmapipe.archiver.job.fill import Filler

            self._uuid = begin.header.uuid
            self._filler = Filler(BaseExtents(self._base), begin.header.uuid, devices)

    def _end(self, state: WriterState, error: Exception | None) -> None:
        """The first end counts."""
        with self._ending:
            if self.state is WriterState.RUNNING:
                # The error first: a thread that sees the state finds it.
                self.error = error
                self.state = state

    def _drop_queue(self) -> None:
        """Give the memory back, to the producers that share it with us, too."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()


def _nobody() -> None: ...


def _abandoned() -> OutputFailure:
    return OutputFailure("the archive was abandoned")
