# SPDX-License-Identifier: Apache-2.0
"""What somebody may have put where a small file of ours should be: nothing waits, nothing leads away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, bad, good, listens, make_disk, run
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled
from vmapipe.runtime.side_files import open_new, open_regular, open_to_append, read_awaited

NOBODY = 65534


def put(kind: str, path: Path) -> None:
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")


KINDS = ("FIFO", "folder", "socket", "device")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    disk = make_disk(tmp_path / "disk", "AA0")
    good("backup", "--disk", f"d={disk}", tmp_path / "vm.vma")
    return tmp_path / "vm.vma"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["verify", "restore"])
def test_what_stands_in_a_manifests_place_is_told_in_one_line_and_waited_for_by_nobody(
    archive: Path, tmp_path: Path, kind: str, command: str
) -> None:
    manifest = Path(f"{archive}.manifest.json")
    manifest.unlink()
    put(kind, manifest)
    words = [tmp_path / "out"] if command == "restore" else []
    text = bad(command, archive, *words)
    assert "cannot open the manifest" in text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["verify", "restore"])
def test_a_manifest_that_is_a_pipe_without_a_writer_does_not_make_a_command_deaf(
    archive: Path, tmp_path: Path, command: str, signum: int
) -> None:
    os.mkfifo(tmp_path / "fifo")
    words = [*VMAPIPE, command, "--manifest", tmp_path / "fifo", archive]
    words += [tmp_path / "out"] if command == "restore" else []
    with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE) as process:
        # As soon as somebody has it open for reading.
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                os.close(os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        process.send_signal(signum)
        _, said = process.communicate(timeout=LIMIT_S)
    assert b"Traceback" not in said
    assert process.returncode in (1, 128 + signum)


def test_a_manifest_may_still_come_through_a_pipe(archive: Path, tmp_path: Path) -> None:
    manifest = Path(f"{archive}.manifest.json")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(manifest.read_bytes()))
    writer.start()
    assert b"every byte of data compared" in good("verify", "--manifest", fifo, archive)
    writer.join()


@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket"])
def test_a_log_that_is_no_file_is_refused_before_anything_has_begun(
    tmp_path: Path, kind: str
) -> None:
    disk = make_disk(tmp_path / "disk", "AA0")
    put(kind, tmp_path / "log")
    words = ("backup", "--disk", f"d={disk}", "--log", tmp_path / "log", tmp_path / "vm.vma")
    assert "cannot write the log" in bad(*words)
    assert not (tmp_path / "vm.vma").exists()
    good(*words[:3], "--log", "/dev/null", tmp_path / "vm.vma")


@pytest.mark.parametrize("kind", [*KINDS, "file"])
def test_metrics_take_the_place_of_what_is_no_folder_and_never_wait(
    tmp_path: Path, kind: str
) -> None:
    disk = make_disk(tmp_path / "disk", "AA0")
    file = tmp_path / "vm.prom"
    put(kind, file)
    done = run("backup", "--disk", f"d={disk}", "--metrics", file, tmp_path / "vm.vma")
    assert done.returncode == 0
    if kind == "folder":
        assert b"cannot write the metrics" in done.stdout
    else:
        assert file.is_file()
        assert not file.is_symlink()
    assert [p.name for p in tmp_path.glob(".vm.*")] == []


def test_notes_that_cannot_be_written_are_told_and_the_archive_stays(tmp_path: Path) -> None:
    """Else exit code 1 would mean that nothing is stored."""
    disk = make_disk(tmp_path / "disk", "AA0")
    hook = tmp_path / "hook"
    # The archive has the name of one of these seconds.
    hook.write_text(
        '#!/bin/sh\nif [ "$1" = backup-start ]; then now=$(date +%s); for n in $(seq 0 60); do mkfifo '
        '"$DUMPDIR/vzdump-qemu-100-$(date -d @$((now - n)) +%Y_%m_%d-%H_%M_%S).vma.notes"; done; fi\n'
    )
    hook.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    words = ("--vmid", "100", "--notes", "mine", "--hook", hook)
    said = good("backup", "--disk", f"d={disk}", *words, out)
    assert b"cannot write the notes" in said
    (archive,) = out.glob("*.vma")
    good("verify", archive)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_links_and_other_names_that_another_user_may_have_made_are_not_followed(
    tmp_path: Path,
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("root's")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    (theirs / "link").symlink_to(victim)
    os.chown(theirs / "link", NOBODY, NOBODY, follow_symlinks=False)
    os.link(victim, theirs / "other-name")
    for name in ("link", "other-name"):
        with pytest.raises(OSError, match=r"another user|another name"):
            open_to_append(str(theirs / name))
    assert victim.read_text() == "root's"
    # Our own link, where nobody else can make one, is the administrator's word.
    (tmp_path / "mine").symlink_to(victim)
    fd = open_to_append(str(tmp_path / "mine"))
    os.write(fd, b" word")
    os.close(fd)
    assert victim.read_text() == "root's word"


def test_a_new_file_takes_no_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        open_new(str(tmp_path / "link"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read_where_one_is_wanted(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "x")
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        open_regular(str(tmp_path / "x"))
    (tmp_path / "file").write_bytes(b"0123456789")
    os.close(open_regular(str(tmp_path / "file")))


def test_a_pipe_is_read_to_its_end_and_a_stop_ends_the_wait_for_its_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(b"x" * 100_000))
    writer.start()
    cancel = Cancel()
    assert read_awaited(str(fifo), 1 << 20, cancel) == b"x" * 100_000
    writer.join()
    threading.Timer(0.05, lambda: cancel.ask("stop")).start()
    with pytest.raises(Cancelled):
        read_awaited(str(fifo), 100, cancel)
    cancel.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_archiver_by_hand_whose_config_is_a_pipe_without_a_writer_hears_signals(
    tmp_path: Path, signum: int
) -> None:
    os.mkfifo(tmp_path / "fifo")
    words = [*VMAPIPE, "archiver", "--listen", f"ipc://{tmp_path}/s", "--expect", "1"]
    words += ["--config", f"c={tmp_path}/fifo", "--output", str(tmp_path / "vm.vma")]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                os.close(os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        process.send_signal(signum)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert not listens(tmp_path / "s")
