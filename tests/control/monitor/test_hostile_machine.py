# SPDX-License-Identifier: Apache-2.0
"""A monitor beside a hostile QEMU: its clients are answered, and served meanwhile."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.control.qmp.hostile import DISK, Flood, Raw, Silence, event, hostile_qemu, line_of
from tests.machine import LIMIT_S, next_event, started
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpPeer, QmpRefused


class Patient(QmpPeer):
    """For whoever asks a monitor that asks a QEMU."""

    greeting_s = answer_s = LIMIT_S


@contextmanager
def monitor_beside(folder: Path, odd: dict[str, Any]) -> Iterator[str]:
    """Its socket."""
    words = ("monitor", "--json", "--listen", folder / "m.sock", "--qmp", folder / "q.sock")
    with hostile_qemu(folder / "q.sock", odd), started(*words) as process:
        next_event(process, "ready")
        yield str(folder / "m.sock")
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def ask(socket_path: str, name: str) -> Any:
    client = QmpClient(socket_path, Patient())
    try:
        return client.execute(Command(name, {}))
    finally:
        client.close()


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (Raw(b'{"return":' + b"[" * 100_000 + b"\r\n"), "it is nested deeper than"),
        (Raw(b'{"return": "\xff"}\r\n'), "it is not UTF-8"),
        ([{"device": 5}], r"\[0\].device is not a string"),
        (5, "it is not a list"),
    ],
)
def test_a_question_that_qemu_answers_with_junk_is_refused_with_the_reason(
    tmp_path: Path, odd: Any, why: str
) -> None:
    with monitor_beside(tmp_path, {"query-block": odd}) as monitor:
        with pytest.raises(QmpRefused, match=f"QEMU's answer to query-block is not valid: {why}"):
            ask(monitor, "query-block")
        assert ask(monitor, "query-status")["running"] is True


@pytest.mark.slow  # QEMU has 30 s for each answer
@pytest.mark.parametrize("odd", [Silence(), Flood(line_of(event("X")) * 500)])
def test_a_question_that_qemu_never_answers_is_refused_and_others_are_served_meanwhile(
    tmp_path: Path, odd: Any
) -> None:
    with (
        monitor_beside(tmp_path, {"query-block": odd}) as monitor,
        socket.socket(socket.AF_UNIX) as waiting,
    ):
        waiting.settimeout(LIMIT_S)
        waiting.connect(monitor)
        lines = waiting.makefile("rb")
        lines.readline()
        waiting.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-block"}')
        lines.readline()
        assert "qemu" in ask(monitor, "query-version")
        refused = json.loads(lines.readline())["error"]["desc"]
        assert "QEMU has not answered query-block for 30 s" in refused


def test_an_honest_qemu_is_asked_and_answers(tmp_path: Path) -> None:
    with monitor_beside(tmp_path, {}) as monitor:
        assert ask(monitor, "query-block") == [DISK]
