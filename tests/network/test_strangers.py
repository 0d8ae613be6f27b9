# SPDX-License-Identifier: Apache-2.0
"""Who comes without the right key gets nothing, and an honest job beside him is unharmed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machine import bad, end_of, good, make_disk, run, started
from tests.network.keys import enrol, make_client, make_server
from tests.network.place import Place, until


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


def has_data(place: Place) -> bool:
    """The archiver has begun: its producer is in the midst of it."""
    return any(file.stat().st_size for file in place.folder.glob("*.partial"))


def failing(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 1
    return done.stderr.decode().splitlines()[-1]


def test_a_client_that_is_not_on_the_list_is_refused_and_told_so(place: Place) -> None:
    stranger = make_client(place.folder / "stranger", place.server)
    for _ in range(2):
        assert "the archiver does not know our key" in failing(run(*place.producer(stranger)))
    key = (stranger / "client.pub").read_text().strip()
    place.honest_job_succeeds()
    assert [line for line in place.said if key in line] == [
        f"refused a connection from 127.0.0.1: unknown key {key}"
    ]


def test_a_client_talks_to_no_other_server_than_its_own(place: Place) -> None:
    other = make_server(place.folder / "other")
    fooled = make_client(place.folder / "fooled", other)
    enrol(fooled, place.server, "fooled")
    assert "is its key the one in our server.pub" in failing(run(*place.producer(fooled)))
    place.honest_job_succeeds()


def test_without_keys_nobody_gets_in(place: Place) -> None:
    assert "does not speak plain ZeroMQ" in failing(run(*place.producer(None)))
    place.honest_job_succeeds()


def test_with_keys_nobody_talks_to_a_server_without(tmp_path: Path) -> None:
    client = make_client(tmp_path / "client", make_server(tmp_path / "server"), "host1")
    disk = make_disk(tmp_path / "disk.raw", "A")
    with started(
        *("archiver", "--insecure-plain-tcp", "--listen", "tcp://127.0.0.1:*"),
        *("--expect", "1", "--output", tmp_path / "vm.vma"),
    ) as archiver:
        assert archiver.stderr is not None
        endpoint = archiver.stderr.readline().decode().split()[-1]
        words = ("producer", "--archiver", endpoint, "--keys", client, "--disk", disk)
        # Which of the two depends on who is quicker with its greeting.
        assert re.search("does not speak CURVE|was it started with --keys", failing(run(*words)))


def test_a_client_that_is_taken_off_the_list_does_not_come_in_again(place: Place) -> None:
    gone = make_client(place.folder / "gone", place.server)
    listed = enrol(gone, place.server, "gone")
    # Let in, and refused for another reason: the list is read anew at each connection.
    text = failing(run(*place.producer(gone, "--name", "vmstate\tx")))
    assert "is not valid" in text or "malformed" in text
    listed.unlink()
    assert "the archiver does not know our key" in failing(run(*place.producer(gone)))
    place.honest_job_succeeds()


def test_a_client_whose_key_is_revoked_while_it_sends_is_cut_off(place: Place) -> None:
    with started(*place.producer(place.client, "--speed", "64K")) as producer:
        until(lambda: has_data(place), place.archiver)
        (place.server / "clients" / "host1.pub").unlink()
        words = "device 'disk.raw': the key of client 'host1' was revoked"
        code, text = end_of(producer)
        last = text.splitlines()[-1]
        assert (code, last) == (1, f"vmapipe producer: the job was ended: {words}")
    assert end_of(place.archiver) == (1, f"vmapipe archiver: {words}")
    assert not list(place.folder.glob("vm.vma*"))


def test_junk_on_the_port_harms_nobody(place: Place) -> None:
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL"):
        place.throw(junk)
    place.honest_job_succeeds()


def test_keys_and_their_absence_are_wrong_use_where_they_make_no_sense(tmp_path: Path) -> None:
    archiver = ("archiver", "--expect", "1", "--output", tmp_path / "vm.vma")
    at = "tcp://127.0.0.1:*"
    assert "--keys DIR" in bad(*archiver, "--listen", at, code=2)
    assert "no such folder" in bad(*archiver, "--listen", at, "--keys", tmp_path / "no", code=2)
    assert "--keys is for tcp://" in bad(
        *archiver, "--listen", f"ipc://{tmp_path}/s", "--keys", tmp_path, code=2
    )
    assert "--keys is for tcp://" in bad(
        *archiver, "--listen", at, "--insecure-plain-tcp", "--keys", tmp_path, code=2
    )


def test_keygen_makes_what_both_sides_need_and_overwrites_nothing(tmp_path: Path) -> None:
    server, client = tmp_path / "s", tmp_path / "c"
    assert b"server.key (secret)" in good("keygen", server)
    good("keygen", "--client", client)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert "exists already" in bad("keygen", server)
    assert "exists already" in bad("keygen", "--client", client)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    (tmp_path / "file").write_text("")
    assert "cannot make keys" in bad("keygen", tmp_path / "file")
