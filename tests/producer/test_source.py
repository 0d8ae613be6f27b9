# SPDX-License-Identifier: Apache-2.0
"""Raw files and block devices as sources."""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmapipe.producer.source import (
    DiskSourceError,
    PairReader,
    RawSource,
    ReadFailed,
    Segment,
    ShortRead,
)

CLUSTER = 65536


def source_of(path: Path) -> RawSource:
    return RawSource("drive-scsi0", str(path))


def read(source: RawSource, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def test_holes_are_told_from_data_in_whole_clusters(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 * CLUSTER + 1)
        file.seek(10 * CLUSTER + 5000)
        file.write(b"x" * 4096)
        file.seek(64 * CLUSTER)
        file.write(b"y")
    source = source_of(disk)
    segments = list(source.segments())
    source.close()
    assert segments[0] == Segment(0, 10 * CLUSTER, is_data=False)
    assert Segment(10 * CLUSTER, 11 * CLUSTER, is_data=True) in segments
    assert segments[-1] == Segment(64 * CLUSTER, 64 * CLUSTER + 1, is_data=True)
    for before, after in itertools.pairwise(segments):
        assert before.end == after.start


@pytest.mark.parametrize("size", [1, 511, 512, 4096, CLUSTER - 1, CLUSTER, CLUSTER + 1])
def test_a_disk_of_any_size_is_covered_to_its_last_byte(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(size))
    source = source_of(disk)
    assert list(source.segments()) == [Segment(0, size, is_data=True)]
    assert read(source, size, 0) == disk.read_bytes()
    source.check_unchanged()
    source.close()


def test_a_disk_of_the_largest_size_a_file_system_takes_is_mapped_without_reading_it(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    size = 1 << 43  # 8 TiB; ext4 ends at 16
    disk.touch()
    try:
        os.truncate(disk, size)
    except OSError as error:
        pytest.skip(f"this file system takes no file of 8 TiB: {error}")
    source = source_of(disk)
    assert list(source.segments()) == [Segment(0, size, is_data=False)]
    source.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(4 * CLUSTER))
    return path


def test_a_disk_that_shrinks_is_an_error_with_device_and_offset(disk: Path) -> None:
    source = source_of(disk)
    os.truncate(disk, CLUSTER + 100)
    with pytest.raises(DiskSourceError, match=r"'drive-scsi0'.*ended at offset 65636.*shrank"):
        read(source, 2 * CLUSTER, 0)
    with pytest.raises(DiskSourceError, match=r"'drive-scsi0'.*shrank from 262144 to 65636"):
        source.check_unchanged()
    source.close()


def test_a_disk_that_grows_is_an_error_with_device_and_offset(disk: Path) -> None:
    source = source_of(disk)
    os.truncate(disk, 5 * CLUSTER)
    with pytest.raises(DiskSourceError, match=r"'drive-scsi0'.*grew from 262144 to 327680.*262144"):
        source.check_unchanged()
    source.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot open .*No such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.touch(), "is empty"),
        (os.mkfifo, "neither a file nor a block device"),
    ],
    ids=["missing", "folder", "empty", "FIFO"],
)
def test_what_is_no_disk_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "disk"
    make(path)
    with pytest.raises(DiskSourceError, match=f"disk 'drive-scsi0': .*{words}") as caught:
        source_of(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def loop_device(tmp_path: Path, need: Callable[..., list[str]]) -> Iterator[tuple[Path, Path]]:
    """A block device of 1 MiB + 512 bytes, and the file behind it."""
    (losetup,) = need("losetup")
    if os.geteuid():
        pytest.skip("a loop device needs root")
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom((1 << 20) + 512))
    done = subprocess.run(
        [losetup, "--find", "--show", str(backing)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr}")
    device = Path(done.stdout.strip())
    try:
        yield device, backing
    finally:
        subprocess.run([losetup, "--detach", str(device)], check=True)


def test_a_block_device_is_read_to_its_last_byte(loop_device: tuple[Path, Path]) -> None:
    device, backing = loop_device
    source = source_of(device)
    assert source.size_bytes == (1 << 20) + 512
    got = b"".join(
        read(source, segment.end - segment.start, segment.start)
        if segment.is_data
        else bytes(segment.end - segment.start)
        for segment in source.segments()
    )
    source.close()
    assert got == backing.read_bytes()


def test_a_read_error_of_a_block_device_names_device_and_offset(
    loop_device: tuple[Path, Path],
) -> None:
    device, backing = loop_device
    source = source_of(device)
    # The device keeps its size, and its reads beyond the file's new end fail.
    os.truncate(backing, 512 * 1024)
    with pytest.raises(
        DiskSourceError, match=r"'drive-scsi0': cannot read .* at offset \d+: Input"
    ):
        read(source, 1 << 20, 0)
    source.close()


MIB = 1 << 20
SIZE = 3 * MIB + 4096 + 17


@functools.cache
def source_data() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(source_data())
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def reader(
    fd: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PairReader]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(request.param)))
    reader = PairReader(fd)
    yield reader
    reader.close()


@pytest.mark.parametrize("length", [1, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB + 512, SIZE - 3])
def test_a_piece_is_read_whole_whatever_its_length(reader: PairReader, length: int) -> None:
    for offset in (0, 3, SIZE - length):
        buffer = bytearray(length + 8)
        with memoryview(buffer) as view, view[:length] as wanted:
            reader.read_into(wanted, offset)
        assert buffer == source_data()[offset : offset + length] + bytes(8)


@pytest.mark.parametrize("missing", [1, MIB // 2, 2 * MIB + 4096])
def test_a_file_that_ends_in_either_half_is_short_where_it_ends(
    reader: PairReader, missing: int
) -> None:
    with memoryview(bytearray(3 * MIB)) as view:
        with pytest.raises(ShortRead) as caught:
            reader.read_into(view, SIZE - 3 * MIB + missing)
        assert caught.value.offset == SIZE
        # And it goes on after that.
        reader.read_into(view, 0)
        assert view == source_data()[: 3 * MIB]


def test_a_read_that_fails_names_its_first_offset_and_the_reason(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    reader = PairReader(folder)
    try:
        with memoryview(bytearray(2 * MIB)) as view, pytest.raises(ReadFailed) as caught:
            reader.read_into(view, 8192)
        assert caught.value.offset == 8192
        assert isinstance(caught.value.error, IsADirectoryError)
    finally:
        reader.close()
        os.close(folder)
