# SPDX-License-Identifier: Apache-2.0
"""Archives that are damaged anywhere: what is read is right, or it is an I/O error."""

from __future__ import annotations

import errno
import itertools
import os
import random
from pathlib import Path

import pytest
import zstandard

from tests.archives import archive, extents_of, in_order, manifest
from tests.machine import make_disk
from vmapipe.access.archive import Caches, OpenArchive, open_for_access
from vmapipe.access.disk import ArchiveDisk
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import Frame, encode_seek_table

SEEDS = 40


def opened(path: Path) -> tuple[OpenArchive, list[str]] | None:
    """None where it cannot be opened at all; what it said meanwhile."""
    said: list[str] = []
    cancel = Cancel()
    try:
        return open_for_access(str(path), cancel, said.append, Caches(None, "/tmp", 1 << 30)), said
    except (ArchiveError, Failure):
        return None
    finally:
        cancel.close()


def as_frames(raw: bytes) -> bytes:
    """The archive as `--compress zstd` stores it: header and each extent in frames of their own."""
    cuts = [0, *(extent.offset for extent in extents_of(raw)), len(raw)]
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    frames, out = [], b""
    for start, end in itertools.pairwise(cuts):
        frame = compressor.compress(raw[start:end])
        frames.append(Frame(len(frame), end - start))
        out += frame
    return out + encode_seek_table(frames)


def read_all(disk: ArchiveDisk, content: bytes, chance: random.Random) -> int:
    """How many bytes could not be read; every other one is compared."""
    lost = at = 0
    while at < len(content):
        length = min(len(content) - at, chance.choice([512, 4096, 65536, 200000]))
        target = memoryview(bytearray(b"?" * length))
        try:
            if not disk.try_read(target, at):
                disk.read(target, at)
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017
            lost += length
        else:
            assert target == content[at : at + length]
        at += length
    return lost


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "none"])
def test_wherever_an_archive_is_damaged_what_is_read_is_right_or_an_error(
    tmp_path: Path, compressed: bool, has_manifest: bool
) -> None:
    content = make_disk(tmp_path / "d", "AAp0hAAA" * 12, 700).read_bytes()
    order = in_order({"a": content})
    random.Random(2).shuffle(order)
    raw = archive({"a": content}, order=order)
    path = tmp_path / "vm.vma"
    sound = as_frames(raw) if compressed else raw
    if has_manifest:
        (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(raw, sound))
    first_data = extents_of(raw)[0].offset
    told = 0
    for seed in range(SEEDS):
        chance = random.Random(seed)
        stored = bytearray(sound)
        if chance.random() < 0.3:
            del stored[chance.randrange(len(stored)) :]
        elif compressed or has_manifest or chance.random() < 0.3:
            stored[chance.randrange(len(stored))] ^= 1 << chance.randrange(8)
        else:
            # Without a manifest nothing can tell damage to plain data: only to headers.
            extent = chance.choice(extents_of(raw))
            stored[extent.offset + chance.randrange(512)] ^= 1 << chance.randrange(8)
            assert extent.offset >= first_data
        if not has_manifest and not compressed and _is_data(raw, stored):
            continue
        path.write_bytes(stored)
        found = opened(path)
        if found is None:
            told += 1
            continue
        one, said = found
        try:
            lost = read_all(ArchiveDisk(one, one.header.devices[0]), content, chance)
        finally:
            one.close()
        # What is lost was said in words, beside that there is no manifest.
        assert not lost or len(said) > (0 if has_manifest else 1)
        told += bool(lost)
    assert told > SEEDS // 4


def _is_data(raw: bytes, stored: bytearray) -> bool:
    """Whether the damage is where VMA has no checksum."""
    if len(stored) != len(raw):
        return False
    at = next(i for i in range(len(raw)) if raw[i] != stored[i])
    headers = [(0, extents_of(raw)[0].offset)]
    headers += [(e.offset, e.offset + 512) for e in extents_of(raw)]
    return not any(start <= at < end for start, end in headers)


def test_a_fifo_where_the_manifest_should_be_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(archive({"a": b"x" * 65536}))
    os.mkfifo(tmp_path / "vm.vma.manifest.json")
    cancel = Cancel()
    with pytest.raises(Failure, match="cannot open the manifest"):
        open_for_access(str(path), cancel, print, Caches(None, "/tmp", 1 << 30))
    cancel.close()
