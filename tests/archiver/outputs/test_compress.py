# SPDX-License-Identifier: Apache-2.0
"""Compressed archives: what zstd reads, and where a reader may jump to."""

from __future__ import annotations

import random
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import zstandard

from tests.archiver.memory import Fault, MemoryOutput
from tests.archiver.outputs.targets import LIMIT_S, decompressed, in_thread
from vmapipe.archiver.outputs import compress
from vmapipe.archiver.outputs.compress import (
    CUT_BYTES,
    FRAME_BYTES,
    Compression,
    ZstdOutput,
)
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    is_cut,
    parse_seek_table,
    seek_table_bytes,
)

MIB = 1 << 20
CHANCE = random.Random(3)
# By level: of an extent's data, the most that a frame holds.
LONGEST = {1: 20 * 65536, 2: 30 * 65536, 3: 30 * 65536, 4: FRAME_BYTES}
# Half of it compresses, half does not.
MIXED = (CHANCE.randbytes(512) + bytes(512)) * (4 * MIB // 1024)


def pieces(count: int) -> list[bytes]:
    """Writes of all lengths, small and large."""
    lengths = [512, 4608, 60_000, MIB, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 512]
    return [MIXED[: lengths[CHANCE.randrange(len(lengths))]] for _ in range(count)]


def compressed(writes: list[bytes], threads: int = 2, level: int = 1) -> tuple[bytes, list[int]]:
    """The stored file, and the length of each write that it got."""
    inner = MemoryOutput()
    output = ZstdOutput(inner, Compression(level=level, threads=threads))
    for data in writes:
        output.write([memoryview(data)[:100], memoryview(data)[100:]])
    output.commit()
    assert inner.committed
    return bytes(inner.data), inner.pieces


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_whole_archive_comes_back_whatever_the_number_of_threads(threads: int) -> None:
    writes = pieces(30)
    raw, _ = compressed(writes, threads)
    assert decompressed(raw) == b"".join(writes)


def test_the_zstd_program_reads_it(need: Callable[..., list[str]]) -> None:
    (zstd,) = need("zstd")
    writes = pieces(8)
    raw, _ = compressed(writes)
    done = subprocess.run([zstd, "-dc"], input=raw, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"".join(writes)


def test_frames_are_independent_checked_and_listed_in_the_seek_table() -> None:
    writes = pieces(40)
    plain = b"".join(writes)
    raw, _ = compressed(writes)
    length = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert length is not None
    frames = parse_seek_table(raw[-length:])
    assert len(frames) > 5
    at = plain_at = 0
    for frame in frames:
        part = raw[at : at + frame.compressed_bytes]
        parameters = zstandard.get_frame_parameters(part)
        assert parameters.has_checksum
        assert parameters.content_size == frame.plain_bytes
        expected = plain[plain_at : plain_at + frame.plain_bytes]
        assert zstandard.ZstdDecompressor().decompress(part) == expected
        at += frame.compressed_bytes
        plain_at += frame.plain_bytes
    assert (at + length, plain_at) == (len(raw), len(plain))


@pytest.mark.parametrize(("level", "least_bytes"), LONGEST.items())
def test_a_frame_of_small_writes_ends_only_where_a_write_ended_and_is_not_short(
    level: int, least_bytes: int
) -> None:
    writes = [data[:MIB] for data in pieces(40)]
    raw, _ = compressed(writes, level=level)
    length = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert length is not None
    ends, at = set(), 0
    for data in writes:
        at += len(data)
        ends.add(at)
    at = 0
    *full, last = parse_seek_table(raw[-length:])
    for frame in full:
        assert least_bytes <= frame.plain_bytes < least_bytes + max(map(len, writes))
        at += frame.plain_bytes
        assert at in ends
    assert at + last.plain_bytes in ends


def test_the_data_of_a_large_extent_is_a_frame_of_its_own() -> None:
    writes = [MIXED[:MIB], MIXED[: CUT_BYTES + 99], MIXED[: CUT_BYTES + 100], MIXED[:512]]
    raw, _ = compressed(writes, level=4)
    length = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert length is not None
    assert is_cut(raw[-FOOTER_BYTES:])
    small = MIB + CUT_BYTES + 99  # its second buffer, behind the first 100 bytes, is too small
    sizes = [frame.plain_bytes for frame in parse_seek_table(raw[-length:])]
    assert sizes == [small, 100, CUT_BYTES, 512]


@pytest.mark.parametrize(
    ("level", "blocks"), [(1, [310, 310, 308]), (2, [464, 464]), (3, [464, 464])]
)
def test_up_to_level_3_it_is_frames_of_about_the_same_length_and_in_whole_blocks(
    level: int, blocks: list[int]
) -> None:
    extent = MIXED[: 100 + 58 * 65536]
    writes = [extent, extent[: 100 + CUT_BYTES + 7]]
    raw, _ = compressed(writes, level=level)
    assert decompressed(raw) == b"".join(writes)
    length = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert length is not None
    sizes = [frame.plain_bytes for frame in parse_seek_table(raw[-length:])]
    half = 257 * 4096
    assert sizes == [100, *(4096 * count for count in blocks), 100, half, CUT_BYTES + 7 - half]
    assert decompressed(raw) == b"".join(writes)


def test_a_kept_frame_is_stored_as_it_is() -> None:
    first, _ = compressed([MIXED[: CUT_BYTES + 100]], level=9)
    length = seek_table_bytes(first[-FOOTER_BYTES:])
    assert length is not None
    header, data = parse_seek_table(first[-length:])
    frame = first[header.compressed_bytes :][: data.compressed_bytes]
    inner = MemoryOutput()
    output = ZstdOutput(inner, Compression(level=1))
    output.write([b"before"])
    output.write_kept(b"header", [compress.Compressed(frame, data.plain_bytes)])
    output.write([b"after"])
    output.commit()
    raw = bytes(inner.data)
    assert decompressed(raw) == b"beforeheader" + MIXED[100 : CUT_BYTES + 100] + b"after"
    assert frame in raw
    plain = compress.decompress(compress.Compressed(frame, data.plain_bytes))
    assert plain == MIXED[100 : CUT_BYTES + 100]
    for wrong in ((frame[:-1], len(plain)), (frame, len(plain) - 1), (frame + b"x", len(plain))):
        with pytest.raises(ValueError, match="zstd"):
            compress.decompress(compress.Compressed(*wrong))


def test_damage_in_a_frame_is_noticed_by_any_reader() -> None:
    raw = bytearray(compressed(pieces(3))[0])
    raw[len(raw) // 2] ^= 1
    with pytest.raises(zstandard.ZstdError):
        decompressed(bytes(raw))


def test_an_empty_archive_is_a_seek_table_only() -> None:
    raw, _ = compressed([])
    assert list(parse_seek_table(raw)) == []
    assert decompressed(raw) == b""


@pytest.mark.parametrize(
    "buffers",
    [[bytes(FRAME_BYTES)], [bytes(512), bytes(FRAME_BYTES)]],
    ids=["together", "a header and its data"],
)
def test_extents_in_the_making_are_bounded_and_no_fewer_where_headers_are_cut(
    buffers: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    compress_frame = ZstdOutput._compress

    def slow(
        output: ZstdOutput, parts: Sequence[bytearray | memoryview | compress.Compressed]
    ) -> list[compress.Compressed]:
        assert go.wait(LIMIT_S)
        return compress_frame(output, parts)

    monkeypatch.setattr(ZstdOutput, "_compress", slow)
    output = ZstdOutput(MemoryOutput(), Compression(threads=2))
    accepted = []

    def write_many() -> None:
        for _ in range(10):
            output.write(buffers)
            accepted.append(1)

    full = threading.Event()
    write_frame = ZstdOutput._write_frame

    def note(output: ZstdOutput) -> None:
        full.set()
        write_frame(output)

    monkeypatch.setattr(ZstdOutput, "_write_frame", note)
    with in_thread(write_many) as errors:
        assert full.wait(LIMIT_S)
        assert len(accepted) == 2 + compress._SPARE_FRAMES
        go.set()
    assert errors == []
    output.commit()


def test_a_failure_below_comes_through(memory: Callable[..., MemoryOutput]) -> None:
    output = ZstdOutput(memory(Fault(2)), Compression(threads=2))
    # Which write meets it is up to the threads.
    with pytest.raises(Failure, match="a planned fault"):
        deque(map(output.write, [[bytes(FRAME_BYTES)]] * 20), maxlen=0)
    output.abandon()


def test_a_failure_of_the_last_frames_fails_the_commit(
    memory: Callable[..., MemoryOutput],
) -> None:
    inner = memory(Fault(1))
    output = ZstdOutput(inner, Compression())
    output.write([b"data"])
    with pytest.raises(Failure, match="a planned fault"):
        output.commit()
    output.abandon()
    assert inner.abandoned


@pytest.mark.parametrize(("level", "threads"), [(0, 1), (20, 1), (-1, 1), (3, 0)])
def test_levels_and_threads_have_their_bounds(level: int, threads: int) -> None:
    with pytest.raises(UsageError):
        ZstdOutput(MemoryOutput(), Compression(level, threads))


@pytest.mark.parametrize("level", [1, 3, 19])
def test_the_level_is_the_one_that_was_asked_for(level: int) -> None:
    text = b"".join(b"line %d of a log, %d\n" % (i, i * i) for i in range(20_000))
    expected = zstandard.ZstdCompressor(level=level, write_checksum=True).compress(text)
    assert compressed([text], level=level)[0].startswith(expected)
