# SPDX-License-Identifier: Apache-2.0
"""A .lzo archive is read at any place, block by block, as lzop would decompress it."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.access.files.test_many_files import bytes_read
from tests.machine import LIMIT_S, Need, good, run
from vmapipe.access.lzo import MAGIC, LzoBlocks, decompress_block, lzo_blocks
from vmapipe.access.storage import LzoStorage

# What packs well, what does not, and zeroes.
PLAIN = (b"packs well " * 60_000 + random.Random(8).randbytes(700_000)).ljust(1_600_000, b"\0")


def blocks_of(raw: bytes) -> LzoBlocks | None:
    return lzo_blocks(lambda length, offset: raw[offset : offset + length], ())


@pytest.fixture(scope="module", params=[["-1"], ["-9", "--crc32"], ["-1", "-F"]])
def packed(request: pytest.FixtureRequest, need: Need) -> bytes:
    (lzop,) = need("lzop")
    return subprocess.run([lzop, *request.param, "-c"], input=PLAIN, capture_output=True).stdout


def test_every_place_of_what_lzop_packed_is_read(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(packed)
    blocks = blocks_of(packed)
    assert blocks is not None
    assert blocks.plain_at[-1] == len(PLAIN)
    with path.open("rb") as file:
        storage = LzoStorage("packed", file.fileno(), blocks, cache_bytes=1 << 20)
        chance = random.Random(9)
        for _ in range(100):
            offset = chance.randrange(len(PLAIN))
            view = memoryview(bytearray(chance.choice([1, 5000, 600_000])))
            got = storage.read_into(view, offset)
            assert bytes(view[:got]) == PLAIN[offset : offset + len(view)]
            again = memoryview(bytearray(1))
            assert storage.try_read_into(again, offset)
            assert bytes(again) == PLAIN[offset : offset + 1]


def test_what_is_cut_off_or_rare_is_left_to_lzop(packed: bytes) -> None:
    assert blocks_of(packed[:-5]) is None
    assert blocks_of(packed[:1000]) is None
    assert blocks_of(packed + packed) is None
    assert blocks_of(packed[:20]) is None
    assert blocks_of(b"") is None
    flags = struct.unpack_from(">I", packed, 17)[0]
    raw = bytearray(packed)
    struct.pack_into(">I", raw, 17, flags | 0x800)  # a filter
    assert blocks_of(bytes(raw)) is None


@given(st.binary(max_size=80), st.integers(0, 0x1FFF))
def test_no_bytes_bring_more_than_our_own_error(noise: bytes, flags: int) -> None:
    head = MAGIC + struct.pack(">3H2BI", 0x1040, 0x20A0, 0x0940, 1, 5, flags)
    found = blocks_of(head + bytes(12) + b"\0" + bytes(4) + noise)
    if found is not None:
        assert list(found.file_at) == sorted(found.file_at)
    try:
        assert len(decompress_block(noise.ljust(24, b"\0"), flags)) <= 1 << 20
    except ValueError:
        pass
    except struct.error as error:
        raise AssertionError from error


def archive_of(tmp_path: Path, need: Need) -> Path:
    mke2fs, lzop = need("mke2fs", "lzop")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"here it is")
    (tree / "large").write_bytes(random.Random(10).randbytes(30 << 20))
    disk = tmp_path / "disk"
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tree, disk, "60M"], check=True)
    good("backup", "--quiet", "--disk", disk, tmp_path / "vm.vma")
    subprocess.run([lzop, "-1", tmp_path / "vm.vma"], check=True)
    (tmp_path / "vm.vma").unlink()
    return tmp_path / "vm.vma.lzo"


def test_one_file_of_an_archive_costs_no_decompression_of_all_and_damage_is_told(
    need: Need, tmp_path: Path
) -> None:
    archive = archive_of(tmp_path, need)
    words = ["--no-index-cache", "--cache-size", "1"]
    base, _ = bytes_read("files", "--help")
    read, content = bytes_read("files", "cat", *words, archive, "/file")
    assert content == b"here it is"
    assert read - base < archive.stat().st_size // 2
    raw = bytearray(archive.read_bytes())
    at = raw.index((tmp_path / "tree/large").read_bytes()[5 << 20 : (5 << 20) + 100])
    raw[at] ^= 1
    archive.write_bytes(raw)
    assert good("files", "cat", *words, archive, "/file") == b"here it is"
    done = run("files", "cat", *words, archive, "/large")
    assert done.returncode == 1
    assert b"block differs" in done.stderr
    assert b"OSError" not in done.stderr


def test_without_the_library_all_is_decompressed_first(need: Need, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, need)
    program = (
        "import sys; sys.modules['lzallright'] = None; from vmapipe.control.main import main; "
        "sys.exit(main(['files', 'cat', '--cache', sys.argv[1], sys.argv[2], '/file']))"
    )
    words = [sys.executable, "-c", program, str(tmp_path), str(archive)]
    done = subprocess.run(words, capture_output=True, timeout=LIMIT_S)
    assert done.stdout == b"here it is"
