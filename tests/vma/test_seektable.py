# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archives import encode_seek_table
from vmapipe.vma.errors import ArchiveError, LimitError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    MAX_FRAMES,
    ZSTD_MAGIC,
    Frame,
    parse_seek_table,
    seek_table_bytes,
    seek_table_ends,
    usual_frame_bytes,
)

frames = st.lists(
    st.builds(Frame, st.integers(1, (1 << 32) - 1), st.integers(0, 1 << 30)),
    max_size=50,
)
SEEKABLE_MAGIC = bytes.fromhex("b1ea928f")


@given(frames)
def test_parsing_an_encoded_seek_table_gives_its_frames(table: list[Frame]) -> None:
    raw = encode_seek_table(table)
    assert seek_table_bytes(raw[-FOOTER_BYTES:]) == len(raw)
    assert list(parse_seek_table(raw)) == table


def test_the_bytes_are_those_of_the_seekable_format() -> None:
    raw = encode_seek_table([Frame(0x01020304, 0x05060708)])
    assert raw == bytes.fromhex("5e2a4d18 11000000 04030201 08070605 01000000 00 b1ea928f")


def test_the_usual_frame_is_the_one_that_most_bytes_lie_in() -> None:
    assert usual_frame_bytes([]) == 0
    assert usual_frame_bytes([0]) == 0
    assert usual_frame_bytes([1000] * 7) == 1000
    # As many headers as frames of data, and a short one at the end.
    assert 3_700_000 < usual_frame_bytes([512, 3_800_000] * 50 + [512, 60_000]) < 3_800_000
    # One piece among small ones.
    assert usual_frame_bytes([9000] + [10] * 100) > 8000


def test_a_table_with_checksums_is_read() -> None:
    body = struct.pack("<III", 11, 22, 0xDEADBEEF) * 2 + struct.pack("<IB", 2, 0x80)
    raw = bytes.fromhex("5e2a4d18") + struct.pack("<I", len(body) + 4) + body + SEEKABLE_MAGIC
    assert list(parse_seek_table(raw)) == [Frame(11, 22)] * 2


def test_the_unused_bits_of_the_descriptor_mean_nothing() -> None:
    raw = bytearray(encode_seek_table([Frame(11, 22)]))
    raw[-5] = 0x03
    assert list(parse_seek_table(bytes(raw))) == [Frame(11, 22)]


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        bytes(8),
        bytes(9),
        bytes(10),
        struct.pack("<IB", 1, 0x04) + SEEKABLE_MAGIC,
        struct.pack("<IB", 1, 0x40) + SEEKABLE_MAGIC,
        struct.pack("<IB", MAX_FRAMES + 1, 0) + SEEKABLE_MAGIC,
        struct.pack("<IB", 0xFFFFFFFF, 0x80) + SEEKABLE_MAGIC,
    ],
)
def test_a_file_without_a_seek_table_that_we_know_has_none(footer: bytes) -> None:
    assert seek_table_bytes(footer) is None


@given(frames, st.data())
@settings(max_examples=50)
def test_a_damaged_seek_table_is_refused_or_another_table_and_nothing_worse(
    table: list[Frame], data: st.DataObject
) -> None:
    raw = bytearray(encode_seek_table(table))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        assert len(parse_seek_table(bytes(raw))) == len(table)
    except ArchiveError:
        pass


@pytest.mark.parametrize("cut", [0, 1, 8, 16, 17, 18, 24])
def test_a_seek_table_that_is_cut_off_is_refused(cut: int) -> None:
    raw = encode_seek_table([Frame(1, 2)])
    assert len(raw) == 25
    with pytest.raises(ArchiveError):
        parse_seek_table(raw[:cut])
    with pytest.raises(ArchiveError):
        parse_seek_table(raw[25 - cut :])


def test_a_table_of_more_frames_than_the_format_allows_is_refused() -> None:
    seek_table_ends(MAX_FRAMES)
    with pytest.raises(LimitError):
        seek_table_ends(MAX_FRAMES + 1)


def test_the_zstd_program_reads_a_file_with_a_seek_table(
    need: Callable[..., list[str]], tmp_path: Path
) -> None:
    (zstd,) = need("zstd")
    pieces = [bytes([n]) * 10_000 + b"the end of a frame" for n in range(5)]
    packed = [zstandard.compress(piece) for piece in pieces]
    assert all(frame.startswith(ZSTD_MAGIC) for frame in packed)
    table = [Frame(len(frame), len(piece)) for frame, piece in zip(packed, pieces, strict=True)]
    file = tmp_path / "seekable.zst"
    file.write_bytes(b"".join(packed) + encode_seek_table(table))
    subprocess.run([zstd, "--test", "--quiet", file], check=True, timeout=30)
    plain = subprocess.run([zstd, "-dcq", file], check=True, stdout=subprocess.PIPE, timeout=30)
    assert plain.stdout == b"".join(pieces)
    # And with its help one frame is read alone.
    raw = file.read_bytes()
    size = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert size is not None
    _, _, third, *_ = parse_seek_table(raw[-size:])
    start = sum(frame.compressed_bytes for frame in table[:2])
    assert zstandard.decompress(raw[start : start + third.compressed_bytes]) == pieces[2]
