# SPDX-License-Identifier: Apache-2.0
"""What a fuzzer feeds to the readers of archives and manifests: whatever a stranger's file may hold.

Each target takes any bytes and returns, or raises what is a defect of ours.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from tests import archives
from tests.archives import encode_seek_table
from tests.fuzz.choices import Bytes
from tests.vma.archives import with_md5
from vmapipe.access.archive import OpenArchive, open_for_access
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.open_storage import Caches
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.control.cli.inspect import listing
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.manifest import Manifest
from vmapipe.restore.archive.reader import open_archive
from vmapipe.restore.archive.survey import open_damaged, survey
from vmapipe.restore.targets.plan import check_plan, config_paths, plan_folder
from vmapipe.restore.verify import compare
from vmapipe.restore.verify.report import Report
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import ignore
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import PEEK_BYTES, Device, Header, peek_header_bytes
from vmapipe.vma.manifest import (
    ManifestReader,
    Opening,
    Totals,
    extent_line,
    opening_line,
    totals_line,
)
from vmapipe.vma.seektable import Frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
# More makes a run slow and finds nothing new.
_MOST_EDITS = 8
# Of a device however large it claims to be: its edges, and some places inside.
_MOST_READS = 12
_MOST_FINDS = 2000

_PIECES = (b"\0" * CLUSTER_BYTES, b"\xa5" * CLUSTER_BYTES, b"\0" * 4096 + b"\x5a" * 61440)
#: Of five bytes; the empty one: as it was.
_NAMES = (
    "",
    "",
    "",
    "",
    "",
    "a/../",
    "/etc/",
    "../ab",
    "x\x1b[1m",
    "a\nb\nc",
    "disk0",
    "ab\xe9c",
    "a b c",
)
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x8000, 0xFFFF, 1 << 16, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 48)
#: What an editor of a manifest, or its enemy, would put there.
_WORDS = (
    *(b"NaN", b"1e400", b"-1", b"[", b"]", b"{", b"}", b'"', b",", b"null", b"true", b"9" * 5000),
    *(b"\n", b"\0", b"\xff", b"\\ud800", b"[" * 3000, b" ", b'"extents"', b'"version": 2'),
)


# What a command tells in one line.
_KNOWN = (ArchiveError, Failure)

# --- making them ---


def _disks(source: Bytes) -> dict[str, bytes]:
    disks = {}
    for number in range(1 + source.number() % 3):
        pieces = [_PIECES[source.number() % 3] for _ in range(1 + source.number() % 4)]
        disks[f"disk{number}"] = b"".join(pieces)[: -512 if source.number() & 1 else None]
    return disks


def _base(source: Bytes) -> bytes:
    disks = _disks(source)
    configs = {
        f"conf{number}": source.take(source.number() % 20) for number in range(source.number() % 3)
    }
    order = archives.in_order(disks)
    if source.number() & 1:
        order.reverse()
    slots = (1, 2, 58, 59)[source.number() % 4]
    raw = archives.archive(disks, configs, order=order, slots=slots)
    # Names that no archive of ours has, each as long as the one that it replaces.
    for own in [*disks, *configs]:
        name = _NAMES[source.number() % len(_NAMES)]
        raw = raw.replace(own.encode() + b"\0", (name or own).encode() + b"\0", 1)
    return _with_header_sum(raw)


def _edited(raw: bytes, source: Bytes) -> bytes:
    """Some edits, most of them with the sums put right again."""
    for _ in range(source.number() % _MOST_EDITS):
        extents = archives.extents_of(raw) if _is_sound(raw) else []
        choice = source.number()
        place = extents[source.number() % len(extents)] if extents else None
        match choice % 8:
            case 0:
                raw = _patched(raw, 0, (12288, 256, 64)[source.number() % 3], source)
                raw = raw if choice >= 224 else _with_header_sum(raw)
            case 1 if place is not None:
                raw = _patched(raw, place.offset, 512, source)
                raw = raw if choice >= 224 else archives.resealed(raw, place.offset)
            case 2 if place is not None:  # cut one out
                raw = raw[: place.offset] + raw[place.offset + place.total_bytes :]
            case 3 if place is not None:  # once more
                piece = raw[place.offset : place.offset + place.total_bytes]
                raw += piece
            case 4:
                raw = raw[: source.number(3) % (len(raw) + 1)]
            case 5:
                at = source.number(3) % (len(raw) + 1)
                raw = raw[:at] + (b"VMAE", b"\0" * 512, b"junk")[source.number() % 3] + raw[at:]
            case 6 if place is not None:  # its data
                at = min(place.offset + 512 + source.number(2), len(raw) - 1)
                raw = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            case _:
                raw = _patched(raw, 0, len(raw), source)
    return raw


def _is_sound(raw: bytes) -> bool:
    try:
        archives.manifest(raw)
    except (ArchiveError, ValueError):
        return False
    return True


def _patched(raw: bytes, start: int, length: int, source: Bytes) -> bytes:
    """A number in `length` bytes at `start` replaced by another one."""
    width = (1, 2, 4, 8)[source.number() % 4]
    at = start + source.number(2) % max(1, min(length, len(raw) - start))
    number = _NUMBERS[source.number() % len(_NUMBERS)] & ((1 << 8 * width) - 1)
    if source.number() % 3 == 0:
        number = source.number(width)
    return (raw[:at] + number.to_bytes(width, "big") + raw[at + width :])[: max(len(raw), at)]


def _with_header_sum(raw: bytes) -> bytes:
    try:
        end = peek_header_bytes(raw[:PEEK_BYTES])
    except ArchiveError:
        return raw
    return with_md5(raw[:end], 32) + raw[end:]


def _stored(raw: bytes, source: Bytes) -> tuple[bytes, str]:
    """As a file: its bytes, and how its name ends."""
    kind = source.number() % 6
    if kind < 2 or not raw:
        return raw, ""
    if kind == 2:
        stored, suffix = gzip.compress(raw, 1, mtime=0), ".gz"
    elif kind == 3:
        stored, suffix = zstd.compress(raw), ".zst"
    else:
        step = (600, 5000, 70_000, MIB)[source.number() % 4]
        pieces = [raw[at : at + step] for at in range(0, len(raw), step)][:400]
        packed = [zstd.compress(piece) for piece in pieces]
        frames = [Frame(len(a), len(b)) for a, b in zip(packed, pieces, strict=True)]
        table = bytearray(encode_seek_table(frames))
        for _ in range(source.number() % 3):  # what it says of some frame is a lie
            at = 8 + 4 * (source.number() % (2 * len(frames)))
            table[at : at + 4] = (_NUMBERS[source.number() % 9]).to_bytes(4, "little")
        stored, suffix = b"".join(packed) + bytes(table), ".zst"
    for _ in range(source.number() % 3):
        at = source.number(2) % len(stored)
        if source.number() & 1:
            at = len(stored) - 1 - at % 64
        stored = stored[:at] + source.take(1) + stored[at + 1 :]
    if source.number() % 8 == 0:
        stored = stored[: source.number(2) % (len(stored) + 1)]
    if source.number() % 8 == 0:
        stored += (b"\0" * 100, b"junk", b"\x50\x2a\x4d\x18\5\0\0\0abcde")[source.number() % 3]
    return stored, suffix


def _manifest(raw: bytes, stored: bytes, source: Bytes) -> tuple[bytes | None, bool]:
    """The manifest of an archive, or none, or one that is changed; and whether nothing in it is wrong."""
    choice = source.number() % 4
    if choice == 0 or not _is_sound(raw):
        return None, True
    text = archives.manifest(raw, stored)
    return (_rewritten(text, source), False) if choice == 1 else (text, True)


def _rewritten(text: bytes, source: Bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    for _ in range(1 + source.number() % 4):
        index = source.number() % len(lines) if lines else 0
        line = lines[index] if lines else b""
        at = source.number(2) % (len(line) + 1)
        word = _WORDS[source.number() % len(_WORDS)]
        match source.number() % 7:
            case 0:
                lines[index : index + 1] = [line[:at] + word + line[at:]]
            case 1:
                lines[index : index + 1] = [line[:at] + word + line[at + len(word) :]]
            case 2:
                lines[index : index + 1] = []
            case 3:
                lines[index:index] = [line]
            case 4:
                lines[index : index + 1] = [
                    line[:at] + source.take(source.number() % 8) + line[at:]
                ]
            case 5:
                lines[index : index + 1] = [line[:at]]
            case _:
                lines.reverse()
    return b"".join(lines)


# --- reading them ---


def manifest(data: bytes) -> None:
    """Whatever stands in a manifest: lines that would be written so again, or an error of the archive."""
    source = Bytes(data)
    if source.number() % 4 == 0:
        text = source.take(len(data))
    else:
        text = archives.manifest(_base(source))
        text = _rewritten(text, source)
    _read_lines(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.manifest.json"
        path.write_bytes(text)
        _read_manifest(str(path), text.count(b"\n"))


def _read_lines(text: bytes) -> None:
    reader = ManifestReader()
    try:
        for number, line in enumerate(text.decode("ascii").splitlines(keepends=True)):
            item = reader.line(line)
            if isinstance(item, Opening):
                again = opening_line(item)
            elif isinstance(item, Totals):
                again = totals_line(item)
            else:
                again = extent_line(number - 1, item)
            if len(again) > 2 * len(line) + 200:
                raise AssertionError(f"{line!r:.200} is written as {again!r:.200}")
    except (ArchiveError, UnicodeDecodeError):
        return


def _read_manifest(path: str, most: int) -> None:
    cancel = Cancel()
    try:
        with Manifest(path, cancel) as read:
            for _ in range(most + 1):
                if isinstance(read.next(), Totals):
                    return
        raise AssertionError(f"more than {most} lines")
    except _KNOWN:
        return
    finally:
        cancel.close()


def archive(data: bytes) -> None:
    """Whatever is in an archive and its manifest: all that read archives agree, or say what is wrong."""
    source = Bytes(data)
    raw = _base(source)
    sound = raw
    raw = _edited(raw, source)
    stored, suffix = _stored(raw, source)
    described = sound if source.number() & 1 else raw
    beside, is_true = _manifest(described, stored, source)
    # A disk's digest may vouch for it where an extent's does not: then it is verified, and not served.
    is_true = is_true and described == raw
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, f"x.vma{suffix}")
        Path(name).write_bytes(stored)
        if beside is not None:
            Path(f"{name}.manifest.json").write_bytes(beside)
        cancel = Cancel()
        try:
            _list(name, cancel)
            report = _verify(name, cancel)
            _salvage(name, cancel)
            _serve(name, folder, cancel, is_good=is_true and report is not None and report.ok)
        finally:
            cancel.close()


def _list(name: str, cancel: Cancel) -> None:
    try:
        with open_archive(name, cancel) as opened:
            header = opened.header
    except _KNOWN as error:
        return _look_at(error)
    listing(header)
    _plan(header)
    return None


def _plan(header: Header) -> None:
    """Nothing is restored outside its folder."""
    try:
        plan = plan_folder(header, "/into")
        check_plan(header, plan)
        paths = [target.path for target in plan.targets.values()] + config_paths(header, "/into")
    except _KNOWN:
        return
    for path in paths:
        folder, base = os.path.split(path)
        if folder != "/into" or base in ("", ".", "..") or not base.isprintable():
            raise AssertionError(f"a file would be made as {path!r}")
    if len(set(paths)) != len(paths):
        raise AssertionError(f"the same file would be made twice: {paths}")


def _verify(name: str, cancel: Cancel) -> Report | None:
    # In this process: copies of a fuzzer would fuzz on.
    with mock.patch.object(compare, "can_fork", return_value=False):
        try:
            report = verify(name, ignore, cancel, VerifyOptions(threads=1, file_digest=True))
        except _KNOWN as error:
            _look_at(error)
            return None
    report.event()
    if report.data_checked and report.manifest is None:
        raise AssertionError("data was checked without a manifest")
    return report


def _salvage(name: str, cancel: Cancel) -> None:
    try:
        with open_damaged(name, cancel, ReadOptions()) as opened:
            for number, _ in enumerate(survey(opened, cancel.check)):
                if number > _MOST_FINDS:
                    raise AssertionError(f"more than {_MOST_FINDS} extents and gaps")
    except _KNOWN as error:
        _look_at(error)


def _serve(name: str, folder: str, cancel: Cancel, *, is_good: bool) -> None:
    said: list[str] = []
    try:
        opened = open_for_access(name, cancel, said.append, Caches(None, folder, 8 * MIB))
    except _KNOWN as error:
        if is_good:
            raise AssertionError(f"what is verified is not served: {error}") from error
        return _look_at(error)
    try:
        for device in opened.header.devices:
            if not device.is_vmstate:  # a machine's memory is not served
                _read(opened, device, is_good=is_good)
    finally:
        opened.close()
    return None


def _read(opened: OpenArchive, device: Device, *, is_good: bool) -> None:
    disk, target = ArchiveDisk(opened, device), memoryview(bytearray(2 * CLUSTER_BYTES))
    size = device.size_bytes
    for at in sorted({0, 512, CLUSTER_BYTES - 512, CLUSTER_BYTES, size // 2, size - 512, size - 1})[
        :_MOST_READS
    ]:
        piece = target[: max(0, min(len(target), size - at))] if 0 <= at < size else target[:0]
        try:
            disk.read(piece, at)
        except OSError as error:
            if is_good:
                raise AssertionError(f"what is verified cannot be read: {error}") from error
        with contextlib.suppress(OSError):
            for number, (length, _) in enumerate(disk.extents(at, len(piece))):
                if length <= 0 or number > 100:
                    raise AssertionError(f"{length} bytes at {at}")


def _look_at(error: Exception) -> None:
    if not str(error) or len(str(error)) > 20_000:
        raise AssertionError(f"{str(error)!r:.300} is not a line for people") from error


TARGETS: dict[str, Callable[[bytes], None]] = {"archive": archive, "manifest": manifest}
LONGEST_BYTES = {"archive": 300, "manifest": 600}


def seeds() -> Sequence[bytes]:
    """Where a fuzzer begins: sound ones of each compression, with their manifests."""
    shapes = (b"\0\0\1\1\0\0", b"\1\0\1\0\1\1\2\0\0\1\0\0\2")
    return [
        shape + bytes(3) + bytes([slots, 0, kind, 0, 0, 0, 1, 2])
        for shape in shapes
        for slots in range(4)
        for kind in range(6)
    ]
