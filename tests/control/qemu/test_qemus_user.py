# SPDX-License-Identifier: Apache-2.0
"""Whose QEMU it is: the user that has to reach the sockets of a backup."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.control.qemu.paused_machine import paused_machine
from tests.machine import Need, bad, end_of, good, next_event, started, without_limit
from vmapipe.control.qemu.qemu_process import pid_of_qemu, uid_of, uid_of_qemu

NOBODY = pwd.getpwnam("nobody").pw_uid
UUID = "8d1d4a5e-6f6e-4c6a-9a53-2f1d0c9b7e11"
# A listener of QMP that only passes bytes on, as what stands in front of libvirt's monitor does.
PROXY = """
import os, socket, sys, threading
ours, theirs = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
listener.bind(ours)
listener.listen()
print("listens", flush=True)
def pass_on(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
while True:
    client = listener.accept()[0]
    server = socket.socket(socket.AF_UNIX)
    server.connect(theirs)
    threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
    threading.Thread(target=pass_on, args=(server, client), daemon=True).start()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """That nobody's QEMU can enter, too."""
    if os.geteuid() != 0:
        pytest.skip("only root can start another user's QEMU")
    path = tmp_path / "vm"
    path.mkdir()
    closed = [p for p in (path, *path.parents) if not p.stat().st_mode & 0o001]
    modes = {p: p.stat().st_mode for p in closed}
    for p in closed:
        p.chmod(0o755)
    yield path
    for p, mode in modes.items():
        p.chmod(mode)


def gave_up_root(qemu: str, folder: Path) -> tuple[str, ...]:
    """It makes its sockets as root, and then is nobody: `-runas`, since QEMU 9.1 `-run-with`."""
    disk = folder / "a.raw"
    disk.write_bytes(b"\x66" * 65536 * 3)
    disk.chmod(0o666)
    become = ("-runas", "nobody") if qemu == "installed" else ("-run-with", "user=nobody")
    return (
        *("-blockdev", "driver=raw,node-name=a,file.driver=file,file.filename={d}/a.raw"),
        *("-device", "virtio-blk-pci,drive=a,id=virtio0", "-uuid", UUID, *become),
    )


@contextmanager
def proxy(ours: Path, theirs: Path) -> Iterator[None]:
    words = [sys.executable, "-c", PROXY, str(ours), str(theirs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@pytest.mark.every_qemu
def test_a_qemu_that_gave_up_root_is_backed_up_by_root(
    qemu: str, need: Need, folder: Path, tmp_path: Path
) -> None:
    with paused_machine(need, folder, *gave_up_root(qemu, folder)) as machine:
        assert uid_of(machine.process.pid) == NOBODY
        assert machine.qmp.stat().st_uid == 0
        good("backup", "--qmp", machine.qmp, tmp_path / "vm.vma")
        assert machine.ours() == []


def test_a_qemu_behind_a_proxy_is_found_by_its_machines_uuid(
    qemu: str, need: Need, folder: Path, tmp_path: Path
) -> None:
    with (
        paused_machine(need, folder, *gave_up_root(qemu, folder)) as machine,
        proxy(folder / "proxy.sock", machine.qmp),
    ):
        good("backup", "--qmp", folder / "proxy.sock", tmp_path / "vm.vma")
        assert machine.ours() == []


def test_without_a_process_to_ask_the_owner_of_the_monitors_socket_counts(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    for peer in (None, 0, os.getpid()):  # far away, in another pid namespace, not a QEMU
        assert pid_of_qemu(peer, UUID.replace("8", "7")) is None
    assert uid_of_qemu(str(path), None) == path.stat().st_uid
    assert uid_of_qemu(str(tmp_path / "none"), None) == os.geteuid()


def test_a_disk_that_is_removed_or_a_job_that_is_cancelled_is_named_as_what_it_is(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    options = ["-device", "virtio-scsi-pci,id=bus"]
    for index in range(2):
        (tmp_path / f"{index}.raw").write_bytes(b"\x66" * (8 << 20))
        options += ["-drive", f"if=none,id=d{index},format=raw,file={{d}}/{index}.raw"]
        options += ["-device", f"scsi-hd,drive=d{index},id=scsi{index}"]
    words = ("backup", "--json", "--speed", "64K")
    with paused_machine(need, tmp_path, *options) as machine:
        with started(*words, "--qmp", machine.qmp, tmp_path / "vm.vma") as process:
            next_event(process, "instant")
            job = next(job for job in machine.ours() if job.endswith("-1"))
            machine.ask("job-cancel", id=job)
            code, text = end_of(process)
        assert (code, text.partition(": ")[2]) == (
            1,
            "disk 'drive-scsi1': somebody has cancelled QEMU's backup job",
        )
        with started(*words, "--qmp", machine.qmp, tmp_path / "vm.vma") as process:
            next_event(process, "instant")
            machine.ask("device_del", id="scsi1")
            without_limit(process)
            code, text = end_of(process)
        # A QEMU whose jobs read through a filter of ours has nothing to cancel: all is stored.
        assert code == 0 or "disk 'drive-scsi1': it was removed from the machine" in text
        assert machine.ours() == []
        bad("backup", "--qmp", machine.qmp, "--disk", "scsi1", tmp_path / "vm.vma", code=2)
