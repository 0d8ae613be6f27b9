# SPDX-License-Identifier: Apache-2.0
"""The appliance's programs, run here: what they say of a tree is what is there, and in our messages."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.access.files import copies, messages, parser
from vmapipe.access.files.appliance import Frames
from vmapipe.access.files.inside import port, tree, volumes
from vmapipe.access.files.inside.port import Port
from vmapipe.access.files.inside.tree import Tree
from vmapipe.access.files.messages import (
    Ask,
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    Key,
    Stretch,
    encode,
)
from vmapipe.protocol.errors import RemoteProtocolError


def told(root: Path, action: str, path: bytes, span: tuple[int, int] = (0, 0)) -> list[FromParser]:
    """The answer to a command about a folder of this host."""
    ours, theirs = socket.socketpair()
    raw = bytearray()

    def read() -> None:
        while data := ours.recv(1 << 16):
            raw.extend(data)

    reader = threading.Thread(target=read)
    with ours:
        with theirs:
            reader.start()
            connection = Port(theirs.fileno())
            answered = Tree(connection, str(root))
            found = answered.find(path)
            if found is not None:
                answered.answer(action, found, span)
            connection.flush()
        reader.join()
    return list(Frames().feed(bytes(raw)))


def entries(answer: list[FromParser]) -> dict[bytes, Entry]:
    return {item.path: item for item in answer if isinstance(item, Entry)}


def content(answer: list[FromParser], size: int) -> bytes:
    data = bytearray(size)
    for item in answer:
        if isinstance(item, FileData):
            data[item.offset : item.offset + len(item.data)] = item.data
    return bytes(data)


def test_names_kinds_attributes_and_numbers_are_those_of_the_tree(tmp_path: Path) -> None:
    odd = b"new\nline \xff"
    (tmp_path / "folder").mkdir(mode=0o750)
    place = os.fsencode(tmp_path) + b"/folder/" + odd
    with open(place, "wb") as file:
        file.write(b"odd")
    os.setxattr(place, "user.colour", b"\0blue")
    os.utime(place, ns=(5, -1_000_000_001))
    os.link(place, os.fsencode(tmp_path) + b"/second")
    (tmp_path / "link").symlink_to("folder/" + "x" * 200)
    os.mkfifo(tmp_path / "fifo")
    answer = told(tmp_path, "walk", b"/")
    found = entries(answer)
    assert set(found) == {
        *(b"/", b"/folder", b"/folder/" + odd, b"/second", b"/link", b"/fifo"),
    }
    file_entry, second = found[b"/folder/" + odd], found[b"/second"]
    assert (file_entry.kind, file_entry.size_bytes) == (messages.FILE, 3)
    assert file_entry.mtime_ns == -1_000_000_001
    assert (file_entry.inode, file_entry.links) == (second.inode, 2)
    assert file_entry.xattrs == (b"user.colour", b"\0blue")
    assert (found[b"/folder"].kind, found[b"/folder"].mode) == (messages.FOLDER, 0o750)
    assert (found[b"/link"].kind, found[b"/link"].target) == (
        messages.LINK,
        b"folder/" + b"x" * 200,
    )
    assert found[b"/fifo"].kind == messages.FIFO
    assert len(answer) == len(found)


def test_device_nodes_have_their_numbers() -> None:
    found = entries(told(Path("/dev"), "entry", b"/null"))[b"/null"]
    assert (found.kind, found.device) == (messages.CHARACTER_DEVICE, os.makedev(1, 3))


def test_holes_are_told_and_ranges_give_what_lies_in_them(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(20 << 20)
        file.write(b"x" * 300_000)
        file.truncate(30 << 20)
    raw = (tmp_path / "sparse").read_bytes()
    answer = told(tmp_path, "read", b"/sparse")
    stretches = [item for item in answer if isinstance(item, Stretch)]
    assert sum(item.length for item in stretches) < 1 << 20
    assert content(answer, len(raw)) == raw
    start = (20 << 20) - 5
    part = told(tmp_path, "range", b"/sparse", (start, 20))
    data = content(part, len(raw))[start : start + 20]
    assert data == raw[start : start + 20]
    assert not told(tmp_path, "range", b"/sparse", (31 << 20, 20))


def test_no_link_is_followed_and_no_path_leads_out(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/out").symlink_to(tmp_path)
    (tmp_path / "secret").write_text("of the host")
    for path in (b"/out/secret", b"/../secret", b"/out/../secret", b"/nothing", b"/out/"):
        answer = told(tmp_path / "top", "read", path)
        assert not [item for item in answer if not isinstance(item, Entry)], path
    assert entries(told(tmp_path / "top", "read", b"/out"))[b"/out"].kind == messages.LINK


def test_paths_longer_than_the_kernel_takes_are_walked_and_endless_ones_end(tmp_path: Path) -> None:
    name, count = "n" * 250, 40
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(count):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.mkdir("end", dir_fd=fd)
    os.close(fd)
    path = b"/" + b"/".join([name.encode()] * count)
    assert entries(told(tmp_path, "list", path)).keys() == {path + b"/end"}
    assert len(entries(told(tmp_path, "walk", b"/"))) == count + 2


def test_an_entry_that_cannot_be_read_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    whole = os.pread

    def broken(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/b"):
            raise OSError(errno.EIO, "Input/output error")
        return whole(fd, length, offset)

    monkeypatch.setattr(os, "pread", broken)
    answer = told(tmp_path, "read", b"/")
    failed = [item for item in answer if isinstance(item, EntryFailed)]
    assert failed == [EntryFailed(b"/b", b"Input/output error")]
    assert [item.data for item in answer if isinstance(item, FileData)] in (
        [b"a", b"c"],
        [b"c", b"a"],
    )


def test_limits_and_kinds_are_those_of_our_messages() -> None:
    for name in (
        "MAX_DATA_BYTES",
        "MAX_PATH_BYTES",
        "MAX_XATTRS",
        *("FILE", "FOLDER", "LINK", "FIFO", "SOCKET"),
    ):
        assert getattr(tree, name) == getattr(messages, name)
    assert (tree.CHARACTER_DEVICE, tree.BLOCK_DEVICE) == (
        messages.CHARACTER_DEVICE,
        messages.BLOCK_DEVICE,
    )
    assert volumes.MAX_WORD_BYTES == messages.MAX_WORD_BYTES
    most = tree.MAX_XATTRS_BYTES + tree.MAX_PATH_BYTES + messages.MAX_WORD_BYTES
    assert most < messages.MAX_MESSAGE_BYTES
    assert tree.MAX_STRETCHES == copies._MAX_STRETCHES
    assert tree.MAX_DEPTH == parser._MAX_DEPTH


_NUMBERS = st.integers(0, (1 << 64) - 1)
_BYTES = st.binary(max_size=300)


_ACTIONS = st.sampled_from(["list", "read", "range"])


@given(st.builds(Ask, _ACTIONS, st.integers(-1, 255), _BYTES, _BYTES, _NUMBERS, _NUMBERS))
def test_commands_arrive_as_they_were_sent(ask: Ask) -> None:
    assert port.unpack(bytes(encode(ask))) == ["ASK", *ask]


_SECRETS = st.sampled_from([1, 255, 256, 65535, 65536]).map(bytes)


@given(st.builds(Key, st.integers(-1, 255), _BYTES, _BYTES, _SECRETS | _BYTES))
def test_keys_arrive_as_they_were_sent(key: Key) -> None:
    assert port.unpack(bytes(encode(key))) == ["KEY", *key]


@given(st.lists(_BYTES, max_size=20))
def test_whatever_the_appliance_sends_is_a_message_or_refused(pieces: list[bytes]) -> None:
    frames = Frames()
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces:
            for message in frames.feed(piece):
                assert type(message).__module__ == messages.__name__


def test_a_length_beyond_the_limit_is_refused_before_it_comes() -> None:
    with pytest.raises(RemoteProtocolError, match="a message of 4294967295 bytes"):
        list(Frames().feed(b"\xff\xff\xff\xff"))
