# SPDX-License-Identifier: Apache-2.0
"""The extents of a base in their order, each held against its manifest before a byte of it is used."""

from __future__ import annotations

import contextlib

from vmapipe.archiver.base.check import Base, header_fault
from vmapipe.archiver.base.content import PlainContent, open_content
from vmapipe.archiver.base.source import open_side_file, open_source
from vmapipe.archiver.outputs.compress import Compressed
from vmapipe.archiver.outputs.manifests import beside, digest_of
from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.header import parse_header
from vmapipe.vma.manifest import MAX_LINE_BYTES, ExtentDigest, ManifestReader, Opening, Totals

_WAY_OUT = "make a full backup (--base none), and look at the base with `vmapipe verify`"


class DamagedBase(Failure):
    """A base turned out to be damaged while it was used: nothing is stored."""


class BaseExtents:
    """An open base. `peek` shows the next extent, `take` gives its data and goes on behind it.

    `frames`: what `take` has given last, as the base stores it, where that is frames of its own.
    All errors are DamagedBase, and name the base, the offset in it and the device.
    """

    def __init__(self, base: Base) -> None:
        """Raises DamagedBase where it is not the file any more that was checked."""
        self.base = base
        self._at = 0
        self._next: Extent | None = None
        self._raw_header = b""
        self._expected: ExtentDigest | None = None
        self._totals: Totals | None = None
        self._manifest_reader = ManifestReader()
        self._ended = False
        self.frames: list[Compressed] = []
        with contextlib.ExitStack() as opened:
            try:
                self._source = open_source(base.archive)
                opened.callback(self._source.close)
                self._manifest = open_side_file(beside(base.archive))
                opened.callback(self._manifest.close)
                self._content = open_content(self._source)
                opened.callback(self._content.close)
            except OSError as error:
                raise self._failure(f"it cannot be read: {os_error_text(error)}") from error
            except (Failure, ValueError) as error:
                raise self._failure(str(error)) from error
            self._begin()
            self._opened = opened.pop_all()

    def _begin(self) -> None:
        if self._source.identity != self.base.identity:
            raise self._failure(
                "it has changed, or another one has taken its place, since it was checked"
            )
        raw = bytes(self._have(0, self.base.opening.header.total_bytes))
        opening = self._line()
        if not isinstance(opening, Opening) or opening != self.base.opening:
            raise self._failure("its manifest has changed since it was checked")
        try:
            header = parse_header(raw)
        except ArchiveError as error:
            raise self._failure(str(error)) from error
        fault = header_fault(header, raw, opening, self.base.totals)
        if fault:
            raise self._failure(fault)
        self._at = len(raw)

    def close(self) -> None:
        self._opened.close()

    @property
    def fd(self) -> int:
        """Its file; -1: it has none."""
        return self._source.fd

    @property
    def is_plain(self) -> bool:
        """The archive's bytes are those of its file."""
        return isinstance(self._content, PlainContent) and self.fd >= 0

    def peek(self) -> Extent | None:
        """Return the next extent's header; None at the end, which was then found to be sound."""
        if self._next is None and not self._ended:
            line = self._line()
            if isinstance(line, Totals):
                self._end(line)
                return None
            if not isinstance(line, ExtentDigest):
                raise self._failure("its manifest is damaged")
            self._expected = line
            self._raw_header = bytes(self._have(self._at, EXTENT_HEADER_BYTES))
            try:
                self._next = parse_extent_header(self._raw_header, self.base.uuid, self._at)
            except ArchiveError as error:
                raise self._failure(str(error), at=self._at) from error
            if self._next.total_bytes != line.total_bytes:
                raise self._failure(
                    "its extent is not the one that its manifest lists", at=self._at
                )
        return self._next

    def take(self) -> memoryview:
        """Return the data of the extent that `peek` has shown, checked; good until the next call."""
        extent, expected = self._next, self._expected
        if extent is None:
            raise RuntimeError("no extent to take")
        at, length = extent.offset + EXTENT_HEADER_BYTES, extent.data_bytes
        data = self._have(at, length) if length else memoryview(b"")
        if digest_of([self._raw_header, data]) != expected:
            raise self._failure("the data is not what its manifest vouches for", extent)
        self.frames = self._content.frames_of(at, length)
        self._pass(extent)
        return data

    def skip(self) -> None:
        """Pass over the extent that `peek` has shown: nothing of its data is needed, or looked at."""
        if self._next is None:
            raise RuntimeError("no extent to pass over")
        self._pass(self._next)

    def _pass(self, extent: Extent) -> None:
        self._at = extent.offset + extent.total_bytes
        self._next = None

    def _end(self, totals: Totals) -> None:
        self._ended = True
        if totals != self.base.totals or self._source.size_bytes != totals.file_bytes:
            raise self._failure("it has changed since it was checked")
        if self._source.identity != self.base.identity:
            raise self._failure("somebody has written to it meanwhile")
        if self._at != totals.archive_bytes:
            raise self._failure(f"it ends at {totals.archive_bytes}", at=self._at)

    def _line(self) -> Opening | ExtentDigest | Totals:
        try:
            raw = self._manifest.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            why = f"its manifest cannot be read: {os_error_text(error)}"
            raise self._failure(why) from error
        if not raw:
            raise self._failure("its manifest ends too early")
        try:
            return self._manifest_reader.line(raw.decode("utf-8", "backslashreplace"))
        except ArchiveError as error:
            raise self._failure(str(error)) from error

    def _have(self, at: int, length: int) -> memoryview:
        """`length` bytes of the plain archive from `at` on, not before what was had last."""
        try:
            return self._content.have(at, length)
        except OSError as error:
            raise self._failure(f"it cannot be read: {os_error_text(error)}", at=at) from error
        except ValueError as error:
            raise self._failure(str(error), at=at) from error

    def _failure(self, why: str, extent: Extent | None = None, *, at: int = -1) -> DamagedBase:
        where = ""
        extent = extent or self._next
        if extent is not None:
            at = extent.offset
            header = self.base.header
            names = {run.dev_id: header.device(run.dev_id) for run in extent.runs}
            of = ", ".join(
                f"{device.name!r}" if device else f"number {number}"
                for number, device in sorted(names.items())
            )
            if extent.runs:
                where = f" (device {of}, from cluster {extent.runs[0].first_cluster} on)"
        elif at >= 0:
            names_of_all = ", ".join(repr(device.name) for device in self.base.header.devices)
            where = f" (device unknown: one of {names_of_all})"
        if at >= 0:
            where = f" at offset {at}{where}"
        return DamagedBase(f"the base {self.base.archive}{where}: {why}; {_WAY_OUT}")
