# SPDX-License-Identifier: Apache-2.0
"""zstd frames of another library are read to their ends, and no further, however they are cut."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.restore.support import CHANCE, one_frame, skippable
from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.parts import Rewindable
from vmapipe.restore.archive.zstd import (
    DEFAULT_WINDOW_BYTES,
    FrameReader,
    ZstdFrame,
    ZstdParts,
    decompress_frame,
    decompress_start,
)
from vmapipe.vma.seektable import ZSTD_MAGIC, is_zstd

DATA = CHANCE.randbytes(200_000) + bytes(300_000)
PLAIN = [DATA, b"", DATA[:100], b"x" * 70_000, b"y" * 300]
FRAMES = [
    one_frame(DATA),
    one_frame(b""),
    zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:100]),
    zstandard.ZstdCompressor(level=19).compress(b"x" * 70_000),
    zstandard.ZstdCompressor(write_checksum=True).compress(b"y" * 300),
]


def begun(data: bytes, window_bytes: int = DEFAULT_WINDOW_BYTES) -> tuple[ZstdFrame, Rewindable]:
    source = Rewindable(io.BytesIO(data))
    frame = ZstdParts(window_bytes).begin(source, "it")
    assert frame is not None
    return frame, source


def rest_of(frame: ZstdFrame, step: int = 1 << 16) -> bytes:
    plain = b""
    view = memoryview(bytearray(step))
    while got := frame.readinto(view):
        plain += view[:got]
    return plain


@given(
    st.sampled_from(range(len(FRAMES))),
    st.sampled_from(["", "note", "empty note"]),
    st.binary(max_size=20),
    st.integers(1000, 1 << 18),
)
def test_a_frame_ends_where_it_ends_whatever_stands_around_it(
    number: int, in_front: str, more: bytes, step: int
) -> None:
    notes = {"": b"", "note": skippable(b"x" * 300_000), "empty note": skippable(b"")}[in_front]
    frame, source = begun(notes + FRAMES[number] + more)
    assert rest_of(frame, step) == PLAIN[number]
    assert source.position == len(notes) + len(FRAMES[number])
    assert source.read() == more


@given(st.sampled_from(FRAMES), st.data())
def test_a_frame_that_is_cut_anywhere_is_a_cut_and_no_damage(
    frame: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, len(frame) - 1))
    with pytest.raises(CompressionError, match="cut off inside a zstd frame") as caught:
        rest_of(begun(frame[:at])[0])
    assert caught.value.cut
    assert caught.value.file_offset == at


def test_a_skippable_frame_that_is_cut_is_a_cut() -> None:
    for at in (4, 7, 8, 20):
        with pytest.raises(CompressionError, match="cut off inside a zstd frame"):
            begun(skippable(b"x" * 100)[:at])


@pytest.mark.parametrize("frame", FRAMES)
def test_a_header_tells_what_another_library_does(frame: bytes) -> None:
    known = zstandard.get_frame_parameters(frame)
    found, _ = begun(frame)
    unknown = known.content_size == (1 << 64) - 1
    assert found.plain_bytes == (None if unknown else known.content_size)
    assert found.has_checksum == known.has_checksum


@given(st.integers(10, 31), st.integers(0, 7))
def test_a_window_is_refused_above_the_limit_and_read_below_it(log: int, eighths: int) -> None:
    """Whatever it is: the size stands in one byte of the header."""
    window = (1 << log) + (1 << log) // 8 * eighths
    frame = bytearray(FRAMES[2])
    assert not frame[4] & 0x20
    frame[5] = log - 10 << 3 | eighths
    with pytest.raises(InputError, match="was compressed with a zstd window of"):
        begun(bytes(frame), window - 1)
    if window <= 1 << 31:
        assert begun(bytes(frame), window)[0].plain_bytes is None


@given(st.binary(max_size=30))
def test_any_bytes_behind_the_magic_are_a_frame_or_an_error_of_ours(more: bytes) -> None:
    try:
        rest_of(begun(ZSTD_MAGIC + more)[0])
    except (CompressionError, InputError):
        pass
    ZstdParts(DEFAULT_WINDOW_BYTES).find(more + ZSTD_MAGIC + more, 0)


@pytest.mark.parametrize("start", [b"VMA\0\0", b"\x28\xb5\x2f\xfe\0", ZSTD_MAGIC + b"\x08"])
def test_what_is_no_frame_is_not_taken_for_one(start: bytes) -> None:
    with pytest.raises(CompressionError, match="zstd frame"):
        begun(start + bytes(20))


def test_a_frame_of_a_table_is_taken_whole_or_not_at_all() -> None:
    frame = FRAMES[0]
    assert decompress_frame(frame, len(DATA)) == DATA
    flipped = bytearray(frame)
    flipped[-1] ^= 1  # its checksum
    for data, length in (
        (frame, len(DATA) - 1),
        (frame, len(DATA) + 1),
        (frame[:-1], len(DATA)),
        (frame + b"x", len(DATA)),
        (bytes(flipped), len(DATA)),
        (b"garbage", 7),
    ):
        with pytest.raises(ValueError, match="zstd"):
            decompress_frame(data, length)


def test_a_frames_start_costs_no_more_than_the_start() -> None:
    taken = []

    def pieces(data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), 1000):
            taken.append(at)
            yield data[at : at + 1000]

    assert decompress_start(pieces(FRAMES[0]), 100) == DATA[:100]
    assert len(taken) <= 132  # zstd's blocks hold up to 128 KiB
    assert decompress_start(pieces(FRAMES[4]), 1000) == PLAIN[4]
    with pytest.raises(ValueError, match="damaged"):
        decompress_start(pieces(b"garbage"), 5)


def test_only_zstd_looks_like_zstd() -> None:
    assert all(is_zstd(frame) for frame in [*FRAMES, skippable(b"a note"), skippable(b"")])
    assert not any(map(is_zstd, (b"", b"\x28\xb5", b"VMA\0", b"\x60\x2a\x4d\x18")))


def pieces(frame: bytes, size: int) -> Iterator[bytes]:
    return (frame[at : at + size] for at in range(0, len(frame), size))


@given(st.lists(st.integers(0, len(DATA)), max_size=8), st.integers(1, 70_000))
def test_a_frame_is_decompressed_as_far_as_asked_and_goes_on_from_there(
    ends: list[int], size: int
) -> None:
    frame = FRAMES[0]
    reader = FrameReader(pieces(frame, size), len(DATA))
    for end in ends:
        reader.go_to(end)
        assert reader.done_bytes >= end
        view = memoryview(bytearray(end - end // 3))
        reader.copy_to(view, end // 3)
        assert view == DATA[end // 3 : end]


def test_a_frame_that_is_damaged_or_of_another_length_is_told_at_its_end() -> None:
    frame = FRAMES[0]
    for length in (len(DATA) - 1, len(DATA) + 1):
        with pytest.raises(ValueError, match="as long as"):
            FrameReader(pieces(frame, 5000), length).go_to(length)
    for wrong in (frame[:-1], frame + b"x", frame[:-4] + bytes(4)):
        with pytest.raises(ValueError, match="zstd"):
            FrameReader(pieces(wrong, 5000), len(DATA)).go_to(len(DATA))
