# SPDX-License-Identifier: Apache-2.0
"""Streams: FIFOs, sockets, devices, inherited descriptors and standard output."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.archiver.outputs.targets import LIMIT_S, Reader, in_thread
from vmapipe.archiver.outputs import stream
from vmapipe.archiver.outputs.base import Output, OutputFailure
from vmapipe.archiver.outputs.open import open_output
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, UsageError

TOO_MUCH = bytes(8 << 20)


# --- readers that come late, go early, or never come ---


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an open has found nobody at the far end."""
    event = threading.Event()
    system_open = os.open

    def noting(*words: Any, **options: Any) -> int:
        try:
            return system_open(*words, **options)
        except OSError as error:
            if error.errno == errno.ENXIO:
                event.set()
            raise

    monkeypatch.setattr(os, "open", noting)
    return event


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return str(path)


def test_a_fifo_waits_for_a_reader_that_comes_late(fifo: str, refused: threading.Event) -> None:
    outputs: list[Output] = []
    with in_thread(lambda: outputs.append(open_output(fifo))) as errors:
        assert refused.wait(LIMIT_S)
        reader = Reader(lambda: os.open(fifo, os.O_RDONLY))
    assert errors == []
    outputs[0].write([b"data"])
    outputs[0].commit()
    assert reader.data() == b"data"


def test_a_fifo_that_nobody_reads_is_an_error_in_the_end(fifo: str) -> None:
    with pytest.raises(OutputFailure, match=r"nobody reads the FIFO .*fifo: waited 0 s; start its"):
        stream.open_fifo(fifo, wait_s=0)


def test_waiting_for_a_fifos_reader_can_be_cancelled(fifo: str, refused: threading.Event) -> None:
    cancel = Cancel()
    with in_thread(lambda: open_output(fifo, cancel=cancel).abandon()) as errors:
        assert refused.wait(LIMIT_S)
        cancel.ask("cancelled by a test")
    cancel.close()
    assert [type(error) for error in errors] == [Cancelled]


def test_a_reader_that_goes_away_is_named_as_the_reason() -> None:
    theirs, ours = os.pipe()
    output = open_output(f"fd:{ours}")
    output.write([b"data"])
    os.close(theirs)
    with pytest.raises(OutputFailure) as caught:
        output.write([b"more"])
    assert str(caught.value) == (
        f"cannot write fd:{ours}: whoever read the archive has closed it, after 4 bytes"
    )
    assert caught.value.errno == errno.EPIPE
    output.abandon()


def test_a_reader_that_goes_away_ends_a_write_that_waits() -> None:
    theirs, ours = socket.socketpair()
    output = open_output(f"fd:{ours.detach()}")
    with in_thread(lambda: output.write([TOO_MUCH])) as errors:
        assert theirs.recv(1, socket.MSG_WAITALL)
        theirs.close()
    assert ["whoever read the archive has closed it" in str(error) for error in errors] == [True]
    output.abandon()


def test_a_pipe_whose_reader_has_gone_already_is_an_error_at_the_first_write() -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    output = open_output(f"fd:{ours}")
    with pytest.raises(OutputFailure, match="whoever read the archive has closed it"):
        output.write([b"data"])
    output.abandon()


def test_a_socket_where_nobody_listens_is_an_error_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    with pytest.raises(OutputFailure, match=r"nobody listens at the socket .*; start its reader"):
        open_output(path)


def test_a_listener_that_takes_nobody_is_an_error_in_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = stream.connect(path)
        with pytest.raises(OutputFailure, match="took no connection for 0 s"):
            stream.connect(path, wait_s=0)
        first.abandon()


# --- descriptors that others share with us ---


def test_an_inherited_pipe_does_not_become_non_blocking_for_others() -> None:
    theirs, ours = os.pipe()
    shared = os.dup(ours)
    output = open_output(f"fd:{ours}")
    assert os.get_blocking(shared)
    output.abandon()
    os.close(shared)
    os.close(theirs)


def test_a_socket_does_not_become_non_blocking_for_others() -> None:
    theirs, ours = socket.socketpair()
    shared = ours.dup()
    output = open_output(f"fd:{ours.detach()}")
    output.write([b"data"])
    assert os.get_blocking(shared.fileno())
    output.abandon()
    shared.close()
    theirs.close()


def test_a_descriptor_given_to_us_is_closed_at_the_end() -> None:
    theirs, ours = os.pipe()
    open_output(f"fd:{ours}").commit()
    assert os.read(theirs, 1) == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)
    os.close(theirs)


def test_a_descriptor_given_to_us_is_not_inherited_further() -> None:
    theirs, ours = os.pipe()
    os.set_inheritable(ours, True)
    output = open_output(f"/dev/fdset/{ours}")
    assert not os.get_inheritable(ours)
    output.abandon()
    os.close(theirs)


def test_a_pipe_that_cannot_be_opened_anew_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system_open = os.open

    def forbidden(path: Any, *words: Any, **options: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "a pipe of another user")
        return system_open(path, *words, **options)

    monkeypatch.setattr(os, "open", forbidden)
    theirs, ours = os.pipe()
    reader = Reader(lambda: theirs)
    output = open_output(f"fd:{ours}")
    with in_thread(lambda: output.write([TOO_MUCH])):
        reader.start()
    output.commit()
    assert reader.data() == TOO_MUCH


def test_a_file_that_somebody_else_writes_too_is_not_cut_when_abandoned(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    with path.open("ab") as file:
        output = open_output(f"fd:{os.dup(file.fileno())}")
        output.write([b"ours"])
        file.write(b"theirs")
        file.flush()
        output.abandon()
    assert path.read_bytes() == b"ourstheirs"


# --- what is no place for an archive ---


@pytest.mark.parametrize("spec", ["fd:", "fd:x", "fd:-1", "fd:+1", "fd: 1", "fd:1e3", "fd:٣"])
def test_a_descriptor_is_a_plain_number(spec: str) -> None:
    with pytest.raises(UsageError, match="after fd: comes the number of an open descriptor"):
        open_output(spec)


@pytest.mark.parametrize("number", [987654, 999999999])
def test_a_descriptor_that_is_not_open_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match=f"fd:{number}: descriptor {number} is not open"):
        open_output(f"fd:{number}")


def refused_and_still_open(number: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_output(f"fd:{number}")
    os.fstat(number)


def test_a_descriptor_for_reading_is_refused() -> None:
    theirs, ours = os.pipe()
    refused_and_still_open(theirs, "is open for reading only")
    os.close(theirs)
    os.close(ours)


def test_a_socket_for_datagrams_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        refused_and_still_open(end.fileno(), "a socket that is not a stream")


def test_a_terminal_is_refused() -> None:
    ours, theirs = pty.openpty()
    refused_and_still_open(theirs, "is a terminal")
    with pytest.raises(UsageError, match=r"/dev/pts/\d+ is a terminal: send it to a file or a pro"):
        open_output(os.ttyname(theirs))
    os.close(ours)
    os.close(theirs)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        open_output(str(tmp_path))


def test_a_block_device_is_refused() -> None:
    devices = [
        entry.path
        for entry in os.scandir("/dev")
        if stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode)
    ]
    if not devices:
        pytest.skip("no block device here")
    with pytest.raises(UsageError, match="is a block device: an archive would overwrite what"):
        open_output(devices[0])


def test_dev_null_takes_everything() -> None:
    output = open_output("/dev/null")
    output.write([TOO_MUCH])
    assert output.written_bytes == len(TOO_MUCH)
    assert output.is_stream
    output.commit()


def test_a_full_device_is_an_error() -> None:
    output = open_output("/dev/full")
    with pytest.raises(OutputFailure, match="/dev/full: No space left on device after 0 bytes"):
        output.write([b"data"])
    output.abandon()


# --- standard output ---

PROGRAM = """
import sys
from vmapipe.archiver.outputs.open import open_output
output = open_output("-")
output.write([b"the archive"])
getattr(output, sys.argv[1])()
"""


def on_stdout(end: str, stdout: int) -> None:
    subprocess.run([sys.executable, "-P", "-c", PROGRAM, end], stdout=stdout, check=True)


@pytest.mark.parametrize(("end", "left"), [("commit", b"the archive"), ("abandon", b"")])
def test_a_shells_file_has_the_whole_archive_or_nothing(
    tmp_path: Path, end: str, left: bytes
) -> None:
    path = tmp_path / "redirected"
    with path.open("wb") as file:
        on_stdout(end, file.fileno())
    assert path.read_bytes() == left


def test_a_shells_pipe_gets_the_archive() -> None:
    theirs, ours = os.pipe()
    on_stdout("commit", ours)
    os.close(ours)
    assert os.read(theirs, 100) == b"the archive"
    os.close(theirs)


def test_a_file_on_standard_output_is_on_disk_after_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fd = os.open(tmp_path / "open", os.O_WRONLY | os.O_CREAT)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    inode = os.fstat(fd).st_ino
    open_output(f"fd:{fd}").commit()
    assert synced == [inode]


def test_pipes_are_made_as_long_as_they_may_be() -> None:
    theirs, ours = os.pipe()
    output = open_output(f"fd:{ours}")
    limit = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    assert fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ) == min(limit, stream.PIPE_BYTES)
    output.abandon()
    os.close(theirs)
