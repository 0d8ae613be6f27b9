# SPDX-License-Identifier: Apache-2.0
"""The journal of ext4, replayed as recovery would, and what its inodes hold."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import Need
from vmapipe.access.files.ext import (
    ExtError,
    Superblock,
    folder_entries,
    parse_superblock,
    read_inode,
    replayed_blocks,
)

BLOCK = 1024
MAGIC = 0xC03B3998


def journal(*blocks: bytes, sequence: int = 7, features: int = 0) -> list[bytes]:
    """A journal of 32 blocks whose log begins at block 1."""
    head = struct.pack(">12I", MAGIC, 4, 0, BLOCK, 32, 1, sequence, 1, 0, 0, features, 0)
    found = [head.ljust(BLOCK, b"\0"), *(block.ljust(BLOCK, b"\0") for block in blocks)]
    return found + [bytes(BLOCK)] * (32 - len(found))


def descriptor(sequence: int, *tags: tuple[int, int]) -> bytes:
    """`tags`: the block of the file system, and flags (1: escaped)."""
    rows = b""
    for index, (block, flags) in enumerate(tags):
        last = 8 if index == len(tags) - 1 else 0
        rows += struct.pack(">IHH", block, 0, flags | 2 | last)
    return struct.pack(">3I", MAGIC, 1, sequence) + rows


def commit(sequence: int) -> bytes:
    return struct.pack(">3I", MAGIC, 2, sequence)


def revoke(sequence: int, *blocks: int) -> bytes:
    rows = struct.pack(f">{len(blocks)}I", *blocks)
    return struct.pack(">4I", MAGIC, 5, sequence, 16 + len(rows)) + rows


def test_blocks_of_committed_transactions_replace_the_disks_the_latest_last() -> None:
    log = journal(
        *(descriptor(7, (100, 0), (200, 0)), b"a1", b"b1", commit(7)),
        *(descriptor(8, (100, 0)), b"a2", commit(8)),
    )
    found = replayed_blocks(log.__getitem__)
    assert {block: log[place][:2] for block, place in found.blocks.items()} == {
        100: b"a2",
        200: b"b1",
    }
    assert found.transactions == 2


def test_a_transaction_that_was_not_committed_is_left_out() -> None:
    log = journal(descriptor(7, (100, 0)), b"a1", commit(7), descriptor(8, (100, 0)), b"a2")
    assert replayed_blocks(log.__getitem__).blocks == {100: 2}


def test_what_was_revoked_later_is_not_replayed_and_what_came_after_that_is() -> None:
    log = journal(
        *(descriptor(7, (100, 0), (200, 0)), b"a1", b"b1", commit(7)),
        *(revoke(8, 100, 200), commit(8)),
        *(descriptor(9, (200, 0)), b"b2", commit(9)),
    )
    assert replayed_blocks(log.__getitem__).blocks == {200: 8}


def test_an_escaped_block_begins_with_the_magic_number_again() -> None:
    log = journal(descriptor(7, (100, 1)), b"\0\0\0\0rest", commit(7))
    found = replayed_blocks(log.__getitem__)
    assert found.content(100, log[2])[:8] == struct.pack(">I", MAGIC) + b"rest"


def test_a_log_that_goes_round_in_a_circle_ends() -> None:
    log = journal(*[descriptor(7, (100, 0)), b""] * 15)
    assert replayed_blocks(log.__getitem__).blocks == {}


@given(st.lists(st.binary(max_size=BLOCK), min_size=1, max_size=6), st.binary(max_size=60))
def test_no_bytes_of_a_journal_bring_more_than_our_own_error(
    blocks: list[bytes], tags: bytes
) -> None:
    log = journal(struct.pack(">3I", MAGIC, 1, 7) + tags, *blocks, features=0x1A)
    with contextlib.suppress(ExtError):
        assert len(replayed_blocks(log.__getitem__).blocks) <= 32


@given(st.binary(min_size=256, max_size=256), st.binary(max_size=4096))
def test_no_bytes_of_an_inode_bring_more_than_our_own_error(raw: bytes, rest: bytes) -> None:
    superblock = Superblock(1024, 8, 256, 32, 1, False, 8, False, False)

    def read(offset: int, length: int) -> bytes:
        return raw[:length] if offset % 1024 == 0 else rest[:length].ljust(length, b"\0")

    with contextlib.suppress(ExtError):
        assert len(read_inode(read, superblock, 1).xattrs) <= 512


def test_a_replay_is_what_e2fsck_makes_of_the_same_journal(need: Need, tmp_path: Path) -> None:
    """debugfs writes transactions without a kernel: one that counts, one that is revoked."""
    mke2fs, debugfs, e2fsck = need("mke2fs", "debugfs", "e2fsck")
    image, content = tmp_path / "fs.img", tmp_path / "content"
    content.write_bytes(b"\xc0\x3b\x39\x98" + b"new" * 2000)
    subprocess.run([mke2fs, "-q", "-t", "ext4", image, "32M"], check=True, capture_output=True)
    script = f"jo\njw -b 5000,5001,5002 {content}\njw -r 5002\njc\n"
    subprocess.run([debugfs, "-w", image], input=script.encode(), check=True, capture_output=True)
    raw = image.read_bytes()
    superblock = parse_superblock(raw[1024:2048])
    assert superblock.needs_recovery
    words = [debugfs, "-R", f"blocks <{superblock.journal_inode}>", str(image)]
    places = [int(word) for word in subprocess.check_output(words).split()]
    size = superblock.block_bytes
    blocks = [raw[place * size : (place + 1) * size] for place in places]
    replayed = replayed_blocks(blocks.__getitem__)
    assert {5000, 5001} <= set(replayed.blocks)
    ours = bytearray(raw)
    for block, place in replayed.blocks.items():
        ours[block * size : (block + 1) * size] = replayed.content(block, blocks[place])
    shutil.copy(image, tmp_path / "theirs.img")
    subprocess.run(
        [e2fsck, "-p", "-E", "journal_only", tmp_path / "theirs.img"], capture_output=True
    )
    theirs = (tmp_path / "theirs.img").read_bytes()
    differing = {
        at // size
        for at in range(0, len(raw), size)
        if ours[at : at + size] != theirs[at : at + size]
    }
    # Recovery also empties the journal and clears its flag in the superblock.
    assert differing - set(places) <= {1024 // size}


def _entry(inode: int, name: bytes, length: int = 0) -> bytes:
    length = length or (8 + len(name) + 3) & ~3
    return struct.pack("<IHBB", inode, length, len(name), 1) + name.ljust(length - 8, b"\0")


def test_what_is_inside_of_a_folders_index_is_no_name() -> None:
    names = _entry(12, b"one") + _entry(0, b"deleted") + _entry(13, b"two", BLOCK - 12 - 16)
    assert list(folder_entries(names)) == [(b"one", 12), (b"two", 13)]
    index = _entry(0, _entry(12, b"no name") * 8, BLOCK)[: 8 + 16 * 8]
    index = struct.pack("<IHBB", 0, BLOCK, 0, 0) + index[8:].ljust(BLOCK - 8, b"\1")
    assert list(folder_entries(index)) == []
    whole = struct.pack("<IHBB", 14, 0xFFFF, 3, 1) + b"all".ljust((64 << 10) - 8, b"\0")
    assert list(folder_entries(whole)) == [(b"all", 14)]


def test_names_in_front_of_damage_in_a_folder_are_told_and_then_the_damage() -> None:
    for bad in (bytes(12), _entry(7, b"x", 13 << 2)[:20], struct.pack("<IHBB", 7, 12, 9, 1)):
        found = folder_entries(_entry(12, b"one") + bad)
        assert next(found) == (b"one", 12)
        with pytest.raises(ExtError, match="folder"):
            next(found)


@given(st.binary(max_size=200))
def test_no_bytes_of_a_folder_bring_more_than_our_own_error(raw: bytes) -> None:
    with contextlib.suppress(ExtError):
        for name, inode in folder_entries(raw):
            assert 0 < len(name) < 256
            assert inode
