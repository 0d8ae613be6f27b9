# SPDX-License-Identifier: Apache-2.0
"""An archive's bytes come out the same, wherever they come from and however they are stored."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archives import encode_seek_table
from tests.machine import Need
from tests.restore.archive.stored import RAW, STORED, bytes_of, failure_of, read_all
from tests.restore.support import a_cancel, frames_with_table, lzop, one_frame, skippable
from vmapipe.restore.archive.errors import CompressionError
from vmapipe.restore.archive.source import PlainFile, Stream, open_source
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.runtime.errors import Cancelled, UsageError
from vmapipe.vma.seektable import Frame


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
