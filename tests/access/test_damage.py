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

from tests.archives import archive, encode_seek_table, extents_of, in_order, manifest
from tests.machine import make_disk
from vmapipe.access.archive import OpenArchive, open_for_access
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.open_storage import Caches
from vmapipe.access.storage import Storage
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import Frame

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


class Faulty:
    """A storage that another one stands behind, and that raises what it is given to raise."""

    def __init__(self, below: Storage) -> None:
        self.size_bytes = below.size_bytes
        self.faults: list[BaseException] = []
        self._below = below

    def read_into(self, view: memoryview, offset: int) -> int:
        if self.faults:
            raise self.faults.pop()
        return self._below.read_into(view, offset)

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        return False

    def close(self) -> None:
        self._below.close()


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.EIO, "the store did not answer"), MemoryError()],
    ids=["store", "memory"],
)
def test_what_fails_for_a_moment_is_no_damage_and_is_read_the_next_time(
    tmp_path: Path, fault: BaseException
) -> None:
    content = make_disk(tmp_path / "d", "AAp0hAAA" * 12, 700).read_bytes()
    path, raw = tmp_path / "vm.vma", archive({"a": content})
    path.write_bytes(raw)
    (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(raw))
    found = opened(path)
    assert found is not None
    one, said = found
    faulty = one.storage = Faulty(one.storage)
    disk = ArchiveDisk(one, one.header.devices[0])
    faulty.faults = [fault]
    with pytest.raises(type(fault), match=r"did not answer|^$"):
        disk.read(memoryview(bytearray(4096)), 0)
    assert read_all(disk, content, random.Random(1)) == 0
    assert one.damage == said == []
    one.close()


@pytest.mark.parametrize("name", ["damaged.vma", "sound.vma"])
def test_an_archive_is_damaged_by_what_is_in_it_and_not_by_its_name(
    tmp_path: Path, name: str
) -> None:
    path, raw = tmp_path / name, bytearray(archive({"a": b"x" * 65536}))
    path.write_bytes(raw)
    found = opened(path)
    assert found is not None
    one, said = found
    assert len(said) == 1  # there is no manifest
    assert one.damage == []
    one.close()
    raw[extents_of(bytes(raw))[0].offset + 100] ^= 1
    path.write_bytes(raw)
    found = opened(path)
    assert found is not None
    one, said = found
    assert len(one.damage) == 1
    one.close()


@pytest.mark.parametrize("size", [1, 20])
def test_the_extents_behind_a_frame_with_a_damaged_header_are_served(
    tmp_path: Path, size: int
) -> None:
    """`size`: pieces of the disk before each hole; the headers of holes follow each other."""
    content = make_disk(tmp_path / "d", ("A" * size + "0" * 600) * 6).read_bytes()
    raw = archive({"a": content})
    cuts = [0, *(extent.offset for extent in extents_of(raw)), len(raw)]
    hit = cuts[len(cuts) // 2]
    sound = as_frames(raw)
    frames = seekable_frames(lambda n, at: sound[at : at + n], len(sound), ())
    assert frames is not None
    stored, at, plain = bytearray(sound), 0, 0
    for frame in frames:
        if plain == hit:
            stored[at + 8] ^= 0xFF  # in its first block
        at, plain = at + frame.compressed_bytes, plain + frame.plain_bytes
    assert stored != sound
    path = tmp_path / "vm.vma.zst"
    path.write_bytes(stored)
    (tmp_path / "vm.vma.zst.manifest.json").write_bytes(manifest(raw, bytes(sound)))
    found = opened(path)
    assert found is not None
    one, _ = found
    lost = read_all(ArchiveDisk(one, one.header.devices[0]), content, random.Random(2))
    assert 0 < lost < len(content) // 2
    assert len(one.damage) >= 1
    one.close()


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
