# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmapipe.producer.reading import PairReader, ReadFailed, ShortRead

MIB = 1 << 20
SIZE = 3 * MIB + 4096 + 17
DATA = random.Random(1).randbytes(SIZE)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(DATA)
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
        assert buffer == DATA[offset : offset + length] + bytes(8)


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
        assert view == DATA[: 3 * MIB]


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
