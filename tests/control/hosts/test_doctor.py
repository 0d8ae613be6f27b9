# SPDX-License-Identifier: Apache-2.0
"""`vmapipe doctor`: it tells what a backup would meet, and changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.control.hosts.examined import examined, topics
from tests.control.qemu.paused_machine import PausedMachine
from tests.machine import Need, bad, good, next_event, started, without_limit
from vmapipe.control.hosts.doctor.findings import (
    Diagnosis,
    DiskTaken,
    Finding,
    as_json,
    as_text,
)
from vmapipe.control.hosts.doctor.releases import FAULTS, features_of, known_faults
from vmapipe.control.hosts.doctor.running_qemu import agent_finding, why_not_reached
from vmapipe.control.hosts.doctor.this_host import machine_of, why_no_namespaces
from vmapipe.control.qemu.disks import LeftOut
from vmapipe.control.qemu.features import find_features
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

RECORD = "vmapipe-" + 32 * "7"
READING = {"qmp_capabilities", "qom-list", "qom-get", "x-debug-query-block-graph"}


def machine_words(need: Need, folder: Path) -> list[str]:
    """A machine with a disk that has bitmaps, an empty drive and a channel for an agent."""
    qemu, img = need("qemu-system-x86_64", "qemu-img")
    image = folder / "disk.qcow2"
    subprocess.run([img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    for name in (RECORD, "another-program"):
        subprocess.run([img, "bitmap", "--add", image, name], check=True)
    return [
        *(qemu, "-S", "-display", "none", "-nodefaults", "-machine", "q35", "-accel", "tcg"),
        *("-blockdev", f"driver=file,node-name=file,filename={image}"),
        *("-blockdev", "driver=qcow2,node-name=disk,file=file"),
        *("-device", "virtio-blk,id=virtio0,drive=disk"),
        *("-blockdev", "driver=null-co,node-name=fixed,size=1048576,read-only=on"),
        *("-device", "virtio-blk,id=virtio1,drive=fixed"),
        *("-chardev", f"socket,path={folder}/qga,server=on,wait=off,id=qga0"),
        *("-device", "virtio-serial"),
        *("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
    ]


@contextmanager
def paused(need: Need, folder: Path) -> Iterator[PausedMachine]:
    with closing(PausedMachine(folder, machine_words(need, folder))) as machine:
        yield machine


class Transcript:
    """A socket in front of QEMU's monitor that notes which commands it passes on."""

    def __init__(self, path: Path, monitor: Path) -> None:
        self.path = path
        self.commands: list[str] = []
        self._monitor = monitor
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(str(self._monitor))
            answers = threading.Thread(target=self._pass, args=(qemu, client))
            answers.start()
            unread = b""
            while data := client.recv(65536):
                unread += data
                qemu.sendall(data)
                *lines, unread = unread.split(b"\n")
                self.commands += [json.loads(line)["execute"] for line in lines]
            qemu.shutdown(socket.SHUT_RDWR)
            answers.join()

    @staticmethod
    def _pass(qemu: socket.socket, client: socket.socket) -> None:
        while data := qemu.recv(65536):
            client.sendall(data)

    def close(self) -> None:
        self._thread.join(60)
        self._listener.close()


def state_of(machine: PausedMachine) -> list[Any]:
    names = ("query-block", "query-named-block-nodes", "query-jobs", "query-status")
    return [machine.ask(name) for name in names]


# --- a QEMU by its monitor ---


@pytest.mark.every_qemu
def test_it_tells_what_a_backup_takes_and_sends_only_commands_that_read(
    qemu: str, need: Need, short_folder: Path
) -> None:
    with paused(need, short_folder) as machine:
        before = state_of(machine)
        with closing(Transcript(short_folder / "t", machine.qmp)) as transcript:
            found = examined("--qmp", transcript.path)
        assert state_of(machine) == before
        with closing(QmpClient(str(machine.qmp))) as qmp:
            schema = qmp.execute(Command("query-qmp-schema", {}))
            assert features_of(schema) == find_features(qmp, "vmapipe-none")
        # The backup itself takes the same.
        archive = short_folder / "vm.vma"
        good("backup", "--qmp", machine.qmp, archive)
    sent = set(transcript.commands)
    assert {name for name in sent if not name.startswith("query-")} <= READING
    assert [disk["name"] for disk in found["disks"]] == ["drive-virtio0"]
    assert found["disks"][0]["bytes"] == 8 << 20
    left = {disk["name"]: disk["reason"] for disk in found["left_out"]}
    assert "read-only" in left["drive-virtio1"]
    assert b"drive-virtio1" not in good("list", archive)
    said = {f["topic"]: f["text"] for f in found["findings"]}
    assert "is not connected" in said["guest agent"]
    bitmaps = [f["text"] for f in found["findings"] if f["topic"] == "bitmap"]
    assert any(RECORD in text and "records since archive 77777777-" in text for text in bitmaps)
    assert any("'another-program'" in text and "left alone" in text for text in bitmaps)


def test_where_a_backup_would_fail_it_ends_with_1_and_says_the_way_out(
    need: Need, short_folder: Path
) -> None:
    said = bad("doctor", "--qmp", short_folder / "none")
    assert said.startswith("vmapipe doctor: a backup would fail: monitor: ")
    assert "No such file" in said
    with paused(need, short_folder) as machine:
        found = examined("--qmp", machine.qmp, "--agent", short_folder / "none", code=1)
        assert topics(found, "problem") == ["guest agent"]
        machine.ask("blockdev-add", **{"driver": "null-co", "node-name": "vmapipe-1234-left"})
        found = examined("--qmp", machine.qmp)
        assert "left-overs" in topics(found, "warning")


def test_a_backup_that_runs_is_a_problem_and_goes_on(need: Need, short_folder: Path) -> None:
    with paused(need, short_folder) as machine:
        machine.write("virtio0/virtio-backend", "write -P 7 0 8M")
        archive = short_folder / "vm.vma"
        with started("backup", "--json", "--speed", "1M", "--qmp", machine.qmp, archive) as backup:
            next_event(backup, "instant")
            second = short_folder / "tests.sock"
            # The other monitor is the test's; it is given away for a moment.
            machine._monitor.close()
            found = examined("--qmp", second, code=1)
            machine._monitor = QmpClient(str(second))
            # The second one is QEMU's job on the disk.
            assert topics(found, "problem") == ["another backup", "disks"]
            without_limit(backup)
            assert backup.wait(60) == 0
    good("verify", archive)


def test_a_machine_without_a_disk_is_a_problem(need: Need, short_folder: Path) -> None:
    (qemu,) = need("qemu-system-x86_64")
    words = [qemu, "-S", "-display", "none", "-nodefaults", "-machine", "q35", "-accel", "tcg"]
    with closing(PausedMachine(short_folder, words)) as machine:
        found = examined("--qmp", machine.qmp, code=1)
    (problem,) = [f for f in found["findings"] if f["verdict"] == "problem"]
    assert "no writable disk" in problem["text"]


def test_a_folder_that_qemu_may_not_enter_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    inside = closed / "inside"
    inside.mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o001)
    closed.chmod(0o700)
    assert f"may not enter {closed}" in why_not_reached(os.getpid(), 65533, str(inside))
    closed.chmod(0o711)
    assert not why_not_reached(os.getpid(), 65533, str(closed))


def test_an_agent_that_may_not_freeze_is_a_problem(short_folder: Path) -> None:
    path = short_folder / "qga"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client, client.makefile("rb") as requests:
                number = json.loads(requests.readline().lstrip(b"\xff"))["arguments"]["id"]
                client.sendall(b'\xff{"return": %d}\n' % number)
                assert json.loads(requests.readline())["execute"] == "guest-info"
                commands = [
                    {"name": "guest-fsfreeze-freeze", "enabled": False},
                    {"name": "guest-fsfreeze-thaw", "enabled": True},
                    {"name": "guest-fsfreeze-status", "enabled": True},
                ]
                info = {"version": "7.2", "supported_commands": commands}
                client.sendall(json.dumps({"return": info}).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        found = agent_finding(str(path))
        thread.join(60)
    assert found.verdict == "problem"
    assert found.text.endswith("guest-fsfreeze-freeze")


# --- what is told ---


def test_no_name_of_a_stranger_moves_the_terminals_cursor() -> None:
    evil = "a\x1b[2J\nok  all is well"
    seen = Diagnosis(
        evil,
        [Finding("problem", "x", evil, evil)],
        [DiskTaken(evil)],
        [LeftOut(evil, evil, "warn")],
    )
    lines = as_text(seen)
    assert len(lines) == 5
    assert not any(letter < " " for line in lines for letter in line)
    assert as_json(seen)["ready"] is False


# --- releases ---


def test_each_known_fault_is_told_of_its_releases_and_of_no_others() -> None:
    for fault in FAULTS:
        assert fault.first < fault.fixed
        assert fault.text in {f.text for f in known_faults(fault.first, [fault.needs])}
        assert fault.text not in {f.text for f in known_faults(fault.fixed, [fault.needs])}
        assert not [*known_faults(fault.first, [])]


# --- this host ---


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            ["qemu-system-x86_64", "-name", "a", "-qmp", "unix:/run/a.qmp,server=on"],
            "--qmp /run/a.qmp",
        ),
        (
            [
                "kvm",
                "-chardev",
                "socket,id=m,path=/run/m,server=on",
                "-mon",
                "chardev=m,mode=control",
            ],
            "--qmp /run/m",
        ),
        (
            [
                "qemu-system-x86_64",
                "-name",
                "guest=web,debug-threads=on",
                "-D",
                "/var/lib/libvirt/x",
            ],
            "--libvirt web",
        ),
        (
            ["kvm", "-id", "100", "-mon", "x", "-pidfile", "/var/run/qemu-server/100.pid"],
            "--pve 100",
        ),
        (["qemu-system-x86_64", "-monitor", "stdio"], ""),
        (["qemu-system-x86_64", "-qmp"], ""),
    ],
)
def test_a_machine_is_told_with_the_option_that_reaches_it(words: list[str], options: str) -> None:
    assert machine_of(7, words).options == options


def test_a_host_is_told_with_what_it_has_and_what_it_lacks() -> None:
    found = examined()
    assert {"Python", "TMPDIR", "memory", "KVM", "program", "library"} <= {
        f["topic"] for f in found["findings"]
    }
    assert all(
        f["way_out"]
        for f in found["findings"]
        if f["topic"] in ("program", "library") and f["verdict"] == "info"
    )


@pytest.mark.parametrize(
    "words",
    [("--qmp", "/x", "--pve", "100"), ("--agent", "/x"), ("--state",), ("--qmp", "tcp:x")],
)
def test_wrong_use_is_said(words: tuple[str, ...]) -> None:
    bad("doctor", *words, code=2)


def test_a_setting_that_keeps_user_namespaces_from_users_is_named(tmp_path: Path) -> None:
    assert why_no_namespaces(str(tmp_path)) == ""
    (tmp_path / "user").mkdir()
    (tmp_path / "kernel").mkdir()
    (tmp_path / "user/max_user_namespaces").write_text("15000\n")
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("1\n")
    assert why_no_namespaces(str(tmp_path)) == ""
    (tmp_path / "kernel/apparmor_restrict_unprivileged_userns").write_text("1\n")
    assert why_no_namespaces(str(tmp_path)).startswith("kernel.apparmor_restrict")
    (tmp_path / "user/max_user_namespaces").write_text("0\n")
    assert why_no_namespaces(str(tmp_path)) == "user.max_user_namespaces = 0"
