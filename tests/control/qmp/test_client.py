# SPDX-License-Identifier: Apache-2.0
"""The client of QEMU's monitor against a QEMU that floods, lies, hangs or is somebody else."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.qemu.storage_daemon import StorageDaemon
from tests.control.qmp.hostile import (
    DISK,
    GREETING,
    Flood,
    HostileQemu,
    Raw,
    Refusal,
    Silence,
    event,
    hostile_qemu,
    line_of,
)
from tests.machine import LIMIT_S
from vmapipe.control.qmp.addresses import Address, parse_address
from vmapipe.control.qmp.client import EventQueue, QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone, QmpInvalid, QmpPeer, QmpRefused
from vmapipe.runtime.errors import UsageError

EVENT = line_of(event("BLOCK_JOB_ERROR", device="vmapipe-x-0", operation="write"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@contextlib.contextmanager
def client_of(qemu: HostileQemu, answer_s: float = LIMIT_S) -> Iterator[QmpClient]:
    peer = QmpPeer()
    peer.answer_s = answer_s
    client = QmpClient(str(qemu.path), peer)
    try:
        yield client
    finally:
        client.close()


def ask(client: QmpClient, name: str = "query-block") -> Any:
    return client.execute(Command(name, {}))


def take_all(client: QmpClient, told: list[str]) -> None:
    """The names of all events, until it raises."""
    while True:
        told += [each["event"] for each in client.events()]


def is_readable(client: QmpClient, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(client.fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def test_an_honest_answer_is_returned_and_events_before_it_are_kept_in_order(path: Path) -> None:
    events = [event("STOP"), event("RESUME"), event("JOB_STATUS_CHANGE", id="j", status="pending")]

    def tell(client: socket.socket, request: dict[str, Any]) -> Any:
        client.sendall(b"".join(map(line_of, events)))
        return [DISK]

    with hostile_qemu(path, {"query-block": tell}) as qemu, client_of(qemu) as client:
        assert not is_readable(client, 0)
        assert ask(client) == [DISK]
        assert is_readable(client, 0)
        assert client.events() == events
        assert client.events() == []
        assert not is_readable(client, 0)


def test_an_event_that_comes_by_itself_makes_the_descriptor_readable(path: Path) -> None:
    with hostile_qemu(path) as qemu, client_of(qemu) as client:
        (theirs,) = qemu.clients
        theirs.sendall(line_of(event("STOP"))[:10])
        assert is_readable(client, LIMIT_S)
        assert client.events() == []
        theirs.sendall(line_of(event("STOP"))[10:])
        assert is_readable(client, LIMIT_S)
        assert [each["event"] for each in client.events()] == ["STOP"]


def test_the_end_is_told_after_the_last_event_and_then_always(path: Path) -> None:
    with hostile_qemu(path) as qemu, client_of(qemu) as client:
        (theirs,) = qemu.clients
        theirs.sendall(line_of(event("SHUTDOWN")))
        theirs.shutdown(socket.SHUT_RDWR)
        assert is_readable(client, LIMIT_S)
        told: list[str] = []
        with pytest.raises(QmpGone, match="QEMU has ended or closed its monitor"):
            take_all(client, told)
        assert told == ["SHUTDOWN"]
        assert is_readable(client, 0)
        with pytest.raises(QmpGone, match="QEMU has ended"):
            ask(client)


@pytest.mark.parametrize(
    "flood",
    [Flood(EVENT * 50), Flood(b"\r\n" * 4096), Flood(line_of(event("RTC_CHANGE", offset=1)) * 50)],
)
def test_the_deadline_holds_also_while_messages_keep_coming(path: Path, flood: Flood) -> None:
    with hostile_qemu(path, {"query-block": flood}) as qemu, client_of(qemu, 0.5) as client:
        with pytest.raises(QmpGone, match="QEMU has not answered query-block for 0 s"):
            ask(client)
        with pytest.raises(QmpGone, match="QEMU has not answered query-block"):
            ask(client, "query-status")


def test_a_flood_of_events_takes_a_bounded_memory_and_hides_no_other_event(path: Path) -> None:
    queue = EventQueue()
    for number in range(100_000):
        assert queue.put(event("BLOCK_IO_ERROR", device=f"d{number}"), 100)
    assert queue.put(event("BLOCK_JOB_COMPLETED", device="a"), 100)
    found = queue.take()
    assert len(found) < 2000
    assert found[-1]["event"] == "BLOCK_JOB_COMPLETED"
    assert len(queue) == 0


def test_large_events_are_bounded_by_their_bytes() -> None:
    queue = EventQueue()
    for _ in range(1000):
        queue.put(event("A", text="x" * 60_000), 60_000)
    assert sum(len(each["data"]["text"]) for each in queue.take()) < 1 << 20


def names(client: socket.socket, request: dict[str, Any]) -> Any:
    client.sendall(b"".join(line_of(event(f"E{number}")) for number in range(300)))
    return [DISK]


def foreign_id(client: socket.socket, request: dict[str, Any]) -> Any:
    return Raw(line_of({"return": [], "id": "nobody"}))


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        (Raw(b'{"return": ' + b"[" * 100_000), "answer to query-block is not valid: it is nested"),
        (
            Raw(b'{"return": "' + b"x" * (9 << 20)),
            "answer to query-block is not valid: it has more",
        ),
        (Raw(b'{"return": [{"device": "\xff"}]}\n'), "it is not UTF-8"),
        (Raw(b"{}\r\n"), "it has neither a member 'return' nor an 'error'"),
        (Raw(b'{"error": 5}\r\n'), "it has neither a member 'return' nor an 'error'"),
        (Refusal(5), "it has neither a member 'return' nor an 'error'"),
        (Raw(b"junk\r\n"), "it is not a JSON object"),
        (foreign_id, "it belongs to another question"),
        ({}, "answer to query-block is not valid: it is not a list"),
        ([{"device": 5}], r"\[0\].device is not a string"),
        ([DISK, {"device": "a\0b"}], r"\[1\].device has a NUL character"),
        ([{"device": "x" * 2000}], r"\[0\].device has more than 1,024 characters"),
        ([{"inserted": {}}], r"\[0\] has no member 'device'"),
        ([{"device": "d", "inserted": {"image": {"virtual-size": -1}}}], "virtual-size is -1"),
        (names, "event is not valid: there are events of more than 200 names"),
        (Raw(line_of({"event": 5}) + line_of({"return": [DISK]})), "event is not a string"),
        (Raw(line_of(event("BLOCK_JOB_ERROR", device=7))), "event is not valid: data.device is"),
        (Raw(line_of(event("A", text="x" * 70_000))), "event is not valid: it has more than 65536"),
        (
            Raw(b'{"event": "A", "data": ' + b"[" * 1000),
            "answer to query-block is not valid: it is nested",
        ),
    ],
)
def test_an_answer_that_cannot_be_is_told_in_one_line_and_nothing_more_is_believed(
    path: Path, odd: Any, text: str
) -> None:
    with hostile_qemu(path, {"query-block": odd}) as qemu, client_of(qemu) as client:
        with pytest.raises(QmpInvalid, match=text) as first:
            ask(client)
        assert len(str(first.value)) < 1500
        with pytest.raises(QmpInvalid, match=text):
            ask(client, "query-status")
        with pytest.raises(QmpInvalid, match=text):
            take_all(client, [])


@pytest.mark.parametrize("is_brief", [False, True])
def test_what_the_last_user_of_a_monitor_has_not_waited_for_is_passed_over(
    path: Path, is_brief: bool
) -> None:
    late = [line_of({"return": [DISK], "id": number}) for number in (1, 2, "nobody", None)]
    late.append(line_of({"error": {"class": "x", "desc": "y"}, "id": 1}))
    greeting = Raw(b"".join([EVENT, *late, line_of({"return": {}}), line_of(GREETING), *late]))
    with hostile_qemu(path, greeting=greeting):
        client = QmpClient(str(path), is_brief=is_brief)
        with contextlib.closing(client):
            assert ask(client, "query-status")["status"] == "running"


def test_an_answer_that_nobody_asked_for_ends_the_connection(path: Path) -> None:
    with hostile_qemu(path) as qemu, client_of(qemu) as client:
        (theirs,) = qemu.clients
        theirs.sendall(line_of({"return": {}}))
        assert is_readable(client, LIMIT_S)
        with pytest.raises(QmpInvalid, match="nothing was asked"):
            client.events()


def test_what_a_refusal_says_is_escaped_and_bounded(path: Path) -> None:
    words = "\x1b]0;evil\x07 no\nsecond line" + "x" * 900_000
    with hostile_qemu(path, {"query-block": Refusal(words)}) as qemu, client_of(qemu) as client:
        with pytest.raises(QmpRefused) as caught:
            ask(client)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 1000
        assert ask(client, "query-status")["status"] == "running"


@pytest.mark.parametrize(
    ("greeting", "text"),
    [
        ({"QMP": None}, "QEMU's greeting is not valid: it has no member 'QMP'"),
        ({"error": {"desc": "\x1b[31m"}}, "QEMU's greeting is not valid"),
        (Raw(b"[1, 2]\r\n"), "not a QMP monitor"),
        (Raw(b"HTTP/1.0 400\r\n"), "not a QMP monitor: it begins with `HTTP/1.0 400"),
        (Raw(b'{"QMP":' + b"[" * 100_000), "not a QMP monitor"),
        (Raw(b'{"QMP":"' + b"x" * (9 << 20)), "not a QMP monitor"),
        (Raw(b"\x1b]0;evil\x07\r\n"), r"begins with `\\x1b\]0;evil\\x07"),
        (
            Raw(b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "),
            "is a human monitor .-monitor.; --qmp wants a QMP monitor",
        ),
    ],
)
def test_whoever_greets_otherwise_is_told_as_what_it_is(
    path: Path, greeting: Any, text: str
) -> None:
    with hostile_qemu(path, greeting=greeting) as qemu:
        with pytest.raises(QmpInvalid, match=text) as caught:
            QmpClient(str(qemu.path))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("greeting", [Silence(), Flood(b"\r\n" * 1000), Raw(b'{"QMP": {')])
def test_a_greeting_that_never_ends_has_an_end(path: Path, greeting: Any) -> None:
    peer = QmpPeer()
    peer.greeting_s = 0.5
    with (
        hostile_qemu(path, greeting=greeting) as qemu,
        pytest.raises(QmpGone, match="the QMP monitor does not answer"),
    ):
        QmpClient(str(qemu.path), peer)


def test_a_peer_that_reads_nothing_is_not_waited_for_for_ever(path: Path) -> None:
    """It has taken one command, and is silent: the next ones fill its socket."""
    big = Command("blockdev-add", {"x": "y" * (64 << 20)})
    with (
        hostile_qemu(path, {"query-status": Silence()}) as qemu,
        client_of(qemu, 0.5) as client,
    ):
        client._wire.send({"execute": "query-status"}, time.monotonic() + LIMIT_S)
        with pytest.raises(QmpGone, match="QEMU has not answered blockdev-add"):
            client.execute(big)


def test_a_descriptor_is_given_with_its_name(path: Path) -> None:
    got: list[int] = []

    def take(client: socket.socket, request: dict[str, Any]) -> Any:
        return {}

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(line_of(GREETING))
                for _ in range(2):
                    _, fds, _, _ = socket.recv_fds(peer, 1 << 16, 4)
                    got.extend(fds)
                    peer.sendall(line_of({"return": {}}))

        thread = threading.Thread(target=serve)
        thread.start()
        client = QmpClient(str(path))
        reading, writing = os.pipe()
        try:
            client.give_fd(writing, "name")
            thread.join(LIMIT_S)
            assert len(got) == 1
            os.write(got[0], b"through")
            assert os.read(reading, 100) == b"through"
        finally:
            client.close()
            for fd in (reading, writing, *got):
                os.close(fd)


def test_the_memory_for_hostile_answers_stays_small(path: Path) -> None:
    """Each of what took 161 MiB to 3 GiB once; what an honest client takes is some 30 MiB."""
    program = (
        "import sys\n"
        "from vmapipe.control.qmp.connection import Command, QmpGone, QmpPeer\n"
        "from vmapipe.control.qmp.client import QmpClient\n"
        "class Short(QmpPeer):\n"
        "    answer_s = 3.0\n"
        "client = QmpClient(sys.argv[1], Short())\n"
        "try:\n"
        "    client.execute(Command('query-block', {}))\n"
        "except QmpGone as error:\n"
        "    print(error)\n"
        "lines = open('/proc/self/status').readlines()\n"
        "print(int(next(line for line in lines if 'VmHWM' in line).split()[1]) >> 10)\n"
    )
    for odd in (
        Flood(EVENT * 1000),
        Flood(b'{"return": "' + b"x" * (1 << 20)),
        Raw(line_of({"return": [{"device": "x" * (7 << 20)}]})),
        Raw(b'{"return": [' + b"{}," * 2_000_000 + b"{}]}\n"),
        Raw(line_of({"return": [{"device": f"d{n}", "inserted": {}} for n in range(60_000)]})),
    ):
        with hostile_qemu(path, {"query-block": odd}) as qemu:
            done = subprocess.run(
                [sys.executable, "-P", "-c", program, str(qemu.path)],
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=True,
            )
        path.unlink()
        assert int(done.stdout.split()[-1]) < 80, done.stdout


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm/qmp.sock", Address("/run/vm/qmp.sock")),
        ("qmp.sock", Address("qmp.sock")),
        ("unix:/run/vm/qmp.sock", Address("/run/vm/qmp.sock")),
        ("unix:/a,,b,server=on,wait=off", Address("/a,b")),
        ("tcp:127.0.0.1:4444", Address("", "127.0.0.1", 4444)),
        ("tcp:127.0.0.1:4444,server=on,wait=off", Address("", "127.0.0.1", 4444)),
        ("tcp:[::1]:4444", Address("", "::1", 4444)),
        ("tcp://[::1]:4444", Address("", "::1", 4444)),
        ("tcp::4444", Address("", "localhost", 4444)),
    ],
)
def test_an_address_is_a_path_or_what_qemu_calls_it(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(address.absolute)._replace(path="") == address._replace(path="")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1:4444", "for a TCP port say tcp:127.0.0.1:4444"),
        ("localhost:4444", "for a TCP port say tcp:localhost:4444"),
        ("tcp:127.0.0.1", "is not a valid address like tcp:127.0.0.1:4444"),
        ("tcp:127.0.0.1:0", "is not a valid address"),
        ("tcp:127.0.0.1:99999", "is not a valid address"),
        ("unix:", "a Unix socket is named by its path"),
        ("unix:name,abstract=on", "a Unix socket is named by its path"),
    ],
)
def test_what_is_not_an_address_is_refused_with_the_way_out(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_address(text)


def test_a_file_or_folder_is_told_as_not_a_socket(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, tmp_path):
        with pytest.raises(QmpGone, match="it is not a socket; is the machine running"):
            QmpClient(str(place))


def test_a_socket_that_one_may_not_use_is_told_with_who_may() -> None:
    text = str(QmpPeer().not_reached("qmp.sock", os.strerror(errno.EACCES)))
    assert text.endswith("Permission denied; run it as root, or as the user that QEMU runs as")


@pytest.mark.parametrize("kind", ["tcp", "pretty", "unix"])
def test_each_of_qemus_own_monitors_is_understood(daemon: StorageDaemon, kind: str) -> None:
    addresses = {"tcp": daemon.tcp, "pretty": str(daemon.pretty), "unix": f"unix:{daemon.qmp}"}
    client = QmpClient(parse_address(addresses[kind]))
    try:
        assert len(ask(client, "query-qmp-schema")) > 100
        assert client.peer_pid == daemon.process.pid
    finally:
        client.close()


def test_the_clock_that_people_set_does_not_matter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with hostile_qemu(path) as qemu, client_of(qemu) as client:
        assert ask(client) == [DISK]
