# SPDX-License-Identifier: Apache-2.0
"""Backups of disks that the monitor itself serves, commanded by QEMU's own client."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.monitor.foreign import Foreign, Refused, connected
from tests.machine import LIMIT_S, children, good, make_disk, sha256
from tests.producer.guard.serving import Served, serving
from tests.protocol.nbd.client import Client

MIB = 1 << 20
CLUSTER = 65536
# Some minutes at this speed: it is running whenever a test looks.
SLOW = 64 << 10
SPECIFIED = {
    "status",
    "errmsg",
    "total",
    "transferred",
    "zero-bytes",
    "start-time",
    "end-time",
    "backupfile",
    "uuid",
}


@contextlib.contextmanager
def monitor_in(folder: Path) -> Iterator[Served]:
    disks = {
        "a": make_disk(folder / "a.raw", "A0h" * 40 + "A", tail_bytes=4096, seed=1),
        "b": make_disk(folder / "b.raw", "A" * 64, seed=2),
    }
    with serving(folder, **disks) as monitor:
        yield monitor


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One monitor for all tests that do not end it; no backup runs between them."""
    with monitor_in(tmp_path_factory.mktemp("served")) as monitor:
        yield monitor


@pytest.fixture
def qmp(served: Served) -> Iterator[Foreign]:
    with connected(served.monitor) as client:
        yield client
        client.cmd("backup-cancel")


def refusal(qmp: Foreign, name: str, arguments: dict[str, Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        qmp.cmd(name, arguments)
    return caught.value


def restored(archive: Path, folder: Path, name: str) -> Path:
    good("verify", archive)
    good("restore", archive, folder)
    return folder / f"disk-{name}.raw"


def running(qmp: Foreign, archive: Path, **more: Any) -> str:
    return str(qmp.cmd("backup", {"backup-file": str(archive), "speed": SLOW, **more}))


# --- from the command to the end ---


def test_a_backup_is_started_polled_to_its_end_and_good(
    served: Served, qmp: Foreign, tmp_path: Path
) -> None:
    before = int(time.time())
    archive = tmp_path / "vm.vma"
    identity = qmp.cmd("backup", {"backup-file": str(archive), "format": "vma"})
    assert str(uuid.UUID(identity)) == identity
    status = qmp.status()
    while status["status"] == "active":
        assert "end-time" not in status
        assert "errmsg" not in status
        status = qmp.status()
    total = 120 * CLUSTER + 4096 + 64 * CLUSTER
    assert status == {
        "status": "done",
        "total": total,
        "transferred": total,
        "zero-bytes": 80 * CLUSTER,
        "start-time": status["start-time"],
        "end-time": status["end-time"],
        "backupfile": str(archive),
        "uuid": identity,
    }
    assert before <= status["start-time"] <= status["end-time"] <= int(time.time())
    assert identity.replace("-", "") in good("list", "--json", archive).decode().replace("-", "")
    assert sha256(restored(archive, tmp_path / "out", "a")) == sha256(served.folder / "a.raw")
    assert sha256(tmp_path / "out/disk-b.raw") == sha256(served.folder / "b.raw")


def test_every_client_hears_how_a_backup_goes(served: Served, qmp: Foreign, tmp_path: Path) -> None:
    with connected(served.monitor) as other:
        identity = qmp.cmd("backup", {"backupfile": str(tmp_path / "vm.vma"), "speed": SLOW})
        for client in (qmp, other):
            started = client.next_event("BACKUP_STARTED")
            assert started["data"]["status"] == "active"
            assert started["data"]["uuid"] == identity
            assert set(started["timestamp"]) == {"seconds", "microseconds"}
            progress = client.next_event("BACKUP_PROGRESS")["data"]
            assert set(progress) == {"uuid", "total", "transferred", "zero-bytes"}
        qmp.cmd("backup-set-speed", {"speed": 0})
        for client in (qmp, other):
            assert client.end_of_backup()["event"] == "BACKUP_COMPLETED"


def test_what_is_written_after_the_answer_is_not_in_the_backup(
    served: Served, qmp: Foreign, tmp_path: Path
) -> None:
    before = sha256(served.folder / "b.raw")
    with Client(served.socket("b"), "b") as guest:
        running(qmp, tmp_path / "vm.vma")
        for offset in range(0, 64 * CLUSTER, CLUSTER):
            guest.write(offset, b"written after the answer")
        qmp.cmd("backup-set-speed", {"speed": 0})
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    assert sha256(restored(tmp_path / "vm.vma", tmp_path / "out", "b")) == before
    assert sha256(served.folder / "b.raw") != before


def test_a_slow_backup_is_cancelled_and_leaves_nothing(
    served: Served, qmp: Foreign, tmp_path: Path
) -> None:
    running(qmp, tmp_path / "vm.vma", speed=MIB)
    assert qmp.status()["status"] == "active"
    assert qmp.cmd("backup-cancel") == {}
    status = qmp.status()
    assert status["status"] == "error"
    assert status["errmsg"] == "backup canceled"
    assert status["end-time"] >= status["start-time"]
    assert set(status) == SPECIFIED
    assert qmp.end_of_backup()["event"] == "BACKUP_CANCELLED"
    assert not list(tmp_path.glob("vm.vma*"))
    # And the next one works at once.
    qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma")})
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"


@pytest.mark.parametrize("name", ["backup-cancel", "backup_cancel"])
def test_cancel_succeeds_when_nothing_runs(qmp: Foreign, name: str) -> None:
    before = qmp.status()
    assert qmp.cmd(name) == {}
    assert qmp.status() == before


def test_the_speed_is_changed_while_it_runs(qmp: Foreign, tmp_path: Path) -> None:
    assert refusal(qmp, "backup-set-speed", {"speed": 1}).kind == "DeviceNotActive"
    running(qmp, tmp_path / "vm.vma")
    assert qmp.cmd("backup_set_speed", {"speed": "1G"}) == {}
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"


@pytest.mark.parametrize("separator", [",", ";", ":"])
def test_a_devlist_is_split_at_each_separator(qmp: Foreign, tmp_path: Path, separator: str) -> None:
    words = {"backup-file": str(tmp_path / "vm.vma"), "devlist": f"b{separator}a"}
    qmp.cmd("backup", words)
    assert qmp.end_of_backup()["data"]["total"] == 184 * CLUSTER + 4096


def test_only_the_devices_of_the_list_are_taken(qmp: Foreign, tmp_path: Path) -> None:
    qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma"), "devlist": "b"})
    assert qmp.end_of_backup()["data"]["total"] == 64 * CLUSTER


@pytest.mark.parametrize("spelling", ["config-file", "config-filename"])
def test_configurations_are_stored_by_their_names(
    qmp: Foreign, tmp_path: Path, spelling: str
) -> None:
    config, firewall = tmp_path / "qemu=server.conf", tmp_path / "100.fw"
    config.write_text("name: test\n")
    firewall.write_text("[RULES]\n")
    answer = qmp.cmd(
        "backup",
        {
            "backup-file": str(tmp_path / "vm.vma"),
            spelling: str(config),
            "firewall-file": str(firewall),
            "max-workers": 4,
            "fleecing": False,
        },
    )
    # Who knows Proxmox VE's members gets its answer.
    assert set(answer) == {"UUID"}
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    for name, text in (("qemu=server.conf", "name: test\n"), ("qemu-server.fw", "[RULES]\n")):
        assert good("config", tmp_path / "vm.vma", "--name", name).decode() == text


# --- where it goes ---


def test_a_pipe_that_was_handed_in_gets_the_archive(
    served: Served, qmp: Foreign, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    received: list[bytes] = []

    def read() -> None:
        with open(reading, "rb") as file:
            received.append(file.read())

    qmp.send_fd(writing)
    added = qmp.cmd("add-fd", {"fdset-id": 7, "opaque": "for the archive"})
    os.close(writing)
    assert added["fdset-id"] == 7
    listed = [{"fdset-id": 7, "fds": [{"fd": added["fd"], "opaque": "for the archive"}]}]
    assert qmp.cmd("query-fdsets") == listed
    reader = threading.Thread(target=read)
    reader.start()
    qmp.cmd("backup", {"backup-file": "/dev/fdset/7", "devlist": "a"})
    status = qmp.end_of_backup()["data"]
    assert status["status"] == "done"
    assert status["backupfile"] == "/dev/fdset/7"
    assert qmp.cmd("remove-fd", {"fdset-id": 7}) == {}
    # That was the last one: the reader sees the end.
    reader.join(LIMIT_S)
    assert not reader.is_alive()
    (tmp_path / "piped.vma").write_bytes(received[0])
    assert sha256(restored(tmp_path / "piped.vma", tmp_path / "out", "a")) == sha256(
        served.folder / "a.raw"
    )


def test_a_descriptor_has_a_name_too(qmp: Foreign, tmp_path: Path) -> None:
    with (tmp_path / "vm.vma").open("wb") as file:
        qmp.send_fd(file.fileno())
    assert qmp.cmd("getfd", {"fdname": "backup"}) == {}
    qmp.cmd("backup", {"backup-file": "/dev/fdname/backup"})
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    assert qmp.cmd("closefd", {"fdname": "backup"}) == {}
    good("verify", tmp_path / "vm.vma")


def test_descriptors_go_with_the_client_that_brought_them(served: Served) -> None:
    reading, writing = os.pipe()
    with connected(served.monitor) as client:
        client.send_fd(writing)
        client.cmd("add-fd", {})
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b""


def test_what_is_wrong_with_descriptors_is_said_as_qemu_says_it(qmp: Foreign) -> None:
    assert refusal(qmp, "add-fd", {}).desc == "No file descriptor supplied via SCM_RIGHTS"
    for name, words in (("remove-fd", {"fdset-id": 3}), ("remove-fd", {"fdset-id": 3, "fd": 9})):
        assert re.fullmatch(
            r"File descriptor named 'fdset-id:3.*' not found", refusal(qmp, name, words).desc
        )
    desc = refusal(qmp, "closefd", {"fdname": "x"}).desc
    assert desc == "File descriptor named 'x' not found"
    for path in ("/dev/fdset/3", "/dev/fdname/x"):
        assert "not found" in refusal(qmp, "backup", {"backup-file": path}).desc
    reading, writing = os.pipe()
    qmp.send_fd(reading)
    number = qmp.cmd("add-fd", {})["fdset-id"]
    os.close(reading)
    os.close(writing)
    desc = refusal(qmp, "backup", {"backup-file": f"/dev/fdset/{number}"}).desc
    assert "can be written to" in desc


# --- every error that has a literal text ---


@pytest.mark.parametrize(
    ("more", "kind", "desc"),
    [
        ({"format": "raw"}, "GenericError", "no backup driver for format 'raw'"),
        ({"devlist": "a,nix"}, "DeviceNotFound", "Device 'nix' not found"),
        ({"devlist": ""}, "GenericError", "empty device list"),
        ({"devlist": ",;:"}, "GenericError", "empty device list"),
        ({"config-file": "/nix/x.conf"}, "GenericError", "unable to read file '/nix/x.conf'"),
        ({"config-file": "/etc"}, "GenericError", "unable to read file '/etc'"),
        ({"firewall-file": "/nix/fw"}, "GenericError", "unable to read file '/nix/fw'"),
        ({"speed": -1}, "GenericError", "Parameter 'speed' expects a non-negative value"),
        ({"speed": "quick"}, "GenericError", "invalid size"),
        (
            {"speed": 1.5},
            "GenericError",
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            {"devlist": 1},
            "GenericError",
            "Invalid parameter type for 'devlist', expected: string",
        ),
        (
            {"state": 1},
            "GenericError",
            "Invalid parameter type for 'state', expected: boolean",
        ),
        ({"colour": "red"}, "GenericError", "Parameter 'colour' is unexpected"),
        ({"backupfile": "y"}, "GenericError", "Parameter 'backupfile' is unexpected"),
    ],
)
def test_a_backup_that_cannot_be_is_refused_in_the_known_words(
    qmp: Foreign, tmp_path: Path, more: dict[str, Any], kind: str, desc: str
) -> None:
    before = qmp.status()
    refused = refusal(qmp, "backup", {"backup-file": str(tmp_path / "vm.vma"), **more})
    assert (refused.kind, refused.desc) == (kind, desc)
    assert qmp.status() == before
    assert not list(tmp_path.glob("vm.vma*"))


def test_a_second_backup_is_refused_while_one_runs(qmp: Foreign, tmp_path: Path) -> None:
    running(qmp, tmp_path / "vm.vma")
    first = qmp.status()
    refused = refusal(qmp, "backup", {"backup-file": str(tmp_path / "two.vma")})
    assert (refused.kind, refused.desc) == ("GenericError", "previous backup not finished")
    assert qmp.status()["uuid"] == first["uuid"]
    qmp.cmd("backup-cancel")


def test_other_refusals_name_their_reason(qmp: Foreign, tmp_path: Path) -> None:
    before = qmp.status()
    assert refusal(qmp, "backup", {}).desc == "Parameter 'backup-file' is missing"
    (tmp_path / "there.vma").write_bytes(b"")
    there = refusal(qmp, "backup", {"backup-file": str(tmp_path / "there.vma")})
    assert "exists; vmapipe does not overwrite archives" in there.desc
    nowhere = refusal(qmp, "backup", {"backup-file": "/nix/vm.vma"})
    assert "No such file or directory" in nowhere.desc
    for file in ("-", "fd:3", "", "a\0b"):
        assert (
            "is not a valid place for an archive"
            in refusal(qmp, "backup", {"backup-file": file}).desc
        )
    words = {"backup-file": str(tmp_path / "vm.vma")}
    assert "no state to save" in refusal(qmp, "backup", {**words, "state": True}).desc
    assert "fleecing" in refusal(qmp, "backup", {**words, "fleecing": True}).desc
    assert refusal(qmp, "dance", {}).kind == "CommandNotFound"
    assert qmp.status() == before


def test_a_failed_start_does_not_hide_the_backup_before(qmp: Foreign, tmp_path: Path) -> None:
    qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma")})
    done = qmp.end_of_backup()["data"]
    refusal(qmp, "backup", {"backup-file": str(tmp_path / "vm.vma")})
    assert qmp.status() == done


def test_an_archive_that_fails_half_way_is_told_with_its_first_error(
    qmp: Foreign, tmp_path: Path
) -> None:
    qmp.cmd("backup", {"backup-file": "exec:head -c 1000000 > /dev/null; exit 3"})
    ended = qmp.end_of_backup()
    assert ended["event"] == "BACKUP_FAILED"
    assert ended["data"]["status"] == "error"
    assert "exit 3" in ended["data"]["errmsg"]
    # All of these small disks fits into the archiver's window before it sees the failure.
    assert ended["data"]["transferred"] <= ended["data"]["total"]
    assert set(ended["data"]) == SPECIFIED


# --- for people ---


def test_the_human_monitor_says_what_is_wrong(qmp: Foreign) -> None:
    assert qmp.human("dance") == "unknown command: 'dance'\r\n"
    assert qmp.human("backup").startswith("backup: string expected\r\n")
    assert qmp.human("backup x quick") == "invalid size\r\n"
    assert qmp.human("backup_cancel now") == (
        "backup_cancel: extraneous characters at the end of line\r\n"
    )
    assert qmp.human("backup /nix/x 1 nix") == "Device 'nix' not found\r\n"
    assert "No such file" in qmp.human("backup /nix/x")
    assert "backup backupfile [speed [devlist]]" in qmp.human("help")
    assert "info backup" in qmp.human("info")


# --- the rest of a monitor ---


def test_it_tells_what_it_serves_and_can_do(served: Served, qmp: Foreign, tmp_path: Path) -> None:
    blocks = qmp.cmd("query-block")
    assert [block["device"] for block in blocks] == ["a", "b"]
    assert blocks[1]["inserted"]["image"]["virtual-size"] == 64 * CLUSTER
    assert blocks[1]["inserted"]["file"] == str(served.folder / "b.raw")
    names = {command["name"] for command in qmp.cmd("query-commands")}
    assert names >= {"backup", "query-backup", "backup-cancel", "backup_cancel", "quit"}
    assert {event["name"] for event in qmp.cmd("query-events")} >= {"BACKUP_STARTED"}
    assert "vmapipe" in qmp.cmd("query-version")["package"]
    # And the manual has all of it.
    page = (Path(__file__).parents[3] / "docs" / "monitor.md").read_text()
    for name in names | {event["name"] for event in qmp.cmd("query-events")} | SPECIFIED:
        assert f"`{name}`" in page, name


def test_quit_ends_the_monitor_and_the_backup_with_it(tmp_path: Path) -> None:
    with monitor_in(tmp_path) as fresh:
        with connected(fresh.monitor) as client:
            # Nothing was ever started here.
            assert client.status() == {}
            assert client.human("info backup") == ""
            running(client, tmp_path / "vm.vma")
            assert client.cmd("quit") == {}
            assert client.next_event("BACKUP_CANCELLED")["data"]["errmsg"] == "backup canceled"
        fresh.process.wait(LIMIT_S)
        assert not list(tmp_path.glob("vm.vma*"))
        assert not fresh.monitor.exists()
        assert not list(tmp_path.glob("*.guards"))


def test_commands_of_others_are_answered_while_a_backup_starts(
    served: Served, qmp: Foreign, tmp_path: Path
) -> None:
    before = qmp.status()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with connected(served.monitor) as other:
        refused: list[Refused] = []
        words = {"backup-file": str(fifo)}
        starting = threading.Thread(target=lambda: refused.append(refusal(other, "backup", words)))
        starting.start()
        # It waits for the FIFO's reader; it has not begun, and can be cancelled all the same.
        deadline = time.monotonic() + LIMIT_S
        while not children(served.process, "vmapipe.control.cli.backup"):
            assert time.monotonic() < deadline
        again = refusal(qmp, "backup", {"backup-file": str(tmp_path / "vm.vma")})
        assert again.desc == "previous backup not finished"
        assert qmp.status() == before
        assert qmp.cmd("backup-cancel") == {}
        starting.join(LIMIT_S)
        assert not starting.is_alive()
    assert [error.desc for error in refused] == ["backup canceled"]
    assert qmp.status() == before
