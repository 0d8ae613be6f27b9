# SPDX-License-Identifier: Apache-2.0
"""Strangers at a service's port: whatever they hold open or send, who is inside notices nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.archiver.service.serving import Served, make_keys, serving
from tests.machine import (
    LIMIT_S,
    children,
    end_of,
    good,
    make_disk,
    next_event,
    started,
    without_limit,
)

MIB = 1 << 20
GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE".ljust(64, b"\0")
GIANT = b"\6" + (4 * MIB).to_bytes(8, "big") + b"\5HELLO"


def address(served: Served) -> tuple[str, int]:
    host, port = served.endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


def limited(count: int) -> dict[str, Any]:
    """For `serving`: a process that may have so many descriptors."""
    return {
        "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count)),
    }


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    server, clients = make_keys(tmp_path, "host1")
    return server, clients["host1"]


@contextlib.contextmanager
def crowd(served: Served, count: int, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, held open, each from one of some addresses of this host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[socket.socket] = []
    try:
        for number in range(count):
            sock = socket.socket()
            held.append(sock)
            # One address has ports for some 28,000.
            sock.bind((f"127.0.1.{1 + number // 20_000}", 0))
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.connect(address(served))
            if said:
                with contextlib.suppress(OSError):
                    sock.send(said)
            if number % 100 == 99:
                os.sched_yield()
        yield held
    finally:
        for sock in held:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("limit", [64, 256, 4096])
@pytest.mark.parametrize("said", [b"", GREETING], ids=["silent", "greeting"])
def test_strangers_leave_the_service_what_it_needs_whatever_the_limit_is(
    tmp_path: Path, keys: tuple[Path, Path], limit: int, said: bytes
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 48)
    with (
        serving(tmp_path / "store", "--client-jobs", "4", keys=keys, **limited(limit)) as served,
        started(
            "backup", "--json", "--speed", "64K", *served.words, "--disk", f"a={disk}", "run.vma"
        ) as running,
    ):
        next_event(running, "begun")
        front = psutil.Process(served.process.pid)
        before = front.num_fds()
        with crowd(served, 1500, said):
            assert front.num_fds() <= before + 8
            assert running.poll() is None
            # A new job's process is started, and its archive written, beside them.
            good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "new.vma")
            assert front.num_fds() <= before + 16
        without_limit(running)
        code, text = end_of(running)
        assert (code, text) == (0, "")
        served.stop()
    for name in ("run.vma", "new.vma"):
        good("verify", "--require-manifest", tmp_path / "store" / name)


def test_a_limit_too_small_for_one_job_is_said_at_once(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    (tmp_path / "store").mkdir()
    words = ("--listen", "tcp://127.0.0.1:*", "--directory", str(tmp_path / "store"))
    with started("archiver", *words, "--keys", str(keys[0]), **limited(40)) as process:
        code, text = end_of(process)
    assert code == 1
    assert "only 40 files may be open here" in text
    assert "LimitNOFILE=" in text


@pytest.mark.parametrize("said", [GREETING + GIANT, GIANT], ids=["greeted", "rude"])
def test_strangers_cost_the_service_no_memory(
    tmp_path: Path, keys: tuple[Path, Path], said: bytes
) -> None:
    """Each claims a command of 4 MiB, and sends all of it but the end."""
    disk = make_disk(tmp_path / "d.raw", "A0" * 20)
    with serving(tmp_path / "store", keys=keys) as served:
        before = served.rss_peak_bytes()
        with crowd(served, 300, said) as strangers:
            blob = bytes(MIB)
            for sock in strangers:
                sock.setblocking(True)
                sock.settimeout(0.5)
                with contextlib.suppress(OSError):
                    for _ in range(3):
                        sock.sendall(blob)
            good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "x.vma")
            acceptors = children(served.process, "vmapipe.archiver.listener.acceptor")
            assert sum(each.memory_info().rss for each in acceptors) < 60 * MIB
        assert served.rss_peak_bytes() - before < 20 * MIB
        served.stop()


def test_the_process_that_takes_connections_may_die(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 64)
    with (
        serving(tmp_path / "store", keys=keys) as served,
        started(
            "backup", "--json", "--speed", "64K", *served.words, "--disk", f"a={disk}", "x.vma"
        ) as running,
    ):
        next_event(running, "begun")
        (acceptor,) = children(served.process, "vmapipe.archiver.listener.acceptor")
        acceptor.kill()
        told = served.next_event("notice")["text"]
        assert "the acceptor of connections was killed by SIGKILL" in told
        without_limit(running)
        code, text = end_of(running)
        assert code == 0, text
        served.stop()
    good("verify", "--require-manifest", tmp_path / "store" / "x.vma")


def test_the_acceptor_ends_with_its_service(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with serving(tmp_path / "store", keys=keys) as served:
        (acceptor,) = children(served.process, "vmapipe.archiver.listener.acceptor")
        served.process.kill()
        served.process.wait(LIMIT_S)
        acceptor.wait(LIMIT_S)
        # And the port is free again.
        words = ("--listen", served.endpoint, "--directory", str(served.folder), "--json")
        with started("archiver", *words, "--keys", str(keys[0])) as second:
            assert next_event(second, "ready")
            assert second.poll() is None


def test_strangers_that_connect_and_go_cost_little_processor_time(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """With no descriptor left the port is not asked again and again."""
    with serving(tmp_path / "store", keys=keys, **limited(64)) as served, crowd(served, 600):
        (acceptor,) = children(served.process, "vmapipe.archiver.listener.acceptor")
        processes = [acceptor, psutil.Process(served.process.pid)]
        spent = [sum(each.cpu_times()[:2]) for each in processes]
        time.sleep(3)  # what is measured is what happens in three seconds, however fast the machine
        for each, before in zip(processes, spent, strict=True):
            assert sum(each.cpu_times()[:2]) - before < 1.0
        served.stop()


@pytest.mark.soak
@pytest.mark.parametrize("limit", [65_536, 256])
def test_seventy_thousand_strangers_at_once(
    tmp_path: Path, keys: tuple[Path, Path], limit: int
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(70_000, hard - 1000)
    disk = make_disk(tmp_path / "d.raw", "A" * 640)
    with (
        serving(tmp_path / "store", keys=keys, **limited(min(limit, hard))) as served,
        started(
            "backup", "--json", "--speed", "1M", *served.words, "--disk", f"a={disk}", "run.vma"
        ) as running,
    ):
        next_event(running, "begun")
        before = served.rss_peak_bytes()
        with crowd(served, count):
            good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "new.vma")
        assert end_of(running)[0] == 0
        assert served.rss_peak_bytes() - before < 60 * MIB
        served.stop()


def test_first_words_that_are_gone_before_they_are_decided_take_no_descriptors(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Each looks like CURVE's; the service's process is busy with something else meanwhile."""
    disk = make_disk(tmp_path / "d.raw", "A0" * 20)
    hello = GREETING + b"\4\xc8\5HELLO\1\0" + os.urandom(192)
    with serving(tmp_path / "store", keys=keys, **limited(128)) as served:
        front = psutil.Process(served.process.pid)
        before = front.num_fds()
        front.suspend()
        try:
            for _ in range(300):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(address(served), 1.0) as sock,
                ):
                    sock.sendall(hello)
                    sock.recv(len(GREETING))
        finally:
            front.resume()
        # All that it finds to be accepted, it takes at once.
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "new.vma")
        assert front.num_fds() <= before + 16
        served.stop()
