# SPDX-License-Identifier: Apache-2.0
"""A message without an end takes a bounded part of a service's memory, and no honest job is touched."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil
import pytest

from tests.archiver.service.serving import serving
from tests.machine import LIMIT_S, good, make_disk
from tests.network.place import until

MIB = 1 << 20
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
# A frame of 1 MiB, with more to come.
PART = b"\x03" + MIB.to_bytes(8, "big") + bytes(MIB)
# More than one connection may have.
PARTS = 60


def send_without_end(sock: socket.socket, parts: int) -> None:
    """As much as is taken; what comes after the end is thrown away."""
    sock.sendall(GREETING + READY)
    said = b""
    while b"READY" not in said:
        said += sock.recv(1000)
    with contextlib.suppress(ConnectionError):
        for _ in range(parts):
            sock.sendall(PART)


def test_a_message_without_an_end_is_ended_and_its_memory_is_free_again(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A0" * 40)
    with serving(tmp_path / "store") as served:
        front = psutil.Process(served.process.pid)
        before = front.memory_info().rss
        port = int(served.endpoint.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as sock:
            send_without_end(sock, PARTS)
            # While the connection is still open at its sender.
            until(lambda: front.memory_info().rss - before < 100 * MIB, served.process)
            good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "vm.vma")
        log = served.stop()
    assert any("messages had no end" in str(event.get("text")) for event in log), log


def test_much_data_in_messages_that_end_is_none_of_that(tmp_path: Path) -> None:
    # 52 MiB: more than a message without an end may have.
    disk = make_disk(tmp_path / "disk.raw", "A" * 832)
    with serving(tmp_path / "store") as served:
        good("backup", *served.words, "--disk", f"a={disk}", "vm.vma")
        log = served.stop()
    assert not any("no end" in str(event.get("text")) for event in log)


@pytest.mark.soak
def test_many_messages_without_an_end_take_no_more_than_all_may_have_together(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A0" * 40)
    with serving(tmp_path / "store") as served, contextlib.ExitStack() as stack:
        before = served.rss_peak_bytes()
        port = int(served.endpoint.rpartition(":")[2])
        for _ in range(20):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
            # Less than a single one may have.
            send_without_end(sock, 40)
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "vm.vma")
        assert served.rss_peak_bytes() - before < 600 * MIB
        log = served.stop()
    assert any("messages had no end" in str(event.get("text")) for event in log), log
