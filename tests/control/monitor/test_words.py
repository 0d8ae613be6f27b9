# SPDX-License-Identifier: Apache-2.0
"""What commands are made of: sizes, device lists, members; and the RFC's layout for people."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.monitor.commands import HumanMonitor, status_lines
from vmapipe.control.monitor.disks import (
    BackupDevice,
    check_devices,
    machine_devices,
    split_devlist,
)
from vmapipe.control.qmp.server import (
    Arguments,
    DeferredAnswer,
    QmpError,
    RequestReader,
    human_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10", 10 << 20),
        ("4096B", 4096),
        ("4096b", 4096),
        ("64k", 64 << 10),
        ("1.5G", 3 << 29),
        ("0", 0),
        ("2T", 2 << 40),
        (" 1M ", 1 << 20),
    ],
)
def test_sizes_are_those_of_qemus_human_monitor(text: str, size: int) -> None:
    assert human_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "x", "-1", "1e3", "1_0", "1.2.3", "9" * 400, "1MM", "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(QmpError, match="invalid size"):
        human_size(text)


@given(st.text(alphabet="ab,;:", max_size=20))
def test_a_devlist_has_each_name_once_and_none_that_is_empty(text: str) -> None:
    names = split_devlist(text)
    assert len(set(names)) == len(names)
    assert set(names) == set(text.replace(";", ",").replace(":", ",").split(",")) - {""}


def test_a_machines_disks_are_known_by_all_their_names() -> None:
    blocks: list[dict[str, Any]] = [
        {
            "device": "",
            "qdev": "/machine/peripheral/virtio0/virtio-backend",
            "inserted": {"node-name": "n0", "ro": False},
        },
        {"device": "floppy0", "qdev": "", "type": "unknown"},
    ]
    nodes: list[dict[str, Any]] = [
        {"node-name": "n0", "ro": False},
        {"node-name": "spare", "ro": True},
    ]
    devices = machine_devices(blocks, nodes)
    for word in ("drive-virtio0", "virtio0", "n0"):
        assert check_devices(devices, word) == [word]
    assert check_devices(devices, None) == []
    with pytest.raises(QmpError, match=r"^Device 'floppy0' has no medium$"):
        check_devices(devices, "floppy0")
    with pytest.raises(QmpError, match=r"^Device 'spare' is read only$"):
        check_devices(devices, "spare")
    with pytest.raises(QmpError, match=r"^empty device list$"):
        check_devices([BackupDevice(frozenset({"a"}), read_only=True)], None)


def test_a_member_has_one_spelling_at_a_time() -> None:
    arguments = Arguments({"backup-file": "x", "backupfile": "y"})
    assert arguments.text("backup-file", "backupfile") == "x"
    with pytest.raises(QmpError, match="'backupfile' is unexpected"):
        arguments.end()
    with pytest.raises(QmpError, match="expected: integer"):
        Arguments({"speed": True}).number("speed")


RUNNING = {
    "status": "active",
    "total": 8589934592,
    "transferred": 2147483648,
    "zero-bytes": 1073741824,
    "start-time": 1354266000,
    "backupfile": "/backup/vm.vma",
    "uuid": "014474c5-218d-4fe9-ad6b-515a31bd8cda",
}


def test_a_status_looks_for_people_as_in_the_rfc() -> None:
    assert status_lines(RUNNING) == [
        "Backup status: active",
        "Backup file: /backup/vm.vma",
        "Backup uuid: 014474c5-218d-4fe9-ad6b-515a31bd8cda",
        "Total size: 8589934592",
        "Transferred bytes: 2147483648 (25%)",
        "Zero bytes: 1073741824 (12%)",
    ]
    failed = {**RUNNING, "status": "error", "errmsg": "no space", "end-time": 1354266001}
    assert status_lines(failed)[0] == "Backup status: error - no space"
    assert status_lines({}) == []
    assert status_lines({**RUNNING, "total": 0})[4] == "Transferred bytes: 2147483648 (0%)"


def test_lines_of_people_become_the_commands_of_programs() -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    later = DeferredAnswer()

    def execute(name: str, arguments: dict[str, Any]) -> Any:
        heard.append((name, arguments))
        return {} if name == "query-backup" else later

    human = HumanMonitor(execute)
    answer = human.command("backup '/srv/a file' 10M ide0,ide1")
    assert isinstance(answer, DeferredAnswer)
    assert not answer.done
    later.refuse(QmpError("Device 'ide1' not found"))
    assert answer.result() == "Device 'ide1' not found\r\n"
    assert human.command("info backup") == ""
    assert heard == [
        ("backup", {"backupfile": "/srv/a file", "speed": 10 << 20, "devlist": "ide0,ide1"}),
        ("query-backup", {}),
    ]
    assert human.command("backup 'x") == "No closing quotation\r\n"
    assert human.command("") == ""


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_requests_are_the_same_however_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    stream = b'{"execute": "a", "id": "\xc3\xa4"}{"b": [1,\n2]}' + data + b"\n"
    whole = RequestReader().feed(stream)
    assert [request.value for request in whole[:2]] == [
        {"execute": "a", "id": "ä"},
        {"b": [1, 2]},
    ]
    pieces, at = RequestReader(), 0
    found = []
    for cut in [*sorted(cuts), len(stream)]:
        found += pieces.feed(stream[at:cut])
        at = max(at, cut)
    assert [(r.value, r.problem) for r in found] == [(r.value, r.problem) for r in whole]
