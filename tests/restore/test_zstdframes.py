# SPDX-License-Identifier: Apache-2.0
"""Frames' headers are read, and their blocks walked along, however the bytes come."""

from __future__ import annotations

from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.restore.support import CHANCE, one_frame, skippable
from vmapipe.restore.archive.errors import CompressionError
from vmapipe.restore.archive.zstdframes import (
    MAX_HEADER_BYTES,
    FrameWalk,
    frame_header,
    is_zstd,
)
from vmapipe.vma.seektable import ZSTD_MAGIC

DATA = CHANCE.randbytes(200_000) + bytes(300_000)
FRAMES = [
    one_frame(DATA),
    one_frame(b""),
    zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:100]),
    zstandard.ZstdCompressor(level=19).compress(b"x" * 70_000),
    zstandard.ZstdCompressor(write_checksum=True).compress(b"y" * 300),
]


def walk(data: bytes, cuts: list[int]) -> tuple[FrameWalk, int]:
    """Walk along the first frame of `data`, which comes in pieces; how much of it was taken."""
    header = frame_header(data[:MAX_HEADER_BYTES])
    assert header is not None
    walker = FrameWalk("it", header, 0)
    taken = 0
    for start, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        taken += walker.feed(data[start:end])
    return walker, taken


@given(st.sampled_from(FRAMES), st.binary(max_size=20), st.lists(st.integers(0, 300_000)))
def test_a_frame_ends_where_it_ends_however_it_is_cut(
    frame: bytes, more: bytes, cuts: list[int]
) -> None:
    walker, taken = walk(frame + more, cuts)
    assert walker.ended
    assert taken == len(frame)


@given(st.sampled_from(FRAMES), st.data())
def test_a_frame_that_is_cut_anywhere_has_not_ended(frame: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(MAX_HEADER_BYTES, len(frame) - 1) if len(frame) > 18 else st.just(9))
    walker, taken = walk(frame[:at], [])
    assert not walker.ended
    assert taken == at


@pytest.mark.parametrize("frame", FRAMES)
def test_a_header_tells_what_the_library_does(frame: bytes) -> None:
    header = frame_header(frame[:MAX_HEADER_BYTES])
    assert header is not None
    known = zstandard.get_frame_parameters(frame)
    unknown = known.content_size == (1 << 64) - 1
    assert header.plain_bytes == (None if unknown else known.content_size)
    assert header.has_checksum == known.has_checksum
    assert header.dictionary_id == known.dict_id
    assert max(1024, header.window_bytes) == max(1024, known.window_size)
    # Fewer bytes are never taken for the whole header.
    assert all(frame_header(frame[:n]) is None for n in range(1, header.header_bytes))


def test_what_cannot_be_a_block_is_found_at_its_place() -> None:
    frame = bytearray(FRAMES[0])
    header = frame_header(bytes(frame[:MAX_HEADER_BYTES]))
    assert header is not None
    frame[header.header_bytes] |= 6
    walker = FrameWalk("it", header, 1000)
    with pytest.raises(CompressionError) as caught:
        walker.feed(bytes(frame))
    assert caught.value.file_offset == 1000 + header.header_bytes
    assert caught.value.sound_bytes == header.header_bytes


@pytest.mark.parametrize("start", [b"VMA\0\0", b"\x28\xb5\x2f\xfe\0", ZSTD_MAGIC + b"\x08"])
def test_what_is_no_frame_is_not_taken_for_one(start: bytes) -> None:
    with pytest.raises(ValueError, match="zstd frame"):
        frame_header(start)


def test_only_zstd_looks_like_zstd() -> None:
    assert all(is_zstd(frame) for frame in [*FRAMES, skippable(b"a note"), skippable(b"")])
    assert not any(map(is_zstd, (b"", b"\x28\xb5", b"VMA\0", b"\x60\x2a\x4d\x18")))
