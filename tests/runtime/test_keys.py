# SPDX-License-Identifier: Apache-2.0
"""Folders of keys: what is read, what is refused, and who is let in."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from tests.network.keys import enrol, make_client, make_server
from vmapipe.control.cli.keygen import new_pair
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.keys import (
    ClientList,
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
    assert ClientList(listed.clients).read() == {keys.pair.public: "host1"}


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
    assert list(ClientList(keys.clients).read().values()) == ["host2"]
    (server / "clients" / "host2.pub").unlink()
    assert ClientList(keys.clients).read() == {}


def test_a_file_that_is_no_key_lets_nobody_in_and_shuts_nobody_out(
    server: Path, client: Path
) -> None:
    keys = read_server_keys(str(server))
    (server / "clients" / "broken.pub").write_text("broken\n")
    (server / "clients" / "notes.txt").write_text("notes\n")
    (server / "clients" / "folder.pub").mkdir()
    assert list(ClientList(keys.clients).read().values()) == ["host1"]


def test_a_key_under_two_names_lets_nobody_in(server: Path, client: Path) -> None:
    keys = read_server_keys(str(server))
    enrol(client, server, "other")
    assert ClientList(keys.clients).read() == {}


@pytest.mark.parametrize("name", ["host1", "a.b-c_d", "A" * 64, "0"])
def test_names_of_clients(name: str) -> None:
    assert is_client_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", "A" * 65, "a\n"])
def test_what_could_be_more_than_a_folders_name_is_no_clients_name(name: str) -> None:
    assert not is_client_name(name)


NOBODY = 65534


def make_writable(path: Path) -> str:
    path.chmod(path.stat().st_mode | 0o022)
    return f"chmod go-w {path}"


def give_away(path: Path) -> str:
    os.chown(path, NOBODY, NOBODY)
    return f"chown -h {os.geteuid()} {path}"


def replace_by_link(path: Path) -> str:
    """A link of somebody else's, to a file that is as it should be."""
    path.rename(path.with_name(f"{path.name}.there"))
    path.symlink_to(path.with_name(f"{path.name}.there"))
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    return f"chown -h {os.geteuid()} {path}"


WAYS = [make_writable, give_away, replace_by_link]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("what", ["", "server.pub", "clients", "clients/host1.pub", "above"])
@needs_root
def test_a_server_takes_nothing_that_others_can_change(
    tmp_path: Path, what: str, change: Callable[[Path], str]
) -> None:
    (tmp_path / "above").mkdir()
    home = make_server(tmp_path / "above" / "server")
    make_client(tmp_path / "client", home, "host1")
    way_out = change(home / what if what != "above" else tmp_path / "above")
    with pytest.raises(Failure, match="other users can") as caught:
        read_server_keys(str(home))
    assert str(caught.value).endswith(way_out)


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("what", ["", "server.pub", "client.pub"])
@needs_root
def test_a_client_takes_nothing_that_others_can_change(
    client: Path, what: str, change: Callable[[Path], str]
) -> None:
    way_out = change(client / what)
    with pytest.raises(Failure, match="other users can") as caught:
        read_client_keys(str(client))
    assert str(caught.value).endswith(way_out)


def test_links_of_our_own_are_followed_and_what_they_lead_through_is_looked_at(
    tmp_path: Path, server: Path, client: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    listed = server / "clients" / "host1.pub"
    listed.rename(elsewhere / "key")
    listed.symlink_to("../../elsewhere/key")
    keys = read_server_keys(str(server))
    clients = ClientList(keys.clients)
    assert list(clients.read().values()) == ["host1"]
    elsewhere.chmod(0o777)
    assert clients.read() == {}
    (notice,) = clients.take_notices()
    assert notice.startswith(f"client 'host1' may not come: {elsewhere}: other users can change it")
    elsewhere.chmod(0o755)
    assert list(clients.read().values()) == ["host1"]


@pytest.mark.parametrize("name", ["server.key", "server.pub", "clients/host1.pub"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    server: Path, client: Path, name: str, kind: str
) -> None:
    path = server / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path, 0o600)
        case "folder":
            path.mkdir(mode=0o700)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
            path.chmod(0o600)
    with pytest.raises(Failure, match=r"is not a file|cannot read the key|other users can change"):
        read_server_keys(str(server))


def test_a_fifo_among_the_clients_is_told_of_once_and_holds_nobody_up(
    server: Path, client: Path
) -> None:
    clients = ClientList(read_server_keys(str(server)).clients)
    os.mkfifo(server / "clients" / "trap.pub", 0o600)
    for _ in range(3):
        assert list(clients.read().values()) == ["host1"]
    assert [text for text in clients.take_notices() if "trap" in text] == [
        f"client 'trap' may not come: {server}/clients/trap.pub is not a file (a folder, FIFO, socket "
        "or device is there)"
    ]


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The lowest number that is free, and so none above it.
    probe = os.open("/", os.O_RDONLY)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_list_that_cannot_be_read_just_now_is_no_empty_list(server: Path, client: Path) -> None:
    clients = ClientList(read_server_keys(str(server)).clients)
    assert list(clients.read().values()) == ["host1"]
    for _ in range(2):
        with no_descriptors():
            assert list(clients.read().values()) == ["host1"]
    assert clients.take_notices() == [
        f"cannot read the list of keys {server}/clients: Too many open files; what was read before "
        "holds on"
    ]
    (server / "clients" / "host1.pub").unlink()
    assert clients.read() == {}


def test_a_list_that_is_gone_lets_nobody_in(server: Path, client: Path) -> None:
    clients = ClientList(read_server_keys(str(server)).clients)
    assert clients.read()
    (server / "clients").rename(server / "elsewhere")
    assert clients.read() == {}
    assert clients.take_notices() == [f"{server}/clients is gone: no client may come"]
    (server / "elsewhere").rename(server / "clients")
    assert list(clients.read().values()) == ["host1"]
