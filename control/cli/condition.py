# SPDX-License-Identifier: Apache-2.0
"""How an archive is stored, what vouches for it, and how its latest restore test ended: for `list`."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.crypt.magic import is_encrypted
from vmapipe.restore.archive.compressed import MAGIC_BYTES, compression_of
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.object import RemoteObject
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.side_files import DRILL_SUFFIX
from vmapipe.runtime.text import human_bytes, one_line
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import usual_frame_bytes

if TYPE_CHECKING:
    from vmapipe.access.drill.result import DrillResult
    from vmapipe.crypt.age import AgeIdentity


# Half of it takes a processor some 2 ms. The frames that we make at levels 1 to 3 hold 1.2 to 1.9 MiB as a rule, those of
# higher levels, and of earlier versions at all but level 1, 3.6 MiB.
_LARGE_FRAME_BYTES = 3 << 20


class Condition(NamedTuple):
    """`compression`: "none", "zstd", "gzip", "lzo", or "" where it cannot be looked at twice (a pipe).

    `is_seekable`: any place can be read at once, by serve, mount and files; else they decompress the
    archive up to there first. `frame_bytes`: what a random read of zstd frames decompresses half of, as a
    rule; 0: it is not made of frames. `has_digests`: its manifest stands beside it, so that what is read
    is checked. `drill`: the latest restore test; None: there was none.
    """

    compression: str
    is_seekable: bool
    has_digests: bool
    drill: DrillResult | None
    encrypted: bool = False
    frame_bytes: int = 0


class _Form(NamedTuple):
    """How an archive is stored: see `Condition`."""

    compression: str
    is_seekable: bool = False
    encrypted: bool = False
    frame_bytes: int = 0


def condition_of(
    name: str, uuid: bytes, cancel: Cancel, identities: Sequence[AgeIdentity] = ()
) -> Condition:
    """Of the archive at `name`, whose header has this uuid. What cannot be found out is not there."""
    form = _stored_form(name, cancel, identities)
    if not form.compression:
        return Condition("", False, False, None)
    drill = _drill_of(name, uuid)
    has_manifest = _has_manifest(name, uuid, cancel, identities)
    return Condition(
        form.compression, form.is_seekable, has_manifest, drill, form.encrypted, form.frame_bytes
    )


def _drill_of(name: str, uuid: bytes) -> DrillResult | None:
    if is_object(name) or not os.path.lexists(name + DRILL_SUFFIX):
        return None
    # Late: most archives have none, and this takes as long as all the rest of a list.
    from vmapipe.access.drill.result import read_result

    return read_result(name, uuid)


def _stored_form(name: str, cancel: Cancel, identities: Sequence[AgeIdentity]) -> _Form:
    """Without a compression where it cannot be looked at twice, or not at all."""
    try:
        if is_object(name):
            remote = RemoteObject(name, (cancel,))
            try:
                return _form(name, remote.pread, remote.size_bytes, cancel, identities)
            finally:
                remote.close()
        if not _is_file(name):
            return _Form("")
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size_bytes = os.lseek(fd, 0, os.SEEK_END)

            def pread(length: int, offset: int) -> bytes:
                return os.pread(fd, length, offset)

            form = _form(name, pread, size_bytes, cancel, identities)
            if form.compression != "lzo" or form.encrypted:
                return form
            from vmapipe.access.lzo import can_read_lzo

            # Its blocks are independent; finding them all here would take as long as opening it.
            return _Form("lzo", can_read_lzo())
        finally:
            os.close(fd)
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return _Form("")


def _is_file(name: str) -> bool:
    """False for "-", "exec:…" and the like, which no file is called, and for FIFOs."""
    mode = os.stat(name).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _form(
    name: str, pread: Pread, size_bytes: int, cancel: Cancel, identities: Sequence[AgeIdentity]
) -> _Form:
    encrypted = is_encrypted(pread(MAGIC_BYTES, 0))
    if encrypted:
        from vmapipe.restore.archive.decrypt import AgeFile

        file = AgeFile(name, pread, size_bytes, identities)
        pread, size_bytes = file.pread, file.size_bytes
    compression = compression_of(pread(MAGIC_BYTES, 0))
    if compression == "zstd":
        # Listing a plain archive does without a library that many installations have not.
        from vmapipe.restore.archive.zstd import seekable_frames

        frames = seekable_frames(pread, size_bytes, (cancel,))
        if frames is None:
            return _Form(compression, encrypted=encrypted)
        frame_bytes = usual_frame_bytes(frame.plain_bytes for frame in frames)
        return _Form(compression, True, encrypted, frame_bytes)
    return _Form(compression, compression == "none", encrypted)


def _has_manifest(
    name: str, uuid: bytes, cancel: Cancel, identities: Sequence[AgeIdentity]
) -> bool:
    try:
        path = manifest_beside(name, cancel)
        if path is None:
            return False
        with Manifest(path, cancel, identities) as manifest:
            return manifest.opening.uuid == uuid
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return False


def condition_json(condition: Condition) -> dict[str, object]:
    """null for what cannot be known of a pipe."""
    known, drill = bool(condition.compression), condition.drill
    return {
        "compression": condition.compression or None,
        "encrypted": condition.encrypted if known else None,
        "seekable": condition.is_seekable if known else None,
        "frame_bytes": condition.frame_bytes or None,
        "digests": condition.has_digests if known else None,
        "drill": drill and {"verdict": drill.verdict, "date": drill.date, "seconds": drill.seconds},
    }


def why_slow(frame_bytes: int) -> str:
    """Why random reads of an archive of such frames are slow, and the way out; empty: they are not."""
    if frame_bytes < _LARGE_FRAME_BYTES:
        return ""
    return (
        f"random reads are slow, for each decompresses half of {human_bytes(frame_bytes)}: "
        "`vmapipe repack --compress zstd` makes a copy with quicker ones, zstd:1 with the quickest"
    )


def condition_lines(condition: Condition) -> list[str]:
    if not condition.compression:
        return []
    form = "plain" if condition.compression == "none" else condition.compression
    if condition.is_seekable:
        seekable = f"yes, {form}"
        if slow := why_slow(condition.frame_bytes):
            seekable += f"; {slow}"
    else:
        seekable = f"no, {form} in one piece: serve, mount and files decompress it first"
    digests = "no manifest: its data cannot be checked"
    if condition.has_digests:
        digests = "a digest of each extent, compared when it is read"
    drill, drilled = condition.drill, "never"
    if drill is not None:
        after = "" if drill.seconds is None else f" after {drill.seconds:.1f} s"
        drilled = f"{drill.verdict}{after}, tested {drill.date}"
    encrypted = ["encrypted   yes, with age"] if condition.encrypted else []
    return [
        *encrypted,
        f"seekable    {seekable}",
        f"checked     {digests}",
        f"drilled     {one_line(drilled)}",
    ]
