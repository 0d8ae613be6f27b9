# SPDX-License-Identifier: Apache-2.0
"""Images of other formats, read through the real qemu-nbd; and servers that fail."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests import leaks
from tests.machine import LIMIT_S, Need, listens, make_disk
from tests.producer.pull.reading import content, runs
from vmapipe.producer.image_source import HowToRead, ImageReader
from vmapipe.producer.pull.connection import Task
from vmapipe.producer.pull.export import ExportError
from vmapipe.producer.pull.shared_queue import SharedQueue
from vmapipe.producer.source import DiskSourceError, Sharing
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

CLUSTER = 65536


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "AA0hhhhpAh" * 20, tail_bytes=65024)


@contextmanager
def opened(path: Path | str, how: HowToRead) -> Iterator[ImageReader]:
    with closing(Cancel()) as cancel, closing(ImageReader("d", str(path), how, cancel)) as reader:
        yield reader


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"])
def test_every_format_reads_as_the_disk_it_was_made_from(
    tmp_path: Path, disk: Path, need: Need, image_format: str
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-nbd")
    image = tmp_path / "image"
    subprocess.run(
        [qemu_img, "convert", "-O", image_format, str(disk), str(image)],
        check=True,
        timeout=LIMIT_S,
    )
    with opened(image, HowToRead(image_format)) as source:
        read = content(source)
    wanted = disk.read_bytes()
    assert read[: len(wanted)] == wanted
    assert not any(read[len(wanted) :]), "what the format rounds up is zero"


@pytest.mark.parametrize("is_shared", [True, False])
def test_data_comes_through_shared_memory_where_it_can_and_is_the_same_where_it_cannot(
    tmp_path: Path, disk: Path, need: Need, monkeypatch: pytest.MonkeyPatch, *, is_shared: bool
) -> None:
    """Also with commas and other odd bytes in the image's name."""
    qemu_img, _, _ = need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    image = tmp_path / "SOCKET, a=b \u00e9.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), str(image)], check=True)
    asked: list[int] = []

    class Counted(SharedQueue):
        def start(self, task: Task) -> None:
            asked.append(task.length)
            super().start(task)

    monkeypatch.setattr("vmapipe.producer.image_source.SharedQueue", Counted)
    if not is_shared:
        monkeypatch.setattr("vmapipe.producer.pull.shared_queue.can_share", lambda: False)
    with opened(image, HowToRead("qcow2")) as source:
        assert content(source) == disk.read_bytes()
        assert sum(asked) == (source.read_bytes if is_shared else 0)


def test_what_the_daemon_cannot_read_is_said_with_offset_and_reason(
    tmp_path: Path, need: Need
) -> None:
    """A compressed cluster that is damaged: the queue tells only that it failed."""
    qemu_img, _, _ = need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    raw, image = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"some words " * (4 * CLUSTER))
    subprocess.run([qemu_img, "convert", "-c", "-O", "qcow2", str(raw), str(image)], check=True)
    with image.open("r+b") as file:
        # Behind the header and its three tables.
        file.seek(5 * CLUSTER)
        file.write(b"\xff" * 64)
    with (
        opened(image, HowToRead("qcow2")) as source,
        pytest.raises(ExportError, match=r"^disk 'd': cannot read near offset \d+: Input/output"),
    ):
        content(source)


def test_an_image_whose_file_was_cut_is_refused_and_one_without_its_last_zeroes_told(
    tmp_path: Path, disk: Path, need: Need
) -> None:
    """QEMU would read zeroes, and say nothing."""
    qemu_img, _ = need("qemu-img", "qemu-nbd")
    image = tmp_path / "image.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), str(image)], check=True)
    os.truncate(image, image.stat().st_size - 1000)
    told: list[str] = []
    with (
        closing(Cancel()) as cancel,
        closing(
            ImageReader("d", str(image), HowToRead("qcow2"), cancel, Sharing(False, told.append))
        ) as source,
    ):
        assert len(content(source)) == disk.stat().st_size
    assert len(told) == 1
    assert "the 1000 bytes that it lacks, at offset" in told[0]
    os.truncate(image, image.stat().st_size - CLUSTER)
    with (
        pytest.raises(DiskSourceError, match=r"^disk 'd': the image's file is truncated: it has"),
        opened(image, HowToRead("qcow2")),
    ):
        pass
    above = tmp_path / "above.qcow2"
    create = [qemu_img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(above)]
    subprocess.run(create, check=True, timeout=LIMIT_S)
    told.clear()
    how = HowToRead("qcow2", others=True)
    with (
        closing(Cancel()) as cancel,
        closing(ImageReader("d", str(above), how, cancel, Sharing(False, told.append))),
    ):
        pass
    assert len(told) == 1
    assert f"'{image}', to which the image refers, is truncated: it has" in told[0]


@pytest.mark.parametrize("image_format", ["luks", "qcow2"])
def test_an_encrypted_image_is_refused_with_the_way_out_and_its_file_is_a_raw_disk(
    tmp_path: Path, need: Need, image_format: str
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-nbd")
    image, words = tmp_path / "image", ["key-secret=s", "iter-time=10"]
    if image_format == "qcow2":
        words = ["encrypt.format=luks", *(f"encrypt.{word}" for word in words)]
    secret = ["--object", "secret,id=s,data=verysecret"]
    create = [qemu_img, "create", "-q", *secret, "-f", image_format, "-o", ",".join(words)]
    subprocess.run([*create, str(image), "1M"], check=True, timeout=LIMIT_S)
    with (
        pytest.raises(
            DiskSourceError, match=rf"^disk 'd': the {image_format} image is encrypted.*raw"
        ),
        opened(image, HowToRead(image_format)),
    ):
        pass
    with opened(image, HowToRead("raw", offset=512)) as source:
        assert content(source) == image.read_bytes()[512:]


def test_a_daemon_that_dies_while_data_comes_through_shared_memory(
    disk: Path, tmp_path: Path, need: Need
) -> None:
    qemu_img, _, _ = need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    image = tmp_path / "image.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), str(image)], check=True)
    with opened(image, HowToRead("qcow2")) as source:
        found = runs(source)
        next(found)
        for child in leaks.children():
            child.kill()
        with pytest.raises(
            ExportError, match=r"^disk 'd': .*qemu-storage-daemon was killed by SIG"
        ):
            list(found)


def test_a_daemon_that_closes_the_queue_and_lives_is_noticed_at_once(
    disk: Path, tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img, _, _ = need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    image = tmp_path / "image.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), str(image)], check=True)

    class Closed(SharedQueue):
        def flush(self) -> None:
            # Nothing of what was started is answered.
            self._socket.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr("vmapipe.producer.image_source.SharedQueue", Closed)
    words = r"^disk 'd': cannot read near offset \d+: the daemon has closed the queue"
    with opened(image, HowToRead("qcow2")) as source, pytest.raises(ExportError, match=words):
        list(runs(source))


def test_without_a_descriptor_left_for_the_queue_data_comes_over_nbd(
    disk: Path, tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img, _, _ = need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    image = tmp_path / "image.qcow2"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), str(image)], check=True)
    with opened(image, HowToRead("qcow2")) as source:

        def none_left(*_: int) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "eventfd", none_left)
        assert content(source) == disk.read_bytes()


def test_holes_of_an_image_are_not_read(
    tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img, qemu_io, _ = need("qemu-img", "qemu-io", "qemu-nbd")
    image = str(tmp_path / "image.qcow2")
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "1T"], check=True)
    subprocess.run([qemu_io, "-f", "qcow2", "-c", "write 512G 1M", image], check=True)
    with opened(image, HowToRead("qcow2")) as source:
        pump = source.pump

        def answered(_: float) -> bool:
            assert pump(LIMIT_S), "it waits, and nothing was asked for"
            return True

        monkeypatch.setattr(source, "pump", answered)
        found = list(runs(source))
        assert source.read_bytes == 1 << 20
        # A terabyte is asked for by 2 GiB; 16 runs say that nothing is there, and some are beside the data.
        assert len(found) <= 24
    assert sum(pulled.run.clusters for pulled, _ in found) == (1 << 40) // CLUSTER
    assert [len(data) for _, data in found if data] == [1 << 20]


def test_an_internal_snapshot_is_read_by_its_name(tmp_path: Path, disk: Path, need: Need) -> None:
    qemu_img, qemu_io, _ = need("qemu-img", "qemu-io", "qemu-nbd")
    image = str(tmp_path / "image.qcow2")
    subprocess.run([qemu_img, "convert", "-O", "qcow2", str(disk), image], check=True)
    subprocess.run([qemu_img, "snapshot", "-c", "monday", image], check=True)
    subprocess.run([qemu_io, "-f", "qcow2", "-c", "write -P 7 0 5M", image], check=True)
    with opened(image, HowToRead("qcow2", snapshot="monday")) as source:
        assert content(source) == disk.read_bytes()
    with opened(image, HowToRead("qcow2")) as source:
        assert content(source)[: 5 << 20] == bytes([7]) * (5 << 20)


def test_a_disk_that_begins_later_in_a_raw_file(disk: Path, need: Need) -> None:
    need("qemu-nbd")
    with opened(disk, HowToRead("raw", offset=12 * 512)) as source:
        assert content(source) == disk.read_bytes()[12 * 512 :]


@pytest.mark.parametrize(
    ("image_format", "words"),
    [("qcow2", "Image is not in qcow2 format"), ("floppy", "Unknown driver 'floppy'")],
)
def test_a_wrong_format_is_said_in_qemus_words(
    disk: Path, need: Need, image_format: str, words: str
) -> None:
    need("qemu-nbd")
    with (
        pytest.raises(Failure, match=f"^disk 'd': .*{words}"),
        opened(disk, HowToRead(image_format)),
    ):
        pass


def test_a_missing_image_is_said_in_qemus_words(tmp_path: Path, need: Need) -> None:
    need("qemu-nbd")
    how = HowToRead("qcow2")
    with pytest.raises(Failure, match="No such file"), opened(tmp_path / "none", how):
        pass


def test_a_server_that_dies_is_an_error_with_device_and_offset(disk: Path, need: Need) -> None:
    need("qemu-nbd")
    with opened(disk, HowToRead("raw", offset=512)) as source:
        for child in leaks.children():
            child.kill()
        with pytest.raises(
            ExportError, match=r"^disk 'd': .* offset 0: .*qemu-nbd was killed by SIGKILL"
        ):
            content(source)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_read_error_behind_qemu_nbd_is_told_with_its_offset_and_its_reason(
    tmp_path: Path, disk: Path, need: Need, image_format: str
) -> None:
    """QEMU's own server hangs up on a read that meets one, and tells only its stderr why."""
    nbdkit, qemu_img, _ = need("nbdkit", "qemu-img", "qemu-nbd")
    image, socket, broken = tmp_path / "image", tmp_path / "bad.sock", tmp_path / "broken"
    convert = [qemu_img, "convert", "-f", "raw", "-O", image_format, str(disk), str(image)]
    subprocess.run(convert, check=True, timeout=LIMIT_S)
    words = [nbdkit, "-f", "-U", str(socket), "--filter=error", "file", str(image)]
    words += ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={broken}"]
    with subprocess.Popen(words) as server:
        try:
            while not listens(socket):
                assert server.poll() is None
            how = HowToRead(image_format, others=True)
            with opened(f"nbd+unix:///?socket={socket}", how) as source:
                broken.touch()
                with pytest.raises(
                    ExportError,
                    match=r"^disk 'd': cannot read near offset \d+: Input/output error",
                ):
                    content(source)
        finally:
            server.terminate()


def test_a_server_that_says_much_is_not_held_up_by_a_pipe_that_nobody_reads(
    tmp_path: Path, disk: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    (qemu_nbd,) = need("qemu-nbd")
    talker = tmp_path / "qemu-nbd"
    talker.write_text(
        "#!/bin/sh\n"
        "i=0; while [ $i -lt 5000 ]; do echo qemu-nbd: a warning of this image >&2; i=$((i+1)); done\n"
        f'exec {qemu_nbd} "$@"\n'
    )
    talker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with opened(disk, HowToRead("raw", offset=512)) as source:
        for child in leaks.children():
            child.kill()
        with pytest.raises(ExportError) as raised:
            content(source)
        assert "warning" not in str(raised.value)


def test_a_chain_of_images_that_is_a_circle_is_given_up_once(
    tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU opens it without end; two programs that do would take longer than a backup waits for a producer."""
    qemu_img, _ = need("qemu-img", "qemu-storage-daemon")
    image, other = tmp_path / "circle.qcow2", tmp_path / "other.qcow2"
    for path, backing in ((image, other), (other, image)):
        words = ["create", "-q", "-u", "-f", "qcow2", "-b", str(backing), "-F", "qcow2", str(path)]
        subprocess.run([qemu_img, *words, "1M"], check=True)
    monkeypatch.setattr("vmapipe.runtime.storage_daemon._START_S", 0.5)
    how = HowToRead("qcow2", others=True)
    with (
        pytest.raises(Failure, match=r"^disk 'd': qemu-storage-daemon is not ready after"),
        opened(image, how),
    ):
        pass
    assert leaks.children() == []


def test_without_qemu_nbd_the_message_names_the_package(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    how = HowToRead("qcow2")
    with pytest.raises(Failure, match=r"need qemu-nbd \(Debian: qemu-utils\)"), opened(disk, how):
        pass
