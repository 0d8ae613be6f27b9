# SPDX-License-Identifier: Apache-2.0
"""Extents land where they belong, and zeroes where the target needs them."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archives import UUID, ClusterAt, archive, in_order
from vmapipe.clusters.sizes import BLOCK_BYTES, BLOCKS_PER_CLUSTER, CLUSTER_BYTES
from vmapipe.protocol.restore import TargetSetup
from vmapipe.restore.archive.errors import TargetError
from vmapipe.restore.workers import writer as writer_module
from vmapipe.restore.workers.writer import RANGE_BYTES, TargetWriter, Zeroer, zero_pages
from vmapipe.runtime.syscalls import fallocate
from vmapipe.vma.extent import encode_extent_header, parse_extent_header, slot_word
from vmapipe.vma.scanner import ExtentRead, Scanner

MIB = 1 << 20


@contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("target")
    os.write(fd, data)
    yield fd
    os.close(fd)


def target(fd: int, size_bytes: int, *, write_zeroes: bool) -> TargetSetup:
    return TargetSetup(1, fd, size_bytes, write_zeroes, b"disk", b"/the/target")


def block(number: int) -> bytes:
    return struct.pack(">Q", number | 1 << 63) * (BLOCK_BYTES // 8)


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """A disk of a few clusters, any blocks of it zero, of any size."""
    clusters = draw(st.integers(1, 12))
    masks = draw(
        st.lists(
            st.sampled_from([0, 0xFFFF, 1, 0x8000, 0x5555, 0x0FF0]) | st.integers(0, 0xFFFF),
            min_size=clusters,
            max_size=clusters,
        )
    )
    data = b"".join(
        block(cluster * 16 + bit) if mask >> bit & 1 else bytes(BLOCK_BYTES)
        for cluster, mask in enumerate(masks)
        for bit in range(BLOCKS_PER_CLUSTER)
    )
    return data[: len(data) - draw(st.integers(0, CLUSTER_BYTES - 1))]


@given(
    disks(), st.randoms(use_true_random=False), st.integers(1, 59), st.booleans(), st.integers(0, 5)
)
def test_any_disk_in_any_order_is_written_as_it_was(
    disk: bytes, chance: object, slots: int, write_zeroes: bool, surplus: int
) -> None:
    order = in_order({"disk": disk})
    getattr(chance, "shuffle")(order)  # noqa: B009  Hypothesis names no type for it
    raw = archive({"disk": disk}, order=order, slots=slots)
    old = b"\xaa" if write_zeroes else b"\0"
    with memory_file(old * (len(disk) + surplus)) as fd:
        writer = TargetWriter([target(fd, len(disk), write_zeroes=write_zeroes)])
        for event in Scanner().feed(raw):
            if isinstance(event, ExtentRead):
                writer.write(event.extent, event.data)
        writer.flush()
        assert os.pread(fd, len(disk) + 100, 0) == disk + old * surplus


def test_clusters_of_other_devices_are_left_out() -> None:
    disks = {"one": block(1) * 16, "two": block(2) * 16}
    with memory_file(bytes(CLUSTER_BYTES)) as fd:
        writer = TargetWriter([target(fd, CLUSTER_BYTES, write_zeroes=True)])
        for event in Scanner().feed(archive(disks)):
            if isinstance(event, ExtentRead):
                writer.write(event.extent, event.data)
        writer.flush()
        assert os.pread(fd, 2 * CLUSTER_BYTES, 0) == disks["one"]


def test_a_full_last_cluster_is_cut_at_the_devices_end() -> None:
    data = b"".join(map(block, range(16)))
    header = encode_extent_header(UUID, [slot_word(0xFFFF, 1, 0)], 16)
    with memory_file(b"\xaa" * CLUSTER_BYTES) as fd:
        writer = TargetWriter([target(fd, 5000, write_zeroes=True)])
        writer.write(parse_extent_header(header, UUID), memoryview(data))
        writer.flush()
        assert os.pread(fd, CLUSTER_BYTES, 0) == data[:5000] + b"\xaa" * (CLUSTER_BYTES - 5000)


def test_a_write_error_names_device_target_and_offset() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    writer = TargetWriter([target(fd, MIB, write_zeroes=False)])
    header = encode_extent_header(UUID, [slot_word(1, 1, 3)], 1)
    with pytest.raises(TargetError) as caught:
        writer.write(parse_extent_header(header, UUID), memoryview(block(1)))
    os.close(fd)
    assert str(caught.value) == (
        "device 'disk': cannot write to /the/target at offset 196608: No space left on device"
    )


def test_neighbouring_zeroes_are_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def count(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append((offset, length))
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr(writer_module, "fallocate", count)
    clusters = 3000
    disk = bytes(clusters * CLUSTER_BYTES) + bytes(15 * BLOCK_BYTES) + block(1)
    with memory_file(b"") as fd:
        os.ftruncate(fd, len(disk))
        writer = TargetWriter([target(fd, len(disk), write_zeroes=True)])
        order = [ClusterAt("disk", number) for number in range(clusters + 1)]
        for event in islice(Scanner().feed(archive({"disk": disk}, order=order)), 1, None):
            assert isinstance(event, ExtentRead)
            writer.write(event.extent, event.data)
        writer.flush()
    # 188 MiB and the blocks before the first that has data.
    assert calls == [(0, clusters * CLUSTER_BYTES + 15 * BLOCK_BYTES)]


ranges = st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(1, MIB)), max_size=8)


@given(ranges, st.sampled_from(["holes", "ranges", "neither", "unaligned"]))
def test_zeroed_ranges_are_zero_whatever_the_file_system_can(
    parts: list[tuple[int, int]], ability: str
) -> None:
    def limited(fd: int, mode: int, offset: int, length: int) -> None:
        if ability == "neither" or (ability == "ranges" and mode & 2):
            raise OSError(errno.EOPNOTSUPP, "not here")
        if ability == "unaligned" and (offset | length) % 512:
            raise OSError(errno.EINVAL, "sectors, please")
        fallocate(fd, 3, offset, length)  # memory files can only punch holes

    model = bytearray(b"\xaa" * (4 * MIB))
    with memory_file(bytes(model)) as fd, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "fallocate", limited)
        zeroer = Zeroer(fd, zero_pages())
        for start, length in parts:
            zeroer.add(start, length)
            model[start : start + length] = bytes(length)
        zeroer.flush()
        assert os.pread(fd, 5 * MIB, 0) == model


def test_a_hole_gives_the_storage_back() -> None:
    with memory_file(b"\xaa" * (4 * MIB)) as fd:
        zeroer = Zeroer(fd, zero_pages())
        zeroer.add(MIB, 2 * MIB)
        zeroer.flush()
        assert os.fstat(fd).st_blocks * 512 == 2 * MIB


def test_small_ranges_are_written() -> None:
    with memory_file(b"\xaa" * MIB) as fd:
        zeroer = Zeroer(fd, zero_pages())
        zeroer.add(0, RANGE_BYTES - 1)
        zeroer.flush()
        assert os.fstat(fd).st_blocks * 512 == MIB


def test_an_error_while_zeroing_tells_where() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    writer = TargetWriter([target(fd, MIB, write_zeroes=True)])
    header = encode_extent_header(UUID, [slot_word(0, 1, 3)], 0)
    writer.write(parse_extent_header(header, UUID), memoryview(b""))
    with pytest.raises(TargetError, match="at offset 196608: No space left"):
        writer.flush()
    os.close(fd)
