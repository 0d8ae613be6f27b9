# SPDX-License-Identifier: Apache-2.0
"""docs/nbd.md: its tables are held against the code, and its example is run."""

from __future__ import annotations

import importlib.util
import re
import socket
import threading
from pathlib import Path
from types import ModuleType

from tests.protocol.nbd.client import shake_hands
from tests.protocol.nbd.server import receive_exactly
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.reply import Data, RequestDone
from vmapipe.protocol.nbd.session import Export, MetaContext, NbdRequest, NbdSession, encode_request

RANGELESS = (c.NBD_CMD_FLUSH, c.NBD_CMD_DISC)
PAGE = (Path(__file__).parents[3] / "docs" / "nbd.md").read_text(encoding="utf-8")


def table(head: str) -> dict[str, list[str]]:
    """A table by the first word of its head: first column to the others."""
    (rows,) = re.findall(rf"^\| {head} \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_page_knows_every_option() -> None:
    assert list(table("option")) == list(c.OPTION_NAMES.values())


def test_the_page_knows_every_limit() -> None:
    told = {name: int(value) for name, (value, _) in table("limit").items()}
    assert told == {name: value for name, value in vars(c).items() if name[:4] in ("MAX_", "MIN_")}


def test_the_page_knows_every_command_and_its_flags() -> None:
    commands = table("command")
    assert list(commands) == list(c.COMMAND_NAMES.values())
    export_flags = c.KNOWN_TRANSMISSION_FLAGS & ~c.NBD_FLAG_READ_ONLY
    from_page = {
        getattr(c, name): sum(getattr(c, flag) for flag in flags.split(", ") if flag)
        for name, (flags, _) in commands.items()
    }
    session = NbdSession(
        Export("x", 4096), export_flags, structured=True, meta_contexts=(MetaContext(1, "a:b"),)
    )
    valid = {
        kind: sum(
            1 << bit
            for bit in range(1, 16)  # without FUA
            if not session.fault_of(
                NbdRequest(1 << bit, kind, 1, 0, 0 if kind in RANGELESS else 512)
            )
        )
        for kind in from_page
    }
    assert valid == from_page


def test_the_page_names_only_what_there_is() -> None:
    for name in re.findall(r"NBD_[A-Z_]+[A-Z]", PAGE):
        assert hasattr(c, name), name
    error_names = [*table("error reply"), *table("error")]
    assert {*error_names} <= {*c.REPLY_ERROR_NAMES.values(), *c.ERROR_NAMES.values()}


def test_the_example_serves(tmp_path: Path) -> None:
    module = load_example(tmp_path)
    disk = bytearray(b"abcd" * 1024)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=module.serve, args=(theirs, disk), daemon=True)
        thread.start()
        handshake = NbdClientHandshake("disk")
        shake_hands(ours, handshake)
        assert handshake.session is not None
        client = NbdClientTransmission(handshake.session)
        write = client.request(c.NBD_CMD_WRITE, 2, 4)
        read = client.request(c.NBD_CMD_READ, 0, 8)
        ours.sendall(encode_request(write) + b"1234" + encode_request(read) + client.disconnect())
        heard = []
        while client.in_flight:
            piece = bytearray(client.wanted_bytes)
            receive_exactly(ours, memoryview(piece))
            heard += list(client.feed(piece))
        thread.join(60)
    assert heard == [
        RequestDone(write.cookie, 0),
        Data(read.cookie, 0, memoryview(b"ab1234cd")),
        RequestDone(2, 0),
    ]


def load_example(folder: Path) -> ModuleType:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = folder / "example.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
