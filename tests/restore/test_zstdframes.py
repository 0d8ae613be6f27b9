# SPDX-License-Identifier: Apache-2.0
"""Frames are walked along, however the bytes come."""

from __future__ import annotations

from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.restore.support import CHANCE, one_frame, skippable
from vmapipe.restore.archive.zstdframes import FrameWalk, is_zstd
from vmapipe.restore.errors import CompressionError

DATA = CHANCE.randbytes(200_000) + bytes(300_000)
FRAMES = [
    one_frame(DATA),
    one_frame(b""),
    skippable(b"a note"),
    skippable(b""),
    zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:100]),
    zstandard.ZstdCompressor(level=19).compress(b"x" * 70_000),
]


def walk(data: bytes, cuts: list[int]) -> FrameWalk:
    walker = FrameWalk("it")
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        walker.feed(data[start:end])
    return walker


@given(
    st.lists(st.sampled_from(FRAMES), min_size=1, max_size=5),
    st.lists(st.integers(0, 300_000), max_size=6),
)
def test_whole_frames_are_sound_however_they_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    data = b"".join(frames)
    walker = walk(data, [min(cut, len(data)) for cut in cuts])
    walker.finish()
    assert (walker.position, walker.frames) == (len(data), len(frames))


@given(st.lists(st.sampled_from(FRAMES), min_size=1, max_size=3), st.data())
def test_a_file_that_is_cut_anywhere_but_between_frames_is_found_out(
    frames: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(frames)
    at = data.draw(st.integers(1, len(whole) - 1))
    ends = {sum(map(len, frames[:n])) for n in range(len(frames) + 1)}
    walker = walk(whole[:at], [])
    if at in ends:
        walker.finish()
    else:
        with pytest.raises(CompressionError, match=rf"cut off .*\(file offset {at}\)"):
            walker.finish()


@given(st.sampled_from(FRAMES), st.integers(0, 3), st.lists(st.integers(0, 300_000), max_size=3))
def test_garbage_behind_a_frame_is_found_at_its_place(
    frame: bytes, known: int, cuts: list[int]
) -> None:
    data = frame + b"garbage, not a frame"
    walker = walk(data, [min(cut, len(data)) for cut in cuts])
    with pytest.raises(CompressionError, match=rf"garbage .*\(file offset {len(frame)}\)"):
        walker.finish()


def test_feed_tells_how_much_is_sound() -> None:
    walker = FrameWalk("it")
    assert walker.feed(FRAMES[0] + b"\0" * 100) == len(FRAMES[0])
    assert walker.feed(b"more") == 0


def test_only_zstd_looks_like_zstd() -> None:
    assert all(is_zstd(frame) for frame in FRAMES)
    assert not any(map(is_zstd, (b"", b"\x28\xb5", b"VMA\0", b"\x60\x2a\x4d\x18")))
