# SPDX-License-Identifier: Apache-2.0
"""Whoever answers at a socket: what our clients of jobs, monitors and QEMU say of strangers."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.machine import LIMIT_S
from vmapipe.control.cli.running import latency_lines
from vmapipe.control.coordinator import job_client as jobs_module
from vmapipe.control.coordinator.job_client import JobClient
from vmapipe.control.monitor import client as monitor_module
from vmapipe.control.monitor.client import guarded_disks
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import QmpPeer
from vmapipe.runtime.errors import Failure

GREETING = b'{"QMP": {}}\r\n'
NBD = b"NBDMAGICIHAVEOPT\0\3"
CLIENTS: dict[str, Callable[[str], object]] = {
    "job": JobClient,
    "monitor": guarded_disks,
    "qemu": QmpClient,
}


@contextlib.contextmanager
def stranger(says: Sequence[bytes]) -> Iterator[str]:
    """Says the first at once, each other one when it has heard something; then hangs up.

    An empty one is silence, until the client has given up.
    """
    with tempfile.TemporaryDirectory(prefix="vmapipe-test-") as folder:
        path = str(Path(folder) / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def serve() -> None:
                peer, _ = listener.accept()
                with peer, contextlib.suppress(ConnectionError):
                    for number, data in enumerate(says):
                        if number:
                            peer.recv(1 << 16)
                        peer.sendall(data)
                        if not data:
                            peer.recv(1 << 16)

            thread = threading.Thread(target=serve)
            thread.start()
            yield path
            thread.join(LIMIT_S)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("client", "says", "text"),
    [
        ("job", [NBD], "what answers there is not QMP; is it a backup's socket"),
        ("job", [b"HTTP/1.1 400 Bad Request\r\n"], "is it a backup's socket"),
        ("job", [GREETING, b"[1, 2]\r\n"], "is it a backup's socket"),
        ("job", [GREETING], "the backup has just ended"),
        ("job", [b""], "the backup has not answered for"),
        ("job", [GREETING, b""], "the backup has not answered qmp_capabilities for"),
        ("job", [GREETING, b'{"error": {"desc": "no"}}\n'], "^no$"),
        ("monitor", [NBD], "is an export's socket; --monitor wants the monitor's own"),
        ("monitor", [b"SSH-2.0\r\n"], "what answers there is not QMP; is this a monitor's socket"),
        ("monitor", [GREETING], "no monitor answers there, or it has too many clients"),
        ("monitor", [b""], "no greeting came within"),
        ("monitor", [GREETING, b""], "the monitor has not answered qmp_capabilities for"),
        (
            "monitor",
            [GREETING, b'{"return": {}}\n', b'{"error": {"desc": "no"}}\n'],
            "no; is it a vmapipe monitor that serves disks",
        ),
        ("qemu", [NBD], "is an NBD export's socket; --qmp wants the QMP monitor's"),
        ("qemu", [b""], "the QMP monitor does not answer; it serves one client at a time"),
        ("qemu", [GREETING], "QEMU has ended or closed its monitor"),
        (
            "qemu",
            [b"\r\n" + GREETING, b"{broken}\r\n"],
            "QEMU's answer to qmp_capabilities is not valid: it is not JSON",
        ),
    ],
)
def test_a_stranger_is_told_in_the_words_of_who_was_expected(
    monkeypatch: pytest.MonkeyPatch, client: str, says: list[bytes], text: str
) -> None:
    for peer in (jobs_module._BackupPeer, monitor_module._Monitor, QmpPeer):
        monkeypatch.setattr(peer, "greeting_s", LIMIT_S if says[0] else 0.2)
        monkeypatch.setattr(peer, "answer_s", LIMIT_S if all(says) else 0.2)
    with stranger(says) as path, pytest.raises(Failure, match=text):
        CLIENTS[client](path)


def test_nobody_at_all_is_told_in_the_words_of_who_was_expected(tmp_path: Path) -> None:
    for client, text in (
        ("job", "No such file or directory; has the backup ended"),
        ("monitor", "cannot ask the monitor at .*: No such file or directory; is it running"),
        ("qemu", "cannot reach QEMU's monitor at .*: No such file or directory"),
    ):
        with pytest.raises(Failure, match=text):
            CLIENTS[client](str(tmp_path / "none"))


def test_what_the_guest_feels_is_shown_with_its_bound_and_as_curves() -> None:
    felt = {
        "bound_s": 0.02,
        "p99_s": 0.011,
        "worst_s": 1.5,
        "limit_bytes_s": 8 << 20,
        "last_p99_s": [0.0, 0.001, 0.04, 0.011],
        "last_read_bytes_s": [0, 100 << 20, 50 << 20, 8 << 20],
    }
    assert latency_lines({"guest_latency": felt}) == [
        "  guest waits 11 ms (bound 20 ms, worst second 1.5 s), so the backup may read 8.0 MiB/s",
        "    waits, up to     40 ms   ▁█▃",
        "    reads, up to 100.0 MiB/s   █▄▁",
    ]
    assert latency_lines({"guest_latency": None}) == []
    unlimited = {"guest_latency": {**felt, "limit_bytes_s": 0}}
    assert latency_lines(unlimited)[0].endswith("may read as fast as it can")
