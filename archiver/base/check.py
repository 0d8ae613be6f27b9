# SPDX-License-Identifier: Apache-2.0
"""A check of a base that costs little: everything about it but the data.

It reads the header, and the manifest's first and last lines. The data, and the manifest's other
lines, are held against each other when they are used (extents.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable
from typing import NamedTuple

from vmapipe.archiver.base.content import open_content
from vmapipe.archiver.base.source import BaseSource, open_side_file, open_source
from vmapipe.archiver.outputs.cluster_digests import SUFFIX as DIGESTS_SUFFIX
from vmapipe.archiver.outputs.cluster_digests import BaseDigests
from vmapipe.archiver.outputs.manifests import beside, digest_of
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.crypt.magic import is_encrypted
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import PEEK_BYTES, Device, Header, parse_header, peek_header_bytes
from vmapipe.vma.manifest import (
    MAX_LINE_BYTES,
    ManifestReader,
    Opening,
    Totals,
    read_totals,
)


class Base(NamedTuple):
    """An archive that can be a base, as far as that can be told without reading its data."""

    archive: str
    header: Header
    opening: Opening
    totals: Totals
    #: What is read later must still be this file, or object.
    identity: Hashable

    @property
    def uuid(self) -> bytes:
        return self.header.uuid

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those of which unchanged clusters can be taken: all but the machine's memory."""
        return tuple(device for device in self.header.devices if not device.is_vmstate)

    def device(self, name: str) -> Device | None:
        return next((device for device in self.devices if device.name == name), None)


def check_base(archive: str) -> Base | str:
    """Return what the archive is as a base, or the doubt about it in words, for a report. Never raises."""
    try:
        with contextlib.closing(open_source(archive)) as source:
            return _check(archive, source)
    except FileNotFoundError:
        return f"{archive} does not exist"
    except OSError as error:
        return f"{archive} cannot be read: {os_error_text(error)}"
    except (ArchiveError, Failure, ValueError) as error:
        return f"{archive}: {error}"


def open_digests(base: Base) -> BaseDigests | None:
    """Open the digests of its clusters; None: it has none that belong to it."""
    if not base.totals.cluster_digests_bytes:
        return None
    try:
        name = base.archive + DIGESTS_SUFFIX
        file = open_side_file(name)
        return BaseDigests(file, name, base.uuid, base.header.devices)
    except (OSError, ValueError):
        return None


def _start(source: BaseSource) -> bytes:
    start = bytearray(PEEK_BYTES)
    return bytes(start[: source.read_into(memoryview(start), 0)])


def _check(archive: str, source: BaseSource) -> Base | str:
    """Raises OSError, ArchiveError, Failure, ValueError."""
    if is_encrypted(_start(source)):
        return f"{archive} is encrypted: a base is read, and a host that makes backups has no key"
    try:
        opening, totals = _read_manifest(beside(archive))
    except FileNotFoundError:
        return f"{archive} has no manifest, and without one a base cannot be checked"
    if source.size_bytes != totals.file_bytes:
        return (
            f"{archive} has {source.size_bytes} bytes where its manifest says {totals.file_bytes}: it "
            "is damaged, or the manifest is another archive's"
        )
    with contextlib.closing(open_content(source)) as content:
        header_bytes = peek_header_bytes(content.have(0, PEEK_BYTES))
        raw = bytes(content.have(0, header_bytes))
    header = parse_header(raw)
    fault = header_fault(header, raw, opening, totals)
    if fault:
        return f"{archive}: {fault}"
    return Base(archive, header, opening, totals, source.identity)


def header_fault(header: Header, raw: bytes, opening: Opening, totals: Totals) -> str:
    """Return what of the header its manifest does not vouch for, in words; empty: nothing."""
    if header.uuid != opening.uuid:
        return "its manifest is another archive's (its uuid differs)"
    if digest_of([raw]) != opening.header:
        return "its header is not the one that its manifest vouches for: it is damaged"
    told = {device.dev_id: device for device in totals.devices}
    for device in header.devices:
        there = told.pop(device.dev_id, None)
        if there is None or (there.name, there.size_bytes) != (device.name, device.size_bytes):
            return f"its manifest does not list its device {device.name!r}"
        if not device.is_vmstate and there.clusters != device.clusters:
            return (
                f"device {device.name!r} is not complete: {there.clusters} of {device.clusters} "
                f"clusters of {CLUSTER_BYTES} bytes"
            )
    if told:
        return f"its manifest lists a device {next(iter(told.values())).name!r} that it has not"
    return ""


def _read_manifest(path: str) -> tuple[Opening, Totals]:
    """Read its first and its last line. Raises OSError, ArchiveError."""
    with open_side_file(path) as file:
        first = file.readline(MAX_LINE_BYTES)
        opening = ManifestReader().line(first.decode("utf-8", "backslashreplace"))
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(len(first), size_bytes - MAX_LINE_BYTES))
        end = file.read()
    if not isinstance(opening, Opening):
        raise ArchiveError("the manifest is damaged: it does not begin with an opening")
    return opening, read_totals(end)
