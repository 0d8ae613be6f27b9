# SPDX-License-Identifier: Apache-2.0
"""Who may do what at a service, tried with bytes of our own making: pyzmq and nothing of ours."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tests.archiver.service.peer import JOB, Peer
from tests.archiver.service.serving import Served, make_keys, serving
from tests.machine import LIMIT_S, end_of, good, make_disk, next_event, sha256, started
from tests.network.cable import cable_to
from tests.network.place import lose_connections

Meet = Callable[..., Peer]


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Connects one more stranger to a service; all are gone at the end."""
    context: zmq.Context[Any] = zmq.Context()
    peers: list[Peer] = []

    def connect(served: Served, keys: Path | None = None) -> Peer:
        peers.append(Peer(context, served, keys))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.socket.close()
    context.term()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "store") as service:
        yield service


def test_another_client_can_do_nothing_with_a_job_and_hears_nothing_of_it(
    tmp_path: Path, meet: Meet
) -> None:
    server, clients = make_keys(tmp_path, "alice", "eve")
    with serving(tmp_path / "store", keys=(server, clients["alice"])) as served:
        alice, eve = (meet(served, keys) for keys in clients.values())
        alice.open("vm.vma")
        alice.hear("OPENED")
        for job in (JOB, bytes(16)):
            answers = []
            for say in ("hello", "BEAT", "CANCEL", "RESUME"):
                thief = meet(served, clients["eve"])
                if say == "hello":
                    thief.hello(job)
                else:
                    thief.say(say, version=1, job=job, reason="", session=bytes(16), attempt=1)
                answers.append(thief.hear("REFUSE"))
            # The same words, whether there is such a job or not.
            assert {answer["reason"] for answer in answers} == {
                "there is no such job here; was the service started again?"
            }
        eve.open("vm.vma")
        assert eve.hear("REFUSE")["code"] == "unknown-job"
        eve.open("vm.vma", job=bytes(15) + b"e")
        assert eve.hear("REFUSE")["code"] == "exists"
        producer = meet(served, clients["alice"])
        producer.hello()
        welcome = producer.hear("WELCOME")
        dev_id = welcome["dev_id"]
        producer.socket.send_multipart([msgpack.packb(1), msgpack.packb([dev_id, 0, b"x" * 65536])])
        producer.say("END", frames=1, clusters=1)
        producer.hear("DONE")
        producer.say("BYE")
        alice.hear("STORED")
        served.stop()
    good("verify", tmp_path / "store" / "vm.vma")


def test_names_and_shapes_that_no_client_of_ours_sends_are_refused(
    served: Served, meet: Meet, tmp_path: Path
) -> None:
    for number, (name, code) in enumerate(
        [
            ("../x", "bad-name"),
            ("/tmp/x", "bad-name"),
            ("a\0b", "bad-name"),
            ("x.manifest.json", "bad-name"),
            ("x" * 201, "bad-name"),
            ("", "bad-name"),
        ]
    ):
        peer = meet(served)
        peer.open(name, job=number.to_bytes(16, "big"))
        assert peer.hear("REFUSE")["code"] == code
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"devices": []}, "bad-contents"),
        ({"devices": ["a", "a"]}, "bad-contents"),
        ({"devices": ["../a"]}, "bad-contents"),
        ({"configs": [["a", b""], ["a", b""]]}, "bad-contents"),
        ({"compress": "exec:rm"}, "bad-contents"),
        ({"configs": [["../a", b""]]}, "malformed"),
        ({"version": 7}, "version"),
    ]
    for more, code in wrong:
        peer = meet(served)
        peer.open("x.vma", **more)
        assert peer.hear("REFUSE")["code"] == code
    assert served.stored() == set()
    assert list(served.folder.parent.glob("x*")) == []


def test_memory_that_a_producer_offers_over_tcp_is_not_looked_at(
    served: Served, meet: Meet
) -> None:
    peer, producer = meet(served), meet(served)
    peer.open("x.vma")
    peer.hear("OPENED")
    with open(os.memfd_create("offer", os.MFD_ALLOW_SEALING), "wb") as memory:
        memory.truncate(1 << 20)
        producer.hello(shared=f"/proc/{os.getpid()}/fd/{memory.fileno()}")
        assert producer.hear("WELCOME")["shared"] is False
    peer.say("CANCEL", job=JOB, reason="enough")
    peer.hear("FAILED")


def test_a_flood_beyond_the_credit_is_refused_and_the_services_memory_stays_bounded(
    served: Served, meet: Meet, tmp_path: Path
) -> None:
    peer, producer = meet(served), meet(served)
    peer.open("x.vma")
    peer.hear("OPENED")
    producer.hello(size=1 << 40)
    producer.hear("WELCOME")
    before = served.rss_peak_bytes()
    # The archiver stands still, so that everything has to wait for it.
    (archiver,) = served.archivers()
    archiver.suspend()
    payload = bytes(4 << 20)
    for number in range(1, 60):
        frame = msgpack.packb([1, 64 * number, 64, b"\xff\xff" * 64])
        producer.socket.send_multipart([msgpack.packb(number), frame, payload])
    disk = make_disk(tmp_path / "d.raw", "A0" * 20)
    good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "honest.vma")
    assert served.rss_peak_bytes() - before < 120 << 20
    archiver.resume()
    assert producer.hear("REFUSE")["code"] == "credit"
    assert "exceeds the credit" in peer.hear("FAILED")["reason"]
    good("verify", served.folder / "honest.vma")


def test_junk_half_open_connections_and_crowds_of_strangers_harm_no_job(
    served: Served, meet: Meet, tmp_path: Path
) -> None:
    host, port = served.endpoint.removeprefix("tcp://").split(":")
    disk = make_disk(tmp_path / "d.raw", "A0" * 20)
    with contextlib.ExitStack() as stack:
        for junk in [b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" + bytes(63), os.urandom(1000)] * 25:
            sock = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):
                sock.sendall(junk)
        for number in range(200):
            stranger = meet(served)
            stranger.say("PING" if number % 2 else "NONSENSE", more=number)
            if number % 50 == 0:
                assert stranger.hear("REFUSE")["code"] == "unknown-job"
            stranger.socket.close()
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "x.vma")
    log = served.stop()
    assert len([event for event in log if event["event"] == "notice"]) < 10
    good("verify", served.folder / "x.vma")


def test_a_lost_connection_costs_a_backup_at_a_service_nothing(
    served: Served, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 160)
    with (
        cable_to(served.endpoint) as cable,
        started(
            *("backup", "--json", "--archiver", cable.endpoint, *served.link),
            *("--disk", f"a={disk}", "x.vma"),
        ) as backup,
    ):
        cable.bytes_s = 4 << 20
        next_event(backup, "begun")
        for _ in range(2):
            # Those of the producer and of the coordinator's process.
            lose_connections(cable, backup, 2 << 20, callers=2)
        cable.bytes_s = 0.0
        code, text = end_of(backup)
    assert (code, text) == (0, "")
    good("verify", "--require-manifest", served.folder / "x.vma")
    good("restore", served.folder / "x.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-a.raw") == sha256(disk)


def test_a_service_that_was_started_again_says_so_at_once(served: Served, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 160)
    words = ("backup", "--json", "--speed", "1K", *served.words, "--disk", f"a={disk}", "x.vma")
    with started(*words) as backup:
        next_event(backup, "begun")
        served.process.kill()
        served.process.wait(LIMIT_S)
        again = ("--listen", served.endpoint, "--directory", str(served.folder))
        with started("archiver", *again, "--json", "--insecure-plain-tcp") as second:
            next_event(second, "ready")
            code, text = end_of(backup)
    assert code == 1
    assert "was the service started again? [unknown-" in text
    assert served.stored() == set()
