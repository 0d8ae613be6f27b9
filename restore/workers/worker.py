# SPDX-License-Identifier: Apache-2.0
"""A worker process: writes extents that it gets from the reader, or out of the archive itself.

    python -m vmapipe.restore.workers.worker --parent-fd N --endpoint ipc://… --name worker-1

The reader hands on its descriptors and starts several of these; each writes to
every target, for each cluster comes once and the order does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import sys
from collections.abc import Sequence

from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.restore import (
    ExtentWork,
    FinishWork,
    FromReader,
    RangeWork,
    Ready,
    Setup,
    SyncWork,
    WorkDone,
    decode_for_worker,
    encode,
)
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.slots import map_slots
from vmapipe.restore.workers.sockets import WorkerLink
from vmapipe.restore.workers.writer import TargetWriter
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, os_error_text
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.logs import DEBUG, Trace, shown
from vmapipe.runtime.process import run_child
from vmapipe.runtime.syscalls import read_at
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import Extent, parse_extent_header, without

_log = Trace(__name__)

# Only a bound: every reason to go on wakes us at once.
_WAIT_S = 5.0
# An extent, and whole huge pages.
_BUFFER_BYTES = 4 << 20


class Worker:
    """Does what the reader says until it says Finish."""

    def __init__(self, link: WorkerLink, cancel: Cancel) -> None:
        self._link = link
        self._cancel = cancel
        self._setup: Setup | None = None
        self._writer = TargetWriter(())
        self._archive_fd = -1
        self._buffer = memoryview(b"")
        self._slots = memoryview(b"")

    def run(self) -> None:
        """Raises Cancelled, TargetError, InputError, ArchiveError."""
        self._link.watch(self._cancel.fd)
        self._link.send(encode(Ready(limits.VERSION)))
        while True:
            self._cancel.check()
            parts = self._link.receive()
            if parts is None:
                self._link.wait(_WAIT_S)
                continue
            work = decode_for_worker(parts)
            if _log.has(DEBUG):
                _log.debug("work %s", shown(work))
            if isinstance(work, FinishWork):
                return
            self._do(work)

    def _do(self, work: FromReader) -> None:
        match work:
            case Setup():
                self._setup = work
                self._writer = TargetWriter(work.targets)
                if work.archive_fd >= 0:
                    self._open_archive(work.archive_fd)
                else:
                    self._slots = map_slots(work.memory_fd)
            case RangeWork(seq):
                kept_bytes, damaged = self._do_range(work)
                self._writer.flush()
                self._link.send(encode(WorkDone(seq, kept_bytes, damaged)))
            case ExtentWork(seq):
                kept_bytes, damaged = self._do_extent(work)
                self._writer.flush()
                self._link.send(encode(WorkDone(seq, kept_bytes, damaged)))
            case SyncWork(seq, dev_id):
                self._writer.sync(dev_id)
                self._link.send(encode(WorkDone(seq)))

    def _open_archive(self, fd: int) -> None:
        try:
            # An open file of our own: workers that shared one would confuse
            # the kernel's reading ahead.
            self._archive_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._archive_fd = fd
        # Private, because shared memory has no huge pages: with them, 0.96 of the time.
        buffer = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = memoryview(buffer)

    def _do_extent(self, work: ExtentWork) -> tuple[int, tuple[int, ...]]:
        """How much of its data was on the targets already; and (0,) where it is damaged."""
        extent = self._parse(work.raw_header, work.offset)
        data = self._slots[work.position : work.position + extent.data_bytes]
        if len(data) < extent.data_bytes:
            raise RemoteProtocolError("malformed", "an extent outside the shared memory")
        kept_bytes = self._write(extent, data, work)
        return kept_bytes, () if _is_right(work.digest, work.raw_header, data) else (0,)

    def _do_range(self, work: RangeWork) -> tuple[int, tuple[int, ...]]:
        """How much of the data was on the targets already; which of the extents are damaged."""
        kept_bytes = 0
        damaged: list[int] = []
        for index, (offset, size) in enumerate(zip(work.offsets, work.sizes, strict=True)):
            self._cancel.check()  # a slow target takes seconds for all of them
            raw = self._buffer[:size]
            digest = work.digests[index] if work.digests else b""
            if work.written and digest and self._is_there(raw, offset, digest):
                kept_bytes += size - EXTENT_HEADER_BYTES
                continue
            lost = self._read(raw, offset)
            if lost and lost[0][0] < offset + EXTENT_HEADER_BYTES:
                damaged.append(index)
                continue
            extent = self._parse(raw, offset)
            if extent.total_bytes != size:
                raise ArchiveError("the archive changes while it is read", offset=offset)
            if lost or not _is_right(digest, raw):
                damaged.append(index)
            kept_bytes += self._write(extent, raw[EXTENT_HEADER_BYTES:], work)
        return kept_bytes, tuple(damaged)

    def _write(self, extent: Extent, data: memoryview, work: RangeWork | ExtentWork) -> int:
        if work.left_out:
            extent = extent._replace(runs=without(extent.runs, work.left_out))
        if work.written:
            return self._writer.write_changed(extent, data)
        self._writer.write(extent, data)
        return 0

    def _is_there(self, raw: memoryview, offset: int, digest: bytes) -> bool:
        """Return whether the targets hold an extent, by its digest: its data need not be read."""
        head = raw[:EXTENT_HEADER_BYTES]
        self._read(head, offset)
        extent = self._parse(head, offset)
        if extent.total_bytes != len(raw):
            return False  # it is said where it is read whole
        if not self._writer.read_back(extent, raw[EXTENT_HEADER_BYTES:]):
            return False
        return _is_right(digest, raw)

    def _read(self, raw: memoryview, offset: int) -> list[tuple[int, int]]:
        """Read an extent; return the ranges that the archive's disk cannot read, where these are skipped."""
        lost: list[tuple[int, int]] = []
        passes = self._setup is not None and self._setup.past_errors
        done = read_at(self._archive_fd, raw, offset, _unreadable, lost if passes else None)
        if done < len(raw):
            raise ArchiveError("the archive is cut while it is read", offset=offset + done)
        return lost

    def _parse(self, raw: bytes | memoryview, offset: int) -> Extent:
        uuid = self._setup.uuid if self._setup is not None else b""
        return parse_extent_header(raw, uuid, offset)

    def remove_left_over(self, endpoint: str) -> None:
        """The reader has died: remove what it would have removed."""
        socket = endpoint.removeprefix("ipc://")
        with contextlib.suppress(OSError):
            os.unlink(socket)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(socket))


def _unreadable(offset: int, error: OSError) -> InputError:
    return InputError(f"cannot read the archive at offset {offset}: {os_error_text(error)}")


def _is_right(digest: bytes, *parts: bytes | memoryview) -> bool:
    """Return whether the parts have this digest; True where it is empty (unknown)."""
    if not digest:
        return True
    return extent_digest(*parts) == digest


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.restore.workers.worker")
    parser.add_argument("--parent-fd", type=int, default=None)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(argv)

    def work(cancel: Cancel, emit: Emit) -> None:
        _work(options.endpoint, options.name, cancel)

    return run_child(parser.prog, options.parent_fd, work, ignore)


def _work(endpoint: str, name: str, cancel: Cancel) -> None:
    link = WorkerLink(endpoint, name)
    worker = Worker(link, cancel)
    in_order = False
    try:
        worker.run()
        in_order = True
    except Cancelled:
        if not cancel.signum:
            worker.remove_left_over(endpoint)
        raise
    finally:
        link.close(in_order=in_order)


if __name__ == "__main__":
    sys.exit(main())
