# SPDX-License-Identifier: Apache-2.0
"""The sink as a process: a client writes, an archiver stores, and things break."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, Need, good
from tests.producer.sinks import SinkRun, sink
from tests.protocol.nbd.client import Client
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.session import NbdRequest, encode_request
from vmapipe.runtime.events import JobCopied, copied_command

CLUSTER = 65536
SIZE = 90 * CLUSTER + 512


def content(seed: int = 5) -> bytes:
    """Two of three clusters are data, one is zero."""
    chance = random.Random(seed)
    clusters = (chance.randbytes(CLUSTER) if n % 3 else bytes(CLUSTER) for n in range(91))
    return b"".join(clusters)[:SIZE]


def restored(archive: Path, folder: Path) -> bytes:
    good("restore", archive, folder)
    return (folder / "disk-drive-scsi0.raw").read_bytes()


def test_a_disk_that_comes_out_of_order_twice_and_in_pieces_is_stored(tmp_path: Path) -> None:
    data = content()
    pieces = [(at, min(at + 3 * CLUSTER, SIZE)) for at in range(0, SIZE, 3 * CLUSTER)]
    random.Random(3).shuffle(pieces)
    with sink(tmp_path, SIZE) as run:
        with Client(run.path, "disk") as client:
            assert client.session.export.block_sizes.minimum == 1
            for at, end in pieces:
                middle = at + 70000 if at % 2 else at + CLUSTER + 100
                middle = min(middle, end)
                client.command(c.NBD_CMD_WRITE_ZEROES, at, CLUSTER if end - at > CLUSTER else 512)
                for start, stop in ((at, middle), (middle, end), (at, end)):
                    if stop > start:
                        client.write(start, data[start:stop])
            client.command(c.NBD_CMD_FLUSH)
            client.command(c.NBD_CMD_TRIM, 0, SIZE)
            assert client.read(0, 1000) == bytes(1000)
        assert run.ends() == (0, 0)
    assert restored(run.archive, tmp_path / "out") == data


def test_nbdcopy_fills_the_sink(need: Need, tmp_path: Path) -> None:
    (nbdcopy,) = need("nbdcopy")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(content())
    with sink(tmp_path, SIZE) as run:
        words = [nbdcopy, "--flush", str(disk), f"nbd+unix:///disk?socket={run.path}"]
        assert subprocess.run(words, timeout=LIMIT_S).returncode == 0
        assert run.ends() == (0, 0)
    assert restored(run.archive, tmp_path / "out") == content()


def test_a_client_that_connects_again_goes_on_where_it_was(tmp_path: Path) -> None:
    data = content()
    with sink(tmp_path, SIZE) as run:
        for start, end in ((0, 40 * CLUSTER), (30 * CLUSTER, SIZE)):
            with Client(run.path, "disk") as client:
                for at in range(start, end, CLUSTER):
                    client.write(at, data[at : min(at + CLUSTER, end)])
                # The connection breaks within a write, whose first half is not to be seen.
                write = NbdRequest(0, c.NBD_CMD_WRITE, 7, end - end % CLUSTER, 4 * CLUSTER)
                if end < SIZE:
                    client._socket.sendall(encode_request(write) + b"half" * (CLUSTER // 2))
        assert run.ends() == (0, 0)
    assert restored(run.archive, tmp_path / "out") == data


def write_everything(client: Client) -> float:
    """Every write is acknowledged; returns how long the longest took, in seconds."""
    data, longest = content(), 0.0
    for at in range(0, SIZE, CLUSTER):
        started = time.monotonic()
        client.write(at, data[at : at + CLUSTER])
        longest = max(longest, time.monotonic() - started)
    client.command(c.NBD_CMD_FLUSH)
    return longest


def test_when_the_archiver_fails_writes_go_on_and_the_parent_is_told(tmp_path: Path) -> None:
    with sink(tmp_path, SIZE) as run, Client(run.path, "disk") as client:
        client.write(0, content()[:CLUSTER])
        run.archiver.terminate()
        event = run.next_event("draining")
        assert "cancelled by SIGTERM" in event["text"]
        write_everything(client)
        assert run.producer.poll() is None
    assert not run.archive.exists()


def test_when_the_archiver_is_silent_no_write_waits_longer_than_guest_wait(tmp_path: Path) -> None:
    size = 1024 * CLUSTER
    piece = random.Random(1).randbytes(1 << 20)
    with (
        sink(tmp_path, size, "--guest-wait=1", "--buffer=8M") as run,
        Client(run.path, "disk") as client,
    ):
        run.archiver.send_signal(signal.SIGSTOP)
        longest = 0.0
        for at in range(0, size, len(piece)):
            started = time.monotonic()
            client.write(at, piece)
            longest = max(longest, time.monotonic() - started)
        assert "a write has waited 1 s" in run.next_event("draining")["text"]
        # Without the option it would be 20 s.
        assert 0.9 < longest < 20
        run.archiver.send_signal(signal.SIGCONT)
        assert run.archiver.wait(LIMIT_S) == 1


@pytest.mark.parametrize("connected", [True, False])
def test_a_sink_that_was_asked_to_end_waits_for_its_client_to_leave(
    tmp_path: Path, connected: bool
) -> None:
    with sink(tmp_path, SIZE) as run:
        if connected:
            with Client(run.path, "disk") as client:
                client.write(0, content()[:CLUSTER])
                run.producer.terminate()
                assert "SIGTERM" in run.next_event("draining")["text"]
                write_everything(client)
        else:
            run.producer.terminate()
        assert run.ends() == (1, 143)


def test_a_sink_whose_parent_has_died_leaves_at_once(tmp_path: Path) -> None:
    """Its listener's other holder, the guardian, serves from then on."""
    with sink(tmp_path, SIZE) as run, contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(run.path, "disk"))
        client.write(0, content()[:CLUSTER])
        run.events.shutdown(socket.SHUT_RDWR)
        assert run.ends() == (1, 1)
        with pytest.raises(BrokenPipeError):
            stack.close()


def test_a_slow_archiver_makes_writes_wait_and_loses_nothing(tmp_path: Path) -> None:
    size = 400 * CLUSTER
    data = random.Random(2).randbytes(size)
    with sink(tmp_path, size, "--buffer=8M") as run:
        with Client(run.path, "disk") as client:
            run.archiver.send_signal(signal.SIGSTOP)
            for at in range(0, 6 << 20, 1 << 20):
                client.write(at, data[at : at + (1 << 20)])
            while run.next_event("buffer")["memory_bytes"] < 5 << 20:
                pass
            run.archiver.send_signal(signal.SIGCONT)
            for at in range(6 << 20, size, 1 << 20):
                client.write(at, data[at : at + (1 << 20)])
        assert run.ends() == (0, 0)
    assert restored(run.archive, tmp_path / "out") == data


def fill(run: SinkRun, clusters: int) -> None:
    with Client(run.path, "disk") as client:
        for at in range(0, min(SIZE, clusters * CLUSTER), CLUSTER):
            client.write(at, content()[at : at + CLUSTER])


def test_a_sink_with_all_data_stores_nothing_before_qemus_job_has_ended_well(
    tmp_path: Path,
) -> None:
    with sink(tmp_path, SIZE, "--await-job") as run:
        fill(run, 91)
        while run.next_event("transfer")["sent_bytes"] < 60 * CLUSTER:
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            run.archiver.wait(0.5)
        run.tell(copied_command(JobCopied(91 * CLUSTER)))
        assert run.ends() == (0, 0)
    assert restored(run.archive, tmp_path / "out") == content()


@pytest.mark.parametrize(
    ("copied", "text"),
    [
        (JobCopied(91 * CLUSTER), "31 of 91 clusters have not come"),
        (JobCopied(61 * CLUSTER, "zero"), "3997696 bytes, but 3932160 have come"),
    ],
)
def test_a_job_that_has_copied_more_than_has_come_is_a_failure(
    tmp_path: Path, copied: JobCopied, text: str
) -> None:
    with sink(tmp_path, SIZE, "--await-job") as run:
        fill(run, 60)
        run.tell(copied_command(copied))
        assert text in run.next_event("draining")["text"]
        run.producer.terminate()
        assert run.ends()[0] == 1
    assert not run.archive.exists()


def test_what_a_thin_disk_has_left_out_is_zero(tmp_path: Path) -> None:
    with sink(tmp_path, SIZE, "--await-job") as run:
        with Client(run.path, "disk") as client:
            for cluster in (1, 40, 41, 89):
                at = cluster * CLUSTER
                client.write(at, content()[at : at + CLUSTER])
        run.tell(copied_command(JobCopied(4 * CLUSTER, "zero")))
        assert run.ends() == (0, 0)
    wanted = bytearray(SIZE)
    for at in (1 * CLUSTER, 40 * CLUSTER, 41 * CLUSTER, 89 * CLUSTER):
        wanted[at : at + CLUSTER] = content()[at : at + CLUSTER]
    assert restored(run.archive, tmp_path / "out") == bytes(wanted)
