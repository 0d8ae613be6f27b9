# SPDX-License-Identifier: Apache-2.0
"""What a client with a listed key does to others at a service: nothing."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from tests.archiver.service.peer import Peer
from tests.archiver.service.serving import Served, make_keys, serving
from tests.archiver.service.test_port import limited
from tests.machine import LIMIT_S, bad, end_of, good, make_disk, next_event, started, without_limit
from tests.network.cable import cable_to
from tests.network.place import until

MIB = 1 << 20
Meet = Callable[..., Peer]


class Scene:
    """A service that lets in alice, whose backups must end well, and eve."""

    def __init__(self, tmp_path: Path, stack: ExitStack) -> None:
        self.tmp_path = tmp_path
        self.server, self.clients = make_keys(tmp_path, "alice", "eve")
        self.disk = make_disk(tmp_path / "d.raw", "A" * 32)
        self._stack = stack
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.max_sockets = 20_000
        self._peers: list[Peer] = []
        stack.callback(self._close)

    def _close(self) -> None:
        for peer in self._peers:
            peer.socket.close()
        self._context.term()

    def serve(self, *options: str, **more: Any) -> Served:
        keys = (self.server, self.clients["alice"])
        served = serving(self.tmp_path / "store", *options, keys=keys, **more)
        self.served = self._stack.enter_context(served)
        return self.served

    def eve(self, name: bytes | None = None) -> Peer:
        self._peers.append(Peer(self._context, self.served, self.clients["eve"], name))
        return self._peers[-1]

    def backup(self, name: str, *more: str) -> tuple[str, ...]:
        return ("backup", *self.served.words, *more, "--disk", f"a={self.disk}", name)

    def is_honest_backup_good(self, name: str = "honest.vma") -> None:
        good(*self.backup(name, "--quiet"))
        good("verify", "--quiet", self.served.folder / name)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack)


FIRST_NAME = """
import zmq
from vmapipe.archiver.listener.socket import ListeningSocket
link = ListeningSocket("tcp://127.0.0.1:*", None, receive_mark=32)
context = zmq.Context()
dealer = context.socket(zmq.DEALER)
dealer.connect(link.endpoint)
dealer.send(b"x")
while not (message := link.take_message()):
    link.wait(1.0)
print(message[0].hex())
context.destroy(linger=0)
link.close()
"""


def test_nobody_can_foresee_what_the_next_peer_is_called() -> None:
    names = {
        subprocess.run(
            [sys.executable, "-c", FIRST_NAME], capture_output=True, timeout=LIMIT_S, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(names) == 3
    assert b"006b8b4567\n" not in names  # what rand() gives first without a seed


def test_a_peer_with_a_name_of_its_own_choice_is_not_listened_to(scene: Scene) -> None:
    served = scene.serve()
    with started(*scene.backup("running.vma", "--json", "--speed", "64K")) as running:
        next_event(running, "begun")
        # As libzmq would call the peers of a service that has just been started.
        for number in range(12):
            name = b"\0" + (0x6B8B4567 + number).to_bytes(4, "big")
            scene.eve(name).say("BEAT", job=bytes(16))
            scene.eve().say("BEAT", job=bytes(16))
        named = scene.eve(b"eve")
        named.say("NONSENSE")
        assert (
            "name of its own choice"
            in served.next_event("notice")["text"] + (served.next_event("notice")["text"])
        )
        assert not named.socket.poll(500)
        scene.is_honest_backup_good()
        without_limit(running)
        assert end_of(running)[0] == 0
    served.stop()


def test_without_keys_a_name_of_ones_own_is_refused_as_well(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A")
    with serving(tmp_path / "store") as served, ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        for number in range(5):
            for name in (b"\0" + (0x6B8B4567 + number).to_bytes(4, "big"), None):
                peer = Peer(context, served, None, name)
                stack.callback(peer.socket.close)
                peer.say("BEAT", job=bytes(16))
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "x.vma")
        served.stop()


def test_nobody_hears_of_a_job_whose_coordinator_has_lost_its_connection(scene: Scene) -> None:
    served = scene.serve()
    with cable_to(served.endpoint) as cable:
        words = ("backup", "--json", "--archiver", cable.endpoint, *served.link, "--speed", "64K")
        with started(*words, "--disk", f"a={scene.disk}", "secret.vma") as running:
            next_event(running, "begun")
            cable.drop()
            spies = [scene.eve(b"\0" + (0x6B8B4567 + n).to_bytes(4, "big")) for n in range(4)]
            spies += [scene.eve() for _ in range(4)]
            for spy in spies:
                spy.say("NONSENSE")
            heard = []
            for spy in spies:
                while spy.socket.poll(500):
                    heard.append(spy.next()[0])
            assert set(heard) <= {"REFUSE"}
            cable.refusing = False
            without_limit(running)
            assert end_of(running)[0] == 0
    served.stop()


def test_jobs_that_only_ping_leave_places_for_others_and_end(scene: Scene) -> None:
    served = scene.serve("--max-jobs", "4", "--idle-timeout", "5")
    openers = []
    for number in range(4):
        opener = scene.eve()
        opener.open(f"{number}.vma", job=secrets.token_bytes(16))
        openers.append(opener)
    said = [opener.next() for opener in openers]
    assert sorted(name for name, _ in said) == ["OPENED", "OPENED", "REFUSE", "REFUSE"]
    assert "kept for others" in next(f["reason"] for name, f in said if name == "REFUSE")
    scene.is_honest_backup_good()
    failed = served.next_event("job-failed")
    assert failed["client"] == "eve"
    assert failed["text"] == "nothing has come from its producers for 5 s"
    served.stop()


@pytest.mark.soak  # each of 64 jobs is the start of a process
@pytest.mark.timeout(900)
def test_jobs_that_are_opened_and_cancelled_without_number_start_few_processes(
    scene: Scene,
) -> None:
    served = scene.serve()
    peers, opened, refused = [scene.eve() for _ in range(16)], 0, ""
    # Time gives some back, so the number is not known, but it has an end.
    for _ in range(100):
        begun = []
        for number, peer in enumerate(peers):
            job = secrets.token_bytes(16)
            peer.open(f"{number}.vma", job=job)
            name, fields = peer.next()
            if name == "OPENED":
                opened += 1
                begun.append((peer, job))
            elif fields["code"] == "too-often":
                refused = fields["reason"]
        for peer, job in begun:
            peer.say("CANCEL", job=job, reason="changed my mind")
        for peer, _ in begun:
            while peer.next()[0] != "FAILED":
                pass
        if refused:
            break
    assert "has opened many jobs that stored nothing" in refused
    assert opened >= 64  # a host with many machines may lose all its jobs to a cut
    scene.is_honest_backup_good()
    log = served.stop()
    assert len([event for event in log if event["event"] == "job-opened"]) <= opened + 1
    assert {path for path in served.stored() if not path.endswith(".json")} == {"honest.vma"}


def test_a_client_that_does_not_read_its_answers_takes_neither_memory_nor_the_log(
    scene: Scene,
) -> None:
    served = scene.serve()
    before = served.rss_peak_bytes()
    peers = [scene.eve() for _ in range(4)]
    name = "\U0001f600" * 4000 + "/"
    for peer in peers:
        peer.socket.rcvhwm = 1
    for _ in range(150):
        for peer in peers:
            peer.open(name, job=secrets.token_bytes(16))
    scene.is_honest_backup_good()
    assert served.rss_peak_bytes() - before < 60 * MIB
    log = served.stop()
    refused = [event for event in log if event["event"] == "job-refused"]
    assert len(refused) <= 20
    assert len(str(log)) < 100_000


def test_connections_without_number_of_one_client_leave_room_for_others(scene: Scene) -> None:
    served = scene.serve(**limited(1024))
    crowd = []
    for _ in range(300):
        peer = scene.eve()
        peer.say("BEAT", job=bytes(16))
        crowd.append(peer)
    front = psutil.Process(served.process.pid)
    until(lambda: front.num_fds() < 200, served.process)
    scene.is_honest_backup_good()
    crowd.extend(scene.eve() for _ in range(60))  # and silent ones
    scene.is_honest_backup_good("second.vma")
    served.stop()


def test_a_load_that_is_too_much_for_the_limit_is_refused_and_harms_no_job(scene: Scene) -> None:
    """Nobody is hostile: some hosts with many disks each."""
    served = scene.serve(**limited(256))
    disks = [make_disk(scene.tmp_path / f"{n}.raw", "A" * 8) for n in range(8)]
    named = [word for n, disk in enumerate(disks) for word in ("--disk", f"d{n}={disk}")]
    words = ("backup", "--json", *served.words, "--speed", "64K", *named)
    with ExitStack() as stack:
        first = stack.enter_context(started(*words, "1.vma"))
        next_event(first, "begun")
        text = bad("backup", *served.words, *named, "2.vma")
        assert "[too-many-jobs]" in text
        scene.is_honest_backup_good()
        without_limit(first)
        code, text = end_of(first)
        assert code == 0, text
    served.stop()


def test_producers_whose_connections_have_ended_keep_no_descriptors(scene: Scene) -> None:
    served = scene.serve()
    coordinator = scene.eve()
    job = secrets.token_bytes(16)
    coordinator.open("x.vma", job=job, devices=[f"d{n}" for n in range(40)])
    coordinator.hear("OPENED")
    front = psutil.Process(served.process.pid)
    before = most = front.num_fds()
    for number in range(60):
        producer = scene.eve()
        producer.hello(job, device=f"d{number % 40}", session=secrets.token_bytes(16), attempt=0)
        # Answered by the job's archiver, or refused by it: so it was connected to that.
        producer.say("PING")
        assert producer.next()[0] in ("PONG", "WELCOME", "REFUSE")
        most = max(most, front.num_fds())
        producer.socket.close()
    until(lambda: front.num_fds() <= before + 8, served.process)
    coordinator.say("BEAT", job=job)
    coordinator.hear("ALIVE")  # the job itself is still there
    assert most > before + 8
    scene.is_honest_backup_good()
    served.stop(signal.SIGINT)  # at once: the job would be waited for
