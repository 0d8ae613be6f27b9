# SPDX-License-Identifier: Apache-2.0
"""QEMU writes on into a sink whose way to the archiver breaks: its writes wait, and never fail."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machine import VMAPIPE, end_of
from tests.network.cable import cable_to
from tests.network.place import Place, lose_connections
from tests.protocol.nbd.client import Client

MIB = 1 << 20
CLUSTER = 65536
CLUSTERS = 160


@pytest.mark.parametrize("seed", range(2))
def test_a_sink_takes_everything_while_connections_end(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(CLUSTERS * CLUSTER)
    order = chance.sample(range(CLUSTERS), CLUSTERS)
    faults: list[BaseException] = []

    def write(path: Path) -> None:
        """As QEMU's job does, in any order; an error here is the guest's."""
        try:
            with Client(path, "disk") as client:
                for cluster in order:
                    at = cluster * CLUSTER
                    client.write(at, data[at : at + CLUSTER])
        except BaseException as error:  # noqa: BLE001  reported by the test
            faults.append(error)

    with ExitStack() as stack:
        place = Place(tmp_path, stack)
        place.disk.write_bytes(data)
        cable = stack.enter_context(cable_to(place.endpoint))
        cable.bytes_s = 4 * MIB
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "sink.sock"))
        listener.listen()
        words = ["producer", f"--archiver={cable.endpoint}", f"--keys={place.client}", "--disk=a"]
        words += [f"--sink-fd={listener.fileno()}", f"--size={len(data)}", "--buffer=8M"]
        producer = stack.enter_context(
            subprocess.Popen(
                [*VMAPIPE, *words], pass_fds=[listener.fileno()], stderr=subprocess.PIPE
            )
        )
        stack.callback(producer.kill)
        guest = threading.Thread(target=write, args=(tmp_path / "sink.sock",))
        guest.start()
        try:
            for _ in range(3):
                lose_connections(cable, producer, chance.randrange(MIB))
        finally:
            guest.join()
        code, text = end_of(producer)
        assert (code, faults) == (0, []), text
        place.archive_is_good()
