# SPDX-License-Identifier: Apache-2.0
"""What a QEMU knows, asked piece by piece, is what its schema says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.control.qemu.storage_daemon import StorageDaemon
from tests.control.qmp.hostile import GREETING, hostile_qemu, line_of
from vmapipe.control.qemu.features import Features, find_features
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

NAME = "vmapipe-0123abcd-none"
ASKED = Features(
    frozenset({"on-cbw-error", "cbw-timeout"}),
    frozenset({"max-workers"}),
    frozenset({"copy-before-write", "snapshot-access", "null-co"}),
)


def of_schema(schema: list[dict[str, Any]]) -> Features:
    types = {entry["name"]: entry for entry in schema}

    def members(name: str) -> dict[str, str]:
        return {each["name"]: each["type"] for each in types[name]["members"]}

    backup = members(types["blockdev-backup"]["arg-type"])
    variants = types[types["blockdev-add"]["arg-type"]]["variants"]
    return Features(
        frozenset(backup) & ASKED.members,
        frozenset(members(backup["x-perf"])) & ASKED.x_perf,
        frozenset(variant["case"] for variant in variants) & ASKED.drivers,
    )


@pytest.mark.every_qemu
def test_each_qemu_tells_by_its_refusals_what_its_schema_says(
    daemon: StorageDaemon, qemu: str
) -> None:
    schema = daemon.ask("query-qmp-schema")
    with contextlib.closing(QmpClient(str(daemon.qmp))) as client:
        found = find_features(client, NAME)
    assert found == of_schema(schema)
    assert found.x_perf == ASKED.x_perf
    assert found.drivers == ASKED.drivers
    assert daemon.ours() == []


def test_a_qemu_that_refuses_for_another_reason_knows_nothing(tmp_path: Path) -> None:
    """Nor does one that refuses nothing: it cannot be told what it knows."""
    answers: list[dict[str, Any]] = [{}, {"blockdev-backup": {}}]
    for odd in answers:
        path = tmp_path / f"q{len(odd)}"
        with hostile_qemu(path, odd), contextlib.closing(QmpClient(str(path))) as client:
            assert find_features(client, NAME) == Features(frozenset(), frozenset())


def test_what_opens_a_connection_goes_with_the_one_command_that_it_is_for(tmp_path: Path) -> None:
    """A monitor is held for one answer, not for one after another."""
    pieces: list[bytes] = []
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            qemu, _ = listener.accept()
            with qemu:
                qemu.sendall(line_of(GREETING))
                pieces.append(qemu.recv(65536))
                for request in map(json.loads, pieces[0].splitlines()):
                    qemu.sendall(line_of({"return": {"status": "running"}, "id": request["id"]}))

        played = threading.Thread(target=serve)
        played.start()
        with contextlib.closing(QmpClient(str(path), is_brief=True)) as client:
            assert client.execute(Command("query-status", {})) == {"status": "running"}
        played.join()
    asked = [json.loads(line)["execute"] for line in pieces[0].splitlines()]
    assert asked == ["qmp_capabilities", "query-status"]
