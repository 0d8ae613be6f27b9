# SPDX-License-Identifier: Apache-2.0
"""Compressed archives that are cut, damaged, or hostile: none is taken for whole, and what is left is read."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.archives import encode_seek_table
from tests.machine import Need
from tests.restore.archive.stored import RAW, STORED, bytes_of, failure_of, read_all
from tests.restore.support import CHANCE, a_cancel, flipped, lzop, one_frame
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.source import Stream, open_source
from vmapipe.vma.seektable import Frame


@pytest.mark.parametrize("kind", ["zstd, one frame", "zstd, frames and notes", "gzip"])
def test_a_compressed_file_that_is_cut_is_never_taken_for_whole(
    kind: str, store: Callable[[bytes], Path]
) -> None:
    data = STORED[kind]
    for length in (len(data) - 1, len(data) - 14, len(data) // 2, len(data) // 3):
        assert "cut off" in failure_of(store(data[:length]), CompressionError)
        assert "cut off" in failure_of(f"exec:cat {store(data[:length])}", CompressionError)


def test_a_file_with_a_seek_table_that_is_cut_is_never_taken_for_whole(
    store: Callable[[bytes], Path],
) -> None:
    data = STORED["zstd, seek table"]
    for length in (len(data) - 1, len(data) - 40, len(data) // 2):
        assert "cut off inside a zstd frame" in failure_of(store(data[:length]), CompressionError)


@pytest.mark.parametrize("kind", ["zstd, one frame", "zstd, frames and notes", "gzip"])
def test_garbage_behind_compressed_data_is_an_error(
    kind: str, store: Callable[[bytes], Path]
) -> None:
    data = STORED[kind]
    text = failure_of(store(data + b"garbage"), CompressionError)
    assert "garbage" in text
    assert "file offset" in text
    if kind != "gzip":
        assert f"(file offset {len(data)})" in text


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind not in ("none", "gzip, padded")])
def test_a_flipped_bit_in_compressed_data_is_an_error(
    kind: str, store: Callable[[bytes], Path]
) -> None:
    data = bytearray(STORED[kind])
    data[len(data) // 3] ^= 0x40
    assert "offset" in failure_of(store(bytes(data)), CompressionError)


def with_window(raw: bytes, log: int) -> bytes:
    """One frame that asks for a window of 1 << log bytes."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(raw) + compressor.flush()


def test_a_window_that_wants_too_much_memory_is_no_damage_and_the_way_out_is_named(
    store: Callable[[bytes], Path],
) -> None:
    text = failure_of(store(with_window(RAW, 28)), InputError)
    assert "was compressed with a zstd window of 256 MiB; up to 128 MiB are taken" in text
    assert "use --zstd-window 256M, or exec:'zstd -dc --long=28 FILE'" in text
    assert "damage" not in text
    # Behind other frames, too.
    late = one_frame(RAW[:100]) + with_window(RAW[100:], 28)
    assert "a zstd window of 256 MiB" in failure_of(f"exec:cat {store(late)}", InputError)


def test_a_window_may_be_as_large_as_was_allowed(store: Callable[[bytes], Path]) -> None:
    options = ReadOptions(max_window_bytes=256 << 20)
    assert bytes_of(store(with_window(RAW, 28)), options) == RAW
    assert bytes_of(f"exec:cat {store(with_window(RAW, 28))}", options) == RAW
    assert bytes_of(store(with_window(RAW, 27))) == RAW


def test_a_window_beyond_what_the_library_can_do_names_the_program(
    store: Callable[[bytes], Path],
) -> None:
    # The window's byte: 1 << (10 + 22) bytes.
    data = bytearray(with_window(RAW, 28))
    assert data[5] == 18 << 3
    data[5] = 22 << 3
    text = failure_of(store(bytes(data)), InputError)
    assert "a zstd window of 4096 MiB" in text
    assert "--zstd-window" not in text


def test_a_dictionary_that_is_missing_is_named(store: Callable[[bytes], Path]) -> None:
    dictionary = zstandard.ZstdCompressionDict(CHANCE.randbytes(3000), dict_type=0)
    named = zstandard.train_dictionary(2000, [CHANCE.randbytes(900) + b"x" * 90] * 80)
    data = zstandard.ZstdCompressor(dict_data=named).compress(RAW)
    assert dictionary.dict_id() == 0
    assert f"a zstd dictionary (number {named.dict_id()})" in failure_of(store(data), InputError)


def salvaged(path: Path) -> list[bytes | CompressionError]:
    """All that comes, with the errors between."""
    found: list[bytes | CompressionError] = []
    with a_cancel() as cancel:
        opened = open_source(str(path), cancel)
        assert isinstance(opened, Stream)
        while True:
            try:
                piece = opened.read(50_001, up_to_damage=True)
            except CompressionError as error:
                found.append(error)
                continue
            if not piece:
                break
            last = found[-1] if found else None
            if isinstance(last, bytes):
                found[-1] = last + piece
            else:
                found.append(piece)
        opened.close()
    return found


@pytest.mark.parametrize(
    "kind", ["frames", "frames and a table", "frames of another maker", "gzip"]
)
@pytest.mark.parametrize("where", ["middle", "start", "end"])
def test_behind_a_damaged_part_the_next_one_is_read(
    kind: str, where: str, store: Callable[[bytes], Path]
) -> None:
    plain = [CHANCE.randbytes(90_000) for _ in range(5)]
    pack: Callable[[bytes], bytes] = gzip.compress if kind == "gzip" else one_frame
    if kind == "frames of another maker":
        pack = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress
    packed = [pack(piece) for piece in plain]
    bad = packed[2]
    at = {"middle": len(bad) // 2, "start": 1, "end": len(bad) - 1}[where]
    data = b"".join([*packed[:2], flipped(bad, at), *packed[3:]])
    if kind == "frames and a table":
        data += encode_seek_table([Frame(len(part), 90_000) for part in packed])
    found = salvaged(store(data))
    errors = [find for find in found if isinstance(find, CompressionError)]
    good = [find for find in found if isinstance(find, bytes)]
    assert len(errors) == 1
    assert errors[0].resumes
    assert not errors[0].cut
    assert b"".join(good).startswith(plain[0] + plain[1])
    assert good[-1] == plain[3] + plain[4]
    if kind == "frames and a table":
        # Nothing of a part that is not sound was handed out, and what is lost is known.
        assert good[0] == plain[0] + plain[1]
        assert (errors[0].lost_bytes, errors[0].unproven_from) == (90_000, None)
    else:
        assert errors[0].unproven_from == 180_000
        if kind == "frames" and where != "start":
            assert errors[0].lost_bytes == 270_000 - len(good[0])


def test_what_is_cut_off_is_told_as_a_cut_and_what_came_before_comes(
    store: Callable[[bytes], Path],
) -> None:
    plain = CHANCE.randbytes(400_000)
    for packed in (one_frame(plain), gzip.compress(plain)):
        found = salvaged(store(packed[: len(packed) // 2]))
        assert isinstance(found[0], bytes)
        assert plain.startswith(found[0])
        assert len(found[0]) > 60_000
        assert isinstance(found[1], CompressionError)
        assert found[1].cut
        assert len(found) == 2


@pytest.mark.parametrize("kind", ["zstd, seek table", "zstd, frames and notes", "gzip", "lzo"])
def test_what_checksums_have_proved_is_counted(
    kind: str, store: Callable[[bytes], Path], need: Need
) -> None:
    data = lzop(need("lzop")[0], RAW) if kind == "lzo" else STORED[kind]
    with a_cancel() as cancel:
        opened = open_source(str(store(data)), cancel)
        assert isinstance(opened, Stream)
        assert read_all(opened) == RAW
        proof = opened.proof
        assert proof is not None
        assert proof.proven_bytes == len(RAW)
        assert proof.parts == proof.parts_with > 0
        opened.close()


def test_a_frame_without_a_checksum_proves_nothing(store: Callable[[bytes], Path]) -> None:
    data = one_frame(RAW[:1000]) + zstandard.ZstdCompressor().compress(RAW[1000:])
    with a_cancel() as cancel:
        opened = open_source(str(store(data)), cancel)
        assert isinstance(opened, Stream)
        read_all(opened)
        assert opened.proof is not None
        assert (opened.proof.proven_bytes, opened.proof.parts) == (1000, 2)
        assert opened.proof.parts_with == 1
        opened.close()


def test_a_bomb_is_read_in_small_pieces(store: Callable[[bytes], Path]) -> None:
    path = store(one_frame(bytes(64 << 20)))
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    try:
        with a_cancel() as cancel:
            opened = open_source(str(path), cancel)
            assert isinstance(opened, Stream)
            assert opened.read(1000) == bytes(1000)
            _, peak = tracemalloc.get_traced_memory()
            opened.close()
    finally:
        tracemalloc.stop()
    # All of it would be 64 MiB; what was decompressed is one buffer's worth.
    assert peak < 8 << 20
