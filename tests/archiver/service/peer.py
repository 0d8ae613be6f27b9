# SPDX-License-Identifier: Apache-2.0
"""A peer of a service made of bytes of our own: pyzmq and nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import zmq

from tests.archiver.service.serving import Served
from tests.machine import LIMIT_S

JOB = bytes(range(16))


class Peer:
    """A DEALER of anybody's."""

    def __init__(
        self,
        context: zmq.Context[Any],
        served: Served,
        keys: Path | None = None,
        name: bytes | None = None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        if name is not None:
            self.socket.routing_id = name
        if keys:
            self.socket.curve_serverkey = (keys / "server.pub").read_bytes().strip()
            self.socket.curve_publickey = (keys / "client.pub").read_bytes().strip()
            self.socket.curve_secretkey = (keys / "client.key").read_bytes().strip()
        self.socket.rcvtimeo = int(LIMIT_S * 1000)
        self.socket.connect(served.endpoint)

    def say(self, kind: str, /, **fields: object) -> None:
        self.socket.send(msgpack.packb([kind, fields]))

    def hear(self, *names: str) -> dict[str, Any]:
        """The next message of one of these names."""
        while True:
            name, fields = self.next()
            if name in names:
                return {"name": name, **fields}
            assert name not in ("REFUSE", "FAILED"), fields

    def next(self) -> tuple[str, dict[str, Any]]:
        name, fields = msgpack.unpackb(self.socket.recv())
        return name, fields

    def open(self, name: str, job: bytes = JOB, **more: object) -> None:
        self.say("OPEN", **{"version": 1, "job": job, "name": name, "devices": ["a"], **more})

    def hello(self, job: bytes = JOB, **more: object) -> None:
        self.say("HELLO", **{"version": 1, "job": job, "device": "a", "size": 65536, **more})
