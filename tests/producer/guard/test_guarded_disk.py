# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom at a guarded disk, one step at a time."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.machine import make_disk
from tests.producer.guard.hammer import (
    CLUSTER,
    JOB,
    LIMIT_S,
    Backup,
    Place,
    begin,
    guarding,
    next_message,
)
from tests.protocol.nbd.client import Client
from vmapipe.producer.guard import main as guard_main
from vmapipe.producer.guard_client import GuardClient
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.protocol import limits
from vmapipe.protocol.guard import (
    Claimed,
    GuardAttach,
    GuardBegun,
    GuardCopied,
    GuardRefused,
    GuardWaiting,
    Hold,
    Saved,
    decode_from_guard,
    encode,
)
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.session import REQUEST_BYTES, NbdRequest, encode_request
from vmapipe.runtime.errors import Failure

CLUSTERS = 40


# More than is saved before a trim.
LARGE = 65 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with guarding(tmp_path, make_disk(tmp_path / "image", "A" * CLUSTERS)) as place:
        yield place


@pytest.fixture
def backup(place: Place, tmp_path: Path) -> Iterator[Backup]:
    """Attached and begun, and nothing done yet."""
    backup = Backup(place, 16, random.Random(1))
    begin({"d": place}, tmp_path)
    next_message(backup)  # Begun
    yield backup
    backup.close()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def attach_when_free(place: Place) -> Backup:
    """The guard notices the end of a backup in its own time."""
    pause = threading.Event()
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            return Backup(place, 16, random.Random(1))
        except Failure:
            pause.wait(0.02)
    pytest.fail("the disk is never free again")


def write_everywhere(client: Client) -> None:
    for cluster in range(CLUSTERS):
        client.write(cluster * CLUSTER, b"new")


def claim(backup: Backup, clusters: int) -> Claimed:
    backup.guard.claim(clusters)
    message = next_message(backup)
    assert isinstance(message, Claimed)
    return message


def test_a_write_waits_for_the_cluster_that_is_being_read_and_nothing_else_does(
    place: Place, backup: Backup
) -> None:
    assert claim(backup, 4) == Claimed(0, 4)
    with Client(place.nbd, "d") as first, Client(place.nbd, "d") as second:
        waiting = in_thread(lambda: first.write(2 * CLUSTER, b"new"))
        # Reads pass, of the very same cluster too, and writes elsewhere pass.
        assert second.read(2 * CLUSTER, 3) != b"new"
        second.write(10 * CLUSTER, b"elsewhere")
        second.command(NBD_CMD_FLUSH)
        assert waiting.is_alive()
        backup.guard.copied(4)
        waiting.join(LIMIT_S)
        assert second.read(2 * CLUSTER, 3) == b"new"


def test_what_was_claimed_and_not_read_can_be_claimed_again(backup: Backup) -> None:
    assert claim(backup, 8) == Claimed(0, 8)
    backup.guard.copied(3)
    assert claim(backup, 8) == Claimed(3, 8)


def test_reads_behind_a_waiting_write_on_the_same_connection_do_not_wait(
    place: Place, backup: Backup
) -> None:
    claim(backup, 4)
    with Client(place.nbd, "d") as client:
        client.begin_write(CLUSTER, b"new")
        assert client.read_past(30 * CLUSTER, 5) == place.image.read_bytes()[30 * CLUSTER :][:5]
        assert client.under_way == 1
        backup.guard.copied(4)
        client.wait()


def test_a_write_of_one_byte_across_two_clusters_saves_both(place: Place, backup: Backup) -> None:
    with Client(place.nbd, "d") as client:
        client.write(8 * CLUSTER - 1, b"ab")
    message = next_message(backup)
    assert isinstance(message, Saved)
    assert (message.clusters, len(message.slots)) == ((7, 8), 2)


@pytest.fixture
def cached(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be read from the device, whatever the machine does with its page cache."""

    def try_read(target: memoryview, offset: int) -> bool:
        place.disk.image.read(target, offset)
        return True

    monkeypatch.setattr(place.disk.image, "try_read", try_read)


@pytest.mark.usefixtures("cached")
def test_writes_that_come_together_are_told_together(place: Place, backup: Backup) -> None:
    with Client(place.nbd, "d") as client:
        wanted = (7, 3, 20, 11)
        requests = [NbdRequest(0, NBD_CMD_WRITE, num, num * CLUSTER, 3) for num in wanted]
        client.send_raw(b"".join(encode_request(request) + b"new" for request in requests))
        message = next_message(backup)
        assert isinstance(message, Saved)
        assert message.clusters == wanted


@pytest.mark.usefixtures("cached")
def test_what_a_client_saved_is_told_although_it_breaks_the_protocol_next(
    place: Place, backup: Backup
) -> None:
    with Client(place.nbd, "d") as client:
        request = encode_request(NbdRequest(0, NBD_CMD_WRITE, 1, 7 * CLUSTER, 3))
        client.send_raw(request + b"new" + b"?" * REQUEST_BYTES)
        message = next_message(backup)
        assert isinstance(message, Saved)
        assert message.clusters == (7,)
        client.abandon()


def test_a_storm_of_flushes_is_answered_while_a_write_waits(place: Place, backup: Backup) -> None:
    assert claim(backup, 4) == Claimed(0, 4)
    with Client(place.nbd, "d") as first, ExitStack() as stack:
        waiting = in_thread(lambda: first.write(2 * CLUSTER, b"new"))
        clients = [stack.enter_context(Client(place.nbd, "d")) for _ in range(4)]

        def storm(client: Client) -> None:
            for _ in range(50):
                client.command(NBD_CMD_FLUSH)

        storms = [in_thread(partial(storm, client)) for client in clients]
        for thread in storms:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in storms)
        assert waiting.is_alive()
        backup.guard.copied(4)
        waiting.join(LIMIT_S)
        assert first.read(2 * CLUSTER, 3) == b"new"


@pytest.mark.parametrize("how", ["write", "zeroes", "trim"])
def test_a_change_of_the_last_partial_cluster_saves_what_there_is_of_it(
    tmp_path: Path, how: str
) -> None:
    image = make_disk(tmp_path / "partial", "AA", tail_bytes=70)
    old = image.read_bytes()
    with guarding(tmp_path, image) as place:
        backup = Backup(place, 16, random.Random(1))
        try:
            begin({"d": place}, tmp_path)
            assert next_message(backup) == GuardBegun()
            with Client(place.nbd, "d") as client:
                match how:
                    case "write":
                        client.write(len(old) - 1, b"!")
                    case "zeroes":
                        client.command(NBD_CMD_WRITE_ZEROES, len(old) - 1, 1)
                    case _:
                        client.command(NBD_CMD_TRIM, len(old) - 1, 1)
            backup.take(next_message(backup))
            assert backup.seen == {1}
            assert backup.content[CLUSTER:] == old[CLUSTER:]
        finally:
            backup.close()
    assert image.stat().st_size == len(old)


def test_a_trim_of_everything_saves_everything_before(place: Place, backup: Backup) -> None:
    before = place.image.read_bytes()
    with Client(place.nbd, "d") as client:
        trim = in_thread(lambda: client.command(NBD_CMD_TRIM, 0, CLUSTERS * CLUSTER))
        while len(backup.seen) < CLUSTERS:
            backup.take(next_message(backup))
            backup.release()
        trim.join(LIMIT_S)
        assert not any(client.read(0, CLUSTERS * CLUSTER))
    assert bytes(backup.content) == before


def test_a_huge_trim_is_left_out_while_it_would_have_to_be_saved(
    tmp_path: Path,
) -> None:
    image = tmp_path / "large"
    with image.open("wb") as file:
        file.write(b"data")
        file.truncate(LARGE)
    with guarding(tmp_path, image) as place:
        backup = Backup(place, 16, random.Random(1))
        try:
            begin({"d": place}, tmp_path)
            next_message(backup)
            with Client(place.nbd, "d") as client:
                client.command(NBD_CMD_TRIM, 0, LARGE)
                assert client.read(0, 4) == b"data"
                assert backup.guard.receive() is None, "and nothing was saved for it"
                backup.close()
                client.command(NBD_CMD_TRIM, 0, LARGE)
                while client.read(0, 4) == b"data":  # the guard notices the end in its own time
                    client.command(NBD_CMD_TRIM, 0, LARGE)
        finally:
            if hasattr(backup, "_ring"):
                backup.close()


def test_a_disk_is_free_when_its_backup_has_failed_even_if_nobody_heard_of_it(
    place: Place, tmp_path: Path
) -> None:
    deaf = Backup(place, 16, random.Random(1), guest_wait_s=1)
    try:
        begin({"d": place}, tmp_path)
        next_message(deaf)
        claim(deaf, 40)
        with Client(place.nbd, "d") as client:
            client.write(0, b"new")
        attach_when_free(place).close()
    finally:
        deaf.close()


def test_a_backup_that_dies_lets_waiting_writes_go(place: Place, backup: Backup) -> None:
    claim(backup, 40)
    with Client(place.nbd, "d") as client:
        waiting = in_thread(lambda: client.write(0, b"new"))
        assert waiting.is_alive()
        backup.guard.close()
        waiting.join(LIMIT_S)
        assert not waiting.is_alive()
        assert client.read(0, 3) == b"new"


def test_a_backup_that_says_nothing_lets_a_write_go_after_its_time(
    place: Place, tmp_path: Path
) -> None:
    backup = Backup(place, 16, random.Random(1), guest_wait_s=1)
    try:
        begin({"d": place}, tmp_path)
        next_message(backup)
        claim(backup, 40)
        with Client(place.nbd, "d") as client:
            client.write(0, b"new")  # nobody ever reads the claimed clusters
            assert client.read(0, 3) == b"new"
        with pytest.raises(Failure, match="has waited 1 s for another copy of the same clusters"):
            next_message(backup)
    finally:
        backup.close()


def test_a_huge_request_that_never_waits_for_long_has_its_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarding(tmp_path, make_disk(tmp_path / "large", "A" * 400)) as place:
        read = place.disk.image.read
        read_bytes: list[int] = []

        def slow(target: memoryview, offset: int) -> None:
            threading.Event().wait(0.02)
            read_bytes.append(len(target))
            read(target, offset)

        monkeypatch.setattr(place.disk.image, "read", slow)
        backup = Backup(place, 500, random.Random(1), guest_wait_s=1)
        try:
            begin({"d": place}, tmp_path)
            next_message(backup)
            with Client(place.nbd, "d") as client:
                client.command(NBD_CMD_WRITE_ZEROES, 0, 400 * CLUSTER)  # 8 s of reading
            assert sum(read_bytes) < 400 * CLUSTER, "it waited to the end"
            while True:
                try:
                    next_message(backup)
                except Failure as error:
                    assert "has waited 1 s for all of its old data" in str(error)  # noqa: PT017
                    break
        finally:
            backup.close()


def test_old_data_that_cannot_be_read_fails_the_backup_and_not_the_write(
    place: Place, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(target: memoryview, offset: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Client(place.nbd, "d") as client:
        monkeypatch.setattr(place.disk.image, "read", broken)
        monkeypatch.setattr(place.disk.image, "try_read", broken)
        client.write(5 * CLUSTER, b"new")
        monkeypatch.undo()
        assert client.read(5 * CLUSTER, 3) == b"new"
    with pytest.raises(Failure, match=f"'d': cannot read .* at offset {5 * CLUSTER}"):
        next_message(backup)


def test_a_spool_file_that_is_full_makes_writes_wait_for_memory(
    place: Place, tmp_path: Path
) -> None:
    before = place.image.read_bytes()
    full = os.open("/dev/full", os.O_RDWR)
    backup = Backup(place, 16, random.Random(1), spool=(full, 100))
    os.close(full)
    try:
        begin({"d": place}, tmp_path)
        next_message(backup)
        with Client(place.nbd, "d") as client:
            writing = in_thread(lambda: write_everywhere(client))
            kept: list[Saved] = []
            while sum(len(message.slots) for message in kept) < 16:
                message = next_message(backup)
                assert isinstance(message, Saved)
                kept.append(message)
            assert next_message(backup) == GuardWaiting(1), (
                "the 17th found neither memory nor spool"
            )
            for message in kept:
                backup.take(message)
            while len(backup.seen) < CLUSTERS:
                backup.release()
                backup.take(next_message(backup))
            writing.join(LIMIT_S)
            assert client.read(39 * CLUSTER, 3) == b"new"
        assert bytes(backup.content) == before
    finally:
        backup.close()


def test_a_second_backup_is_refused_and_one_after_the_first_is_not(place: Place) -> None:
    first = Backup(place, 16, random.Random(1))
    with pytest.raises(Failure, match="a backup of it is running already"):
        Backup(place, 16, random.Random(1))
    first.close()
    attach_when_free(place).close()


def test_writes_that_are_held_go_on_when_nobody_says_begin(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_main, "_BEGIN_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(place.control))
        sock.send(encode(Hold(limits.VERSION, JOB, ("d",))))
        sock.recv(1000)  # Held
        with Client(place.nbd, "d") as client:
            client.write(0, b"new")
        assert isinstance(decode_from_guard(sock.recv(1000)), GuardRefused)


def test_a_write_that_does_not_end_keeps_a_backup_from_beginning(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = place.disk.image.write

    def slow(data: memoryview, offset: int) -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)
        write(data, offset)

    monkeypatch.setattr(place.disk.image, "write", slow)
    with Client(place.nbd, "d") as client:
        writing = in_thread(lambda: client.write(0, b"new"))
        assert begun.wait(LIMIT_S)
        place.disk.hold()
        with pytest.raises(Failure, match="have not come to an end"):
            place.disk.wait_until_held(time.monotonic() + 0.2)
        place.disk.release()
        go_on.set()
        writing.join(LIMIT_S)
        client.write(9, b"and on it goes")


def test_memory_that_could_be_cut_is_not_used(place: Place) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, RING_BYTES + 16 * CLUSTER)
    attach = GuardAttach(limits.VERSION, JOB, "d", RING_BYTES, 16, 0, 20)
    try:
        with pytest.raises(Failure, match="memory that could be cut"):
            GuardClient("d", str(place.control), attach, [fd])
    finally:
        os.close(fd)


def test_slots_that_do_not_fit_the_memory_are_refused(place: Place) -> None:
    ring = Ring(CLUSTER)
    assert ring.fd is not None
    attach = GuardAttach(limits.VERSION, JOB, "d", RING_BYTES, 1000, 0, 20)
    with pytest.raises(Failure, match="the offered memory cannot be used"):
        GuardClient("d", str(place.control), attach, [ring.fd])
    ring.close()


@pytest.mark.parametrize("packet", [b"", b"\x00", b"junk" * 1000, encode(GuardCopied(1)), b"\xc1"])
def test_strangers_at_the_control_socket_are_refused_and_nothing_else_happens(
    place: Place, packet: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(place.control))
        sock.send(packet)
        answer = sock.recv(1000)
        assert not answer or isinstance(decode_from_guard(answer), GuardRefused)
    with Client(place.nbd, "d") as client:
        client.write(0, b"fine")
