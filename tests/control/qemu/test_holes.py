# SPDX-License-Identifier: Apache-2.0
"""Holes of raw images of a running QEMU: they are not sent, and the archive shows the instant."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.qemu.daemon_backup import check_one_instant
from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.paused_machine import PausedMachine, paused_machine
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.machine import Need, eventually, good, next_event, run, started, without_limit
from tests.protocol.nbd.client import Client
from vmapipe.control.qemu import holes
from vmapipe.control.qemu.bitmap_image import bitmap_image, bits_of, read_bits
from vmapipe.control.qemu.bitmaps import job_bitmap
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.holes import Holes
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone
from vmapipe.producer.source import Segment, segments_of

MIB = 1 << 20
# A little more than is worth the look, with a few clusters of data.
SIZES = {"a": 68 * MIB + 512, "b": 72 * MIB}
_LEFT_OUT = re.compile(r"disk '(.*?)': holes that are not sent, in bytes: (\d+)")


def sparse(path: Path, size: int, *data: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for cluster, pattern in data:
            file.seek(cluster * CLUSTER)
            file.write(pattern * CLUSTER)
    return path


def restored(archive: Path, folder: Path, *names: str) -> list[bytes]:
    good("restore", "--no-configs", archive, folder)
    return [(folder / f"disk-{name}.raw").read_bytes() for name in names]


@given(st.integers(1, 3000), st.data())
def test_a_bitmap_given_to_qemu_has_the_clusters_of_its_runs_and_no_others(
    clusters: int, data: st.DataObject
) -> None:
    run_of = st.integers(0, clusters - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(0, clusters - first))
    )
    runs = data.draw(st.lists(run_of, max_size=6))
    bits = bits_of(clusters * CLUSTER, runs)
    wanted = {cluster for first, count in runs for cluster in range(first, first + count)}
    assert {n for n in range(8 * len(bits)) if bits[n // 8] >> n % 8 & 1} == wanted
    pieces = bitmap_image(clusters * CLUSTER, bits)
    image = bytearray(max(offset + len(piece) for offset, piece in pieces))
    for offset, piece in pieces:
        image[offset : offset + len(piece)] = piece
    read = read_bits(lambda at, length: bytes(image[at : at + length]), clusters * CLUSTER)
    assert read == bytes(bits)


@pytest.fixture
def daemon(qemu: str, need: Need, tmp_path: Path) -> Iterator[StorageDaemon]:
    need("qemu-storage-daemon")
    images = {
        name: sparse(tmp_path / f"{name}.raw", size, (0, b"\1"), (40, b"\2"), (41, b"\3"))
        for name, size in SIZES.items()
    }
    with storage_daemon(tmp_path, **images) as machine:
        yield machine


@pytest.mark.slow
def test_disks_with_holes_that_guests_write_into_all_the_time_are_archived_as_of_one_instant(
    daemon: StorageDaemon, tmp_path: Path
) -> None:
    contents = {name: (tmp_path / f"{name}.raw").read_bytes() for name in SIZES}
    check_one_instant(daemon, contents, tmp_path, "64M")


@pytest.mark.every_qemu
def test_what_is_written_while_holes_are_looked_for_is_copied_and_what_a_death_leaves_is_removed(
    daemon: StorageDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, within and behind the look: data and zeroes, into holes and elsewhere."""
    chance = random.Random(5)
    written = {0, 40, 41}

    def write_some(guest: Client) -> None:
        for _ in range(25):
            cluster = chance.randrange(SIZES["b"] // CLUSTER)
            data = chance.choice((bytes(CLUSTER), chance.randbytes(4096)))
            guest.write(cluster * CLUSTER + chance.choice((0, 4096)), data[:4096])
            written.add(cluster)

    def written_meanwhile(fd: int, size_bytes: int) -> Iterator[Segment]:
        with Client(daemon.path, "b") as guest:
            write_some(guest)
            for number, segment in enumerate(looked(fd, size_bytes)):
                if number == 10:
                    write_some(guest)
                yield segment
            write_some(guest)

    looked = segments_of
    monkeypatch.setattr(holes, "segments_of", written_meanwhile)
    run_id, disk = "0123abcd", MachineDisk("b", "b", SIZES["b"])
    folder = SinkFolder.make()
    qmp = QmpClient(str(daemon.qmp))
    try:
        found = Holes(qmp, run_id).leave_out([disk], daemon.process.pid, folder)
        (node,) = (
            node
            for node in qmp.execute(Command("query-named-block-nodes", {"flat": True}))
            if node["node-name"] == "b"
        )
        assert node["dirty-bitmaps"][0]["count"] == len(written) * CLUSTER
        target = sparse(tmp_path / "copy.raw", SIZES["b"])
        file = {"driver": "file", "filename": str(target)}
        qmp.execute(Command("blockdev-add", {"driver": "raw", "node-name": "copy", "file": file}))
        only = {"sync": "bitmap", "bitmap": found["b"].name, "bitmap-mode": "never"}
        job = {"job-id": "copy", "device": "b", "target": "copy", "auto-dismiss": False}
        qmp.execute(Command("blockdev-backup", {**job, **only}))
        assert eventually(
            lambda: qmp.execute(Command("query-jobs", {}))[0]["status"] == "concluded"
        )
        qmp.execute(Command("job-dismiss", {"id": "copy"}))
        qmp.execute(Command("blockdev-del", {"node-name": "copy"}))
        assert target.read_bytes() == (tmp_path / "b.raw").read_bytes()

        # A second one dies while QEMU has the image with the bitmap.
        def dies(*arguments: object) -> Command:
            raise QmpGone("killed")

        monkeypatch.setattr(holes, "segments_of", looked)
        monkeypatch.setattr(holes, "merge_bitmap", dies)
        monkeypatch.setattr(qmp, "execute", _until_delete(qmp))
        with pytest.raises(QmpGone):
            Holes(qmp, "4567abcd").leave_out([disk], daemon.process.pid, folder)
    finally:
        qmp.close()
        folder.remove()
        folder.close()
    assert {job_bitmap(run_id), job_bitmap("4567abcd"), "vmapipe-4567abcd-sample"} <= set(
        daemon.ours()
    )
    good("cleanup", "--qmp", daemon.qmp)
    assert daemon.ours() == []


def _until_delete(qmp: QmpClient) -> Callable[[Command], object]:
    """As a process that is dead when it would remove its node."""
    execute = qmp.execute

    def executed(command: Command) -> object:
        if command.name == "blockdev-del":
            raise QmpGone("killed")
        return execute(command)

    return executed


@contextlib.contextmanager
def machine_of(need: Need, folder: Path, *images: Path) -> Iterator[PausedMachine]:
    """The last disk is in an I/O thread."""
    words = ["-object", "iothread,id=io"]
    for number, image in enumerate(images):
        thread = ",iothread=io" if image == images[-1] else ""
        words += ["-blockdev", f"driver=file,node-name=file{number},filename={image}"]
        words += ["-blockdev", f"driver=raw,node-name=disk{number},file=file{number}"]
        words += ["-device", f"virtio-blk-pci,drive=disk{number},id=virtio{number}{thread}"]
    with paused_machine(need, folder, *words) as machine:
        yield machine


@pytest.mark.every_qemu
def test_images_that_have_changed_their_names_are_not_taken_for_each_other(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """Of a machine with devices (7.2 and 10.0 hand them over to filters), written to after the instant."""
    images = [
        sparse(tmp_path / "0.raw", SIZES["b"], (5, b"\1" * 30)),
        sparse(tmp_path / "1.raw", SIZES["b"], (70, b"\2" * 30)),
    ]
    contents = [image.read_bytes() for image in images]
    archive = out / "vm.vma"
    with machine_of(need, tmp_path, *images) as machine:
        images[0].rename(tmp_path / "aside")
        images[1].rename(images[0])
        (tmp_path / "aside").rename(images[1])
        words = ("backup", "--json", "--qmp", str(machine.qmp), "--speed", "64K", str(archive))
        with started(*words) as process:
            next_event(process, "instant")
            for number in (0, 1):
                device = f"/machine/peripheral/virtio{number}/virtio-backend"
                for cluster in (5, 70, 200):
                    machine.write(device, f"write -P 9 {cluster * CLUSTER} {CLUSTER}")
            without_limit(process)
            _, complaints = process.communicate()
        assert process.returncode == 0, complaints
        assert machine.is_untouched()
        assert machine.ours() == []
    assert restored(archive, out / "r", "drive-virtio0", "drive-virtio1") == contents


def test_only_a_whole_raw_file_that_is_certain_is_looked_at_and_the_log_says_what_was_left_out(
    need: Need, tmp_path: Path, out: Path
) -> None:
    """Beside it a part of a file, and a file whose name has gone."""
    need("qemu-storage-daemon")
    size = 66 * MIB
    plain = sparse(tmp_path / "plain.raw", size, (1, b"\1"))
    part = sparse(tmp_path / "part.raw", size + MIB, (1, b"\2"), (30, b"\3"))
    gone = sparse(tmp_path / "gone.raw", size + 2 * MIB, (9, b"\4"))
    wanted = [plain.read_bytes(), part.read_bytes()[MIB:], gone.read_bytes()]
    with storage_daemon(tmp_path, plain=plain, gone=gone) as daemon:
        file = {"driver": "file", "filename": str(part)}
        offset = {"driver": "raw", "node-name": "part", "file": file, "offset": MIB}
        daemon.ask("blockdev-add", **offset)
        gone.rename(tmp_path / "elsewhere")
        names = ("plain", "part", "gone")
        disks = [word for name in names for word in ("--disk", name)]
        debug = ("--log-level", "debug")
        done = run("backup", *debug, "--qmp", daemon.qmp, *disks, out / "vm.vma")
        assert done.returncode == 0, done.stderr.decode()
        assert daemon.ours() == []
    assert _LEFT_OUT.findall(done.stderr.decode()) == [("plain", str(size - CLUSTER))]
    assert restored(out / "vm.vma", out / "r", *names) == wanted
