# SPDX-License-Identifier: Apache-2.0
"""Folders of keys: what is read, what is refused, and who is let in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from tests.network.keys import enrol, make_client, make_server
from vmapipe.control.link import new_pair
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.keys import (
    is_client_name,
    read_client_keys,
    read_key,
    read_server_keys,
    write_pair,
)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return make_server(tmp_path / "server")


@pytest.fixture
def client(tmp_path: Path, server: Path) -> Path:
    return make_client(tmp_path / "client", server, "host1")


def test_secret_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        home = make_server(tmp_path / "open")
    finally:
        os.umask(old)
    assert (home / "server.key").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == (home / "clients").stat().st_mode & 0o777 == 0o700


def test_a_client_knows_its_server_and_the_server_its_client(server: Path, client: Path) -> None:
    keys, listed = read_client_keys(str(client)), read_server_keys(str(server))
    assert keys.server == listed.pair.public
    assert listed.allowed() == {keys.pair.public: "host1"}


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("half", ["key", "pub"])
def test_no_key_is_overwritten(tmp_path: Path, role: str, half: str) -> None:
    there = tmp_path / f"{role}.{half}"
    there.write_text("mine")
    with pytest.raises(Failure, match="exists already"):
        write_pair(str(tmp_path), role, new_pair())
    assert there.read_text() == "mine"
    assert [file for file in tmp_path.iterdir() if file.is_file()] == [there]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_key_that_others_can_read_is_refused(
    server: Path, client: Path, mode: int
) -> None:
    (server / "server.key").chmod(mode)
    (client / "client.key").chmod(mode)
    with pytest.raises(Failure, match=r"server\.key: other users can read or change this secret"):
        read_server_keys(str(server))
    with pytest.raises(Failure, match=r"client\.key: other users can read or change this secret"):
        read_client_keys(str(client))


def test_a_list_that_others_can_extend_is_refused(server: Path) -> None:
    (server / "clients").chmod(0o777)
    with pytest.raises(Failure, match="other users can change"):
        read_server_keys(str(server))


@pytest.mark.parametrize("missing", ["client.key", "client.pub", "server.pub"])
def test_what_is_missing_is_named(client: Path, missing: str) -> None:
    (client / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        read_client_keys(str(client))


@pytest.mark.parametrize("text", ["", "x", "x" * 39, "x" * 41, "~" * 40, "é" * 40, "#" * 40])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "k.pub"
    file.write_text(text)
    with pytest.raises(Failure, match="holds no key"):
        read_key(file)


@given(st.binary(min_size=32, max_size=32))
def test_every_key_can_be_read(tmp_path_factory: pytest.TempPathFactory, key: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.pub"
    file.write_bytes(z85.encode(key) + b"\n")
    assert z85.decode(read_key(file)) == key


def test_the_list_of_clients_is_read_as_it_is_now(server: Path, client: Path) -> None:
    keys = read_server_keys(str(server))
    listed = server / "clients" / "host1.pub"
    listed.rename(server / "clients" / "host2.pub")
    assert list(keys.allowed().values()) == ["host2"]
    (server / "clients" / "host2.pub").unlink()
    assert keys.allowed() == {}


def test_a_file_that_is_no_key_lets_nobody_in_and_shuts_nobody_out(
    server: Path, client: Path
) -> None:
    keys = read_server_keys(str(server))
    (server / "clients" / "broken.pub").write_text("broken\n")
    (server / "clients" / "notes.txt").write_text("notes\n")
    (server / "clients" / "folder.pub").mkdir()
    assert list(keys.allowed().values()) == ["host1"]


def test_a_key_under_two_names_lets_nobody_in(server: Path, client: Path) -> None:
    keys = read_server_keys(str(server))
    enrol(client, server, "other")
    assert keys.allowed() == {}


@pytest.mark.parametrize("name", ["host1", "a.b-c_d", "A" * 64, "0"])
def test_names_of_clients(name: str) -> None:
    assert is_client_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", "A" * 65, "a\n"])
def test_what_could_be_more_than_a_folders_name_is_no_clients_name(name: str) -> None:
    assert not is_client_name(name)
