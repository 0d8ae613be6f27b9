# SPDX-License-Identifier: Apache-2.0
"""An archiver that nobody can connect to: told soon and clearly; one that comes a bit later is used."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import bad, end_of, good, make_disk, next_event, run, started

PLAIN = ("--insecure-plain-tcp", "--connect-timeout")
REFUSED = "cannot be reached within 1 s: Connection refused; is an archiver running there?"


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody listens there, and nobody else gets it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "A0h")


def test_a_backup_whose_archiver_is_not_there_says_so_at_once(port: int, disk: Path) -> None:
    at = f"tcp://127.0.0.1:{port}"
    words = ("backup", "--archiver", at, *PLAIN, "1", "--disk", f"a={disk}", "x.vma")
    assert bad(*words) == f"vmapipe backup: {at}: {REFUSED}"


def test_so_does_a_producer_by_hand(port: int, disk: Path) -> None:
    at = f"tcp://127.0.0.1:{port}"
    done = run("producer", "--archiver", at, *PLAIN, "1", "--disk", f"a={disk}")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == f"vmapipe producer: {at}: {REFUSED}"


def test_a_host_without_an_address_is_said_with_the_systems_words(disk: Path) -> None:
    # RFC 6761: a name that never is one.
    at = "tcp://archiver.invalid:7777"
    text = bad("backup", "--archiver", at, *PLAIN, "1", "--disk", f"a={disk}", "x.vma")
    assert text.startswith(f"vmapipe backup: {at}: cannot be reached within 1 s: ")


def test_one_who_hangs_up_before_it_has_said_what_it_speaks_is_not_tried_for_ever(
    disk: Path,
) -> None:
    """As an archiver with keys does that has read our greeting before its own had left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    listener.accept()[0].close()

        answering = threading.Thread(target=hang_up)
        answering.start()
        try:
            at = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            words = ("--archiver", at, "--insecure-plain-tcp", "--disk", f"a={disk}")
            done = run("producer", *words)
            texts = [done.stderr.decode(), bad("backup", *words, "x.vma")]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            answering.join()
    assert done.returncode == 1
    for text in texts:
        assert f"{at}: the peer closes the connection" in text
        assert "may not speak plain ZeroMQ (--insecure-plain-tcp)" in text


def test_a_service_that_comes_within_the_time_is_used(
    port: int, disk: Path, tmp_path: Path
) -> None:
    at = f"tcp://127.0.0.1:{port}"
    words = ("backup", "--quiet", "--archiver", at, *PLAIN, "90", "--disk", f"a={disk}", "x.vma")
    (tmp_path / "store").mkdir()
    with contextlib.ExitStack() as stack:
        # In vain at first: its first connection is refused.
        backup = stack.enter_context(started(*words))
        service = ("archiver", "--listen", at, "--directory", tmp_path / "store", "--json")
        served = stack.enter_context(started(*service, "--insecure-plain-tcp"))
        next_event(served, "ready")
        assert end_of(backup) == (0, "")
    good("verify", tmp_path / "store" / "x.vma")
