# SPDX-License-Identifier: Apache-2.0
"""Partition tables, those that lie among them."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.access.files.sources import ByteSource
from vmapipe.access.files.volumes import Partition, partitions

MIB = 1 << 20
Entry = tuple[int, int, int]  # type, first sector, sectors


def source(raw: bytes) -> ByteSource:
    return ByteSource(lambda offset, length: raw[offset : offset + length], len(raw))


def mbr(*entries: Entry, flag: int = 0) -> bytes:
    rows = b"".join(struct.pack("<B3xB3xII", flag, *entry) for entry in entries)
    return bytes(446) + rows.ljust(64, b"\0") + b"\x55\xaa"


def disk(sectors: dict[int, bytes], size: int = 8 * MIB, unit: int = 512) -> ByteSource:
    raw = bytearray(size)
    for number, content in sectors.items():
        raw[number * unit : number * unit + len(content)] = content
    return source(bytes(raw))


def gpt(
    *parts: tuple[int, int], size: int = 8 * MIB, unit: int = 512, broken: str = ""
) -> dict[int, bytes]:
    """`parts`: the first and the last sector; (0, 0) for an entry that is not used."""
    rows = b"".join(
        struct.pack("<16s16sQQQ72x", b"\1" * 16 if first else b"", b"\2" * 16, first, last, 0)
        for first, last in parts
    ).ljust(128 * 128, b"\0")
    end = size // unit - 1
    table_sectors = len(rows) // unit

    def header(here: int, other: int, table: int) -> bytes:
        def pack(checksum: int) -> bytes:
            return struct.pack(
                "<8s4sIIIQQQQ16sQIII",
                *(b"EFI PART", b"\0\0\1\0", 92, checksum, 0, here, other, 34, end - 34),
                *(b"\3" * 16, table, 128, 128, zlib.crc32(rows)),
            )

        return pack(zlib.crc32(pack(0))).ljust(unit, b"\0")

    found = {
        0: mbr((0xEE, 1, 0xFFFFFFFF)),
        1: header(1, end, 2),
        2: rows,
        end - table_sectors: rows,
        end: header(end, 1, end - table_sectors),
    }
    if "primary" in broken:
        found[1] = b"\xff" * unit
    if "backup" in broken:
        found[end] = b"\xff" * unit
    return found


def test_primary_and_logical_partitions_have_the_numbers_that_linux_gives_them() -> None:
    table = disk(
        {
            0: mbr((0x83, 2048, 1000), (0, 0, 0), (0x0F, 4096, 8192), (0x82, 12288, 100)),
            4096: mbr((0x83, 100, 500), (0x05, 2000, 1000)),
            4096 + 2000: mbr((0x83, 10, 300), (0, 0, 0)),
        }
    )
    assert partitions(table, 512) == [
        Partition(1, 2048 * 512, 1000 * 512),
        Partition(4, 12288 * 512, 100 * 512),
        Partition(5, (4096 + 100) * 512, 500 * 512),
        Partition(6, (4096 + 2000 + 10) * 512, 300 * 512),
    ]


@pytest.mark.parametrize("unit", [512, 4096])
@pytest.mark.parametrize("broken", ["", "primary", "backup"])
def test_a_gpt_is_read_from_whichever_copy_is_good(unit: int, broken: str) -> None:
    table = disk(gpt((40, 99), (0, 0), (100, 199), unit=unit, broken=broken), unit=unit)
    assert partitions(table, unit) == [
        Partition(1, 40 * unit, 60 * unit),
        Partition(3, 100 * unit, 100 * unit),
    ]


def test_a_gpt_without_a_good_copy_is_not_believed() -> None:
    assert partitions(disk(gpt((40, 99), broken="primary backup")), 512) == []


def test_a_chain_of_logical_partitions_that_turns_back_ends() -> None:
    table = disk(
        {
            0: mbr((0x05, 2048, 8192)),
            2048: mbr((0x83, 10, 20), (0x05, 100, 50)),
            2148: mbr((0x83, 10, 20), (0x05, 0, 50)),
        }
    )
    assert [part.number for part in partitions(table, 512)] == [5, 6]
    assert partitions(disk({0: mbr((0x05, 0, 8192), (0x83, 9, 9))}), 512)


def test_partitions_that_overlap_are_all_there_and_those_behind_the_end_are_empty() -> None:
    table = disk({0: mbr((0x83, 2048, 4096), (0x83, 3000, 1 << 31), (0x83, 1 << 30, 5))})
    assert partitions(table, 512) == [
        Partition(1, 2048 * 512, 4096 * 512),
        Partition(2, 3000 * 512, 8 * MIB - 3000 * 512),
        Partition(3, (1 << 30) * 512, 0),
    ]


def test_the_code_of_a_boot_sector_is_not_a_table() -> None:
    assert partitions(disk({0: mbr((0x83, 2048, 4096), flag=0x33)}), 512) == []
    assert partitions(disk({}), 512) == []
    assert partitions(source(b"short"), 512) == []


SECTOR = st.lists(
    st.tuples(st.sampled_from([0, 5, 0x0F, 0x83, 0xEE]), st.integers(0, 40), st.integers(0, 40)),
    max_size=4,
).map(lambda rows: mbr(*rows))


@given(st.dictionaries(st.integers(0, 40), SECTOR, max_size=12), st.sampled_from([512, 4096]))
def test_whatever_the_tables_say_the_partitions_are_in_the_disk_and_few(
    sectors: dict[int, bytes], unit: int
) -> None:
    whole = disk({0: mbr((0x05, 1, 30)), **sectors}, 64 << 10, unit)
    found = partitions(whole, unit)
    assert len(found) <= 4 * 100 * 4
    assert all(0 <= part.size_bytes <= max(0, whole.size_bytes - part.offset) for part in found)


@given(st.binary(min_size=92, max_size=92), st.binary(max_size=2000))
def test_no_bytes_of_a_gpt_bring_an_error(header: bytes, rows: bytes) -> None:
    plain = b"EFI PART" + header[8:16] + bytes(4) + header[20:24] + struct.pack("<Q", 1)
    plain += header[32:72] + struct.pack("<QIII", 2, *struct.unpack("<2I", header[80:88]), 0)
    raw = plain[:16] + struct.pack("<I", zlib.crc32(plain)) + plain[20:]
    for part in partitions(disk({0: mbr((0xEE, 1, 9)), 1: raw, 2: rows}, 64 << 10), 512):
        assert 0 <= part.size_bytes <= 64 << 10
