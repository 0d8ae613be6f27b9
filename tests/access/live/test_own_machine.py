# SPDX-License-Identifier: Apache-2.0
"""A QEMU that is started by the user's command behind `--`; what is refused, and what then is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.access.live.machines import cleared, live, processes, server_below, stop
from tests.control.coordinator.test_events import events
from tests.machine import LIMIT_S, VMAPIPE, Need, bad, eventually, good, make_disk
from tests.protocol.nbd.client import Client
from vmapipe.access.live.server import ArchiveServer
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone
from vmapipe.protocol.nbd.constants import NBD_CMD_FLUSH
from vmapipe.runtime.cancel import Cancel

PATTERN = "AAh0ApAA" * 32
TAIL_BYTES = 700
SLOW = ("--speed", "512K")
Words = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def stored(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk and its archive."""
    need("qemu-system-x86_64", "qemu-img")
    folder = tmp_path_factory.mktemp("stored")
    make_disk(folder / "a.raw", PATTERN, TAIL_BYTES)
    (folder / "vm.conf").write_text("memory: 64\n")
    words = ("--disk", f"drive-scsi0={folder}/a.raw", "--config", f"{folder}/vm.conf")
    good("backup", "--quiet", *words, str(folder / "vm.vma"))
    return folder


@pytest.fixture
def archive(stored: Path) -> Path:
    return stored / "vm.vma"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    with cleared(tmp_path / "out"):
        yield tmp_path / "out"


def qemu(*words: str, device: str = "scsi-hd,drive=drive-scsi0") -> list[str]:
    return [
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32"),
        *("-device", "virtio-scsi-pci", "-device", device, *words),
    ]


def write_as_the_guest(target: Path, offset: int, data: bytes) -> None:
    """Through an export of the node that the machine's disk stands on; on the disk afterwards."""
    client, sock = QmpClient(str(target / "tests.sock")), str(target / "g")
    addr = {"type": "unix", "data": {"path": sock}}
    try:
        client.execute(Command("nbd-server-start", {"addr": addr}))
        export = {"type": "nbd", "id": "g", "node-name": "drive-scsi0", "writable": True}
        client.execute(Command("block-export-add", export))
        with Client(Path(sock), "drive-scsi0") as guest:
            guest.write(offset, data)
            guest.command(NBD_CMD_FLUSH)
        client.execute(Command("nbd-server-stop", {}))
    finally:
        client.close()


def test_the_machine_is_gone_on_with_after_its_end_with_all_that_it_wrote(
    archive: Path, stored: Path, target: Path
) -> None:
    monitor = ("-qmp", f"unix:{target}/tests.sock,server=on,wait=off")
    # The guest's own program would be one more boot: an export writes for it.
    shared = "scsi-hd,drive=drive-scsi0,share-rw=on"
    words: Words = (archive, target, "--", *qemu(*monitor, device=shared))
    with live(*SLOW, *words) as command:
        assert command.hear("restoring")["devices"][0]["path"] == f"{target}/disk-drive-scsi0.raw"
        command.hear("notice", "the machine is started")
        write_as_the_guest(target, 70_000, b"written by the guest")
        (machine,) = [p for p in processes(f"{target}/qmp.sock") if "qemu" in p.name()]
        stop(machine)
        code, said = command.end()
    assert code == 1
    assert "QEMU has ended or closed its monitor: its disks are not restored yet" in said
    assert f"{target} -- {' '.join(qemu(*monitor)[:7])}" in said
    # Its server has ended with it.
    assert eventually(lambda: not processes(f"{target}/"))
    assert "the machine does not run: say its command" in bad(
        "restore", "--live", archive, target, code=2
    )
    with live(*words) as again:
        again.succeeds()
    assert again.moved == ["drive-scsi0"]
    assert list(events("\n".join(map(json.dumps, again.events)).encode()))[-1] == "done"
    expected = bytearray((stored / "a.raw").read_bytes())
    expected[70_000 : 70_000 + 20] = b"written by the guest"
    found = (target / "disk-drive-scsi0.raw").read_bytes()
    assert found[: len(expected)] == bytes(expected)
    assert (target / "vm.conf").read_text() == "memory: 64\n"
    left = ["disk-drive-scsi0.raw", "qemu.log", "qmp.sock", "tests.sock", "vm.conf"]
    assert [name for name in sorted(os.listdir(target)) if name != "g"] == left


def test_the_machine_and_its_server_outlive_the_command_and_the_server_ends_with_the_machine(
    archive: Path, target: Path
) -> None:
    with live(*SLOW, archive, target, "--", *qemu()) as command:
        command.hear("progress")
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == (143, "vmapipe restore: cancelled by SIGTERM")
    server = server_below(target)
    (machine,) = [p for p in processes(f"{target}/qmp.sock") if "qemu" in p.name()]
    with live(*SLOW, archive, target) as command:
        command.hear("progress")
        # One at a time.
        assert "is at work in" in bad("restore", "--live", archive, target)
        command.kill()
    machine.terminate()
    assert eventually(lambda: not psutil.pid_exists(server.pid) or server.status() == "zombie")


def test_another_archive_or_other_targets_are_not_mixed_with_those_that_were_begun(
    archive: Path, stored: Path, target: Path, tmp_path: Path
) -> None:
    with live(*SLOW, archive, target, "--", *qemu()) as command:
        command.hear("notice", "the machine is started")
        command.kill()
    other = tmp_path / "other.vma"
    good("backup", "--quiet", "--disk", f"drive-scsi0={stored}/a.raw", str(other))
    assert "another archive is being restored there" in bad(
        "restore", "--live", other, target, code=2
    )
    assert "was begun with other targets" in bad(
        "restore", "--live", archive, target, "--format", "qcow2", code=2
    )


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("-", "DIR"), "put the archive into a file first"),
    (("VMA", "DIR"), "say which machine"),
    (("VMA", "DIR", "--salvage"), "--salvage is not for --live"),
    (("VMA", "DIR", "--qmp", "/none"), "cannot reach QEMU's monitor"),
    (("VMA", "DIR", "--qmp", "/none", "--", "kvm"), "leave out what is behind --"),
    (("VMA", "DIR", "--", *qemu("-m", "nonsense")), "QEMU does not start: "),
    (("VMA", "DIR", "--", *qemu(device="nvme,serial=1,drive=drive-scsi0")), "rerror"),
    (
        ("VMA", "DIR", "--", "qemu-system-x86_64", "-machine", "pflash1=drive-scsi0"),
        "QEMU does not start: ",
    ),
    (
        ("VMA", "DIR", "--device", "drive-scsi0=EXISTS,format=qcow2", "--", *qemu()),
        "exists already and is not overwritten",
    ),
]


def test_what_cannot_be_is_refused_and_leaves_nothing(
    archive: Path, target: Path, tmp_path: Path
) -> None:
    exists = tmp_path / "there.qcow2"
    exists.write_bytes(b"something")
    target.mkdir()
    running = []
    for number, (words, _) in enumerate(REFUSED):
        to = {"VMA": str(archive), "DIR": f"{target}/{number}"}
        given = [to.get(word, word.replace("EXISTS", str(exists))) for word in words]
        command = [*VMAPIPE, "restore", "--live", *given]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for process, (words, text) in zip(running, REFUSED, strict=True):
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode in (1, 2), words
        assert text in said, words
        assert len(said.splitlines()) == 1, said
    assert exists.read_bytes() == b"something"
    assert [name for folder in target.iterdir() for name in os.listdir(folder)] == []
    assert not processes(f"{target}/")


def test_a_folder_whose_path_is_too_long_for_sockets_is_refused(
    archive: Path, tmp_path: Path
) -> None:
    place = tmp_path / ("x" * 120)
    said = bad("restore", "--live", archive, place, "--", *qemu(), code=2)
    assert "choose a folder with a shorter path" in said
    assert not place.exists()


def test_a_foreign_compressed_archive_is_run_from_while_it_is_decompressed(
    need: Need, archive: Path, stored: Path, target: Path, tmp_path: Path
) -> None:
    (zstd,) = need("zstd")
    foreign = tmp_path / "vm.vma.zst"
    subprocess.run([zstd, "-q", "-1", archive, "-o", foreign], check=True)
    with live(foreign, target, "--cache", tmp_path, "--", *qemu()) as command:
        command.succeeds()
    content = (stored / "a.raw").read_bytes()
    assert (target / "disk-drive-scsi0.raw").read_bytes()[: len(content)] == content


def test_an_encrypted_archive_is_gone_on_with_by_the_command_that_the_first_one_has_named(
    need: Need, archive: Path, stored: Path, target: Path, tmp_path: Path
) -> None:
    (keygen,) = need("age-keygen")
    key, sealed = tmp_path / "key", tmp_path / "vm.vma.zst.age"
    subprocess.run([keygen, "-o", key], check=True, capture_output=True)
    recipient = subprocess.check_output([keygen, "-y", key], text=True).strip()
    good("repack", "--quiet", "--compress", "zstd", "--encrypt-to", recipient, archive, sealed)
    assert "--identity FILE" in bad("restore", "--live", sealed, target, "--", *qemu())
    assert not target.exists()
    words: Words = ("--identity", key, sealed, target)
    with live(*SLOW, *words, "--", *qemu()) as command:
        command.hear("progress")
        # A new one needs the key, too.
        stop(server_below(target))
        command.hear("notice", "started again")
        command.process.send_signal(signal.SIGTERM)
        command.end()
    assert "--identity FILE" in bad("restore", "--live", sealed, target)
    with live(*words) as command:
        command.succeeds()
    content = (stored / "a.raw").read_bytes()
    assert (target / "disk-drive-scsi0.raw").read_bytes()[: len(content)] == content


def test_a_server_of_a_machine_that_has_ended_meanwhile_says_so(
    archive: Path, tmp_path: Path
) -> None:
    """Not that the archive could not be served: how the machine goes on is another command then."""
    with subprocess.Popen(["true"]) as machine:
        machine.wait()
        log = str(tmp_path / "server.log")
        socket = str(tmp_path / "archive.sock")
        with (
            contextlib.closing(Cancel()) as cancel,
            ArchiveServer(socket, [str(archive)], log, print) as server,
        ):
            server.machine_pid = machine.pid
            with pytest.raises(QmpGone, match="the machine has ended"):
                server.start(cancel)


def test_a_damaged_note_is_named(archive: Path, target: Path) -> None:
    target.mkdir()
    for text, why in (("{", "cannot read"), ("{}", "is not a note of a live restore")):
        (target / "live-restore.json").write_text(text)
        assert why in bad("restore", "--live", archive, target)
    shutil.rmtree(target)
