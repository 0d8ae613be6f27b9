# SPDX-License-Identifier: Apache-2.0
"""Keys at a service: wrong, missing, unlisted, revoked; and those who only knock. Real processes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archiver.service.serving import Served, make_keys, serving
from tests.machine import LIMIT_S, bad, end_of, good, make_disk, next_event, started, without_limit
from tests.network.keys import make_client, make_server


class Scene:
    """A service that lets `host1` and `host2` in; a disk."""

    def __init__(
        self, folder: Path, served: Served, server: Path, clients: dict[str, Path]
    ) -> None:
        self.folder = folder
        self.served = served
        self.server = server
        self.clients = clients
        self.disk = make_disk(folder / "disk.raw", "AA0h" * 16)

    def backup(self, keys: Path | None, name: str, *more: str) -> tuple[str | Path, ...]:
        link = ("--keys", keys) if keys else ("--insecure-plain-tcp",)
        words = ("backup", "--json", "--archiver", self.served.endpoint, *link)
        return (*words, *more, "--disk", f"a={self.disk}", name)

    def honest_backup_succeeds(self) -> None:
        good(*self.backup(self.clients["host2"], "honest.vma"))
        assert self.served.stored() == {"honest.vma", "honest.vma.manifest.json"}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    server, clients = make_keys(tmp_path, "host1", "host2")
    with serving(tmp_path / "store", keys=(server, clients["host2"])) as served:
        yield Scene(tmp_path, served, server, clients)


def test_who_has_no_key_another_one_or_the_wrong_servers_gets_nothing_in(scene: Scene) -> None:
    unlisted = make_client(scene.folder / "unlisted", scene.server)
    deceived = scene.clients["host1"]
    (deceived / "server.pub").write_bytes(
        (make_server(scene.folder / "other") / "server.pub").read_bytes()
    )
    for keys, words in (
        (unlisted, "the archiver does not know our key"),
        (deceived, "is its key the one in our server.pub"),
        (None, "does not speak plain ZeroMQ (--insecure-plain-tcp)"),
    ):
        text = bad(*scene.backup(keys, "x.vma"))
        assert text.startswith(f"vmapipe backup: {scene.served.endpoint}: "), text
        assert words in text
    key = (unlisted / "client.pub").read_text().strip()
    assert scene.served.next_event("notice")["text"].endswith(f"unknown key {key}")
    scene.honest_backup_succeeds()
    log = scene.served.stop()
    assert not [e for e in log if e["event"] == "job-opened" and "honest" not in e["archive"]]


def test_a_client_whose_key_is_revoked_while_it_sends_loses_its_job_and_nobody_else_does(
    scene: Scene,
) -> None:
    with (
        started(*scene.backup(scene.clients["host1"], "x.vma", "--speed", "1K")) as victim,
        started(*scene.backup(scene.clients["host2"], "honest.vma", "--speed", "64K")) as other,
    ):
        next_event(victim, "begun")
        next_event(other, "begun")
        (scene.server / "clients" / "host1.pub").unlink()
        code, text = end_of(victim)
        assert (code, text.endswith("the key of client 'host1' was revoked")) == (1, True), text
        told = scene.served.next_event("job-failed")
        assert told["text"] == "the key of client 'host1' was revoked"
        assert "the archiver does not know our key" in bad(
            *scene.backup(scene.clients["host1"], "y.vma")
        )
        without_limit(other)
        assert end_of(other) == (0, "")
    assert scene.served.stored() == {"honest.vma", "honest.vma.manifest.json"}
    good("verify", "--quiet", scene.served.folder / "honest.vma")
    scene.served.stop()


def test_port_scanners_and_slow_lorises_harm_no_job(scene: Scene) -> None:
    host, port = scene.served.endpoint.removeprefix("tcp://").split(":")
    # How a greeting of ZMTP begins: one that never comes to its end.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE"
    with contextlib.ExitStack() as stack:
        lorises = [
            stack.enter_context(socket.create_connection((host, int(port)), LIMIT_S))
            for _ in range(50)
        ]
        backup = stack.enter_context(
            started(*scene.backup(scene.clients["host2"], "honest.vma", "--speed", "2M"))
        )
        junk = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-scan\r\n"]
        step = 0
        while backup.poll() is None:
            scanner = stack.enter_context(socket.create_connection((host, int(port)), LIMIT_S))
            with contextlib.suppress(OSError):
                scanner.sendall(junk[step % 3])
            for loris in lorises:
                with contextlib.suppress(OSError):
                    loris.send(greeting[step % len(greeting) :][:1])
            step += 1
            time.sleep(0.1)  # they are slow
        assert end_of(backup) == (0, "")
    log = scene.served.stop()
    told = [event["text"] for event in log if event["event"] == "notice"]
    assert "refused 1 connection: unknown key, or not the vmapipe protocol" in told
    assert len(told) < 10
    good("verify", "--quiet", scene.served.folder / "honest.vma")


@pytest.mark.slow
def test_a_half_open_connection_to_a_service_is_closed_after_ten_seconds(scene: Scene) -> None:
    host, port = scene.served.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), LIMIT_S) as loris:
        began = time.monotonic()
        loris.send(b"\xff")
        while loris.recv(4096):
            pass
        assert time.monotonic() - began > 5
    scene.honest_backup_succeeds()
    scene.served.stop()
