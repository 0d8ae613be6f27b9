# SPDX-License-Identifier: Apache-2.0
"""A hostile QEMU at `vmapipe backup --qmp` and `cleanup`: one clear line in time, nothing left."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.control.qemu.daemon_backup import BOTH, restored
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.control.qmp.hostile import DISK, Flood, Raw, Refusal, event, hostile_qemu, line_of
from tests.machine import bad, end_of, eventually, good, run, started
from vmapipe.control.qemu import undo
from vmapipe.control.qemu.vmstate_commands import MemoryNote
from vmapipe.control.qmp.client import QmpClient
from vmapipe.runtime.errors import Failure

MIB = 1 << 20


def sized(size: Any) -> list[dict[str, Any]]:
    return [{"device": "d", "inserted": {"node-name": "n", "image": {"virtual-size": size}}}]


NOT_VALID = [
    ("query-block", 5, "it is not a list"),
    ("query-block", [{"inserted": 5, "device": "d"}], "[0].inserted is not an object"),
    ("query-block", sized(1e300), "[0].inserted.image.virtual-size is not a whole number"),
    ("query-block", Raw(b'{"return": ' + b"[" * 100_000), "it is nested deeper than 256"),
    ("query-block", Raw(b'{"return": "' + b"x" * (9 * MIB)), "it has more than 8,388,608 bytes"),
    ("query-named-block-nodes", [None], "[0] is not an object"),
    ("query-block-jobs", [{"device": 5}], "[0].device is not a string"),
    ("query-jobs", [{"id": "vmapipe-x-0"}], "[0] has no member 'status'"),
    ("qom-list", [{"name": 5}], "[0].name is not a string"),
]


@pytest.mark.parametrize(("command", "answer", "text"), NOT_VALID)
def test_an_answer_that_is_not_valid_ends_the_backup_in_one_line(
    tmp_path: Path, out: Path, temporary: Path, command: str, answer: Any, text: str
) -> None:
    with hostile_qemu(tmp_path / "q", {command: answer}):
        said = bad("backup", "--qmp", tmp_path / "q", out / "vm.vma")
    assert f"QEMU's answer to {command} is not valid: {text}" in said
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "answer", "text"),
    [
        ("query-memory-size-summary", {"base-memory": "big"}, "base-memory is not a whole number"),
        ("query-migrate", {"status": "active", "ram": 5}, "ram is not an object"),
        ("query-migrate-capabilities", [5], "[0] is not an object"),
        ("query-migrate-parameters", {"max-bandwidth": -1}, "max-bandwidth is -1"),
        ("query-status", {"status": 5}, "status is not a string"),
    ],
)
def test_an_answer_about_the_memory_that_is_not_valid_ends_the_backup_in_one_line(
    tmp_path: Path, out: Path, temporary: Path, command: str, answer: Any, text: str
) -> None:
    with hostile_qemu(tmp_path / "q", {command: answer}):
        said = bad("backup", "--qmp", tmp_path / "q", "--state", out / "vm.vma")
    assert f"QEMU's answer to {command} is not valid: {text}" in said
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "disk",
    [
        sized((1 << 63) - 1),
        [{**DISK, "device": "a\x1b[31mRED\n..//x", "qdev": ""}],
        [{**DISK, "qdev": "\x1b]0;evil\x07"}],
        [{**DISK, "qdev": "x" * 1000}],
        [{**DISK, "qdev": ""}, {**DISK, "qdev": "drive0"}],
        [{**DISK, "qdev": f"scsi{number}"} for number in range(300)],
    ],
)
def test_disks_that_no_archive_could_hold_are_one_line_without_an_escape(
    tmp_path: Path, out: Path, temporary: Path, disk: Any
) -> None:
    with hostile_qemu(tmp_path / "q", {"query-block": disk, "blockdev-add": Refusal("no")}):
        done = run("backup", "--qmp", tmp_path / "q", out / "vm.vma")
    (said,) = done.stderr.decode().splitlines()[-1:]
    assert done.returncode in (1, 2), said
    assert b"Traceback" not in done.stderr
    assert said.isprintable()
    assert len(said) < 7000
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_what_a_hostile_qemu_refuses_with_is_escaped_and_short(tmp_path: Path, out: Path) -> None:
    words = "\x1b]0;evil\x07 no\nsecond line " + "A" * 900_000
    with hostile_qemu(tmp_path / "q", {"transaction": Refusal(words)}):
        said = bad("backup", "--qmp", tmp_path / "q", out / "vm.vma")
    assert r"QEMU refuses the backup: \x1b]0;evil\x07 no\nsecond line" in said
    assert said.isprintable()
    assert len(said) < 2000


@pytest.mark.parametrize(("command", "answer", "text"), NOT_VALID[-4:-1])
def test_cleanup_ends_in_one_line_too(tmp_path: Path, command: str, answer: Any, text: str) -> None:
    with hostile_qemu(tmp_path / "q", {command: answer}):
        said = bad("cleanup", "--qmp", tmp_path / "q") if command != "query-block-jobs" else text
    assert text in said


def floods_after(client: socket.socket, request: Any) -> Any:
    """Events without end, from the begin of the backup on."""
    told = line_of(event("BLOCK_JOB_COMPLETED", device="x")) * 100

    def tell() -> None:
        with contextlib.suppress(OSError):
            while True:
                client.sendall(told)

    threading.Thread(target=tell, daemon=True).start()
    return {}


def peak_mib(process: psutil.Process) -> int:
    """The largest of a command's processes, so far."""
    most = 0
    with contextlib.suppress(psutil.Error, OSError, LookupError):  # it has just ended
        for each in [process, *process.children(recursive=True)]:
            text = Path(f"/proc/{each.pid}/status").read_text()
            most = max(most, int(text.partition("VmHWM:")[2].split()[0]) >> 10)
    return most


@pytest.mark.slow  # QEMU has 30 s for each answer
@pytest.mark.parametrize(
    "odd",
    [
        {"query-block": Flood(line_of(event("X", a="b" * 1000)) * 200)},
        {"query-block": Flood(b"\r\n" * 100_000)},
        {"transaction": floods_after},
    ],
)
def test_a_flood_of_events_costs_little_memory_and_ends_in_time(
    tmp_path: Path, out: Path, odd: Any
) -> None:
    with (
        hostile_qemu(tmp_path / "q", odd),
        started("backup", "--qmp", tmp_path / "q", out / "vm.vma") as process,
    ):
        watched, most = psutil.Process(process.pid), 0

        def is_over() -> bool:
            nonlocal most
            most = max(most, peak_mib(watched))
            return process.poll() is not None or ("transaction" in odd and most_seen.is_set())

        most_seen = threading.Event()
        timer = threading.Timer(10, most_seen.set)
        timer.start()
        assert eventually(is_over)
        timer.cancel()
        if process.poll() is None:
            process.terminate()  # it waits for data that never comes, and can be ended
        code, said = end_of(process)
    assert code in (1, 143), said
    assert "Traceback" not in said
    assert 0 < most < 150
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("way", ["tcp", "unix", "pretty"])
def test_an_honest_qemu_is_backed_up_at_each_kind_of_address(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path, way: str
) -> None:
    addresses = {
        "tcp": daemon.tcp,
        "unix": f"unix:{daemon.qmp},server=on,wait=off",
        "pretty": str(daemon.pretty),
    }
    address = addresses[way]
    good("backup", "--qmp", address, *BOTH, out / "vm.vma")
    assert restored(out / "vm.vma", tmp_path / "restored") == contents
    assert daemon.ours() == []
    assert good("cleanup", "--qmp", address) == b"there was nothing to remove\n"


def test_a_human_monitor_is_told_as_what_it_is(tmp_path: Path, out: Path) -> None:
    hello = Raw(b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ")
    with hostile_qemu(tmp_path / "q", greeting=hello):
        said = bad("backup", "--qmp", tmp_path / "q", out / "vm.vma")
    assert "is a human monitor (-monitor); --qmp wants a QMP monitor" in said


def test_a_plain_installation_backs_up_a_running_qemu(daemon: StorageDaemon, out: Path) -> None:
    """Without QEMU's own library, which is installed for the tests."""
    program = "import sys; sys.modules['qemu'] = None\nfrom vmapipe.control.main import main\n"
    program += "sys.exit(main(sys.argv[1:]))"
    words = ("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma")
    good(*words, tool=(sys.executable, "-P", "-c", program))


def test_a_memory_that_moves_for_ever_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "_LONGEST_STREAM_S", 0.5)
    note = MemoryNote("/tmp/vmapipe-sinks-abcdefgh", False, "paused", (), 1).encode()
    sent = iter(range(1 << 30))

    def moves(client: socket.socket, request: Any) -> Any:
        return {"status": "active", "ram": {"transferred": next(sent), "total": 1 << 30}}

    entry = {"name": "vmapipe-0123abcd-memory", "type": "child<authz-simple>"}
    odd = {"qom-list": [entry], "qom-get": note, "query-migrate": moves}
    with hostile_qemu(tmp_path / "q", odd):
        client = QmpClient(str(tmp_path / "q"))
        try:
            with pytest.raises(Failure, match="QEMU is not done with the machine's memory"):
                undo.undo_memory(client, "vmapipe-", 5.0)
        finally:
            client.close()
