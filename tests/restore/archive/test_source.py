# SPDX-License-Identifier: Apache-2.0
"""An archive's bytes come out the same, wherever they come from and however they are stored."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.archives import archive
from tests.machine import Need
from tests.restore.support import (
    CHANCE,
    CONFIGS,
    DISKS,
    a_cancel,
    flipped,
    frames_and_notes,
    frames_with_table,
    lzop,
    members,
    one_frame,
    skippable,
)
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.source import PlainFile, Source, Stream, open_source
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.runtime.errors import Cancelled, UsageError
from vmapipe.vma.seektable import Frame, encode_seek_table

RAW = archive(DISKS, CONFIGS)

STORED = {
    "none": RAW,
    "zstd, one frame": one_frame(RAW),
    "zstd, frames and notes": frames_and_notes(RAW),
    "zstd, seek table": frames_with_table(RAW),
    "gzip": members(RAW),
    "gzip, padded": members(RAW) + bytes(1000),
}


def read_all(opened: Source) -> bytes:
    if isinstance(opened, PlainFile):
        return opened.pread(opened.size_bytes + 10, 0)
    pieces = []
    while piece := opened.read(50_001):
        pieces.append(piece)
    return b"".join(pieces)


def bytes_of(name: str | Path, options: ReadOptions | None = None) -> bytes:
    with a_cancel() as cancel:
        opened = open_source(str(name), cancel, options)
        try:
            return read_all(opened)
        finally:
            opened.close()


def failure_of(name: str | Path, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        bytes_of(name)
    return str(caught.value)


@pytest.fixture
def store(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        # The name says nothing: what counts is the content.
        path = tmp_path / "archive.bin"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("kind", STORED)
def test_a_file_is_recognised_by_its_content(kind: str, store: Callable[[bytes], Path]) -> None:
    path = store(STORED[kind])
    with a_cancel() as cancel:
        opened = open_source(str(path), cancel)
        assert opened.compression == kind.split(",")[0]
        assert opened.path == str(path)
        assert read_all(opened) == RAW
        opened.close()


@pytest.mark.parametrize("kind", STORED)
def test_a_command_a_descriptor_and_a_fifo_give_the_same_bytes(
    kind: str, store: Callable[[bytes], Path], tmp_path: Path
) -> None:
    path = store(STORED[kind])
    assert bytes_of(f"exec:cat {path}") == RAW
    with path.open("rb") as file:
        assert bytes_of(f"fd:{file.fileno()}") == RAW
        file.seek(0)
        assert bytes_of(f"/dev/fdset/{file.fileno()}") == RAW
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(STORED[kind]))
    writer.start()
    assert bytes_of(fifo) == RAW
    writer.join()


def test_lzo_comes_through_lzop_from_a_file_and_from_a_pipe(
    store: Callable[[bytes], Path], need: Need
) -> None:
    (program,) = need("lzop")
    path = store(lzop(program, RAW))
    assert bytes_of(path) == RAW
    assert bytes_of(f"exec:cat {path}") == RAW


def test_a_descriptor_in_the_middle_of_a_file_is_read_from_there_on(
    store: Callable[[bytes], Path],
) -> None:
    with store(b"in front" + RAW).open("rb", buffering=0) as file:
        file.seek(8)
        assert bytes_of(f"fd:{file.fileno()}") == RAW


def test_stdin_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup", lambda number: os.open("/", os.O_RDONLY))
    assert failure_of("-") == "standard input is a folder, not an archive"


def test_only_a_plain_file_can_be_read_anywhere(store: Callable[[bytes], Path]) -> None:
    with a_cancel() as cancel:
        for name, kind in ((str(store(RAW)), PlainFile), (f"exec:cat {store(RAW)}", Stream)):
            opened = open_source(name, cancel)
            assert isinstance(opened, kind)
            opened.close()


def test_a_seek_table_is_used_only_when_it_can_be_true(store: Callable[[bytes], Path]) -> None:
    good = frames_with_table(RAW)
    frame = one_frame(RAW)
    liar = frame + encode_seek_table([Frame(len(frame) - 1, len(RAW))])
    huge = frame + encode_seek_table([Frame(len(frame), 1 << 30)])
    # A table of a hundred thousand frames that hold nothing would be minutes of work.
    nothing = one_frame(b"")
    hollow = (
        nothing + frame + encode_seek_table([Frame(len(nothing), 0), Frame(len(frame), len(RAW))])
    )
    cases = ((good, True), (liar, False), (huge, False), (hollow, False), (b"x" + good, False))
    for data, by_table in cases:

        def pread(length: int, offset: int, data: bytes = data) -> bytes:
            return data[offset : offset + length]

        assert (seekable_frames(pread, len(data), ()) is not None) == by_table
    assert bytes_of(store(good)) == RAW
    assert bytes_of(store(liar)) == RAW
    assert bytes_of(store(huge)) == RAW
    assert bytes_of(store(hollow)) == RAW


def test_a_seek_table_that_lies_about_plain_sizes_is_damage(
    store: Callable[[bytes], Path],
) -> None:
    frame = one_frame(RAW)
    for lie in (-1, 1):
        path = store(frame + encode_seek_table([Frame(len(frame), len(RAW) + lie)]))
        assert "not as long as its seek table says" in failure_of(path, CompressionError)


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


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xfd7zXZ\0", "compressed with xz, which is not known here"),
        (b"BZh91AY", "exec:'bzip2 -dc FILE'"),
        (b"\x04\x22\x4d\x18", "lz4 -dc"),
    ],
)
def test_other_compressions_are_named_with_a_way_out(
    start: bytes, words: str, store: Callable[[bytes], Path]
) -> None:
    assert words in failure_of(store(start + bytes(100)))
    assert words in failure_of(f"exec:cat {store(start + bytes(100))}")


def test_what_is_no_file_is_refused_in_words(tmp_path: Path) -> None:
    assert "is a folder, not an archive" in failure_of(tmp_path)
    assert "No such file or directory" in failure_of(tmp_path / "absent")
    assert "Bad file descriptor" in failure_of("fd:987")
    for number in ("x", "", "-1", "+1", "9" * 10, "9" * 5000, "\u0663"):
        assert "not a descriptor's number" in failure_of(f"fd:{number}", UsageError)
    assert "without a command" in failure_of("exec:", UsageError)


def test_a_commands_failure_counts_even_when_all_bytes_came(
    store: Callable[[bytes], Path],
) -> None:
    path = store(RAW)
    assert "ended with exit status 3" in failure_of(f"exec:cat {path}; exit 3")
    assert "was killed by SIGKILL" in failure_of(f"exec:cat {path}; kill -9 $$")
    assert "ended with exit status 127" in failure_of("exec:no-such-program-here")


def test_damaged_lzo_data_is_an_error_with_what_lzop_says(
    store: Callable[[bytes], Path], need: Need
) -> None:
    (program,) = need("lzop")
    data = lzop(program, RAW)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (data[: len(data) // 2], data + b"garbage", bytes(flipped)):
        text = failure_of(store(damaged), CompressionError)
        assert "the lzo data is damaged or cut off: lzop ended with exit status" in text


def test_a_missing_lzop_is_named(
    store: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, need: Need
) -> None:
    (program,) = need("lzop")
    path = store(lzop(program, RAW))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "the program lzop is not installed" in failure_of(path)


def test_a_failing_command_in_front_of_lzop_is_the_one_that_is_blamed(
    store: Callable[[bytes], Path], need: Need
) -> None:
    (program,) = need("lzop")
    path = store(lzop(program, RAW))
    assert "ended with exit status 5" in failure_of(f"exec:cat {path}; exit 5")


def test_waiting_for_a_silent_pipe_ends_when_a_stop_is_asked_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with a_cancel() as cancel:
        cancel.ask("enough")
        for name in (str(fifo), "exec:read line </dev/tty || exec tail -f /dev/null"):
            with pytest.raises(Cancelled, match="enough"):
                open_source(name, cancel)


def test_a_reader_that_waits_for_data_is_stopped_by_another_thread(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, RAW[:20_000])
    ended: list[BaseException] = []
    with a_cancel() as cancel:
        opened = open_source(f"fd:{reading}", cancel)
        assert isinstance(opened, Stream)
        stream = opened

        def read() -> None:
            try:
                stream.read(30_000)
            except Cancelled as error:
                ended.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        stream.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert len(ended) == 1
        stream.close()
    os.close(reading)
    os.close(writing)


def test_closing_early_ends_the_command(need: Need) -> None:
    with a_cancel() as cancel:
        opened = open_source("exec:cat /dev/zero", cancel)
        assert isinstance(opened, Stream)
        opened.read(100_000)
        opened.close()
    # The fixture for all tests finds it if it still runs.


# Like restic: writes all the time, needs a moment to unlock when it is interrupted, and dies at once
# when nobody reads.
LOCKED = """
import os, pathlib, signal, sys, threading
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
lock = pathlib.Path(sys.argv[1])
lock.touch()
def unlock(*_):
    threading.Event().wait(0.3)
    lock.unlink()
    os._exit(0)
signal.signal(signal.SIGINT, unlock)
def write():
    while True:
        os.write(1, b"x" * 4096)
threading.Thread(target=write, daemon=True).start()
while True:
    signal.pause()
"""


def test_closing_early_lets_each_program_of_a_pipeline_end_in_order(
    store: Callable[[bytes], Path], tmp_path: Path
) -> None:
    lock = tmp_path / "lock"
    command = f"exec:{sys.executable} {store(LOCKED.encode())} {lock} | cat | cat"
    with a_cancel() as cancel:
        opened = open_source(command, cancel)
        assert isinstance(opened, Stream)
        opened.read(1_000_000)
        assert lock.exists()
        opened.close()
    assert not lock.exists()


def test_closing_early_ends_lzop_that_is_fed(store: Callable[[bytes], Path], need: Need) -> None:
    (program,) = need("lzop")
    path = store(lzop(program, RAW * 20))
    with a_cancel() as cancel:
        opened = open_source(f"exec:cat {path}; tail -f /dev/null", cancel)
        assert isinstance(opened, Stream)
        assert opened.read(1000) == RAW[:1000]
        opened.close()


def test_the_zstd_program_reads_what_the_test_compresses(
    store: Callable[[bytes], Path], need: Need
) -> None:
    (zstd,) = need("zstd")
    for kind in ("zstd, seek table", "zstd, frames and notes"):
        done = subprocess.run([zstd, "-dc", store(STORED[kind])], capture_output=True, check=True)
        assert done.stdout == RAW
    packed = subprocess.run([zstd, "-c", "--long=27"], input=RAW, capture_output=True, check=True)
    assert bytes_of(store(skippable(b"x") + packed.stdout)) == RAW
