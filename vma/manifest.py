# SPDX-License-Identifier: Apache-2.0
"""The sidecar manifest: digests for a format that has none for its data.

One JSON document with a fixed line discipline (docs/vma-format.md): the first
line opens it and tells what it belongs to, then one line an extent in the
archive's order, then the totals. Any JSON reader takes it whole; ours takes it
line by line, so a manifest of any length costs no memory.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES, MAX_EXTENT_BYTES
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import HEADER_BYTES, MAX_HEADER_BYTES, UUID_BYTES

FORMAT = "vmapipe-manifest"
VERSION = 1
#: Its last line may tell of how many archives in a row were made with a base, and of a file of digests of clusters.
VERSION_WITH_BASE = 2
#: Signed: its last line has the SHA-256 of the stored file, too. It may have what a version 2 has.
VERSION_SIGNED = 3
SHA256_BYTES = 32
CLUSTER_ALGORITHM = "sha256-keyed-128"
# Against damage, which it is quick enough to find at any disk's speed; not
# against forgery: docs/decisions/0004-manifest-digests.md.
ALGORITHM = "xxh3-128"
DIGEST_BYTES = 16
# Our longest line is the totals line. All names of 254 devices together fit
# into the archive's header, 512 KiB; JSON escapes make up to 6 characters of a
# byte; 512 more a device hold its figures.
MAX_LINE_BYTES = 6 * MAX_HEADER_BYTES + 255 * 512


class ExtentDigest(NamedTuple):
    """Length in the plain archive and digest of one extent, header included."""

    total_bytes: int
    digest: bytes


class DeviceTotals(NamedTuple):
    """`digest` is None where the clusters did not come in order."""

    dev_id: int
    name: str
    size_bytes: int
    clusters: int
    zero_bytes: int
    digest: bytes | None


class Totals(NamedTuple):
    """`archive_bytes` is the plain VMA stream, `file_*` the bytes as stored (compressed or not).

    `incrementals`: so many archives in a row, this one included, have clusters that were not read
    from a disk but taken from the one before; 0: all of it was read.
    """

    extents: int
    archive_bytes: int
    file_bytes: int
    file_digest: bytes
    devices: tuple[DeviceTotals, ...]
    incrementals: int = 0
    #: Length of the file with a digest of each cluster; 0: there is none.
    cluster_digests_bytes: int = 0
    #: Of the stored file; empty: the manifest is not made to be signed.
    file_sha256: bytes = b""


class Opening(NamedTuple):
    """The first line: which archive, and the digest of its header."""

    uuid: bytes
    ctime_s: int
    header: ExtentDigest
    version: int = VERSION


def opening_line(opening: Opening) -> str:
    head = {
        "format": FORMAT,
        "version": opening.version,
        "algorithm": ALGORITHM,
        "uuid": opening.uuid.hex(),
        "ctime": opening.ctime_s,
        "header": [opening.header.total_bytes, opening.header.digest.hex()],
    }
    return json.dumps(head)[:-1] + ', "extents": [\n'


def extent_line(index: int, extent: ExtentDigest) -> str:
    comma = "," if index else " "
    return f'{comma}[{extent.total_bytes}, "{extent.digest.hex()}"]\n'


def totals_line(totals: Totals) -> str:
    tail: dict[str, Any] = {
        "extent_count": totals.extents,
        "archive": {"bytes": totals.archive_bytes},
        "file": {"bytes": totals.file_bytes, "digest": totals.file_digest.hex()},
        "devices": [
            {
                "dev_id": d.dev_id,
                "name": d.name,
                "bytes": d.size_bytes,
                "clusters": d.clusters,
                "zero_bytes": d.zero_bytes,
                "digest": d.digest.hex() if d.digest is not None else None,
            }
            for d in totals.devices
        ],
    }
    if totals.file_sha256:
        tail["file"]["sha256"] = totals.file_sha256.hex()
    if totals.incrementals:
        tail["incrementals"] = totals.incrementals
    if totals.cluster_digests_bytes:
        tail["cluster_digests"] = {
            "algorithm": CLUSTER_ALGORITHM,
            "bytes": totals.cluster_digests_bytes,
        }
    return "], " + json.dumps(tail)[1:] + "\n"


_EXTENT_LINE = re.compile(r'([ ,])\[([1-9][0-9]*), "([0-9a-f]{32})"\]')


class _Unreadable(ValueError):
    """What is wrong with a line, in words."""


# Whatever a damaged line makes of Python's readers of JSON, numbers and texts.
_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_NOT_OURS = "a line that is not as vmapipe writes it"


def _damaged(error: Exception) -> ArchiveError:
    """Python's own words for a line that cannot be read help nobody."""
    words = str(error) if isinstance(error, _Unreadable) else _NOT_OURS
    return ArchiveError(f"the manifest is damaged: {words}")


class ManifestReader:
    """Feed it the manifest's lines in order; each call tells what the line says.

    Raises ArchiveError for a line that is not, byte for byte, as we write it:
    a damaged manifest proves nothing, and is reported as such. A line's
    newline may be left out. `close` tells whether the end was seen.
    """

    def __init__(self) -> None:
        self.opening: Opening | None = None
        self.totals: Totals | None = None
        self._count = 0
        self._bytes = 0

    def line(self, text: str) -> Opening | ExtentDigest | Totals:
        try:
            if len(text) > MAX_LINE_BYTES:
                raise _Unreadable(f"a line of {len(text)} characters")
            text = text.removesuffix("\n")
            # Nearly all lines are an extent's: exactly as we write it, or damaged.
            found = _EXTENT_LINE.fullmatch(text)
            if found is None or self.opening is None or self.totals is not None:
                return self._read_other(text)
            comma, size_bytes, digest = found[1], int(found[2]), bytes.fromhex(found[3])
            if (comma == ",") != bool(self._count):
                raise _Unreadable(_NOT_OURS)
            if not EXTENT_HEADER_BYTES <= size_bytes <= MAX_EXTENT_BYTES:
                raise _Unreadable(f"an extent of {size_bytes} bytes")
            self._count += 1
            self._bytes += size_bytes
            return ExtentDigest(size_bytes, digest)
        except _FAULTS as error:
            raise _damaged(error) from error

    def close(self) -> Totals:
        """The manifest has ended. Raises ArchiveError when its last line did not come."""
        if self.totals is None:
            raise ArchiveError("the manifest is damaged: it ends too early")
        return self.totals

    def _read_other(self, text: str) -> Opening | Totals:
        if self.totals is not None:
            raise _Unreadable("text after the end")
        if self.opening is None:
            opening = _parse_opening(text)
            _must_equal(text, opening_line(opening))
            self._bytes = opening.header.total_bytes
            self.opening = opening
            return opening
        if not text.startswith("], "):
            raise _Unreadable(_NOT_OURS)
        totals = _parse_totals(json.loads("{" + text[3:]))
        _must_equal(text, totals_line(totals))
        if (totals.extents, totals.archive_bytes) != (self._count, self._bytes):
            raise _Unreadable(
                f"{self._count} extents and {self._bytes} bytes, "
                f"{totals.extents} and {totals.archive_bytes} announced"
            )
        if self.opening.version == VERSION and totals.incrementals:
            raise _Unreadable("incremental archives in a row, and no base")
        if self.opening.version == VERSION and totals.cluster_digests_bytes:
            raise _Unreadable("digests of clusters in version 1")
        if (self.opening.version == VERSION_SIGNED) != bool(totals.file_sha256):
            raise _Unreadable("the SHA-256 of the file belongs to version 3")
        self.totals = totals
        return totals


def read_totals(end: bytes) -> Totals:
    """Read a manifest's last line alone: `end` are its last MAX_LINE_BYTES bytes, or more.

    Raises ArchiveError; the line is not held against those before.
    """
    text = end.removesuffix(b"\n").rpartition(b"\n")[2].decode("utf-8", "backslashreplace")
    try:
        if len(text) > MAX_LINE_BYTES:
            raise _Unreadable(f"a line of {len(text)} characters")
        if not text.startswith("], "):
            raise _Unreadable("its last line is not as vmapipe writes it")
        totals = _parse_totals(json.loads("{" + text[3:]))
        _must_equal(text, totals_line(totals))
    except _FAULTS as error:
        raise _damaged(error) from error
    return totals


def _must_equal(text: str, written: str) -> None:
    # What a lenient parser takes for the same (1.0 for 1, a key twice) is damage here.
    if text != written.removesuffix("\n"):
        raise _Unreadable(_NOT_OURS)


def _parse_opening(text: str) -> Opening:
    head = json.loads(text + "]}")
    if head["format"] != FORMAT:
        raise _Unreadable("not a manifest of vmapipe")
    if head["version"] not in (VERSION, VERSION_WITH_BASE, VERSION_SIGNED):
        raise _Unreadable(f"manifest version {head['version']!r} is not known here")
    if head["algorithm"] != ALGORITHM:
        raise _Unreadable(f"digest algorithm {head['algorithm']!r} is not known here")
    size, digest = head["header"]
    if not HEADER_BYTES < size <= MAX_HEADER_BYTES:
        raise _Unreadable(f"a header of {size!r} bytes")
    return Opening(
        _unhex(head["uuid"], UUID_BYTES),
        int(head["ctime"]),
        ExtentDigest(int(size), _unhex(digest, DIGEST_BYTES)),
        int(head["version"]),
    )


def _parse_totals(tail: dict[str, Any]) -> Totals:
    totals = Totals(
        extents=int(tail["extent_count"]),
        archive_bytes=int(tail["archive"]["bytes"]),
        file_bytes=int(tail["file"]["bytes"]),
        file_digest=_unhex(tail["file"]["digest"], DIGEST_BYTES),
        devices=tuple(
            DeviceTotals(
                int(d["dev_id"]),
                str(d["name"]),
                int(d["bytes"]),
                int(d["clusters"]),
                int(d["zero_bytes"]),
                _unhex(d["digest"], DIGEST_BYTES) if d["digest"] is not None else None,
            )
            for d in tail["devices"]
        ),
        incrementals=int(tail.get("incrementals", 0)),
        cluster_digests_bytes=_clusters_bytes(tail),
        file_sha256=(
            _unhex(tail["file"]["sha256"], SHA256_BYTES) if "sha256" in tail["file"] else b""
        ),
    )
    numbers = [*totals[:3], totals.incrementals, totals.cluster_digests_bytes]
    for device in totals.devices:
        numbers += [device.dev_id, device.size_bytes, device.clusters, device.zero_bytes]
    if min(numbers) < 0:
        raise _Unreadable(_NOT_OURS)
    return totals


def _clusters_bytes(tail: dict[str, Any]) -> int:
    if "cluster_digests" not in tail:
        return 0
    if tail["cluster_digests"]["algorithm"] != CLUSTER_ALGORITHM:
        raise _Unreadable("the algorithm of its clusters' digests is not known here")
    return int(tail["cluster_digests"]["bytes"])


def _unhex(text: str, size: int) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != size:
        raise _Unreadable(f"{len(raw)} bytes in hex where {size} must be")
    return raw
