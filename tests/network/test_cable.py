# SPDX-License-Identifier: Apache-2.0
"""The tests' cable itself: what ends on one side ends on the other, behind all that was said before."""

from __future__ import annotations

import socket

import pytest

from tests.machine import LIMIT_S
from tests.network.cable import cable_to
from vmapipe.runtime.syscalls import readable


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
@pytest.mark.parametrize("unread", [False, True], ids=["read", "unread"])
@pytest.mark.parametrize("ends", ["near", "far"])
def test_last_words_arrive_and_then_the_end(delay_s: float, unread: bool, ends: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        with cable_to(f"tcp://127.0.0.1:{server.getsockname()[1]}") as cable:
            cable.delay_s = delay_s
            host, port = cable.endpoint.removeprefix("tcp://").split(":")
            with socket.create_connection((host, int(port)), LIMIT_S) as near:
                far, _ = server.accept()
                with far:
                    far.settimeout(LIMIT_S)
                    leaves, stays = (near, far) if ends == "near" else (far, near)
                    if unread:
                        # Who closes without reading it resets the connection.
                        stays.sendall(b"unread")
                        assert readable([leaves.fileno()], LIMIT_S)
                    leaves.sendall(b"last")
                    leaves.sendall(b" words")
                    leaves.close()
                    heard = b""
                    while data := stays.recv(100):
                        heard += data
                    assert heard == b"last words"
